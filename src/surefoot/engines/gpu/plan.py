"""A plan: what the GPU engine keeps of a bucket between steps, so that a step is one launch and little before it.

A plan is a cache: it holds the kernel, the table of addresses on the device, and the division into chunks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.bucket import Bucket, Coefficients, EachParameter
from surefoot.engines.gpu.compile import dialect_of, load
from surefoot.engines.gpu.measured import combined
from surefoot.engines.gpu.tables import Table, capturing, keep_for_graphs, on
from surefoot.errors import InternalError
from surefoot.rule import Rule
from surefoot.storage import format_of
from surefoot.tensors.gate import admit
from surefoot.tensors.memory import is_dense, same_dense_layout
from surefoot.tensors.native.guards import VersionCounters


class Launch(NamedTuple):
    """How a kernel is launched: elements of a block, the warps that share it, and the blocks of a chunk."""

    block: int
    warps: int
    repeat: int

    @property
    def chunk(self) -> int:
        """Elements that a program of the kernel updates."""
        return self.block * self.repeat


LAUNCH: Mapping[int, Launch] = {2: Launch(1024, 4, 4), 4: Launch(1024, 8, 4), 8: Launch(512, 4, 4)}
"""The launch by the bytes of the widest array's elements: a thread moves 16 bytes of it at once, of float64 32.

