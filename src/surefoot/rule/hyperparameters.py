"""Ranges of hyperparameters: one place for the constructor, groups, loading and documentation alike.

A check is a callable `(name, value) -> None` that raises ValueError (or TypeError for what is no number).
The first words of every message are those of torch.optim; then follows what is allowed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any

import torch

Check = Callable[[str, Any], None]


def is_number(value: object) -> bool:
    """Return whether `value` is a real Python or numpy number (booleans are none) or a real tensor."""
    if isinstance(value, torch.Tensor):
        return not value.is_complex()
    return hasattr(value, "__float__") and not isinstance(value, (complex, str))


def truth(name: str, value: Any) -> None:
    """Allow what is plainly true or false: booleans, None and single numbers.

    Raises:
        TypeError: anything else, such as the string "false".
    """
    single = is_number(value) and not (isinstance(value, torch.Tensor) and value.numel() != 1)
    if not (value is None or isinstance(value, bool) or single):
        raise TypeError(f"`{name}` must be True or False, but got {value!r} ({type(value).__name__})")


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`; NaN is in no interval.

    Attributes:
        complaint: the message's first words; the value follows them.
        low: least number allowed.
        high: greatest number allowed.
        low_open: whether `low` itself is refused.
        high_open: whether `high` itself is refused.
        optional: whether None is allowed.
        whole: whether only whole numbers, of an integer type, are allowed.
    """

    complaint: str
    low: float = 0.0
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    optional: bool = False
    whole: bool = False

    def __call__(self, name: str, value: Any) -> None:
        """Raise unless `value` lies in the interval.

        Raises:
            TypeError: `value` is not a number.
            ValueError: `value` is outside, NaN, or a tensor of more than one element.
        """
        if value is None and self.optional:
            return
        if not is_number(value):
            raise TypeError(f"`{name}` must be a number, but got {value!r} ({type(value).__name__})")
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(
                f"Tensor {name} must be 1-element, but its shape is {tuple(value.shape)}; "
                f"give one number per parameter group"
            )
        if not self.contains(float(value.detach() if isinstance(value, torch.Tensor) else value)):
            raise ValueError(f"{self.complaint}{value}; `{name}` must be a number in {self}")
        if self.whole and not isinstance(value, Integral):
            raise TypeError(f"`{name}` must be a whole number, but got {value!r}")

    def contains(self, value: float) -> bool:
        """Return whether `value` is inside."""
        above = self.low < value if self.low_open else self.low <= value
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def words(self) -> str:
        """What is allowed, as documentation says it."""
        least = f"{'>' if self.low_open else '>='} {self.low:g}" if math.isfinite(self.low) else "any number"
        most = f"{'<' if self.high_open else '<='} {self.high:g}"
        one_sided = least if math.isinf(self.high) else most if math.isinf(self.low) else f"in {self}"
        return f"a whole number {one_sided}" if self.whole else one_sided

    def __str__(self) -> str:
        """Write the interval as mathematics does."""
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high_open or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Each:
    """A sequence of numbers, each with a check of its own."""

    checks: tuple[Interval, ...]

    @property
    def words(self) -> str:
        """What is allowed, as documentation says it, if that is the same for all and not everything."""
        found = {check.words for check in self.checks} - {number("").words}
        return f"each {found.pop()}" if len(found) == 1 else ""

    def __call__(self, name: str, value: Any) -> None:
        """Raise unless `value` has as many numbers as there are checks and each passes its own."""
        if not isinstance(value, Sequence) or len(value) != len(self.checks):
            raise ValueError(f"`{name}` must be {len(self.checks)} numbers, but got {value!r}")
        for index, (check, item) in enumerate(zip(self.checks, value, strict=True)):
            check(f"{name}[{index}]", item)


def number(name: str) -> Interval:
    """Allow any number but NaN."""
    return Interval(f"Invalid {name} value: ", low=-math.inf)


def at_least_zero(name: str) -> Interval:
    """Allow numbers from 0 on, with torch's usual complaint."""
    return Interval(f"Invalid {name} value: ")


def finite(name: str, low: float = 0.0) -> Interval:
    """Allow finite numbers from `low` on: what is infinite here leaves nothing but NaN."""
    return Interval(f"Invalid {name} value: ", low=low, low_open=low == -math.inf, high_open=True)


def storage(name: str, value: Any) -> None:
    """Raise unless `value` is None or a dtype in which state can be stored."""
    if value is not None and value not in _STORAGE:
        raise ValueError(f"`{name}` must be None or one of {', '.join(map(str, _STORAGE))}, but got {value!r}")


_STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LR = Interval("Invalid learning rate: ", high_open=True)
EPS = at_least_zero("epsilon")
WEIGHT_DECAY = finite("weight_decay")
MOMENTUM = finite("momentum")
BETAS = Each(tuple(Interval(f"Invalid beta parameter at index {i}: ", high=1.0, high_open=True) for i in (0, 1)))

# What algorithms have in common, for their signatures: a type, a range and what documentation says.

Number = float | torch.Tensor
LearningRate = Annotated[Number, LR, "learning rate, a number or a tensor of one element"]
Betas = Annotated[tuple[float, float], BETAS, "(beta1, beta2), decay of the averages of g and of g**2"]
Eps = Annotated[float, EPS, "added to the root, in its units"]
Momentum = Annotated[float, MOMENTUM, "momentum factor"]
L2Penalty = Annotated[Number, WEIGHT_DECAY, "L2 penalty"]
L2OrDecoupled = Annotated[Number, WEIGHT_DECAY, "L2 penalty, or shrinking of the parameter where decoupled"]
Decoupled = Annotated[bool, "shrink the parameter by lr * weight_decay (AdamW) rather than adding to the gradient"]
