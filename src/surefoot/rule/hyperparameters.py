"""Ranges of hyperparameters: one place for the constructor, groups, loading and documentation alike.

A check is a callable `(name, value) -> None` that raises ValueError (or TypeError for what is not a number).
The first words of every message are those of torch.optim; then follows what is allowed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of some values, or None where that is among them."""
    if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
        raise ValueError(f"`{name}` must be {_listed(allowed)}, but got {value!r}")


def _listed(allowed: Sequence[Any]) -> str:
    *most, last = ["None" if each is None else repr(each) for each in allowed]
    return f"{', '.join(most)} or {last}"


STORAGE: Mapping[str, tuple[Any, ...]] = {
    "state_dtype": (None, torch.float32, torch.float64, torch.bfloat16, torch.float16, "float8"),
    "rounding": (None, "nearest", "stochastic"),
    "master_weight_bits": (None, 24, 32),
}
"""What options of storage may be."""


def check_storage(group: Mapping[str, Any]) -> None:
    """Raise when an option of storage is not what it may be.

    Raises:
        ValueError: it is another value, or gradients cannot flow through what it asks for.
        TypeError: the seed is no whole number.
    """
    for name, allowed in STORAGE.items():
        one_of(name, group.get(name), allowed)
    seed = group.get("rounding_seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
        raise ValueError(f"`rounding_seed` must be a whole number in [0, 2**63), but got {seed!r}")
    if group.get("differentiable"):
        short = {"state_dtype": "float8", "rounding": "stochastic"}
        asked = [name for name, value in short.items() if group.get(name) == value]
        asked += ["master_weight_bits"] * bool(group.get("master_weight_bits"))
        if asked:
            raise ValueError(
                f"gradients cannot flow through `{asked[0]}={group[asked[0]]!r}`; leave it out, or `differentiable`"
            )


LR = Interval("Invalid learning rate: ", high_open=True)
EPS = at_least_zero("epsilon")
WEIGHT_DECAY = finite("weight_decay")
MOMENTUM = finite("momentum")
THREE_BETAS = Each(
    tuple(Interval(f"Invalid beta parameter at index {i}: ", high=1.0, high_open=True) for i in range(3))
)
BETAS = Each(THREE_BETAS.checks[:2])

# What algorithms have in common, for their signatures: a type, a range and what documentation says.

Number = float | torch.Tensor
LearningRate = Annotated[Number, LR, "learning rate, a number or a tensor of one element"]
Betas = Annotated[tuple[float, float], BETAS, "(beta1, beta2), decay of the averages of g and of g**2"]
Eps = Annotated[float, EPS, "added to the root, in its units"]
Momentum = Annotated[float, MOMENTUM, "momentum factor"]
L2Penalty = Annotated[Number, WEIGHT_DECAY, "L2 penalty"]
L2OrDecoupled = Annotated[Number, WEIGHT_DECAY, "L2 penalty, or shrinking of the parameter where decoupled"]
Shrinking = Annotated[Number, WEIGHT_DECAY, "shrinking of the parameter, in units of the learning rate"]
Decoupled = Annotated[bool, "shrink the parameter by lr * weight_decay (AdamW) rather than adding to the gradient"]
