"""State of parameters: making it, checking it against its parameter, and its scalars as numbers."""

import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot.rule import EMA, STEP, Flags, Scalar, Slot, Sparse

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


def local(tensor: Tensor) -> Tensor:
    """Give what an engine works on: of a sharded tensor this process's shard, of a complex one its real view."""
    if (sharded := sharded_type()) is not None and isinstance(tensor, sharded):
        tensor = sharded.to_local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sharded_type() -> Any:
    """Give DTensor, if anything has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


# Checking


def admissible_gradient(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor, flags: Flags = ()) -> Tensor:
    """Give the gradient of a parameter in a layout that its optimizer takes.

    Raises:
        RuntimeError: a sparse gradient where the optimizer takes none, a dense one where it takes only sparse, a
            gradient or state whose shape or device is no longer that of the parameter.
        IndexError: a sparse gradient has rows outside of its shape.
        AssertionError: `capturable=True` on a device where steps cannot be captured.
    """
    grad: Tensor = param.grad  # type: ignore[assignment]
    name = type(optimizer).__name__
    if group.get("capturable") and param.device.type not in CAPTURABLE_DEVICES:
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {list(CAPTURABLE_DEVICES)}, "
            f"but {describe(group, param)} is on {param.device}"
        )
    if param.is_complex() and not optimizer.complex_params:
        raise RuntimeError(f"{name} does not support complex parameters, but {describe(group, param)} is {param.dtype}")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {describe(group, param)} has shape {tuple(grad.shape)}; set it to None after changing a "
            f"parameter's shape"
        )
    check_state(optimizer, group, param)
    if grad.layout is torch.strided:
        if optimizer.sparse is Sparse.ONLY:
            raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
        laid_out: Tensor = _laid_out_like(param, grad).resolve_conj().resolve_neg()
        return torch.zeros_like(param) if laid_out._is_zerotensor() else laid_out
    if not grad.is_sparse or optimizer.sparse is Sparse.REFUSED:
        raise RuntimeError(f"{name} does not support sparse gradients{optimizer.instead_of_sparse}")
    if "weight_decay" in optimizer.flags and group.get("weight_decay"):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients; set weight_decay=0")
    rows = coalesced(grad)
    return rows if optimizer.rows_suffice(dict(flags)) else rows.to_dense()


def coalesced(grad: Tensor) -> Tensor:
    """Give a sparse gradient that has every row once.

    Raises:
        IndexError: a row is outside of the gradient's shape, as far as that is known without waiting for a device.
        RuntimeError: the values have lost their memory.
    """
    rows = grad.coalesce()
    if type(rows) is Tensor and rows.is_cpu:
        index = rows.indices().numpy()
        if index.size and (index.min() < 0 or (index.max(axis=1) >= rows.shape[: len(index)]).any()):
            raise IndexError(f"a sparse gradient of shape {tuple(grad.shape)} has indices outside of it")
        if has_lost_memory(rows.values()):
            raise RuntimeError(f"a sparse gradient of shape {tuple(grad.shape)} has no memory for its values any more")
    return rows


def has_lost_memory(tensor: Tensor) -> bool:
    """Whether the storage of a strided tensor has been resized to less than the tensor takes."""
    if not tensor.numel():
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def _laid_out_like(param: Any, grad: Any) -> Any:
    """Give a sharded parameter's gradient in the parameter's own placements."""
    sharded = sharded_type()
    if sharded is None or not isinstance(param, sharded) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def check_state(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor) -> None:
    """Refuse state that does not fit its parameter (any more)."""
    state = optimizer.state.get(param, {})
    for slot in slots_of(optimizer):
        value = state.get(slot.name)
        if value is not None and (value.shape != slot.shape_for(param) or value.device != param.device):
            raise RuntimeError(
                f"state `{slot.name}` of {describe(group, param)} on {param.device} has shape {tuple(value.shape)} on "
                f"{value.device}; after replacing or moving a parameter, move its state with `optimizer.to()`, or "
                f"delete it with `del optimizer.state[param]`"
            )


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
