"""The command `surefoot bench`: how fast optimizers step on this machine, against torch.optim and the memory bound."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from surefoot.benchmark import Case, Measurement, Quartiles

INTERRUPTED = 130
ALL = "all"


def _names(what: str) -> Callable[[list[str]], list[str]]:
    """Make the check of a repeatable option whose values are names of `surefoot.benchmark.<what>`, or `all`."""

    def check(given: list[str]) -> list[str]:
        # torch takes a second to import, for which `--help` need not wait.
        from surefoot import benchmark  # noqa: PLC0415

        known = {name.casefold(): name for name in getattr(benchmark, what)}
        return list(known.values()) if ALL in map(str.casefold, given) else [_spelt(name, known) for name in given]

    return check


def _spelt(name: str, known: dict[str, str]) -> str:
    if name.casefold() in known:
        return known[name.casefold()]
    nearest = get_close_matches(name.casefold(), known, n=1)
    hint = f"did you mean {known[nearest[0]]}? Choose" if nearest else "choose"
    raise typer.BadParameter(f"there is no {name!r}; {hint} of {', '.join(known.values())}, or {ALL}.")


def _seconds(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise typer.BadParameter(f"{seconds:g} seconds cannot be measured: give a positive number.")
    return seconds


def _csv(path: Path | None) -> Path | None:
    if path is None:
        return None
    folder = path.absolute().parent
    for refused, reason in (
        (path.is_dir(), "it is a folder"),
        (not folder.is_dir(), f"there is no folder '{folder}'"),
        (not os.access(path if path.exists() else folder, os.W_OK), "it is write-protected"),
    ):
        if refused:
            raise typer.BadParameter(f"'{path}' cannot be written: {reason}. Name a file in a folder of yours.")
    return path


def bench(
    optimizer: Annotated[
        list[str],
        typer.Option(
            callback=_names("VARIANTS"),
            metavar="NAME",
            help="An optimizer, AdamW or SGD+momentum for instance, or all; may be repeated.",
        ),
    ] = ["AdamW"],  # noqa: B006 (typer's way to give a default; nobody changes it)
    model: Annotated[
        list[str],
        typer.Option(
            callback=_names("SHAPE_LISTS"),
            metavar="NAME",
            help="Parameters: overhead (1000 x 1), tiny (1000 x 1 k), medium (200 x 100 k), large (8 x 4 M), mlp1000, "
            "resnet50, gpt2-small, or all; may be repeated.",
        ),
    ] = ["tiny", "medium", "large"],  # noqa: B006
    dtype: Annotated[
        list[str],
        typer.Option(callback=_names("DTYPES"), metavar="NAME", help="float32, bfloat16, or all; may be repeated."),
    ] = ["float32"],  # noqa: B006
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also torch.compile(step), which may compile for minutes.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(callback=_seconds, metavar="X", help="Time for each line of the table.")
    ] = 3.0,
    csv: Annotated[
        Path | None, typer.Option(callback=_csv, metavar="PATH", help="Write all times and their spread there.")
    ] = None,
) -> None:
    """Time steps of optimizers against those of torch.optim.

    All implementations run interleaved in one process. The speed-up is the time of
    the best of torch's over ours: at 2 ours takes half the time. The memory bound
    is a kernel that reads and writes the same memory and only adds; our time over
    its time is 1 where nothing faster is possible. What torch.optim does not have,
    such as Lion, is timed against surefoot's eager engine instead, which runs the
    algorithm by torch's operations, one tensor after the other.
    """
    from rich.console import Console  # noqa: PLC0415

    from surefoot.benchmark import cases, check_memory  # noqa: PLC0415

    selected = cases(optimizer, model, dtype)
    try:
        for case in selected:
            check_memory(case, compiled=compiled)
    except MemoryError as error:
        typer.echo(f"surefoot bench: {error}.", err=True)
        raise typer.Exit(1) from None
    console = Console(highlight=False)
    done: list[Measurement] = []
    try:
        _measure(console, selected, done, seconds, compiled=compiled)
    except KeyboardInterrupt:
        _print_summary(console, done, csv)
        typer.echo("surefoot bench: interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _print_summary(console, done, csv)


def _measure(
    console: "Console", selected: Sequence["Case"], done: list["Measurement"], seconds: float, *, compiled: bool
) -> None:
    """Measure one case after the other, and add each to `done`."""
    from surefoot.benchmark import measure  # noqa: PLC0415

    with console.status("") as status:
        for number, case in enumerate(selected, start=1):
            status.update(f"{case} ({number} of {len(selected)})")
            done.append(measure(case, seconds=seconds, compiled=compiled))


def _print_summary(console: "Console", done: Sequence["Measurement"], csv: Path | None) -> None:
    """Print what has been measured, and write it if that is wanted."""
    from surefoot import benchmark  # noqa: PLC0415

    if not done:
        return
    machine, _, torch, threads = benchmark.circumstances()
    console.print(f"{machine}, {threads} thread{'s' if threads > 1 else ''}, torch {torch}")
    for _, measurements in groupby(done, key=_parameters):
        for part in _apart(list(measurements)):
            console.print()
            console.print(table(part))
    console.print()
    for line in notes(done):
        console.print(line, soft_wrap=True)
    if csv is not None:
        try:
            benchmark.write_csv(csv, (line for measurement in done for line in benchmark.results(measurement)))
        except OSError as error:
            typer.echo(f"surefoot bench: {csv} was not written: {error.strerror}.", err=True)
            raise typer.Exit(1) from None
        console.print(f"Written: {csv}", soft_wrap=True)


def _apart(measurements: Sequence["Measurement"]) -> Iterator[list["Measurement"]]:
    """Yield the measurements of optimizers that torch has, then the others, whose contenders are others."""
    for in_torch in (True, False):
        if part := [one for one in measurements if (one.best_of_torch is not None) is in_torch]:
            yield part


def table(measurements: Sequence["Measurement"]) -> "Table":
    """Make the table of measurements that share their parameters and contenders: a line for each optimizer."""
    from rich.table import Table  # noqa: PLC0415

    from surefoot.benchmark import COMPILED, EAGER, MEMORY_BOUND, OURS, TORCH  # noqa: PLC0415

    took_part = {name for measurement in measurements for name in measurement.seconds}
    compiled = (COMPILED,) if COMPILED in took_part else ()
    contenders = (*((EAGER,) if EAGER in took_part else (*TORCH, *compiled)), OURS, MEMORY_BOUND)
    title = f"{_parameters(measurements[0])}: milliseconds a step"
    made = Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    made.add_column("", no_wrap=True)
    for name in (*contenders, "speed-up", "over bound"):
        style = "bold" if name == OURS else None
        made.add_column(name.replace(" ", "\n"), justify="right", style=style, no_wrap=True, min_width=8)
    for measurement in measurements:
        made.add_row(measurement.case.variant.name, *_cells(measurement, contenders))
    return made


def _parameters(measurement: "Measurement") -> str:
    return f"{measurement.case.shapes.title}, {measurement.case.dtype_name}"


def _cells(measurement: "Measurement", contenders: Iterable[str]) -> Iterator[str]:
    for name in contenders:
        if name in measurement.wrong:
            yield "wrong"
        else:
            yield _digits(measurement.milliseconds(name).median) if name in measurement.seconds else "-"
    yield _ratio(measurement.speedup())
    yield _ratio(measurement.over_memory_bound())


def _digits(number: float) -> str:
    """Write three digits, and all of those before the point."""
    return f"{number:#.3g}" if number < 100 else f"{number:.0f}"  # noqa: PLR2004


def _ratio(quartiles: "Quartiles") -> str:
    if math.isnan(quartiles.median):
        return "-"
    half = (quartiles.q3 - quartiles.q1) / 2
    return f"{quartiles.median:.2f} ±{half / quartiles.median:.0%}"


def notes(done: Sequence["Measurement"]) -> Iterable[str]:
    """Return the lines under the table."""
    from surefoot.benchmark import COMPILED, EAGER, geometric_mean  # noqa: PLC0415

    yield "speed-up: time of torch's best / surefoot's. Medians ± half the quartiles' distance."
    yield "over bound: surefoot's time / that of the memory bound, which moves as many bytes."
    for title, part in groupby(done, key=_parameters):
        ratios = [ratio for measurement in part if not math.isnan(ratio := measurement.speedup().median)]
        if len(ratios) > 1:
            yield f"{title}: mean speed-up {geometric_mean(ratios):.2f}, least {min(ratios):.2f}"
    compiling = [measurement.compile_seconds for measurement in done if COMPILED in measurement.seconds]
    if compiling:
        yield f"torch.compile took {min(compiling):.1f} to {max(compiling):.1f} s; it does not count as torch's best."
    if any(EAGER in measurement.seconds for measurement in done):
        yield f"{EAGER}: the algorithm by torch's operations, where torch.optim does not have it; there is no speed-up."
    if any(measurement.wrong for measurement in done):
        yield "wrong: left out, its step computes something else than torch's for-loop."
