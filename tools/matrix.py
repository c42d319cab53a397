"""One cell of the matrix of versions: makes an environment with a torch on a Python, tests in it, deletes it.

    python tools/matrix.py --torch 2.9.1 --python 3.12            # the whole suite
    python tools/matrix.py --torch 2.15.0 --python 3.13 --smoke   # every optimizer, in a minute

Everything but torch comes in the versions of constraints.txt.  Some builds of torch take several GB while this runs.
The exit code is that of pytest, where something failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from operator import add
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from environments import ROOT, add_arguments, folder_of, make_environment, python_in

PAGE = ROOT / "docs" / "versions.md"
SMOKE = ("tests/test_smoke.py", "tests/tensors", "tests/cli/test_doctor.py")
BY_TORCH = ("torch", "triton")
"""Packages of which torch decides the version."""


class Cell(NamedTuple):
    """What was found, as the page of the documentation shows it."""

    torch: str
    python: str
    tests: str
    guard: str
    passed: int
    skipped: int
    failed: int
    seconds: int
    installing: int
    date: str

    def row(self) -> str:
        """Return the row of a table."""
        return f"| {' | '.join(f'{value:,}' if isinstance(value, int) else value for value in self)} |"


def main() -> int:
    """Make and test a cell."""
    arguments = _arguments()
    with folder_of(arguments, f"surefoot-torch{arguments.torch}-") as folder:
        start = time.monotonic()
        if not python_in(folder).exists():
            install(interpreter(arguments.python), folder, arguments.torch)
        installed = time.monotonic()
        versions, guard = examine(python_in(folder))
        print(f"torch {versions['torch']}, Python {versions['python']}, {guard} guard: {folder}", flush=True)
        portions = [SMOKE] if arguments.smoke else [(path,) for path in arguments.tests or ("tests",)]
        code, *found = run_tests(python_in(folder), arguments.processes, portions, folder / "results.xml")
        seconds = (round(time.monotonic() - installed), round(installed - start))
        kind = "smoke" if arguments.smoke else " ".join(arguments.tests) or "suite"
        today = datetime.now(tz=UTC).date().isoformat()
        cell = Cell(versions["torch"], versions["python"], kind, guard, *found, *seconds, today)
        print(", ".join(f"{name} {value}" for name, value in cell._asdict().items()))
        if arguments.record:
            record(cell)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test with a torch on a Python, in an environment of its own.")
    parser.add_argument("--torch", required=True, metavar="VERSION")
    parser.add_argument("--python", required=True, metavar="3.X")
    parser.add_argument("--smoke", action="store_true", help="a short run of every optimizer instead of the suite")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="these, one after the other")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that test at once; default 2")
    parser.add_argument("--record", action="store_true", help=f"put the result into {PAGE.relative_to(ROOT)}")
    add_arguments(parser)
    return parser.parse_args()


def interpreter(version: str) -> str:
    """Return an interpreter of a version of Python: this one, one on the path, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for command in (sys.executable, f"python{version}", *pyenv.glob(f"{version}*/bin/python")):
        if shutil.which(command) and version_of(command) == version:
            return str(command)
    sys.exit(f"there is no Python {version} on the path nor below {pyenv}; install it, or choose another --python")


def version_of(python: str | Path) -> str:
    """Return the version of an interpreter as 3.x, nothing of one that does not run."""
    ask = (python, "-c", "import sys; print('{}.{}'.format(*sys.version_info))")
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()


def install(python: str, folder: Path, torch: str) -> None:
    """Make an environment with a version of torch and surefoot as it stands here."""
    folder.mkdir(exist_ok=True)
    known = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    known.write_text("\n".join(line for line in lines if not line.startswith(tuple(f"{p}==" for p in BY_TORCH))))
    make_environment(folder, python, "--constraint", known, f"torch=={torch}", "--editable", ".[dev]")


def examine(python: Path) -> tuple[dict[str, str], str]:
    """Return the versions and the kind of guard that `surefoot doctor` finds."""
    said = subprocess.run((python, "-m", "surefoot", "doctor", "--json"), capture_output=True, text=True, check=False)
    found = json.loads(said.stdout)
    for problem in found["problems"]:
        print(f"doctor: {problem}")
    return found["facts"]["versions"], found["facts"]["guard"]["kind"]


def run_tests(
    python: Path, processes: int, portions: Sequence[Sequence[str]], results: Path
) -> tuple[int, int, int, int]:
    """Run some tests after the others, and say after each what has been found.

    Returns:
        The exit code, and how many passed, were skipped, failed.
    """
    code, total = 0, (0, 0, 0)
    for paths in portions:
        start = time.monotonic()
        shared = ("-n", str(processes), "--dist", "worksteal")
        command = (python, "-m", "pytest", "-q", *shared, "--junitxml", results, *paths)
        code |= subprocess.run(command, cwd=ROOT, check=False).returncode
        found = tuple(counts(results))
        passed, skipped, failed = total = tuple(map(add, total, found))
        now = f"{' '.join(paths)} in {time.monotonic() - start:.0f} s: passed, skipped, failed {found}"
        print(f"{now}; of all {total}", flush=True)
    return code, passed, skipped, failed


def counts(results: Path) -> Iterator[int]:
    """Yield how many tests passed, were skipped, failed."""
    suite = ET.parse(results).getroot().find("testsuite").attrib
    tests, skipped, failures, errors = (int(suite[name]) for name in ("tests", "skipped", "failures", "errors"))
    yield from (tests - skipped - failures - errors, skipped, failures + errors)


def record(cell: Cell) -> None:
    """Put a cell into the page's table, in the place of an earlier result, in order of versions."""
    lines = PAGE.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|---")) + 1
    last = next(number for number, line in enumerate(lines) if number >= first and not line.startswith("|"))
    rows = {key_of(line): line for line in (*lines[first:last], cell.row())}
    lines[first:last] = [rows[key] for key in sorted(rows)]
    PAGE.write_text("\n".join(lines) + "\n")


def key_of(row: str) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Return what a row is about: torch, Python and the tests."""
    torch, python, tests = (part.strip() for part in row.strip("|").split("|")[:3])
    release = tuple(map(int, torch.partition("+")[0].split(".")))
    return release, tuple(map(int, python.split("."))), tests


if __name__ == "__main__":
    sys.exit(main())
