"""Short formats by torch's operations: the reference for what kernels print.

**16 bits and a correction.**  A float32 value is seen as a word of 32 bits of which the upper half is the 16-bit
number and the lower half a fraction of its last place.  For bfloat16 that is the pattern of the value itself, for
float16 one of 5 bits of exponent and 26 of mantissa.  Rounding is integer arithmetic on this word: to nearest; up with
the probability of the fraction (stochastic); or split, so that the 16-bit number is the nearest one (ties away from
zero) and the correction the signed rest, rounded to 8 bits or whole.  So the two hold a bfloat16 parameter's float32
value in 24 bits or exactly.  Of float16 the same is true from 2**-14 up to 65504; below, 32 bits hold it to 2**-38.

**8 bits.**  Floats with 3 bits of mantissa in units of their block's scale, a power of two, so that storing again what
was loaded changes nothing: e4m3 with a sign, in which 0x7f and 0xff are infinities and 0x80 is NaN, and e5m3 without
one, in which 0xf8 is infinity and what is above it NaN.  Zero is code 0.  Block maxima lie in the highest binade, so
that relative steps are at most 1/8 over 15 and 30 binades.  They are rounded stochastically: a moving average that
changes by less than half a step would stand still otherwise.  What has no sign and is not zero never becomes zero: an
average of squares that vanishes before the average it divides would make a step of any size.
"""

import torch
from torch import Tensor

from surefoot.storage.formats import BLOCK, Format, scale_shape

_SIGN, _MAGNITUDE, _INFINITY = -0x80000000, 0x7FFFFFFF, 0x7F800000
_HALF_BIAS = (127 - 15) << 23
_HALF_INFINITY = 31 << 23
_SMALLEST = 2.0**-14
"""Smallest normal number of float16, and of codes."""
_LEAST_EXPONENT, _MOST_EXPONENT = 16 << 23, 253 << 23
"""Of the maximum of a block, as it stands in a float32."""


def decode(kept: Format, stored: Tensor, part: Tensor | None = None) -> Tensor:
    """Return values from a format: float32, or for plain formats as they are.

    Args:
        kept: the format.
        stored: the elements.
        part: the correction, of the same shape, or the scale, one for each block of `stored` in C order.
    """
    if kept.code and part is not None:
        return _decode_8_bits(kept, stored, part)
    if kept.correction and part is not None:
        return _joined(stored, part)
    return stored


