"""The command `surefoot run`: a script as it is, with our optimizers in the place of torch's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from surefoot.run.settings import Settings


def run(
    script: Annotated[str, typer.Argument(help="The script, or with -m the module.", show_default=False)],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, all of them.", show_default=False)
    ] = None,
    *,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="When the script has ended, time torch's optimizers on the same shapes.")
    ] = False,
    telemetry: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each optimizer's telemetry to a file in this folder.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report there, as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no report.")] = False,
) -> None:
    """Run a script with surefoot's optimizers and schedulers in the place of torch.optim's.

    The script stays as it is. Options of surefoot come before its name; whatever
    comes after is the script's. At its end a short report is printed on standard
    error: which optimizers took steps, which engines ran them and why, and the
    time that took.

    Under torchrun: torchrun --nproc-per-node 2 -m surefoot run train.py
    """
    settings = Settings(
        title=Path(script).name if not module else script,
        compare=compare,
        telemetry=_folder(telemetry),
        quiet=quiet,
        json=_file(json),
    )
    _check_interpreter()
    command = [sys.executable, *_interpreter_flags(), *(["-m"] if module else []), script, *(arguments or ())]
    _become(command, os.environ | settings.environment())


def _folder(folder: Path | None) -> str | None:
    """Make the folder for telemetry."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be made: {error.strerror}", param_hint="--telemetry") from None
    return str(folder.absolute())


def _file(file: Path | None) -> str | None:
    if file is None:
        return None
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file} must be a file in a folder that exists", param_hint="--json")
    return str(file.absolute())


def _check_interpreter() -> None:
    """Refuse flags under which Python would not read what we tell it through the environment."""
    for flag, option in (("isolated", "-I"), ("ignore_environment", "-E"), ("no_site", "-S")):
        if getattr(sys.flags, flag):
            raise typer.BadParameter(f"surefoot run does not work with Python's option {option}; leave it out")


def _interpreter_flags() -> list[str]:
    """Return the options that this interpreter was started with, -u or -X dev for instance."""
    flags = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    return flags[:-1] if flags[-1:] == ["-m"] else flags


def _become(command: list[str], environment: dict[str, str]) -> None:
    """Let this very process run the command, so that signals and the exit code are the script's."""
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":  # there, exec starts another process and ends this one at once
        raise SystemExit(subprocess.call(command, env=environment))  # noqa: S603
    os.execve(command[0], command, environment)  # noqa: S606
