"""The full matrix: every optimizer, list of parameters and dtype, against torch.optim and the memory bound.

    python benchmarks/cpu.py --model tiny medium large   # what the README shows, in ten minutes on two quiet cores
    python benchmarks/cpu.py --model mlp1000 resnet50 gpt2-small --dtype float32 --name cpu-models
    python benchmarks/cpu.py --optimizer AdamW NAdam --model medium large --dtype float32 --compile --name cpu-compile
    python benchmarks/cpu.py --draw     # the picture and the tables anew, from the csv file that is there

It writes `cpu.csv`, `cpu.png` and `cpu.md`, or of another name, into `benchmarks/results`, and prints the tables.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from surefoot.benchmark import (
    COMPILED,
    DTYPES,
    MEMORY_BOUND,
    OURS,
    SHAPE_LISTS,
    TORCH_VARIANTS,
    Case,
    Quartiles,
    Result,
    cases,
    check_memory,
    geometric_mean,
    measure,
    read_csv,
    results,
    write_csv,
)

LARGE = "large"
COLOURS = {"float32": "#1c4f9c", "bfloat16": "#e07b00"}
MOST_OVER_BOUND = 1.05

Line = tuple[Result, Result]
"""What was measured of us and of the memory bound, in one case."""


def main() -> None:
    """Measure or read, then write the tables and the picture."""
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / f"{options.name}.csv"
    if not options.draw:
        selected = cases(options.optimizer, options.model, options.dtype)
        done: list[Result] = []
        try:
            for lines in run(selected, options.minutes, compiled=options.compile):
                done += lines
        finally:
            write_csv(table, done)
    found = read_csv(table)
    text = markdown(found)
    table.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(found).savefig(table.with_suffix(".png"), dpi=130)
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time every optimizer against torch.optim and the memory bound.")
    for option, allowed in (("--optimizer", TORCH_VARIANTS), ("--model", SHAPE_LISTS), ("--dtype", DTYPES)):
        names = list(allowed)
        parser.add_argument(option, nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything, compiling excluded")
    parser.add_argument("--compile", action="store_true", help="torch.compile(step) too: minutes for each case")
    parser.add_argument("--draw", action="store_true", help="measure nothing, read the csv file")
    parser.add_argument("--name", default="cpu", help="name of the results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


# Measuring


def run(selected: Sequence[Case], minutes: float, *, compiled: bool = False) -> Iterator[list[Result]]:
    """Measure one case after the other; time is shared out by what setting them up and a step of theirs take."""
    for case in selected:
        check_memory(case, compiled=compiled)
    deadline, left = perf_counter() + 60 * minutes, sum(map(_weight, selected))
    for number, case in enumerate(selected, start=1):
        start = perf_counter()
        seconds = max(0.0, deadline - start) * _weight(case) / left
        measurement = measure(case, seconds=seconds, compiled=compiled)
        took = perf_counter() - start
        left -= _weight(case)
        deadline += measurement.compile_seconds
        speedup, over = measurement.speedup().median, measurement.over_memory_bound().median
        print(
            f"{number:3d}/{len(selected)}  {case!s:42}  speed-up {speedup:6.2f}, "
            f"time over the memory bound {over:5.2f}; {took:5.1f} s",
            flush=True,
        )
        yield results(measurement)


def _weight(case: Case) -> float:
    return 1 + case.shapes.elements / 50e6


# Tables


def lines_of(found: Iterable[Result], shapes: str | None = None, dtype: str | None = None) -> list[Line]:
    """Give what was measured of us and of the bound, for one list of parameters and one dtype, or all of them."""
    parts: dict[tuple[str, str, str], dict[str, Result]] = {}
    for result in found:
        if shapes in (None, result.shapes) and dtype in (None, result.dtype):
            parts.setdefault((result.variant, result.shapes, result.dtype), {})[result.contender] = result
    return [(part[OURS], part[MEMORY_BOUND]) for part in parts.values()]


def _names(found: Sequence[Result], column: str) -> list[str]:
    return list(dict.fromkeys(getattr(result, column) for result in found))


def markdown(found: Sequence[Result]) -> str:
    """Write tables: one line for each list of parameters, one for each optimizer, and what was compiled."""
    one = found[0]
    machine = f"{one.machine}, {one.threads} threads, torch {one.torch}, {one.date}."
    return "\n\n".join([machine, _summary(found), _all_cases(found), *_compiled(found)]) + "\n"


def _summary(found: Sequence[Result]) -> str:
    """One line for each list of parameters: how many times faster than torch's best implementation."""
    shape_lists, dtypes = _names(found, "shapes"), _names(found, "dtype")
    header = ["parameters", *(f"{dtype}: speed-up, time of torch's best / ours" for dtype in dtypes)]
    rows = [[SHAPE_LISTS[shapes].title, *_cells(found, shapes, dtypes, "speedup")] for shapes in shape_lists]
    if LARGE in shape_lists:
        rows.append(
            [f"{SHAPE_LISTS[LARGE].title}: our time / memory bound", *_cells(found, LARGE, dtypes, "over_memory_bound")]
        )
    return _table([header, *rows])


