"""The notebooks of examples/ run and show what they say; SUREFOOT_UPDATE_GOLDEN=1 renews the output they keep."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from surefoot.cli import app

FOLDER = Path(__file__).parents[1] / "examples"
UPDATE = os.environ.get("SUREFOOT_UPDATE_GOLDEN") == "1"


def executed(name, monkeypatch):
    """Run a notebook's cells in order; return what names stand for then, and of each cell the text and that kept."""
    monkeypatch.syspath_prepend(FOLDER)  # as in Jupyter, which starts where the notebook is
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent / "src"))
    path = FOLDER / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    scope, texts = {"__name__": "__main__"}, []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        code = compile("".join(cell["source"]), f"{name}[{number}]", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, scope)  # noqa: S102 (what we ourselves have written)
        texts.append((printed.getvalue(), "".join("".join(output["text"]) for output in cell["outputs"])))
        lines = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    if UPDATE:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return scope, [(now, now) for now, _ in texts]
    return scope, texts


def same_shape(texts):
    """Whether cells print as many lines as they did when their output was kept: numbers may differ between machines."""
    return all(len(now.splitlines()) == len(kept.splitlines()) for now, kept in texts)


def test_five_minutes(monkeypatch):
    scope, texts = executed("five_minutes", monkeypatch)
    assert same_shape(texts)
    assert scope["found"].step == 40
    assert scope["optimizer"].step_statistics.skipped == 0


def test_a_diverging_run(monkeypatch):
    scope, texts = executed("diverging_run", monkeypatch)
    other = ("Which layer blew up first?", "the first gradient that is not finite")  # when and where, numbers decide
    assert same_shape([(now, kept) for now, kept in texts if not any(text in now for text in other)])
    assert 35 < scope["broken"] < 60
    (report,) = (now for now, _ in texts if "Which layer blew up first?" in now)
    good, bad = report.split("lr 3.0")
    assert "None: no gradient was inf or NaN" in good
    assert "Is the learning rate too high? No." in good
    assert re.search(r"Layer `[\w.]+` .* went first", bad)  # which, the help texts of a version of Python decide
    assert "Is the learning rate too high? Probably" in bad


def command_here(command, **_):
    """Run `python -m surefoot ...` in this process, which has imported torch."""
    assert command[:3] == [sys.executable, "-m", "surefoot"]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, command[3:])
    return subprocess.CompletedProcess(command, result.exit_code, result.output)


def test_the_memory_of_a_fine_tuning(monkeypatch):
    monkeypatch.setattr("subprocess.run", command_here)
    scope, texts = executed("memory_of_fine_tuning", monkeypatch)
    assert same_shape(texts)
    moved = scope["moved"]
    assert moved.pop("bfloat16, to nearest") < 0.3
    assert list(moved.values()) == pytest.approx([1.0] * 4, abs=0.05)
    assert "LLaMA 7B" in texts[-1][0]
