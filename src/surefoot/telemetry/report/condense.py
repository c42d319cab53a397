"""Condensing a run while it is read: curves of totals, and the heat map of parameters and steps.

What is kept in memory grows with the number of steps only by a few numbers a step, what goes into the page not at all.
"""

import base64
import sys
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from surefoot.telemetry.reading import Line
from surefoot.telemetry.record import ratio

POINTS = 2000
"""How many points a curve has at most."""
ROWS = 600
"""How many rows the heat map has at most."""
CELLS = 216_000
"""How many cells it has at most: the fewer parameters, the more columns, up to `POINTS`, for those who look closely."""
QUANTITIES = ("grad", "update_ratio", "update", "param", "max_grad")
"""What the heat map shows, as attributes of `Line`."""
_OF_GRADIENT = [QUANTITIES.index("grad"), QUANTITIES.index("max_grad")]
ABSENT, NONFINITE, ZERO, LEAST_CODE, MOST_CODE = 0, 1, 2, 3, 65535
"""Codes of a cell; from `LEAST_CODE` to `MOST_CODE` they stand for powers of two, evenly from the least to the most."""


class Curves:
    """One number a step of each quantity that concerns the step as a whole."""

    NAMES = ("grad", "update_ratio", "lr_low", "lr_high", "clip", "skipped", "seconds")

    def __init__(self) -> None:
        self.steps = array("q")
        self._values = {name: array("d") for name in self.NAMES}

    def add(self, line: Line) -> None:
        """Take a step; whatever stands there from an earlier try of it and later ones goes."""
        while self.steps and self.steps[-1] >= line.step:
            self.steps.pop()
            for values in self._values.values():
                values.pop()
        self.steps.append(line.step)
        for values, value in zip(self._values.values(), _of_step(line), strict=True):
            values.append(value)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a quantity's values: float64, one a step."""
        return np.array(self._values[name])

    def bounds(self) -> np.ndarray:
        """Return the positions at which the points of a curve begin, and the end."""
        count = len(self.steps)
        return np.unique(np.linspace(0, count, min(count, POINTS) + 1).astype(np.int64))

    def points(self, name: str) -> dict[str, Any]:
        """Return least, greatest and mean finite value of each point, None where there is none, and the broken ones."""
        values, bounds = self[name], self.bounds()
        parts = [values[start:end] for start, end in pairwise(bounds)]
        finite = [part[np.isfinite(part)] for part in parts]
        many = len(parts) < len(values)
        made: dict[str, Any] = {"mid": [_number((part / len(part)).sum()) if len(part) else None for part in finite]}
        if many:
            made["low"] = [_number(part.min()) if len(part) else None for part in finite]
            made["high"] = [_number(part.max()) if len(part) else None for part in finite]
        pairs = zip(parts, finite, strict=True)
        made["broken"] = [index for index, (part, good) in enumerate(pairs) if len(good) < len(part)]
        return made


def _of_step(line: Line) -> tuple[float, ...]:
    with np.errstate(over="ignore", invalid="ignore"):
        grad, param, update = (np.sqrt(np.square(norms).sum()) for norms in (line.grad, line.param, line.update))
    lrs = line.lrs if len(line.lrs) else np.array([np.nan])
    lows = (float(grad), float(ratio(update, param)), float(lrs.min()), float(lrs.max()))
    return (*lows, line.clip, float(line.skipped), line.seconds)


def _number(value: Any) -> float:
    """Return a number in five digits; where their rounding, or a mean's, is infinite, the largest number there is."""
    return min(max(float(f"{value:.5g}"), -sys.float_info.max), sys.float_info.max)


