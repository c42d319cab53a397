"""Random bits for rounding: a function of a seed, a parameter, a step and an element, and of nothing else.

So they are the same on every engine, for any number of threads, after a resume, and for a shard as for the whole.
`codegen/conversions.py` says the same for kernels; `engines/gpu/conversions.py` prints that for Triton.

A key of 64 bits is mixed from seed, parameter and step as by SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", section 4); then 32 bits of an element's number are mixed with it, by the constants
that Wellons found for hashes of two multiplications ("lowbias32", 2018).  They give three numbers of 16 bits: their
lower and their upper half, and the upper half of their product with an odd number.
"""

import hashlib

import torch
from torch import Tensor

NUMBERS_OF_A_WORD = 3
"""Numbers of 16 bits that are made of 32 random bits."""
GOLDEN = 0x9E3779B97F4A7C15
_ALL, _HALF, _WORD = (1 << 64) - 1, (1 << 32) - 1, (1 << 16) - 1


def identity(name: str | int) -> int:
    """Return what a parameter is to the generator, by its name or else its number: a signed integer of 64 bits."""
    if isinstance(name, int):
        return name
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def random_bits(seed: int, parameter: int, step: Tensor | float, elements: Tensor, number: int) -> Tensor:
    """Return 16 random bits for each of some elements: int64 in [0, 65535], of the shape of `elements`.

    Args:
        seed: the seed.
        parameter: the parameter's `identity`.
        step: the step, as a number or as a tensor of one.
        elements: the elements' numbers in the whole parameter, int64.
        number: tells apart what is drawn for one element: 0, 1, ...
    """
    counted = torch.as_tensor(step, dtype=torch.float64, device=elements.device).detach().reshape(()).view(torch.int64)
    key = _mixed(_mixed(_mixed(counted.new_tensor(_signed(seed ^ GOLDEN))) ^ parameter) ^ counted)
    key = _mixed(key ^ (elements >> 32))
    for _ in range(number // NUMBERS_OF_A_WORD):
        key = _mixed(key + _signed(GOLDEN))
    x = (elements ^ key) & _HALF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _HALF
    x = x ^ (x >> 15)
    x = ((x + (key >> 32)) & _HALF) * 0x846CA68B & _HALF
    x = x ^ (x >> 16)
    return (x & _WORD, x >> 16, (x * 0x9E3779B1 & _HALF) >> 16)[number % NUMBERS_OF_A_WORD]


def _mixed(x: Tensor) -> Tensor:
    """Mix 64 bits; integers wrap around, and shifts bring in zeros."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & (_ALL >> by)


def _signed(x: int) -> int:
    """Return 64 bits as the signed integer that they are."""
    x &= _ALL
    return x - (1 << 64) if x >> 63 else x
