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
from surefoot.engines.cpu.source import JOB
from surefoot.engines.cpu.threads import locked_function, run_locked, thread_count, thread_number
from surefoot.errors import KernelError
from surefoot.tensors.gate import admit
from surefoot.tensors.memory import bytes_spanned

_RECORD, _BASE, _SPANNED = 24, 4, 8
_NAMES, _HELD, _UNDEFINED, _FUNCTIONS, _THREAD, _NEXT, _LATER, _RESULT, _STATUS = 5, 8, 9, 10, 18, 19, 20, 21, 22
_WRITTEN, _SHIFT, _LIST_SIZE, _LIST_ITEM = 23, 24, 25, 26
_CHANGES, _OTHER_ITEMS, _READ, _WRITE, _VERSIONS, _LET_GO, _IN_SEQUENCE = 1, 2, 3, 4, 5, 6, 7
_READ_SHARED, _WRITE_SHARED, _OTHER_LISTS, _HAS_GRADIENT = 8, 9, 10, 11
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
    more = (known.version, known.count, known.grad, known.described, known.size, JOB.index("status"))
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
        self.slots = array("q", [task, *given, *[0] * (_LIST_ITEM - len(given))])
        if (known := anatomy()) is not None:
            self.slots[_UNDEFINED] = known.undefined
            self.slots[_FUNCTIONS:_THREAD] = array("q", [*known.questions, known.assign, known.lookup, known.walk])
            self.slots[_LIST_SIZE], self.slots[_LIST_ITEM] = known.list_size, known.list_item
        self._probe, self._address = _probe(), self.slots.buffer_info()[0]

    @property
    def address(self) -> int:
        """Where the job stands, as long as it lives."""
        return self._address

    def copy(self, task: int) -> "_Job":
        """Return a job of another task on the same arrays."""
        other = _Job(task)
        other.slots[1:] = self.slots[1:]
        return other

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

    def jobs(self) -> tuple["_Job", "_Job"]:
        """Return the jobs that look, and that let the gradients go, for a `JobSequence`; see `looked`."""
        return self._job, self._job.copy(_LET_GO)

    @property
    def is_over(self) -> bool:
        """Whether a change was seen, so that what was made from the tensors must not be used again."""
        return self._over

    def looked(self, *, changed: bool) -> None:
        """Take note of what a `JobSequence` has found: if nothing has changed, the gradients are held."""
        self._holds = True
        if changed:
            self._over = True
            self.let_go()

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

    @property
    def job(self) -> "_Job":
        """The job that tells, for a `JobSequence`."""
        return self._job


def lists_job(lists: Sequence[list[Any]]) -> tuple["_Job", Any]:
    """Return a job that tells whether lists have other items than now, and what must live as long as it."""
    copies = [list(items) for items in lists]
    arrays = (_ids(lists), np.array([len(items) for items in lists]), _ids(chain.from_iterable(copies)))
    return _Job(_OTHER_LISTS, len(lists), 0, *arrays), (lists, copies, arrays)


def gradients_job(tensors: Sequence[Tensor]) -> tuple["_Job", Any]:
    """Return a job that tells whether one of some tensors has a gradient, and what must live as long as it."""
    objects = _ids(tensors)
    return _Job(_HAS_GRADIENT, len(tensors), 0, objects), (tensors, objects)


class JobSequence:
    """Jobs of the guard kernel and launches of other kernels, one after the other in one call.

    Args:
        steps: jobs, or (kernel's address, job's address); all must live as long as this does.
    """

    def __init__(self, steps: Sequence["_Job | tuple[int, int]"]) -> None:
        self._steps = steps
        pairs = [step if isinstance(step, tuple) else (0, step.address) for step in steps]
        self._entries = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._job = _Job(_IN_SEQUENCE, len(pairs), 0, self._entries)
        self._slots, self._call, self._address = self._job.slots, locked_function(_probe()), self._job.address

    def run(self) -> int:
        """Run up to the first job that finds something; return its number, from 1, or 0.

        Raises:
            KernelError: an error has stopped the guard kernel.
        """
        self._call(self._address)
        if self._slots[_STATUS]:
            raise KernelError(f"the guard kernel was stopped by an error (status {self._slots[_STATUS]})")
        return self._slots[_RESULT]


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

    @property
    def job(self) -> "_Job | None":
        """The job that counts, for a `JobSequence`; None where torch must be asked."""
        return self._job

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

    def shared_jobs(self, shared: int) -> tuple["_Job", "_Job", np.ndarray]:
        """Return the jobs that read and write numbers of which `shared` in a row are the same, and their values."""
        reading, writing = self._job.copy(_READ_SHARED), self._job.copy(_WRITE_SHARED)
        reading.slots[2] = writing.slots[2] = shared
        return reading, writing, self._values

    def _run(self, task: int) -> np.ndarray:
        self._job.slots[0] = task
        self._job.ask()
        return self._values