def _cells(found: Sequence[Result], shapes: str, dtypes: Iterable[str], ratio: str) -> Iterator[str]:
    """Give the geometric mean over optimizers of a ratio, and its least and greatest, for each dtype."""
    for dtype in dtypes:
        ratios = [getattr(ours, ratio) for ours, _ in lines_of(found, shapes, dtype)]
        yield f"**{geometric_mean(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def _all_cases(found: Sequence[Result]) -> str:
    """One line for each optimizer and dtype: the ratio in every list, with its quartiles, and that to the bound."""
    shape_lists = _names(found, "shapes")
    rows = [["optimizer", "dtype", *(SHAPE_LISTS[shapes].title for shapes in shape_lists)]]
    if LARGE in shape_lists:
        rows[0].append(f"{SHAPE_LISTS[LARGE].title}, over the memory bound")
    for dtype in _names(found, "dtype"):
        for variant in _names(found, "variant"):
            ours = {line.shapes: line for line, _ in lines_of(found, dtype=dtype) if line.variant == variant}
            cells = [_spread(_speedup(ours[shapes])) if shapes in ours else "" for shapes in shape_lists]
            if LARGE in ours:
                cells.append(_spread(_over_bound(ours[LARGE])))
            rows.append([variant, dtype, *cells])
    return _table(rows)


def _compiled(found: Sequence[Result]) -> Iterator[str]:
    """Where torch.compile took part: how long that takes, and how many times as long as ours its step."""
    pairs = [
        (line, ours)
        for line in found
        for ours, _ in lines_of(found, line.shapes, line.dtype)
        if line.contender == COMPILED and ours.variant == line.variant
    ]
    rows = [
        [theirs.variant, theirs.dtype, SHAPE_LISTS[theirs.shapes].title, f"{theirs.compile_s:.0f} s", f"{ratio:.2f}"]
        for theirs, ratio in ((theirs, theirs.ms / ours.ms) for theirs, ours in pairs)
    ]
    if rows:
        yield _table([["torch.compile(step)", "dtype", "parameters", "compiling", "its step / ours"], *rows])


def _speedup(line: Result) -> Quartiles:
    return Quartiles(line.speedup, line.speedup_q1, line.speedup_q3)


def _over_bound(line: Result) -> Quartiles:
    return Quartiles(line.over_memory_bound, line.over_memory_bound_q1, line.over_memory_bound_q3)


def _spread(of: Quartiles) -> str:
    return f"{of.median:.2f} ({of.q1:.2f}-{of.q3:.2f})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *others))


# Picture

