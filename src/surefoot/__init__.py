"""Optimizers for PyTorch: the names of torch.optim, each algorithm written once and run by fast engines.

Every name is imported when it is first asked for, so that the command line answers before torch is there.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from surefoot import optimizers as optimizers

if TYPE_CHECKING:
    from torch.optim import swap_in_optimizer_params_and_state as swap_in_optimizer_params_and_state

    from surefoot import checkpoint as checkpoint
    from surefoot import functional as functional
    from surefoot import lr_finder as lr_finder
    from surefoot import lr_scheduler as lr_scheduler
    from surefoot import swa_utils as swa_utils
    from surefoot import telemetry as telemetry
    from surefoot.checkpoint import load as load
    from surefoot.checkpoint import save as save
    from surefoot.combined import Combined as Combined
    from surefoot.combined import Part as Part
    from surefoot.combined import muon_with as muon_with
    from surefoot.groups import hidden_matrices as hidden_matrices
    from surefoot.groups import parameter_groups as parameter_groups
    from surefoot.optimizer import Optimizer as Optimizer
    from surefoot.optimizers import *  # noqa: F403 (the one list of them)
    from surefoot.precision import full_precision as full_precision
    from surefoot.precision import full_precision_state_dict as full_precision_state_dict
    from surefoot.rule import GroupScalar as GroupScalar
    from surefoot.rule import Scalar as Scalar
    from surefoot.rule import Slot as Slot
    from surefoot.rule import group_sum as group_sum
    from surefoot.rule import total_sum as total_sum
    from surefoot.step.options import StepOptions as StepOptions

    __version__: str
else:  # type checkers read no list that is put together
    __all__ = [
        "Combined",
        "GroupScalar",
        "Optimizer",
        "Part",
        "Scalar",
        "Slot",
        "StepOptions",
        "checkpoint",
        "full_precision",
        "full_precision_state_dict",
        "functional",
        "group_sum",
        "hidden_matrices",
        "load",
        "lr_finder",
        "lr_scheduler",
        "muon_with",
        "parameter_groups",
        "save",
        "swa_utils",
        "telemetry",
        "total_sum",
    ]
    __all__ += optimizers.__all__

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

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})


_MODULES = {
    "Combined": "surefoot.combined",
    "GroupScalar": "surefoot.rule",
    "Optimizer": "surefoot.optimizer",
    "Part": "surefoot.combined",
    "Scalar": "surefoot.rule",
    "Slot": "surefoot.rule",
    "StepOptions": "surefoot.step.options",
    "full_precision": "surefoot.precision",
    "full_precision_state_dict": "surefoot.precision",
    "hidden_matrices": "surefoot.groups",
    "group_sum": "surefoot.rule",
    "load": "surefoot.checkpoint",
    "muon_with": "surefoot.combined",
    "parameter_groups": "surefoot.groups",
    "save": "surefoot.checkpoint",
    "total_sum": "surefoot.rule",
}
_OF_TORCH = ("swap_in_optimizer_params_and_state",)


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        found: str = metadata.version("surefoot")
    except metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return "0+unknown"
    return found
