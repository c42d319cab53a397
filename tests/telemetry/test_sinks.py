"""JSON Lines and TensorBoard: what is written can be read again, whatever the numbers and however a run ended."""

import json
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_helpers import NAMES, raw

from surefoot.telemetry import JsonLines, RawStep, Telemetry, TensorBoard, read
from surefoot.telemetry.record import Record
from surefoot.telemetry.sinks import line_of

NUMBERS = st.floats(min_value=0) | st.just(math.nan)
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 10**6)), min_size=3, max_size=3)


def write(path, *steps, **options):
    telemetry = Telemetry(sinks=JsonLines(path, **options))
    for step in steps:
        telemetry.record(step)
    telemetry.close()


@given(rows=ROWS, clip=st.floats(0, 1), lrs=st.sampled_from([(0.1,), (0.1, 0.1, 0.1), (0.1, 0.2, 1e-5)]))
def test_what_is_written_is_read(tmp_path_factory, rows, clip, lrs):
    path = tmp_path_factory.mktemp("runs") / "run.jsonl"
    step = raw(3, rows, clip=clip, lrs=lrs, skipped=2, seconds=0.25)
    write(path, step)
    (line,) = read(path)
    values = Record(step).values
    assert (line.step, line.names, line.skipped, line.seconds) == (3, NAMES, 2, 0.25)
    assert math.isclose(line.clip, clip, rel_tol=1e-5)
    for ours, theirs in [
        (line.grad, values["grad_norm"]),
        (line.param, values["param_norm"]),
        (line.update, values["update_norm"]),
        (line.max_grad, values["max_grad"]),
        (line.nonfinite, values["nonfinite"]),
        (line.lrs, Record(step).lrs),
    ]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_file_is_plain_json(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, raw(1, [(math.nan, 4, math.inf, 1, 2), (9, 4, 0, 1, 0), (2, 4, 0, 1, 0)], lrs=(0.1, 0.1, 0.3)))

    def refuse(constant):
        raise AssertionError(constant)

    header, line = (json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines())
    assert header["names"] == list(NAMES)
    assert (header["format"], header["surefoot"]) == (1, "0.1.0")
    assert line["grad"] == ["nan", 3.0, 1.41421]
    assert line["update"] == ["inf", 0.0, 0.0]
    assert line["nonfinite"] == {"0": 2}
    assert line["lr"] == [0.1, 0.1, 0.3]
    assert json.loads(line_of(Record(raw())))["lr"] == 0.1


@settings(deadline=None)
@given(cut=st.integers(min_value=1))
def test_a_killed_run_is_read_up_to_its_last_whole_line(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("runs") / "run.jsonl"
    write(path, *map(raw, range(1, 6)))
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    kept = whole[: max(header, len(whole) - cut % len(whole))]
    path.write_bytes(kept)
    # A last line that lacks nothing but its line feed is whole.
    assert [line.step for line in read(path)] in (
        [1, 2, 3, 4, 5][: (n := kept.count(b"\n") - 1)],
        list(range(1, n + 2)),
    )
    write(path, raw(6), append=True)
    *_, before, after = [0, *(line.step for line in read(path))]
    assert (before, after) == (n, 6)


def test_being_killed_loses_what_waits_and_no_more(tmp_path):
    code = (
        "import os, signal, sys, torch; from surefoot.telemetry import *\n"
        "t = Telemetry(sinks=JsonLines(sys.argv[1], flush_every=4))\n"
        "for step in range(1, 11):\n"
        "    t.record(RawStep(step, ('w',), torch.ones(1, 5, dtype=torch.float64), (0.1,)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "run.jsonl"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9  # noqa: S603
    assert [line.step for line in read(path)] == list(range(1, 9))


def test_parameters_may_change(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, raw(1), raw(2, names=NAMES[:1]), raw(3, names=NAMES[:1]))
    assert [line.names for line in read(path)] == [NAMES, NAMES[:1], NAMES[:1]]
    assert sum('"names"' in text for text in path.read_text().splitlines()) == 2


def test_a_file_is_overwritten_unless_appended_to(tmp_path):
    path = tmp_path / "run.jsonl"
    for options, steps in (({}, [1]), ({}, [1]), ({"append": True}, [1, 1])):
        write(path, raw(1), **options)
        assert [line.step for line in read(path)] == steps
    path.write_text("half a li")
    write(path, raw(1), append=True)
    assert [line.step for line in read(path)] == [1]


def test_nothing_is_opened_before_there_is_something_to_write(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", "`path` must be a file, but"),
        ("nowhere/run.jsonl", "`path` must be in a folder that exists, but there is"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path, place, message):
    with pytest.raises(ValueError, match=message):
        JsonLines(tmp_path / place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a telemetry file: it must begin with a header that holds `names`"),
        ("loss: 1\n", "is not a telemetry file"),
        ('{"loss": 1}\n{"loss": 2}\n', "is not a telemetry file"),
        ("\x00\xff\n", "is not a telemetry file"),
        ('{"names":["w"],"format":99,"surefoot":"9.0"}\n', "was written by surefoot 9.0, in a newer format (99)"),
        ('{"names":["w"],"format":1,"surefoot":"0.1"}\n{"step":\n{"step": 2}\n', "line 2 is broken (JSONDecodeError"),
        ('{"names":["w"],"format":1,"surefoot":"0.1"}\n{"step":1,"grad":[1,2]}\n{}\n', "2 numbers for 1 parameters"),
    ],
)
def test_what_is_no_telemetry_is_refused(tmp_path, content, message):
    path = tmp_path / "run.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read(path))


def test_names_that_utf_8_cannot_write_are_escaped(tmp_path):
    names = ("\ud800", "ä")
    telemetry = Telemetry(sinks=JsonLines(tmp_path / "run.jsonl"))
    telemetry.record(RawStep(1, names, torch.zeros(2, 5).double(), (1.0,)))
    telemetry.close()
    assert [line.names for line in read(tmp_path / "run.jsonl")] == [names]


def test_tensorboard_gets_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

        telemetry = Telemetry(sinks=TensorBoard(tmp_path / "logs", flush_every=2))
        for step in (1, 2, 3):
            telemetry.record(raw(step, clip=0.5, skipped=1))
        telemetry.close()
        events = EventAccumulator(str(tmp_path / "logs"))
        events.Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["grad_norm/embed.weight"] == [3.0] * 3
    np.testing.assert_allclose(scalars["total/grad_norm"], [math.sqrt(27)] * 3, rtol=1e-6)
    assert scalars["step/clip"] == [0.5] * 3
    np.testing.assert_allclose(scalars["step/lr"], [0.1] * 3, rtol=1e-6)
    assert [event.step for event in events.Scalars("step/skipped")] == [1, 2, 3]
    assert repr(TensorBoard("logs")).endswith("logs')")


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=re.escape("needs the package tensorboard; install it with `pip install")):
        TensorBoard(tmp_path)
