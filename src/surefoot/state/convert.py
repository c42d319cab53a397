"""State from one format into another, and as plain float32 values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surefoot.rule import AlgorithmSpec, Slot
from surefoot.state.formats import CORRECTION, CORRECTIONS, param_format, slot_format
from surefoot.state.make import stored_slot
from surefoot.storage import Format, decode
from surefoot.tensors.shards import is_sharded, to_local, wrap_local


def convert_state(spec: AlgorithmSpec, group: Mapping[str, Any], param: Tensor, entry: dict[str, Any]) -> None:
    """Bring a parameter's state, which fits it, into the formats that its group asks for, if it asks for any."""
    for slot in spec.all_slots if group.get("state_dtype") is not None else ():
        if (value := entry.get(slot.name)) is None:
            continue
        now, asked = (slot_format(slot, group, param, each) for each in (value, None))
        if (now.dtype, now.code) != (asked.dtype, asked.code):
            plain = plain_slot(slot, now, entry)
            entry.pop(f"{slot.name}_scale", None)
            entry |= stored_slot(slot, asked, plain) if asked.code else {slot.name: _in_dtype(asked, plain)}
    correction, asked_bits = entry.get(CORRECTION), group.get("master_weight_bits")
    if correction is not None and asked_bits is not None and correction.dtype is not CORRECTIONS[asked_bits]:
        entry[CORRECTION] = _correction_in(CORRECTIONS[asked_bits], correction)


def _in_dtype(asked: Format, plain: Tensor) -> Tensor:
    """Return a tensor in the dtype of a format, complex where it is."""
    return plain.to(asked.dtype.to_complex() if plain.is_complex() else asked.dtype)


def plain_slot(slot: Slot, kept: Format, entry: Mapping[str, Any]) -> Tensor:
    """Return a slot of a format as a plain tensor: itself, or of 8 bits float32 values."""
    value: Tensor = entry[slot.name]
    if not kept.code:
        return value
    plain = decode(kept, to_local(value), to_local(entry[f"{slot.name}_scale"]))
    return wrap_local(plain, value, value.shape) if is_sharded(value) else plain


def plain_param(group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """Return the full value of a parameter: float32 with its correction, or itself without one."""
    if (correction := entry.get(CORRECTION)) is None:
        return param.detach()
    kept = param_format({**group, "differentiable": False}, param, entry)
    plain = decode(kept, to_local(param.detach()), to_local(correction))
    return wrap_local(plain, param, param.shape) if is_sharded(param) else plain


def _correction_in(dtype: torch.dtype, correction: Tensor) -> Tensor:
    """Return a correction in more or fewer bits."""
    if dtype is torch.int16:
        return correction.to(dtype) << 8
    return ((correction.to(torch.int32) + 128) >> 8).clamp(max=127).to(dtype)
