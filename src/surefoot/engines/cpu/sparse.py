"""Sparse gradients: a kernel that sees the rows at which there are values, each as a tensor of its own."""

import math

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.compile import Kernel
from surefoot.engines.bucket import Bucket
from surefoot.engines.checked import checked
from surefoot.engines.cpu.compile import compiled_kernel
from surefoot.engines.cpu.plan import Launch, combined, numbers_of
from surefoot.engines.cpu.source import Layout
from surefoot.rule import Rule
from surefoot.storage import format_of
from surefoot.tensors.gate import Arrays, admit
from surefoot.tensors.memory import bytes_available
from surefoot.tensors.native.guards import VersionCounters
from surefoot.tensors.shards import to_local


class RowsPlan:
    """What is kept between steps of parameters with sparse gradients: where rows stand, and the kernel.

    Attributes:
        dense: whether rows of parameters and slots are dense in memory.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._kernel = Kernel("", 0)
        leading = [grad.sparse_dim() for grad in bucket.grads]
        self._arrays = (bucket.params, *bucket.slots)
        self.dense = all(
            _has_dense_rows(tensor, dimensions)
            for tensors in self._arrays
            for tensor, dimensions in zip(tensors, leading, strict=True)
        )
        self._checked, self._names = checked(), (bucket.rule.slots, bucket.row_name)
        self._starts = self._admit().addresses
        self._strides = [
            [_bytes_between_rows(tensor, dimensions) for tensor, dimensions in zip(tensors, leading, strict=True)]
            for tensors in self._arrays
        ]
        self._sizes = np.array(
            [math.prod(param.shape[d:]) for param, d in zip(bucket.params, leading, strict=True)], dtype=np.int64
        )
        param, grad, *slots = (tensors[0].dtype for tensors in (bucket.params, bucket.grads, *bucket.slots))
        self._layout = Layout(bucket.compute_dtype, tuple(map(format_of, (param, grad, *slots))))
        self._versions = VersionCounters([tensor for tensors in self._arrays for tensor in tensors])

    def _admit(self) -> Arrays:
        slots, row_name = self._names
        return admit(self._arrays, ("", *(f"state `{slot.name}` of " for slot in slots)), row_name)

    def prepare(self, rule: Rule) -> None:
        """Compile the kernel of a rule."""
        self._kernel = compiled_kernel(rule, self._layout, self._checked)

    def run(self, bucket: Bucket) -> None:
        """Update rows, and measure what the rule measures."""
        rule, at = bucket.rule, [grad.indices().numpy() for grad in bucket.grads]
        values = [to_local(grad.values()).contiguous() for grad in bucket.grads]
        counts = [index.shape[1] for index in at]
        owner = np.repeat(np.arange(len(counts)), counts)
        launch = Launch(2 + len(bucket.slots), self._sizes[owner])
        launch.rows[:] = bucket.row[owner]
        for place, starts, strides in zip(
            (0, *range(2, len(launch.pointers))), self._starts, self._strides, strict=True
        ):
            np.concatenate(
                [start + stride @ index for start, stride, index in zip(starts, strides, at, strict=True)],
                out=launch.pointers[place],
            )
        np.concatenate([_each_row(value) for value in values], out=launch.pointers[1])
        if self._kernel.checked:
            now, of_values = self._admit(), [[(value.data_ptr(), bytes_available(value)) for value in values]]
            here = np.insert(np.stack([now.addresses, now.available], axis=2), 1, of_values, axis=0)[:, owner]
            launch.set_limits(here[..., 0], here[..., 1])
        self._versions.count()
        measured = launch.run(self._kernel, numbers_of(bucket), rule.reductions)
        if rule.reductions:
            bucket.measured = torch.from_numpy(combined(rule.reductions, measured, owner, len(counts)))


def _has_dense_rows(tensor: Tensor, leading: int) -> bool:
    """Return whether what stands behind each index of the leading dimensions is contiguous."""
    return tensor.numel() == 0 or tensor[(0,) * leading].is_contiguous()


def _bytes_between_rows(tensor: Tensor, leading: int) -> np.ndarray:
    return tensor.element_size() * np.array(tensor.stride()[:leading], dtype=np.int64)


def _each_row(values: Tensor) -> np.ndarray:
    """Return the addresses of a contiguous tensor's rows."""
    bytes_of_row = values.element_size() * math.prod(values.shape[1:])
    return values.data_ptr() + bytes_of_row * np.arange(len(values))
