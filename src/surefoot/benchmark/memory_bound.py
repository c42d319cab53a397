"""The memory bound: a rule that moves the same memory as another, through the same engine, and only adds."""

import functools
import operator
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from surefoot.explain import rule_of
from surefoot.optimizer import Optimizer, Params
from surefoot.rule import STORAGE_OPTIONS, Rule, Slot

Passes = tuple[tuple[bool, ...], ...]
"""For each stage of a rule, whether it reads the parameter, the gradient and each slot; then what the update writes."""


class MemoryBound(Optimizer):
    """Adds the gradient to the parameter and to what slots are written; it has no hyperparameters and counts no steps.

    Where the rule whose bound it is measures tensors before its update, it sums the same tensors in as many stages; and
    it measures the norm of all gradients where the rule's are clipped.
    """

    scalars = ()

    def __init__(self, params: Params, max_grad_norm: float | None) -> None:
        super().__init__(params, {"max_grad_norm": max_grad_norm, **dict.fromkeys(self.flags, False)})


@functools.cache
def _traffic(slots: int, kinds: tuple[Passes, ...]) -> Any:
    """Return the class for rules of so many slots; each kind of parameter has passes of its own, and a flag."""
    names = [f"kind{number}" for number in range(len(kinds))]

    def update(*arrays_coefficients_flags: Any) -> Any:
        *arrays, _, flags = arrays_coefficients_flags
        return _added(arrays, next(kind for name, kind in zip(names, kinds, strict=True) if getattr(flags, name)))

    members = {"slots": tuple(Slot(f"slot{i}") for i in range(slots)), "flags": tuple(names)}
    return type("MemoryBound", (MemoryBound,), {**members, "update": staticmethod(update)})


def _added(arrays: Sequence[Tensor], passes: Passes) -> tuple[Tensor, ...]:
    """Return the new arrays: one addition for each that is read, and one for each that is written.

    Each sum is added to what is summed next, and the last to the parameter, times zero: so none can be left out.
    """
    param, grad, *slots = arrays
    *stages, (_, *written) = passes
    for reads in stages:
        nothing = torch.sum(functools.reduce(operator.add, compress((param, grad, *slots), reads))) * 0.0
        param = param + nothing
    return param + grad, *(slot + grad if writes else slot for slot, writes in zip(slots, written, strict=True))


def memory_bound_of(optimizer: Optimizer) -> Optimizer:
    """Return the memory bound of an optimizer whose algorithm is a rule: its parameters, slots kept like its own."""
    group = optimizer.param_groups[0]
    kinds: dict[Passes, list[Tensor]] = {}
    for param in group["params"]:
        kinds.setdefault(_passes(rule_of(optimizer, group, param)), []).append(param)
    kept = {name: group[name] for name in STORAGE_OPTIONS if name in group}
    groups = [{"params": params, f"kind{number}": True, **kept} for number, params in enumerate(kinds.values())]
    made = _traffic(len(rule_of(optimizer, group).slots), tuple(kinds))
    bound: Optimizer = made(groups, optimizer.step_options.max_grad_norm)
    return bound


def _passes(rule: Rule) -> Passes:
    return *(stage.measures.read for stage in rule.stages), rule.written
