"""What is released: a wheel, made from the source distribution, works where the repository is not."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCE = ROOT / "src"
made = pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed (extra `dev`)")
TRAINING = """
import torch, surefoot
from surefoot.telemetry import JsonLines, Telemetry

print(surefoot.__file__, surefoot.__version__)
weight = torch.nn.Parameter(torch.ones(8))
telemetry = Telemetry(sinks=[JsonLines("run.jsonl")])
optimizer = surefoot.AdamW([weight], lr=0.1, weight_decay=0.0, telemetry=telemetry)
for _ in range(3):
    (weight**2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert weight[0].item() < 0.75
surefoot.save("checkpoint.safetensors", optimizer=optimizer, step=3)
assert surefoot.load("checkpoint.safetensors", optimizer=optimizer).step == 3
"""


def run(*command, **options):
    """Return what a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # noqa: S603 (our own)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Make the source distribution, and from that alone the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "-d", folder)
    run(*build, "-t", "sdist", cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    run(*build, "-t", "wheel", cwd=folder / source.name.removesuffix(".tar.gz"))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return a function that runs a program of an environment with the wheel and what this one has besides."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    scripts = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # Behind the wheel's own folder; lines of an editable installation there are not followed.
    Path(packages, "others.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        wheel,
    )
    empty = folder / "elsewhere"
    empty.mkdir()
    hidden = ("PYTHONPATH", "SUREFOOT_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["SUREFOOT_CACHE_DIR"] = str(folder / "kernels")
    return lambda program, *arguments: run(scripts / program, *arguments, cwd=empty, env=environment)


@made
def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        found = Parser().parsestr(archive.read(metadata).decode())
    files = (path for path in (SOURCE / "surefoot").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {path.relative_to(SOURCE).as_posix() for path in files}
    assert {"surefoot/py.typed", "surefoot/telemetry/report/page.html"} <= names
    assert (found["Name"], found["Version"]) == ("surefoot", PROJECT["version"])
    assert found.get_all("Classifier") == PROJECT["classifiers"]
    assert found["License-Expression"] == "Apache-2.0"


@made
def test_what_is_installed_works_without_the_repository(installed):
    place, version = installed("python", "-c", TRAINING).split()
    assert not Path(place).is_relative_to(ROOT)
    assert version == PROJECT["version"]
    assert installed("surefoot", "--version").startswith(f"surefoot {version}, torch ")
    assert "run.html" in installed("surefoot", "report", "run.jsonl", "-o", "run.html")


@made
@pytest.mark.long
def test_slower_commands_work_without_the_repository(installed):
    assert json.loads(installed("surefoot", "doctor", "--json"))["facts"]["versions"]["surefoot"] == PROJECT["version"]
    assert "surefoot" in installed("surefoot", "demo", "--steps", "5")
    assert "AdamW" in installed("surefoot", "bench", "--optimizer", "AdamW", "--model", "tiny", "--seconds", "0.1")


def test_the_version_stands_in_one_place():
    version = re.escape(PROJECT["version"])
    sources = [path for path in SOURCE.rglob("*") if path.suffix in {".py", ".html", ".js"}]
    assert [path for path in sources if re.search(rf"\b{version}\b", path.read_text(encoding="utf-8"))] == []
    topmost = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert topmost[1] == PROJECT["version"]


def test_entries_of_the_changelog_have_a_kind():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for section in re.split("^## ", text, flags=re.MULTILINE)[1:]:
        before, *kinds = re.split("^### (.*)$", section, flags=re.MULTILINE)
        assert "\n- " not in before
        assert set(kinds[::2]) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
        assert len(set(kinds[::2])) == len(kinds[::2])


def test_versions_of_python_are_those_that_the_workflow_runs():
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    run_there = set(re.findall(r"\b3\.1\d\b", workflow))
    classified = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    assert classified == run_there
    assert PROJECT["requires-python"] == f">={min(classified)}"


def test_workflows_call_targets_of_make_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    called = {
        target
        for path in (ROOT / ".github/workflows").glob("*.yml")
        for target in re.findall(r"\bmake ([\w-]+)", path.read_text(encoding="utf-8"))
    }
    assert {"test", "docs", "dist"} <= called <= targets
