"""Contenders that take turns in one process, so that what disturbs the machine disturbs all of them alike."""

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from surefoot.benchmark import Quartiles, circumstances, write_csv

Parts = Mapping[str, Callable[[int], Iterator["Line"]]]
"""For each part of a benchmark what measures it, given the number of rounds."""


class Line(NamedTuple):
    """A line of the table: a contender's time, and how many times as long another takes.

    Attributes:
        part, case, contender: what was timed.
        ms, q1, q3: milliseconds, median and quartiles.
        other: the contender to compare with.
        ratio, ratio_q1, ratio_q3: its time over this one's.
    """

    part: str
    case: str
    contender: str
    ms: float
    q1: float
    q3: float
    other: str
    ratio: float
    ratio_q1: float
    ratio_q3: float


def run(parts: Parts, name: str, description: str) -> None:
    """Measure the parts that the command line asks for, print them, and write `NAME.csv`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    lines = []
    for line in (line for part in options.part for line in parts[part](options.rounds)):
        lines.append(line)
        print(
            f"{line.part:9} {line.case:32} {line.contender:20} {line.ms:9.3f} ms ({line.q1:.3f} to {line.q3:.3f}), "
            f"{line.other} takes {line.ratio:.2f} times as long ({line.ratio_q1:.2f} to {line.ratio_q3:.2f})",
            flush=True,
        )
    write(options.out / f"{name}.csv", lines, Line._fields)


def write(path: Path, lines: Iterable[tuple[Any, ...]], fields: Sequence[str]) -> None:
    """Write the lines of a table with the circumstances in which they came about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, ((*circumstances(), *line) for line in lines), ("machine", "date", "torch", "threads", *fields))


def compare(part: str, case: str, steps: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[Line]:
    """Time contenders in turns; each gives its own seconds.  The first is compared with all others."""
    seconds = take_turns(steps, rounds)
    first = next(iter(steps))
    for name in list(steps)[1:]:
        ratios = Quartiles.of(seconds[name] / seconds[first])
        yield Line(part, case, first, *Quartiles.of(1e3 * seconds[first]), name, *ratios)


def take_turns(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of each contender's step, round by round; each step gives its own seconds."""
    for step in steps.values():
        step(), step()
    gc.collect()
    seconds = {name: np.zeros(rounds) for name in steps}
    for index in range(rounds):
        for name, step in steps.items():
            step()  # not counted: it finds the caches full of another contender's data
            seconds[name][index] = np.median([step() for _ in range(3)])
    return seconds


def timed(step: Callable[[], object]) -> float:
    """Give the seconds that a step takes."""
    start = perf_counter()
    step()
    return perf_counter() - start
