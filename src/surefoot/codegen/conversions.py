"""Short formats as functions of bit patterns: compiled with kernels, never imported.

What they mean is described, and said by torch's operations, in `storage/codecs.py` and `storage/random_bits.py`.
"""


def from_bfloat16(bits):
    """Return the float32 value of a bfloat16 bit pattern."""
    return as_float32(uint32(bits) << 16)


def to_bfloat16(value):
    """Return the bit pattern of the bfloat16 nearest to a float32 value, ties to even; NaN stays NaN."""
    bits = as_uint32(value)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return uint16(rounded) if value == value else uint16(0x7FC0)


# 16 bits and more: words of 32, of which the upper half is the 16-bit number


def bfloat16_word(value):
    """Return the word of a float32 value beside bfloat16: its own pattern."""
    return as_uint32(value) if value == value else uint32(0x7FC00000)


def half_word(value):
    """Return the word of a float32 value beside float16."""
    bits = as_uint32(value)
    magnitude = min(small_word(bits & 0x7FFFFFFF), uint32(0x0F800000)) << 3
    return magnitude | (bits & 0x80000000) if value == value else uint32(0x7E000000)


def small_word(magnitude):
    """Return the pattern of an absolute value with the exponent of float16: 5 bits and 23 of mantissa."""
    # Below 2**-14 the sum with it is a fixed-point number, and the greater of the two patterns; above, the lesser.
    subnormal = int32(as_uint32(as_float32(magnitude) + float32(0.00006103515625))) - 0x00800000
    return uint32(max(subnormal, int32(magnitude))) - 0x38000000


def stochastic_16(word, random):
    """Return a word's 16-bit number, rounded by 16 random bits."""
    return uint16((word + random) >> 16)


def nearest_24(word):
    """Return a word's first 24 bits, rounded to nearest, ties to even."""
    return (word + 0x7F + ((word >> 8) & 1)) >> 8


def stochastic_24(word, random):
    """Return a word's first 24 bits, rounded by 8 random bits."""
    return (word + (random & 0xFF)) >> 8


def joined(bits, correction):
    """Return the word of a 16-bit number and its correction, which stands in the upper part of 16 bits."""
    upper = uint32(bits) << 16
    word = upper + uint32(int32(correction))
    return upper if int32(word ^ upper) < 0 else word  # of zero, less would be another sign


def from_bfloat16_word(word):
    """Return the float32 value of a word beside bfloat16."""
    return as_float32(word)


def from_half_word(word):
    """Return the float32 value of a word beside float16."""
    small = (word & 0x7FFFFFFF) >> 3
    normal = as_float32(small + 0x70000000 if small >= 0x0F800000 else small + 0x38000000)
    value = float32(int32(small)) * float32(7.275957614183426e-12) if small < 0x00800000 else normal
    return as_float32(as_uint32(value) | (word & 0x80000000))


# 8 bits, in units of a scale for each block


def block_exponent_e4m3(largest):
    """Return the exponent of a block's scale, as it stands in a float32, from its largest absolute value's pattern."""
    return min(max((largest + 0x1FFFFF) & 0x7F800000, uint32(0x08000000)), uint32(0x7E800000))


def block_exponent_e5m3(largest):
    """Return the exponent of a block's scale; see above."""
    return min(max((largest + 0x0FFFFF) & 0x7F800000, uint32(0x08000000)), uint32(0x7E800000)) - 0x07800000


def largest_finite(values, mask, n):
    """Return the pattern of the largest value among those that are finite, with the bits of a mask."""
    not_inlined()
    largest = uint32(0)
    for i in range(n):
        magnitude = as_uint32(values[i]) & mask
        largest = max(largest, magnitude if magnitude < 0x7F800000 else uint32(0))
    return largest


def from_e4m3(code, scale):
    """Return the value of a code: sign, 4 bits of exponent, 3 of mantissa."""
    value = from_half(uint16(int16(int8(code)) << 7) & 0xBFFF)
    special = ((code & 0x7F) == 0x7F) | (code == 0x80)
    return value * (as_float32(uint32(0x7F800000)) if special else scale)


def to_e4m3(scaled, random):
    """Return the code of a value in units of its scale, rounded by 16 random bits; what is finite only."""
    bits = as_uint32(scaled)
    code = min((small_word(bits & 0x7FFFFFFF) + (random << 4)) >> 20, uint32(0x7E))
    return uint8(code | ((bits >> 24) & 0x80) if code > 0 else uint32(0))


def special_e4m3(value, code):
    """Return the code of a value that may not be finite, given what it would be if it were."""
    infinite = uint8(0x7F) if value > 0 else uint8(0xFF)
    return (infinite if value == value else uint8(0x80)) if value - value != 0 else code


def special_codes_e4m3(values, codes, start, n):
    """Give the values among n that are not finite their codes."""
    not_inlined()
    for i in range(n):
        codes[start + i] = special_e4m3(values[i], codes[start + i])


def from_e5m3(code, scale):
    """Return the value of a code: 5 bits of exponent, 3 of mantissa, no sign."""
    return from_half(uint16(code) << 7) * scale


def to_e5m3(scaled, random):
    """Return the code of a value in units of its scale, rounded by 16 random bits; what is finite only."""
    word = small_word(as_uint32(scaled))
    fraction = (word & 0xFFFFF) >> 5
    raised = word + ((fraction * (fraction ^ 0x7FFF)) >> 15)
    code = min(max((raised + (random << 4)) >> 20, uint32(1)), uint32(0xF7))
    return uint8(code if scaled > 0 else uint32(0))


def special_e5m3(value, code):
    """Return the code of a value that may not be finite, given what it would be if it were."""
    infinite = uint8(0xF8) if value > 0 else uint8(0)
    return (infinite if value == value else uint8(0xFF)) if value - value != 0 else code


def special_codes_e5m3(values, codes, start, n):
    """Give the values among n that are not finite their codes."""
    not_inlined()
    for i in range(n):
        codes[start + i] = special_e5m3(values[i], codes[start + i])


# Random bits


def mixed_64(x):
    """Mix 64 bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def random_key(seed, parameter, step, first):
    """Return the key of some elements: seed, parameter and number of the first as integers, the step as a number."""
    key = mixed_64(mixed_64(mixed_64(uint64(seed) ^ 0x9E3779B97F4A7C15) ^ uint64(parameter)) ^ as_uint64(step))
    return mixed_64(key ^ uint64(first >> 32))


def next_key(key):
    """Return the key of what else is drawn for the same elements."""
    return mixed_64(key + 0x9E3779B97F4A7C15)


def random_32(element, key):
    """Return 32 random bits for an element, of which `element` is the number's lower half."""
    x = element ^ uint32(key)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (x >> 15)
    x = (x + uint32(key >> 32)) * 0x846CA68B
    return x ^ (x >> 16)
