"""What one step has measured: `RawStep` as the step hands it over, `Record` as a person reads it.

A `RawStep` may hold tensors on any device that are still being computed; only looking at a `Record` waits for them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from surefoot.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

COLUMNS = ("grad_square", "param_square", "update_square", "max_grad", "nonfinite")
"""The columns of `RawStep.sums`."""
QUANTITIES = ("grad_norm", "param_norm", "update_norm", "update_ratio", "max_grad", "nonfinite")
"""What a `Record` tells of each parameter, beside its learning rate."""
_ROWS_SHOWN = 40


@dataclass(frozen=True, eq=False)
class RawStep:
    """What a step hands over, without waiting for a device.

    Tensors given here must not be written to afterwards.  Gradients count as the user's closure or `backward` left
    them, unscaled if a GradScaler scaled them, and before clipping.

    Attributes:
        step: the number of this call of `step()`, from 1; skipped ones count.
        names: the parameters that were measured, n of them.
        sums: float64 of shape (n, 5), on any device; for each parameter the sum of squares of the gradient, of the
            parameter after the step and of the update (after - before), the largest |gradient|, and the count of
            gradient elements that are inf or NaN (of a complex one: of its real and imaginary parts).
        lrs: the learning rate of each parameter, n numbers; or one for all.
        clip: what the gradients were multiplied with by clipping; 1 if they were not.  A tensor has one element.
        skipped: how many of the steps so far were skipped, this one included.  A tensor has one element.
        seconds: how long the step took, on the host.

    Raises:
        ValueError: shapes do not fit one another.
    """

    step: int
    names: tuple[str, ...]
    sums: "Tensor"
    lrs: tuple[float, ...]
    clip: "float | Tensor" = 1.0
    skipped: "int | Tensor" = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be read later, while it is known where it comes from."""
        import torch  # noqa: PLC0415 (who makes one has it; who reads a file does without)

        count = len(self.names)
        if tuple(self.sums.shape) != (count, len(COLUMNS)) or self.sums.dtype != torch.float64:
            raise ValueError(
                f"`sums` must be float64 of shape ({count}, {len(COLUMNS)}), one row for each of `names`, but is "
                f"{self.sums.dtype} of shape {tuple(self.sums.shape)}"
            )
        if len(self.lrs) not in (1, count):
            raise ValueError(f"`lrs` must be 1 or {count} numbers, as many as `names`, but are {len(self.lrs)}")


@dataclass(frozen=True)
class ParameterStats:
    """The numbers of one parameter, or of all of them together.

    Attributes:
        grad_norm: Euclidean norm of the gradient before clipping.
        param_norm: Euclidean norm of the parameter after the step.
        update_norm: Euclidean norm of what the step added to the parameter.
        update_ratio: `update_norm / param_norm`; about 1e-3 is usual.
        max_grad: largest absolute value in the gradient.
        nonfinite: how many elements of the gradient are inf or NaN.
        lr: the learning rate; NaN in a total over several.
    """

    grad_norm: float
    param_norm: float
    update_norm: float
    update_ratio: float
    max_grad: float
    nonfinite: int
    lr: float


