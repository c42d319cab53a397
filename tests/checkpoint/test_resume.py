"""Resuming: 2n steps are n steps, a save, a new process, a load, and n steps, bit for bit."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import resume_loops
import torch
from resume_loops import Loop

import surefoot
from helpers import assert_same

CASES = resume_loops.cases()


@pytest.mark.parametrize("rare", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_resumed_loop_goes_on_with_the_same_bits(tmp_path, rare):
    """All loops in one test: what a worker prepares for one of several, others would prepare again."""
    cases, expected = [case for case in CASES if case.rare == rare], {}
    for case in cases:
        loop = Loop(case)
        loop.train()
        surefoot.save(tmp_path / f"{case.name}.safetensors", **loop.parts())
        expected[case.name] = {"losses": loop.train(), **deepcopy(loop.outcome())}
    program = [sys.executable, "-W", "error", str(Path(resume_loops.__file__)), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    for name, outcome in expected.items():
        assert_same({name: torch.load(tmp_path / f"{name}.pt", weights_only=False)}, {name: outcome})
