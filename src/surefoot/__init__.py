"""Optimizers for PyTorch: the names of torch.optim, each algorithm written once and run by fast engines."""

from importlib.metadata import version

from surefoot.optimizer import Optimizer
from surefoot.optimizers import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)
from surefoot.rule import Scalar, Slot

__version__ = version("surefoot")
