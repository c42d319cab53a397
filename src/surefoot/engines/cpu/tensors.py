"""Knowing cheaply whether parameters, gradients and state are what they were, and reading many numbers at once.

Nothing here is about tensors of the CPU, but for `Numbers`.  Looks and the like are made by `engines.looks`, which does
without a compiler where there is none.
"""

import functools
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.cpu.anatomy import anatomy
from surefoot.engines.cpu.compile import load
from surefoot.engines.cpu.threads import run_locked, thread_count, thread_number
from surefoot.errors import KernelError
from surefoot.tensors.gate import admit
from surefoot.tensors.memory import bytes_spanned

_RECORD, _BASE, _SPANNED = 24, 4, 8
_NAMES, _HELD, _UNDEFINED, _FUNCTIONS, _THREAD, _NEXT, _LATER, _RESULT, _STATUS = 5, 8, 9, 10, 18, 19, 20, 21, 22
_WRITTEN, _SHIFT = 23, 24
_CHANGES, _OTHER_ITEMS, _READ, _WRITE, _VERSIONS, _LET_GO = 1, 2, 3, 4, 5, 6
_FEW = 2000
"""Tensors that one thread has looked at before another has woken up: as many for each thread are enough."""


@functools.cache
def _probe() -> int:
    """Give the address of the compiled probe.

    Raises:
        ImportError: there is no compiler, or none that works.
    """
    if (known := anatomy()) is None:
        raise ImportError("torch keeps things in unknown places")
    places = (known.tensor, known.storage, known.data, known.deleter, known.description, known.key_set, known.autograd)
    more = (known.version, known.count, known.grad, known.described, known.size)
    text = Path(__file__).with_name("probe.py").read_text()
    return load(f"PLACES = {(*places, *more)}\n{text}", "probe").address


def available() -> bool:
    """Whether there is a compiler, and torch keeps things in known places."""
    return anatomy() is not None and _has_probe()


@functools.cache
def _has_probe() -> bool:
    try:
        _probe()
    except ImportError:
        return False
    return True