def ratio(update: np.ndarray, param: np.ndarray) -> np.ndarray:
    """Divide norms of updates by norms of weights; 0 where nothing was updated, inf where weights are all zero."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(update == 0, np.where(np.isnan(param), np.nan, 0.0), update / param)


@dataclass(eq=False)
class Record:
    """One step's numbers.  `print` shows them as a table; looking at them waits for the device, making a record not.

    Attributes:
        raw: what the step handed over.
        time: when that was, in seconds since 1970.
    """

    raw: RawStep
    time: float = field(default_factory=time.time)

    @property
    def step(self) -> int:
        """The number of the step, from 1."""
        return self.raw.step

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in order."""
        return self.raw.names

    @property
    def seconds(self) -> float:
        """How long the step took, on the host."""
        return self.raw.seconds

    @cached_property
    def clip(self) -> float:
        """What clipping multiplied the gradients with; 1 if it did nothing."""
        return float(self.raw.clip)

    @cached_property
    def skipped(self) -> int:
        """How many steps have been skipped so far, this one included."""
        return int(self.raw.skipped)

    @cached_property
    def sums(self) -> np.ndarray:
        """What was summed up: float64 of shape (parameters, 5), see `COLUMNS`."""
        return self.raw.sums.detach().cpu().numpy()

    @cached_property
    def lrs(self) -> np.ndarray:
        """The learning rate of each parameter: float64 of shape (parameters,)."""
        return np.broadcast_to(np.array(self.raw.lrs, dtype=np.float64), (len(self.names),))

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """For each of `QUANTITIES` the values of all parameters: float64 of shape (parameters,)."""
        norms = np.sqrt(self.sums[:, :3])
        grad, param, update = norms.T
        return dict(zip(QUANTITIES, (grad, param, update, ratio(update, param), *self.sums[:, 3:].T), strict=True))

    @cached_property
    def total(self) -> ParameterStats:
        """The numbers of all parameters together, as if they were one."""
        with np.errstate(over="ignore", invalid="ignore"):
            grad, param, update = np.sqrt(self.sums[:, :3].sum(axis=0))
        most, count = self.sums[:, 3].max(initial=0.0), self.sums[:, 4].sum()
        lr = self.raw.lrs[0] if len(set(self.raw.lrs)) == 1 else math.nan
        return _row((grad, param, update, ratio(update, param), most, count), lr)

    def __getitem__(self, name: str) -> ParameterStats:
        """Return the numbers of one parameter.

        Raises:
            KeyError: it was not measured.
        """
        if name not in self.names:
            raise KeyError(f"{name!r} was not measured in step {self.step}; there are: {', '.join(self.names)}")
        return self._row(self.names.index(name))

    def items(self) -> Iterator[tuple[str, ParameterStats]]:
        """Yield each parameter's name and numbers."""
        for index, name in enumerate(self.names):
            yield name, self._row(index)

    def _row(self, index: int) -> ParameterStats:
        return _row([self.values[quantity][index] for quantity in QUANTITIES], self.lrs[index])

    def headline(self) -> str:
        """Say in a line what concerns the step as a whole."""
        parts = [f"step {self.step}", f"{self.seconds * 1e3:.3g} ms"]
        parts.append(f"clip factor {self.clip:.3g}" if self.clip != 1 else "not clipped")
        if self.skipped:
            parts.append(f"{self.skipped} skipped so far")
        return "   ".join(parts)

    def table(self, limit: int | None = None) -> "Table":
        """Make the table: the total, then a line for each parameter.

        Args:
            limit: show at most so many parameters; None shows all.
        """
        from rich.table import Table  # noqa: PLC0415 (only who prints needs it)

        made = Table(title=self.headline(), title_justify="left", box=None, pad_edge=False)
        made.add_column("", no_wrap=True)
        for name in ("gradient", "weights", "update", "update/weights", "max |gradient|", "non-finite", "lr"):
            made.add_column(name, justify="right", no_wrap=True)
        made.add_row("total", *_cells(self.total), style="bold")
        for name, row in list(self.items())[:limit]:
            add_row(made, name, row)
        if limit is not None and len(self.names) > limit:
            made.caption = f"{len(self.names) - limit} more parameters: record.table()"
        return made

    def __rich__(self) -> "Table":
        """Let rich show the table."""
        return self.table(_ROWS_SHOWN)

    def __str__(self) -> str:
        """Write the table as plain text."""
        from rich.console import Console  # noqa: PLC0415

        console = Console(width=200, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table(_ROWS_SHOWN))
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def __repr__(self) -> str:
        """Name the record without waiting for its numbers."""
        return f"Record(step={self.step}, parameters={len(self.names)})"


def _row(numbers: Sequence[Any], lr: float) -> ParameterStats:
    """Make a row of its numbers in the order of `QUANTITIES`."""
    grad, param, update, update_ratio, most, count = map(float, numbers)
    return ParameterStats(grad, param, update, update_ratio, most, int(count), float(lr))


def add_row(table: "Table", name: str, row: ParameterStats) -> None:
    """Add a parameter's line to a table, in red if something is not finite."""
    from rich.text import Text  # noqa: PLC0415

    # As text, since rich takes brackets for commands, and a terminal control characters.
    table.add_row(Text(printable(name)), *_cells(row), style="red" if row.nonfinite else None)


def _cells(row: ParameterStats) -> list[str]:
    """Write a row's numbers for a table."""
    numbers = (row.grad_norm, row.param_norm, row.update_norm, row.update_ratio, row.max_grad)
    lr = "" if math.isnan(row.lr) else f"{row.lr:.4g}"
    return [*(f"{number:.4g}" for number in numbers), str(row.nonfinite) if row.nonfinite else "-", lr]


def fetch(records: Sequence[Record]) -> None:
    """Bring the numbers of many records to the host with one transfer for each device and shape."""
    waiting: dict[Any, list[Record]] = {}
    for record in records:
        sums = record.raw.sums
        if "sums" not in record.__dict__ and sums.device.type != "cpu":
            waiting.setdefault((sums.device, sums.shape), []).append(record)
    for group in waiting.values():
        import torch  # noqa: PLC0415

        arrays = torch.stack([record.raw.sums.detach() for record in group]).cpu().numpy()
        for record, array in zip(group, arrays, strict=True):
            record.__dict__["sums"] = array
