"""What the cases share: the same training with torch.optim and with surefoot, and how far apart its weights end.

Not part of the ordinary suite: `python tools/frameworks.py` makes an environment with the frameworks and runs this.
Models are tiny and made from configurations; nothing is downloaded.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

import surefoot

os.environ["HF_HUB_OFFLINE"] = "1"
Train = Callable[..., Iterable[Tensor]]


@pytest.fixture(autouse=True)
def case(request, record_property, tmp_path, monkeypatch):
    """Tell the table what the case is, and start in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    told = request.node.obj.__doc__.strip().rstrip(".")
    _, _, parameters = request.node.name.rstrip("]").partition("[")
    record_property("framework", request.module.__name__.removeprefix("test_"))
    record_property("case", f"{told}: `{parameters}`" if parameters else told)


@pytest.fixture
def compare(record_property, monkeypatch):
    """Return a function that trains with torch.optim, with surefoot, and with surefoot's eager engine, and compares.

    `train` is called with torch.optim or surefoot and returns weights.  Surefoot's kernels may differ in the last
    bits, by `tolerance` of the largest weight at most; the eager engine may not differ at all.
    """

    def compare(train: Train, tolerance: float = 1e-5, ours: Train | None = None, *, bits: bool = True) -> None:
        theirs = seeded(train, torch.optim)
        kernels = difference(seeded(ours or train, surefoot), theirs)
        record_property("difference", kernels)
        assert kernels <= tolerance
        if bits:
            monkeypatch.setenv("SUREFOOT_ENGINE", "eager")
            eager = difference(seeded(ours or train, surefoot), theirs)
            record_property("eager", eager)
            assert eager == 0

    return compare


def seeded(train: Train, *arguments) -> list[Tensor]:
    """Return copies of the weights that a training ends with, begun from the same seed."""
    torch.manual_seed(0)
    return [weight.detach().clone() for weight in train(*arguments)]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of weights, in units of the largest weight."""
    assert len(ours) == len(theirs) > 0
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    assert all(weight.isfinite().all() for pair in pairs for weight in pair)
    largest = max(b.abs().max().item() for _, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / largest


def run_script(*command: str, **environment: str) -> str:
    """Return what a Python command prints."""
    command = [sys.executable, *command]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
