"""`Telemetry`: what is measured, what is kept, who is told, and what happens when they fail."""

import copy
import gc
import io
import math
import os
import pickle
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from telemetry_helpers import NAMES, raw

from surefoot.telemetry import JsonLines, Live, RawStep, Sink, Telemetry, as_telemetry
from surefoot.telemetry.live import sparkline
from surefoot.telemetry.record import Record, fetch


class Kept(Sink):
    """Keeps what it gets; fails when told to."""

    def __init__(self, flush_every=1, fail_at=None):
        super().__init__(flush_every)
        self.batches, self.closed, self.fail_at = [], 0, fail_at

    def write(self, records):
        if any(record.step == self.fail_at for record in records):
            raise OSError(28, "No space left on device")
        self.batches.append([record.step for record in records])

    def close(self):
        self.closed += 1

    def __repr__(self):
        return "Kept()"


# What is measured


@pytest.mark.parametrize(
    ("parameters", "chosen"),
    [
        (None, NAMES),
        ("*.weight", NAMES[:2]),
        (["embed.*", "*.bias"], (NAMES[0], NAMES[2])),
        (lambda name: name.startswith("blocks"), NAMES[1:]),
    ],
)
def test_parameters_are_selected_by_name(parameters, chosen):
    telemetry = Telemetry(parameters)
    assert tuple(filter(telemetry.selects, NAMES)) == chosen
    assert tuple(filter(pickle.loads(pickle.dumps(telemetry)).selects, NAMES)) == chosen


@given(every=st.integers(1, 50), steps=st.integers(0, 200))
def test_every_so_many_steps_from_the_first(every, steps):
    telemetry = Telemetry(every=every)
    assert [step for step in range(1, steps + 1) if telemetry.wanted(step)] == list(range(1, steps + 1, every))


def test_a_pattern_that_matches_nothing_is_reported_once():
    telemetry = Telemetry(["embed.wieght", "blocks.*"])
    chosen = [name for name in NAMES if telemetry.selects(name)]
    with pytest.warns(UserWarning, match=re.escape("'embed.wieght' matches no parameter; there are: embed.weight")):
        telemetry.record(raw(names=chosen))
    telemetry.record(raw(2, names=chosen))


# Numbers


def test_numbers_of_a_parameter_and_of_all():
    record = Record(raw(7, [(9, 400, 0.0004, 2, 0), (16, 100, 0, 3, 0), (0, 0, 4, 0, 0)], lrs=(0.1, 0.1, 0.2)))
    row = record["embed.weight"]
    assert (row.grad_norm, row.param_norm, row.update_norm, row.max_grad, row.nonfinite) == (3, 20, 0.02, 2, 0)
    assert math.isclose(row.update_ratio, 1e-3)
    assert (record["blocks.0.weight"].update_ratio, record["blocks.0.bias"].update_ratio) == (0, math.inf)
    assert [row.lr for _, row in record.items()] == [0.1, 0.1, 0.2]
    total = record.total
    assert (total.grad_norm, total.param_norm, total.max_grad) == (5, math.sqrt(500), 3)
    assert math.isclose(total.update_ratio, math.sqrt(4.0004 / 500))
    assert math.isnan(total.lr)
    assert Record(raw()).total.lr == 0.1
    assert Record(raw(names=())).total.grad_norm == 0


def test_what_is_not_finite_shows():
    record = Record(raw(1, [(9, 400, 0.0004, 2, 0), (math.nan, 1, math.nan, math.inf, 5), (1, 1, 1, 1, 0)]))
    assert record["blocks.0.weight"].nonfinite == record.total.nonfinite == 5
    assert math.isnan(record.total.grad_norm)
    assert record.total.max_grad == math.inf


@given(st.lists(st.tuples(*[st.floats(0, 1e300)] * 4, st.integers(0, 10**9)), min_size=1, max_size=5))
def test_totals_are_those_of_one_long_vector(rows):
    record = Record(raw(1, rows, names=[str(index) for index in range(len(rows))]))
    grads = [row.grad_norm for _, row in record.items()]
    assert math.isclose(record.total.grad_norm, math.hypot(*grads), rel_tol=1e-12)
    assert record.total.nonfinite == sum(row[4] for row in rows)


