"""Learning-rate schedules: the schedulers of torch.optim under their names, and schedules as values.

`schedules` has the values, `Schedule` runs them; the classes named `...LR` are those of torch, exact on resume.
"""

from surefoot.lr_scheduler import schedules
from surefoot.lr_scheduler.base import EPOCH_DEPRECATION_WARNING, LRScheduler, Recursive, _LRScheduler
from surefoot.lr_scheduler.composite import ChainedScheduler, SequentialLR
from surefoot.lr_scheduler.curves import Curve
from surefoot.lr_scheduler.cycles import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR
from surefoot.lr_scheduler.plateau import ReduceLROnPlateau
from surefoot.lr_scheduler.schedule_runner import Schedule
from surefoot.lr_scheduler.simple import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)

__all__ = [
    "EPOCH_DEPRECATION_WARNING",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "Curve",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "Recursive",
    "ReduceLROnPlateau",
    "Schedule",
    "SequentialLR",
    "StepLR",
    "_LRScheduler",
    "schedules",
]
