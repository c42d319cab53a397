"""Dtypes in a file: the names that safetensors gives them, and tensors as plain bytes and back."""

from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """How safetensors stores a dtype.

    Attributes:
        code: its name in the file.
        itemsize: bytes of an element.
        pairs: whether an element is two of `code`, along one more dimension: safetensors lacks two complex dtypes.
    """

    code: str
    itemsize: int
    pairs: bool = False


DTYPES = {
    torch.float64: Stored("F64", 8),
    torch.float32: Stored("F32", 4),
    torch.float16: Stored("F16", 2),
    torch.bfloat16: Stored("BF16", 2),
    torch.float8_e4m3fn: Stored("F8_E4M3", 1),
    torch.float8_e5m2: Stored("F8_E5M2", 1),
    torch.float8_e4m3fnuz: Stored("F8_E4M3FNUZ", 1),
    torch.float8_e5m2fnuz: Stored("F8_E5M2FNUZ", 1),
    torch.float8_e8m0fnu: Stored("F8_E8M0", 1),
    torch.complex64: Stored("C64", 8),
    torch.complex128: Stored("F64", 16, pairs=True),
    torch.complex32: Stored("F16", 4, pairs=True),
    torch.int64: Stored("I64", 8),
    torch.int32: Stored("I32", 4),
    torch.int16: Stored("I16", 2),
    torch.int8: Stored("I8", 1),
    torch.uint64: Stored("U64", 8),
    torch.uint32: Stored("U32", 4),
    torch.uint16: Stored("U16", 2),
    torch.uint8: Stored("U8", 1),
    torch.bool: Stored("BOOL", 1),
}
BY_NAME = {name_of: dtype for dtype in DTYPES for name_of in [str(dtype).removeprefix("torch.")]}
BY_CODE = {stored.code: dtype for dtype, stored in DTYPES.items() if not stored.pairs}


def name(dtype: torch.dtype) -> str:
    """Name a dtype without its module, as in "float32"."""
    return str(dtype).removeprefix("torch.")


def is_numeric(dtype: torch.dtype) -> bool:
    """Whether values of a dtype have a norm and can be infinite or NaN."""
    return dtype.is_floating_point or dtype.is_complex


def as_real(tensor: Tensor) -> Tensor:
    """Return floating-point values in a dtype that torch computes with, complex ones as pairs."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex64) if tensor.dtype is torch.complex32 else tensor)
    return tensor.float() if tensor.element_size() < torch.float32.itemsize else tensor


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the outermost in memory to the innermost, None for row-major or scattered tensors."""
    if tensor.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
    return order if tensor.permute(order).is_contiguous() else None


def flat(tensor: Tensor) -> Tensor:
    """Return the elements as a row-major vector on the CPU; the tensor's own memory if it is like that already."""
    found = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return found.as_strided((found.numel(),), (1,))  # a single element counts as contiguous whatever its stride


def as_bytes(vector: Tensor) -> memoryview:
    """Look at a vector on the CPU as bytes."""
    return vector.view(torch.uint8).numpy().data
