"""In which format a parameter and its slots are kept: what is there tells, and options where nothing is yet."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.rule import FLOAT8, Slot
from surefoot.storage import Format, format_8_bits, format_16_bits, format_of

CORRECTION = "weight_correction"
"""The key in a parameter's state of what `master_weight_bits` keeps beside it."""
CORRECTIONS = {24: torch.int8, 32: torch.int16}
_BITS_16 = (torch.bfloat16, torch.float16)


def takes_correction(param: Tensor) -> bool:
    """Return whether a correction can stand beside a parameter: whether it is bfloat16 or float16."""
    return param.dtype in _BITS_16


def has_correction(group: Mapping[str, Any], param: Tensor) -> bool:
    """Return whether a parameter is kept with a correction in its state."""
    return takes_correction(param) and bool(group.get("master_weight_bits"))


def param_format(group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> Format:
    """Return the format of a parameter."""
    if not takes_correction(param) or group.get("differentiable"):
        return format_of(param.dtype)
    held = entry.get(CORRECTION)
    asked = CORRECTIONS.get(group.get("master_weight_bits") or 0)
    correction = held.dtype if isinstance(held, Tensor) else asked
    return format_16_bits(param.dtype, stochastic=group.get("rounding") == "stochastic", correction=correction)


def slot_format(slot: Slot, group: Mapping[str, Any], param: Tensor, value: Tensor | None) -> Format:
    """Return the format of a slot of a parameter: of what is there, or what it is to be made in."""
    if value is None and group.get("state_dtype") == FLOAT8 and slot.takes_float8(param, group):
        return format_8_bits(signed=slot.signed)
    dtype = slot.dtype_for(param, group) if value is None else value.dtype
    if dtype is torch.uint8:
        return format_8_bits(signed=slot.signed)
    rounds = slot.slow and dtype in _BITS_16 and not group.get("differentiable")
    return format_16_bits(dtype, stochastic=True) if rounds else format_of(dtype)


def part_names(slots: Sequence[Slot], formats: Sequence[Format]) -> Iterator[str]:
    """Yield the keys in the state of what stands beside a parameter and its slots, given their formats, if any."""
    if not formats:
        return
    for name, kept in zip(("", *(slot.name for slot in slots)), formats, strict=True):
        if kept.part:
            yield f"{name}_{kept.part}" if name else CORRECTION
