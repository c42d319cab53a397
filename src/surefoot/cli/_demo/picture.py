"""The picture of a comparison: both loss curves, and the time of both optimizers' steps.

matplotlib is an extra; only this module imports it.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from surefoot.cli._demo.output import temporary_beside
from surefoot.cli._demo.training import Comparison, Outcome

COLOURS = ("#f08c00", "#1c4f9c")
DOTS_PER_INCH = 150
SMOOTHED_PARTS = 50

Numbers = NDArray[np.float64]


def _smooth(losses: Numbers, window: int) -> tuple[Numbers, Numbers]:
    """Average over a sliding window; gives the last step of each window, and the means."""
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return np.arange(window, len(losses) + 1, dtype=np.float64), means


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    """Draw torch's curve broad and pale, ours thin and dashed upon it: both show where they coincide."""
    one, other = comparison.outcomes
    steps = comparison.setup.steps
    window = max(1, steps // SMOOTHED_PARTS)
    pale, sharp = (_smooth(np.array(outcome.losses, dtype=np.float64), window) for outcome in comparison.outcomes)
    axes.plot(*pale, color=COLOURS[0], linewidth=8, alpha=0.45, label=one.label)
    axes.plot(*sharp, color=COLOURS[1], linewidth=1.8, linestyle=(0, (4, 2)), label=other.label)
    axes.plot(steps, one.held_out_loss, "o", color=COLOURS[0], markersize=15, alpha=0.45)
    axes.plot(
        steps,
        other.held_out_loss,
        "x",
        color=COLOURS[1],
        markeredgewidth=2,
        label="held-out text, both in the end",
    )
    averaged = f"mean of {window} steps" if window > 1 else "one batch"
    axes.set(title="Loss", xlabel="training step", ylabel=f"loss [nats per character], {averaged}")
    axes.legend(frameon=False)


def _time_label(outcome: Outcome) -> str:
    return f"{np.median(outcome.clock.optimizer_ms):.2f} ms\n{outcome.clock.share:.0%} of a training step"


def _draw_times(axes: Axes, comparison: Comparison) -> None:
    """Draw a bar for each library: the median of its step times, with the range of the middle half of them.

    Quartiles, and an axis that follows the medians, keep the bars in sight when another program disturbed some steps.
    """
    clocks = [outcome.clock for outcome in comparison.outcomes]
    quartiles = np.array([np.percentile(clock.optimizer_ms, (25, 50, 75)) for clock in clocks])
    end = 1.8 * quartiles[:, 1].max()
    for place, (low, middle, high) in enumerate(quartiles):
        axes.barh(place, middle, height=0.55, color=COLOURS[place], alpha=0.8)
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", capsize=4)
        # Below the whisker, which may cross the whole width.
        label = _time_label(comparison.outcomes[place])
        axes.annotate(label, (middle, place), xytext=(8, -8), textcoords="offset points", va="top")
    setup = comparison.setup
    axes.set_yticks((0, 1), setup.labels if setup.reference else setup.libraries)
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    of = "" if setup.reference else f" of {' and '.join(clocks[0].optimizers)}"
    axes.set(title=f"Time in step(){of}", xlabel="time per step [ms]: median, and the middle half of the steps")


def _headline(comparison: Comparison) -> str:
    one, other = comparison.outcomes
    faster = np.median(one.clock.optimizer_ms) / np.median(other.clock.optimizer_ms)
    if comparison.last_gap.same_bits:
        result = f"same bits after {comparison.setup.steps} steps"
    else:
        result = f"held-out loss {other.held_out_loss:.3f} against {one.held_out_loss:.3f}"
    return f"{other.label} against {one.label}: {result}, step {faster:.2f}x as fast"


def draw(comparison: Comparison) -> Figure:
    """Draw the picture of a comparison."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    losses, times = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_losses(losses, comparison)
    _draw_times(times, comparison)
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25, axis="both" if axes is losses else "x")
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
