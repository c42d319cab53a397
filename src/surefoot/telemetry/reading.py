"""Reading what `JsonLines` has written, a line at a time: a file may be larger than memory."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surefoot.telemetry.record import ratio
from surefoot.telemetry.sinks import FORMAT

_LISTS = ("grad", "param", "update", "max")
_WATCHED = 100


@dataclass(frozen=True, eq=False)
class Line:
    """One step as it stands in a file.

    Attributes:
        step: its number, from 1.
        names: the parameters, n of them.
        grad: norms of the gradients before clipping: float64 of shape (n,), as the next four.
        param: norms of the parameters after the step.
        update: norms of the updates.
        max_grad: largest |gradient|.
        nonfinite: how many elements of the gradient are inf or NaN.
        lrs: the learning rates.
        clip: what clipping multiplied the gradients with.
        skipped: how many steps had been skipped so far.
        seconds: how long the step took.
    """

    step: int
    names: tuple[str, ...]
    grad: np.ndarray
    param: np.ndarray
    update: np.ndarray
    max_grad: np.ndarray
    nonfinite: np.ndarray
    lrs: np.ndarray
    clip: float
    skipped: int
    seconds: float

    @property
    def update_ratio(self) -> np.ndarray:
        """Update norms over parameter norms: float64 of shape (n,)."""
        return ratio(self.update, self.param)


def read(path: str | os.PathLike[str], watch: Callable[[int, int], object] = lambda *_: None) -> Iterator[Line]:
    """Yield the steps of a file that `JsonLines` has written.

    An unfinished last line, which a killed run leaves, is passed over.

    Args:
        path: the file.
        watch: called with the bytes read so far and the file's size, now and then.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, was written by a later version, or a line before the last is broken.
    """
    names: tuple[str, ...] | None = None
    broken: str | None = None
    size, done = Path(path).stat().st_size, 0
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            if broken is not None:
                raise ValueError(broken)
            done += len(text)
            if number % _WATCHED == 0:
                watch(done, size)
            try:
                content = json.loads(text)
                names = _names(content, path) if "names" in content else names
                line = None if "names" in content else _line(content, names)
            except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
                if names is None:
                    raise ValueError(_NOT_OURS.format(path=path)) from None
                broken = (
                    f"{path}: line {number} is broken ({type(error).__name__}: {error}); remove it to read the rest"
                )
                continue
            if line is not None:
                yield line
    if names is None:
        raise ValueError(_NOT_OURS.format(path=path))


_NOT_OURS = "{path} is not a telemetry file: it must begin with a header that holds `names`, as JsonLines writes it"


def _names(header: dict[str, Any], path: Any) -> tuple[str, ...]:
    if header["format"] > FORMAT:
        raise ValueError(
            f"{path} was written by surefoot {header['surefoot']}, in a newer format ({header['format']}) than this "
            f"version reads ({FORMAT}); update surefoot"
        )
    return tuple(header["names"])


def _line(content: dict[str, Any], names: tuple[str, ...] | None) -> Line:
    if names is None:
        raise KeyError("names")
    grad, param, update, most = (_array(content[name], len(names)) for name in _LISTS)
    counts = np.zeros(len(names))
    for index, count in content["nonfinite"].items():
        counts[int(index)] = count
    lr = content["lr"]
    lrs = _array(lr if isinstance(lr, list) else [lr] * len(names), len(names))
    single = (float(content["clip"]), int(content["skipped"]), float(content["seconds"]))
    return Line(int(content["step"]), names, grad, param, update, most, counts, lrs, *single)


def _array(values: list[Any], count: int) -> np.ndarray:
    """Make numbers of a list; strings stand for inf and NaN."""
    if len(values) != count:
        raise TypeError(f"{len(values)} numbers for {count} parameters")
    return np.array(values, dtype=np.float64)
