# ruff: noqa: D102 (`Curve` and `Ramp` document what their subclasses define)
"""Schedules as values: functions of the step that can be compared, combined, plotted and written down.

A `Curve` maps steps, from 0 on, to factors.  It computes in float64, and gives the same bits for a step alone and for
the same step in an array: sums, products and square roots are numpy's, which round correctly; cosines and powers are
taken one by one from the C library, as numpy's vector versions differ from it in the last bit.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Union, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surefoot.lr_scheduler.ranges import ANY, NOT_NEGATIVE, POSITIVE, between
from surefoot.rule.hyperparameters import Check

Array = NDArray[np.float64]
Number = float | int


def cos(angles: Array) -> Array:
    """Return cosines with the bits of `math.cos`."""
    return np.array([math.cos(angle) for angle in angles.tolist()])


def power(bases: Array | float, exponents: Array | float) -> Array:
    """Return powers with the bits of `math.pow`."""
    pairs = zip(*(side.tolist() for side in np.broadcast_arrays(bases, exponents)), strict=True)
    return np.array([math.pow(base, exponent) for base, exponent in pairs])


RANGES: dict[str, Check] = {
    **dict.fromkeys(("factor", "start", "end", "low", "high", "gamma"), ANY),
    **dict.fromkeys(("steps", "power", "decay"), NOT_NEGATIVE),
    **dict.fromkeys(("every", "period", "timescale", "up"), POSITIVE),
    "down": between(low_open=True, optional=True),
    "mult": between(1.0),
}
"""Ranges of the curves' fields, which are of the same kind wherever they have the same name."""


def _pass(name: str, value: Any) -> None:
    """Pass: the curve looks at this field itself."""


_REGISTRY: dict[str, type["Curve"]] = {}


class Curve:
    """A function from steps to factors; abstract.

    A subclass is a frozen dataclass with a method `at`.  Its fields are numbers, curves, or tuples of these; that is
    what comparing, hashing, writing and reading go by.

    Example:
        >>> from surefoot.lr_scheduler import schedules
        >>> curve = schedules.warmup(10, schedules.cosine(1.0, 0.1, 90))
        >>> curve(5), curve(10), curve([0, 100])
        (0.5, 1.0, array([0. , 0.1]))
        >>> schedules.Curve.from_json(curve.to_json()) == curve
        True
    """

    name: ClassVar[str]
    """The name in expressions and in JSON: that of the class in snake case."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        """Make the class known to expressions and to `from_dict`."""
        super().__init_subclass__(**kwargs)
        if not abstract:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        """Bring the fields into their plain forms and check them."""
        for field, value in _fields(self):
            plain = _plain(value)
            object.__setattr__(self, field, plain)
            _check(self, field, plain)

    def at(self, steps: Array) -> Array:
        """Return the factors at the steps, a 1-d array of float64 numbers >= 0."""
        raise NotImplementedError

    def horizon(self) -> float:
        """Return the step after which nothing new happens; 0 if there is none."""
        return 0.0

    @overload
    def __call__(self, step: Number) -> float: ...
    @overload
    def __call__(self, step: ArrayLike) -> Array: ...
    def __call__(self, step: Any) -> Any:
        """Return the factor at a step, or those at an array of steps.

        Args:
            step: steps counted from 0; fractions are allowed.

        Returns:
            A float for a number, else a float64 array of the same shape.

        Raises:
            ValueError: a step is negative or NaN.
        """
        steps = np.asarray(step, dtype=np.float64)
        flat = steps.reshape(-1)
        # NaN is not below 0, but nothing is above it either.
        if not flat.min(initial=0.0) >= 0:
            raise ValueError(f"a schedule has steps >= 0, but got {step!r}")
        factors = np.empty_like(flat)
        factors[:] = self.at(flat)
        return float(factors[0]) if steps.ndim == 0 else factors.reshape(steps.shape)

    def __mul__(self, other: Union["Curve", Number]) -> "Curve":
        """Return the product with a curve or with a number."""
        return Product((self, other)) if isinstance(other, Curve) else Scale(self, other)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        """Show the expression that makes this curve."""
        return f"{self.name}({', '.join(f'{field}={value!r}' for field, value in _fields(self))})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the curve's name under `schedule`, and its fields."""
        return {"schedule": self.name, **{field: _encode(value) for field, value in _fields(self)}}

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Curve":
        """Make a curve from what `to_dict` gave.

        Raises:
            ValueError: no such curve, a wrong field, or a value out of range.
        """
        values = dict(data)
        name = str(values.pop("schedule", None))
        if name not in _REGISTRY:
            raise ValueError(
                f"there is no schedule {name!r}; `schedule` must be one of: {', '.join(sorted(_REGISTRY))}"
            )
        try:
            return _REGISTRY[name](**{field: _decode(value) for field, value in values.items()})
        except TypeError as error:
            raise ValueError(f"the fields of a {name} do not fit: {error}") from error

    @staticmethod
    def from_json(text: str) -> "Curve":
        """Make a curve from what `to_json` gave.

        Raises:
            ValueError: it is not JSON, or does not describe a curve.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(  # noqa: TRY004 (the text is at fault)
                f"a schedule's JSON is an object with a key `schedule`, but got {text[:40]!r}"
            )
        return Curve.from_dict(data)

    def plot(self, steps: int | None = None, path: str | Path | None = None) -> Any:
        """Draw the curve with matplotlib (extra `plot`).

        Args:
            steps: how many; by default all up to `horizon`.
            path: a file to write, of any type that matplotlib writes.

        Returns:
            The matplotlib figure, which a notebook shows.
        """
        from surefoot.lr_scheduler.plot import figure  # noqa: PLC0415 (matplotlib is optional and slow to import)

        return figure({repr(self): self}, steps, path)


def registry() -> Mapping[str, type[Curve]]:
    """Return all curves by name, a user's own included."""
    return _REGISTRY


