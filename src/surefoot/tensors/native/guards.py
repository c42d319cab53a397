"""Knowing cheaply whether parameters, gradients and state are what they were, and reading many numbers at once.

All but `ScalarIO` is for tensors of any device.  Make guards with `tensors.guards`, which does without the
guard kernel where there is none.
"""

import functools
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.compile import STATUS, build_kernel
from surefoot.codegen.threads import locked_function, run_locked, thread_count, thread_number
from surefoot.environment import switch
from surefoot.errors import KernelError
from surefoot.tensors.gate import admit
from surefoot.tensors.memory import bytes_spanned, counts_versions, spans_are_apart, version
from surefoot.tensors.native.layout import WORD, tensor_layout

_RECORD, _BASE, _SPANNED = 24, 4, 8
_SECOND, _NAMES, _HELD, _UNDEFINED, _FUNCTIONS, _THREAD, _NEXT, _LATER, _RESULT = 3, 6, 9, 10, 11, 19, 20, 21, 22
_WRITTEN, _SHIFT, _LIST_SIZE, _LIST_ITEM, _GIVEN, _OTHER, _MOVED = 23, 24, 25, 26, 27, 28, 29
_PLACES = 7
_CHANGES, _OTHER_ITEMS, _READ, _WRITE, _VERSIONS, _RELEASE_GRADS, _IN_SEQUENCE = 1, 2, 3, 4, 5, 6, 7
_READ_SHARED, _WRITE_SHARED, _OTHER_LISTS, _HAS_GRADIENT, _ENTER, _COMPARE, _OTHER_ENTRIES = 8, 9, 10, 11, 12, 13, 14
_FEW = 2000
"""Tensors that one thread has looked at before another has woken up: as many for each thread are enough."""


def guard_source() -> str:
    """Return the source of the guard kernel for this release of torch.

    Raises:
        ImportError: torch keeps things in unknown places.
    """
    if (known := tensor_layout()) is None:
        raise ImportError("torch keeps things in unknown places")
    places = (known.tensor, known.storage, known.data, known.deleter, known.description, known.key_set, known.autograd)
    more = (known.version, known.count, known.grad, known.described, known.size)
    text = Path(__file__).with_name("guard_kernel.py").read_text()
    return f"PLACES = {(*places, *more)}\n{text}"


@functools.cache
def _guard_kernel() -> int:
    """Return the address of the compiled guard kernel.

    Raises:
        ImportError: there is no compiler, or none that works.
    """
    return build_kernel(guard_source(), "guard").address


VARIABLE = "SUREFOOT_NATIVE_GUARD"


def available() -> bool:
    """Return whether native guards can be had; see `unavailable`."""
    return unavailable() is None


def unavailable() -> str | None:
    """Return why native guards cannot be had, None if they can.

    Raises:
        ValueError: `$SUREFOOT_NATIVE_GUARD` is neither 1 nor 0.
    """
    if not switch(VARIABLE, default=True):
        return f"{VARIABLE}=0 turns them off"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "Python runs without the interpreter lock, under which they read its dicts and lists"
    if tensor_layout() is None:
        return "this release of torch keeps tensors in memory in a way that is not known"
    return None if _has_guard_kernel() else "llvmlite, which compiles them, cannot be imported"


@functools.cache
def _has_guard_kernel() -> bool:
    try:
        _guard_kernel()
    except ImportError:
        return False
    return True


