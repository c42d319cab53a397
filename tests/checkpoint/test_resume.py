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


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """For each loop what came of 2n steps, and the folder with what another process made of a checkpoint after n."""
    folder, expected = tmp_path_factory.mktemp("loops"), {}
    for case in [item.callspec.params["case"] for item in request.session.items if item.path == request.path]:
        loop = Loop(case)
        loop.train()
        surefoot.save(folder / f"{case.name}.safetensors", **loop.parts())
        expected[case.name] = {"losses": loop.train(), **deepcopy(loop.outcome())}
    program = [sys.executable, "-W", "error", str(Path(resume_loops.__file__)), str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return expected, folder


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.long] * case.rare) for case in CASES]
)
def test_a_resumed_loop_goes_on_with_the_same_bits(case, outcomes):
    expected, folder = outcomes
    assert_same(torch.load(folder / f"{case.name}.pt", weights_only=False), expected[case.name])