def _fields(curve: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(curve, field.name)) for field in fields(curve))


def _plain(value: Any) -> Any:
    """Return lists as tuples and numpy's numbers as Python's."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


def _check(curve: Curve, field: str, value: Any) -> None:
    if any(isinstance(part, Absolute) for part in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"{curve.name}: `absolute` goes around a whole schedule, but got it as a part: {value!r}")
    if field == "curve" and not isinstance(value, Curve):
        raise TypeError(f"{curve.name}: `curve` must be a curve, but got {value!r}")
    try:
        RANGES.get(field, _pass)(field, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{curve.name}: {error}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, Curve):
        return value.to_dict()
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Curve.from_dict(value)
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value


# Simple curves


@dataclass(frozen=True, repr=False)
class Constant(Curve):
    """The same `factor` at all steps."""

    factor: float = 1.0

    def at(self, steps: Array) -> Array:
        return np.full_like(steps, self.factor)


@dataclass(frozen=True, repr=False)
class Ramp(Curve, abstract=True):
    """From `start` at step 0 to `end` at `steps`, and `end` from there on; abstract.

    Attributes:
        start: the first factor.
        end: the last factor.
        steps: how many steps it takes, >= 0.
    """

    start: float
    end: float
    steps: float

    def at(self, steps: Array) -> Array:
        if self.steps == 0:
            return np.full_like(steps, self.end)
        return self.between(np.minimum(steps, self.steps))

    def between(self, steps: Array) -> Array:
        """Return the factors at steps from 0 to `self.steps`, which is > 0."""
        raise NotImplementedError

    def horizon(self) -> float:
        return self.steps


@dataclass(frozen=True, repr=False)
class Linear(Ramp):
    """A straight line from `start` to `end` over `steps`."""

    def between(self, steps: Array) -> Array:
        return self.start + (self.end - self.start) * steps / self.steps


@dataclass(frozen=True, repr=False)
class Cosine(Ramp):
    """Half a period of a cosine from `start` to `end` over `steps`: flat at both ends."""

    def between(self, steps: Array) -> Array:
        return self.end + (self.start - self.end) * (1 + cos(math.pi * steps / self.steps)) / 2


@dataclass(frozen=True, repr=False)
class Polynomial(Ramp):
    """`end + (start - end) * (1 - step / steps) ** power`.

    Attributes:
        power: >= 0; 1 is a straight line, more starts steeper and ends flatter.
    """

    power: float = 1.0

    def between(self, steps: Array) -> Array:
        return self.end + (self.start - self.end) * power(1.0 - steps / self.steps, self.power)


@dataclass(frozen=True, repr=False)
class SqrtDecay(Ramp):
    """`start + (end - start) * sqrt(step / steps)`: the "1 - sqrt" cool-down of Hägele et al. 2024."""

    def between(self, steps: Array) -> Array:
        return self.start + (self.end - self.start) * np.sqrt(steps / self.steps)


@dataclass(frozen=True, repr=False)
class Exponential(Curve):
    """`gamma ** (step / every)`.

    Attributes:
        gamma: the factor of one `every`.
        every: how many steps it takes, > 0.
    """

    gamma: float
    every: float = 1.0

    def at(self, steps: Array) -> Array:
        return power(self.gamma, steps / self.every)


@dataclass(frozen=True, repr=False)
class InverseSqrt(Curve):
    """`sqrt(timescale / (step + timescale))`: after a warm-up of `timescale` steps the decay of Vaswani et al. 2017.

    Attributes:
        timescale: in steps, > 0; after three times as many the factor is 1/2.
    """

    timescale: float

    def at(self, steps: Array) -> Array:
        return np.sqrt(self.timescale / (steps + self.timescale))


@dataclass(frozen=True, repr=False)
class Step(Curve):
    """Times `gamma` at every `every` steps.

    Attributes:
        every: in steps, > 0.
        gamma: the factor.
    """

    every: float
    gamma: float = 0.1

    def at(self, steps: Array) -> Array:
        return power(self.gamma, np.floor_divide(steps, self.every))


@dataclass(frozen=True, repr=False)
class MultiStep(Curve):
    """Times `gamma` at each milestone.

    Attributes:
        milestones: steps, not decreasing; one that occurs twice counts twice.
        gamma: the factor.
    """

    milestones: tuple[float, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_milestones(self, self.milestones)

    def at(self, steps: Array) -> Array:
        return power(self.gamma, np.searchsorted(self.milestones, steps, side="right").astype(np.float64))

    def horizon(self) -> float:
        return max(self.milestones, default=0.0)


@dataclass(frozen=True, repr=False)
class Piecewise(Curve):
    """Straight lines through points; constant before the first and after the last.

    Attributes:
        points: pairs of step and factor, steps increasing.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.points or any(not isinstance(point, tuple) or len(point) != 2 for point in self.points):  # noqa: PLR2004
            raise ValueError(f"{self.name}: `points` must be pairs (step, factor), at least one, but got {self.points}")
        _check_milestones(self, tuple(step for step, _ in self.points), "points", strictly=True)

    def at(self, steps: Array) -> Array:
        at, factors = np.array(self.points, dtype=np.float64).T
        interpolated: Array = np.interp(steps, at, factors)
        return interpolated

    def horizon(self) -> float:
        return self.points[-1][0]


