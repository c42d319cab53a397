"""What the kernels measure of chunks, put together for each tensor, on the device and in an order that never changes.

The kernel is a plain function here, and Triton's when it is first launched; it takes no annotation but its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from surefoot.engines.gpu.compile import jitted
from surefoot.rule import Reduction

_BLOCK = 1024


def combine(parts, firsts, results, chunks, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """Sum what was measured of a tensor's chunks, or give the largest of it, where bit `measure` of LARGEST is set."""
    tensor, measure = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    parts += measure.to(tl.int64) * chunks
    result = results + tensor * tl.num_programs(1) + measure
    lanes = tl.arange(0, BLOCK)
    if (LARGEST >> measure) & 1:
        # None is negative, and so NaN is the greatest of the bit patterns.
        most = tl.full((BLOCK,), 0, tl.int64)
        while first < end:
            part = tl.load(parts + first + lanes, first + lanes < end, other=0.0)
            most = tl.maximum(most, part.to(tl.int64, bitcast=True))
            first += BLOCK
        tl.store(result, tl.max(most, axis=0).to(tl.float64, bitcast=True))
    else:
        total = tl.full((BLOCK,), 0, tl.float64)
        while first < end:
            total += tl.load(parts + first + lanes, first + lanes < end, other=0.0)
            first += BLOCK
        tl.store(result, tl.sum(total, axis=0))


def combined(reductions: Sequence[Reduction], parts: Tensor, firsts: Tensor) -> Tensor:
    """Return what was measured of each tensor: float64 of shape (tensors, reductions).

    Args:
        reductions: what was measured.
        parts: of each chunk: float64 of shape (reductions, chunks).
        firsts: for each tensor the number of its first chunk, and at last the number of chunks: int64.
    """
    results = torch.empty((len(firsts) - 1, len(reductions)), dtype=torch.float64, device=parts.device)
    largest = sum(1 << index for index, reduction in enumerate(reductions) if reduction.kind == "largest")
    kernel: Any = jitted(combine, "chunks")
    kernel[tuple(results.shape)](
        parts, firsts, results, parts.shape[1], LARGEST=largest, BLOCK=_BLOCK, enable_fp_fusion=True
    )
    return results
