"""How the values of a parameter, a gradient or a slot are kept in memory.

A format is made here, with what it means by torch's operations (`codecs`); each kernel engine has one table that says
how it loads and stores it, and what is not in that table the engine does not support.
"""

from surefoot.storage.codecs import decode, encode
from surefoot.storage.formats import BLOCK, Format, format_8_bits, format_16_bits, format_of, scale_shape
from surefoot.storage.random_bits import NUMBERS_OF_A_WORD, identity, random_bits

__all__ = [
    "BLOCK",
    "NUMBERS_OF_A_WORD",
    "Format",
    "decode",
    "encode",
    "format_8_bits",
    "format_16_bits",
    "format_of",
    "identity",
    "random_bits",
    "scale_shape",
]