Not measured yet: chosen from registers, spills and the bytes in flight that the compiler's report leaves room for.
`benchmarks/gpu.py --tune` measures the alternatives.
"""


def chunks_of(sizes: np.ndarray, chunk: int) -> np.ndarray:
    """Divide tensors into chunks: for each chunk, int64, its number in its tensor times 2**32, plus the tensor's."""
    counts = -(-sizes // chunk)
    tensor = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
    number = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    chunks: np.ndarray = (number << 32) | tensor
    return chunks


def firsts_of(sizes: np.ndarray, chunk: int) -> np.ndarray:
    """Return for each tensor the number of its first chunk, and at last the number of all chunks."""
    return np.concatenate([[0], np.cumsum(-(-sizes // chunk))]).astype(np.int64)


class Plan:
    """A bucket's kernels, its tables on the device, and the tensors that cannot be seen as flat memory.

    Attributes:
        dtypes: those of parameters, gradients and slots.
        irregular: positions of the tensors that cannot be seen as flat memory.
    """

    checked = False

    def __init__(self, bucket: Bucket) -> None:
        arrays, (param, *slots) = bucket.arrays(), bucket.kept
        bucket.gradient_addresses = arrays.addresses[1]
        self.dtypes, sizes = arrays.dtypes, arrays.sizes
        self._stored = (param, format_of(self.dtypes[1]), *slots)
        self._device, self._compute = bucket.device, bucket.compute_dtype
        self._dialect = dialect_of(bucket.device)
        self._launch = LAUNCH[max(kept.itemsize for kept in self._stored)]
        self.irregular = np.flatnonzero(~arrays.flat).tolist()
        self._versions = VersionCounters(list(chain.from_iterable(bucket.columns())))
        self._entries = np.array([*arrays.addresses, *_random_rows(bucket), sizes, np.zeros_like(sizes)])
        # A step sends addresses for the update and for all that it measures before, gradients among it.
        sends = 2 + len(bucket.rule.stages) if bucket.options.get("capturable") else 0
        self._table = Table(self._entries, self._device, for_graphs=sends)
        self._chunks = Table(chunks_of(sizes, self._launch.chunk), self._device).there
        self._firsts = Table(firsts_of(sizes, self._launch.chunk), self._device).there
        self._numbers: dict[tuple[str, ...], _Numbers] = {}
        self._in_graphs = False
        self._stream = _stream(self._device)

    def run(self, bucket: Bucket) -> None:
        """Update the bucket's parameters and slots, in one launch on the current stream, and measure what is asked."""
        with on(self._device), torch.no_grad():
            lent = list(self._lend(bucket, (bucket.params, bucket.grads, *bucket.slots, *bucket.parts)))
            numbers = self._send_numbers(bucket.coefficients, bucket.row, bucket.rule.coefficients)
            self._table.update(self._entries)
            bucket.measured = self._start(bucket.rule, numbers, bucket.found_inf)
            for tensors, copies in lent:
                _give_back(tensors, copies)
            self._note_stream(numbers)
        self._versions.count()

    def measure(self, bucket: Bucket, rule: Rule) -> Tensor | None:
        """Return what a rule measures, and leave everything as it is."""
        with on(self._device), torch.no_grad():
            slots = bucket.slots[: len(rule.slots)]
            parts = bucket.parts if len(slots) == len(bucket.slots) else []
            lent = list(self._lend(bucket, (bucket.params, bucket.grads, *slots, *parts)))
            names = rule.coefficients
            numbers = self._send_numbers(bucket.coefficients, bucket.row, names) if names else None
            self._table.update(self._entries)
            measured = self._start(rule, numbers, None)
            self._note_stream()
        del lent  # copies that were read
        return measured

    def _start(self, rule: Rule, numbers: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
        """Launch the kernel of a rule; give what it measures of each tensor."""
        count, reductions = len(self._chunks), rule.reductions
        parts = torch.empty((len(reductions), count), dtype=torch.float64, device=self._device) if reductions else None
        if count:
            load(rule, self._compute, self._stored, self._dialect)[(count,)](
                self._table.there,
                self._chunks,
                numbers,
                found_inf,
                *(() if parts is None else (parts,)),
                self._entries.shape[1],
                0 if numbers is None else numbers.shape[-1],
                BLOCK=self._launch.block,
                REPEAT=self._launch.repeat,
                num_warps=self._launch.warps,
                # As the CPU engine: a product may be added without being rounded first, and nothing else.
                enable_fp_fusion=True,
            )
        return None if parts is None else combined(reductions, parts, self._firsts)

    def _note_stream(self, *numbers: Tensor) -> None:
        """Let the memory of the tables be used on a stream, or by a graph, other than the one it was made on."""
        memory = (self._table.there, self._chunks, self._firsts, *numbers)
        if capturing(self._device):
            keep_for_graphs(*memory)
        elif (stream := _stream(self._device)) != self._stream:
            for tensor in memory:
                tensor.record_stream(stream)

    # ScalarIO

    def _send_numbers(self, coefficients: Sequence[Coefficients], row: np.ndarray, names: tuple[str, ...]) -> Tensor:
        """Return the numbers of a rule on the device: (coefficients, rows), in the dtype of the arithmetic.

        Tensors among them are on the device already; in a list of numbers they are the same for all rows.
        """
        known = self._numbers.setdefault(names, _Numbers())
        if isinstance(coefficients, EachParameter):
            self._entries[-1] = np.arange(len(coefficients))
            return self._compute_numbers(coefficients, names, known)
        self._entries[-1] = row
        shared = {name: value for name, value in coefficients[0].items() if isinstance(value, Tensor)}
        values = [[0.0 if name in shared else float(row[name]) for row in coefficients] for name in names]
        dtype = np.float64 if self._compute is torch.float64 else np.float32
        array = np.array(values, dtype=dtype).reshape(len(names), len(coefficients))
        if isinstance(known.table, Table) and known.table.there.shape == array.shape:
            known.table.update(array)
        else:
            known.table = Table(array, self._device)
        there: Tensor = known.table.there
        for name, value in shared.items():
            if name in names:
                there[names.index(name)].copy_(value)
        return there

    def _compute_numbers(self, coefficients: EachParameter, names: tuple[str, ...], known: "_Numbers") -> Tensor:
        """Put numbers that are on the device into their table there.

        Python's numbers only when they have changed; but a graph sets them too, and nobody knows when it is replayed.
        """
        self._in_graphs = self._in_graphs or capturing(self._device)
        shape = (len(names), len(coefficients))
        if not isinstance(known.table, Tensor) or known.table.shape != shape:
            known.table, known.sent = torch.empty(shape, dtype=self._compute, device=self._device), {}
        for there, name in zip(known.table, names, strict=True):
            value = coefficients.numbers[name]
            if isinstance(value, Tensor):
                there.copy_(value)
                known.sent.pop(name, None)
            elif known.sent.get(name) != value or self._in_graphs:
                there.fill_(value)
                known.sent[name] = value
        return known.table

    # Tensors that are laid out differently

    def _lend(self, bucket: Bucket, stored: Sequence[Sequence[Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Let the table point at the gradients, and at copies of what is not laid out as its parameter."""
        if bucket.gradient_addresses is None:
            raise InternalError("a kernel was run on gradients that no guard has seen")
        self._entries[1] = bucket.gradient_addresses
        for index in self.irregular:
            tensors = [tensors[index] for tensors in stored]
            # Blocks and random bits of tensors that are not alike go by elements in C order.
            copies = laid_out_alike(tensors) if bucket.is_plain else [tensor.contiguous() for tensor in tensors]
            for position, copy in enumerate(copies):
                self._entries[position, index] = admit([[copy]], [""], bucket.row_name).addresses[0, 0]
            yield tensors, copies


@dataclass
class _Numbers:
    """Numbers of a rule on the device: their table, and those of Python's in it."""

    table: Table | Tensor | None = None
    sent: dict[str, float] = field(default_factory=dict)


def _random_rows(bucket: Bucket) -> np.ndarray:
    """Return what random bits begin from, if any are drawn, for each tensor: seed, parameter and first element."""
    if not bucket.is_rounded:
        return np.zeros((0, len(bucket.params)), dtype=np.int64)
    return np.array([(bucket.seed, who.number, who.first or 0) for who in bucket.identities], dtype=np.int64).T


def _give_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Copy back what is not the gradient."""
    for position, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        if position != 1 and copy is not tensor:
            tensor.copy_(copy)


def _stream(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device) if device.type != "cpu" else None


def laid_out_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one shape in the first's layout, or contiguous if that has gaps, as copies where needed."""
    first = tensors[0] if is_dense(tensors[0]) else tensors[0].contiguous()
    return [
        first,
        *(tensor if same_dense_layout((first, tensor)) else _copy_like(first, tensor) for tensor in tensors[1:]),
    ]


def _copy_like(first: Tensor, tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(first.shape, first.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)
