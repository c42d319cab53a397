"""The algorithms, one file each: what they compute and nothing about how it is run."""

from surefoot.optimizers.adadelta import Adadelta
from surefoot.optimizers.adagrad import Adagrad
from surefoot.optimizers.adam import Adam, AdamW
from surefoot.optimizers.adamax import Adamax
from surefoot.optimizers.asgd import ASGD
from surefoot.optimizers.nadam import NAdam
from surefoot.optimizers.radam import RAdam
from surefoot.optimizers.rmsprop import RMSprop
from surefoot.optimizers.rprop import Rprop
from surefoot.optimizers.sgd import SGD

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
]
