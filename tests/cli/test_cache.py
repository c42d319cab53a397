"""The commands `surefoot cache` and `surefoot prebuild`."""

import sys

import pytest
from typer.testing import CliRunner

from surefoot.cli import app


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def said(*arguments):
    result = CliRunner().invoke(app, arguments, terminal_width=300)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_prebuilt_kernels_are_shown_and_cleared(folder):
    assert said("cache") == (0, f"folder: {folder} kernels: none")
    code, text = said("prebuild", "adamw", "SGD", "--dtype", "bfloat16", "-o", "weight_decay=0.5")
    assert (code, text.endswith(f"new kernels in {folder}; 0 were there")) == (0, True)
    names = {path.name.split("_")[0] for path in folder.glob("*.o")}
    assert {"adamw", "sgd"} <= names <= {"adamw", "sgd", "guard"}
    assert said("prebuild", "AdamW", "--dtype", "bfloat16", "-o", "weight_decay=0.1")[1].startswith("0 new kernels")
    assert f"kernels: {len(list(folder.glob('*.o')))}, " in said("cache")[1]
    assert said("cache", "--clear") == (0, f"folder: {folder} kernels: 0, 0 KiB with their sources, of at most 64 MiB")
    assert not list(folder.glob("*.o"))


@pytest.mark.skipif(sys.platform == "win32", reason="files have no mode on Windows")
def test_why_a_folder_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    code, text = said("cache")
    assert (code, text) == (
        1,
        f"folder: {folder} not used: others can write to {folder}; to use it, chmod go-w {folder}",
    )
    code, text = said("prebuild", "Adam")
    assert code == 2
    assert "the cache folder is not used: others can write to" in text


def test_a_home_that_cannot_be_found(monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", "~nosuchuser/kernels")
    assert "not used: " in said("cache")[1]


@pytest.mark.parametrize(("arguments", "message"), [
    (("Adam", "--dtype", "int8"), "must be one of float32"),
    (("Adm",), "did you mean Adam?"),
    (("Adam", "-o", "rate=1"), "Adam of float32: "),
])  # fmt: skip
def test_what_cannot_be_built_is_named(folder, arguments, message):
    code, text = said("prebuild", *arguments)
    assert code == 2
    assert message in text
