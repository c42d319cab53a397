"""Launches: tensors as a kernel takes them, cut into work items for threads, and what it measures put together."""

from collections.abc import Sequence

import numpy as np

from surefoot.codegen.compile import STATUS, Kernel
from surefoot.codegen.threads import ONE_THREAD, run_on_threads, thread_count
from surefoot.engines.checked import VARIABLE
from surefoot.engines.cpu.checks import VIOLATION, explain_violation
from surefoot.engines.cpu.source import LAUNCH
from surefoot.errors import KernelError
from surefoot.rule import Reduction

CHUNK = 16384
"""Elements of one tensor that a kernel works on at a time."""
LARGEST_ITEM, FEWEST_ITEMS = 262144, 64
_NEXT_WORK_ITEM, _COEFFICIENTS, _MEASURED, _ROWS, _LIMITS, _ONLY_CHECKS, _SEED, _PARAMETER, _FIRST = map(
    LAUNCH.index,
    (
        "next_work_item", "coefficients", "measured", "rows", "limits", "only_checks", "seed", "parameter",
        "first_element",
    ),
)  # fmt: skip
_VIOLATION = slice(LAUNCH.index(VIOLATION[0]), None)


class Launch:
    """Tables of tensors, cut into work items, as kernels take them.

    Attributes:
        words: the slots of `source.LAUNCH`.
        pointers: addresses of the tensors' arrays: int64 of shape (arrays, tensors).
        limits: for checked kernels the bytes of live storage behind each pointer, of the same shape.
        rows: for each tensor its row of coefficients.
        size: elements of all tensors.
        work_items: how many there are.
        segment_tensor: for each segment the number of its tensor.
        uncut: whether each tensor is one segment.
    """

    pointers: np.ndarray
    limits: np.ndarray
    rows: np.ndarray
    size: int
    work_items: int
    segment_tensor: np.ndarray
    uncut: bool

    def __init__(self) -> None:
        self.words = np.zeros(len(LAUNCH), dtype=np.int64)
        self.address = self.words.ctypes.data
        self._status = memoryview(self.words)[STATUS : STATUS + 1]  # type: ignore[arg-type]
        self.coefficients = np.zeros((0, 0))

    def run(self, kernel: Kernel, coefficients: np.ndarray, reductions: Sequence[Reduction] = ()) -> np.ndarray:
        """Run a kernel on all work items; `coefficients` has for each row its numbers.

        Returns:
            What it measured: float64 of shape (tensors, reductions).

        Raises:
            KernelError: an error has stopped the kernel, or a checked one has found that it would leave its arrays;
                then nothing has been written.
        """
        self.make_room(coefficients.shape)
        self.coefficients[:] = coefficients
        measured = self.measure_into(reductions)
        if self.work_items and kernel.checked:
            self._check(kernel)
        return self.run_again(kernel, measured, reductions)

    def measure_into(self, reductions: Sequence[Reduction]) -> np.ndarray:
        """Return the array into which kernels write from now on what they measure of each segment."""
        measured = np.zeros((len(self.segment_tensor), len(reductions)))
        self.words[_MEASURED] = measured.ctypes.data if reductions else 0
        return measured

    def run_again(self, kernel: Kernel, measured: np.ndarray, reductions: Sequence[Reduction]) -> np.ndarray:
        """Run a kernel, found sound, with the coefficients that are there; see `run`.

        Returns:
            What it measured, which may be the array of `measure_into`.
        """
        if self.work_items:
            threads = 1 if self.size < ONE_THREAD else min(thread_count(), self.work_items)
            self.start(kernel, threads)
        return measured if self.uncut else combined(reductions, measured, self.segment_tensor, len(self.rows))

    def make_room(self, shape: tuple[int, ...]) -> None:
        """Let there be room for coefficients: for so many sets, and of each so many."""
        if self.coefficients.shape != shape:
            made: np.ndarray = np.zeros(shape)
            self.coefficients = made[:0, :0]  # if interrupted, it is to be done again
            self.words[_COEFFICIENTS], self.words[_ROWS] = made.ctypes.data, shape[0]
            self.coefficients = made

    def set_random(self, seed: int, parameters: Sequence[int], first: Sequence[int]) -> None:
        """Set what random bits begin from, and for each tensor who it is and the number of its first element."""
        self._random = np.array(parameters, dtype=np.int64), np.array(first, dtype=np.int64)
        self.words[_SEED] = np.array(seed, dtype=np.uint64).astype(np.int64)
        self.words[_PARAMETER], self.words[_FIRST] = (part.ctypes.data for part in self._random)

    def set_limits(self, addresses: np.ndarray, available: np.ndarray) -> None:
        """Note the live storages behind the pointers: at `addresses` stand tensors with so many bytes from there on."""
        offset = self.pointers - addresses
        self.limits[:] = np.where(offset >= 0, available - offset, 0)

    def _check(self, kernel: Kernel) -> None:
        """Let a checked kernel verify all work items and compute none."""
        self.words[_LIMITS], self.words[_ONLY_CHECKS] = self.limits.ctypes.data, 1
        try:
            self.start(kernel, 1)
        finally:
            self.words[_ONLY_CHECKS] = 0

    def start(self, kernel: Kernel, threads: int) -> None:
        """Run a kernel on all work items with the coefficients that are there.

        Raises:
            KernelError: an error has stopped it.
        """
        self.words[_NEXT_WORK_ITEM] = 0
        run_on_threads(kernel.address, self.address, threads)
        self.raise_if_stopped(kernel)

    def raise_if_stopped(self, kernel: Kernel) -> None:
        """Raise KernelError when an error has stopped a kernel."""
        if self._status[0]:
            raise self._error(kernel)

    def _error(self, kernel: Kernel) -> KernelError:
        """Return what to raise for a kernel that was stopped, and be ready for another."""
        status, only_checked = self.words[STATUS], self.words[_ONLY_CHECKS]
        violation = self.words[_VIOLATION].tolist()
        reason = explain_violation(violation, LAUNCH, kernel.arrays) if violation[0] else f"an error (status {status})"
        written = "none of its tensors is changed" if only_checked else "its tensors may be updated in part"
        self.words[STATUS] = self.words[_VIOLATION] = 0
        help_ = "" if kernel.checked else f"; with {VARIABLE}=1 kernels tell more"
        return KernelError(
            f"kernel {kernel.name} was stopped by {reason}; {written}, those that were updated before are, and those "
            f"that were to come are not; this is a fault of surefoot{help_}"
        )


