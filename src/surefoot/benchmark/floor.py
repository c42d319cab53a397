"""The traffic floor: a rule that moves the same memory as another, through the same engine, and only adds."""

import functools
from typing import Any

from torch import Tensor

from surefoot.explain import rule_of
from surefoot.optimizer import Optimizer, Params
from surefoot.rule import Slot


class Traffic(Optimizer):
    """Adds the gradient to the parameter and to every slot; it has no hyperparameters and counts no steps."""

    scalars = ()

    def __init__(self, params: Params) -> None:
        super().__init__(params, {})

    @staticmethod
    def update(param: Tensor, grad: Tensor, *slots_coefficients_flags: Any) -> Any:
        """Add once for each array that is read and written."""
        return tuple(array + grad for array in (param, *slots_coefficients_flags[:-2]))


@functools.cache
def _traffic(slots: int) -> Any:
    return type("Traffic", (Traffic,), {"slots": tuple(Slot(f"slot{i}") for i in range(slots))})


def floor_of(optimizer: Optimizer) -> Optimizer:
    """Make the floor of an optimizer whose algorithm is a rule: the same parameters, and slots like its own."""
    group = optimizer.param_groups[0]
    floor: Optimizer = _traffic(len(rule_of(optimizer, group).slots))(group["params"])
    return floor
