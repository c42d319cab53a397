"""Formats: values of one kind as elements in memory, and what stands beside them."""

import functools
from dataclasses import dataclass

import torch

BLOCK = 128
"""Elements, one after the other in memory, that share a scale."""


@dataclass(frozen=True)
class Format:
    """How values are kept in memory, an element for each.

    Attributes:
        name: its name, in messages and in the titles of kernels.
        dtype: dtype of the tensor that holds the elements.
        stochastic: whether a value is rounded to one of its two neighbours at random, each the likelier the nearer it
            is, so that the mean of many roundings is the value; else to the nearest.
        correction: dtype of a second tensor of the same shape that holds further bits of each value, if there is one.
        code: `"e4m3"` or `"e5m3"` where elements are floats of 8 bits, in units of a scale for each block.
    """

    name: str
    dtype: torch.dtype
    stochastic: bool = False
    correction: torch.dtype | None = None
    code: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def part(self) -> str | None:
        """What the second tensor is called, if there is one: `"correction"` or `"scale"`."""
        return "correction" if self.correction else "scale" if self.code else None

    @property
    def is_plain(self) -> bool:
        """Return whether the tensor is its values, rounded to nearest."""
        return not (self.stochastic or self.part)


@functools.cache
def format_of(dtype: torch.dtype) -> Format:
    """Return the format of a plain tensor of a dtype; complex tensors are seen as real ones."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return Format(str(real).removeprefix("torch."), real)


@functools.cache
def format_16_bits(dtype: torch.dtype, *, stochastic: bool, correction: torch.dtype | None = None) -> Format:
    """Return a format of bfloat16 or float16: how it is rounded, and the dtype of a correction beside it.

    With int8 both together hold 24 bits, with int16 32: all of a bfloat16 parameter's float32 value, which is then not
    rounded at all.
    """
    name = str(dtype).removeprefix("torch.") + (f" + {correction}".replace("torch.", "") if correction else "")
    rounds = stochastic and correction is not torch.int16
    return Format(f"{name}, stochastic" if rounds else name, dtype, rounds, correction)


@functools.cache
def format_8_bits(*, signed: bool) -> Format:
    """Return the format of floats of 8 bits: 4 bits of exponent and a sign, or 5 bits without; see `codecs`."""
    code = "e4m3" if signed else "e5m3"
    return Format(f"float8 {code}", torch.uint8, stochastic=True, code=code)


def scale_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of the scales of a tensor: along its last dimension where blocks fill that, else flat."""
    if shape and shape[-1] and shape[-1] % BLOCK == 0:
        return torch.Size((*shape[:-1], shape[-1] // BLOCK))
    return torch.Size((-(-shape.numel() // BLOCK),))
