"""Looks at what is kept between steps: compiled ones where there is a compiler, else the same in plain Python.

Compiled looks are `engines.cpu.tensors`; they know every tensor that stands in memory as torch's own do, on any device.
Without Numba, or in a release of torch that keeps things elsewhere, the plain ones here serve: as right, but slower.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.cpu import tensors as compiled
from surefoot.tensors.memory import has_memory, is_plain

Dicts = Sequence[dict[Any, Any]]


def look_at(
    columns: Sequence[Sequence[Tensor]],
    states: Dicts = (),
    names: Sequence[str] = (),
    *,
    gradients: bool = False,
    threads: bool = False,
) -> Any:
    """Make a `Look`, or what does its work."""
    if compiled.available():
        look = compiled.Look(columns, states, names, gradients=gradients, threads=threads)
        if look.sound and not look.changed():
            return look
    return PlainLook(columns, states, names, gradients=gradients)


def items_of(dicts: Dicts, owners: Sequence[tuple[object, str]] = ()) -> Any:
    """Make an `Items`, or what does its work."""
    return (compiled.Items if compiled.available() else PlainItems)(dicts, owners)


def numbers_in(tensors: Sequence[Tensor]) -> Any:
    """Make a `Numbers`, or what does its work."""
    return (compiled.Numbers if compiled.available() else PlainNumbers)(tensors)


def can_hold(tensors: Iterable[object]) -> bool:
    """Whether `numbers_in` takes all of these: 0-d tensors of float32 or float64 on the CPU."""
    return all(
        isinstance(t, Tensor)
        and is_plain(t)
        and t.dim() == 0
        and t.dtype in (torch.float32, torch.float64)
        and t.is_cpu
        and has_memory(t)
        for t in tensors
    )


class PlainLook:
    """See `engines.cpu.tensors.Look`."""

    def __init__(
        self, columns: Sequence[Sequence[Tensor]], states: Dicts, names: Sequence[str], *, gradients: bool
    ) -> None:
        self._tensors, self._gradients = list(chain.from_iterable(columns)), gradients
        self._owners = columns[0]
        self._entries = [
            (state, name, tensor)
            for name, tensors in zip(names, columns[1:], strict=False)
            for state, tensor in zip(states, tensors, strict=True)
        ]
        self.gradients = np.zeros(len(columns[0]), dtype=np.int64)
        self._held: list[Tensor | None] = []
        self._written = {_base(tensor) for tensor in self._tensors}
        self._seen = self._see()

    def _see(self) -> list[tuple[object, ...]]:
        seen = list(map(_facts, self._tensors))
        if self._gradients:
            self._held = [owner.grad for owner in self._owners]
            grads = list(map(_facts, self._held))
            self.gradients = np.array([facts[0] for facts in grads], dtype=np.int64)
            # They may move, but not to where the step writes.
            moved = zip(grads, self._held, strict=True)
            seen += [(*facts[1:], facts[0] and _base(grad) in self._written and facts[0]) for facts, grad in moved]
        return seen

    def changed(self) -> bool:
        """Whether something has changed; once it has, for good."""
        if self._seen:
            entries_stay = all(state.get(name) is tensor for state, name, tensor in self._entries)
            if not entries_stay or self._seen != self._see():
                self._seen = []
                self.let_go()
        return not self._seen

    def let_go(self) -> None:
        """Hold the gradients no longer."""
        self._held = []


def _base(tensor: Tensor | None) -> int:
    """Return the address of a strided tensor's storage."""
    return 0 if tensor is None or tensor.layout is not torch.strided else tensor.untyped_storage().data_ptr()


def _facts(tensor: Tensor | None) -> tuple[Any, ...]:
    """Give the address of a tensor's memory, if it has any, and what else decides how that is read."""
    if tensor is None:
        return (0,)
    marks = (tensor.layout, tensor.is_neg(), tensor.is_conj(), tensor._is_zerotensor())
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return 0, type(tensor), marks
    described = (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), has_memory(tensor))
    return tensor.data_ptr(), type(tensor), marks, *described


class PlainItems:
    """See `engines.cpu.tensors.Items`."""

    def __init__(self, dicts: Dicts, owners: Sequence[tuple[object, str]] = ()) -> None:
        self._dicts = [(dict(items), items) for items in dicts]
        self._places = [(vars(owner), name, items) for (owner, name), items in zip(owners, dicts, strict=bool(owners))]

    def changed(self) -> bool:
        """Whether an item has come, gone or been replaced."""
        return not (
            all(place.get(name) is items for place, name, items in self._places)
            and all(same_objects(own, items) for own, items in self._dicts)
            and all(same_objects(own.values(), items.values()) for own, items in self._dicts)
        )


def same_objects(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    """Whether two iterables give the same objects."""
    end = (object(),)
    return all(map(is_, chain(ours, end), chain(theirs, end)))


class PlainNumbers:
    """See `engines.cpu.tensors.Numbers`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._arrays = [tensor.numpy() for tensor in tensors]

    def read(self) -> np.ndarray:
        """Give the values."""
        return np.fromiter(map(np.ndarray.item, self._arrays), np.float64, len(self._arrays))

    def write(self, values: np.ndarray) -> None:
        """Set the values, rounding to the dtype of each tensor."""
        for array, value in zip(self._arrays, values.tolist(), strict=True):
            array.fill(value)
