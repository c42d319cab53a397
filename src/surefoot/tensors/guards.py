"""Guards of what is kept between steps: native ones where they can be had, else the same in plain Python.

Native guards are `tensors.native.guards`; they know every tensor that stands in memory as torch's own do, on any
device.  Without a compiler, in a release of torch that keeps things elsewhere, or with `SUREFOOT_NATIVE_GUARD=0`, the
plain ones here serve: as right, but slower.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.tensors.memory import has_memory, is_plain
from surefoot.tensors.native import guards as native

Dicts = Sequence[dict[Any, Any]]


def make_guard(
    columns: Sequence[Sequence[Tensor]],
    states: Dicts = (),
    names: Sequence[str] = (),
    *,
    gradients: bool = False,
    given: Sequence[Tensor] | None = None,
    threads: bool = False,
) -> Any:
    """Return a guard of tensors: a `TensorGuard`, or a plain one."""
    if native.available():
        guard = native.TensorGuard(columns, states, names, gradients=gradients, given=given, threads=threads)
        if guard.sound and not guard.changed(given or ()):
            return guard
    return PlainTensorGuard(columns, states, names, gradients=gradients, given=given)


def share_written(guards: Iterable[Any]) -> None:
    """Let gradients of one guard not move to where the tensors of another are, which one step writes."""
    for kind in (native.TensorGuard, PlainTensorGuard):
        alike = [guard for guard in guards if type(guard) is kind]
        written = set[int]().union(*(guard.written for guard in alike))
        for guard in alike if len(alike) > 1 else ():
            guard.refuse_gradients_in(written)


def make_dict_guard(dicts: Dicts, owners: Sequence[tuple[object, str]] = ()) -> Any:
    """Return a guard of dicts: a `DictGuard`, or a plain one."""
    return (native.DictGuard if native.available() else PlainDictGuard)(dicts, owners)


def make_scalar_io(tensors: Sequence[Tensor]) -> Any:
    """Return what reads and writes 0-d tensors: a `ScalarIO`, or a plain one."""
    return (native.ScalarIO if native.available() else PlainScalarIO)(tensors)


def are_on_host(tensors: Iterable[object]) -> bool:
    """Return whether `make_scalar_io` takes all of these: 0-d tensors of float32 or float64 on the CPU."""
    return all(
        isinstance(t, Tensor)
        and is_plain(t)
        and t.dim() == 0
        and t.dtype in (torch.float32, torch.float64)
        and t.is_cpu
        and has_memory(t)
        for t in tensors
    )


class PlainTensorGuard:
    """See `tensors.native.guards.TensorGuard`."""

    def __init__(
        self,
        columns: Sequence[Sequence[Tensor]],
        states: Dicts,
        names: Sequence[str],
        *,
        gradients: bool,
        given: Sequence[Tensor] | None = None,
    ) -> None:
        self._tensors, self._gradients = list(chain.from_iterable(columns)), gradients
        self._owners, self._takes = columns[0], given is not None
        self._entries = [
            (state, name, tensor)
            for name, tensors in zip(names, columns[1:], strict=False)
            for state, tensor in zip(states, tensors, strict=True)
        ]
        self.gradients = np.zeros(len(columns[0]), dtype=np.int64)
        self._held: list[Tensor | None] = []
        self.written = self._written = {_base(tensor) for tensor in self._tensors}
        self._seen = self._see(given or ())

    def refuse_gradients_in(self, written: set[int]) -> None:
        """Let gradients not move to where others are written; see `share_written`."""
        self._written = written
        self._seen = self._seen and self._see([grad for grad in self._held if grad is not None])

    def _see(self, given: Sequence[Tensor]) -> list[tuple[object, ...]]:
        seen = list(map(_facts, self._tensors))
        if self._gradients or self._takes:
            self._held = list(given) if self._takes else [owner.grad for owner in self._owners]
            grads = list(map(_facts, self._held))
            self.gradients = np.array([facts[0] for facts in grads], dtype=np.int64)
            # They may move, but not to where the step writes.
            moved = zip(grads, self._held, strict=True)
            seen += [(*facts[1:], facts[0] and _base(grad) in self._written and facts[0]) for facts, grad in moved]
        return seen

    def changed(self, given: Sequence[Tensor] = ()) -> bool:
        """Return whether something has changed; once it has, for good."""
        if self._seen:
            entries_stay = all(state.get(name) is tensor for state, name, tensor in self._entries)
            if not entries_stay or self._seen != self._see(given):
                self._seen = []
                self.release_grads()
        return not self._seen

    def release_grads(self) -> None:
        """Hold the gradients no longer."""
        self._held = []


def _base(tensor: Tensor | None) -> int:
    """Return the address of a strided tensor's storage."""
    return 0 if tensor is None or tensor.layout is not torch.strided else tensor.untyped_storage().data_ptr()


def _facts(tensor: Tensor | None) -> tuple[Any, ...]:
    """Return the address of a tensor's memory, if it has any, and what else decides how that is read."""
    if tensor is None:
        return (0,)
    marks = (tensor.layout, tensor.is_neg(), tensor.is_conj(), tensor._is_zerotensor())
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return 0, type(tensor), marks
    described = (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), has_memory(tensor))
    return tensor.data_ptr(), type(tensor), marks, *described


class PlainDictGuard:
    """See `tensors.native.guards.DictGuard`."""

    def __init__(self, dicts: Dicts, owners: Sequence[tuple[object, str]] = ()) -> None:
        self._dicts = [(dict(items), items) for items in dicts]
        self._places = [(vars(owner), name, items) for (owner, name), items in zip(owners, dicts, strict=bool(owners))]

    def changed(self) -> bool:
        """Return whether an item has come, gone or been replaced."""
        return not (
            all(place.get(name) is items for place, name, items in self._places)
            and all(same_objects(own, items) for own, items in self._dicts)
            and all(same_objects(own.values(), items.values()) for own, items in self._dicts)
        )


def same_objects(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    """Return whether two iterables give the same objects."""
    end = (object(),)
    return all(map(is_, chain(ours, end), chain(theirs, end)))


class PlainScalarIO:
    """See `tensors.native.guards.ScalarIO`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._arrays = [tensor.numpy() for tensor in tensors]

    def read(self) -> np.ndarray:
        """Return the values."""
        return np.fromiter(map(np.ndarray.item, self._arrays), np.float64, len(self._arrays))

    def write(self, values: np.ndarray) -> None:
        """Set the values, rounding to the dtype of each tensor."""
        for array, value in zip(self._arrays, values.tolist(), strict=True):
            array.fill(value)
