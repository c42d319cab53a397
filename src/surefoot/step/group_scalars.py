"""Numbers that parameters share: where they stand in the groups, what they become in a step, and their new values."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.distributed import Exchange
from surefoot.errors import RuleError
from surefoot.rule import GroupScalar
from surefoot.step.device import refuse_new_buckets
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun
from surefoot.tensors.modes import has_no_values


def read_group_scalars(step: StepInput, run: BucketRun) -> dict[str, Any]:
    """Return the numbers that the parameters of a bucket share, on their device where these must not be waited for."""
    found, place = {}, run.bucket.device
    for scalar in run.spec.group_scalars:
        home = _home(step, scalar, run.group)
        value = home[scalar.name]
        if run.is_unread:
            if not isinstance(value, Tensor) or (value.is_cpu and place.type != "cpu"):
                refuse_new_buckets(run.spec.name)
                value = home[scalar.name] = torch.full((), float(value), dtype=torch.float64, device=place)
            value = value.to(place)
        found[scalar.name] = value
    return found


def new_group_scalars(
    step: StepInput, runs: Sequence[BucketRun], known: Sequence[Mapping[str, Any]], exchange: Exchange | None
) -> list[dict[str, Any]]:
    """Return for each group the new values of the numbers that its parameters share, none where no run tells them.

    Args:
        step: the step.
        runs: those that measure.
        known: for each of them all its numbers.
        exchange: what puts numbers together over ranks, if there are any.

    Raises:
        RuleError: a number differs from parameter to parameter.
    """
    if not any(step.spec.of(group).group_scalars for group in step.groups):
        return []
    index = {id(group): position for position, group in enumerate(step.groups)}
    found: list[dict[str, Any]] = [{} for _ in step.groups]
    for run, numbers in zip(runs, known, strict=True):
        names = zip(run.spec.group_scalars, run.bucket.rule.new_shared, strict=True)
        found[index[id(run.group)]] = {scalar.name: _one(run, scalar, numbers[name]) for scalar, name in names}
    if exchange is not None and exchange.process_group is not None:
        found = _gather(step, found, exchange)
    for numbers, group in zip(found, step.groups, strict=True):
        for scalar in step.spec.of(group).group_scalars:
            sharing = [found[index[id(each)]] for each in _sharing(step, scalar, group)]
            if scalar.name not in numbers and (told := [each for each in sharing if scalar.name in each]):
                numbers[scalar.name] = told[0][scalar.name]
    return found


def _one(run: BucketRun, scalar: GroupScalar, value: Any) -> Any:
    """Return a new number that was computed for each parameter, and is the same for all."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.is_cpu and not has_no_values(value) and not bool(((value == value[0]) | value.isnan()).all()):
        raise RuleError(
            f"{run.spec.name}.update returns `{scalar.name}`, which all parameters share, with different values for "
            f"them; it must not follow from their scalars, such as `step`"
        )
    return value[0]


def store_group_scalars(step: StepInput, new: Sequence[Mapping[str, Any]], found_inf: Tensor | None) -> None:
    """Write the numbers that parameters share, unless the device has found infinities."""
    for group, numbers in zip(step.groups, new, strict=bool(new)):
        for scalar in step.spec.of(group).group_scalars:
            if scalar.name not in numbers:
                continue
            home = _home(step, scalar, group)  # which comes first, if it is another
            if home is group:
                group[scalar.name] = _written(scalar, group[scalar.name], numbers[scalar.name], found_inf)
            group[scalar.name] = home[scalar.name]


def _sharing(step: StepInput, scalar: GroupScalar, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups that have one number together with a group."""
    groups = step.groups_with(group)
    return [group] if scalar.is_split(groups) else groups


def _home(step: StepInput, scalar: GroupScalar, group: dict[str, Any]) -> dict[str, Any]:
    """Return the group whose number is that of a group."""
    return _sharing(step, scalar, group)[0]


def _written(scalar: GroupScalar, old: Any, new: Any, found_inf: Tensor | None) -> Any:
    """Return a number after a step: the tensor that it was with another value, or one of Python's."""
    carries = isinstance(new, Tensor) and (new.requires_grad or has_no_values(new))
    if not isinstance(old, Tensor):
        return new if carries else scalar.stored(float(new))
    if carries:
        return new.to(old)
    if not isinstance(new, Tensor):
        return old.fill_(new)
    return old.copy_(new if found_inf is None else torch.where(found_inf.to(new.device) != 0, old.to(new), new))


def _gather(step: StepInput, found: Sequence[Mapping[str, Any]], exchange: Exchange) -> list[dict[str, Any]]:
    """Return the new numbers that some rank of the process group knows: not all have a parameter in every group."""
    scalars = [step.spec.of(group).group_scalars for group in step.groups]
    width = 1 + max(map(len, scalars))
    table = torch.zeros(len(step.groups), width, dtype=torch.float64, device=exchange.device)
    for row, numbers, own in zip(table, found, scalars, strict=True):
        row[0] = float(bool(numbers))
        for column, scalar in enumerate(own if numbers else (), 1):
            row[column] = numbers[scalar.name]
    every, told = exchange.gather(table), list[dict[str, Any]]()
    index = {id(group): position for position, group in enumerate(step.groups)}
    for group, own in zip(step.groups, scalars, strict=True):
        told.append({})
        for column, scalar in enumerate(own, 1):
            sharing = [index[id(each)] for each in _sharing(step, scalar, group)]
            rows = every[:, sharing].flatten(end_dim=1)
            first = rows[rows[:, 0].argmax()]
            old = torch.as_tensor(_home(step, scalar, group)[scalar.name]).to(first)
            told[-1][scalar.name] = torch.where(first[0] != 0, first[column], old)
    return told
