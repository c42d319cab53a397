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


def said_by(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()  # noqa: S603


def test_importing_is_light():
    heavy = "{'llvmlite', 'typer', 'rich', 'matplotlib'}"
    assert said_by(f"import sys, surefoot; from surefoot import *; print(*{heavy} & set(sys.modules))") == []


def test_torch_is_imported_when_it_is_needed():
    asked = "print('torch' in sys.modules)"
    code = f"import sys, surefoot; print('AdamW' in dir(surefoot)); {asked}; surefoot.SGD; {asked}"
    assert said_by(code) == ["True", "False", "True"]


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
