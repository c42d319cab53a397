"""Memory on the CPU for intermediate results of a step, which the next step uses again.

A large tensor that is made in every step is memory that the system maps, clears and takes back in every step.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

KEPT = 1 << 24
"""Bytes that a thread keeps between steps at most; what takes more is given back when the step ends."""
_LEAST, _LINE = 1 << 16, 64
"""Bytes from which on a tensor is kept, as the allocator has smaller ones at hand; and of a cache line."""


class Workspace(threading.local):
    """Memory of which every thread has its own."""

    def __init__(self) -> None:
        self._resize(0)

    def _resize(self, size: int) -> None:
        with torch.inference_mode(mode=False):  # a tensor of that mode could not be written outside of it
            self._memory, self._size = torch.empty(size, dtype=torch.uint8, device="cpu"), size
        self._used = self._most = 0

    @property
    def kept_bytes(self) -> int:
        """Return how many bytes this thread keeps."""
        return self._size

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor, which is nobody else's until the `turn` or `scope` ends."""
        length = math.prod(shape) * dtype.itemsize
        if length < _LEAST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        start, self._used = self._used, self._used + -(-length // _LINE) * _LINE
        self._most = max(self._most, self._used)
        if self._used > self._size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return self._memory[start : start + length].view(dtype).view(shape)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Free what is taken inside of the `with` block at its end; the next turn finds as much memory."""
        self._used = self._most = 0
        yield
        if self._most > self._size:
            self._resize(self._most)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Free what is taken inside of the `with` block at its end."""
        before = self._used
        yield
        self._used = before

    def shrink(self) -> None:
        """Keep no more than a thread may between steps."""
        if self._size > KEPT:
            self._resize(0)


WORKSPACE = Workspace()
