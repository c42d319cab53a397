"""What came out: times, ratios and their spread, and the csv file that holds them."""

import csv
import functools
import io
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch

from surefoot.benchmark.cases import Case
from surefoot.benchmark.contenders import COMPILED, MEMORY_BOUND, OURS, TORCH
from surefoot.files import write_whole


class Quartiles(NamedTuple):
    """The median of some values and how far half of them spread."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Quartiles":
        """Compute them."""
        return cls(*(float(value) for value in np.quantile(values, (0.5, 0.25, 0.75))))


def best_of_torch(seconds: Mapping[str, np.ndarray]) -> str | None:
    """Return torch's implementation with the least median; None if torch has none."""
    return min((name for name in TORCH if name in seconds), key=lambda name: np.median(seconds[name]), default=None)


def speedup(seconds: Mapping[str, np.ndarray], contender: str) -> Quartiles:
    """Return the time of torch's best implementation over a contender's, round by round; NaN if torch has none."""
    best = best_of_torch(seconds)
    return _UNKNOWN if best is None else Quartiles.of(seconds[best] / seconds[contender])


_UNKNOWN = Quartiles(math.nan, math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Times of a case.

    Attributes:
        case: the case.
        seconds: for each contender the time of a step in each round.
        wrong: contenders that took no part because their step computes something else.
        compile_seconds: what compiling took, 0 if nothing was compiled.
    """

    case: Case
    seconds: Mapping[str, np.ndarray]
    wrong: Sequence[str] = ()
    compile_seconds: float = 0.0

    @property
    def best_of_torch(self) -> str | None:
        """Torch's implementation with the least median; None of an optimizer that torch does not have."""
        return best_of_torch(self.seconds)

    def milliseconds(self, contender: str = OURS) -> Quartiles:
        """Return the time of a contender's step."""
        return Quartiles.of(1e3 * self.seconds[contender])

    def speedup(self, contender: str = OURS) -> Quartiles:
        """Return the speed-up, the time of torch's best implementation over the contender's; NaN if torch has none."""
        return speedup(self.seconds, contender)

    def over_memory_bound(self, contender: str = OURS) -> Quartiles:
        """Return the contender's time over that of the memory bound."""
        return Quartiles.of(self.seconds[contender] / self.seconds[MEMORY_BOUND])


class Result(NamedTuple):
    """A line of the csv file: a contender in a case.

    Attributes:
        machine: the processor.
        date: day of the measurement.
        torch: its version.
        threads: threads that torch used.
        variant: name of the optimizer's variant.
        shapes: name of the list of parameter shapes.
        dtype: dtype of the parameters.
        contender: name of the implementation.
        ms: milliseconds of a step, median over rounds; then their quartiles.
        speedup: time of torch's best implementation over this one's, median of the ratios; then their quartiles.
            NaN where torch has no such optimizer.
        over_memory_bound: this one's time over that of the memory bound, median of the ratios; then their quartiles.
        ms_min: the least.
        rounds: how many there were.
        compile_s: seconds that compiling took.
        note: why there are no numbers.
    """

    machine: str
    date: str
    torch: str
    threads: int
    variant: str
    shapes: str
    dtype: str
    contender: str
    ms: float
    ms_q1: float
    ms_q3: float
    speedup: float
    speedup_q1: float
    speedup_q3: float
    over_memory_bound: float
    over_memory_bound_q1: float
    over_memory_bound_q3: float
    ms_min: float
    rounds: int
    compile_s: float
    note: str


WRONG = "left out: its step computes something else"


def results(measurement: Measurement) -> list[Result]:
    """Return a line for each contender, those that took no part included."""
    case = measurement.case
    names = (case.variant.name, case.shapes.name, case.dtype_name)
    lines = {name: (*_numbers(measurement, name), "") for name in measurement.seconds}
    lines |= dict.fromkeys(measurement.wrong, (*(math.nan,) * 10, 0, math.nan, WRONG))
    return [Result._make((*circumstances(), *names, name, *line)) for name, line in lines.items()]


def _numbers(measurement: Measurement, name: str) -> tuple[Any, ...]:
    seconds = measurement.seconds[name]
    compiling = measurement.compile_seconds if name == COMPILED else math.nan
    parts = (measurement.milliseconds(name), measurement.speedup(name), measurement.over_memory_bound(name))
    return (*(number for part in parts for number in part), 1e3 * float(seconds.min()), len(seconds), compiling)


def circumstances() -> tuple[str, str, str, int]:
    """Return the processor, the date, torch's version and its number of threads."""
    return processor(), datetime.now(tz=UTC).date().isoformat(), torch.__version__, torch.get_num_threads()


@functools.cache
def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def write_csv(path: Path, lines: Iterable[tuple[Any, ...]], columns: Sequence[str] = Result._fields) -> None:
    """Write lines of a table, numbers with five digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for line in lines:
        writer.writerow(f"{value:.5g}" if isinstance(value, float) else value for value in line)
    write_whole(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Result]:
    """Read what `write_csv` has written."""
    kinds = get_type_hints(Result)
    with path.open(newline="", encoding="utf-8") as file:
        return [Result(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def geometric_mean(values: Iterable[float]) -> float:
    """Return the mean that suits ratios.

    Raises:
        ValueError: there are no values, or one of them is not positive.
    """
    logarithms = [math.log(value) for value in values]
    if not logarithms:
        raise ValueError("there is no geometric mean of nothing")
    return math.exp(math.fsum(logarithms) / len(logarithms))
