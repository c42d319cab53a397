"""Sparse gradients: a kernel that sees the rows at which there are values, each as a tensor of its own."""

import functools
import math
import operator
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.compile import STATUS, Kernel, build_kernel
from surefoot.codegen.threads import locked_function
from surefoot.engines.bucket import Bucket
from surefoot.engines.checked import checked
from surefoot.engines.cpu.compile import compiled_kernel
from surefoot.engines.cpu.launch import CHUNK, FEWEST_ITEMS, LARGEST_ITEM, Launch, combined
from surefoot.engines.cpu.plan import numbers_of
from surefoot.engines.cpu.source import LAUNCH, Layout
from surefoot.errors import InternalError, KernelError
from surefoot.rule import Rule
from surefoot.storage import format_of
from surefoot.tensors.gate import Arrays, admit
from surefoot.tensors.memory import PLAIN, bytes_available, has_memory
from surefoot.tensors.native.guards import AlikeGuard, VersionCounters, alike_guard

# What the rows kernel is handed, what it is told of each table, and what it writes of a launch: words of 8 bytes.
_OURS = ("", "status", "count", "launch", "tables", "table_size", "arrays", "dimensions", "scratch", "counts",
         "sums", "kind", "owner")  # fmt: skip
_TABLE = ("number", "coefficient_row", "count", "dimensions", "indices", "values", "elements", "bytes", "keys",
          "places", "sizes")  # fmt: skip
_WRITTEN = ("work_items", "first_segment", "segment_tensor", "segment_start", "segment_size", "pointers",
            "coefficient_row", "tensors", "segments")  # fmt: skip
_SCRATCH, _SUMS, _OWNER = map(_OURS.index, ("scratch", "sums", "owner"))
_COEFFICIENT_ROW, _COUNT, _INDICES, _VALUES = map(_TABLE.index, ("coefficient_row", "count", "indices", "values"))
_WORK_ITEMS, _SEGMENTS, _TENSORS = map(LAUNCH.index, ("work_items", "segments", "tensors"))
_KINDS = {torch.float32: 1, torch.float64: 2}
"""Values that the rows kernel adds up where a row is there several times; torch adds up all others."""
_REPEATED = -2
"""The status where a row is there several times, and its values are such as the rows kernel does not add up."""
_DIGITS, _KEPT = 256, 1 << 20
"""Counters that sorting needs, and words of working memory that are kept between steps."""


@functools.cache
def _rows_kernel() -> int:
    """Return the address of the compiled rows kernel."""
    places = {
        "OURS": [8 * _OURS.index(name) for name in _OURS[1:]],
        "TABLE": [8 * position for position in range(len(_TABLE))],
        "LAUNCH": [8 * LAUNCH.index(name) for name in _WRITTEN],
        "CUTS": [CHUNK, LARGEST_ITEM, FEWEST_ITEMS],
    }
    constants = "".join(f"{name} = {tuple(values)}\n" for name, values in places.items())
    return build_kernel(constants + Path(__file__).with_name("rows_kernel.py").read_text(), "rows").address


