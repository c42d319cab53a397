"""The command `surefoot`: one file per command, gathered here.

Nothing here may import torch: a command imports what it needs when it runs, so that `--help` answers at once.
"""

import platform
from typing import Annotated

import typer

import surefoot
from surefoot.cli import ckpt, lr
from surefoot.cli.bench import bench
from surefoot.cli.cache import cache
from surefoot.cli.demo import demo
from surefoot.cli.doctor import doctor
from surefoot.cli.explain import explain
from surefoot.cli.memory import memory
from surefoot.cli.prebuild import prebuild
from surefoot.cli.report import report
from surefoot.cli.run import run
from surefoot.terminal import spell_out_the_rest

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    name="surefoot",
    help="Optimizers for PyTorch: the names of torch.optim, each algorithm written once and run fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(bench)
app.command()(cache)
app.command()(demo)
app.command()(doctor)
app.command()(explain)
app.command()(memory)
app.command()(prebuild)
app.command()(report)
app.command(context_settings={"allow_interspersed_args": False})(run)
app.add_typer(ckpt.app)
app.add_typer(lr.app)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 (nobody else waits for it)

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "(not installed)"
    typer.echo(f"surefoot {surefoot.__version__}, torch {torch}, Python {platform.python_version()}")
    raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of surefoot, torch and Python, and exit.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run the command line; Ctrl-C ends it with status 130 and no traceback, whatever it was doing."""
    spell_out_the_rest()
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
