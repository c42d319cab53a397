"""Ranges of the schedulers' and schedules' hyperparameters: one place for constructors, state dicts and documentation.

A signature says which of them an argument has: `gamma: Annotated[float, GAMMA] = 0.1`.  The first words of every
message are torch's, where torch has any; everything that is refused is a ValueError, as there.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from surefoot.rule.hyperparameters import Check, Interval, is_number


@dataclass(frozen=True)
class Range(Interval):
    """Numbers of an interval; where an argument takes one number for each param group, each of them.

    Attributes:
        whole: whether only whole numbers are allowed, of whatever type: 10, 10.0 or 1e1.
    """

    def __call__(self, name: str, value: Any) -> None:
        """Raise unless `value` lies in the range.

        Raises:
            ValueError: it does not, or is no single number.
        """
        if isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self(f"{name}[{index}]", item)
            return
        if value is None and self.optional:
            return
        if not is_number(value) or (isinstance(value, torch.Tensor) and value.numel() != 1):
            raise ValueError(f"{self.complaint}{value} of type {type(value)}; `{name}` must be {self.described}")
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        broken = self.whole and math.isfinite(number) and number != int(number)
        if broken or not self.contains(number):
            raise ValueError(f"{self.complaint}{value}; `{name}` must be {self.described}")

    @property
    def words(self) -> str:
        """What is allowed, as documentation says it."""
        return f"{super().words}, or None" if self.optional else super().words

    @property
    def described(self) -> str:
        """What is allowed, as messages say it."""
        return self.words if self.whole else f"a number in {self}{' or None' if self.optional else ''}"


@dataclass(frozen=True)
class OneOf:
    """One of a few words.

    Attributes:
        complaint: the message, with the value in the place of `{}`.
        choices: the words.
    """

    complaint: str
    choices: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> None:
        """Raise ValueError unless `value` is one of the words."""
        if value not in self.choices:
            raise ValueError(f"{self.complaint.format(value)}; `{name}` must be {self.words}")

    @property
    def words(self) -> str:
        """What is allowed."""
        return " or ".join(f'"{choice}"' for choice in self.choices)


@dataclass(frozen=True)
class Steps:
    """Any number of steps at which something happens.

    Attributes:
        rising: whether none may lie before the one that precedes it.
    """

    rising: bool = False

    def __call__(self, name: str, value: Any) -> None:
        """Raise unless `value` is steps.

        Raises:
            ValueError: a step is negative, fractional or no number, or they do not rise.
        """
        steps = list(value)
        for index, step in enumerate(steps):
            EPOCHS(f"{name}[{index}]", step)
        if self.rising and any(after < before for before, after in pairwise(steps)):
            raise ValueError(f"`{name}` must not fall, but got {steps}; sort them")

    @property
    def words(self) -> str:
        """What is allowed."""
        return f"whole numbers >= 0{', not falling' if self.rising else ''}"


def between(
    low: float = 0.0,
    high: float = math.inf,
    *,
    words: str = "got ",
    low_open: bool = False,
    high_open: bool = False,
    whole: bool = False,
    optional: bool = False,
    infinite: bool = False,
) -> Range:
    """Return the range of numbers between two; a message begins with `words`, followed by what came.

    An end at infinity is open unless it is `infinite`.
    """
    high_open = high_open or (high == math.inf and not infinite)
    return Range(words, low, high, low_open or low == -math.inf, high_open, optional, whole)


ANY = between(-math.inf)
NOT_NEGATIVE = between()
POSITIVE = between(low_open=True)

LAST_EPOCH = between(-1, whole=True)
EPOCHS = between(whole=True)
"""A length that may be nothing."""
PATIENCE = between(whole=True, infinite=True)
AT_LEAST_ONE_EPOCH = between(1, whole=True)
PERIOD = POSITIVE
"""A length by which something is divided; it may be a fraction."""
RATE = NOT_NEGATIVE
GAMMA = NOT_NEGATIVE
MOMENTUM = NOT_NEGATIVE
ANNEAL = OneOf("anneal_strategy must be one of 'cos' or 'linear', instead got {}", ("cos", "linear"))


def ranges_of(constructor: Callable[..., Any]) -> Mapping[str, Check]:
    """Return the ranges that stand in a constructor's signature, by argument."""
    try:
        parameters = inspect.signature(constructor).parameters.values()
    except (NameError, TypeError, ValueError):  # a user's, that cannot be inspected
        return {}
    notes = ((p.name, note) for p in parameters for note in getattr(p.annotation, "__metadata__", ()))
    return {name: note for name, note in notes if isinstance(note, Range | OneOf | Steps)}
