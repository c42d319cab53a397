"""Schedules as values: their formulas, and that they compare, combine, vectorise and survive JSON."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler_parity import quick, settings

from surefoot.lr_scheduler import Curve
from surefoot.lr_scheduler.curves import registry
from surefoot.lr_scheduler.expression import parse
from surefoot.lr_scheduler.schedules import (
    absolute,
    constant,
    constant_with_warmup,
    cosine,
    cosine_with_restarts,
    cosine_with_warmup,
    cyclic,
    exponential,
    inverse_sqrt,
    inverse_sqrt_with_warmup,
    join,
    linear,
    linear_with_warmup,
    multi_step,
    one_cycle,
    piecewise,
    polynomial,
    polynomial_with_warmup,
    product,
    restarts,
    scale,
    sqrt_decay,
    step,
    warmup,
    warmup_stable_decay,
)

number = st.floats(-2, 2).map(lambda x: round(x, 3))
length = st.integers(0, 200) | st.floats(0.5, 200)
positive = st.integers(1, 200) | st.floats(0.5, 200)
milestones = st.lists(st.integers(0, 300), max_size=4).map(sorted)
leaves = (
    st.builds(constant, number)
    | st.builds(linear, number, number, length)
    | st.builds(cosine, number, number, length)
    | st.builds(polynomial, number, number, length, st.floats(0, 3))
    | st.builds(sqrt_decay, number, number, length)
    | st.builds(exponential, st.floats(0.5, 1.1), positive)
    | st.builds(inverse_sqrt, positive)
    | st.builds(step, positive, number)
    | st.builds(multi_step, milestones, number)
    | st.builds(cyclic, number, number, positive, st.none() | positive, st.floats(0, 1), st.floats(0.9, 1))
    | st.builds(lambda ys: piecewise([(7 * i, y) for i, y in enumerate(ys)]), st.lists(number, min_size=1, max_size=4))
)


def combined(parts):
    return (
        st.builds(lambda a, b, n: join(a, b, at=[n]), parts, parts, st.integers(0, 200))
        | st.builds(lambda a, b: a * b, parts, parts)
        | st.builds(scale, parts, number)
        | st.builds(restarts, parts, positive, st.floats(1, 3), st.floats(0, 1))
        | st.builds(warmup, length, parts)
    )


curves = st.recursive(leaves, combined, max_leaves=5)


@settings(quick, max_examples=300)
@given(curves, st.lists(st.integers(0, 500) | st.floats(0, 500), min_size=1, max_size=20))
def test_a_step_alone_and_in_an_array_give_the_same_bits(curve, steps):
    together = curve(np.array(steps))
    assert together.dtype == np.float64
    assert together.tolist() == [curve(one) for one in steps]
    assert curve(np.array([steps, steps])).tolist() == [together.tolist()] * 2
    assert isinstance(curve(steps[0]), float)


@settings(quick, max_examples=300)
@given(curves | st.builds(absolute, curves))
def test_json_expressions_and_pickles_give_an_equal_curve(curve):
    for twin in (Curve.from_json(curve.to_json()), parse(repr(curve)), pickle.loads(pickle.dumps(curve))):
        assert twin == curve
        assert hash(twin) == hash(curve)
        assert twin(range(50)).tolist() == curve(range(50)).tolist()


@settings(quick, max_examples=50)
@given(curves, curves, st.integers(0, 100), st.integers(0, 300))
def test_join_counts_each_curves_steps_from_its_beginning(first, second, at, now):
    assert join(first, second, at=[at])(now) == (first(now) if now < at else second(now - at))


@settings(quick, max_examples=50)
@given(curves, curves, number, st.integers(0, 300))
def test_products_multiply(first, second, factor, now):
    assert (first * second)(now) == product(first, second)(now) == first(now) * second(now)
    assert (factor * first)(now) == (first * factor)(now) == scale(first, factor)(now) == first(now) * factor


FORMULAS = {
    "constant": (constant(0.5), lambda s: 0.5),
    "linear": (linear(0.2, 1.0, 50), lambda s: 0.2 + 0.8 * min(s, 50) / 50),
    "cosine": (cosine(1.0, 0.1, 50), lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * min(s, 50) / 50)) / 2),
    "polynomial": (polynomial(1.0, 0.1, 50, 2.0), lambda s: 0.1 + 0.9 * (1 - min(s, 50) / 50) ** 2),
    "sqrt_decay": (sqrt_decay(1.0, 0.0, 50), lambda s: 1 - math.sqrt(min(s, 50) / 50)),
    "exponential": (exponential(0.5, 10), lambda s: 0.5 ** (s / 10)),
    "inverse_sqrt": (inverse_sqrt(10), lambda s: math.sqrt(10 / (s + 10))),
    "step": (step(10, 0.3), lambda s: 0.3 ** (s // 10)),
    "multi_step": (multi_step([3, 3, 8], 0.3), lambda s: 0.3 ** (2 * (s >= 3) + (s >= 8))),
    "piecewise": (piecewise([(10, 0.0), (20, 1.0), (60, 0.5)]), lambda s: np.interp(s, [10, 20, 60], [0, 1, 0.5])),
    "restarts": (restarts(cosine(1, 0, 10), 10), lambda s: (1 + math.cos(math.pi * (s % 10) / 10)) / 2),
    "decaying restarts": (restarts(linear(1, 0, 10), 10, decay=0.5), lambda s: 0.5 ** (s // 10) * (1 - s % 10 / 10)),
    "cyclic": (cyclic(0.1, 1.0, 10, 30), lambda s: 0.1 + 0.9 * min(s % 40 / 10, (40 - s % 40) / 30)),
    "constant_with_warmup": (constant_with_warmup(10), lambda s: min(1, s / 10)),
    "linear_with_warmup": (linear_with_warmup(10, 60), lambda s: s / 10 if s < 10 else max(0, (60 - s) / 50)),
    "cosine_with_warmup": (
        cosine_with_warmup(10, 60),
        lambda s: s / 10 if s < 10 else 0.5 * (1 + math.cos(math.pi * min(1, (s - 10) / 50))),
    ),
    "cosine_with_restarts": (
        cosine_with_restarts(10, 60, 3),
        lambda s: s / 10 if s < 10 else 0 if s >= 60 else 0.5 * (1 + math.cos(math.pi * (3 * (s - 10) / 50 % 1))),
    ),
    "polynomial_with_warmup": (
        polynomial_with_warmup(10, 60, 2.0, 0.01),
        lambda s: s / 10 if s < 10 else 0.01 + 0.99 * (1 - min(50, s - 10) / 50) ** 2,
    ),
    "inverse_sqrt_with_warmup": (
        inverse_sqrt_with_warmup(10),
        lambda s: s / 10 if s < 10 else 1 / math.sqrt(s / 10),
    ),
    "warmup_stable_decay": (
        warmup_stable_decay(10, 30, 20, shape="sqrt"),
        lambda s: s / 10 if s < 10 else 1 if s < 40 else 1 - math.sqrt(min(20, s - 40) / 20),
    ),
    "warmup of a curve that does not begin at 1": (
        warmup(10, constant(0.5), start=0.1),
        lambda s: 0.1 + 0.4 * min(s, 10) / 10,
    ),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_formulas(case):
    curve, formula = FORMULAS[case]
    assert curve(range(100)) == pytest.approx([formula(s) for s in range(100)], rel=1e-12, abs=1e-15)


@settings(quick, max_examples=30)
@given(st.integers(20, 300), st.floats(0.2, 0.45), st.booleans(), st.sampled_from(["cosine", "linear"]))
def test_one_cycle_is_torchs_in_units_of_its_max_lr(steps, pct_start, three_phase, shape):
    import torch  # noqa: PLC0415

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        1.0,
        steps,
        pct_start=pct_start,
        three_phase=three_phase,
        anneal_strategy=shape[:3].replace("lin", "linear"),
    )
    optimizer.step()
    curve = one_cycle(steps, pct_start, shape=shape, three_phase=three_phase)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.step()
    assert curve(range(steps)) == pytest.approx(seen, rel=1e-9)


@pytest.mark.parametrize("mult", [1, 2, 3])
def test_restarts_are_torchs(mult):
    import torch  # noqa: PLC0415

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 9, mult)
    curve = restarts(cosine(1.0, 0.0, 9), 9, mult)
    for now in range(500):
        assert curve(now) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_values_compare_hash_and_show():
    assert linear(0, 1, 100) == linear(0.0, 1.0, 100.0) != linear(0, 1, 101)
    assert cosine(0, 1, 100) != linear(0, 1, 100)
    assert len({multi_step([1, 2]), multi_step((1, 2)), multi_step(np.array([1, 2]).tolist())}) == 1
    assert linear(np.float32(0.5), np.int64(1), 3) == linear(0.5, 1, 3)
    json.dumps(linear(np.float32(0.5), np.int64(1), 3).to_dict())
    assert repr(warmup(5, cosine(1, 0, 10))) == (
        "join(linear(start=0.0, end=1.0, steps=5), cosine(start=1, end=0, steps=10), at=(5,))"
    )
    with pytest.raises(AttributeError):
        linear(0, 1, 100).steps = 3


def test_a_curve_far_out_costs_nothing():
    assert restarts(linear(1, 0, 10), 10)(1e12) == 1.0
    assert math.isfinite(restarts(linear(1, 0, 10), 10, 1.5)(1e12))


def test_horizons():
    assert warmup(10, cosine(1, 0, 90)).horizon() == 100
    assert (linear(1, 0, 10) * scale(multi_step([30]), 2)).horizon() == 30
    assert constant().horizon() == exponential(0.9).horizon() == 0
    assert restarts(constant(), 10, 2).horizon() == 150
    assert cyclic(0, 1, 10).horizon() == 60
    assert absolute(piecewise([(0, 0), (5, 1)])).horizon() == 5


def test_a_users_curve_takes_part():
    from dataclasses import dataclass  # noqa: PLC0415

    @dataclass(frozen=True, repr=False)
    class SawTooth(Curve):
        period: float

        def at(self, steps):
            return steps % self.period / self.period

    try:
        curve = parse("warmup(4, saw_tooth(10))")
        assert curve(9) == 0.5
        assert Curve.from_json(curve.to_json()) == curve
    finally:
        registry().pop("saw_tooth")


BAD = {
    "negative length": (
        lambda: linear(0, 1, -5),
        ValueError,
        r"linear: got -5; `steps` must be a number in \[0, inf\)",
    ),
    "no number": (
        lambda: cosine(0, "1", 5),
        ValueError,
        "cosine: got 1 of type <class 'str'>; `end` must be a number in",
    ),
    "infinite": (lambda: constant(math.inf), ValueError, "constant: got inf; `factor` must be a number in"),
    "nan": (lambda: constant(math.nan), ValueError, "constant: got nan"),
    "no period": (
        lambda: restarts(constant(), 0),
        ValueError,
        r"restarts: got 0; `period` must be a number in \(0, inf\)",
    ),
    "mult": (lambda: restarts(constant(), 5, 0.5), ValueError, "restarts: got 0.5; `mult` must be"),
    "inverse_sqrt": (lambda: inverse_sqrt_with_warmup(0), ValueError, "inverse_sqrt: got 0; `timescale` must be"),
    "milestones": (lambda: multi_step([5, 3]), ValueError, r"multi_step: `milestones` must increase, but got \(5, 3\)"),
    "milestone": (
        lambda: multi_step([-5]),
        ValueError,
        r"multi_step: `milestones` must be steps >= 0, but got \(-5,\)",
    ),
    "points": (lambda: piecewise([(5, 1), (5, 2)]), ValueError, "piecewise: `points` must increase"),
    "pairs": (lambda: piecewise([1, 2]), ValueError, r"piecewise: `points` must be pairs \(step, factor\)"),
    "join": (lambda: join(constant(), at=[3]), ValueError, "join: 1 curves need 0 milestones, one less, but got"),
    "join nothing": (join, ValueError, r"join: it takes one or more curves, but got \(\)"),
    "product": (lambda: product(3), ValueError, r"product: it takes one or more curves, but got \(3,\)"),
    "not a curve": (lambda: restarts(3, 5), TypeError, "restarts: `curve` must be a curve, but got 3"),
    "absolute": (
        lambda: absolute(constant()) * 2,
        ValueError,
        "scale: `absolute` goes around a whole schedule, but got it",
    ),
    "absolute in a join": (
        lambda: join(absolute(constant())),
        ValueError,
        "join: `absolute` goes around a whole sched",
    ),
    "shape": (
        lambda: warmup(5, shape="round"),
        ValueError,
        "`shape` must be one of 'linear', 'cosine', 'sqrt', but got 'r",
    ),
    "before the beginning": (lambda: constant()(-1), ValueError, "a schedule has steps >= 0, but got -1"),
    "nan step": (lambda: constant()(math.nan), ValueError, "a schedule has steps >= 0, but got nan"),
    "unknown": (
        lambda: Curve.from_dict({"schedule": "x"}),
        ValueError,
        "there is no schedule 'x'; `schedule` must be one of: abs",
    ),
    "field": (
        lambda: Curve.from_dict({"schedule": "step", "x": 1}),
        ValueError,
        "the fields of a step do not fit: .*x",
    ),
    "no object": (lambda: Curve.from_json("[1]"), ValueError, "a schedule's JSON is an object with a key `schedule`"),
    "no JSON": (lambda: Curve.from_json("{"), ValueError, "Expecting"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case):
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        make()
