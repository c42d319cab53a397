"""Optimizers for PyTorch: the names of torch.optim, each algorithm written once and run by fast engines.

Every name is imported when it is first asked for, so that the command line answers before torch is there.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surefoot import checkpoint, lr_finder, lr_scheduler, swa_utils, telemetry
    from surefoot.checkpoint import load, save
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
    from surefoot.whole_step import StepOptions

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
    "StepOptions",
    "checkpoint",
    "load",
    "lr_finder",
    "lr_scheduler",
    "parameter_groups",
    "save",
    "swa_utils",
    "telemetry",
]

_MODULES = {
    "Optimizer": "surefoot.optimizer",
    "Scalar": "surefoot.rule",
    "Slot": "surefoot.rule",
    "StepOptions": "surefoot.whole_step",
    "load": "surefoot.checkpoint",
    "parameter_groups": "surefoot.groups",
    "save": "surefoot.checkpoint",
}
_OF_TORCH = ("swap_in_optimizer_params_and_state",)


def __getattr__(name: str) -> Any:
    """Import what is asked for; torch's tools for any optimizer are torch's."""
    if name == "__version__":
        value: Any = _version()
    elif name in _OF_TORCH:
        value = getattr(importlib.import_module("torch.optim"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"surefoot.{name}"):
        return importlib.import_module(f"surefoot.{name}")
    elif name in __all__:
        value = getattr(importlib.import_module(_MODULES.get(name, "surefoot.optimizers")), name)
    else:
        raise AttributeError(f"module 'surefoot' has no attribute {name!r}")
    return globals().setdefault(name, value)


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        found: str = metadata.version("surefoot")
    except metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return "0+unknown"
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
