"""State of parameters: making it, checking it against its parameter, and its scalars as numbers."""

from collections.abc import Mapping, Sequence
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot.rule import EMA, STEP, Flags, Scalar, Slot, Sparse
from surefoot.tensors.fit import unfit, unfit_memory, unfit_param, unfit_state
from surefoot.tensors.gate import admit_rows
from surefoot.tensors.shards import match_layout

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer

COMMON_FLAGS = ("maximize", "max_grad_value", "ema")
CAPTURABLE_DEVICES = ("cuda", "xpu", "hpu", "privateuseone", "xla")


def describe(group: Mapping[str, Any], param: Tensor) -> str:
    """Name a parameter for a message: its name, or its position in the group, and its shape."""
    position = next(i for i, candidate in enumerate(group["params"]) if candidate is param)
    names = group.get("param_names") or ()
    name = names[position] if position < len(names) else f"params[{position}]"
    return f"`{name}` of shape {tuple(param.shape)}"


def flags_of(optimizer: "Optimizer", group: Mapping[str, Any]) -> Flags:
    """Settle the flags of a group: the truth of each hyperparameter that shapes the computation."""
    return tuple((name, _truth(group, group.get(name, False))) for name in (*COMMON_FLAGS, *optimizer.flags))


def _truth(group: Mapping[str, Any], value: Any) -> bool:
    """Whether a flag is on; a tensor counts as on where reading it would wait for a device."""
    unread = isinstance(value, Tensor) and (group.get("capturable") or not value.is_cpu)
    return bool(unread or value)


def active_slots(optimizer: "Optimizer", flags: Mapping[str, bool]) -> tuple[Slot, ...]:
    """Give the slots that exist under settled flags."""
    return tuple(slot for slot in slots_of(optimizer) if slot.when is None or flags[slot.when])


def slots_of(optimizer: "Optimizer") -> tuple[Slot, ...]:
    """Give the slots that an optimizer's parameters may have: its algorithm's, and the average."""
    return (*optimizer.slots, EMA)


def hyperparameters(group: Mapping[str, Any]) -> SimpleNamespace:
    """Give a group's options as attributes; tensors of one element as 0-d tensors."""
    return SimpleNamespace(**{name: _zero_dim(value) for name, value in group.items() if _is_option(name)})


def _is_option(name: Any) -> bool:
    return isinstance(name, str) and name != "params"


def _zero_dim(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value.squeeze()
    return tuple(_zero_dim(item) for item in value) if isinstance(value, tuple) else value


# Checking


def admissible_gradient(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, flags: Flags = ()) -> Tensor:
    """Give the gradient of a parameter in a layout that its optimizer takes.

    Raises:
        RuntimeError: a sparse gradient where the optimizer takes none, a dense one where it takes only sparse, a
            gradient or state whose shape or device is no longer that of the parameter.
        IndexError: a sparse gradient has rows outside of its shape.
        AssertionError: `capturable=True` on a device where steps cannot be captured.
    """
    grad: Any = param.grad
    name = type(optimizer).__name__
    if group.get("capturable") and param.device.type not in CAPTURABLE_DEVICES:
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {list(CAPTURABLE_DEVICES)}, "
            f"but {describe(group, param)} is on {param.device}"
        )
    if param.is_complex() and not optimizer.complex_params:
        raise RuntimeError(f"{name} does not support complex parameters, but {describe(group, param)} is {param.dtype}")
    if (reason := unfit_param(param)) is not None:
        raise RuntimeError(f"{describe(group, param)} {reason}")
    if (reason := unfit(grad, param, param.shape, placements=False)) is not None:
        raise RuntimeError(
            f"the gradient of {describe(group, param)} {reason}; set it to None after changing a parameter"
        )
    check_state(optimizer, group, param)
    if grad.layout is torch.strided:
        if optimizer.sparse is Sparse.ONLY:
            raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
        if (reason := unfit_memory(grad, written=False)) is not None:
            raise RuntimeError(f"the gradient of {describe(group, param)} {reason}")
        laid_out: Tensor = match_layout(param, grad).resolve_conj().resolve_neg()
        return torch.zeros_like(param) if laid_out._is_zerotensor() else laid_out
    if not grad.is_sparse or optimizer.sparse is Sparse.REFUSED:
        raise RuntimeError(f"{name} does not support sparse gradients{optimizer.instead_of_sparse}")
    if "weight_decay" in optimizer.flags and group.get("weight_decay"):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients; set weight_decay=0")
    rows = admit_rows(grad)
    return rows if optimizer.rows_suffice(dict(flags)) else rows.to_dense()