def encode(kept: Format, value: Tensor, random: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return values in a format: the elements, and the correction or scale if it has one.

    Args:
        kept: the format.
        value: the values, in any floating point dtype.
        random: for stochastic formats 16 bits for each value, see `random_bits`; without it they round to nearest.
    """
    if kept.is_plain:
        return (value.to(kept.dtype),)
    value = value.detach().to(torch.float32)
    if kept.code:
        return _encode_8_bits(kept, value, random)
    sign, word = _word(value, kept.dtype)
    if kept.correction is None:
        rounded = _nearest(word, 16) if random is None else (word + random.to(torch.int32)) >> 16
        return (_as_16_bits(sign, rounded, kept.dtype),)
    bits = 8 * kept.correction.itemsize
    if bits < 16:  # noqa: PLR2004 (all that a float32 has)
        word = _nearest(word, 8) if random is None else (word + (random.to(torch.int32) & 0xFF)) >> 8
    upper = (word + (1 << bits - 1)) >> bits
    return _as_16_bits(sign, upper, kept.dtype), (word - (upper << bits)).to(kept.correction)


# 16 bits


def _word(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return signs and words without them, as int32; NaN has no sign and no fraction."""
    bits = value.contiguous().view(torch.int32)
    sign, magnitude, odd = bits & _SIGN, bits & _MAGNITUDE, value.isnan()
    word, nan = magnitude, 0x7FC00000
    if dtype is torch.float16:
        word, nan = _small_word(magnitude).clamp(max=_HALF_INFINITY) << 3, 0x7E000000
    return sign.masked_fill(odd, 0), word.masked_fill(odd, nan)


def _small_word(magnitude: Tensor) -> Tensor:
    """Return the patterns of absolute values with the exponents of float16: 5 bits and 23 of mantissa."""
    value = magnitude.view(torch.float32)
    subnormal = (value + _SMALLEST).view(torch.int32) - (_HALF_BIAS + (1 << 23))
    return torch.where(value < _SMALLEST, subnormal, magnitude - _HALF_BIAS)


def _nearest(word: Tensor, bits: int) -> Tensor:
    """Return words without their last bits, rounded to nearest, ties to even."""
    return (word + ((1 << bits - 1) - 1) + ((word >> bits) & 1)) >> bits


def _as_16_bits(sign: Tensor, upper: Tensor, dtype: torch.dtype) -> Tensor:
    return ((sign >> 16) | upper).to(torch.int16).view(dtype)


def _joined(stored: Tensor, correction: Tensor) -> Tensor:
    """Return the float32 values of 16-bit numbers and their corrections; a correction never changes a sign."""
    bits = stored.contiguous().view(torch.int16).to(torch.int32)
    low = correction.contiguous().to(torch.int32) << (16 - 8 * correction.element_size())
    word = (((bits & 0x7FFF) << 16) + low).clamp(min=0)
    if stored.dtype is torch.float16:
        small = word >> 3
        normal = torch.where(small >= _HALF_INFINITY, small + (_INFINITY - _HALF_INFINITY), small + _HALF_BIAS)
        word = torch.where(small < 1 << 23, (small.to(torch.float32) * 2.0**-37).view(torch.int32), normal)
    return (word | ((bits & 0x8000) << 16)).view(torch.float32)


# 8 bits


def _blocks(value: Tensor) -> Tensor:
    """Return values in C order as rows of a block each, the last filled up with zeros."""
    flat = value.reshape(-1)
    rest = -len(flat) % BLOCK
    return torch.nn.functional.pad(flat, (0, rest)).view(-1, BLOCK)


def _encode_8_bits(kept: Format, value: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes and scales, computed piece by piece: what is computed takes many times their memory."""
    flat, noise = value.reshape(-1), None if random is None else random.reshape(-1)
    length = max(len(flat), 1) if flat.is_meta else _PIECE if flat.is_cpu else _PIECE_OF_DEVICE
    pieces = [slice(start, start + length) for start in range(0, len(flat), length)] or [slice(0)]
    found = [_encode_piece(kept, flat[piece], None if noise is None else noise[piece]) for piece in pieces]
    codes, scales = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*found, strict=True))
    return codes.view(value.shape), scales.view(scale_shape(value.shape))


_PIECE, _PIECE_OF_DEVICE = BLOCK << 8, BLOCK << 16
"""Elements that are encoded at a time: on the CPU as many as caches hold, elsewhere as many as launches are worth."""


def _encode_piece(kept: Format, value: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes of a vector of whole blocks, but for the last, and their scales."""
    signed = kept.code == "e4m3"
    blocks = _blocks(value if signed else torch.where(value < 0, 0, value))
    magnitude = blocks.view(torch.int32) & _MAGNITUDE
    largest = magnitude.masked_fill(magnitude >= _INFINITY, 0).amax(dim=1, keepdim=True)
    # What is above the highest code, 1.75 or 1.875 of a binade, belongs to the next one.
    exponent = (largest + (0x1FFFFF if signed else 0x0FFFFF)) & _INFINITY
    exponent = exponent.clamp(_LEAST_EXPONENT, _MOST_EXPONENT) - (0 if signed else 15 << 23)
    scaled = blocks * ((254 << 23) - exponent).view(torch.float32)
    word = _small_word(scaled.view(torch.int32) & _MAGNITUDE)
    if random is None:
        code = _nearest(word, 20)
    else:
        code = ((word if signed else word + _more(word)) + (_blocks(random.to(torch.int32)) << 4)) >> 20
    nan, infinite = blocks.isnan(), blocks.isinf()
    if signed:
        code = code.clamp(max=0x7E).masked_fill(infinite, 0x7F)
        code = torch.where((blocks < 0) & (code > 0), code | 0x80, code).masked_fill(nan, 0x80)
    else:
        code = torch.where(scaled > 0, code.clamp(1, 0xF7), 0).masked_fill(infinite, 0xF8).masked_fill(nan, 0xFF)
    return code.to(torch.uint8).reshape(-1)[: len(value)], exponent.view(torch.float32).reshape(-1)


def _more(word: Tensor) -> Tensor:
    """Return by how much words are raised before they are rounded, so that the mean of `1 / sqrt(value)` is right.

    Rounded without, an average of squares is right in the mean, but steps, which are divided by its root, are too long.
    Noise of variance s**2 raises the mean of 1 / sqrt(x) by 3/8 s**2, and where an average moves by 1 - beta of the way
    to what is new, noise of s**2 adds up from 2 (1 - beta) s**2 a step.  So a step must raise it by 3/8 of the variance
    of its own rounding: with f the fraction of the distance d to the next code, 3/8 d**2 f (1 - f) / value, of which
    d / value is taken as 1/12, near its mean (0.09), so that a shift divides.
    """
    fraction = (word & 0xFFFFF) >> 5
    return (fraction * (fraction ^ 0x7FFF)) >> 15


def _decode_8_bits(kept: Format, codes: Tensor, scale: Tensor) -> Tensor:
    code = _blocks(codes).to(torch.int32)
    factor = scale.reshape(-1, 1)
    if kept.code == "e4m3":
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        special = ((code & 0x7F) == 0x7F) | (code == 0x80)  # noqa: PLR2004 (codes)
        factor = torch.where(special, torch.inf, factor)  # of which zero makes NaN
    else:
        bits = code << 7
    value = bits.to(torch.int16).view(torch.float16).to(torch.float32) * factor
    return value.reshape(-1)[: codes.numel()].view(codes.shape)
