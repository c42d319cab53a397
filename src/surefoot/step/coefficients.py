"""The numbers of an update: from hyperparameters and scalars, on the host or on the parameters' device."""

import operator
from collections.abc import Mapping
from itertools import compress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines import Coefficients, gpu
from surefoot.engines.bucket import EachParameter
from surefoot.errors import RuleError
from surefoot.rule import EMA, ROUNDING_STEP, STEP
from surefoot.rule.hyperparameters import is_number
from surefoot.state.check import hyperparameters
from surefoot.state.scalars import read_scalars, write_scalars
from surefoot.step.device import DeviceScalars, number_on, numbers_on, refuse_new_buckets
from surefoot.step.group_scalars import read_group_scalars
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun, Fresh
from surefoot.tensors.modes import has_no_values, mode_is_active

_NOT_FRESH = (False, False)
_needs_grad = operator.attrgetter("requires_grad")


def compute_coefficients(step: StepInput, run: BucketRun) -> None:
    """Put the numbers of this step into a bucket, and compute its new scalars."""
    fresh = _fresh(run) if run.made else []
    if run.group.get("ema") and EMA not in run.bucket.rule.slots:
        run.slice.fresh = [new for _, new in fresh]
    if run.has_device_scalars:
        _compute_on_device(step, run, fresh)
        return
    if run.group.get("differentiable") or mode_is_active() or _are_shown(run):
        _compute_each(step, run, fresh)
        return
    scalars = run.bucket.rule.scalars
    values = run.guard.read_scalars() if run.guard else read_scalars(run.entries, scalars)
    distinct, row = distinct_columns(values, fresh)
    if run.shared_row is None:
        run.shared_row = np.zeros(len(run.params), dtype=np.int64)
    numbers = [_on_host(step, run, column, fresh) for column, fresh in distinct]
    run.bucket.coefficients = [number for number, _ in numbers]
    run.bucket.row = run.shared_row if row is None else row
    new = np.array([values for _, values in numbers], dtype=np.float64).T.reshape(len(scalars), len(numbers))
    run.scalars = new if row is None else new[:, row]


def store_scalars(run: BucketRun) -> None:
    """Count a step that was made, where the host keeps its scalars."""
    if isinstance(run.scalars, list):
        _store_each(run)
    elif run.guard:
        run.guard.write_scalars(run.scalars)
    else:
        write_scalars(run.entries, run.bucket.rule.scalars, run.scalars)


def _fresh(run: BucketRun) -> list[Fresh]:
    slots = {slot.name for slot in run.spec.slots}
    return [(not slots.isdisjoint(names), EMA.name in names) for names in run.made]


def distinct_columns(
    values: np.ndarray, fresh: list[Fresh]
) -> tuple[list[tuple[tuple[float, ...], Fresh]], np.ndarray | None]:
    """Return the distinct columns of scalars, told apart by `fresh`, and if there are several, which a parameter has.

    An empty `fresh` means that nothing is.
    """
    first = fresh[0] if fresh else _NOT_FRESH
    if fresh.count(first) == len(fresh) and (not len(values) or (values == values[:, :1]).all()):
        return [(tuple(values[:, 0].tolist()), first)], None
    columns = list(zip(map(tuple, values.T.tolist()), fresh or [_NOT_FRESH] * values.shape[1], strict=True))
    index = {column: position for position, column in enumerate(dict.fromkeys(columns))}
    return list(index), np.array([index[column] for column in columns], dtype=np.int64)


def _on_host(
    step: StepInput, run: BucketRun, values: tuple[float, ...], fresh: Fresh
) -> tuple[Coefficients, list[float]]:
    """Return the numbers of an update and the new scalars, from the present scalars."""
    scalars = {s.name: value for s, value in zip(run.bucket.rule.scalars, values, strict=True)}
    if run.options is None:
        run.options = hyperparameters(run.group)
    numbers, new = _numbers(step, run, _with_shared(step, run, run.options), scalars, fresh)
    # What clips is computed on the device, which kernels there need not wait for; and so is what parameters share.
    kept = ("step_clip",) * (run.engine is gpu)
    on_device = bool(run.bucket.rule.group_scalars) and run.is_unread
    names = run.bucket.rule.given
    coefficients = {name: number_of(numbers[name], keep_tensors=on_device or name in kept) for name in names}
    _check_numbers(run, coefficients)
    return coefficients, [float(number_of(value)) for value in new]