class RowsLaunch(Launch):
    """A launch of the rows of tables, which the rows kernel writes.

    Attributes:
        finding: the address of the rows kernel and that of its own launch.
        adds_up: whether it adds up the values of a row that is there several times.
        size: elements of all rows, a row counted as often as it is given.
        is_large: whether they take more working memory than is kept between steps.

    Args:
        arrays: addresses of the arrays of each table, the gradient left out: of shape (arrays, tables).
        strides: for each of these the bytes from an index of a leading dimension to the next one.
        shapes: of each table.
        values: dtype of the gradients.
    """

    def __init__(
        self,
        arrays: np.ndarray,
        strides: Sequence[Sequence[Sequence[int]]],
        shapes: Sequence[Sequence[int]],
        values: torch.dtype,
    ) -> None:
        super().__init__()
        self._arrays, self._memory, self._capacity = len(arrays), np.zeros(0, dtype=np.int64), (-1, -1, -1)
        dimensions = max(len(each) for each in strides[0])
        self._table_size = _TABLE.index("sizes") + dimensions + len(arrays) * (1 + dimensions)
        self._tables = array("q", bytes(8 * self._table_size * len(shapes)))
        self._elements, self._itemsize, self._addresses = [], values.itemsize, array("q", bytes(16 * len(shapes)))
        for number, shape in enumerate(shapes):
            leading = len(strides[0][number])
            elements = math.prod(shape[leading:])
            self._elements.append(elements)
            described = {"number": number, "dimensions": leading, "elements": elements}
            described["bytes"] = elements * values.itemsize
            words = [described.get(name, 0) for name in _TABLE[:-1]]
            words += [*shape[:leading], *[0] * (dimensions - leading)]
            for starts, steps in zip(arrays, strides, strict=True):
                words += [int(starts[number]), *steps[number], *[0] * (dimensions - leading)]
            place = number * self._table_size
            self._tables[place : place + self._table_size] = array("q", words)
        self._counts, self.is_large = np.zeros(_DIGITS, dtype=np.int64), False
        given = {
            "count": len(shapes),
            "launch": self.address,
            "tables": self._tables.buffer_info()[0],
            "table_size": 8 * self._table_size,
            "arrays": len(arrays),
            "dimensions": dimensions,
            "counts": self._counts.ctypes.data,
            "kind": _KINDS.get(values, 0),
        }
        self._ours = array("q", [given.get(name, 0) for name in _OURS])
        self.finding, self.adds_up = (_rows_kernel(), self._ours.buffer_info()[0]), values in _KINDS

    def set_coefficient_rows(self, rows: np.ndarray) -> None:
        """Set for each table its row of coefficients."""
        self._tables[_COEFFICIENT_ROW :: self._table_size] = array("q", rows.tolist())

    def take(self, counts: Sequence[int], addresses: Sequence[int]) -> None:
        """Take how many rows each table is given, and where its contiguous indices and values are, by turns."""
        self._addresses[:] = array("q", addresses)
        self._tables[_COUNT :: self._table_size] = array("q", counts)
        self._point(self._addresses.buffer_info()[0], 8)
        self.size = sum(map(operator.mul, counts, self._elements))
        segments = sum(count * -(-elements // CHUNK) for count, elements in zip(counts, self._elements, strict=True))
        self._needed = sum(counts), segments, self.size * self._itemsize // 8 + 1
        self._reserve(*self._needed)

    def take_from(self, addresses: np.ndarray) -> None:
        """Find from now on in an array, which must outlive this, where indices and values are."""
        self._point(addresses.ctypes.data, addresses.strides[0])

    def take_again(self) -> None:
        """Take as many rows as the last time, after `release`."""
        self._reserve(*self._needed)

    def _point(self, first: int, stride: int) -> None:
        places = array("q", range(first, first + 2 * len(self._elements) * stride, stride))
        self._tables[_INDICES :: self._table_size], self._tables[_VALUES :: self._table_size] = (
            places[::2],
            places[1::2],
        )

    def find_rows(self) -> int:
        """Write the launch of the rows that indices and values tell; return the status of the rows kernel."""
        kernel, address = self.finding
        locked_function(kernel)(address)
        if not (status := self.status):
            self.work_items = int(self.words[_WORK_ITEMS])
        return status

    @property
    def status(self) -> int:
        """Return 0, or why rows were not found, below 0, and be ready for others.

        Raises:
            KernelError: an error has stopped the rows kernel.
        """
        status, self._ours[STATUS] = self._ours[STATUS], 0
        if status > 0:
            raise KernelError(f"the rows kernel was stopped by an error (status {status})")
        return status

    def _reserve(self, rows: int, segments: int, sums: int) -> None:
        """Have working memory for so many rows, segments, and words of added values."""
        if rows <= self._capacity[0] and segments <= self._capacity[1] and sums <= self._capacity[2]:
            return
        self.release()  # until all of it is there
        arrays = 1 + self._arrays
        lengths = [arrays * rows, rows, rows, 4 * rows, segments, segments, segments, segments + 1, sums]
        ends = np.cumsum(lengths)
        self._memory, self.is_large = np.empty(int(ends[-1]), dtype=np.int64), bool(ends[-1] > _KEPT)
        starts = (self._memory.ctypes.data + 8 * (ends - lengths)).tolist()
        self._ours[_OWNER], self._ours[_SCRATCH], self._ours[_SUMS] = starts[2], starts[3], starts[8]
        names = ("pointers", "coefficient_row", "", "", "segment_tensor", "segment_start", "segment_size",
                 "first_segment")  # fmt: skip
        for name, start in zip(names, starts, strict=False):
            if name:
                self.words[LAUNCH.index(name)] = start
        self._capacity = rows, segments, sums

    def release(self) -> None:
        """Release working memory."""
        self._capacity, self._memory = (-1, -1, -1), np.zeros(0, dtype=np.int64)

    @property
    def owner(self) -> np.ndarray:
        """For each row the number of its table."""
        rows = self._capacity[0]
        start = (2 + self._arrays) * rows
        return self._memory[start : start + len(self.rows)]

    @property
    def pointers(self) -> np.ndarray:  # type: ignore[override]
        """Addresses of each row in each array."""
        return self._memory[: (1 + self._arrays) * len(self.rows)].reshape(1 + self._arrays, -1)

    @property
    def rows(self) -> np.ndarray:  # type: ignore[override]
        """For each row its row of coefficients."""
        start = (1 + self._arrays) * self._capacity[0]
        return self._memory[start : start + int(self.words[_TENSORS])]

    @property
    def segment_tensor(self) -> np.ndarray:  # type: ignore[override]
        """For each segment the number of its row."""
        start = (7 + self._arrays) * self._capacity[0]
        return self._memory[start : start + int(self.words[_SEGMENTS])]

    @property
    def uncut(self) -> bool:  # type: ignore[override]
        """Whether each row is one segment."""
        return int(self.words[_SEGMENTS]) == int(self.words[_TENSORS])

    def sums_from(self, address: np.ndarray) -> np.ndarray:
        """Return the bytes from addresses on in which values are added up, not positive where they are others."""
        first, end = self._ours[_SUMS], self._memory.ctypes.data + 8 * len(self._memory)
        return np.where(address >= first, end - address, 0)


class RowsPlan:
    """What is kept between steps of parameters with sparse gradients: where rows stand, and the kernel.

    Attributes:
        dense: whether rows of parameters and slots are dense in memory.
        row: for each parameter its row of coefficients, as it was last set.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._kernels: dict[Rule, Kernel] = {}
        leading = [grad.sparse_dim() for grad in bucket.grads]
        self._arrays = (bucket.params, *bucket.slots)
        self.dense = all(
            _has_dense_rows(tensor, dimensions)
            for tensors in self._arrays
            for tensor, dimensions in zip(tensors, leading, strict=True)
        )
        self.checked, self._names = checked(), (bucket.rule.slots, bucket.row_name)
        self.row: np.ndarray | None = None
        arrays = self._admit()
        self._held: list[Tensor] = []
        self._counts: list[int] = []
        self._alike: AlikeGuard | None = None
        strides = [
            [_bytes_between_rows(tensor, dimensions) for tensor, dimensions in zip(tensors, leading, strict=True)]
            for tensors in self._arrays
        ]
        param, grad, *slots = (tensors[0].dtype for tensors in (bucket.params, bucket.grads, *bucket.slots))
        self._dtype, self._kept = grad, format_of(grad).dtype
        self._shapes = [each.shape for each in bucket.grads]
        self._rows = [
            (dimensions, list(param.shape[dimensions:]))
            for param, dimensions in zip(bucket.params, leading, strict=True)
        ]
        self.launch = RowsLaunch(arrays.addresses, strides, [param.shape for param in bucket.params], self._kept)
        self._layout = Layout(bucket.compute_dtype, tuple(map(format_of, (param, grad, *slots))))
        self._written = {tensor.untyped_storage().data_ptr() for tensors in self._arrays for tensor in tensors}
        self.versions = VersionCounters([tensor for tensors in self._arrays for tensor in tensors])

    def _admit(self) -> Arrays:
        slots, row_name = self._names
        return admit(self._arrays, ("", *(f"state `{slot.name}` of " for slot in slots)), row_name)

    def prepare(self, rule: Rule) -> None:
        """Compile the kernel of a rule."""
        if rule not in self._kernels:
            self._kernels[rule] = compiled_kernel(rule, self._layout, self.checked)

    def kernel(self, rule: Rule) -> Kernel:
        """Return the kernel of a rule."""
        self.prepare(rule)
        return self._kernels[rule]

    @property
    def is_regular(self) -> bool:
        """Whether rows of all tensors are flat memory."""
        return self.dense

    def take(self, grads: Sequence[Any]) -> bool:
        """Take gradients, held until `release`; return False if one is not such as the plan is for.

        Those that are known to be like the last ones, but for values and for where these are, are not looked at.
        """
        if self._alike is None:
            return self._take_any(grads)
        held: list[Tensor] = []
        for grad, shape in zip(grads, self._shapes, strict=True):
            if type(grad) not in PLAIN or not grad.is_sparse or grad.shape != shape:
                return self._take_any(grads)
            held += (grad._indices(), grad._values())
        if self._alike.changed(held):
            self._counts = []
            return self._take_any(grads)
        self._held = held
        if self.launch.is_large:
            self.launch.take_again()
        return True

    def _take_any(self, grads: Sequence[Any]) -> bool:
        self._alike = None
        held: list[Tensor] = []
        counts: list[int] = []
        addresses: list[int] = []
        alike = self._dtype is self._kept
        for grad, shape, (dimensions, dense) in zip(grads, self._shapes, self._rows, strict=True):
            if type(grad) not in PLAIN or not grad.is_sparse or grad.dtype is not self._dtype or not grad.is_cpu:
                return False
            given = grad._indices(), grad._values()
            index, value = _contiguous(given[0]), _contiguous(given[1] if alike else _real(given[1]))
            if grad.shape != shape or index is None or value is None or value.dtype is not self._kept:
                return False
            count, *rest = value.shape
            if index.shape != (dimensions, count) or rest != dense:
                return False
            # What the step writes is read before: one row's values might stand in another row.
            value = value.clone() if value.untyped_storage().data_ptr() in self._written else value
            alike = alike and index is given[0] and value is given[1]
            held += (index, value)
            counts.append(count)
            addresses += (index.data_ptr(), value.data_ptr())
        self._held = held
        self.launch.take(counts, addresses)
        if alike and counts == self._counts:
            self._watch()
        self._counts = counts
        return True

    def _watch(self) -> None:
        """Let gradients be compared from now on with those that are held."""
        twice = [[tensor for tensor in tensors for _ in range(2)] for tensors in self._arrays]
        if (guard := alike_guard(self._held, twice)) is not None:
            self._alike = guard
            self.launch.take_from(guard.addresses)

    def find_rows(self, grads: Sequence[Any]) -> bool:
        """Find the rows of gradients that have been taken; return False if one is outside."""
        found = self.launch.find_rows()
        if found == _REPEATED and self.take([_coalesced(grad) for grad in grads]):
            found = self.launch.find_rows()
        return not found

    def release(self) -> None:
        """Hold the gradients no longer."""
        self._held = []
        if self.launch.is_large:
            self.launch.release()

    def set_rows(self, rows: np.ndarray) -> None:
        """Set for each parameter its row of coefficients."""
        if self.row is not rows:
            self.row = rows
            self.launch.set_coefficient_rows(rows)

    def run(self, bucket: Bucket) -> None:
        """Update rows, and measure what the rule measures."""
        self.set_rows(bucket.row)
        if not (self.take(bucket.grads) and self.find_rows(bucket.grads)):
            raise InternalError("a kernel was to run on sparse gradients that were not validated")
        rule, kernel = bucket.rule, self.kernel(bucket.rule)
        if kernel.checked:
            self._set_limits()
        self.versions.count()
        measured = self.launch.run(kernel, numbers_of(bucket, bucket.rule), rule.reductions)
        if rule.reductions:
            bucket.measured = torch.from_numpy(
                combined(rule.reductions, measured, self.launch.owner, len(bucket.params))
            )
        self.release()

    def _set_limits(self) -> None:
        """Note the live storages behind the launch's rows."""
        now, launch = self._admit(), self.launch
        of_values = [[(value.data_ptr(), bytes_available(value)) for value in self._held[1::2]]]
        here = np.insert(np.stack([now.addresses, now.available], axis=2), 1, of_values, axis=0)[:, launch.owner]
        launch.limits = np.zeros_like(launch.pointers)
        launch.set_limits(here[..., 0], here[..., 1])
        launch.limits[1] = np.where((left := launch.sums_from(launch.pointers[1])) > 0, left, launch.limits[1])


def _coalesced(grad: Tensor) -> Tensor:
    """Return a gradient that has every row once, whatever it says itself; its indices have been verified."""
    again = torch.sparse_coo_tensor(grad._indices(), grad._values(), grad.shape, check_invariants=False)
    return again.coalesce()


def _contiguous(tensor: Tensor) -> Tensor | None:
    """Return indices or values in contiguous memory, None if they have lost theirs."""
    if tensor._is_zerotensor() or not has_memory(tensor):
        return None
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def _real(tensor: Tensor) -> Tensor:
    """Return complex values as real ones, if they have not lost their memory."""
    sound = tensor.is_complex() and has_memory(tensor) and not tensor._is_zerotensor()
    return torch.view_as_real(tensor.resolve_conj()) if sound else tensor


def _has_dense_rows(tensor: Tensor, leading: int) -> bool:
    """Return whether what stands behind each index of the leading dimensions is contiguous."""
    return tensor.numel() == 0 or tensor[(0,) * leading].is_contiguous()


def _bytes_between_rows(tensor: Tensor, leading: int) -> list[int]:
    return [tensor.element_size() * stride for stride in tensor.stride()[:leading]]