def check_state(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor) -> None:
    """Refuse state that does not fit its parameter (any more)."""
    state = optimizer.state.get(param, {})
    for scalar in optimizer.scalars:
        if scalar.name in state and not _is_one_number(value := state[scalar.name]):
            raise TypeError(
                f"state `{scalar.name}` must be a number or a tensor of one element, but is {value!r} for "
                f"{describe(group, param)}"
            )
    for slot in slots_of(optimizer):
        value = state.get(slot.name)
        if value is None:
            continue
        reason = unfit_state(value, param, slot.shape_for(param), like_param=slot.shape is None)
        if reason is not None:
            raise RuntimeError(
                f"state `{slot.name}` of {describe(group, param)} on {param.device} {reason}; after replacing or "
                f"moving a parameter, move its state with `optimizer.to()`, or delete it with "
                f"`del optimizer.state[param]`"
            )


def _is_one_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_nested and value.numel() == 1 and not value.is_complex()
    return isinstance(value, (Real, np.ndarray))


# Making


def make_state(optimizer: "Optimizer") -> None:
    """Make the state of every parameter, whether it has a gradient or not, but no averages of what is not stepped."""
    for group in optimizer.param_groups:
        slots = [slot for slot in active_slots(optimizer, dict(flags_of(optimizer, group))) if slot is not EMA]
        for param in group["params"]:
            ensure_state(optimizer, group, param, slots)


def ensure_state(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, slots: Sequence[Slot]) -> list[str]:
    """Make what is missing of a parameter's state; give the names of what was made."""
    state = optimizer.state.get(param, {})
    made: dict[str, Any] = {
        s.name: s.new(group, scalar_device(group, param)) for s in optimizer.scalars if s.name not in state
    }
    for slot in slots:
        if state.get(slot.name) is None and slot.shape_for(param) is not None:
            made[slot.name] = slot.new(param, group)
    if made:
        optimizer.state[param].update(made)
    return list(made)


def is_on_device(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether only the parameter's device knows its scalars: where steps may be captured, or be skipped by a kernel."""
    return bool(group.get("capturable") or (group.get("fused") and not param.is_cpu))


def scalar_device(group: Mapping[str, Any], param: Tensor) -> torch.device:
    """Device of a parameter's scalars: its own or the host."""
    return param.device if is_on_device(group, param) else torch.device("cpu")


# Moving


def relocated(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, device: torch.device) -> dict[str, Any]:
    """Give a parameter's state on a device; scalars are on the host unless steps are captured."""
    scalars = {STEP.name, *(scalar.name for scalar in optimizer.scalars)}
    home = device if group.get("capturable") else torch.device("cpu")
    return {name: _on(value, home if name in scalars else device) for name, value in optimizer.state[param].items()}


def _on(value: Any, device: torch.device) -> Any:
    """Give a tensor, or a list of them, on a device."""
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


# Scalars


def read_scalars(states: Sequence[Mapping[str, Any]], scalars: Sequence[Scalar]) -> np.ndarray:
    """Read the scalars of several parameters: float64 of shape (scalars, parameters)."""
    rows = [[_value(scalar, state[scalar.name]) for state in states] for scalar in scalars]
    return np.array(rows, dtype=np.float64).reshape(len(scalars), len(states))


def write_scalars(states: Sequence[dict[str, Any]], scalars: Sequence[Scalar], values: np.ndarray) -> None:
    """Write the scalars of several parameters, in place where they are tensors.

    Args:
        states: the parameters' state.
        scalars: what to write.
        values: of shape (scalars, parameters), or (scalars, 1) where parameters share them.
    """
    for scalar, row in zip(scalars, np.broadcast_to(values, (len(scalars), len(states))).tolist(), strict=True):
        for state, value in zip(states, row, strict=True):
            if isinstance(old := state[scalar.name], Tensor):
                old.fill_(value)
            else:
                kind: Any = int if isinstance(old, int) else type(old) if isinstance(old, Real) else float
                state[scalar.name] = kind(value)


def _value(scalar: Scalar, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if not isinstance(value, (Real, np.ndarray)):
        raise TypeError(f"state `{scalar.name}` must be a number or a tensor of one element, but is {value!r}")
    return float(value)
