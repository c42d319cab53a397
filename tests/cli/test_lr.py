"""`surefoot lr plot`: the drawing, the picture, and what it says about mistakes."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from surefoot.cli.lr import app
from surefoot.cli.lr import plot as plot_command
from surefoot.lr_scheduler.plot import braille, default_steps
from surefoot.lr_scheduler.schedules import constant, cosine, linear, warmup

SMALL = ["--width", "40", "--height", "5"]

EXPECTED = [
    "         1 │           ⢀⠤⠊⠑⠤⡀",
    "           │        ⢀⡠⠊⠁    ⠈⠑⢄⡀",
    "           │     ⢀⡠⠒⠁          ⠈⠒⢄⡀",
    "      0.25 │   ⡠⠒⠁                ⠈⠒⢄",
    "         0 │⡠⠔⠉                      ⠉⠢⢄",
]


def plot(*arguments):
    # A wide terminal keeps messages on one line.
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, ["plot", *arguments])


def test_a_schedule_is_drawn():
    result = plot("warmup(50, linear(1, 0, 50))", *SMALL, "--steps", "101")
    assert result.exit_code == 0
    assert [line.rstrip() for line in result.output.splitlines()[:5]] == EXPECTED
    assert "0                  100 steps" in result.output
    assert "warmup(50, linear(1, 0, 50))" in result.output


def test_several_are_drawn_with_a_learning_rate():
    result = plot("constant(0.5)", "cosine(1, 0, 100)", *SMALL, "--lr", "3e-4")
    assert result.exit_code == 0
    assert "0.0003 │" in result.output
    assert "105" not in result.output
    assert "104 steps" in result.output


def test_a_json_file_is_drawn(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(warmup(10, cosine(1, 0, 90)).to_json(), encoding="utf-8")
    assert plot(str(path), *SMALL).exit_code == 0
    path.write_text("{}", encoding="utf-8")
    result = plot(str(path))
    assert result.exit_code == 2
    assert "there is no schedule 'None'" in result.output


def test_a_picture_is_written(tmp_path):
    path = tmp_path / "schedule.png"
    result = plot("cosine(1, 0, 90)", "step(30)", *SMALL, "--png", str(path))
    assert result.exit_code == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "wrote" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cosine(1, 0,"], "'cosine(1, 0,' is no schedule"),
        (["cosine(1, 0, -3)"], "`steps` must be a number in [0, inf)"),
        (["nowhere.json"], "No such file"),
        (["constant()", "--png", "/nowhere/x.png"], "/nowhere/x.png was not written"),
        (["constant()", "--steps", "0"], "--steps"),
    ],
)
def test_mistakes_are_named(arguments, message):
    result = plot(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_help_needs_no_torch():
    path = inspect.getsourcefile(plot_command)
    code = f"import runpy, sys; runpy.run_path({path!r}); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_braille_draws_each_dot_where_it_belongs():
    assert braille(np.array([0.0, 1.0]), 0.0, 1.0, 1, 1) == ["⡸"]
    assert braille(np.array([1.0, 1.0, 0.0, 0.0]), 0.0, 1.0, 2, 2) == ["⠉⡆", " ⣇"]
    assert braille(np.array([0.5, 0.5]), 0.5, 0.5, 1, 1) == ["⠉"]
    lines = braille(np.linspace(0, 1, 80), 0.0, 1.0, 40, 10)
    assert [len(line) for line in lines] == [40] * 10
    assert lines[-1][0] != " " != lines[0][-1]


def test_default_steps_end_after_the_last_horizon():
    assert default_steps([linear(1, 0, 100), constant()]) == 105
    assert default_steps([constant()]) == 1000
    assert math.isclose(default_steps([warmup(0.5)]), 1)
