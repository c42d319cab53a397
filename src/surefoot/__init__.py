"""Optimizers for PyTorch: the names of torch.optim, each algorithm written once and run by fast engines."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from surefoot.groups import parameter_groups
from surefoot.optimizer import Optimizer
from surefoot.optimizers import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from surefoot.rule import Scalar, Slot

if TYPE_CHECKING:
    from surefoot import checkpoint, lr_finder, lr_scheduler, swa_utils
    from surefoot.checkpoint import load, save

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Scalar",
    "Slot",
    "SparseAdam",
    "checkpoint",
    "load",
    "lr_finder",
    "lr_scheduler",
    "parameter_groups",
    "save",
    "swa_utils",
]

__version__ = version("surefoot")
_ON_FIRST_USE = ("checkpoint", "lr_finder", "lr_scheduler", "swa_utils")
_OF_CHECKPOINT = ("load", "save")
_OF_TORCH = ("swap_in_optimizer_params_and_state",)


def __getattr__(name: str) -> Any:
    """Import what a step does not need when it is first asked for; torch's tools for any optimizer are torch's."""
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"surefoot.{name}")
    if name in _OF_CHECKPOINT:
        return getattr(importlib.import_module("surefoot.checkpoint"), name)
    if name in _OF_TORCH:
        return getattr(torch.optim, name)
    raise AttributeError(f"module 'surefoot' has no attribute {name!r}")
