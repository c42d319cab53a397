"""The commands `surefoot cache` and `surefoot prebuild`."""

import sys

import pytest
from typer.testing import CliRunner

from surefoot.cli import app
from surefoot.codegen.compile import build_kernel
from surefoot.codegen.processor import host


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def shown(folder):
    return f"folder: {folder} processor: {host().name}"


def said(*arguments):
    result = CliRunner().invoke(app, arguments, terminal_width=300)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_prebuilt_kernels_are_shown_and_cleared(folder):
    assert said("cache") == (0, f"{shown(folder)} kernels: none")
    code, text = said("prebuild", "adamw", "SGD", "--dtype", "bfloat16", "-o", "weight_decay=0.5")
    assert (code, text.endswith(f"new kernels in {folder}; 0 were there")) == (0, True)
    names = {path.name.split("_")[0] for path in folder.glob("*.o")}
    assert {"adamw", "sgd"} <= names <= {"adamw", "sgd", "guard"}
    assert said("prebuild", "AdamW", "--dtype", "bfloat16", "-o", "weight_decay=0.1")[1].startswith("0 new kernels")
    assert f"kernels: {len(list(folder.glob('*.o')))}, " in said("cache")[1]
    assert said("cache", "--clear") == (0, f"{shown(folder)} kernels: 0, 0 KiB with their sources, of at most 64 MiB")
    assert not list(folder.glob("*.o"))


@pytest.mark.skipif(sys.platform == "win32", reason="files have no mode on Windows")
def test_why_a_folder_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    code, text = said("cache")
    assert (code, text) == (
        1,
        f"{shown(folder)} not used: others can write to {folder}; to use it, chmod go-w {folder}",
    )
    code, text = said("prebuild", "Adam")
    assert code == 2
    assert "the cache folder is not used: others can write to" in text


def test_a_home_that_cannot_be_found(monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", "~nosuchuser/kernels")
    assert "not used: " in said("cache")[1]


@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS", "Adafactor"])
def test_optimizers_of_any_kind_are_prebuilt(folder, name):
    assert said("prebuild", name)[0] == 0


def test_matrices_and_vectors_and_what_measures_them_are_prebuilt(folder):
    assert said("prebuild", "MARS", "LAMB")[0] == 0
    names = [path.stem.rpartition("_")[0] for path in folder.glob("*.o")]
    of_rules = sorted(name for name in names if name.startswith(("lamb", "mars")))  # this process may have the others
    assert of_rules == ["lamb", "lamb_measures", "mars", "mars", "mars_measures"]


def test_what_a_run_has_kept_is_compiled_from_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "recorded"))
    recorded = build_kernel("def kernel(launch):\n    store(launch + 8, 5)\n", "small").name
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(folder))
    answer = f"1 new kernels in {folder}; 0 were there"
    assert said("prebuild", "--from", str(tmp_path / "recorded")) == (0, answer)
    assert [path.stem for path in folder.glob("*.o")] == [recorded]
    assert said("cache", "--clear")[0] == 0
    assert said("prebuild", "--from", str(tmp_path / "recorded"), "--cpu", host().name) == (0, answer)
    assert [path.stem for path in folder.glob("*.o")] != [recorded]


SCRIPT = """
import sys
assert sys.argv[1:] == ["--epochs", "1"]
import torch
param = torch.ones(3, requires_grad=True)
param.grad = torch.ones(3)
torch.optim.RMSprop([param]).step()
"""


def test_what_a_script_needs_is_compiled_for_a_named_processor(folder, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    answer = f"2 new kernels in {folder}; 0 were there"
    assert said("prebuild", "--cpu", host().name, "--", str(script), "--epochs", "1") == (0, answer)
    before = {path.stem for path in folder.glob("*.o")}
    assert {name.partition("_")[0] for name in before} == {"rmsprop", "guard"}
    assert said("prebuild", "--", str(script), "--epochs", "1") == (0, f"0 new kernels in {folder}; 2 were there")
    assert said("prebuild", "--", str(script)) == (1, "")


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "must be optimizers, a script or --from FOLDER, and one of these"),
    (("Adam", "--from", "kernels"), "must be optimizers, a script or --from FOLDER, and one of these"),
    (("Adam", "--cpu", "8086"), "must be a processor that LLVM knows, for instance"),
    (("--from", "no-such-folder"), "No such file or directory: 'no-such-folder'"),
    (("--from", "tests"), "tests has no kernels in it"),
    (("Adam", "--dtype", "int8"), "must be one of float32"),
    (("Adm",), "did you mean Adam?"),
    (("Adam", "-o", "rate=1"), "Adam of float32: "),
])  # fmt: skip
def test_what_cannot_be_built_is_named(folder, arguments, message):
    code, text = said("prebuild", *arguments)
    assert code == 2
    assert message in text
