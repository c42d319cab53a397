"""The command `surefoot lr`: learning-rate schedules in the terminal and as pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surefoot.terminal import printable

if TYPE_CHECKING:
    from rich.text import Text

    from surefoot.lr_scheduler.curves import Curve

app = typer.Typer(
    name="lr",
    help="Learning-rate schedules.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TERMINAL_COLORS = ("bright_blue", "yellow", "green", "magenta", "cyan", "red")
_AXIS = 11
_NARROWEST, _WIDEST = 20, 1000
_MOST_STEPS = 2**53
"""From here on, steps are no longer told apart as floating-point numbers."""


@app.callback()
def _group() -> None:
    """Learning-rate schedules."""


@app.command()
def plot(
    schedules: Annotated[
        list[str],
        typer.Argument(
            help='Schedules: expressions such as "warmup(100, cosine(1, 0, 900))", or JSON files.', show_default=False
        ),
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, max=_MOST_STEPS, help="How many steps to draw; by default all.")
    ] = None,
    lr: Annotated[float, typer.Option(help="The learning rate that the factors are multiplied with.")] = 1.0,
    png: Annotated[
        Path | None, typer.Option("--png", "-o", help="Also write a picture, of the type that the name ends in.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=_NARROWEST, max=_WIDEST, help="Columns; by default those of the terminal.")
    ] = None,
    height: Annotated[int, typer.Option(min=3, max=_WIDEST, help="Lines of the drawing.")] = 14,
) -> None:
    """Draw schedules, several on the same axes.

    An expression is made of the functions in surefoot.lr_scheduler.schedules: constant(factor), linear(start, end,
    steps), cosine(start, end, steps), polynomial(start, end, steps, power), exponential(gamma),
    inverse_sqrt(timescale), step(every, gamma), restarts(curve, period, mult), warmup(steps, then),
    join(curve, curve, at=[step]), warmup_stable_decay(warmup, stable, decay), one_cycle(steps),
    cosine_with_warmup(warmup, total), ...; curves are multiplied with *.

    Example: surefoot lr plot "cosine_with_warmup(100, 1000)" "warmup_stable_decay(100, 700, 200)" --lr 3e-4
    """
    from rich.console import Console  # noqa: PLC0415 (commands import when they run)

    from surefoot.lr_scheduler.plot import default_steps, figure  # noqa: PLC0415

    if not math.isfinite(lr):
        raise typer.BadParameter(f"{lr} is not a learning rate: give a finite number", param_hint="--lr")
    curves = {text: _read(text) for text in schedules}
    console = Console(width=width)
    try:
        count = steps or default_steps(list(curves.values()))
        drawing = _drawing(curves, count, lr, min(max(console.width, _NARROWEST), _WIDEST), height)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"cannot be drawn: {error}", param_hint="SCHEDULES") from None
    console.print(drawing, soft_wrap=True)
    if png is not None:
        try:
            figure(curves, count, png, scale=lr, ylabel="factor" if lr == 1 else "learning rate")
        except (ImportError, OSError, ValueError) as error:
            raise typer.BadParameter(f"{png} was not written: {error}", param_hint="--png") from None
        console.print(f"wrote {png}")


def _read(text: str) -> "Curve":
    """Make a schedule of an expression, or of a file if it names one."""
    from surefoot.lr_scheduler.curves import Curve  # noqa: PLC0415
    from surefoot.lr_scheduler.expression import parse  # noqa: PLC0415

    try:
        if text.endswith(".json"):
            return Curve.from_json(Path(text).read_text(encoding="utf-8"))
        return parse(text)
    except OverflowError:
        raise typer.BadParameter(f"{text[:60]!r} has a number that is too large", param_hint="SCHEDULES") from None
    except RecursionError:
        raise typer.BadParameter(f"{text[:60]!r} is nested too deeply", param_hint="SCHEDULES") from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="SCHEDULES") from None


def _drawing(curves: "dict[str, Curve]", steps: int, lr: float, width: int, height: int) -> "Text":
    """Return the curves in colours on common axes, and what they are."""
    from rich.text import Text  # noqa: PLC0415

    from surefoot.lr_scheduler.plot import layers  # noqa: PLC0415

    columns = width - _AXIS - 1
    drawn, low, high = layers(list(curves.values()), steps, lr, columns, height)
    text = Text(no_wrap=True, overflow="crop")
    for line in range(height):
        share = line / (height - 1)
        value = high * (1 - share) + low * share
        text.append(f"{value:{_AXIS - 1}.3g} " if line % 3 == 0 or line == height - 1 else " " * _AXIS, style="dim")
        text.append("│", style="dim")
        text.append_text(_overlaid([layer[line] for layer in drawn]))
        text.append("\n")
    last = f"{steps - 1} steps"
    text.append(" " * _AXIS + "└" + "─" * columns + "\n", style="dim")
    text.append(" " * (_AXIS + 1) + "0" + last.rjust(columns - 1) + "\n", style="dim")
    for index, label in enumerate(curves):
        text.append(f"{' ' * _AXIS} ⣀⣀ ", style=_color(index)).append(f"{printable(label)}\n")
    text.rstrip()
    return text


def _color(index: int) -> str:
    return _TERMINAL_COLORS[index % len(_TERMINAL_COLORS)]


def _overlaid(layers: list[str]) -> "Text":
    """Return one line of all curves; where two meet, the later one is seen."""
    from rich.text import Text  # noqa: PLC0415

    line = Text()
    for cells in zip(*layers, strict=True):
        seen = [index for index, cell in enumerate(cells) if cell != " "]
        line.append(cells[seen[-1]] if seen else " ", style=_color(seen[-1]) if seen else "")
    return line
