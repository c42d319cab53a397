"""Storage formats of 16 bits as functions of bit patterns: compiled with kernels, never imported."""


def from_bfloat16(bits):
    """Return the float32 value of a bfloat16 bit pattern."""
    return as_float32(uint32(bits) << 16)


def to_bfloat16(value):
    """Return the bit pattern of the bfloat16 nearest to a float32 value, ties to even; NaN stays NaN."""
    bits = as_uint32(value)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return uint16(rounded) if value == value else uint16(0x7FC0)
