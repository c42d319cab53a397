"""Expressions: what they mean, and that nothing else is understood."""

import pytest

from surefoot.lr_scheduler.expression import LONGEST, names, parse
from surefoot.lr_scheduler.schedules import (
    constant,
    cosine,
    join,
    linear,
    multi_step,
    piecewise,
    restarts,
    step,
    warmup,
    warmup_stable_decay,
)

MEANINGS = {
    "constant()": constant(),
    " cosine(1, 0.1, 1e3) ": cosine(1, 0.1, 1000),
    "linear(start=-1, end=1, steps=10*5)": linear(-1, 1, 50),
    "warmup(100, cosine(1, 0, 900), shape='cosine')": warmup(100, cosine(1, 0, 900), shape="cosine"),
    "join(constant(0.5), step(10), at=[30])": join(constant(0.5), step(10), at=[30]),
    "multi_step([10, 20, 20], 0.5) * constant(2)": multi_step([10, 20, 20], 0.5) * constant(2),
    "0.5 * cosine(1, 0, 10) * 2": 0.5 * cosine(1, 0, 10) * 2,
    "piecewise([(0, 0), (10, 1)])": piecewise([(0, 0), (10, 1)]),
    "warmup_stable_decay(1000/10, 1000 - 300, 2*100)": warmup_stable_decay(100, 700, 200),
    "restarts(cosine(1, 0, 10), 10, mult=2)": restarts(cosine(1, 0, 10), 10, mult=2),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_meanings(text):
    assert parse(text) == MEANINGS[text]


MISTAKES = {
    "cosine(1, 0": "'cosine(1, 0' is no schedule: '(' was never closed",
    "": "'' is no schedule: ",
    "3": "'3' is no schedule but 3; write, for instance, constant(3)",
    "cosin(1, 0, 5)": "there is no schedule 'cosin'; there are: absolute, constant, ",
    "warmup(9, cosine(1, 0, -5))": "a number in [0, inf)\n  warmup(9, cosine(1, 0, -5))\n            ^",
    "cosine(1, 0)": "missing 1 required positional argument: 'steps'\n  cosine(1, 0)\n  ^",
    "cosine(1, 0, 1/0)": "division by zero",
    "constant() + constant()": "`*` is for schedules and numbers, `+ - /` are for numbers",
    "constant('a') * 2": "`factor` must be a number",
    "-constant()": "expected a number",
    "constant(**{})": "`**` has no meaning in a schedule",
    "constant(9**9**9)": "a schedule is made of calls, numbers, lists",
    "__import__('os').system('true')": "a schedule is made of calls, numbers, lists",
    "__import__('os')": "there is no schedule '__import__'",
    "constant().__class__": "a schedule is made of calls, numbers, lists",
    "[x for x in [1]]": "a schedule is made of calls, numbers, lists",
    "(lambda: 1)()": "a schedule is made of calls, numbers, lists",
    "constant(x)": "a schedule is made of calls, numbers, lists",
    "constant(f'{1}')": "a schedule is made of calls, numbers, lists",
    "constant(1); constant(2)": "is no schedule: invalid syntax",
    "[constant()]": "is no schedule but (constant(factor=1.0),)",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_shown_where_they_are(text):
    with pytest.raises(ValueError, match=r".") as raised:
        parse(text)
    assert MISTAKES[text] in str(raised.value)


def test_text_without_end_is_refused():
    with pytest.raises(ValueError, match=f"a schedule has at most {LONGEST} characters, but got 20001"):
        parse("1" * 20001)
    with pytest.raises(ValueError, match=r"too many nested|nested too deeply|is no schedule"):
        parse("(" * 4000 + ")" * 4000)
    with pytest.raises(ValueError, match=r"nested too deeply|too many nested"):
        parse("-" * 9000 + "1")


def test_every_name_makes_a_curve():
    assert {"cosine", "warmup", "one_cycle", "cosine_with_warmup", "absolute", "scale", "product"} <= set(names())
    assert "ramp" not in names()
