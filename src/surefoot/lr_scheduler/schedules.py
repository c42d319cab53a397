"""The schedules by the names under which they are written: curves, what combines them, and ready-made ones.

`linear(1.0, 0.0, 1000)` is a value (see `curves.Curve`); give it to `Schedule`, call it, plot it, compare it.  The
names here are also those of expressions such as `surefoot lr plot "warmup(100, cosine(1, 0, 900))"`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from surefoot.lr_scheduler.curves import (
    Absolute,
    Constant,
    Cosine,
    Curve,
    Cyclic,
    Exponential,
    InverseSqrt,
    Join,
    Linear,
    MultiStep,
    Piecewise,
    Polynomial,
    Product,
    Ramp,
    Restarts,
    Scale,
    SqrtDecay,
    Step,
)
from surefoot.lr_scheduler.ranges import AT_LEAST_ONE_EPOCH, between
from surefoot.rule.hyperparameters import Check

absolute = Absolute
constant = Constant
cosine = Cosine
cyclic = Cyclic
exponential = Exponential
inverse_sqrt = InverseSqrt
linear = Linear
multi_step = MultiStep
piecewise = Piecewise
polynomial = Polynomial
restarts = Restarts
scale = Scale
sqrt_decay = SqrtDecay
step = Step

_DIVISOR = between(low_open=True, infinite=True)
Shape = Literal["linear", "cosine", "sqrt"]
_SHAPES: dict[str, type[Ramp]] = {"linear": Linear, "cosine": Cosine, "sqrt": SqrtDecay}


def _ramp(shape: str, start: float, end: float, steps: float) -> Curve:
    if shape not in _SHAPES:
        raise ValueError(f"`shape` must be one of {', '.join(map(repr, _SHAPES))}, but got {shape!r}")
    return _SHAPES[shape](start, end, steps)


def _check(builder: str, **values: tuple[Any, Check]) -> None:
    """Raise ValueError when an argument is not in its range."""
    for name, (value, check) in values.items():
        try:
            check(name, value)
        except ValueError as error:
            raise ValueError(f"{builder}: {error}") from None


def join(*curves: Curve, at: Sequence[float] = ()) -> Curve:
    """Return one curve after the other.

    Args:
        curves: each counts its steps from its own beginning.
        at: the steps at which the second and later ones begin.
    """
    return Join(curves, tuple(at))


def product(*curves: Curve) -> Curve:
    """Return the product of curves, as `*` does."""
    return Product(curves)


def warmup(steps: float, then: Curve | None = None, start: float = 0.0, shape: Shape = "linear") -> Curve:
    """Rise to another curve's first factor, then follow that curve.

    Args:
        steps: how many the rise takes, >= 0.
        then: what follows, from its own step 0; a constant 1 by default.
        start: the factor at step 0.
        shape: `"linear"`, `"cosine"` or `"sqrt"`.
    """
    then = Constant() if then is None else then
    return Join((_ramp(shape, start, then(0), steps), then), (steps,))


def warmup_stable_decay(
    warmup_steps: float, stable_steps: float, decay_steps: float, end: float = 0.0, shape: Shape = "linear"
) -> Curve:
    """Rise, stay at 1, fall: a run can be prolonged from any point of the middle part.

    Args:
        warmup_steps: steps of the linear rise from 0.
        stable_steps: steps at 1.
        decay_steps: steps of the fall.
        end: the last factor.
        shape: of the fall: `"linear"`, `"cosine"` or `"sqrt"` (1 - sqrt, Hägele et al. 2024).
    """
    parts = (Linear(0.0, 1.0, warmup_steps), Constant(), _ramp(shape, 1.0, end, decay_steps))
    return Join(parts, (warmup_steps, warmup_steps + stable_steps))


def one_cycle(
    steps: float,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    shape: Shape = "cosine",
    three_phase: bool = False,
) -> Curve:
    """Rise to 1 and fall far below the beginning (Smith and Topin 2018); `OneCycleLR` in units of its `max_lr`.

    Args:
        steps: length of the cycle, >= 1, of which the last step is `steps - 1`.
        pct_start: the fraction of the steps that rises, in [0, 1].
        div_factor: the first factor is `1 / div_factor`; > 0.
        final_div_factor: the last is `1 / div_factor / final_div_factor`; > 0.
        shape: `"cosine"`, `"linear"` or `"sqrt"`.
        three_phase: fall to the first factor as fast as it rose, then to the last; at most half of the steps may rise.
    """
    divisors = {"div_factor": (div_factor, _DIVISOR), "final_div_factor": (final_div_factor, _DIVISOR)}
    _check("one_cycle", steps=(steps, between(1)), pct_start=(pct_start, between(0, 1)), **divisors)
    first = 1.0 / div_factor
    last = first / final_div_factor
    peak = max(pct_start * steps - 1, 0.0)
    if three_phase and 2 * peak > steps - 1:
        raise ValueError(
            f"one_cycle: three_phase=True falls as long as it rises, but pct_start={pct_start} of {steps} steps leaves "
            "no room for that; give a pct_start of at most 0.5"
        )
    corners = [(0.0, first), (peak, 1.0), (steps - 1, last)]
    if three_phase:
        corners.insert(2, (2 * peak, first))
    parts = [_ramp(shape, a, b, y - x) for (x, a), (y, b) in pairwise(corners)]
    return Join(tuple(parts), tuple(x for x, _ in corners[1:-1]))


def constant_with_warmup(warmup_steps: float) -> Curve:
    """Rise linearly from 0 to 1 in `warmup_steps` and stay there."""
    return warmup(warmup_steps)


def linear_with_warmup(warmup_steps: float, total_steps: float, end: float = 0.0) -> Curve:
    """Rise linearly from 0 to 1 in `warmup_steps`, fall linearly to `end` at `total_steps`."""
    _check("linear_with_warmup", total_steps=(total_steps, between(warmup_steps)))
    return warmup(warmup_steps, Linear(1.0, end, total_steps - warmup_steps))


def cosine_with_warmup(warmup_steps: float, total_steps: float, end: float = 0.0) -> Curve:
    """Rise linearly from 0 to 1 in `warmup_steps`, fall as half a cosine to `end` at `total_steps`."""
    _check("cosine_with_warmup", total_steps=(total_steps, between(warmup_steps)))
    return warmup(warmup_steps, Cosine(1.0, end, total_steps - warmup_steps))


def cosine_with_restarts(warmup_steps: float, total_steps: float, cycles: int = 1, end: float = 0.0) -> Curve:
    """Rise linearly in `warmup_steps`, fall as a cosine `cycles` times, and stay at `end` from `total_steps` on."""
    longer = between(warmup_steps, low_open=True)
    _check("cosine_with_restarts", cycles=(cycles, AT_LEAST_ONE_EPOCH), total_steps=(total_steps, longer))
    period = (total_steps - warmup_steps) / cycles
    falls = Restarts(Cosine(1.0, end, period), period)
    return Join((Linear(0.0, 1.0, warmup_steps), falls, Constant(end)), (warmup_steps, total_steps))


def polynomial_with_warmup(warmup_steps: float, total_steps: float, power: float = 1.0, end: float = 0.0) -> Curve:
    """Rise linearly from 0 to 1 in `warmup_steps`, fall as a polynomial of degree `power` to `end` at `total_steps`."""
    _check("polynomial_with_warmup", total_steps=(total_steps, between(warmup_steps)))
    return warmup(warmup_steps, Polynomial(1.0, end, total_steps - warmup_steps, power))


def inverse_sqrt_with_warmup(warmup_steps: float, timescale: float | None = None) -> Curve:
    """Rise linearly from 0 to 1 in `warmup_steps`, fall as `sqrt(timescale / (steps since then + timescale))`.

    Args:
        warmup_steps: > 0 unless `timescale` is given.
        timescale: by default `warmup_steps`, so that the factor is `sqrt(warmup_steps / step)`.
    """
    return warmup(warmup_steps, InverseSqrt(warmup_steps if timescale is None else timescale))


BUILDERS = {
    function.__name__: function
    for function in (
        join,
        product,
        warmup,
        warmup_stable_decay,
        one_cycle,
        constant_with_warmup,
        linear_with_warmup,
        cosine_with_warmup,
        cosine_with_restarts,
        polynomial_with_warmup,
        inverse_sqrt_with_warmup,
    )
}
"""What makes curves of others, by name."""
