"""Resuming: 2n steps are n steps, a save, a new process, a load, and n steps, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import resume_loops
import torch
from resume_loops import STEPS, Loop

import surefoot
from helpers import assert_same

CASES = resume_loops.cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of all loops after n steps, and what another process made of them."""
    folder = tmp_path_factory.mktemp("loops")
    for case in CASES:
        loop = Loop(case)
        loop.train()
        surefoot.save(folder / case.name, **loop.parts())
    program = [sys.executable, "-W", "error", str(Path(resume_loops.__file__)), str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_resumed_loop_goes_on_with_the_same_bits(case, folder):
    loop = Loop(case)
    losses = loop.train(2 * STEPS)[STEPS:]
    resumed = torch.load(folder / f"{case.name}.pt", weights_only=False)
    assert_same(resumed, {"losses": losses, **loop.outcome()})
