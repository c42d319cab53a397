"""A plan: what the CPU engine keeps of a bucket between steps so that a step costs little more than reading gradients.

A plan is a cache: `step/cache.py` tells whether everything it was made from is still so.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.compile import STATUS, Kernel
from surefoot.codegen.threads import ONE_THREAD, run_on_threads, thread_count
from surefoot.engines.bucket import Bucket, EachParameter
from surefoot.engines.checked import VARIABLE, checked
from surefoot.engines.cpu.checks import VIOLATION, explain_violation
from surefoot.engines.cpu.compile import compiled_kernel
from surefoot.engines.cpu.source import LAUNCH, Layout
from surefoot.errors import InternalError, KernelError
from surefoot.rule import Reduction, Rule
from surefoot.storage import BLOCK, format_of
from surefoot.tensors.gate import admit, admit_scales
from surefoot.tensors.native.guards import VersionCounters

CHUNK = 16384
"""Elements of one tensor that a kernel works on at a time."""
LARGEST_ITEM, FEWEST_ITEMS = 262144, 64
TILE = 32768
"""Elements of an irregular tensor that are copied at a time."""
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
        if self.coefficients.shape != coefficients.shape:
            self.coefficients = np.zeros(coefficients.shape)
            self.words[_COEFFICIENTS], self.words[_ROWS] = self.coefficients.ctypes.data, len(coefficients)
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


class Plan:
    """A bucket's pointer table, the kernels that run on it, and the tensors that cannot be seen as flat memory."""

    def __init__(self, bucket: Bucket) -> None:
        arrays = bucket.arrays()
        bucket.gradient_addresses = arrays.addresses[1]
        param, *slots = bucket.kept
        self._compute, self._stored = bucket.compute_dtype, (param, format_of(arrays.dtypes[1]), *slots)
        self.regular, self.irregular = np.flatnonzero(arrays.flat), np.flatnonzero(~arrays.flat).tolist()
        self._sizes = arrays.sizes[self.regular]
        self.launch = TensorLaunch(len(arrays.addresses), self._sizes)
        self.launch.pointers[:] = arrays.addresses[:, self.regular]
        if bucket.is_rounded:
            known = [bucket.identities[index] for index in self.regular.tolist()]
            self.launch.set_random(bucket.seed, [who.number for who in known], [who.first or 0 for who in known])
        self._kernels: dict[Rule, Kernel] = {}
        self.row: np.ndarray | None = None
        self.checked = checked()
        self.versions = VersionCounters(list(chain.from_iterable(bucket.columns())))

    def kernel(self, rule: Rule) -> Kernel:
        """Return the kernel of a rule."""
        self.prepare(rule)
        return self._kernels[rule]

    @property
    def is_regular(self) -> bool:
        """Whether all tensors are flat memory."""
        return not self.irregular

    def _regular(self, values: np.ndarray) -> np.ndarray:
        return values[self.regular] if self.irregular else values

    def prepare(self, rule: Rule) -> None:
        """Compile the kernel of a rule."""
        if rule not in self._kernels:
            stored = self._stored[: 2 + len(rule.slots)]
            if len(stored) < len(self._stored):  # corrections then stand elsewhere, and the parameter is not read
                stored = (format_of(stored[0].dtype), *stored[1:])
            layout = Layout(self._compute, stored)
            self._kernels[rule] = compiled_kernel(rule, layout, self.checked)

    def run(self, bucket: Bucket) -> None:
        """Update the bucket's parameters and slots, and measure what its rule measures."""
        numbers = numbers_of(bucket, bucket.rule)
        if self.row is not bucket.row:
            self.row, self.launch.rows[:] = bucket.row, self._regular(bucket.row)
        self.versions.count()  # before the kernel, which drives from the caches what was just looked at
        bucket.measured = self._run(bucket.rule, bucket, numbers, bucket.row)

    def measure(self, bucket: Bucket, rule: Rule) -> Tensor | None:
        """Return what a rule measures, and leave everything as it is."""
        rows = bucket.row if rule.coefficients else np.zeros(len(bucket.params), dtype=np.int64)
        self.row, self.launch.rows[:] = None, self._regular(rows)
        self.prepare(rule)
        return self._run(rule, bucket, numbers_of(bucket, rule), rows)

    def gradient_measure(self, rule: Rule) -> Callable[[np.ndarray], np.ndarray]:
        """Return what measures by a rule of gradients, when all tensors are flat memory.

        Returns:
            A function of the addresses of the gradients, which gives float64 of shape (tensors, reductions) in an array
            that its next call may overwrite.
        """
        kernel, launch = self.kernel(rule), TensorLaunch(len(self.launch.pointers), self._sizes)
        launch.pointers[:] = self.launch.pointers
        measured = launch.measure_into(rule.reductions)

        def measure(gradients: np.ndarray) -> np.ndarray:
            launch.pointers[1] = gradients
            return launch.run_again(kernel, measured, rule.reductions)

        return measure

    def _run(self, rule: Rule, bucket: Bucket, numbers: np.ndarray, rows: np.ndarray) -> Tensor | None:
        kernel = self._kernels[rule]
        if bucket.gradient_addresses is None:
            raise InternalError("a kernel was run on gradients that no guard has seen")
        self.launch.pointers[1] = self._regular(bucket.gradient_addresses)
        if kernel.checked:
            now = bucket.arrays()
            self.launch.set_limits(now.addresses[:, self.regular], now.available[:, self.regular])
        measured = self.launch.run(kernel, numbers, rule.reductions)
        if self.irregular:
            regular, measured = measured, np.zeros((len(bucket.params), len(rule.reductions)))
            measured[self.regular] = regular
        columns = (bucket.params, bucket.grads, *bucket.slots, *bucket.parts)
        own = rule.written
        written = (own[0], False, *own[1:], *(new for kept, new in zip(bucket.kept, own, strict=False) if kept.part))
        for index in self.irregular:
            tensors = [tensors[index] for tensors in columns][: len(kernel.arrays)]
            row, who = int(rows[index]), None
            cut = list(tiles(tensors, TILE)) if bucket.is_plain else [tensors]
            if bucket.is_rounded:
                who = bucket.seed, [bucket.identities[index].number], [bucket.identities[index].first or 0]
            parts = [_run_tile(kernel, views, written, numbers[row : row + 1], rule.reductions, who) for views in cut]
            if parts:
                measured[index] = combined(rule.reductions, np.stack(parts), np.zeros(len(parts), dtype=np.int64), 1)
        return torch.from_numpy(measured) if rule.reductions else None