class TensorLaunch(Launch):
    """A launch of tensors, with as many arrays each, of these sizes."""

    def __init__(self, arrays: int, sizes: np.ndarray) -> None:
        super().__init__()
        self.pointers, self.limits = np.zeros((2, arrays, len(sizes)), dtype=np.int64)
        self.rows = np.zeros(len(sizes), dtype=np.int64)
        self.size = int(sizes.sum())
        self.segment_tensor, start, size = _segments(sizes)
        self.uncut = len(self.segment_tensor) == len(sizes) and bool((sizes > 0).all())
        first = _work_items(size)
        self.work_items = len(first) - 1
        self._parts = (first, self.segment_tensor, start, size)
        firsts, tensors, starts, lengths, pointers = (part.ctypes.data for part in (*self._parts, self.pointers))
        given = {
            "work_items": self.work_items,
            "first_segment": firsts,
            "segment_tensor": tensors,
            "segment_start": starts,
            "segment_size": lengths,
            "pointers": pointers,
            "coefficient_row": self.rows.ctypes.data,
            "tensors": len(sizes),
            "segments": len(self.segment_tensor),
        }
        self.words[:] = [given.get(slot, 0) for slot in LAUNCH]


def combined(reductions: Sequence[Reduction], parts: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Put together what was measured of parts, in their order, whoever measured them.

    Args:
        reductions: what was measured.
        parts: of shape (parts, reductions).
        owner: for each part the number of what it belongs to, ascending.
        count: how many owners there are.
    """
    result = np.zeros((count, len(reductions)))
    if not parts.size:
        return result
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for column, reduction in enumerate(reductions):
        combine = np.maximum if reduction.kind == "largest" else np.add
        with np.errstate(invalid="ignore"):  # NaN is an answer here
            result[owner[starts], column] = combine.reduceat(parts[:, column], starts)
    return result


def _segments(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut tensors into segments of at most CHUNK elements: index of the tensor, start, size."""
    if len(sizes) and sizes.min() > 0 and sizes.max() <= CHUNK:
        return np.arange(len(sizes)), np.zeros_like(sizes), sizes
    counts = -(-sizes // CHUNK)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    start = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * CHUNK
    return tensor, start, np.minimum(CHUNK, sizes[tensor] - start)


def _work_items(sizes: np.ndarray) -> np.ndarray:
    """Group consecutive segments into work items, which a thread takes at a time: first segment of each, and the end.

    Long items stream through memory better, many short ones leave no thread idle.
    """
    total = int(sizes.sum())
    if total <= CHUNK:
        return np.array([0, len(sizes)] if len(sizes) else [0], dtype=np.int64)
    item = (np.cumsum(sizes) - sizes) // min(max(CHUNK, total // FEWEST_ITEMS), LARGEST_ITEM)
    return np.concatenate([[0], np.flatnonzero(item[1:] != item[:-1]) + 1, [len(sizes)]])