def test_tensors_are_read_only_when_somebody_looks():
    class Watched(torch.Tensor):
        reads = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__float__, torch.Tensor.item):
                cls.reads += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    step = raw(clip=torch.tensor(0.25).as_subclass(Watched))
    seen = []
    telemetry = Telemetry(callbacks=seen.append)
    telemetry.record(step)
    repr(telemetry.latest())
    assert Watched.reads == 0
    assert seen == [telemetry.latest()]
    assert seen[0].clip == 0.25
    assert Watched.reads == 1


def test_records_of_a_device_are_fetched_together(monkeypatch):
    records = [Record(raw(step, [(float(step), 1, 1, 1, 0)] * 3)) for step in range(4)]
    expected = [float(step) for step in range(4)]
    for record in records:  # as if they were elsewhere
        object.__setattr__(record.raw, "sums", record.raw.sums.to("meta"))
    stacked = []

    def stack(tensors, *, real=torch.stack):
        stacked.append(len(tensors))
        return real([torch.full((3, 5), value, dtype=torch.float64) for value in expected])

    monkeypatch.setattr(torch, "stack", stack)
    fetch(records)
    assert stacked == [4]
    assert [record.sums[0, 0] for record in records] == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sums": torch.zeros(2, 5, dtype=torch.float64)}, "`sums` must be float64 of shape (3, 5), one row for each"),
        ({"sums": torch.zeros(3, 5)}, "but is torch.float32 of shape (3, 5)"),
        ({"lrs": (0.1, 0.2)}, "`lrs` must be 1 or 3 numbers, as many as `names`, but are 2"),
    ],
)
def test_a_raw_step_that_does_not_fit_is_refused(wrong, message):
    given = {"step": 1, "names": NAMES, "sums": torch.zeros(3, 5, dtype=torch.float64), "lrs": (0.1,)}
    with pytest.raises(ValueError, match=re.escape(message)):
        RawStep(**(given | wrong))


def test_a_name_that_was_not_measured():
    with pytest.raises(KeyError, match="'head' was not measured in step 1; there are: embed.weight, blocks.0.weight"):
        Record(raw())["head"]


# Looking


TABLE = """\
step 12   3 ms   clip factor 0.25   2 skipped so far
                 gradient  weights  update  update/weights  max |gradient|  non-finite   lr
total               5.745    34.66     0.3        0.008657               4           2  0.1
embed.weight            3       20     0.2            0.01               2           -  0.1
blocks.0.weight         3       20     0.2            0.01               2           -  0.1
blocks.0.bias       3.873    20.02     0.1        0.004994               4           2  0.1"""


def test_the_latest_prints_as_a_table():
    telemetry = Telemetry()
    assert telemetry.latest() is None
    rows = [(9, 400, 0.04, 2, 0), (9, 400, 0.04, 2, 0), (15, 401, 0.01, 4, 2)]
    telemetry.record(raw(12, rows, clip=0.25, skipped=2, seconds=0.003))
    assert str(telemetry.latest()) == TABLE


def test_a_long_table_says_what_it_leaves_out():
    names = [f"p{index}" for index in range(100)]
    text = str(Record(raw(names=names)))
    assert "p39" in text
    assert "p40" not in text
    assert text.splitlines()[-1].strip() == "60 more parameters: record.table()"
    assert repr(Record(raw(names=names))) == "Record(step=1, parameters=100)"


def test_history_keeps_the_newest():
    telemetry = Telemetry(history=3)
    for step in range(1, 8):
        telemetry.record(raw(step))
    assert [record.step for record in telemetry.history] == [5, 6, 7]
    assert telemetry.latest().step == 7
    assert repr(telemetry) == "Telemetry(parameters: all; every 1; 3 records)"


# Sinks and callbacks


