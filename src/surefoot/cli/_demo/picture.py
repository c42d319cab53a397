"""The picture of a comparison: loss curves, distances between the models, and times of the optimizers' steps.

matplotlib is an extra; only this module imports it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from surefoot.cli._demo.output import temporary_beside
from surefoot.cli._demo.training import Comparison, Outcome

BROAD = {"linewidth": 9, "alpha": 0.35}
MIDDLE = {"linewidth": 4, "alpha": 0.6}
DASHED = {"linewidth": 1.8, "linestyle": (0, (4, 2))}
DOTS_PER_INCH = 150
SMOOTHED_PARTS = 50

Numbers = NDArray[np.float64]


class Style(NamedTuple):
    """How a contender is drawn: its colour, its curves, and the point at their end."""

    colour: str
    line: Mapping[str, Any]
    point: Mapping[str, Any]


def _style(colour: str, curve: Mapping[str, Any], **point: Any) -> Style:
    return Style(colour, {"color": colour, **curve}, point)


FIRST = _style("#f08c00", BROAD, marker="o", markersize=15, alpha=0.35)
SECOND = _style("#2a9d5c", MIDDLE, marker="o", markersize=8, alpha=0.6)
OURS = _style("#1c4f9c", DASHED, marker="x", markersize=8, markeredgewidth=2)


def _styles(comparison: Comparison) -> tuple[Style, ...]:
    return (FIRST, SECOND, OURS) if len(comparison.outcomes) > 2 else (FIRST, OURS)  # noqa: PLR2004


def _smooth(losses: Numbers, window: int) -> tuple[Numbers, Numbers]:
    """Average over a sliding window; gives the last step of each window, and the means."""
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return np.arange(window, len(losses) + 1, dtype=np.float64), means


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    """Draw torch's curves broad and pale, ours thin and dashed upon them: all show where they coincide."""
    steps = comparison.setup.steps
    window = max(1, steps // SMOOTHED_PARTS)
    for outcome, style in zip(comparison.outcomes, _styles(comparison), strict=True):
        axes.plot(*_smooth(np.array(outcome.losses, dtype=np.float64), window), **style.line, label=outcome.label)
        axes.plot(steps, outcome.held_out_loss, color=style.colour, **style.point)
    averaged = f"mean of {window} steps" if window > 1 else "one batch"
    axes.set(title="Loss", xlabel="training step; at the end: held-out text", ylabel=f"nats per character, {averaged}")
    axes.legend(frameon=False)


def _draw_gaps(axes: Axes, comparison: Comparison) -> None:
    """Draw how far the models are from that of torch's default; one that has the same bits has no curve."""
    for outcome, style in list(zip(comparison.outcomes, _styles(comparison), strict=True))[1:]:
        apart = {step: gap.largest for step, gap in outcome.gaps.items() if gap.largest > 0}
        end = outcome.gaps[comparison.setup.steps]
        label = f"{outcome.label}{', same bits' if end.same_bits else ''}"
        axes.plot(list(apart), list(apart.values()), **style.line, label=label)
    axes.set(title=f"Distance from {comparison.outcomes[0].label}", xlabel="training step", yscale="log")
    axes.set_ylabel("largest difference of a parameter")
    axes.legend(frameon=False, loc="lower right")


def _time_label(outcome: Outcome) -> str:
    return f"{np.median(outcome.clock.optimizer_ms):.2f} ms\n{outcome.clock.share:.0%} of a training step"


def _draw_times(axes: Axes, comparison: Comparison) -> None:
    """Draw a bar for each contender: the median of its step times, with the range of the middle half of them.

    Quartiles, and an axis that follows the medians, keep the bars in sight when another program disturbed some steps.
    """
    clocks = [outcome.clock for outcome in comparison.outcomes]
    quartiles = np.array([np.percentile(clock.optimizer_ms, (25, 50, 75)) for clock in clocks])
    end = 1.8 * quartiles[:, 1].max()
    for place, ((low, middle, high), style) in enumerate(zip(quartiles, _styles(comparison), strict=True)):
        axes.barh(place, middle, height=0.55, color=style.colour, alpha=0.8)
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", capsize=4)
        # Below the whisker, which may cross the whole width.
        label = _time_label(comparison.outcomes[place])
        axes.annotate(label, (middle, place), xytext=(8, -8), textcoords="offset points", va="top")
    setup = comparison.setup
    titles = setup.labels if setup.reference else [contender.label() for contender in setup.contenders]
    axes.set_yticks(range(len(titles)), [title.replace(", ", "\n") for title in titles])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    of = "" if setup.reference else f" of {' and '.join(clocks[0].optimizers)}"
    axes.set(title=f"Time in step(){of}", xlabel="ms: median, and the middle half of the steps")


def _headline(comparison: Comparison) -> str:
    first, *_, ours = comparison.outcomes
    if all(gap.same_bits for gap in comparison.gaps(comparison.setup.steps)):
        losses = f"same bits after {comparison.setup.steps} steps"
    else:
        losses = f"held-out losses {', '.join(f'{outcome.held_out_loss:.3f}' for outcome in comparison.outcomes)}"
    times = ", ".join(f"{np.median(outcome.clock.optimizer_ms):.2f}" for outcome in comparison.outcomes)
    return f"{ours.label} beside {first.label}: {losses}; step {times} ms"


def draw(comparison: Comparison) -> Figure:
    """Draw the picture of a comparison; without distances where the models are of different algorithms."""
    panels = [_draw_losses, *([_draw_gaps] if comparison.setup.reference is None else []), _draw_times]
    figure = Figure(figsize=(1 + 5 * len(panels), 4.8), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        panel(axes, comparison)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25, axis="x" if panel is _draw_times else "both")
    figure.suptitle(_headline(comparison), fontweight="bold")
    return figure


def save_picture(comparison: Comparison, path: Path) -> None:
    """Draw the picture and put it at `path` in one move, when it is complete.

    Args:
        comparison: what to draw.
        path: a name that ends in .png, .svg or .pdf.

    Raises:
        OSError: if it could not be written; nothing is left behind then.
    """
    with temporary_beside(path) as temporary:
        draw(comparison).savefig(temporary, dpi=DOTS_PER_INCH)
        temporary.replace(path)
