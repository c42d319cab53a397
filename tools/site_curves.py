"""Loss curves as SVG, drawn when the site is built from what `benchmarks/curves.py` has measured.

They stand in the page itself, so that their text has the colour of the page's, light or dark.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "curves.csv"
BESIDE = "AdamW"
WIDTH, LEFT, RIGHT, TOP, BOTTOM, LINE = 480, 32, 464, 8, 230, 19
LEAST, MOST = 1.3, 3.2
"""Losses at the edges of the picture, in nats; what lies above is cut off."""
TICKS = (1.5, 2.0, 2.5, 3.0)
CLIP = (
    f'<svg x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}" '
    f'viewBox="{LEFT} {TOP} {RIGHT - LEFT} {BOTTOM - TOP}">'
)
"""Clips what leaves the picture."""
CHOSEN = ("#00897b", "#c2185b")
REFERENCE, OTHER = "#e08a00", "#9e9e9e"

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """What a setting of an optimizer has learned.

    Attributes:
        title: what it is called, "AdamW, cautious" for instance.
        lr: its learning rate.
        seeds: a curve for each seed: steps and held-out losses.
    """

    title: str
    lr: float
    seeds: Sequence[Points]

    @property
    def algorithm(self) -> str:
        """The class that was trained."""
        return self.title.partition(",")[0]

    def mean(self) -> Points:
        """Return the mean over seeds."""
        return [
            (points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*self.seeds, strict=True)
        ]


@cache
def curves() -> Mapping[str, Curve]:
    """Return what was measured, by title."""
    found: dict[tuple[str, float], dict[str, list[tuple[int, float]]]] = {}
    with MEASURED.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            seeds = found.setdefault((line["optimizer"], float(line["lr"])), {})
            seeds.setdefault(line["seed"], []).append((int(line["step"]), float(line["loss"])))
    return {title: Curve(title, lr, list(seeds.values())) for (title, lr), seeds in found.items()}


def picture_of(name: str) -> str:
    """Return an optimizer's curves over AdamW's and, in grey, those of all others, as SVG; empty without any."""
    own = [curve for curve in curves().values() if curve.algorithm == name]
    if not own:
        return ""
    steps = own[0].seeds[0][-1][0]
    beside = [] if name == BESIDE else [curves()[BESIDE]]
    chosen = list(zip(CHOSEN, own, strict=False))
    titles = [(colour, _title(curve)) for colour, curve in [*chosen, *((REFERENCE, curve) for curve in beside)]]
    lines = [
        *_axes(steps),
        CLIP,
        *(_path(curve.mean(), steps, OTHER, 0.8, 0.45) for curve in curves().values()),
        *(_path(curve.mean(), steps, REFERENCE, 2.0) for curve in beside),
        *(_path(points, steps, colour, 1.4) for colour, curve in chosen for points in curve.seeds),
        "</svg>",
        *_legend([*titles, (OTHER, "all others, means of their seeds")]),
    ]
    label = escape(f"Held-out loss of {name} over {steps} steps, beside {BESIDE} and all others", quote=True)
    height = BOTTOM + LINE * (len(titles) + 4)
    style = f"width:100%;max-width:{1.3 * WIDTH:.0f}px;height:auto;font:13px sans-serif"
    head = f'<svg viewBox="0 0 {WIDTH} {height}" style="{style}" role="img" aria-label="{label}">'
    return "".join([head, *lines, "</svg>"])


def _title(curve: Curve) -> str:
    ends = [points[-1][1] for points in curve.seeds]
    return f"{curve.title}, lr {curve.lr:g}: {sum(ends) / len(ends):.3f}"


def _x(step: float, steps: int) -> float:
    return LEFT + (RIGHT - LEFT) * step / steps


def _y(loss: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (loss - LEAST) / (MOST - LEAST)


def _path(points: Points, steps: int, colour: str, width: float, opacity: float = 1.0) -> str:
    inside = " ".join(f"{_x(step, steps):.1f},{_y(loss):.1f}" for step, loss in points)
    return f'<polyline points="{inside}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


def _axes(steps: int) -> Iterator[str]:
    """Yield lines of equal loss, and the numbers along both sides."""
    for loss in TICKS:
        yield f'<path d="M{LEFT} {_y(loss):.1f}H{RIGHT}" stroke="currentColor" opacity="0.15"/>'
        yield _text(LEFT - 6, _y(loss) + 4, f"{loss:g}", "end")
    for step in range(0, steps + 1, 100):
        yield _text(_x(step, steps), BOTTOM + LINE, f"{step}", "middle")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 2 * LINE, "training step; held-out loss, nats of a character", "middle")


def _legend(titles: Sequence[tuple[str, str]]) -> Iterator[str]:
    for place, (colour, title) in enumerate(titles):
        y = BOTTOM + LINE * (3.5 + place)
        yield f'<path d="M{LEFT} {y - 4}h22" stroke="{colour}" stroke-width="2.5"/>'
        yield _text(LEFT + 30, y, escape(title))


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{text}</text>'