@given(flush_every=st.integers(1, 9), steps=st.integers(0, 30))
def test_a_sink_gets_every_record_once_and_in_order(flush_every, steps):
    sink = Kept(flush_every)
    telemetry = Telemetry(sinks=[sink])
    for step in range(steps):
        telemetry.record(raw(step))
    assert all(len(batch) == flush_every for batch in sink.batches)
    telemetry.close()
    telemetry.close()
    assert [step for batch in sink.batches for step in batch] == list(range(steps))
    assert sink.closed == 1
    telemetry.record(raw(99))
    assert sink.batches[-1:] != [[99]]
    assert telemetry.latest().step == 99


def test_a_failing_sink_is_left_out_and_training_goes_on():
    bad, good = Kept(fail_at=2), Kept()
    telemetry = Telemetry(sinks=[bad, good])
    telemetry.record(raw(1))
    with pytest.warns(RuntimeWarning, match=re.escape("the telemetry sink Kept() failed and gets nothing from now on")):
        telemetry.record(raw(2))
    telemetry.record(raw(3))
    assert (bad.batches, good.batches) == ([[1]], [[1], [2], [3]])
    assert (bad.closed, good.closed) == (1, 0)


def test_a_failing_callback_ends_the_step_after_everyone_was_told():
    def stop(record):
        if record.step == 2:
            raise StopIteration("loss exploded")

    seen, sink = [], Kept()
    telemetry = Telemetry(callbacks=[stop, lambda record: seen.append(record.step)], sinks=sink)
    telemetry.record(raw(1))
    with pytest.raises(StopIteration, match="loss exploded"):
        telemetry.record(raw(2))
    telemetry.record(raw(3))
    assert seen == [1, 2, 3]
    assert sink.batches == [[1], [2], [3]]


def test_sinks_are_closed_when_the_telemetry_goes():
    sink = Kept(flush_every=100)
    telemetry = Telemetry(sinks=sink)
    telemetry.record(raw(1))
    del telemetry
    gc.collect()
    assert (sink.batches, sink.closed) == ([[1]], 1)


def test_what_waits_is_written_at_the_end_of_the_program(tmp_path):
    code = (
        "import sys, torch; from surefoot.telemetry import *\n"
        "t = Telemetry(sinks=JsonLines(sys.argv[1], flush_every=100))\n"
        "t.record(RawStep(1, ('w',), torch.ones(1, 5, dtype=torch.float64), (0.1,)))\n"
        "raise SystemExit(3)"
    )
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-c", code, path], check=False)  # noqa: S603
    assert done.returncode == 3
    assert len(path.read_text().splitlines()) == 2


def test_a_forked_child_writes_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    telemetry = Telemetry(sinks=JsonLines(path, flush_every=2))
    telemetry.record(raw(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        try:
            telemetry.record(raw(2))
            telemetry.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    telemetry.record(raw(2))
    telemetry.close()
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("rank", "every_rank", "written"), [("0", False, True), ("1", False, False), ("1", True, True)]
)
def test_the_first_rank_writes(tmp_path, monkeypatch, rank, every_rank, written):
    monkeypatch.setenv("RANK", rank)
    telemetry = Telemetry(sinks=JsonLines(tmp_path / "run.jsonl", every_rank=every_rank))
    telemetry.record(raw(1))
    telemetry.close()
    assert (tmp_path / "run.jsonl").exists() == written
    assert telemetry.latest().step == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_measure_the_same_and_have_no_sinks(tmp_path, duplicate):
    path = tmp_path / "run.jsonl"
    telemetry = Telemetry("*.weight", every=5, history=9, sinks=JsonLines(path), callbacks=lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        telemetry.record(raw(1))
    twin = duplicate(telemetry)
    assert twin.latest() is None
    assert (twin.every, twin.selects("a.weight"), twin.selects("a.bias")) == (5, True, False)
    for step in range(20):
        twin.record(raw(step))
    assert len(twin.history) == 9
    telemetry.close()
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "`every` must be 1 or more, but is 0"),
        ({"every": True}, TypeError, "`every` must be a whole number, but is True"),
        ({"history": 2.5}, TypeError, "`history` must be a whole number, but is 2.5"),
        ({"history": 0}, ValueError, "`history` must be 1 or more, but is 0"),
        ({"parameters": []}, TypeError, "`parameters` must be None (all), one or several patterns"),
        ({"parameters": 3}, TypeError, "or a function of a name, but is 3"),
        ({"parameters": ["a", 1]}, TypeError, "but is ['a', 1]"),
        ({"sinks": "run.jsonl"}, TypeError, "`sinks` must be JsonLines, TensorBoard, Live or a Sink"),
        ({"sinks": [JsonLines]}, TypeError, "or a list of them, but got <class"),
        ({"callbacks": "print"}, TypeError, "`callbacks` must be functions of a Record, or a list of them"),
    ],
)
def test_mistakes_in_options_are_named(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Telemetry(**options)


def test_a_sink_serves_one_telemetry():
    sink = Kept()
    first = Telemetry(sinks=sink)
    with pytest.raises(ValueError, match=re.escape("Kept() serves another Telemetry already; make a sink for each")):
        Telemetry(sinks=sink)
    first.close()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "`flush_every` must be 1 or more, but is 0"),
        (1.0, TypeError, "`flush_every` must be a whole number, but is 1.0"),
    ],
)
def test_flush_every_is_checked(value, error, message):
    with pytest.raises(error, match=message):
        Kept(value)


