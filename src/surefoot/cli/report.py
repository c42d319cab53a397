"""The command `surefoot report`: a page about a run's telemetry."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surefoot.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

    from surefoot.telemetry.report import Finding

_STYLES = {"good": "green", "note": "yellow", "bad": "red"}


def report(
    run: Annotated[Path, typer.Argument(help="A file of JSON Lines that telemetry has written.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="The page.", show_default="the run's name with .html"),
    ] = None,
) -> None:
    """Write a page about a run: what blew up first, curves, and a map of parameters and steps.

    The page is one file that needs no network. What it says in words is printed too.

    A script as it is leaves such a run: surefoot run --telemetry runs train.py
    In a script of yours it is an option of the optimizer, with two names of
    surefoot.telemetry: telemetry=Telemetry(sinks=[JsonLines("run.jsonl")])
    """
    from rich.console import Console  # noqa: PLC0415 (only when the command runs)

    if run.is_dir():
        raise typer.BadParameter(f"{run} is a folder; name a file of JSON Lines in it", param_hint="RUN")
    page = out or run.with_suffix(".html")
    if page.absolute() == run.absolute():
        raise typer.BadParameter(f"{page} is the run itself; name another file", param_hint="--out")
    console = Console(highlight=False)
    try:
        findings = _write_page(console, run, page)
    except (OSError, ValueError) as error:
        typer.echo(f"surefoot report: {printable(_reason(error))}", err=True)
        raise typer.Exit(1) from None
    _print_findings(console, findings, page)


def _reason(error: OSError | ValueError) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _write_page(console: "Console", run: Path, page: Path) -> list["Finding"]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    from surefoot.telemetry.report import write_report  # noqa: PLC0415

    columns = (TextColumn("reading {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(run.name, total=math.inf)
        return write_report(run, page, lambda read, size: progress.update(task, completed=read, total=size))


def _print_findings(console: "Console", findings: list["Finding"], page: Path) -> None:
    for finding in findings:
        console.print(f"[{_STYLES[finding.kind]}]●[/] [bold]{finding.title}[/]", soft_wrap=True)
        console.print(f"  {printable(finding.text)}", markup=False, soft_wrap=True)
    console.print(printable(f"\n{page}, {page.stat().st_size / 1e6:.2g} MB"), markup=False, soft_wrap=True)
