"""What each release takes on a machine: a small fixed set of cases, kept for every release, and their picture.

    python benchmarks/history.py           # measures this version, in about four minutes on two quiet cores; draws
    python benchmarks/history.py --draw    # the picture anew, from the csv files that are there

It writes `benchmarks/history/VERSION_MACHINE_THREADS.csv`, in the place of an earlier one of the same version, and
`docs/pictures/history.png`.  The cases stay as they are from release to release; a new one may be added.  For the
difference between two commits see `commits.py`, which measures both in turns.
"""

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import surefoot
from surefoot.benchmark import (
    OURS,
    SHAPE_LISTS,
    Case,
    Result,
    cases,
    check_memory,
    circumstances,
    measure,
    read_csv,
    results,
    write_csv,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "history"
PICTURE = ROOT / "docs" / "pictures" / "history.png"

MODELS = ("tiny", "medium", "large")
CASES = (
    *cases(("SGD+momentum", "AdamW", "NAdam"), MODELS, ("float32",)),
    *cases(("AdamW",), MODELS, ("bfloat16",)),
    *cases(("Lion", "LAMB"), MODELS, ("float32",)),
    *cases(("AdamW",), ("mlp1000",), ("float32",)),
)
"""One of each kind: fused in torch, not fused in torch, in 16 bits, not in torch, reductions, a thousand layers."""


class Release(NamedTuple):
    """What was measured of a version on a machine.

    Attributes:
        version: of surefoot.
        results: of our step, by what they were measured in: optimizer, shapes, dtype.
    """

    version: str
    results: Mapping[tuple[str, str, str], Result]

    @property
    def machine(self) -> str:
        """Where it was measured."""
        one = next(iter(self.results.values()))
        return f"{one.machine}, {one.threads} thread{'s' if one.threads > 1 else ''}"

    @property
    def order(self) -> tuple[int, ...]:
        """The numbers in the version, by which releases are sorted."""
        return tuple(map(int, re.findall(r"\d+", self.version)))


def run(selected: Sequence[Case], seconds: float) -> Iterator[Result]:
    """Measure one case after the other."""
    for case in selected:
        check_memory(case)
    for case in selected:
        measured = measure(case, seconds=seconds)
        print(
            f"{case!s:36} {measured.milliseconds().median:8.3f} ms, speed-up {measured.speedup().median:5.2f}, "
            f"over the memory bound {measured.over_memory_bound().median:5.2f}",
            flush=True,
        )
        yield from results(measured)


def file_name(version: str) -> str:
    """Return what the results of a version on this machine are called."""
    machine, _, _, threads = circumstances()
    return f"{version}_{re.sub(r'[^0-9a-z]+', '-', machine.lower()).strip('-')}_{threads}.csv"


def read(folder: Path) -> dict[str, list[Release]]:
    """Return all releases by the machine that they were measured on, the oldest first."""
    found: dict[str, list[Release]] = {}
    for path in sorted(folder.glob("*.csv")):
        ours = [line for line in read_csv(path) if line.contender == OURS]
        version = path.stem.partition("_")[0]
        release = Release(version, {(line.variant, line.shapes, line.dtype): line for line in ours})
        found.setdefault(release.machine, []).append(release)
    return {machine: sorted(releases, key=lambda each: each.order) for machine, releases in sorted(found.items())}


# Picture

COLOURS = ("#1c4f9c", "#e07b00", "#2a9d5c", "#8e44ad", "#b00020", "#6b6b6b")
MARKERS = {"tiny": "o", "medium": "s", "large": "D", "mlp1000": "^"}
MEASURES = (
    ("speedup", "speed-up: time of torch's best / ours", (0.5, 1, 2, 5, 10, 20, 50)),
    ("over_memory_bound", "our time / that of the memory bound", (0.8, 1, 1.2, 1.5, 2)),
)


def draw(found: Mapping[str, Sequence[Release]]) -> Figure:
    """Draw for each machine, in a row of its own, both ratios of each case from release to release."""
    figure = Figure(figsize=(12, 0.6 + 4.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(MEASURES), squeeze=False)
    for row, (machine, releases) in zip(axes, found.items(), strict=True):
        for panel, (column, title, ticks) in zip(row, MEASURES, strict=True):
            panel.set_yscale("log")
            panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
            _draw_cases(panel, releases, column)
            panel.set_title(machine, fontsize=10)
            panel.set_ylabel(title)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _draw_cases(axes: Axes, releases: Sequence[Release], column: str) -> None:
    """Draw a line for each case, with the middle half of its rounds; cases stand side by side within a release."""
    keys = list(dict.fromkeys(key for release in releases for key in release.results))
    algorithms = list(dict.fromkeys((variant, dtype) for variant, _, dtype in keys))
    for number, key in enumerate(keys):
        variant, shapes, dtype = key
        places = [place + 0.6 * (number / len(keys) - 0.5) for place in range(len(releases))]
        lines = [release.results.get(key) for release in releases]
        values = [math.nan if line is None else getattr(line, column) for line in lines]
        if all(map(math.isnan, values)):
            continue
        ends = [[math.nan if line is None else getattr(line, f"{column}_{q}") for line in lines] for q in ("q1", "q3")]
        colour = COLOURS[algorithms.index((variant, dtype)) % len(COLOURS)]
        axes.vlines(places, *ends, color=colour, linewidth=1.2)
        label = f"{variant}{', bfloat16' if dtype == 'bfloat16' else ''}, {SHAPE_LISTS[shapes].title}"
        axes.plot(places, values, marker=MARKERS.get(shapes, "x"), color=colour, linewidth=0.8, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(releases)), [release.version for release in releases])
    axes.set_xlim(-0.5, len(releases) - 0.5)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure and write, unless only the picture is asked for; then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing, read the csv files")
    parser.add_argument("--version", default=surefoot.__version__, help="of what is measured")
    parser.add_argument("--minutes", type=float, default=4.0, help="time for all cases")
    parser.add_argument("--threads", type=int, help="torch's threads; one serves best on a machine that others use")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        found = list(run(CASES, 60 * options.minutes / len(CASES)))
        write_csv(options.out / file_name(options.version), found)
    draw(read(options.out)).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