MEAN = "geometric mean"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(found: Sequence[Result]) -> Figure:
    """Draw a panel for each list of parameters with a dot for each optimizer, and one for the memory bound."""
    shape_lists, names = _names(found, "shapes"), [*_names(found, "variant"), MEAN]
    panels = len(shape_lists) + (LARGE in shape_lists)
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(1.8 + 3.2 * columns, 1.3 + 3.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    lines = lines_of(found)
    ratios = [ours.speedup for ours, _ in lines] + [bound.speedup for ours, bound in lines if _has_bound(ours)]
    reach = (min(0.6, *ratios) / 1.2, max(2.0, *ratios) * 1.3)
    for panel, shapes in zip(axes, shape_lists, strict=False):
        _draw_speedups(panel, found, shapes, names, reach)
    if LARGE in shape_lists:
        _draw_bound(axes[panels - 1], found, names)
    for panel in axes[panels:]:
        panel.set_axis_off()
    axes[0].set_yticks([*range(len(names) - 1), len(names) - 0.8], names)
    axes[0].set_ylim(len(names) - 0.1, -0.6)
    one = found[0]
    figure.suptitle(
        "One optimizer step: surefoot against the best implementation in torch.optim\n"
        f"{one.machine}, {one.threads} threads, torch {one.torch}; dots: medians, lines: quartiles over rounds",
        fontsize=12,
    )
    figure.legend(handles=_legend(_names(found, "dtype")), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _legend(dtypes: Iterable[str]) -> list[Line2D]:
    dots = [Line2D([], [], marker="o", linewidth=2, color=COLOURS[d], label=f"surefoot, {d}") for d in dtypes]
    limit = Line2D([], [], marker="|", linestyle="", markersize=12, markeredgewidth=2, color="grey", alpha=0.6)
    limit.set_label("memory bound: our kernel, were it to move the same bytes and only add")
    return [*dots, limit]


def _draw_speedups(
    axes: Axes, found: Sequence[Result], shapes: str, names: Sequence[str], reach: tuple[float, float]
) -> None:
    """Draw the speed-up of every optimizer, and that of the memory bound."""
    axes.set_xscale("log")
    axes.set_xlim(*reach)
    for place, dtype in enumerate(_names(found, "dtype")):
        lines = lines_of(found, shapes, dtype)
        limited = [line for line in lines if _has_bound(line[0])]
        axes.plot(
            [bound.speedup for _, bound in limited],
            _heights(limited, names, place),
            "|",
            color=COLOURS[dtype],
            alpha=0.35,
            markersize=11,
            markeredgewidth=2,
        )
        _dots(axes, [_speedup(ours) for ours, _ in lines], _heights(lines, names, place), dtype)
        _mean(axes, [ours.speedup for ours, _ in lines], names, place, dtype)
    _frame(axes, names, below_is_bad=True)
    ticks = [tick for tick in _TICKS if reach[0] <= tick <= reach[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(SHAPE_LISTS[shapes].title, fontweight="bold")
    axes.set_xlabel("speed-up: time of torch's best / ours", fontsize=9)


def _draw_bound(axes: Axes, found: Sequence[Result], names: Sequence[str]) -> None:
    """Draw the time over the memory bound of every optimizer on large tensors."""
    least, most = 0.92, 1.13
    for place, dtype in enumerate(_names(found, "dtype")):
        lines = lines_of(found, LARGE, dtype)
        _dots(axes, [_over_bound(ours) for ours, _ in lines], _heights(lines, names, place), dtype)
        _mean(axes, [ours.over_memory_bound for ours, _ in lines], names, place, dtype)
        least = min(least, *(ours.over_memory_bound_q1 for ours, _ in lines))
        most = max(most, *(ours.over_memory_bound_q3 for ours, _ in lines))
    axes.set_xlim(least - 0.02, most + 0.02)
    _frame(axes, names, below_is_bad=False)
    axes.axvline(MOST_OVER_BOUND, color="#b00020", linewidth=1, linestyle=":")
    axes.set_title(f"{SHAPE_LISTS[LARGE].title}: over the memory bound", fontweight="bold")
    axes.set_xlabel("our time / that of the memory bound; dotted: 1.05", fontsize=9)


def _heights(lines: Sequence[Line], names: Sequence[str], place: int) -> list[float]:
    return [names.index(ours.variant) + 0.3 * (place - 0.5) for ours, _ in lines]


def _has_bound(result: Result) -> bool:
    """Whether moving bytes is what the case is about."""
    return result.shapes != "overhead"


def _dots(axes: Axes, quartiles: Sequence[tuple[float, ...]], heights: Sequence[float], dtype: str) -> None:
    """Draw medians as dots, and the middle half of the rounds as lines."""
    medians, *ends = zip(*quartiles, strict=True)
    axes.hlines(heights, *ends, color=COLOURS[dtype], linewidth=2)
    axes.plot(medians, heights, "o", color=COLOURS[dtype], markersize=5)


def _mean(axes: Axes, ratios: Sequence[float], names: Sequence[str], place: int, dtype: str) -> None:
    mean, height = geometric_mean(ratios), len(names) - 0.8 + 0.7 * (place - 0.5)
    axes.plot(mean, height, "D", color=COLOURS[dtype], markersize=7)
    axes.annotate(
        f"{mean:.2f}",
        (mean, height),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        color=COLOURS[dtype],
        fontweight="bold",
        fontsize=9,
    )


def _frame(axes: Axes, names: Sequence[str], *, below_is_bad: bool) -> None:
    axes.axvline(1, color="black", linewidth=1.2)
    if below_is_bad:
        axes.axvspan(axes.get_xlim()[0], 1, color="#b00020", alpha=0.07, linewidth=0)
    axes.axhline(len(names) - 1.5, color="grey", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
