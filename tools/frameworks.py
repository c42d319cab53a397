"""The framework suite: trainings inside frameworks, each beside torch.optim, in an environment of its own.

    python tools/frameworks.py                     # makes an environment, runs tests/frameworks in it, deletes it
    python tools/frameworks.py --record            # and writes the tables of docs/frameworks.md
    python tools/frameworks.py --keep -- -k timm   # leaves it; what follows -- is pytest's
    python tools/frameworks.py --environment DIR   # uses one that was left

The versions are those of tests/frameworks/requirements.txt and constraints.txt.  The exit code is that of pytest.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as ET

from environments import ROOT, add_arguments, folder_of, make_environment, python_in

SUITE = ROOT / "tests" / "frameworks"
PAGE = ROOT / "docs" / "frameworks.md"
FRAMEWORKS = ("transformers", "accelerate", "lightning", "timm", "peft")
BEGIN, END = "<!-- written by tools/frameworks.py -->", "<!-- until here -->"
OPERATORS = """

import torch

_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""What torchvision lacks to be imported where its compiled part does not fit the build of torch."""


def main() -> int:
    """Make the environment, run the suite, write the tables."""
    arguments = _arguments()
    with folder_of(arguments, "surefoot-frameworks-") as folder:
        python = python_in(folder)
        if not python.exists():
            known = ("--constraint", ROOT / "constraints.txt", "--requirement", SUITE / "requirements.txt")
            make_environment(folder, sys.executable, *known, "--editable", ROOT)
            if subprocess.run((python, "-c", "import torchvision"), capture_output=True, check=False).returncode:
                declare_operators(python)
        results = folder / "results.xml"
        command = (python, "-m", "pytest", "-q", "--junitxml", results, *arguments.pytest)
        code = subprocess.run(command, cwd=SUITE, check=False).returncode
        if arguments.record:
            record(results, versions(python))
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train inside frameworks, beside torch.optim.")
    parser.add_argument("--record", action="store_true", help=f"write the tables of {PAGE.relative_to(ROOT)}")
    add_arguments(parser)
    parser.add_argument("pytest", nargs="*", help="options of pytest, after --")
    return parser.parse_args()


def declare_operators(python: Path) -> None:
    """Let torchvision be imported beside a build of torch that its compiled operators are not for.

    timm needs it for transforms and one layer in plain Python; nothing calls these operators.
    """
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run((python, "-c", ask), capture_output=True, text=True, check=True).stdout.strip()
    with Path(packages, "torchvision", "extension.py").open("a") as file:
        file.write(OPERATORS)
    subprocess.run((python, "-c", "import torchvision"), check=True)


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the frameworks, PyTorch and Python."""
    names = ("torch", *FRAMEWORKS)
    code = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]} | {'Python': platform.python_version()}))"
    )
    said = subprocess.run((python, "-c", code, *names), capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(said)
    return found


def record(results: Path, found: dict[str, str]) -> None:
    """Write the tables into the page; cases that were not run keep their rows while the framework's version stands."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    ran = [row(case) for case in ET.parse(results).getroot().iter("testcase")]
    PAGE.write_text(f"{before}{BEGIN}\n\n{chr(10).join(tables(rows_of(written), ran, found))}\n\n{END}{after}")


def rows_of(written: str) -> dict[str, dict[str, list[str]]]:
    """Return the cells of tables by their headings, and in these by their cases."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in written.splitlines():
        if line.startswith("### "):
            tables[line] = {}
        elif line.startswith("| ") and not line.startswith("| case |"):
            case, *cells = line.strip("| ").split(" | ")
            tables[list(tables)[-1]][case] = cells
    return tables


def tables(
    earlier: dict[str, dict[str, list[str]]], ran: list[tuple[str, ...]], found: dict[str, str]
) -> Iterator[str]:
    """Yield a line about all cases, and those of a table for each framework: case, result, differences."""
    now = {f"### {framework} {found[framework]}": framework for framework in FRAMEWORKS}
    rows = {
        heading: earlier.get(heading, {}) | {case: cells for name, case, *cells in ran if name == framework}
        for heading, framework in now.items()
    }
    results = [cells[0] for table in rows.values() for cells in table.values()]
    today = datetime.now(tz=UTC).date().isoformat()
    yield (
        f"{results.count('passes')} of {len(results)} cases pass; {today}, PyTorch {found['torch']}, "
        f"Python {found['Python']}."
    )
    for heading, table in rows.items():
        yield from ("", heading, "", "| case | result | difference | eager engine |", "|---|---|---|---|")
        yield from (f"| {' | '.join((case, *cells))} |" for case, cells in table.items())


def row(case: ET.Element) -> tuple[str, ...]:
    """Return the framework of a case, what it is, its result, and the differences of its weights."""
    said = {item.get("name"): item.get("value", "") for item in case.iter("property")}
    kinds = {"failure": "**fails**", "error": "**fails**", "skipped": "skipped"}
    result = next((kinds[child.tag] for child in case if child.tag in kinds), "passes")
    return said["framework"], said["case"], result, shown(said.get("difference")), shown(said.get("eager"))


def shown(difference: str | None) -> str:
    """Return a difference as the table shows it."""
    if difference is None:
        return "-"
    return "none" if float(difference) == 0 else f"{float(difference):.1e}"


if __name__ == "__main__":
    sys.exit(main())
