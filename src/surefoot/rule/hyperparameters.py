"""Ranges of hyperparameters: one place for the constructor, groups and loading alike.

A check is a callable `(name, value) -> None` that raises ValueError (or TypeError for what is no number).
The first words of every message are those of torch.optim; then follows what is allowed.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

Check = Callable[[str, Any], None]


def is_number(value: object) -> bool:
    """Whether `value` is a real Python or numpy number (booleans are none) or a real tensor."""
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
        """Whether `value` is inside."""
        above = self.low < value if self.low_open else self.low <= value
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        """Write the interval as mathematics does."""
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high_open or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Each:
    """A sequence of numbers, each with a check of its own."""

    checks: tuple[Interval, ...]

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


def storage(name: str, value: Any) -> None:
    """Raise unless `value` is None or a dtype in which state can be stored."""
    if value is not None and value not in _STORAGE:
        raise ValueError(f"`{name}` must be None or one of {', '.join(map(str, _STORAGE))}, but got {value!r}")


def options_text(optimizer: type) -> str:
    """Describe the options that a class's constructor takes, for its docstring."""
    names = inspect.signature(optimizer).parameters
    lines = [line for name, line in _OPTIONS.items() if name in names]
    return "\n        ".join(lines)


_STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OPTIONS = {
    "maximize": "maximize: ascend rather than descend.",
    "foreach": """foreach: True runs lists of tensors at once with `torch._foreach_*`; False one parameter at a time.
            None chooses the fastest engine.""",
    "fused": """fused: True runs generated kernels, and raises where they cannot serve; None uses them where they can.
            With True a GradScaler leaves unscaling and skipping to the step.""",
    "capturable": """capturable: keep the step count, and compute what depends on it, on the parameters' device, so that
            steps can be captured in a graph; tensors among the hyperparameters are read there.  Not on a CPU.""",
    "differentiable": "differentiable: let gradients flow through the step.  Runs one parameter at a time.",
    "state_dtype": """state_dtype: dtype in which new state is stored, float32 beside 16-bit parameters for instance;
            the parameter's own if None.  Arithmetic is in float32 or better either way.""",
    "options": """options: what is done around the update, alike for every optimizer: `max_grad_norm`, `max_grad_value`,
            `nonfinite`, `ema`, `zero_grad_after_step`, `telemetry`; see `surefoot.StepOptions`.""",
}

LR = Interval("Invalid learning rate: ")
EPS = at_least_zero("epsilon")
WEIGHT_DECAY = at_least_zero("weight_decay")
MOMENTUM = at_least_zero("momentum")
BETAS = Each(tuple(Interval(f"Invalid beta parameter at index {i}: ", high=1.0, high_open=True) for i in (0, 1)))
