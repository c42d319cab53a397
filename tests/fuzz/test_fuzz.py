"""The fuzzer in the suite: a fixed number of cases, and every case in which it has found a fault.

For more: `python tests/fuzz/fuzz.py --malloc --cases 1000000`.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from averages import draw_averages
from cases import Case, Round, draw_case
from faults import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loops import LoopCase, draw_loop
from worlds import FEW, Kind

import fuzz

DRIVER = Path(__file__).with_name("fuzz.py")


def drive(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the driver under the allocator's checks."""
    command = [sys.executable, str(DRIVER), *arguments]
    return subprocess.run(command, env=fuzz.with_malloc_checks(), capture_output=True, text=True, check=False)  # noqa: S603


def test_bytes_beside_a_parameter_are_noticed(monkeypatch):
    """The fuzzer would see a kernel that writes one element too many."""
    step = fuzz.take_step

    def careless(world, *arguments):
        found = step(world, *arguments)
        if world.who == "ours":
            param = world.params[0]
            ctypes.memset(param.data_ptr() + param.nbytes, 65, 1)
        return found

    monkeypatch.setattr(fuzz, "take_step", careless)
    with pytest.raises(fuzz.Failure, match="wrote outside"):
        fuzz.run(Case("sgd", "eager", (Kind(0, 1),), (Round(),)))


@pytest.mark.parametrize("engine", ["eager", "foreach", "default"])
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_steps_are_right_or_refused(engine, data):
    threads = torch.get_num_threads()
    try:
        fuzz.run(draw_case(lambda below: data.draw(st.integers(0, below - 1)), engines=(engine,), settings=FEW))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_averages_are_right_or_refused(data):
    fuzz.run(draw_averages(lambda below: data.draw(st.integers(0, below - 1))))


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_what_is_kept_between_steps_changes_no_bit(data):
    fuzz.run(draw_loop(lambda below: data.draw(st.integers(0, below - 1)), settings=FEW))


def test_a_cache_that_misses_a_change_is_noticed(monkeypatch):
    case = LoopCase(
        "adam", kinds=(Kind(0, 0),), rounds=(*[Round()] * 4, Round(moves=(("data in another layout", 0, 0, 0),)))
    )
    assert fuzz.run(case)["stepped"] == len(case.rounds)
    monkeypatch.setattr("surefoot.step.fast_lane.FastLane._look", lambda *_: None)
    with pytest.raises(fuzz.Failure, match="what is kept changes bits"):
        fuzz.run(case)


def test_what_was_wrong_once_is_right_and_memory_stays_whole():
    """Every case of `faults.py`, and drawn ones, while the allocator checks every block."""
    found = drive("--malloc", "--suite", "--cases", "300")
    assert found.returncode == 0, found.stdout + found.stderr
    known, _ = json.JSONDecoder().raw_decode(found.stdout)
    assert known["wrong"] == dict.fromkeys(CASES)
    assert known["a byte too many"] == (["crash", "SIGABRT"] if fuzz.has_debug_library() else None)
    assert "300 cases" in found.stdout


@pytest.mark.long
@pytest.mark.parametrize("kind", ["--few", "--averages", "--sharded", "--loops"])
def test_memory_stays_whole(kind):
    found = drive("--malloc", kind, "--cases", "1000")
    assert found.returncode == 0, found.stdout + found.stderr
