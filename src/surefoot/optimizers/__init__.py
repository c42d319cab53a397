"""The algorithms, one file each: what they compute and nothing about how it is run."""

from surefoot.optimizers.adadelta import Adadelta
from surefoot.optimizers.adafactor import Adafactor
from surefoot.optimizers.adagrad import Adagrad
from surefoot.optimizers.adam import Adam, AdamW
from surefoot.optimizers.adamax import Adamax
from surefoot.optimizers.asgd import ASGD
from surefoot.optimizers.lbfgs import LBFGS
from surefoot.optimizers.muon import Muon
from surefoot.optimizers.nadam import NAdam
from surefoot.optimizers.radam import RAdam
from surefoot.optimizers.rmsprop import RMSprop
from surefoot.optimizers.rprop import Rprop
from surefoot.optimizers.sgd import SGD
from surefoot.optimizers.sparse_adam import SparseAdam

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
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
]
