"""Random numbers of an update: which of them each value is rounded by, and how every printed language spells them."""

from collections.abc import Iterable, Sequence
from itertools import count

from surefoot.rule import Rule
from surefoot.storage import NUMBERS_OF_A_WORD, Format

_OF_WORD = ("{} & 0xFFFF", "{} >> 16", "({} * 0x9E3779B1) >> 16")
"""The numbers of 16 bits that a word of 32 random bits gives; see `storage/random_bits.py`."""


def numbers_drawn(rule: Rule, formats: Iterable[Format]) -> list[int | None]:
    """Return for the parameter and each slot which of the numbers drawn for an element it is rounded by.

    Args:
        rule: the rule.
        formats: those of the parameter and each slot.

    Returns:
        Ascending numbers from 0, and None for what is not written or not rounded at random.
    """
    numbers = count()
    return [
        next(numbers) if written and kept.stochastic else None
        for written, kept in zip(rule.written, formats, strict=False)
    ]


def word_of(number: int) -> int:
    """Return which of the words drawn for an element a number is taken from."""
    return number // NUMBERS_OF_A_WORD


def print_number(number: int, word: str) -> str:
    """Print a number's 16 bits, given what the word that they are taken from is called."""
    return _OF_WORD[number % NUMBERS_OF_A_WORD].format(word)


def words_drawn(numbers: Sequence[int | None]) -> int:
    """Return how many words of 32 bits are drawn for an element."""
    return 1 + max((word_of(number) for number in numbers if number is not None), default=-1)