def _run_tile(
    kernel: Kernel,
    views: Sequence[Tensor],
    written: Sequence[bool],
    numbers: np.ndarray,
    reductions: Sequence[Reduction],
    random: tuple[int, list[int], list[int]] | None,
) -> np.ndarray:
    """Run on contiguous copies of some views, and copy back those that are written."""
    copies = [view.contiguous() for view in views]
    shaped = [copy for copy in copies if copy.shape == copies[0].shape]
    arrays = admit([[copy] for copy in shaped], [""] * len(shaped), "a copy".format)
    for scale in copies[len(shaped) :]:
        arrays = admit_scales(arrays, [scale], BLOCK, "", "a copy".format)
    launch = TensorLaunch(len(copies), arrays.sizes)
    launch.pointers[:] = arrays.addresses
    if random is not None:
        launch.set_random(*random)
    if kernel.checked:
        launch.set_limits(arrays.addresses, arrays.available)
    measured = launch.run(kernel, numbers, reductions)
    for view, copy, new in zip(views, copies, written, strict=False):
        if new and copy.data_ptr() != view.data_ptr():
            view.copy_(copy)
    row: np.ndarray = measured[0]
    return row


def numbers_of(bucket: Bucket, rule: Rule) -> np.ndarray:
    """Return the coefficients of a rule as kernels take them: float64 of shape (sets of them, coefficients)."""
    names = rule.coefficients
    if isinstance(bucket.coefficients, EachParameter):
        return bucket.coefficients.table(names)
    rows = bucket.coefficients if names else [{}]
    return np.array([[float(row[name]) for name in names] for row in rows]).reshape(len(rows), len(names))


def tiles(tensors: Sequence[Tensor], most: int) -> Iterator[Sequence[Tensor]]:
    """Cut tensors of one shape into views of at most `most` elements, along the first tensor's widest strides."""
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.numel() <= most:
        yield tensors
        return
    dimension = max((d for d in range(first.dim()) if first.size(d) > 1), key=first.stride)
    half = first.size(dimension) // 2
    for start, length in ((0, half), (half, first.size(dimension) - half)):
        yield from tiles([tensor.narrow(dimension, start, length) for tensor in tensors], most)
