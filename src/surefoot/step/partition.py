"""Param groups divided into buckets, each with the state that it needs and the engine that will run it."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.engines import Bucket, choose
from surefoot.engines.identity import identity_of
from surefoot.rule import EMA, ENGINE_OPTIONS, Rule, Slot, bind
from surefoot.state.check import format_param, stepped_gradient
from surefoot.state.formats import param_format, slot_format
from surefoot.state.make import discard_state, ensure_state
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun, ParamSlice, Sampled, sampled_elements
from surefoot.storage import Format, format_of
from surefoot.tensors.memory import has_address, shared_memory
from surefoot.tensors.modes import outside_inference
from surefoot.tensors.shards import is_sharded, to_local


def partition(step: StepInput) -> list[BucketRun]:
    """Return the buckets of all rules with their state; whatever goes wrong, no state is left that was not there.

    Raises:
        RuntimeError: a gradient or state does not fit its parameter, or the engine that was asked for cannot serve it.
    """
    turns: defaultdict[int, int] = defaultdict(int)
    keys = functools.cache(step.keys)
    rules = [group for group in step.groups if step.spec.of(group).update is not None]
    runs = [run for group in rules for run in _divide(step, group, turns, keys)]
    try:
        made: dict[Tensor, dict[str, bool]] = {}
        for run in runs:
            _attach_state(step, run)
            # What is met again in its first step is as new as it was then.
            run.made = [made.setdefault(param, names) for param, names in zip(run.params, run.made, strict=True)]
        _refuse_shared_memory(runs)
        _refuse_repeated(runs)
    except BaseException:
        detach_state(step, runs)
        raise
    return runs


def _divide(
    step: StepInput, group: dict[str, Any], turns: defaultdict[int, int], keys: Callable[[], Mapping[Tensor, Any]]
) -> Iterator[BucketRun]:
    """Yield the buckets of a group, refusing what the rule or the chosen engine cannot do.

    Args:
        step: the step.
        group: the group.
        turns: how often a parameter or a step count, by its id, has been met; what is met again gets a later bucket.
        keys: return what random bits know each parameter by.
    """
    spec, flags = step.spec.of(group), step.flags(group)
    of_rows = tuple((name, value and name != "ema") for name, value in flags)  # averages are of all rows
    buckets: dict[tuple[Any, ...], tuple[ParamSlice, Bucket]] = {}
    for param in group["params"]:
        if (given := step.gradient(param)) is None:
            continue
        entry = step.state.get(param, {})
        grad = stepped_gradient(spec, group, param, given, entry, flags)
        own = spec.flags_of(group, param) if spec.flags_of else {}
        settled = tuple((name, own.get(name, value)) for name, value in (of_rows if grad.is_sparse else flags))
        every = spec.active_slots(dict(settled))
        slots = [slot for slot in every if not slot.is_number and not slot.is_sampled(group)]
        held = [value for slot in slots if (value := entry.get(slot.name)) is not None]
        formats = _formats(group, param, grad, entry, slots)
        numbers = [*(scalar.name for scalar in spec.scalars), *(slot.name for slot in every if slot.is_number)]
        turn = _take_turn(turns, (param, *map(entry.get, numbers)))
        apart = [slot_format(slot, group, param, entry.get(slot.name)) for slot in every if slot.is_sampled(group)]
        dtypes = (param.dtype, grad.dtype, *(kept.dtype for kept in apart))
        together = step.transfers.bucket(param) if step.transfers else 0
        key = (param.device, dtypes, grad.layout, is_sharded(param), formats, settled, together, turn)
        if key not in buckets:
            params: list[Tensor] = []
            options = {name: group.get(name) for name in ENGINE_OPTIONS}
            rule = bind(spec, (*settled, ("rounded", any(kept.stochastic for kept in formats))))
            row_name = functools.partial(_format_row, group, params)
            bucket = Bucket(rule, [], [], options, row_name=row_name, formats=formats)
            bucket.seed = int(group.get("rounding_seed") or 0)
            buckets[key] = ParamSlice(group, params), bucket
        part, bucket = buckets[key]
        part.params.append(param)
        bucket.params.append(to_local(param))
        bucket.slots.append([to_local(slot) for slot in held])
        if bucket.is_rounded:
            bucket.identities = [*bucket.identities, identity_of(param, keys()[param])]
        bucket.grads.append(grad if grad.is_sparse else to_local(grad))
    for (*_, turn), (part, bucket) in buckets.items():
        yield BucketRun(spec, part, bucket, choose(bucket), sparse=bucket.grads[0].is_sparse, repeats=turn > 0)


def _formats(
    group: Mapping[str, Any], param: Tensor, grad: Tensor, entry: Mapping[str, Any], slots: Sequence[Slot]
) -> tuple[Format, ...]:
    """Return the formats of a parameter and of its slots.

    Raises:
        RuntimeError: the gradient is sparse, and its rows cannot be kept so.
    """
    formats = (
        param_format(group, param, entry),
        *(slot_format(slot, group, param, entry.get(slot.name)) for slot in slots),
    )
    if not grad.is_sparse:
        return formats
    names = ("the parameter", *(f"state `{slot.name}`" for slot in slots))
    for position, (name, kept) in enumerate(zip(names, formats, strict=True)):
        if kept.part or (kept.stochastic and not position):
            raise RuntimeError(
                f"the gradient of {format_param(group, param)} is sparse, and {name} is kept as {kept.name}, which "
                f"cannot be stepped row by row; put the parameter into a group with "
                f"state_dtype=torch.float32, rounding='nearest', master_weight_bits=None"
            )
    return tuple(format_of(kept.dtype) for kept in formats)


def _take_turn(turns: defaultdict[int, int], objects: Iterable[object]) -> int:
    """Return how many steps come before one of these tensors, which share one of them, and count it."""
    # Scalars may be several tensors of one memory.
    ids = [
        (not each.dim() and has_address(each) and each.data_ptr()) or id(each)
        for each in objects
        if isinstance(each, Tensor)
    ]
    turn = max(turns[i] for i in ids)
    turns.update(dict.fromkeys(ids, turn + 1))
    return turn


def _format_row(group: Mapping[str, Any], params: Sequence[Tensor], row: int) -> str:
    return format_param(group, params[row])


def _attach_state(step: StepInput, run: BucketRun) -> None:
    """Make what is missing of the state and put the slots into the bucket."""
    slots, scalars = run.bucket.rule.slots, run.bucket.rule.scalars
    sampled = run.bucket.rule.sampled
    needed = (*slots, *run.bucket.rule.number_slots, *(sampled.slots if sampled else ()))
    if run.group.get("ema") and EMA not in slots:
        needed = (*needed, EMA)
    for param in run.params:
        run.made.append(ensure_state(scalars, run.group, param, step.state, needed))
    run.entries = [step.state.get(param, {}) for param in run.params]
    columns = [[to_local(entry[name]) for entry in run.entries] for name in run.stored_names()]
    run.bucket.slots, run.bucket.parts = columns[: len(slots)], columns[len(slots) :]
    run.sampled = None if sampled is None else _sampled(run, sampled)


def _sampled(run: BucketRun, rule: Rule) -> Sampled:
    """Return the slots of a bucket that are kept of some elements, with copies of those elements."""
    every, bucket = run.group[str(rule.slots[0].sampled)], run.bucket
    params, grads = sampled_elements(run, every)
    with outside_inference():  # later steps write them in another mode
        params, grads = [value.to(bucket.compute_dtype, copy=True) for value in params], list(map(torch.clone, grads))
    slots = [[to_local(entry[slot.name]) for entry in run.entries] for slot in rule.slots]
    found = Bucket(rule, params, grads, bucket.options, slots, row_name=bucket.row_name)
    return Sampled(found, choose(found), every)


def detach_state(step: StepInput, runs: Sequence[BucketRun]) -> None:
    """Take away the state that was made for a step that is not made."""
    for run in runs:
        for param, made in zip(run.params, run.made, strict=False):
            discard_state(step.state, param, made)


def _refuse_repeated(runs: Sequence[BucketRun]) -> None:
    """Refuse parameters that must be stepped one after the other where a rule adds up over all of them.

    Raises:
        RuntimeError: there is one; the message names it.
    """
    for run in runs:
        if run.repeats and any(stage.totals for stage in run.bucket.rule.stages):
            raise RuntimeError(
                f"{run.spec.name} adds up over all parameters at once, but {run.bucket.row_name(0)} stands in the "
                f"groups twice or counts its steps with another's; leave it out once, or give it state of its own"
            )


class _Stored(NamedTuple):
    """A tensor of a step: of which parameter, under which name, and whether it is only read."""

    tensor: Tensor
    run: BucketRun
    row: int
    name: str


def _refuse_shared_memory(runs: Sequence[BucketRun]) -> None:
    """Refuse gradients that share memory with what a step writes, and state that does with its own parameter.

    Raises:
        RuntimeError: a tensor does; the message names it.
    """
    of_device: defaultdict[torch.device, list[_Stored]] = defaultdict(list)
    for run in runs:
        bucket = run.bucket
        columns = dict(zip(("parameter", *run.stored_names()), bucket.columns(), strict=True))
        if run.sampled is not None:
            columns |= zip((slot.name for slot in run.sampled.bucket.rule.slots), run.sampled.bucket.slots, strict=True)
        if not run.sparse:
            columns[_GRADIENT] = bucket.grads
        for name, column in columns.items():
            of_device[bucket.device] += [_Stored(t, run, row, name) for row, t in enumerate(column) if has_address(t)]
    for found in of_device.values():
        pair = shared_memory([stored.tensor for stored in found], functools.partial(_matters, found))
        if pair is not None:
            one, other = sorted((found[position] for position in pair), key=lambda stored: stored.name != _GRADIENT)
            owner = one.run.bucket.row_name(one.row)
            if one.name == _GRADIENT:
                raise RuntimeError(
                    f"the gradient of {owner} shares memory with parameters or state that the step writes; give it "
                    f"memory of its own: p.grad = p.grad.clone()"
                )
            raise RuntimeError(
                f"`{one.name}` and `{other.name}` of {owner} share memory; give each its own, or delete the state with "
                f"`del optimizer.state[param]`"
            )


_GRADIENT = " gradient"


def _matters(found: Sequence[_Stored], i: int, j: int) -> bool:
    """Return whether it matters that two tensors share memory; parameters that do are stepped one after the other."""
    one, other = found[i], found[j]
    if (one.name == _GRADIENT) != (other.name == _GRADIENT):
        return True
    return one.name != _GRADIENT and one.run is other.run and one.row == other.row
