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
_LONGEST = 1 << 28
"""Bytes of a line, of which millions of parameters take fewer; what is no file of lines at all is not read whole."""


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
        ValueError: it is no such file, was written by a later version, or a line before the last is broken: not JSON,
            a number that is none or too large, lists of another length than the header's names.  It says which line.
    """
    names: tuple[str, ...] | None = None
    broken: str | None = None
    for number, text in _lines(Path(path), watch):
        if broken is not None:
            raise ValueError(broken)
        try:
            content = _object(text)
            names = _names(content, f"{path}: line {number}") if "names" in content else names
            line = None if "names" in content else _line(content, names)
        except _BrokenLineError as error:
            if names is None:
                raise ValueError(f"{_NOT_OURS.format(path=path)} (line {number}: {error})") from None
            broken = f"{path}: line {number} is broken ({error}); remove it to read the rest"
            continue
        if line is not None:
            yield line
    if names is None:
        raise ValueError(_NOT_OURS.format(path=path))


def _lines(path: Path, watch: Callable[[int, int], object]) -> Iterator[tuple[int, bytes]]:
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            done += len(text)
            if number % _WATCHED == 0:
                watch(done, size)
            yield number, text


_NOT_OURS = "{path} is not a telemetry file: it must begin with a header that holds `names`, as JsonLines writes it"
_NOT_FINITE = ("inf", "-inf", "nan")
_LARGEST = 2**63 - 1


class _BrokenLineError(Exception):
    """A line is not what `JsonLines` writes; the text says why."""


def _object(text: bytes) -> dict[str, Any]:
    if len(text) == _LONGEST:
        raise _BrokenLineError(f"it is longer than {_LONGEST:,} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BrokenLineError(f"{type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise _BrokenLineError(f"{_short(content)} is not an object")
    return content


def _short(value: Any) -> str:
    """Return a value as a message shows it, which may be long or deep."""
    try:
        return ascii(value)[:60]
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return type(value).__name__


def _field(content: dict[str, Any], name: str) -> Any:
    if name not in content:
        raise _BrokenLineError(f"it has no `{name}`")
    return content[name]


def _names(header: dict[str, Any], place: str) -> tuple[str, ...]:
    version, names = _whole(header, "format"), header["names"]
    if version > FORMAT:
        raise ValueError(
            f"{place} was written by surefoot {header.get('surefoot', 'of a later version')}, in a newer format "
            f"({version}) than this version reads ({FORMAT}); update surefoot"
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _BrokenLineError(f"`names` must be a list of strings, but is {_short(names)}")
    if len(set(names)) < len(names):
        raise _BrokenLineError("`names` holds a name twice")
    return tuple(names)


def _line(content: dict[str, Any], names: tuple[str, ...] | None) -> Line:
    if names is None:
        raise _BrokenLineError("no header stands before it")
    grad, param, update, most = (_array(name, _field(content, name), len(names)) for name in _LISTS)
    lr = _field(content, "lr")
    lrs = _array("lr", lr if isinstance(lr, list) else [lr] * len(names), len(names))
    clip, seconds = (float(_array(name, [_field(content, name)], 1)[0]) for name in ("clip", "seconds"))
    counts, step = _counts(_field(content, "nonfinite"), len(names)), _whole(content, "step", least=1)
    return Line(step, names, grad, param, update, most, counts, lrs, clip, _whole(content, "skipped"), seconds)


def _whole(content: dict[str, Any], name: str, least: int = 0) -> int:
    value = _field(content, name)
    if type(value) is not int or not least <= value <= _LARGEST:
        raise _BrokenLineError(f"`{name}` must be a whole number from {least} on, but is {_short(value)}")
    return value


def _counts(given: Any, count: int) -> np.ndarray:
    """Return how many elements are not finite, of each parameter; those that have none are left out in a file."""
    counts = np.zeros(count)
    if not isinstance(given, dict):
        raise _BrokenLineError(f"`nonfinite` must be an object, but is {_short(given)}")
    for index in given:
        if not (index.isascii() and index.isdigit() and len(index) <= len(str(count)) and int(index) < count):
            raise _BrokenLineError(f"`nonfinite` has {_short(index)}, which is not a number of a parameter")
        counts[int(index)] = _whole(given, index)
    return counts


def _array(name: str, values: Any, count: int) -> np.ndarray:
    """Make numbers of a list; strings stand for inf and NaN."""
    if not isinstance(values, list):
        raise _BrokenLineError(f"`{name}` must be a list, but is {_short(values)}")
    if len(values) != count:
        raise _BrokenLineError(f"`{name}` has {len(values)} numbers for {count} parameters")
    for value in () if {float, int}.issuperset(map(type, values)) else values:
        if type(value) not in (float, int) and not (isinstance(value, str) and value in _NOT_FINITE):
            raise _BrokenLineError(f"`{name}` has {_short(value)}, which is not a number")
    try:
        return np.array(values, dtype=np.float64)
    except (OverflowError, ValueError):  # a whole number of hundreds of digits
        raise _BrokenLineError(f"`{name}` has a number that is too large") from None
