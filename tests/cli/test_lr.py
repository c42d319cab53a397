"""`surefoot lr plot`: the drawing, the picture, and what it says about mistakes."""

import inspect
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from surefoot.cli import main
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


# Odd terminals and odd numbers

DIGITS = "9" * 3000


@pytest.mark.parametrize("columns", ["1", "10", "11", "13", "19", "100000000"])
def test_a_terminal_of_any_width(columns):
    result = CliRunner(env={"COLUMNS": columns, "TERM": "dumb"}).invoke(app, ["plot", "constant()", "--height", "3"])
    assert result.exit_code == 0, result.exception
    assert "steps" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"constant({DIGITS})"], "has a number that is too large"),
        ([f"linear(1, 0, {DIGITS})"], "has a number that is too large"),
        ([f"linear(1, 0, 1) * {DIGITS}"], "999"),
        ([f"join(constant(), constant(), at=[{DIGITS}])"], "too large"),
        (["linear(1, 0, 1e300)"], "it lasts 1e+300 steps; say how many to draw"),
        (["constant()", "--steps", DIGITS], "--steps"),
        (["constant(1e308) * constant(1e10)"], "at step 0 it is inf; give smaller numbers"),
        (["constant(1e308)", "--lr", "1e10"], "at step 0 it is inf; give smaller numbers"),
        (["constant()", "--lr", "nan"], "nan is not a learning rate: give a finite number"),
        (["constant()", "--lr", "1e400"], "inf is not a learning rate"),
        (["constant()", "--height", "2000000000"], "--height"),
        (["constant()", "--width", "2000000000"], "--width"),
        (["{deep}"], "is nested too deeply"),
        (["{large}"], "has a number that is too large"),
        (["{larger}"], "Exceeds the limit"),
        (["{bytes}"], "codec can't decode"),
        (["{folder}"], "Is a directory"),
    ],
)
def test_numbers_and_files_that_cannot_be_drawn(tmp_path, arguments, message):
    places = {name: tmp_path / f"{name}.json" for name in ("deep", "large", "larger", "bytes", "folder")}
    places["deep"].write_text("[" * 100_000)
    places["large"].write_text(f'{{"schedule": "constant", "factor": {DIGITS}}}')
    places["larger"].write_text(f'{{"schedule": "constant", "factor": {DIGITS * 2}}}')
    places["bytes"].write_bytes(b"\xff\xfe")
    places["folder"].mkdir()
    result = plot(*(str(places.get(one.strip("{}"), one)) for one in arguments))
    assert result.exit_code == 2, result.exception
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_largest_numbers_are_drawn():
    result = plot("constant(1.7e308)", "constant(-1.7e308)", "linear(1, 0, 1e15)", *SMALL)
    assert result.exit_code == 0, result.exception
    assert "1.7e+308 │" in result.output
    assert "1049999999999999 steps" in result.output


def test_a_long_schedule_becomes_a_picture(tmp_path):
    result = plot("linear(1, 0, 1e15)", *SMALL, "--png", str(tmp_path / "x.png"))
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.PDF", "x"])
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name):
    written = tmp_path / (name if "." in name else f"{name}.png")
    written.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surefoot.files.os.replace", full)
    result = plot("constant()", *SMALL, "--png", str(tmp_path / name))
    assert result.exit_code == 2
    assert "was not written: [Errno 28] No space left on device" in result.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    monkeypatch.undo()
    assert plot("constant()", *SMALL, "--png", str(tmp_path / name)).exit_code == 0
    assert [*tmp_path.iterdir()] == [written]
    assert written.stat().st_size > 1000


def test_a_file_type_that_is_none(tmp_path):
    result = plot("constant()", *SMALL, "--png", str(tmp_path / "x.xyz"))
    assert result.exit_code == 2
    assert "was not written: Format 'xyz' is not supported" in result.output


def test_a_terminal_of_ascii(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = ["lr", "plot", "warmup(50, linear(1, 0, 50))", *SMALL, "--steps", "101"]
    monkeypatch.setattr(sys, "argv", ["surefoot", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    stdout.flush()
    lines = [line.rstrip() for line in stdout.buffer.getvalue().decode("ascii").splitlines()]
    assert lines[:6] == [
        "         1 |           ..''..",
        "           |        ..''    ''..",
        "           |     ..''          ''..",
        "      0.25 |   .''                ''.",
        "         0 |.:'                      ':.",
        "           +----------------------------",
    ]
