"""How two checkpoints differ: tensors by their values, everything else by its place."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.checkpoint.dtypes import as_real, is_numeric
from surefoot.checkpoint.json_codec import TAG
from surefoot.checkpoint.reader import Checkpoint

_NOTHING = object()


class Difference(NamedTuple):
    """A tensor or a piece of plain data that is not the same in two checkpoints.

    Attributes:
        name: a tensor's name, or the place of plain data.
        left: what it is in the first, in words; None if it is not there.
        right: the same for the second.
        elements: how many elements of a tensor differ in their bits; None for everything else.
        largest: greatest absolute difference of elements, NaN where only one is NaN.
        relative: norm of the difference over the norm in the first.
    """

    name: str
    left: str | None
    right: str | None
    elements: int | None = None
    largest: float | None = None
    relative: float | None = None


def differences(left: Checkpoint, right: Checkpoint) -> Iterator[Difference]:
    """Compare tensors of the same name, and plain data at the same place; when they were saved does not count."""
    names = [*left.places, *(name for name in right.places if name not in left.places)]
    for name in names:
        yield from _tensors(name, left, right)
    own = ("format", "step", "versions", "parts")
    yield from _plain("", *({key: side.manifest[key] for key in own} for side in (left, right)))


def _tensors(name: str, left: Checkpoint, right: Checkpoint) -> Iterator[Difference]:
    ours, theirs = ((side.tensor(name) if name in side.places else None) for side in (left, right))
    words = [None if one is None else f"{tuple(one.shape)} {one.dtype}" for one in (ours, theirs)]
    if ours is None or theirs is None or words[0] != words[1]:
        yield Difference(name, words[0], words[1])
    elif count := _differing(ours, theirs):
        shown = f"{count:,} of {ours.numel():,} elements"
        yield Difference(name, shown, shown, count, *(_distance(ours, theirs) if is_numeric(ours.dtype) else ()))


def _differing(left: Tensor, right: Tensor) -> int:
    """Count the elements whose bits differ."""
    if not left.numel():
        return 0
    rows = [side.contiguous().view(-1).view(torch.uint8).view(left.numel(), -1) for side in (left, right)]
    return int((rows[0] != rows[1]).any(1).sum())


def _distance(left: Tensor, right: Tensor) -> tuple[float, float]:
    ours, theirs = (as_real(side).double() for side in (left, right))
    # Equal infinities are no difference.
    difference = torch.where(ours == theirs, 0, ours - theirs)
    scale = float(ours.norm())
    norm = float(difference.norm())
    return float(difference.abs().max()), norm / scale if scale else float("inf")


def _plain(path: str, left: Any, right: Any) -> Iterator[Difference]:
    kinds = [side.get(TAG) if isinstance(side, dict) else None for side in (left, right)]
    if kinds[0] == kinds[1] and kinds[0] in ("tensor", "array"):
        return  # compared as tensors, by their names
    if isinstance(left, dict) and isinstance(right, dict) and kinds[0] == kinds[1]:
        for key in [*left, *(key for key in right if key not in left)]:
            below = path if key == "of" and TAG in left else f"{path}.{key}" if path else key
            yield from _plain(below, left.get(key, _NOTHING), right.get(key, _NOTHING))
    elif isinstance(left, list) and isinstance(right, list):
        for index in range(max(len(left), len(right))):
            pair = (side[index] if index < len(side) else _NOTHING for side in (left, right))
            yield from _plain(f"{path}[{index}]", *pair)
    elif type(left) is not type(right) or left != right:
        yield Difference(path, _words(left), _words(right))


def _words(value: Any) -> str | None:
    if value is _NOTHING:
        return None
    inner = value.get("of", value) if isinstance(value, Mapping) else value
    return f"{inner!r:.60}"
