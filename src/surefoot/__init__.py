"""Optimizers for PyTorch: the names of torch.optim, each algorithm written once and run by fast engines."""

from importlib.metadata import version

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
]

__version__ = version("surefoot")
