"""The public surface: what it names, what it costs, and that its examples run."""

import doctest
import importlib.metadata
import subprocess
import sys

import pytest
import torch

import surefoot

NAMES = {
    *surefoot.optimizers.__all__,
    *("Combined", "GroupScalar", "Optimizer", "Part", "Scalar", "Slot", "StepOptions", "group_sum", "total_sum"),
    *("checkpoint", "load", "save"),
    *(
        "full_precision",
        "full_precision_state_dict",
        "functional",
        "hidden_matrices",
        "lr_finder",
        "lr_scheduler",
        "muon_with",
        "parameter_groups",
        "swa_utils",
        "telemetry",
    ),
}


def test_public_names():
    assert set(surefoot.__all__) == NAMES
    assert all(hasattr(surefoot, name) for name in NAMES)
    assert all(hasattr(surefoot, name) for name in torch.optim.__all__)


def test_the_list_of_algorithms_knows_which_torch_has():
    listed = set(surefoot.optimizers.__all__)
    assert {name for name in listed if not hasattr(torch.optim, name)} == surefoot.optimizers.NOT_IN_TORCH
    assert set(surefoot.optimizers.__all__) <= set(dir(surefoot.optimizers)) & set(dir(surefoot))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'surefoot' has no attribute 'AdamX'"):
        surefoot.AdamX  # noqa: B018
    with pytest.raises(AttributeError, match="module 'surefoot.optimizers' has no attribute 'AdamX'"):
        surefoot.optimizers.AdamX  # noqa: B018


LIGHT = """
import sys
before = set(sys.modules)
import surefoot.run.hook  # in every process below `surefoot run`, the script's and others
print("of the hook:", *{"dataclasses", "inspect", "pathlib", "tempfile"} & (sys.modules.keys() - before))
import surefoot.run.report
print("of its report:", *{"importlib.metadata", "statistics", "tempfile", "torch"} & sys.modules.keys())
assert "AdamW" in dir(surefoot)
print("torch" in sys.modules)
surefoot.SGD
print("torch" in sys.modules)
from surefoot import *
print("of the package:", *{"llvmlite", "typer", "rich", "matplotlib"} & sys.modules.keys())

import torch
param = torch.ones(2).requires_grad_()
param.grad = torch.ones(2)
optimizer = surefoot.AdamW([param])
optimizer.step(), optimizer.zero_grad()
print("of a step:", *{"torch._dynamo", "triton"} & sys.modules.keys())
"""


def test_what_is_heavy_is_imported_when_it_is_needed():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)  # noqa: S603
    of_hook, of_report, before, after, of_package, of_step = done.stdout.splitlines()
    assert (of_hook, of_report) == ("of the hook:", "of its report:")
    assert (before, after) == ("False", "True")
    assert (of_package, of_step) == ("of the package:", "of a step:")


def test_the_version_is_the_distributions():
    assert surefoot.__version__ == importlib.metadata.version("surefoot")


MODULES = [
    "surefoot.optimizer",
    "surefoot.telemetry.telemetry",
    "surefoot.checkpoint",
    "surefoot.combined",
    "surefoot.functional.pure",
    *(getattr(surefoot.optimizers, name).__module__ for name in surefoot.optimizers.__all__),
]


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "surefoot": surefoot})
    assert result.attempted
    assert result.failed == 0


def test_a_system_that_does_not_fork_is_served():
    """As Windows is, where Python has no `os.register_at_fork`."""
    code = """
import os, random, torch
del os.register_at_fork
import surefoot, surefoot.checkpoint
from surefoot.run import watch
watch.start()
param = torch.ones(3, requires_grad=True)
param.grad = torch.ones(3)
surefoot.SGD([param], lr=0.5, fused=True).step()
assert param.tolist() == [0.5] * 3
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)  # noqa: S603 (our own code)
