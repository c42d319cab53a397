"""Storage formats of 16 bits as functions of bit patterns, for kernels."""

from numba import njit, uint16, uint32

from surefoot.codegen.intrinsics import as_float32, as_uint32


@njit
def from_bfloat16(bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Return the float32 value of a bfloat16 bit pattern."""
    return as_float32(uint32(bits) << uint32(16))


@njit
def to_bfloat16(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Return the bit pattern of the bfloat16 nearest to a float32 value, ties to even; NaN stays NaN."""
    bits = as_uint32(value)
    rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    return uint16(rounded) if value == value else uint16(0x7FC0)  # noqa: PLR0124 (NaN is not equal to itself)
