"""Where records go: the base class of sinks, JSON Lines and TensorBoard.

A sink gets records in batches, after `flush_every` of them, so that a device is waited for once a batch.
"""

import json
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, final

import numpy as np

from surefoot.telemetry.record import Record

FORMAT = 1
_DIGITS = ".6g"
_TOTALS = ("grad_norm", "param_norm", "update_norm", "update_ratio", "max_grad", "nonfinite")


class Sink(ABC):
    """Somewhere to write records to.

    Args:
        flush_every: how many records to wait for before `write` is called with them.
        every_rank: whether every process of a distributed training writes.  By default the first does, since all
            would write the same to the same place; with True give each a place of its own.

    Raises:
        TypeError: `flush_every` is not a whole number.
        ValueError: it is less than 1.
    """

    def __init__(self, flush_every: int = 1, *, every_rank: bool = False) -> None:
        if isinstance(flush_every, bool) or not isinstance(flush_every, int):
            raise TypeError(f"`flush_every` must be a whole number, but is {flush_every!r}")
        if flush_every < 1:
            raise ValueError(f"`flush_every` must be 1 or more, but is {flush_every}")
        self.flush_every = flush_every
        self.every_rank = every_rank
        self._owner: weakref.ref[Any] | None = None

    def claim(self, owner: object) -> None:
        """Note whom this sink serves.

        Raises:
            ValueError: it serves another already; their steps would be mixed up.
        """
        if self._owner is not None:
            raise ValueError(f"{self!r} serves another Telemetry already; make a sink for each")
        self._owner = weakref.ref(owner)

    def due(self, waiting: int) -> bool:
        """Whether it is time to write, with so many records waiting."""
        return waiting >= self.flush_every

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Write records, the oldest first; their numbers are on the host already."""

    def flush(self) -> None:  # noqa: B027 (most need none)
        """Bring what was written to where others see it."""

    def close(self) -> None:  # noqa: B027 (most need none)
        """Let go of what is open; nothing is written afterwards."""


@final
class JsonLines(Sink):
    """Writes a file of JSON Lines: a header with the version and the parameters' names, then a line for each step.

    Each line stands by itself, so that a run that was killed leaves a file that can be read up to its last whole line:
    by `surefoot.telemetry.read`, by `surefoot report`, or by any JSON reader.  Infinities and NaN are the strings
    "inf", "-inf" and "nan".  Numbers have six digits.  When the parameters change, another header follows.

    Args:
        path: the file, in a folder that exists.
        append: go on in a file that exists, after removing an unfinished last line, rather than overwrite it.
        flush_every: how many records to wait for; at most so many are lost when a run is killed.
        every_rank: see `Sink`.

    Raises:
        ValueError: `path` is a folder, or its folder does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        append: bool = False,
        flush_every: int = 16,
        every_rank: bool = False,
    ) -> None:
        super().__init__(flush_every, every_rank=every_rank)
        self.path = Path(path).absolute()
        if self.path.is_dir():
            raise ValueError(f"`path` must be a file, but {self.path} is a folder; name a file in it")
        if not self.path.parent.is_dir():
            raise ValueError(f"`path` must be in a folder that exists, but there is no {self.path.parent}; make it")
        self._append = append
        self._file: IO[bytes] | None = None
        self._names: tuple[str, ...] | None = None

    def write(self, records: Sequence[Record]) -> None:
        """Write a line for each record, in one piece."""
        file = self._open()
        lines: list[str] = []
        for record in records:
            if record.names != self._names:
                self._names = record.names
                lines.append(_header(record))
            lines.append(line_of(record))
        file.write("".join(lines).encode())
        file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            if self._append:
                _drop_unfinished_line(self.path)
            self._file = self.path.open("ab" if self._append else "wb")
        return self._file

    def __repr__(self) -> str:
        """Show the path."""
        return f"JsonLines({str(self.path)!r})"


def _header(record: Record) -> str:
    content = {"surefoot": version("surefoot"), "format": FORMAT, "time": record.time, "names": list(record.names)}
    try:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # a name with half of a pair of surrogates
        text = json.dumps(content, separators=(",", ":"))
    return text + "\n"


def line_of(record: Record) -> str:
    """Write a record as a line of JSON; text is put together here since that takes a fifth of json's time."""
    values = record.values
    counts = ",".join(f'"{index}":{int(count)}' for index, count in enumerate(values["nonfinite"].tolist()) if count)
    content = {
        "step": str(record.step),
        "time": f"{record.time:.3f}",
        "seconds": _number(record.seconds),
        "clip": _number(record.clip),
        "skipped": str(record.skipped),
        "lr": _number(record.raw.lrs[0]) if len(set(record.raw.lrs)) == 1 else _numbers(record.lrs),
        "grad": _numbers(values["grad_norm"]),
        "param": _numbers(values["param_norm"]),
        "update": _numbers(values["update_norm"]),
        "max": _numbers(values["max_grad"]),
        "nonfinite": f"{{{counts}}}",
    }
    return "{" + ",".join(f'"{name}":{text}' for name, text in content.items()) + "}\n"


def _numbers(values: np.ndarray) -> str:
    if np.isfinite(values).all():
        return "[" + ",".join([f"{value:{_DIGITS}}" for value in values.tolist()]) + "]"
    return "[" + ",".join(map(_number, values.tolist())) + "]"


def _number(value: float) -> str:
    """Round to a few digits; JSON has neither inf nor NaN."""
    return f"{value:{_DIGITS}}" if math.isfinite(value) else f'"{float(value)}"'


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what stands after the last line feed."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        position = content_end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            position = start
        file.truncate(0)


@final
class TensorBoard(Sink):
    """Writes scalars for TensorBoard: `total/grad_norm` and so on, and `grad_norm/<parameter>` for each parameter.

    Args:
        folder: the log folder; it is made if need be.
        per_parameter: whether to write each parameter's numbers beside the totals.
        flush_every: how many records to wait for.
        every_rank: see `Sink`.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        per_parameter: bool = True,
        flush_every: int = 16,
        every_rank: bool = False,
    ) -> None:
        super().__init__(flush_every, every_rank=every_rank)
        try:
            import torch.utils.tensorboard  # noqa: F401, PLC0415 (optional)
        except ImportError as error:
            raise ImportError(
                "TensorBoard(...) needs the package tensorboard; install it with `pip install surefoot[tensorboard]`"
            ) from error
        self.folder = Path(folder).absolute()
        self._per_parameter = per_parameter
        self._writer: Any = None

    def write(self, records: Sequence[Record]) -> None:
        """Write the scalars of each record."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (optional)

            self._writer = SummaryWriter(str(self.folder))
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 (optional)

        for record in records:  # one event for all scalars of a step: add_scalar takes seven times as long
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in self._scalars(record)]
            self._writer.file_writer.add_summary(Summary(value=scalars), record.step, record.time)

    def _scalars(self, record: Record) -> Iterable[tuple[str, float]]:
        for name in _TOTALS:
            yield f"total/{name}", getattr(record.total, name)
        yield from (("step/clip", record.clip), ("step/skipped", record.skipped), ("step/seconds", record.seconds))
        if len(set(record.raw.lrs)) == 1:
            yield "step/lr", record.raw.lrs[0]
        if not self._per_parameter:
            return
        for quantity, values in (record.values | {"lr": record.lrs}).items():
            for name, value in zip(record.names, values.tolist(), strict=True):
                yield f"{quantity}/{name}", value

    def flush(self) -> None:
        """Write the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def __repr__(self) -> str:
        """Show the folder."""
        return f"TensorBoard({str(self.folder)!r})"
