"""Formats: values of one kind as elements in memory."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """How values are kept in memory, an element for each.

    Attributes:
        name: its name, in messages and in the titles of kernels.
        dtype: dtype of the tensor that holds the elements.
    """

    name: str
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


@functools.cache
def format_of(dtype: torch.dtype) -> Format:
    """Return the format of a plain tensor of a dtype; complex tensors are seen as real ones."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return Format(str(real).removeprefix("torch."), real)