class _Job:
    """What the probe is asked; arrays stand in it by their address and must outlive it."""

    def __init__(self, task: int, *slots: int | np.ndarray) -> None:
        given = [slot.ctypes.data if isinstance(slot, np.ndarray) else slot for slot in slots]
        # An array of the standard library: its elements are set ten times as fast as NumPy's.
        self.slots = array("q", [task, *given, *[0] * (_SHIFT - len(given))])
        if (known := anatomy()) is not None:
            self.slots[_UNDEFINED] = known.undefined
            self.slots[_FUNCTIONS:_THREAD] = array("q", [*known.questions, known.assign, known.lookup, known.walk])
        self._probe, self._address = _probe(), self.slots.buffer_info()[0]

    def ask(self, tensors: int = 0) -> bool:
        """Let the probe do it, on several threads if it is about many tensors; what it has found counts as true.

        Raises:
            KernelError: an error has stopped the probe.
        """
        slots, threads = self.slots, min(1 + tensors // _FEW, thread_count())
        slots[_THREAD] = thread_number() if threads > 1 else 0
        slots[_NEXT] = slots[_LATER] = slots[_RESULT] = 0
        run_locked(self._probe, self._address, threads)
        if slots[_STATUS]:
            raise KernelError(f"the guard kernel was stopped by an error (status {slots[_STATUS]})")
        return slots[_RESULT] != 0 or (slots[_LATER] != 0 and self.ask())


def _ids(objects: Iterable[object]) -> np.ndarray:
    return np.fromiter(map(id, objects), np.int64)


class Look:
    """Tells whether tensors are as they were when the look was first taken: their memory, dtype, sizes and strides.

    Args:
        columns: lists of tensors of one length.
        states: for each position a dict in which the tensors of `columns[1:]` stand, if that is to be watched too.
        names: under which names they stand there.
        gradients: whether the first column has gradients that must stay of one kind, but may move.  A look that finds
            nothing changed holds them until `let_go` or the next look, whatever other threads do.
        threads: whether torch's threads may help, where they are needed soon: waking them takes longer than it saves.

    Attributes:
        gradients: addresses of the gradients' memory at the last look: int64 of shape (length,).
        sound: whether the look sees what Python sees; do not use it otherwise.

    Make looks with `engines.looks.look_at`.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[Tensor]],
        states: Sequence[dict[str, Any]] = (),
        names: Sequence[str] = (),
        *,
        gradients: bool = False,
        threads: bool = False,
    ) -> None:
        self._held: np.ndarray | None = None
        self._holds = False
        self._kept = (columns, states, names)  # what stands in the job by its id must live
        self._arrays = [_ids(chain.from_iterable(columns)), _ids(states), _ids(names)]
        count = len(columns[0])
        self._records, self._facts = np.zeros((2, count, 1 + len(columns), _RECORD), dtype=np.int64)
        self._job = _Job(_CHANGES, count, len(columns) - 1, *self._arrays, self._records, self._facts)
        self._job.slots[_NAMES] *= bool(names)
        if gradients:
            self._held = np.full(count + 1, known.undefined if (known := anatomy()) else 0, dtype=np.int64)
            self._job.slots[_HELD] = self._held.ctypes.data
        self.gradients = self._records[:, 1, 0]
        self._tensors, self._over = count * (1 + len(columns)) * threads, False
        self._holds = gradients
        grads = [param.grad for param in columns[0]] if gradients else [torch.empty(0)] * count
        rows = list(zip(columns[0], grads, *columns[1:], strict=True))
        self._records[:, :, _SPANNED] = [list(map(bytes_spanned, row)) for row in rows]
        seen = np.array([list(map(Tensor.data_ptr, row)) for row in rows])
        self._job.ask()
        self.sound = np.array_equal(seen, self._records[:, :, 0])
        if gradients:
            written = np.unique(np.delete(self._records[:, :, _BASE], 1, axis=1))
            self._written, self._job.slots[_SHIFT] = _hash_table(written[written != 0])
            self._job.slots[_WRITTEN] = self._written.ctypes.data
        self.let_go()

    def changed(self) -> bool:
        """Whether something has changed, or cannot be known not to have; once it has, for good.

        What was made from the tensors as they were must not be used again, whatever they are like now.
        """
        if not self._over:
            self.let_go()
            self._holds = self._held is not None
            self._over = self._job.ask(self._tensors)
            if self._over:
                self.let_go()
        return self._over

    def let_go(self) -> None:
        """Hold the gradients no longer."""
        if self._holds:
            self._job.slots[0], self._holds = _LET_GO, False
            self._job.ask()
            self._job.slots[0] = _CHANGES

    def __del__(self) -> None:
        """Hold nothing that nobody can let go."""
        self.let_go()


def _hash_table(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """Return a table in which keys stand at the place that their hash tells, or as soon behind it as there is room.

    Returns:
        The table, int64 with 0 where it is empty, and the shift that makes hashes places.
    """
    shift = 64 - max(1, int(4 * len(keys)).bit_length())
    places = (keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(shift)).astype(np.int64)
    order = np.argsort(places, kind="stable")
    count = np.arange(len(keys))
    table = np.zeros((1 << (64 - shift)) + len(keys) + 1, dtype=np.int64)
    table[count + np.maximum.accumulate(places[order] - count)] = keys[order]
    return table, shift


class Items:
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
        ]
        self._job = _Job(_OTHER_ITEMS, len(dicts), 0, *self._arrays)

    def changed(self) -> bool:
        """Whether an item has come, gone or been replaced."""
        return self._job.ask()


class Versions:
    """Counts the versions of tensors: what tells autograd that they have been written behind its back."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._job = tensors, None
        if not available() or any(tensor.is_inference() for tensor in tensors):
            return
        objects, seen = _ids(tensors), np.zeros(len(tensors), dtype=np.int64)
        job = _Job(_VERSIONS, len(tensors), 1, objects, seen)
        job.ask()
        if seen.tolist() == [tensor._version for tensor in tensors]:
            job.slots[2] = 0
            self._objects, self._job = objects, job

    def count(self) -> None:
        """Add one to each."""
        if self._job is None:
            torch.autograd.graph.increment_version(self._tensors)
        else:
            self._job.ask()


def _scalar_state(_: int) -> str:
    return "scalar state"


class Numbers:
    """Reads and writes many 0-d tensors of float32 or float64 on the CPU at once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = admit([[tensor] for tensor in tensors], [""] * len(tensors), _scalar_state).addresses.ravel()
        self._wide = np.array([tensor.dtype is torch.float64 for tensor in tensors], dtype=np.int64)
        self._values = np.zeros(len(tensors))
        self._job = _Job(_READ, len(tensors), 0, self._addresses, self._wide, self._values)

    def read(self) -> np.ndarray:
        """Give the values, in an array that the next call overwrites."""
        return self._run(_READ)

    def write(self, values: np.ndarray) -> None:
        """Set the values, rounding to the dtype of each tensor."""
        self._values[:] = values
        self._run(_WRITE)

    def _run(self, task: int) -> np.ndarray:
        self._job.slots[0] = task
        self._job.ask()
        return self._values
