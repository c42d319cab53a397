"""Values of weights and state whatever format they are kept in."""

from typing import Any

import torch
from torch import Tensor, nn

from surefoot.optimizer import Optimizer
from surefoot.state.convert import plain_slot
from surefoot.state.formats import slot_format


def full_precision(optimizer: Optimizer, param: Tensor, slot: str | None = None) -> Tensor:
    """Return a parameter's value, or that of one of its slots, in float32.

    Args:
        optimizer: the optimizer that has the parameter.
        param: the parameter, bfloat16 or float16 with a correction in the optimizer's state, or of any other dtype.
        slot: the key of a slot in `optimizer.state[param]`, such as `"exp_avg"`; the parameter itself if None.

    Returns:
        A new tensor of the parameter's shape: float32, complex64 where it is complex; float64 stays float64.

    Raises:
        KeyError: the parameter has no such slot, or is none of the optimizer's.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = surefoot.SGD([weight], lr=0.001, master_weight_bits=32)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> weight.tolist(), surefoot.full_precision(optimizer, weight).tolist()
        ([1.0, 1.0], [0.9990000128746033, 0.9990000128746033])
    """
    group = _group_of(optimizer, param)
    entry = optimizer.state.get(param, {})
    if slot is None:
        return _wide(optimizer.exact_param(group, optimizer._host_param(param), entry))
    known = {each.name: each for each in optimizer.spec.of(group).all_slots}
    if slot not in known or entry.get(slot) is None:
        there = ", ".join(name for name in known if entry.get(name) is not None)
        raise KeyError(f"the parameter has no slot {slot!r}; it has: {there or 'none, for it has not been stepped'}")
    return _wide(plain_slot(known[slot], slot_format(known[slot], group, param, entry[slot]), entry))


def full_precision_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return a model's state dict with the values that its optimizer holds, in float32.

    Parameters with a correction (`master_weight_bits`) have the value of both together; all other 16-bit floating point
    tensors are converted, what else there is stays as it is.  The model can be loaded from it in float32.
    """
    exact = {param: full_precision(optimizer, param) for group in optimizer.param_groups for param in group["params"]}
    owners = {name: exact[param] for name, param in model.named_parameters(remove_duplicate=False) if param in exact}
    found = model.state_dict()
    for name, value in found.items():
        if name in owners:
            found[name] = owners[name]
        elif isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            found[name] = value.float()
    return found


def _group_of(optimizer: Optimizer, param: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(each is param for each in group["params"]):
            return group
    raise KeyError(f"the optimizer has no parameter that is this tensor of shape {tuple(param.shape)}")


def _wide(value: Tensor) -> Tensor:
    dtype = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to(dtype, copy=True)
