"""Environments of their own, in which the other tools test: made in a folder, and deleted unless they are to stay."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command take a folder, and be told to leave it where it is."""
    parser.add_argument("--environment", type=Path, metavar="FOLDER", help="one that was left, or where to make one")
    parser.add_argument("--keep", action="store_true", help="leave the environment where it is")


@contextmanager
def folder_of(arguments: argparse.Namespace, prefix: str) -> Iterator[Path]:
    """Yield the folder that was asked for, which stays, or a new one, which is deleted in the end unless kept."""
    folder = arguments.environment or Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        if not (arguments.keep or arguments.environment):
            shutil.rmtree(folder)


def python_in(folder: Path) -> Path:
    """Return where the interpreter of a folder's environment is."""
    return folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def make_environment(folder: Path, python: str, *install: str | Path) -> Path:
    """Make an environment in a folder and install into it; return its interpreter."""
    print(f"making {folder}", flush=True)
    subprocess.run((python, "-m", "venv", folder / "venv"), check=True)
    subprocess.run((python_in(folder), "-m", "pip", "install", "--quiet", *install), cwd=ROOT, check=True)
    return python_in(folder)
