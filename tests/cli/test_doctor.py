"""The command `surefoot doctor`: what runs where and why, also where things are broken."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import surefoot
from surefoot import doctor, environment
from surefoot.cli import app
from surefoot.tensors import private
from surefoot.tensors.native import guards as native


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in environment.VARIABLES.keys() - {"SUREFOOT_CACHE_DIR"}:
        monkeypatch.delenv(name, raising=False)


def said(*arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments], terminal_width=300)
    assert not result.exception or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def facts():
    code, text = said("--json")
    return code, json.loads(text)


def test_a_machine_on_which_nothing_is_wrong():
    code, text = said()
    assert code == 0, text
    assert f"torch {torch.__version__}" in text
    assert "guard     native" in text
    assert "cpu serves float32, float64, bfloat16, float16, complex64 on cpu" in text
    assert "missing here: none" in text
    assert text.endswith("Nothing is wrong.\n")
    assert len(text.splitlines()) < 24


def test_the_same_as_json():
    code, found = facts()
    assert code == 0
    assert found["problems"] == []
    assert found["facts"]["guard"] == {"kind": "native", "reason": None, "told": False}
    assert {row["engine"] for row in found["facts"]["engines"]["choices"] if row["device"] == "cpu"} == {"cpu"}
    assert found["facts"]["threads"]["torch"] == torch.get_num_threads()
    assert found["facts"]["cache"]["writable"]


def test_what_was_asked_for_is_no_problem(monkeypatch):
    monkeypatch.setenv("SUREFOOT_NATIVE_GUARD", "0")
    monkeypatch.setenv("SUREFOOT_ENGINE", "foreach")
    code, text = said()
    assert code == 0
    assert "plain: SUREFOOT_NATIVE_GUARD=0 turns them off" in text
    assert "foreach serves float32, float64, bfloat16, float16, complex64 on cpu" in text


def test_plain_guards_that_nobody_asked_for(monkeypatch):
    monkeypatch.setattr(native, "tensor_layout", lambda: None)
    code, text = said()
    assert code == 1
    assert "problem:  plain guards serve, which cost more at each step: this release of torch keeps tensors" in text


def test_variables_that_cannot_be_read(monkeypatch):
    for name, value in {"NATIVE_GUARD": "yes", "CHECKED": "2", "ENGINE": "fast", "CACHE": "here"}.items():
        monkeypatch.setenv(f"SUREFOOT_{name}", value)
    code, found = facts()
    assert code == 1
    assert found["problems"] == [
        "SUREFOOT_CHECKED must be 1 or 0, but is '2'",
        "SUREFOOT_NATIVE_GUARD must be 1 or 0, but is 'yes'",
        "engines: ValueError: SUREFOOT_ENGINE must be one of eager, foreach, fused, but is 'fast'",
    ]
    assert found["warnings"] == ["SUREFOOT_CACHE is set, but means nothing; did you mean SUREFOOT_CACHE_DIR?"]


def test_a_machine_without_a_compiler():
    code = """
import sys
sys.modules["llvmlite"] = sys.modules["llvmlite.binding"] = None
from surefoot import doctor
from surefoot.cli import main
doctor.missing_names = list  # whose owners take long to import
sys.argv = ["surefoot", "doctor"]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert result.returncode == 1, result.stderr
    assert "no kernels serve float32, float64, bfloat16, float16, complex64 on cpu" in result.stdout
    assert "llvmlite is not installed; pip install llvmlite" in result.stdout
    assert "plain guards serve" in result.stdout


def test_a_compiler_that_fails(monkeypatch):
    class Broken(surefoot.SGD):
        def step(self, closure=None):
            raise OSError("no such instruction")

    monkeypatch.setattr(doctor.optimizers, "SGD", Broken)
    code, text = said()
    assert code == 1
    assert "problem:  a kernel on cpu cannot be made: OSError: no such instruction" in text


@pytest.mark.skipif(sys.platform == "win32", reason="files have no mode on Windows")
def test_a_cache_that_is_not_used_is_a_warning(monkeypatch, tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(folder))
    code, text = said()
    assert code == 0
    assert f"{folder}: 0 kernels, not used: others can write to {folder}" in text
    assert "warning:  new kernels are not kept, so that every process compiles for itself: others can write" in text
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", "~nosuchuser/kernels")
    code, found = facts()
    assert (code, found["facts"]["cache"]["folder"]) == (0, None)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "new"))
    code, text = said()
    assert code == 0
    assert f"{tmp_path} cannot be written" in text


def test_names_that_a_release_of_torch_lacks(monkeypatch):
    row = private.PrivateName("torch._C._no_such_name", "dynamo", "knowing better", "the step raises")
    monkeypatch.setattr(private, "PRIVATE_NAMES", (*private.PRIVATE_NAMES, row))
    code, text = said()
    assert code == 0
    assert "missing here: torch._C._no_such_name" in text
    assert "warning:  this torch has no `torch._C._no_such_name` (knowing better): the step raises" in text


@pytest.mark.parametrize("name", ["Tensor._x", "torch._x", "torch._x_*", "torch._x.y", "Nobody._x", "Module._x"])
def test_a_name_that_is_nowhere_is_missing(name):
    assert not private._is_there(name)


def test_whatever_breaks_leaves_the_rest(monkeypatch):
    monkeypatch.setitem(doctor._SECTIONS, "threads", lambda found: 1 / 0)
    code, text = said()
    assert code == 1
    assert "threads   cannot be told: division by zero" in text
    assert "problem:  threads: ZeroDivisionError: division by zero" in text
    assert "guard     native" in text


def test_the_table_of_variables_is_that_of_the_code():
    source = Path(surefoot.__file__).parent
    read = {name for path in source.rglob("*.py") for name in re.findall("SUREFOOT_[A-Z_]+", path.read_text())}
    assert read - {"SUREFOOT_"} == set(environment.VARIABLES)
    assert set(environment.SWITCHES) < set(environment.VARIABLES)
