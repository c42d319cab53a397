"""Param groups divided into buckets, each with the state that it needs and the engine that will run it."""

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.engines import Bucket, choose
from surefoot.rule import EMA, ENGINE_OPTIONS, Flags, bind
from surefoot.state.check import format_param, validated_gradient
from surefoot.state.make import ensure_state
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun, ParamSlice
from surefoot.tensors.memory import is_plain, shared_memory
from surefoot.tensors.shards import to_local


def all_flags(step: StepInput, group: Mapping[str, Any]) -> Flags:
    """Return a group's flags, and those of the step.

    These are: whether telemetry is measured, decided later; whether a GradScaler left the gradients for the step to
    unscale; whether they are clipped by norm.
    """
    flags = (("measured", False), ("scaled", step.grad_scale is not None), ("clipped", step.is_clipped(group)))
    return (*flags, *step.spec.settle_flags(group))


def partition(step: StepInput) -> list[BucketRun]:
    """Return the buckets of all groups with their state; whatever goes wrong, no state is left that was not there.

    Raises:
        RuntimeError: a gradient or state does not fit its parameter, or the engine that was asked for cannot serve it.
    """
    runs = [run for group in step.groups for run in _divide(step, group)]
    try:
        for run in runs:
            _attach_state(step, run)
        _refuse_written_gradients(runs)
    except BaseException:
        detach_state(step, runs)
        raise
    return runs


def _divide(step: StepInput, group: dict[str, Any]) -> Iterator[BucketRun]:
    """Yield the buckets of a group, refusing what the rule or the chosen engine cannot do."""
    spec, flags = step.spec, all_flags(step, group)
    of_rows = tuple((name, value and name != "ema") for name, value in flags)  # averages are of all rows
    buckets: dict[tuple[Any, ...], tuple[ParamSlice, Bucket]] = {}
    for param in group["params"]:
        if param.grad is None:
            continue
        entry = step.state.get(param, {})
        grad = validated_gradient(spec, group, param, entry, flags)
        held = [entry.get(slot.name) for slot in spec.all_slots]
        dtypes = tuple(None if slot is None else slot.dtype for slot in held)
        key = (param.device, param.dtype, grad.dtype, grad.layout, dtypes)
        if key not in buckets:
            params: list[Tensor] = []
            options = {name: group.get(name) for name in ENGINE_OPTIONS}
            rule = bind(spec, of_rows if grad.is_sparse else flags)
            row_name = functools.partial(_format_row, group, params)
            buckets[key] = ParamSlice(group, params), Bucket(rule, [], [], options, row_name=row_name)
        part, bucket = buckets[key]
        part.params.append(param)
        bucket.params.append(to_local(param))
        bucket.slots.append([to_local(slot) for slot in held if slot is not None])
        bucket.grads.append(grad if grad.is_sparse else to_local(grad))
    for part, bucket in buckets.values():
        yield BucketRun(spec, part, bucket, choose(bucket), sparse=bucket.grads[0].is_sparse)


def _format_row(group: Mapping[str, Any], params: Sequence[Tensor], row: int) -> str:
    return format_param(group, params[row])


def _attach_state(step: StepInput, run: BucketRun) -> None:
    """Make what is missing of the state and put the slots into the bucket."""
    slots = run.bucket.rule.slots
    needed = (*slots, EMA) if run.group.get("ema") else slots
    run.made = [ensure_state(step.spec, run.group, param, step.state, needed) for param in run.params]
    run.entries = [step.state.get(param, {}) for param in run.params]
    run.bucket.slots = [[to_local(entry[slot.name]) for entry in run.entries] for slot in slots]


def detach_state(step: StepInput, runs: Sequence[BucketRun]) -> None:
    """Take away the state that was made for a step that is not made."""
    for run in runs:
        for param, names in zip(run.params, run.made, strict=False):
            for name in names:
                del step.state[param][name]
            if not step.state.get(param, True):
                del step.state[param]


def _refuse_written_gradients(runs: Sequence[BucketRun]) -> None:
    """Refuse gradients that a step would change, since they share memory with what it writes.

    Raises:
        RuntimeError: a gradient does; the message names its parameter.
    """
    tensors: defaultdict[torch.device, list[tuple[Tensor, BucketRun, int, bool]]] = defaultdict(list)
    for run in runs:
        bucket = run.bucket
        columns = (bucket.params, *bucket.slots, *(() if run.sparse else (bucket.grads,)))
        for number, column in enumerate(columns):
            is_gradient = number > len(bucket.slots)
            tensors[bucket.device] += [(t, run, row, is_gradient) for row, t in enumerate(column) if is_plain(t)]
    for found in tensors.values():
        of_gradient = [is_gradient for _, _, _, is_gradient in found]
        if (pair := shared_memory([tensor for tensor, *_ in found], of_gradient)) is not None:
            run, row = next(found[position][1:3] for position in pair if of_gradient[position])
            raise RuntimeError(
                f"the gradient of {run.bucket.row_name(row)} shares memory with parameters or state that the step "
                f"writes; give it memory of its own: p.grad = p.grad.clone()"
            )
