"""A live view of the newest record in the terminal."""

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from surefoot.telemetry.record import ParameterStats, Record, add_row
from surefoot.telemetry.sinks import Sink
from surefoot.terminal import in_encoding

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live as RichLive

_BLOCKS = "▁▂▃▄▅▆▇█"
_KEPT = 60


@final
class Live(Sink):
    """Shows the newest record as a table that stays in place, with the course of the gradient norm above it.

    Where the output is no terminal only the last table is printed, when the view is closed.

    Args:
        seconds: how long to wait between two pictures.
        rows: how many parameters to show: those with the largest updates in proportion to their weights.
        console: a `rich.console.Console` to draw on; standard error by default.

    Raises:
        ValueError: `seconds` is negative or `rows` less than 1.
    """

    def __init__(self, *, seconds: float = 0.5, rows: int = 20, console: "Console | None" = None) -> None:
        super().__init__()
        if not seconds >= 0:
            raise ValueError(f"`seconds` must be 0 or more, but is {seconds}")
        if rows < 1:
            raise ValueError(f"`rows` must be 1 or more, but is {rows}")
        self._seconds, self._rows = seconds, rows
        self._console = console
        self._last = -float("inf")
        self._norms: deque[float] = deque(maxlen=_KEPT)
        self._live: RichLive | None = None

    def due(self, waiting: int) -> bool:  # noqa: ARG002 (time decides)
        """Whether it is time for another picture."""
        return time.monotonic() - self._last >= self._seconds

    def write(self, records: Sequence[Record]) -> None:
        """Show the newest record."""
        self._last = time.monotonic()
        self._norms.extend(record.total.grad_norm for record in records)
        picture = self._picture(records[-1])
        if self._live is None:
            self._live = self._start(picture)
        else:
            self._live.update(picture, refresh=True)

    def _start(self, picture: "RenderableType") -> "RichLive":
        from rich.console import Console  # noqa: PLC0415 (only who watches needs it)
        from rich.live import Live as RichLive  # noqa: PLC0415

        console = self._console or Console(stderr=True)
        live = RichLive(picture, console=console, auto_refresh=False, redirect_stdout=True, redirect_stderr=True)
        live.start(refresh=True)
        return live

    def _picture(self, record: Record) -> "RenderableType":
        from rich.console import Group  # noqa: PLC0415

        largest = sorted(record.items(), key=lambda item: _rank(item[1]), reverse=True)
        table = record.table(0)
        table.caption = None
        for name, row in largest[: self._rows]:
            add_row(table, name, row)
        return Group(_Headline(f"gradient norm  {sparkline(self._norms)}"), table)

    def close(self) -> None:
        """Leave the last picture where it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __repr__(self) -> str:
        """Show the options."""
        return f"Live(seconds={self._seconds}, rows={self._rows})"


class _Headline:
    """A line that rich shows in the characters that a console has."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, _: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yield the line, for rich."""
        from rich.text import Text  # noqa: PLC0415

        yield Text(in_encoding(self._text, options.encoding))


def _rank(row: ParameterStats) -> tuple[bool, float]:
    """Put what is broken first, then what moves most."""
    ratio = row.update_ratio
    return row.nonfinite > 0, ratio if ratio == ratio else float("inf")  # noqa: PLR0124 (NaN)


def sparkline(values: Sequence[float]) -> str:
    """Draw numbers as blocks of their heights; what is inf or NaN as an exclamation mark."""
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if abs(v) < float("inf") else "!" for v in values)
