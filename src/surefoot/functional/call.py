"""A step without an optimizer: what both kinds of functions hand to the step that a class would make."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from surefoot.optimizer import Optimizer
from surefoot.rule import AlgorithmSpec, Scalar, Slot, bind
from surefoot.step.inputs import StepInput
from surefoot.step.options import OptimizerOptions, Stepping, StepStatistics
from surefoot.step.pipeline import run_step
from surefoot.step.types import BucketRun

Stored = Slot | Scalar
State = dict[Tensor, dict[str, Any]]


def step_input(
    optimizer: Optimizer,
    group: dict[str, Any],
    grads: Sequence[Tensor | None],
    state: State,
    options: OptimizerOptions | None = None,
) -> StepInput:
    """Return a step of one group with gradients that are given, of which nothing is kept."""
    stepping = Stepping(options or OptimizerOptions(), StepStatistics(steps=1))
    by_param = dict(zip(group.get("params", ()), grads, strict=True))
    algorithm = (optimizer.coefficients, optimizer._make_custom_step, optimizer._check_again)
    return StepInput(optimizer.spec, [group], state, stepping, None, None, *algorithm, grads=by_param)


def run(step: StepInput, keep: Callable[[Sequence[BucketRun]], None] | None = None) -> None:
    """Make a step in place; `keep` is told of the buckets of a rule when they have been stepped."""
    with step.stepping.context:
        run_step(step, None, keep)


def active(spec: AlgorithmSpec, group: Mapping[str, Any]) -> tuple[Stored, ...]:
    """Return the slots that exist under a group's flags, and the scalars."""
    flags = dict(spec.settle_flags(group))
    return (*spec.active_slots(flags), *spec.active_scalars(flags))


def begins_with_nothing(spec: AlgorithmSpec, group: Mapping[str, Any]) -> bool:
    """Return whether an algorithm knows by missing slots that it begins, as momentum that starts as a gradient does."""
    return spec.update is not None and "fresh" in bind(spec, spec.settle_flags(group)).given


def rounds(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield positions of parameters so that none recurs in a round: all, and what stands there twice again."""
    left = list(range(len(params)))
    while left:
        first: dict[Tensor, int] = {}
        for row in left:
            first.setdefault(params[row], row)
        taken = set(first.values())
        yield list(first.values())
        left = [row for row in left if row not in taken]