class _Launch:
    """What the guard kernel is to do, with the arrays that stand in it by their address; `keeps` is what these tell."""

    def __init__(self, task: int, *slots: int | np.ndarray, keeps: object = None) -> None:
        self._kept = slots, keeps
        given = [slot.ctypes.data if isinstance(slot, np.ndarray) else slot for slot in slots]
        # An array of the standard library: its elements are set ten times as fast as NumPy's.
        self.slots = array("q", [task, 0, *given, *[0] * (_MOVED - 1 - len(given))])
        if (known := tensor_layout()) is not None:
            self.slots[_UNDEFINED] = known.undefined
            self.slots[_FUNCTIONS:_THREAD] = array(
                "q", [*known.getters, known.assign, known.dict_lookup, known.dict_next]
            )
            self.slots[_LIST_SIZE], self.slots[_LIST_ITEM] = known.list_size, known.list_item
        self._kernel, self._address = _guard_kernel(), self.slots.buffer_info()[0]

    @property
    def address(self) -> int:
        """Address of what the kernel is handed, as long as this lives."""
        return self._address

    def copy(self, task: int) -> "_Launch":
        """Return a launch for another task on the same arrays."""
        other = _Launch(task)
        other.slots[1:], other._kept = self.slots[1:], self._kept
        return other

    def run(self, tensors: int = 0) -> bool:
        """Let the kernel do it, on several threads if it is about many tensors; what it has found counts as true.

        Raises:
            KernelError: an error has stopped the guard kernel.
        """
        slots, threads = self.slots, min(1 + tensors // _FEW, thread_count())
        slots[_THREAD] = thread_number() if threads > 1 else 0
        slots[_NEXT] = slots[_LATER] = slots[_RESULT] = 0
        run_locked(self._kernel, self._address, threads)
        if slots[STATUS]:
            raise KernelError(f"the guard kernel was stopped by an error (status {slots[STATUS]})")
        return slots[_RESULT] != 0 or (slots[_LATER] != 0 and self.run())


def _ids(objects: Iterable[object]) -> np.ndarray:
    return np.fromiter(map(id, objects), np.int64)


class TensorGuard:
    """Tells whether tensors are as they were when the guard was made: their memory, dtype, sizes and strides.

    Args:
        columns: lists of tensors of one length.
        states: for each position a dict in which the tensors of `columns[1:]` stand, if that is to be watched too.
        names: under which names they stand there.
        gradients: whether the first column has gradients that must stay of one kind, but may move.  A guard that
            finds nothing changed holds them until `release_grads` or the next time, whatever other threads do.
        given: gradients that are not the first column's own, one for each of its tensors; the caller holds them, and
            gives those of now to `changed`.
        threads: whether torch's threads may help, where they are needed soon: waking them takes longer than it saves.

    Attributes:
        gradients: addresses of the gradients' memory when last looked at: int64 of shape (length,).
        given: the `id` of each gradient that is given.
        sound: whether the guard sees what Python sees; do not use it otherwise.

    Make guards with `tensors.guards.make_guard`.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[Tensor]],
        states: Sequence[dict[str, Any]] = (),
        names: Sequence[str] = (),
        *,
        gradients: bool = False,
        given: Sequence[Tensor] | None = None,
        threads: bool = False,
    ) -> None:
        ids = array("q", map(id, given or ()))
        self.given = memoryview(ids)  # whose length cannot change
        self._held: np.ndarray | None = None
        self._holds = False
        self._kept = (columns, states, names)  # what the kernel knows by its id must live
        self._arrays = [_ids(chain.from_iterable(columns)), _ids(states), _ids(names)]
        count = len(columns[0])
        self._records, self._facts = np.zeros((2, count, 1 + len(columns), _RECORD), dtype=np.int64)
        self._launch = _Launch(_CHANGES, count, len(columns) - 1, *self._arrays, self._records, self._facts)
        self._launch.slots[_NAMES] *= bool(names)
        self._entries: _Launch | None = None
        self._releasing: _Launch | None = None
        if gradients:
            self._held = np.full(count + 1, known.undefined if (known := tensor_layout()) else 0, dtype=np.int64)
            self._launch.slots[_HELD] = self._held.ctypes.data
            self._releasing = self._launch.copy(_RELEASE_GRADS)
        self.gradients = self._records[:, 1, 0]
        self._tensors = count * (1 + len(columns)) * threads
        if self.given:
            self._launch.slots[_GIVEN] = ids.buffer_info()[0]
        grads = [param.grad for param in columns[0]] if gradients else given or [torch.empty(0)] * count
        rows = list(zip(columns[0], grads, *columns[1:], strict=True))
        self._records[:, :, _SPANNED] = [list(map(bytes_spanned, row)) for row in rows]
        seen = np.array([list(map(Tensor.data_ptr, row)) for row in rows])
        self._launch.run()
        self.sound = np.array_equal(seen, self._records[:, :, 0])
        self._launch.slots[_OTHER] = self._launch.slots[_MOVED] = 0
        self.release_grads()
        if gradients or given is not None:
            WrittenMemory([self]).settle()

    def count_written(self) -> int:
        """Return how many tensors there are beside gradients."""
        return sum(map(len, self._kept[0]))

    def take_table(self, table: np.ndarray, shift: int) -> None:
        """See gradients that come into memory of this table from now on; hashes shifted by `shift` are its places."""
        self._written, self._launch.slots[_SHIFT], self._launch.slots[_WRITTEN] = table, shift, table.ctypes.data

    @property
    def launch(self) -> "_Launch":
        """What looks; see `launches`."""
        return self._launch

    def readmit(self) -> None:
        """Take the tensors for what they were where they are now, which somebody has found fit."""
        self._launch.slots[_MOVED] = 0

    @property
    def is_over(self) -> bool:
        """Return whether a change was seen, so that what was made from the tensors must not be used again."""
        return bool(self._launch.slots[_OTHER] or self._launch.slots[_MOVED])

    @property
    def has_moved(self) -> bool:
        """Return whether no other change was seen than that tensors are elsewhere."""
        return bool(self._launch.slots[_MOVED] and not self._launch.slots[_OTHER])

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the tensors were when last looked at, and over how many bytes.

        For each the first column, the gradients, and the other columns: int64 of shape (columns + 1, length).
        """
        return self._records[:, :, 0].T, self._records[:, :, _SPANNED].T

    def end(self) -> None:
        """Let a change be seen that is none of memory."""
        self._launch.slots[_OTHER] = 1

    def has_entries(self) -> bool:
        """Return whether the tensors still stand in the dicts in which that is watched."""
        if self._entries is None:
            self._entries = self._launch.copy(_OTHER_ENTRIES)
        return not self._entries.run()

    def changed(self, given: Sequence[Tensor] = ()) -> bool:
        """Return whether something has changed, or cannot be known not to have.

        Once it has, for good, unless tensors have moved and are readmitted, or a gradient has not been there: what was
        made from the tensors as they were must not be used again, whatever they are like now.
        """
        self.release_grads()
        if self.given:
            self.given[:] = array("q", map(id, given))
        self._holds = self._held is not None
        if found := self._launch.run(self._tensors):
            self.release_grads()
        return found

    @property
    def needs_threads(self) -> bool:
        """Return whether it looks at so many tensors that threads may help."""
        return self._tensors >= _FEW

    def look(self) -> bool:
        """Return whether something has changed, as its launch tells, on several threads; gradients may be held then."""
        return self._launch.run(self._tensors)

    def launches(self) -> tuple["_Launch", "_Launch | None"]:
        """Return the launches that look, and that release the gradients if it has some, which are held until then."""
        return self._launch, self._releasing

    @property
    def all_deleters(self) -> np.ndarray:
        """What frees the memory of each tensor, by which allocators are told apart: int64 of shape (length, all)."""
        known = tensor_layout()
        return self._records[:, :, _BASE + (known.deleter // WORD if known else 0)]

    @property
    def deleters(self) -> np.ndarray:
        """What frees the memory of each gradient: int64 of shape (length,)."""
        return self.all_deleters[:, 1]

    def release_grads(self) -> None:
        """Hold the gradients no longer."""
        if self._releasing is not None:
            self._releasing.run()
            self._holds = False

    def __del__(self) -> None:
        """Hold nothing that nobody can release; who has let a `LaunchSequence` look has released what that held."""
        if self._holds:
            self.release_grads()


class WrittenMemory:
    """The storages that a step writes, and how far: a table for some guards, which see gradients that come into it.

    Each guard has one of its own until another is made for it and others.

    Args:
        guards: the guards.
    """

    def __init__(self, guards: Sequence["TensorGuard"]) -> None:
        self._guards, count = guards, sum(map(TensorGuard.count_written, guards))
        self._deleters = [guard.all_deleters for guard in guards]
        bits = max(1, int(2 * count).bit_length())
        self._table = np.zeros(((1 << bits) + count + 1, 3), dtype=np.int64)
        for guard in guards:
            guard.take_table(self._table, 64 - bits)
        self._entering, comparing = ([guard.launch.copy(task) for guard in guards] for task in (_ENTER, _COMPARE))
        self._launch = LaunchSequence([*self._entering, *comparing])

    def settle(self) -> bool:
        """Note what is written now; return whether all of it is surely apart, and apart from gradients."""
        self._table.fill(0)
        apart = not self._launch.run()
        if not apart:
            for launch in self._entering:
                launch.run()
        return apart

    def admits_moves(self) -> bool:
        """Return whether the tensors of the guards have moved, which is all that has changed, and are apart there."""
        over = [guard.is_over for guard in self._guards]
        if not any(over) or not all(not guard.changed() or guard.has_moved for guard in self._guards):
            return False
        apart = (self.settle() and self._are_of_one_allocator()) or self._are_apart()
        if not apart:
            for guard in self._guards:
                guard.end()
        return apart

    def _are_of_one_allocator(self) -> bool:
        """Return whether one allocator owns all storages, so that those that begin elsewhere are apart."""
        seen = b"".join(each.tobytes() for each in self._deleters)  # bytes are compared faster than small arrays
        return seen == seen[:WORD] * (len(seen) // WORD)

    def _are_apart(self) -> bool:
        """Return whether tensors were apart when last looked at, by all spans of memory."""
        places = [guard.places for guard in self._guards]
        start, size = (np.concatenate([each[part].ravel() for each in places]) for part in (0, 1))
        return spans_are_apart(start, size)


class Replaced(NamedTuple):
    """A value that another has replaced in a dict of a `DictGuard`.

    Attributes:
        number: of the dict.
        key: under which it stood.
        before, value: it, and the other.
        position: where the guard has its address.
    """

    number: int
    key: Any
    before: Any
    value: Any
    position: int


class DictGuard:
    """Tells whether dicts still have the items they had: the same objects in the same order.

    Args:
        dicts: the dicts.
        owners: for each an object of which it is an attribute, and the attribute's name, if that is to be watched too.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], owners: Sequence[tuple[object, str]] = ()) -> None:
        items = [dict(items) for items in dicts]
        places = [(vars(owner), name) for owner, name in owners]
        self._kept = (dicts, items, places)  # what is known by its id must live
        nobody = np.zeros(2 * len(dicts), dtype=np.int64)
        self._arrays = [
            _ids(dicts),
            np.array([len(each) for each in items], dtype=np.int64),
            _ids(part for each in items for pair in each.items() for part in pair),
            _ids(part for place in places for part in place) if places else nobody,
            np.zeros(3, dtype=np.int64),
            np.zeros(1 + sum(map(len, items)), dtype=np.int64),
        ]
        self._noted = memoryview(self._arrays[-1])  # type: ignore[arg-type]
        self._launch = _Launch(_OTHER_ITEMS, len(dicts), 0, *self._arrays, keeps=self._kept)

    def changed(self) -> bool:
        """Return whether an item has come, gone or been replaced."""
        return self._launch.run()

    @functools.cached_property
    def _places(self) -> list[tuple[int, Any]]:
        """Of each item the number of its dict and its key."""
        return [(number, key) for number, items in enumerate(self._kept[1]) for key in items]

    def replaced(self) -> "list[Replaced] | None":
        """Return the values that its launch has found replaced; None if keys have come, gone or changed their order.

        The values that were must still be there.
        """
        count = self._noted[0]
        if count != self._launch.slots[_RESULT]:
            return None
        return list(map(self._replaced, self._noted[1 : 1 + count]))

    def _replaced(self, offset: int) -> "Replaced":
        (dicts, items, _), place = self._kept, offset // WORD
        number, key = self._places[place // 2]
        return Replaced(number, key, items[number][key], dicts[number].get(key), place + 1)

    def replaced_again(self, before: "Iterable[Replaced]") -> "list[Replaced]":
        """Return those of values that have been replaced before that have been again."""
        dicts, items, _ = self._kept
        return [
            Replaced(number, key, known, value, position)
            for number, key, _, _, position in before
            if (value := dicts[number].get(key)) is not (known := items[number][key])
        ]

    def renew(self, replaced: "Iterable[Replaced]") -> None:
        """Compare with the values that have replaced others from now on."""
        for number, key, _, value, position in replaced:
            self._kept[1][number][key] = value
            self._arrays[2][position] = id(value)

    @property
    def launch(self) -> "_Launch":
        """What tells, for a `LaunchSequence`."""
        return self._launch


def lists_launch(lists: Sequence[list[Any]]) -> "_Launch":
    """Return what tells whether lists have other items than now."""
    copies = [list(items) for items in lists]
    arrays = (_ids(lists), np.array([len(items) for items in lists]), _ids(chain.from_iterable(copies)))
    return _Launch(_OTHER_LISTS, len(lists), 0, *arrays, keeps=(lists, copies))


def gradients_launch(tensors: Sequence[Tensor]) -> "_Launch":
    """Return what tells whether one of some tensors has a gradient."""
    return _Launch(_HAS_GRADIENT, len(tensors), 0, _ids(tensors), keeps=tensors)


class LaunchSequence:
    """Launches of the guard kernel and of other kernels, one after the other in one call.

    Args:
        steps: launches of the guard kernel, or (kernel's address, address of its launch); all must live as long as
            this does.
    """

    def __init__(self, steps: Sequence["_Launch | tuple[int, int]"]) -> None:
        self._steps = steps
        pairs = [step if isinstance(step, tuple) else (0, step.address) for step in steps]
        self._entries = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._launch = _Launch(_IN_SEQUENCE, len(pairs), 0, self._entries)
        self._slots, self._call, self._address = (
            self._launch.slots,
            locked_function(_guard_kernel()),
            self._launch.address,
        )

    def run(self) -> int:
        """Run up to the first that finds something; return its number, from 1, or 0.

        Raises:
            KernelError: an error has stopped the guard kernel.
        """
        self._call(self._address)
        if self._slots[STATUS]:
            raise KernelError(f"the guard kernel was stopped by an error (status {self._slots[STATUS]})")
        return self._slots[_RESULT]


class AlikeGuard:
    """Tells whether tensors are like others that were found fit: of one dtype, size and stride, with memory for that.

    They may be other objects, in other memory, but not in that of tensors which are written.  Once something has
    changed the guard must not be used again.  Make one with `alike_guard`.

    Attributes:
        addresses: where the tensors are that were looked at last: int64 of their number.
    """

    def __init__(self, given: Sequence[Tensor], written: Sequence[Sequence[Tensor]]) -> None:
        self._guard = guard = TensorGuard(written, given=given)
        self._given, self._look = guard.given, LaunchSequence(guard.launches()[:1])
        self.addresses, self.sound = guard.gradients, guard.sound

    def changed(self, given: Sequence[Tensor]) -> bool:
        """Return whether tensors, as many as before and of torch's own types, differ from those of the last time."""
        self._given[:] = array("q", map(id, given))
        return self._look.run() != 0


def alike_guard(given: Sequence[Tensor], written: Sequence[Sequence[Tensor]]) -> AlikeGuard | None:
    """Return the guard of some tensors, None where there is none.

    Args:
        given: the tensors, found fit.
        written: lists of as many tensors, in whose memory later ones must not be.
    """
    guard = AlikeGuard(given, written) if given and available() else None
    return guard if guard is not None and guard.sound else None


class VersionCounters:
    """Counts the versions of tensors: what tells autograd that they have been written behind its back."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._launch = list(filter(counts_versions, tensors)), None
        if not available():
            return
        seen = np.zeros(len(self._tensors), dtype=np.int64)
        launch = _Launch(_VERSIONS, len(self._tensors), 1, _ids(self._tensors), seen, keeps=self._tensors)
        launch.run()
        if seen.tolist() == list(map(version, self._tensors)):
            launch.slots[_SECOND] = 0
            self._launch = launch

    @property
    def launch(self) -> "_Launch | None":
        """What counts, for a `LaunchSequence`; None where torch must be asked."""
        return self._launch

    def count(self) -> None:
        """Add one to each."""
        if self._launch is None:
            torch.autograd.graph.increment_version(self._tensors)
        else:
            self._launch.run()


def _scalar_state(_: int) -> str:
    return "scalar state"


class ScalarIO:
    """Reads and writes many 0-d tensors of float32 or float64 on the CPU at once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = admit([[tensor] for tensor in tensors], [""] * len(tensors), _scalar_state).addresses.ravel()
        self._wide = np.array([tensor.dtype is torch.float64 for tensor in tensors], dtype=np.int64)
        self._values = np.zeros(len(tensors))
        self._launch = _Launch(_READ, len(tensors), 0, self._addresses, self._wide, self._values)

    def move(self, addresses: np.ndarray) -> None:
        """Go over to other tensors of the same dtypes, proved to be at these addresses."""
        self._addresses[:] = addresses

    def read(self) -> np.ndarray:
        """Return the values, in an array that the next call overwrites."""
        return self._run(_READ)

    def write(self, values: np.ndarray) -> None:
        """Set the values, rounding to the dtype of each tensor."""
        self._values[:] = values
        self._run(_WRITE)

    def shared(self, count: int) -> "ScalarRows":
        """Return what reads and writes the numbers, rows of so many that are mostly the same, for launches."""
        reading, writing = self._launch.copy(_READ_SHARED), self._launch.copy(_WRITE_SHARED)
        values, differ = self._values.reshape(-1, count), memoryview(reading.slots)[_OTHER : _OTHER + 1]
        found = ScalarRows(reading, writing, values, np.zeros(values.shape, dtype=np.int64), differ)
        reading.slots[_PLACES] = writing.slots[_PLACES] = found.places.ctypes.data
        found.share(np.zeros(count, dtype=np.int64))
        return found

    def _run(self, task: int) -> np.ndarray:
        self._launch.slots[0] = task
        self._launch.run()
        return self._values


class ScalarRows(NamedTuple):
    """Rows of numbers of which many are the same, as the launches of a `LaunchSequence` read and write them.

    Attributes:
        reading: what reads them.
        writing: what writes them, each as that which stands for it.
        values: where they stand between.
        places: for each where that stands which does so for it: at first the first of its row.
        differ: whether of those that were read last one is not like that: a number.
    """

    reading: _Launch
    writing: _Launch
    values: np.ndarray
    places: np.ndarray
    differ: memoryview

    def share(self, columns: np.ndarray) -> None:
        """Let in each row the numbers of these columns stand for those of all, in their order."""
        rows, count = self.values.shape
        self.places[:] = columns + np.arange(rows)[:, None] * count