def _with_shared(step: StepInput, run: BucketRun, h: SimpleNamespace) -> SimpleNamespace:
    """Return hyperparameters, and the numbers that parameters share as they are now."""
    return SimpleNamespace(**{**vars(h), **read_group_scalars(step, run)})


def _check_numbers(run: BucketRun, coefficients: Coefficients) -> None:
    if odd := [name for name, value in coefficients.items() if not is_number(value)]:
        raise RuleError(f"{run.spec.name}.coefficients gives {odd[0]}={coefficients[odd[0]]!r}, which is not a number")


def _numbers(
    step: StepInput, run: BucketRun, h: SimpleNamespace, scalars: dict[str, Any], fresh: tuple[Any, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Return every number that an update may read, and the new scalars: Python's numbers, or tensors if scalars are."""
    own = count_step(scalars)
    derived = step.coefficients(h, **own)
    numbers = {"fresh": fresh[0], "loss_scale": step.grad_scale, **derived}
    clip = 1.0 if run.slice.clips_each else run.slice.clip  # which follow, as what else is measured of each does
    numbers |= {"step_clip": clip, "step_ema_weight": _weight_of_average(run.group, fresh[1])}
    numbers[ROUNDING_STEP.name] = scalars.get(ROUNDING_STEP.name, scalars.get(STEP.name))
    for name in run.bucket.rule.given:
        if name not in numbers:
            numbers[name] = _given(run, h, name, numbers)
    return numbers, [derived.get(name, value) for name, value in scalars.items()]


def count_step(scalars: dict[str, Any]) -> dict[str, Any]:
    """Count the step among a parameter's scalars; return those that are the algorithm's."""
    for name in (STEP.name, ROUNDING_STEP.name):
        if name in scalars:
            scalars[name] = scalars[name] + 1
    return {name: value for name, value in scalars.items() if name != ROUNDING_STEP.name}


def _given(run: BucketRun, h: SimpleNamespace, name: str, numbers: Mapping[str, Any]) -> Any:
    """Return a hyperparameter that an update reads.

    Raises:
        TypeError: it is not a number.
        RuleError: there is none of that name.
    """
    if not is_number(value := getattr(h, name, None)):
        if name in run.group:
            raise TypeError(f"`{name}` of {run.spec.name} must be a number, but is {value!r}")
        given = {known for known, value in vars(h).items() if is_number(value)}
        raise RuleError(
            f"{run.bucket.rule.name}.update reads c.{name}, which is neither a hyperparameter nor given by "
            f"`coefficients`; there are: {', '.join(sorted({*numbers, *given}))}"
        )
    return value


def _weight_of_average(group: Mapping[str, Any], fresh: Any) -> Any:
    """Return the weight of the stepped parameter in its average: all of it at first."""
    weight = 1 - (group.get("ema") or 0.0)
    return torch.where(fresh, 1.0, weight) if isinstance(fresh, Tensor) else 1.0 if fresh else weight


def number_of(value: Any, *, keep_tensors: bool = False) -> Any:
    """Return a number that may stand in a tensor, as that if wished."""
    return value.detach().item() if isinstance(value, Tensor) and not keep_tensors else value


# Each parameter by itself, in torch's operations


def _compute_each(step: StepInput, run: BucketRun, fresh: list[Fresh]) -> None:
    """Put the numbers of each parameter into a bucket, tensors where a gradient flows through or a mode sees them."""
    h = _with_shared(step, run, hyperparameters(run.group))
    numbers: list[Coefficients] = []
    run.scalars = []
    for position, entry in enumerate(run.entries):
        scalars = {scalar.name: _operand(entry[scalar.name]) for scalar in run.bucket.rule.scalars}
        new_to_it = fresh[position] if fresh else _NOT_FRESH
        found, new = _numbers(step, run, SimpleNamespace(**vars(h)), scalars, new_to_it)
        param = run.bucket.params[position]
        numbers.append({name: _fitting(found[name], param) for name in run.bucket.rule.given})
        _check_numbers(run, numbers[-1])
        run.scalars.append(new)
    run.bucket.coefficients, run.bucket.row = numbers, np.arange(len(run.params))


def _fitting(number: Any, param: Tensor) -> Any:
    """Return a number that leaves the dtype of a 0-d parameter alone, as it does that of any other."""
    if isinstance(number, Tensor) and number.is_floating_point() and not param.dim():
        return number.to(torch.promote_types(param.dtype, torch.float32))
    return number


def _are_shown(run: BucketRun) -> bool:
    """Return whether a scalar must stay a tensor; of those that a guard reads only the need of a gradient is new."""
    if run.guard and run.guard.scalars_in_memory:
        return torch.is_grad_enabled() and any(map(_needs_grad, run.guard.scalars))
    return any(_is_shown(entry[scalar.name]) for entry in run.entries for scalar in run.bucket.rule.scalars)


def _is_shown(value: Any) -> bool:
    """Return whether a scalar must stay a tensor: its value cannot be read, or a gradient flows through it."""
    return isinstance(value, Tensor) and (value.requires_grad or has_no_values(value))


def _operand(value: Any) -> Any:
    """Return a scalar for arithmetic: a copy in float64 where it must stay a tensor, else a number."""
    if _is_shown(value) or (isinstance(value, Tensor) and mode_is_active()):
        return value.to(torch.float64, copy=True)
    return float(number_of(value))


def _store_each(run: BucketRun) -> None:
    for entry, values in zip(run.entries, run.scalars, strict=True):
        for scalar, value in zip(run.bucket.rule.scalars, values, strict=True):
            if isinstance(value, Tensor) and isinstance(old := entry[scalar.name], Tensor):
                old.copy_(value)
            else:
                write_scalars([entry], [scalar], np.full((1, 1), float(number_of(value))))


# On the device


def _compute_on_device(step: StepInput, run: BucketRun, fresh: list[Fresh]) -> None:
    """Put the numbers into a bucket without reading anything from the parameters' device."""
    place = run.bucket.device
    if run.device_scalars is None:
        refuse_new_buckets(run.spec.name)
        kernels = run.engine is gpu
        run.device_scalars = DeviceScalars(run.entries, run.bucket.rule.scalars, place, fresh, by_kernel=kernels)
    h = numbers_on(place, _with_shared(step, run, hyperparameters(run.group)))
    scalars = dict(zip((s.name for s in run.bucket.rule.scalars), run.device_scalars.read(), strict=True))
    numbers, run.scalars = _numbers(step, run, h, scalars, run.device_scalars.fresh)
    numbers |= {name: number_on(place, numbers[name]) for name in ("loss_scale", "step_clip")}
    run.bucket.coefficients = EachParameter({name: numbers[name] for name in run.bucket.rule.given}, len(run.params))
    run.bucket.row = np.arange(len(run.params))
    run.bucket.found_inf = None if step.found_inf is None else step.found_inf.to(place, non_blocking=True)


def store_device_scalars(run: BucketRun, scalars: DeviceScalars, *, made: bool) -> None:
    """Count a step on the device, unless the device has found infinities; what is fresh stays so until one is made."""
    if made:
        scalars.write(run.scalars, run.bucket.found_inf)
    scalars.settle_fresh(run.bucket.found_inf)


def forget_fresh(run: BucketRun) -> None:
    """Drop slots that were made for steps that have all been skipped, so that they are made anew."""
    known = (False, False) if run.device_scalars is None else run.device_scalars.fresh
    for fresh, slots in zip(known, (run.spec.slots, (EMA,)), strict=True):
        if isinstance(fresh, Tensor):
            for entry in compress(run.entries, fresh.tolist()):
                for slot in slots:
                    entry.pop(slot.name, None)