# Curves of curves


@dataclass(frozen=True, repr=False)
class Scale(Curve):
    """A curve times a number, `factor`."""

    curve: Curve
    factor: float

    def at(self, steps: Array) -> Array:
        return self.curve.at(steps) * self.factor

    def horizon(self) -> float:
        return self.curve.horizon()


@dataclass(frozen=True, repr=False)
class Product(Curve):
    """The product of curves."""

    curves: tuple[Curve, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_curves(self)

    def at(self, steps: Array) -> Array:
        factors = np.ones_like(steps)
        for curve in self.curves:
            factors = factors * curve.at(steps)
        return factors

    def horizon(self) -> float:
        return max(curve.horizon() for curve in self.curves)

    def __repr__(self) -> str:
        """Show a product as it is written."""
        return " * ".join(f"({curve!r})" if isinstance(curve, Product) else repr(curve) for curve in self.curves)


@dataclass(frozen=True, repr=False)
class Join(Curve):
    """One curve after the other, each counting its steps from its own beginning.

    Attributes:
        curves: the curves, at least one.
        milestones: the steps at which the second and later ones begin, not decreasing.
    """

    curves: tuple[Curve, ...]
    milestones: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_curves(self)
        _check_milestones(self, self.milestones)
        if len(self.milestones) != len(self.curves) - 1:
            raise ValueError(
                f"{self.name}: {len(self.curves)} curves need {len(self.curves) - 1} milestones, one less, "
                f"but got {self.milestones}"
            )

    def at(self, steps: Array) -> Array:
        active = np.searchsorted(self.milestones, steps, side="right")
        factors = np.empty_like(steps)
        for index in set(active.tolist()):
            chosen = active == index
            factors[chosen] = self.curves[index].at(steps[chosen] - (0, *self.milestones)[index])
        return factors

    def horizon(self) -> float:
        return (0.0, *self.milestones)[-1] + self.curves[-1].horizon()

    def __repr__(self) -> str:
        """Show the curves in order, then where they begin."""
        return f"join({', '.join(map(repr, self.curves))}, at={self.milestones!r})"


@dataclass(frozen=True, repr=False)
class Restarts(Curve):
    """A curve begun again and again, as in SGDR (Loshchilov and Hutter 2017).

    Attributes:
        curve: what is repeated; its first `period` steps count.
        period: length of the first cycle in steps, > 0.
        mult: each cycle is this much longer than the one before, the curve stretched to it; >= 1.
        decay: each cycle is this much lower than the one before; >= 0.
    """

    curve: Curve
    period: float
    mult: float = 1.0
    decay: float = 1.0

    def at(self, steps: Array) -> Array:
        cycle, begin, length = self._cycles(steps)
        within = np.maximum(steps - begin, 0.0) * (self.period / length)
        return self.curve.at(within) * power(self.decay, cycle)

    def _cycles(self, steps: Array) -> tuple[Array, Array, Array]:
        """Return the number, the beginning and the length of each step's cycle."""
        if self.mult == 1:
            cycle = np.floor_divide(steps, self.period)
            return cycle, cycle * self.period, np.full_like(steps, self.period)
        begins, lengths = [0.0], [float(self.period)]
        while begins[-1] + lengths[-1] <= steps.max(initial=0.0):
            begins.append(begins[-1] + lengths[-1])
            lengths.append(lengths[-1] * self.mult)
        index = np.searchsorted(begins, steps, side="right") - 1
        return index.astype(np.float64), np.array(begins)[index], np.array(lengths)[index]

    def horizon(self) -> float:
        return float(self.period * sum(self.mult**cycle for cycle in range(4)))


@dataclass(frozen=True, repr=False)
class Cyclic(Curve):
    """Up and down between two factors, in straight lines (Smith 2017).

    Attributes:
        low: the lower factor.
        high: the upper one.
        up: steps from `low` to `high`, > 0.
        down: steps back, > 0; as many by default.
        decay: the height's factor from cycle to cycle, >= 0.
        gamma: the height's factor from step to step.
    """

    low: float
    high: float
    up: float
    down: float | None = None
    decay: float = 1.0
    gamma: float = 1.0

    def at(self, steps: Array) -> Array:
        length = self._length()
        cycle = np.floor_divide(steps, length)
        position, turn = steps / length - cycle, self.up / length
        height = np.where(position <= turn, position / turn, (position - 1) / (turn - 1))
        return self.low + (self.high - self.low) * height * power(self.decay, cycle) * power(self.gamma, steps)

    def _length(self) -> float:
        return self.up + (self.up if self.down is None else self.down)

    def horizon(self) -> float:
        return 3 * self._length()


@dataclass(frozen=True, repr=False)
class Absolute(Curve):
    """A curve whose values are the hyperparameter itself rather than factors of its initial value.

    It tells `Schedule` so, and goes around a whole schedule; as a function it is the curve it holds.
    """

    curve: Curve

    def at(self, steps: Array) -> Array:
        return self.curve.at(steps)

    def horizon(self) -> float:
        return self.curve.horizon()


def _check_curves(curve: Join | Product) -> None:
    if not curve.curves or not all(isinstance(part, Curve) for part in curve.curves):
        raise ValueError(f"{curve.name}: it takes one or more curves, but got {curve.curves}")


def _check_milestones(
    curve: Curve, steps: tuple[Any, ...], field: str = "milestones", *, strictly: bool = False
) -> None:
    for step in steps:
        if not isinstance(step, int | float) or not 0 <= step < math.inf:
            raise ValueError(f"{curve.name}: `{field}` must be steps >= 0, but got {steps}")
    if any(b < a or (strictly and b == a) for a, b in pairwise(steps)):
        raise ValueError(f"{curve.name}: `{field}` must increase, but got {steps}")
