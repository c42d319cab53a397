"""Cases of the fuzzer as plain data, and how they are drawn."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from changes import CHANGES
from worlds import ENGINES, LARGE, LAYOUTS, SETTINGS, SHAPES, WITHOUT_ENGINES, Kind

Pick = Callable[[int], int]
"""Gives a number from 0 to below its argument."""


class Round(NamedTuple):
    """What happens up to a step.

    Attributes:
        grads: "new", "in place" (into the gradients that are there), "kept", or "some" (new ones, some dropped).
        moves: changes by name, with the numbers by which they choose.
        where: when they happen: "before" the step, or in a "hook" or "closure" of it.
        how: "plain", in another "thread", "both" optimizers in two threads, or with gradients "enabled"; in loops also
            in "inference" mode, with a "closure", one that raises, or "scaled" by a GradScaler.
    """

    grads: str = "new"
    moves: tuple[tuple[str, int, int, int], ...] = ()
    where: str = "before"
    how: str = "plain"


@dataclass(frozen=True)
class Case:
    """A sequence of steps of a world, as plain data: its `repr` is Python that makes it again."""

    setting: str
    engine: str = "default"
    kinds: tuple[Kind, ...] = (Kind(0, 0),)
    rounds: tuple[Round, ...] = ()
    seed: int = 0

    def __repr__(self) -> str:
        kinds = ", ".join(map(repr, self.kinds))
        rounds = ", ".join(f"Round({', '.join(_arguments(each))})" for each in self.rounds)
        last = "," * (len(self.rounds) == 1)
        shown = f"{self.setting!r}, {self.engine!r}, ({kinds},), ({rounds}{last}), seed={self.seed}"
        for left_out in ("layout=", "shape=", ", other_dtype=False"):
            shown = shown.replace(left_out, "")
        return f"{type(self).__name__}({shown})"


def _arguments(each: Round) -> Iterator[str]:
    for name, value in each._asdict().items():
        if value != Round._field_defaults[name]:
            yield f"{name}={value!r}"


def draw_case(pick: Pick, *, engines: Iterable[str] = ENGINES, settings: Iterable[str] = SETTINGS) -> Case:
    """Return a case made of numbers that `pick` gives; small numbers make plain cases."""
    name, engine, kinds = draw_kinds(pick, engines, settings)
    rounds = [_draw_round(pick) for _ in range(2 + pick(6))]
    if (
        SETTINGS[name].algorithm == "LBFGS"
    ):  # it steps before and between the calls of its closure, and keeps its parameters
        rounds = [each._replace(where="before") for each in rounds]
    return Case(name, engine, kinds, tuple(rounds), pick(1000))


def draw_kinds(pick: Pick, engines: Iterable[str], settings: Iterable[str]) -> tuple[str, str, tuple[Kind, ...]]:
    """Return a setting, an engine and parameters."""
    name = tuple(settings)[pick(len(tuple(settings)))]
    setting = SETTINGS[name]
    engine = "default" if setting.algorithm in WITHOUT_ENGINES else tuple(engines)[pick(len(tuple(engines)))]
    allowed = setting.shapes or tuple(range(LARGE))
    kinds = []
    for _ in range(1 + pick(4 + pick(3))):
        shape = allowed[pick(len(allowed))]
        if not setting.shapes and pick(60) == 59:
            shape = LARGE + pick(len(SHAPES) - LARGE)
        kinds.append(Kind(shape, pick(len(LAYOUTS)), pick(12) == 11))
    return name, engine, tuple(kinds)


def _draw_round(pick: Pick) -> Round:
    grads = ("new", "new", "new", "in place", "kept", "some")[pick(6)]
    names = tuple(CHANGES)
    count = (0, 1, 1, 2)[pick(4)] if pick(2) else 0
    moves = tuple((names[pick(len(names))], pick(8), pick(12), pick(120)) for _ in range(count))
    between = not moves or any(CHANGES[move[0]].between for move in moves)
    where = "before" if between else ("before", "before", "before", "hook", "closure")[pick(5)]
    how = (("plain",) * 27 + ("thread", "both", "enabled"))[pick(30)]
    return Round(grads, moves, "before" if how == "both" else where, how)
