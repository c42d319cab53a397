"""Small models, where a step is nearly all overhead: every optimizer against torch.optim, after real backward passes.

    python benchmarks/small.py                                        # all of it, in a few minutes on two quiet cores
    python benchmarks/small.py --only AdamW,SGD --models one,mlp4 --rounds 1000
    python benchmarks/small.py --threads 1                            # where other programs run beside it
    python benchmarks/small.py --draw                                 # the tables anew, from the csv file that is there
    python benchmarks/small.py --threads 1 --record                   # what docs/figures.md shows

It writes `cpu-small.csv` and `cpu-small.md`, or of another name, into `benchmarks/results`, and prints the tables.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch

from surefoot.benchmark import (
    OURS,
    SMALL_MODELS,
    SMALL_VARIANTS,
    TORCH_VARIANTS,
    SmallMeasurement,
    circumstances,
    geometric_mean,
    has_work,
    measure_small,
    write_csv,
)

PAGE = Path(__file__).parents[1] / "docs" / "figures.md"
BEGIN, END = "<!-- written by benchmarks/small.py -->", "<!-- until here -->"


class Line(NamedTuple):
    """A line of the csv file: a contender in a case.

    Attributes:
        machine, date, torch, threads: circumstances.
        variant: name of the optimizer's variant.
        model: name of the model.
        contender: name of the implementation.
        us: microseconds of a step, median over rounds; then their quartiles.
        speedup: time of torch's best implementation over this one's, median of the ratios; then their quartiles.
        calls: calls of Python functions in a step.
        best: whether it is the best of torch's.
        rounds: how many there were.
    """

    machine: str
    date: str
    torch: str
    threads: int
    variant: str
    model: str
    contender: str
    us: float
    us_q1: float
    us_q3: float
    speedup: float
    speedup_q1: float
    speedup_q3: float
    calls: int
    best: int
    rounds: int


Cells = Mapping[str, Line]
"""What was measured of one optimizer on one model, by contender."""


def main() -> None:
    """Measure or read, then write the tables."""
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / f"{options.name}.csv"
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.draw:
        done: list[Line] = []
        try:
            for lines in run(options.only, options.models, options.rounds):
                done += lines
        finally:
            write_csv(table, done, Line._fields)
    found = _read(table)
    text = markdown(found)
    table.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if options.record:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{summary(found)}\n{END}{after}", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time steps of small models against torch.optim's.")
    for option, allowed in (("--only", SMALL_VARIANTS), ("--models", SMALL_MODELS)):
        names = list(allowed)
        parser.add_argument(option, type=_names(names), default=names, metavar="NAMES", help=",".join(names))
    parser.add_argument("--rounds", type=int, default=100, help="timed steps of each contender in each case")
    parser.add_argument("--threads", type=int, help="torch's threads; one serves best on a machine that others use")
    parser.add_argument("--draw", action="store_true", help="measure nothing, read the csv file")
    parser.add_argument("--record", action="store_true", help=f"write the tables of {PAGE.name} too")
    parser.add_argument("--name", default="cpu-small", help="name of the results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in allowed]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; choose of {','.join(allowed)}")
        return text.split(",")

    return parse


# Measuring


def run(variants: Sequence[str], models: Sequence[str], rounds: int) -> Iterator[list[Line]]:
    """Measure one case after the other."""
    for variant, model in ((SMALL_VARIANTS[v], SMALL_MODELS[m]) for m in models for v in variants):
        if not has_work(variant, model):
            continue
        measured = measure_small(variant, model, rounds)
        us, speedup = measured.microseconds(), measured.speedup()
        print(
            f"{variant.name:17} {model.title:18} {us.median:8.1f} us, "
            f"speed-up {speedup.median:5.2f} ({speedup.q1:.2f} to {speedup.q3:.2f}) over {measured.best_of_torch}; "
            f"{measured.calls[OURS]} Python calls",
            flush=True,
        )
        yield lines_of(measured)


def lines_of(measured: SmallMeasurement) -> list[Line]:
    """Return a line for each contender."""
    return [
        Line(
            *circumstances(),
            measured.variant.name,
            measured.model.name,
            name,
            *measured.microseconds(name),
            *measured.speedup(name),
            measured.calls[name],
            int(name == measured.best_of_torch),
            len(measured.seconds[name]),
        )
        for name in measured.seconds
    ]


def _read(path: Path) -> list[Line]:
    kinds = get_type_hints(Line)
    with path.open(newline="", encoding="utf-8") as file:
        return [Line(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


# Tables


def markdown(found: Sequence[Line]) -> str:
    """Write a table of ratios, one of times and one of Python calls, with a line for each optimizer."""
    cells, first = _cells(found), found[0]
    where = (
        f"{first.machine}, threads: {first.threads}, torch {first.torch}, {first.date}, {first.rounds} rounds, float32."
    )
    parts = [
        f"{where}\nEach step comes after a forward and backward pass; only `step()` is timed.",
        "Speed-up, the time of torch's best implementation over ours: median (quartiles)",
        _table(cells, _ratio, last=("all (geometric mean)", _mean)),
        "Microseconds of a step: ours / torch's best",
        _table(cells, lambda cell: f"{cell[OURS].us:.0f} / {_best(cell).us:.0f} ({_best(cell).contender[6:]})"),
        "Calls of Python functions in a step: ours / torch's best",
        _table(cells, lambda cell: f"{cell[OURS].calls} / {_best(cell).calls}"),
    ]
    return "\n\n".join(parts) + "\n"


def summary(found: Sequence[Line]) -> str:
    """Write a table of speed-ups with a line for each model: the mean of elementwise algorithms, and others."""
    cells, first = _cells(found), found[0]
    threads = "one thread" if first.threads == 1 else f"{first.threads} threads"
    others = list(dict.fromkeys(name for name, _ in cells if name not in TORCH_VARIANTS))
    rows = [["parameters", "elementwise algorithms", *others], ["---"] * (2 + len(others))]
    for model in dict.fromkeys(model for _, model in cells):
        known = [cells[name, model][OURS].speedup for name in TORCH_VARIANTS if (name, model) in cells]
        mean = f"**{geometric_mean(known):.2f}** ({min(known):.2f} to {max(known):.2f})" if known else ""
        own = (f"{cells[name, model][OURS].speedup:.2f}" if (name, model) in cells else "" for name in others)
        rows.append([SMALL_MODELS[model].title, mean, *own])
    where = f"{threads} of {first.machine}, torch {first.torch}, {first.date}, {first.rounds} rounds, float32"
    return f"Speed-up, {where}:\n\n{_rows(rows)}\n"


def _cells(found: Sequence[Line]) -> dict[tuple[str, str], dict[str, Line]]:
    cells: dict[tuple[str, str], dict[str, Line]] = {}
    for line in found:
        cells.setdefault((line.variant, line.model), {})[line.contender] = line
    return cells


def _best(cell: Cells) -> Line:
    return next(line for line in cell.values() if line.best)


def _ratio(cell: Cells) -> str:
    ours = cell[OURS]
    text = f"{ours.speedup:.2f}" if ours.speedup >= 1 else f"**{ours.speedup:.2f}**"
    return f"{text} ({ours.speedup_q1:.2f} to {ours.speedup_q3:.2f})"


def _mean(column: Sequence[Cells]) -> str:
    return f"{geometric_mean(cell[OURS].speedup for cell in column):.2f}" if column else ""


def _table(
    cells: Mapping[tuple[str, str], Cells],
    show: Callable[[Cells], str],
    last: tuple[str, Callable[[Sequence[Cells]], str]] | None = None,
) -> str:
    variants, models = (list(dict.fromkeys(key[index] for key in cells)) for index in (0, 1))
    titles = [SMALL_MODELS[model].title if model in SMALL_MODELS else model for model in models]
    rows = [["optimizer", *titles], ["---"] * (1 + len(models))]
    for variant in variants:
        shown = (show(cells[variant, model]) if (variant, model) in cells else "" for model in models)
        rows.append([variant, *shown])
    if last:
        columns = ([cell for (_, its), cell in cells.items() if its == model] for model in models)
        rows.append([last[0], *map(last[1], columns)])
    return _rows(rows)


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
