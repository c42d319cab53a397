"""Sparse gradients: a kernel that sees the rows at which there are values, each as a tensor of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.bucket import Bucket
from surefoot.engines.cpu.compile import compiled_kernel
from surefoot.engines.cpu.plan import Job, combined, numbers_of
from surefoot.engines.cpu.source import Layout
from surefoot.state import local


def run_rows(bucket: Bucket) -> bool:
    """Update the rows at which coalesced gradients have values, in place.

    Returns:
        False, and nothing is changed, where rows are not dense in memory.
    """
    values = [local(grad.values()).contiguous() for grad in bucket.grads]
    leading = [grad.sparse_dim() for grad in bucket.grads]
    arrays = (bucket.params, *bucket.slots)
    if not all(_has_dense_rows(t, d) for tensors in arrays for t, d in zip(tensors, leading, strict=True)):
        return False
    counts = [len(value) for value in values]
    sizes = [value[0].numel() if len(value) else 0 for value in values]
    owner = np.repeat(np.arange(len(counts)), counts)
    job = Job(2 + len(bucket.slots), np.array(sizes, dtype=np.int64)[owner])
    job.rows[:] = bucket.row[owner]
    at = [_checked(grad) for grad in bucket.grads]
    job.pointers[0] = _rows_of(bucket.params, at)
    job.pointers[1] = _rows_of(values, [np.arange(count)[None] for count in counts])
    for place, tensors in enumerate(bucket.slots):
        job.pointers[2 + place] = _rows_of(tensors, at)
    stored = tuple(tensors[0].dtype for tensors in (bucket.params, values, *bucket.slots))
    kernel = compiled_kernel(bucket.rule, Layout(bucket.compute_dtype, stored))
    measured = job.run(kernel, numbers_of(bucket), bucket.rule.measures)
    whole = combined(bucket.rule.measures, measured, owner, len(counts))
    bucket.measured = torch.from_numpy(whole) if bucket.rule.measures else None
    torch.autograd.graph.increment_version([tensor for tensors in arrays for tensor in tensors])
    return True


def _checked(grad: Tensor) -> np.ndarray:
    """Give the indices of a gradient, all of them inside."""
    index: np.ndarray = grad.indices().numpy()
    sizes = np.array(grad.shape[: len(index)])[:, None]
    if not ((index >= 0) & (index < sizes)).all():
        raise IndexError(f"a sparse gradient of shape {tuple(grad.shape)} has indices outside of it")
    return index


def _has_dense_rows(tensor: Tensor, leading: int) -> bool:
    """Whether what stands behind each index of the leading dimensions is contiguous."""
    return tensor.numel() == 0 or tensor[(0,) * leading].is_contiguous()


def _rows_of(tensors: Sequence[Tensor], at: Sequence[np.ndarray]) -> np.ndarray:
    """Give the addresses of rows: `at` is, for each tensor, (leading dimensions, rows)."""
    rows = [
        tensor.data_ptr() + tensor.element_size() * (np.array(tensor.stride()[: len(index)]) @ index)
        for tensor, index in zip(tensors, at, strict=True)
    ]
    return np.concatenate(rows)
