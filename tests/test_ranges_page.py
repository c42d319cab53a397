"""docs/ranges.md is made from the code; SUREFOOT_UPDATE_GOLDEN=1 writes it anew."""

import inspect
import os
from pathlib import Path

import surefoot
from surefoot import lr_scheduler, swa_utils
from surefoot.lr_scheduler.curves import RANGES, registry
from surefoot.rule.hyperparameters import Each

PAGE = Path(__file__).parents[1] / "docs" / "ranges.md"
UPDATE = os.environ.get("SUREFOOT_UPDATE_GOLDEN") == "1"
SCHEDULERS = {
    **{
        name: getattr(lr_scheduler, name)
        for name in lr_scheduler.__all__
        if name.endswith(("LR", "Restarts", "Plateau"))
    },
    "SWALR": swa_utils.SWALR,
}
INTRODUCTION = """# Ranges of hyperparameters

What optimizers accept in a constructor, in a param group and in `load_state_dict`, and schedulers in a constructor
and in `load_state_dict`. NaN is in no range. Everything else is refused by a message that names the hyperparameter,
shows what came and says what is allowed. Words and flags of optimizers are in their docstrings. This page is made
from the code.
"""
BETWEEN_NUMBERS = {("Rprop", "etas"): "(a, b) with 0 < a < 1 < b"}
"""Ranges that the numbers of a tuple have together."""


def rows(made, ranges):
    """Yield the lines of a table: a name, its hyperparameters, their defaults and ranges."""
    parameters = inspect.signature(made).parameters
    # A curve goes by its name.
    title = vars(made).get("name", made.__name__)
    first = f"`{title}`"
    for name in (name for name in parameters if name in ranges and name != "last_epoch"):
        default = parameters[name].default
        shown = "" if default is inspect.Parameter.empty else f"`{default!r}`"
        yield f"| {first} | `{name}` | {shown} | {BETWEEN_NUMBERS.get((title, name)) or words_of(ranges[name])} |"
        first = ""


def words_of(check):
    """Return what a check allows; an `Each` has nothing to say where every number may be any."""
    if isinstance(check, Each) and not check.words:
        return f"{len(check.checks)} numbers"
    return check.words if hasattr(check, "words") else check.__doc__.split("\n")[0].removesuffix(".")


def table(entries):
    head = ["| | hyperparameter | default | range |", "|---|---|---|---|"]
    return "\n".join([*head, *(line for made, ranges in entries for line in rows(made, ranges))])


def page():
    """Return the page."""
    optimizers = [getattr(surefoot, name) for name in surefoot.optimizers.__all__]
    curves = [curve for _, curve in sorted(registry().items()) if curve.__module__.startswith("surefoot.")]
    sections = {
        "Optimizers": [(cls, cls.ranges) for cls in optimizers],
        "Schedulers": [(cls, cls.ranges) for _, cls in sorted(SCHEDULERS.items())],
        "Schedules as values": [(curve, RANGES) for curve in curves],
    }
    notes = {
        "Optimizers": "",
        "Schedulers": "A whole number may be of any type, 10.0 or a tensor too. Where an argument may be a list with\n"
        "one value per param group, each of them is in the range; a momentum is below 1 where it is `betas[0]`.\n"
        "`last_epoch` is a whole number >= -1 everywhere.\n\n",
        "Schedules as values": "By the name of the field, wherever it occurs.\n\n",
    }
    parts = [f"## {title}\n\n{notes[title]}{table(entries)}\n" for title, entries in sections.items()]
    return "\n".join([INTRODUCTION, *parts])


def test_the_page_of_ranges_is_what_the_code_says():
    if UPDATE:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "run this test with SUREFOOT_UPDATE_GOLDEN=1"


def test_every_class_with_a_range_is_on_the_page():
    text = page()
    functions = {"LambdaLR", "MultiplicativeLR"}  # which have nothing else
    named = {*surefoot.optimizers.__all__, *SCHEDULERS} - functions
    assert [name for name in named if f"| `{name}` |" not in text] == []