class Heat:
    """For each parameter and each stretch of steps the greatest value of each quantity.

    Stretches begin as single steps; whenever there are too many, two at a time become one.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.starts: list[int] = []
        self.last = 0
        self._stretch, self._filled = 1, 0
        self._cells: list[np.ndarray] = []

    def add(self, line: Line) -> None:
        """Take a step."""
        self._forget_from(line.step)
        rows = self._rows(line.names)
        while self._is_too_wide():
            self._halve()
        if not self.starts or self._filled == self._stretch:
            self._begin(line.step)
        self._filled, self.last = self._filled + 1, line.step
        values = np.stack([getattr(line, quantity) for quantity in QUANTITIES])
        broken = ~np.isfinite(values)
        broken[_OF_GRADIENT] |= line.nonfinite > 0
        cells = self._cells[-1]
        if cells.shape[1] < len(self.names):
            cells = self._cells[-1] = _grown(cells, len(self.names))
        cells[:, rows] = _merged(cells[:, rows], np.where(broken, np.inf, values))

    def _rows(self, names: Sequence[str]) -> Any:
        if len(names) == len(self.names) and names == self._known:
            return slice(None)
        rows = [self.names.setdefault(name, len(self.names)) for name in names]
        self._known = tuple(self.names)
        return rows

    _known: tuple[str, ...] = ()

    def _is_too_wide(self) -> bool:
        """Whether there are more columns than may be, the one that is about to begin included."""
        most = min(POINTS, CELLS // min(max(len(self.names), 1), ROWS)) // 2 * 2
        return len(self.starts) + (self._filled == self._stretch) > most

    def _begin(self, step: int) -> None:
        self.starts.append(step)
        self._cells.append(np.full((len(QUANTITIES), len(self.names)), np.nan))
        self._filled = 0

    def _halve(self) -> None:
        count = len(self.names)
        cells = [_grown(each, count) for each in self._cells]
        pairs = zip(cells[::2], cells[1::2], strict=False)
        self._cells = [_merged(*pair) for pair in pairs] + cells[len(cells) // 2 * 2 :]
        self._filled += self._stretch if len(cells) % 2 == 0 else 0
        self.starts = self.starts[::2]
        self._stretch *= 2

    def _forget_from(self, step: int) -> None:
        while self.starts and self.starts[-1] >= step:
            self.starts.pop()
            self._cells.pop()
            self._filled = self._stretch

    def rows(self) -> list[str]:
        """Return the name of each row; neighbours share one if there are too many."""
        names = list(self.names)
        size = -(-len(names) // ROWS) if names else 1
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return [part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]

    def coded(self, quantity: str) -> dict[str, Any]:
        """Return a quantity's cells, row by row, as base64 of little-endian 16-bit codes, and the range in octaves."""
        index, count = QUANTITIES.index(quantity), len(self.names)
        cells = np.stack([_grown(each, count)[index] for each in self._cells], axis=1)
        size = -(-count // ROWS) if count else 1
        rows = [np.fmax.reduce(cells[start : start + size]) for start in range(0, count, size)]
        codes, low, high = _coded(np.array(rows).reshape(len(rows), len(self._cells)))
        return {"codes": base64.b64encode(codes.astype("<u2").tobytes()).decode("ascii"), "low": low, "high": high}


def _merged(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Take the greater of two values; NaN stands for none, inf for one that was not finite."""
    merged: np.ndarray = np.fmax(one, other)
    return merged


def _grown(cells: np.ndarray, count: int) -> np.ndarray:
    return np.pad(cells, ((0, 0), (0, count - cells.shape[1])), constant_values=np.nan)


def _coded(cells: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return codes, and the powers of two for which the least and the most stand."""
    ordinary = np.isfinite(cells) & (cells > 0)
    octaves = np.log2(cells, out=np.zeros_like(cells), where=ordinary)
    low, high = (float(limit(octaves[ordinary])) if ordinary.any() else 0.0 for limit in (np.min, np.max))
    high = max(high, low + 1)
    codes = LEAST_CODE + np.round((octaves - low) / (high - low) * (MOST_CODE - LEAST_CODE))
    codes[cells == 0] = ZERO
    codes[np.isinf(cells)] = NONFINITE
    codes[np.isnan(cells)] = ABSENT
    return codes, low, high