def test_the_option_of_an_optimizer_is_read():
    telemetry = Telemetry()
    assert as_telemetry(telemetry) is telemetry
    assert as_telemetry(None) is as_telemetry(False) is None
    assert isinstance(as_telemetry(True), Telemetry)
    with pytest.raises(TypeError, match="`telemetry` must be True, False, None or a surefoot.telemetry.Telemetry"):
        as_telemetry("yes")


# The live view


def test_the_live_view_shows_what_moves_most():
    console = Console(width=140, force_terminal=True, color_system=None)
    with console.capture() as capture:
        telemetry = Telemetry(sinks=Live(seconds=0, rows=2, console=console))
        rows = [(9, 400, 0.0004, 2, 0), (4, 1, 0.01, 1, 0), (math.nan, 1, 0, math.inf, 3)]
        for step in (1, 2):
            telemetry.record(raw(step, rows))
        telemetry.close()
    text = capture.get()
    assert "step 2" in text
    last = text[text.rindex("step 2") :]
    assert last.index("blocks.0.bias") < last.index("blocks.0.weight")
    assert "embed.weight" not in last


def test_the_live_view_on_a_terminal_of_ascii():
    """Nor are brackets in a name taken for markup."""
    raw_output = io.BytesIO()
    with io.TextIOWrapper(raw_output, encoding="ascii") as file:
        live = Live(seconds=0, console=Console(file=file, width=140, force_terminal=True, color_system=None))
        names = ("a[bold]", "b\x1b[31m", "c[/x]")
        live.write([Record(RawStep(step, names, torch.full((3, 5), float(step)).double(), (1.0,))) for step in (1, 2)])
        live.close()
        file.flush()
        text = raw_output.getvalue().decode("ascii")
    assert "gradient norm  _#" in text
    assert all(name in text for name in ("a[bold]", "b\\x1b[31m", "c[/x]"))
    assert all(
        name in str(Record(RawStep(1, names, torch.zeros(3, 5).double(), (1.0,)))) for name in ("a[bold]", "c[/x]")
    )


def test_the_live_view_waits_between_pictures():
    live = Live(seconds=1000, console=Console(file=io.StringIO(), force_terminal=True))
    assert live.due(1)
    live.write([Record(raw(1))])
    assert not live.due(1000)
    live.close()
    assert repr(live) == "Live(seconds=1000, rows=20)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": -1}, "`seconds` must be 0 or more, but is -1"),
        ({"rows": 0}, "`rows` must be 1 or more, but is 0"),
    ],
)
def test_the_live_view_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        Live(**options)


@pytest.mark.parametrize(
    ("values", "drawn"), [([], ""), ([1, 1], "▁▁"), ([0, 7, math.nan, 3.5], "▁█!▅"), ([math.inf], "!")]
)
def test_a_sparkline(values, drawn):
    assert sparkline(values) == drawn


def test_arrays_of_a_record():
    record = Record(raw())
    np.testing.assert_array_equal(record.values["grad_norm"], [3, 3, 3])
    np.testing.assert_array_equal(record.lrs, [0.1, 0.1, 0.1])
