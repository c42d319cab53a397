"""The public surface: what it names, what it costs, and that its examples run."""

import doctest
import importlib
import subprocess
import sys

import pytest
import torch

import surefoot

NAMES = {
    *(
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "LBFGS",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop",
    ),
    *("Rprop", "SGD", "SparseAdam", "Optimizer", "Scalar", "Slot"),
    *("checkpoint", "load", "save"),
    *("lr_finder", "lr_scheduler", "parameter_groups", "swa_utils"),
}


def test_public_names():
    assert set(surefoot.__all__) == NAMES
    assert all(hasattr(surefoot, name) for name in NAMES)
    assert all(hasattr(surefoot, name) for name in torch.optim.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'surefoot' has no attribute 'AdamX'"):
        surefoot.AdamX  # noqa: B018


def test_importing_is_light():
    code = "import sys, surefoot; print(*{'numba', 'llvmlite', 'typer', 'rich', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == ""


MODULES = [
    "surefoot.optimizer",
    "surefoot.checkpoint",
    *(f"surefoot.optimizers.{name.lower()}" for name in surefoot.optimizers.__all__),
]
FILES = {
    f"surefoot.optimizers.{a}": f"surefoot.optimizers.{b}"
    for a, b in {"adamw": "adam", "sparseadam": "sparse_adam"}.items()
}


@pytest.mark.parametrize("name", sorted({FILES.get(module, module) for module in MODULES}))
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "surefoot": surefoot})
    assert result.attempted
    assert result.failed == 0
