"""Drawing: curves as text for a terminal, and as figures by matplotlib, which is imported when first needed."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from surefoot.files import write_whole

Array = NDArray[np.float64]


class Drawable(Protocol):
    """What is drawn: `surefoot.lr_scheduler.curves.Curve`, of which no more is needed."""

    def horizon(self) -> float:
        """Return the step at which the last thing happens."""

    def __call__(self, step: Any) -> Any:
        """Return the factors at some steps."""


DEFAULT_STEPS = 1000
_MOST_STEPS = 100_000
_LONGEST = 2**52
COLORS = ("#1f5fa8", "#d1602b", "#2e8b57", "#8a4fa3", "#b8860b", "#4d4d4d")
_FIRST_BRAILLE = 0x2800
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def default_steps(curves: Sequence[Drawable]) -> int:
    """Return how many steps to draw: to the last horizon and a little on, or 1000 where nothing ends."""
    last = max(curve.horizon() for curve in curves)
    if not last < _LONGEST:
        raise ValueError(f"it lasts {last:.3g} steps; say how many to draw, at most {_LONGEST}, by `steps`")
    return math.ceil(last * 1.05) if last else DEFAULT_STEPS


def load_pyplot() -> Any:
    """Import matplotlib.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415 (optional, and slow to import)
    except ImportError as error:
        raise ImportError("to draw figures surefoot needs matplotlib: pip install 'surefoot[plot]'") from error
    return plt


def style(axes: Any, xlabel: str, ylabel: str) -> None:
    """Set the style of axes that all of surefoot's figures share."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: str | Path | None) -> Any:
    """Write a figure to a file, if there is one, and return it."""
    if path is not None:
        target, picture = Path(path), io.BytesIO()
        if not target.suffix:  # as matplotlib has it
            target = target.with_name(f"{target.name.rstrip('.')}.{figure.canvas.get_default_filetype()}")
        figure.savefig(picture, format=target.suffix[1:], dpi=150)
        write_whole(target, picture.getvalue())
    return figure


def figure(
    curves: Mapping[str, Drawable],
    steps: int | None = None,
    path: str | Path | None = None,
    *,
    scale: float = 1.0,
    ylabel: str = "factor",
) -> Any:
    """Draw curves with matplotlib.

    Args:
        curves: the curves by their labels; without labels where there is only one.
        steps: how many; see `default_steps`.
        path: a file to write.
        scale: what the factors are multiplied with, such as a learning rate.
        ylabel: what is drawn.

    Returns:
        The figure, closed for pyplot, so that many can be drawn; notebooks show it all the same.
    """
    pyplot = load_pyplot()
    at = _all_steps(steps or default_steps(list(curves.values())))
    result, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for index, (label, curve) in enumerate(curves.items()):
        axes.plot(at, scale * curve(at), color=COLORS[index % len(COLORS)], linewidth=1.8, label=label)
    if len(curves) > 1:
        result.legend(loc="outside lower center", frameon=False, fontsize=8)
    style(axes, "step", ylabel)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    pyplot.close(result)
    return save_figure(result, path)


def braille(values: Array, low: float, high: float, width: int, height: int) -> list[str]:
    """Draw values as a line of braille dots, two by four to a character.

    Args:
        values: `2 * width` of them, from left to right.
        low: the value of the lowest dots.
        high: the value of the highest.
        width: in characters.
        height: in lines.

    Returns:
        The lines, from top to bottom; a character without dots is a space.
    """
    rows = 4 * height
    span = high / 2 - low / 2 or 1.0  # halves, since the whole may be too large a number
    levels = np.clip(((high / 2 - values / 2) / span * (rows - 1)).round().astype(int), 0, rows - 1)
    cells = np.zeros((height, width), dtype=int)
    before = np.concatenate([levels[:1], levels[:-1]])
    for column, (a, b) in enumerate(zip(before.tolist(), levels.tolist(), strict=True)):
        # The dots between two neighbours join the line where it is steep.
        for row in {b, *range(min(a, b) + 1, max(a, b))}:
            cells[row // 4, column // 2] |= _DOTS[row % 4, column % 2]
    return ["".join(chr(_FIRST_BRAILLE + cell) if cell else " " for cell in line) for line in cells.tolist()]


def layers(
    curves: Sequence[Drawable], steps: int, scale: float, width: int, height: int
) -> tuple[list[list[str]], float, float]:
    """Draw each curve as text on the same axes.

    Returns:
        The lines of each curve, and the values of the lowest and the highest line.

    Raises:
        ValueError: a value is not finite.
    """
    at = np.linspace(0, float(steps - 1), 2 * width)
    # The axis is that of all steps: a peak may lie between two columns.
    every = _all_steps(steps)
    with np.errstate(over="ignore", invalid="ignore"):
        seen = [scale * curve(every) for curve in curves]
    for values in seen:
        if not np.isfinite(values).all():
            first = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"at step {every[first]:.0f} it is {values[first]}; give smaller numbers")
    low, high = min(0.0, *(float(values.min()) for values in seen)), max(float(values.max()) for values in seen)
    return [braille(scale * curve(at), low, high, width, height) for curve in curves], low, high


def _all_steps(steps: int) -> Array:
    """Return all steps, or as many as a drawing can tell apart, from the first to the last."""
    return np.linspace(0, float(steps - 1), min(steps, _MOST_STEPS))
