"""Making what is missing of a parameter's state, and moving it between devices."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.rule import EMA, STEP, AlgorithmSpec, Scalar, Slot
from surefoot.state.formats import CORRECTION, CORRECTIONS, has_correction, slot_format
from surefoot.storage import Format, encode, scale_shape
from surefoot.tensors.fit import unfit_param
from surefoot.tensors.modes import outside_inference
from surefoot.tensors.shards import is_sharded, to_local, wrap_local

State = MutableMapping[Any, dict[str, Any]]


def make_state(spec: AlgorithmSpec, groups: Sequence[Mapping[str, Any]], state: State) -> None:
    """Make the state of every parameter, whether it has a gradient or not, but no averages of what is not stepped.

    What cannot be stepped, and is refused if it gets a gradient, has none.
    """
    for group in groups:
        flags = dict(spec.settle_flags(group))
        slots = [slot for slot in spec.active_slots(flags) if slot is not EMA]
        for param in group["params"]:
            if unfit_param(param) is None:
                ensure_state(spec.active_scalars(flags), group, param, state, slots)


def ensure_state(
    scalars: Sequence[Scalar], group: Mapping[str, Any], param: Tensor, state: State, slots: Sequence[Slot]
) -> dict[str, bool]:
    """Make what is missing of a parameter's state; return the names of what was made, and whether each was None."""
    entry = state.get(param, {})
    scalars = [scalar for scalar in scalars if scalar.name not in entry]
    slots = [slot for slot in slots if entry.get(slot.name) is None and slot.shape_for(param, group) is not None]
    corrected = has_correction(group, param) and entry.get(CORRECTION) is None
    if not (scalars or slots or corrected):
        return {}
    with outside_inference():
        made: dict[str, Any] = {scalar.name: scalar.new(group, scalar_device(group, param)) for scalar in scalars}
        for slot in slots:
            made |= new_slot(slot, group, param)
        if corrected:
            made[CORRECTION] = new_correction(group, param)
    was_none = {name: name in entry for name in made}
    state.setdefault(param, {}).update(made)
    return was_none


def new_slot(slot: Slot, group: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """Return a new slot of a parameter, and its scale where it is kept in 8 bits, each under its key."""
    kept = slot_format(slot, group, param, None)
    plain = slot.new(param, group)
    return stored_slot(slot, kept, plain) if kept.code else {slot.name: plain}


def stored_slot(slot: Slot, kept: Format, value: Tensor) -> dict[str, Tensor]:
    """Return a slot's values, a plain tensor, as they are kept in a format, each tensor under its key."""
    tensors = encode(kept, to_local(value))
    names = (slot.name, f"{slot.name}_{kept.part}")
    if not is_sharded(value):
        return dict(zip(names, tensors, strict=False))
    shapes = (value.shape, scale_shape(value.shape))
    return {n: wrap_local(t, value, shape) for n, t, shape in zip(names, tensors, shapes, strict=False)}


def new_correction(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """Return the correction of a parameter that is exactly what it is."""
    dtype = CORRECTIONS[group["master_weight_bits"]]
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def is_on_device(group: Mapping[str, Any], param: Tensor) -> bool:
    """Return whether only the parameter's device knows its scalars: steps may be captured, or skipped there."""
    return bool(group.get("capturable") or (group.get("fused") and not param.is_cpu))


def scalar_device(group: Mapping[str, Any], param: Tensor) -> torch.device:
    """Return the device of a parameter's scalars: its own or the host."""
    return param.device if is_on_device(group, param) else torch.device("cpu")


@outside_inference()
def relocated(
    spec: AlgorithmSpec, group: Mapping[str, Any], entry: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return a parameter's state on a device; scalars are on the host unless steps are captured."""
    scalars = {STEP.name, *(scalar.name for scalar in spec.scalars)}
    home = device if group.get("capturable") else torch.device("cpu")
    return {name: _on(value, home if name in scalars else device) for name, value in entry.items()}


def _on(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a list of them, on a device."""
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def discard_state(state: State, param: Tensor, made: Mapping[str, bool]) -> None:
    """Take away what `ensure_state` has made for a step that is not made."""
    for name, was_none in made.items():
        if was_none:
            state[param][name] = None
        else:
            state[param].pop(name, None)
    if not state.get(param, True):
        del state[param]
