"""The command `surefoot bench`: its options, what it prints and writes, and how it ends."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from surefoot import benchmark
from surefoot.benchmark import COMPILED, EAGER, FOR_LOOP, FOREACH, FUSED, MEMORY_BOUND, OURS, Measurement
from surefoot.cli import app
from surefoot.optimizers import NOT_IN_TORCH

VARIANTS = ", ".join(benchmark.VARIANTS)
MODELS = "overhead, tiny, medium, large, mlp1000, resnet50, gpt2-small"


def invoke(*arguments):
    """Run the command; gives the exit status and what was printed, without frames and line breaks."""
    result = CliRunner().invoke(app, ("bench", *arguments), env={"COLUMNS": "100"})
    return result.exit_code, " ".join(re.sub("[╭╮╰╯│─]", " ", result.output).split())


@pytest.fixture
def measured(monkeypatch):
    """Replace measuring by numbers; gives the list of what was to be measured."""
    asked = []

    def measure(case, *, seconds, compiled):
        asked.append((str(case), seconds, compiled))
        in_torch = case.variant.optimizer not in NOT_IN_TORCH
        theirs = {FOR_LOOP: 300.0, FOREACH: 4.0, FUSED: 3.0} | ({COMPILED: 2.5} if compiled else {})
        times = {**(theirs if in_torch else {EAGER: 8.0}), OURS: 2.0, MEMORY_BOUND: 1.6}
        wrong = [FUSED] if case.variant.optimizer == "SGD" else []
        seconds = {name: 1e-3 * np.array([value] * 3) for name, value in times.items() if name not in wrong}
        return Measurement(case, seconds, wrong, 12.0 if compiled else 0.0)

    monkeypatch.setattr(benchmark, "measure", measure)
    return asked


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--optimizer", "Adamm", f"there is no 'Adamm'; did you mean Adam? Choose of {VARIANTS}, or all."),
        ("--optimizer", "xyz", f"there is no 'xyz'; choose of {VARIANTS}, or all."),
        ("--model", "resnet", f"there is no 'resnet'; did you mean resnet50? Choose of {MODELS}, or all."),
        ("--dtype", "float8", "there is no 'float8'; did you mean float32? Choose of float32, bfloat16, or all."),
        ("--seconds", "0", "0 seconds cannot be measured: give a positive number."),
        ("--seconds", "nan", "nan seconds cannot be measured: give a positive number."),
        ("--seconds", "inf", "inf seconds cannot be measured: give a positive number."),
    ],
)
def test_options_that_cannot_be(option, value, message, measured):
    status, printed = invoke(option, value)
    assert status == 2
    assert f"Invalid value for '{option}': {message}" in printed
    assert not measured


def test_files_that_cannot_be_written(tmp_path, monkeypatch, measured):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    wrong = {
        "folder": "'folder' cannot be written: it is a folder. Name a file in a folder of yours.",
        "none/x.csv": f"'none/x.csv' cannot be written: there is no folder '{tmp_path}/none'. "
        "Name a file in a folder of yours.",
    }
    for name, message in wrong.items():
        status, printed = invoke("--csv", name)
        assert status == 2
        assert f"Invalid value for '--csv': {message}".replace(" ", "") in printed.replace(" ", "")
    assert not measured


def test_without_options(measured):
    status, _ = invoke()
    assert status == 0
    titles = ("1000 x 1 k", "200 x 100 k", "8 x 4 M")
    assert measured == [(f"AdamW, {title}, float32", 3.0, False) for title in titles]


def test_a_selection(measured):
    selection = ("--optimizer", "sgd", "--optimizer", "NADAM", "--model", "GPT2-small", "--dtype", "all")
    status, _ = invoke(*selection, "--seconds", "1", "--compile")
    assert status == 0
    assert measured == [
        (f"{name}, GPT-2 small, {dtype}", 1.0, True) for dtype in ("float32", "bfloat16") for name in ("SGD", "NAdam")
    ]


def test_everything(measured):
    assert invoke("--optimizer", "all", "--model", "all", "--dtype", "all")[0] == 0
    assert len({name for name, *_ in measured}) == len(measured) == len(benchmark.VARIANTS) * 7 * 2


def test_what_is_printed(measured):
    _, printed = invoke("--optimizer", "SGD", "--optimizer", "AdamW", "--model", "large", "--compile")
    assert "8 x 4 M, float32: milliseconds a step" in printed
    assert "SGD 300 4.00 wrong 2.50 2.00 1.60 2.00 ±0% 1.25 ±0%" in printed
    assert "AdamW 300 4.00 3.00 2.50 2.00 1.60 1.50 ±0% 1.25 ±0%" in printed
    assert "8 x 4 M, float32: mean speed-up 1.73, least 1.50" in printed
    assert "torch.compile took 12.0 to 12.0 s; it does not count as torch's best." in printed
    assert "wrong: left out, its step computes something else than torch's for-loop." in printed


@pytest.mark.usefixtures("measured")
def test_what_torch_does_not_have_is_apart_and_has_no_speedup():
    chosen = ("--optimizer", "LAMB", "--optimizer", "AdamW", "--optimizer", "lion")
    status, printed = invoke(*chosen, "--model", "large", "--compile")
    assert status == 0
    assert "AdamW 300 4.00 3.00 2.50 2.00 1.60 1.50 ±0% 1.25 ±0%" in printed
    assert (
        "surefoot memory over eager surefoot bound speed-up bound LAMB 8.00 2.00 1.60 - 1.25 ±0% Lion 8.00 2.00 1.60 -"
        in printed
    )
    assert "surefoot eager: the algorithm by torch's operations, where torch.optim does not have it" in printed
    assert "mean speed-up" not in printed


@pytest.mark.usefixtures("measured")
def test_the_csv_file(tmp_path):
    path = tmp_path / "x.csv"
    status, printed = invoke("--csv", str(path), "--model", "tiny")
    assert status == 0
    assert printed.endswith(f"Written: {path}")
    assert [line.contender for line in benchmark.read_csv(path)] == [FOR_LOOP, FOREACH, FUSED, OURS, MEMORY_BOUND]


def test_too_little_memory(measured, monkeypatch):
    monkeypatch.setattr(benchmark.rounds, "_free_memory", lambda: 1e9)
    status, printed = invoke("--model", "large")
    assert status == 1
    assert printed.startswith("surefoot bench: AdamW, 8 x 4 M, float32: measuring takes about 2.4 GB of memory")
    assert not measured


def test_an_interruption_shows_what_there_is(measured, monkeypatch):
    measure = benchmark.measure

    def interrupt_the_second(case, **options):
        if measured:
            raise KeyboardInterrupt
        return measure(case, **options)

    monkeypatch.setattr(benchmark, "measure", interrupt_the_second)
    status, printed = invoke()
    assert status == 130
    assert "AdamW 300 4.00 3.00 2.00 1.60" in printed
    assert printed.endswith("surefoot bench: interrupted.")


def test_help_names_what_there_is():
    _, printed = invoke("--help")
    assert all(name in printed for name in (*benchmark.SHAPE_LISTS, *benchmark.DTYPES, "--csv", "--compile"))
    lists = (benchmark.SHAPE_LISTS[name] for name in ("overhead", "tiny", "medium", "large"))
    assert ", ".join(f"{shapes.name} ({shapes.title})" for shapes in lists) in printed
