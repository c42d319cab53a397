"""Custom steps: the parameters of algorithms that are not rules, with everything done around an update."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.engines.identity import identity_of
from surefoot.rule import EMA, ROUNDING_STEP, STEP
from surefoot.state.check import hyperparameters
from surefoot.state.convert import plain_param
from surefoot.state.formats import CORRECTION, param_format
from surefoot.state.make import discard_state, ensure_state
from surefoot.step.custom_params import CustomParams, are_transformed, custom_groups, transformed
from surefoot.step.device import numbers_on, refuse_new_buckets
from surefoot.step.inputs import StepInput
from surefoot.step.ranks import refuse_irregular
from surefoot.step.types import ParamSlice, PreparedParam
from surefoot.storage import Format, encode, random_bits
from surefoot.tensors.memory import is_plain
from surefoot.tensors.shards import to_local


class CustomRun(NamedTuple):
    """The parameters of custom steps in a step that is being made; `find_custom_params` gives it.

    Attributes:
        params: the parameters, found fit.
        known: whether the last step has found them fit, so that all state is there.
        slices: the parameters of each group that has some.
        grads: as many lists of their gradients.
        rows: the parameters, once they are prepared.
    """

    params: CustomParams
    known: bool
    slices: list[ParamSlice]
    grads: list[list[Tensor]]
    rows: list[PreparedParam]

    def measure(self) -> None:
        """Measure the gradients."""
        for part, measured in zip(self.slices, self.params.measure(self.grads), strict=True):
            part.gradients = measured

    def prepare(self, step: StepInput) -> None:
        """Make what is missing of the state and prepare all parameters; whatever goes wrong, no new state is left."""
        made: list[tuple[Tensor, dict[str, bool]]] = []
        try:
            for part in () if self.known else self.slices:
                made += _make_state(step, part)
            if made:
                self.params.take_entries(step)
            new = {param for param, names in made if EMA.name in names}
            for part, grads, entries in zip(self.slices, self.grads, self.params.entries, strict=True):
                self.rows.extend(_prepared(step, part, grads, entries, new, apart=self.params.overlap))
            if self.params.overlap:
                _refuse_short(self.rows)
        except BaseException:
            for param, names in made:
                discard_state(step.state, param, names)
            raise

    def update(self, step: StepInput) -> None:
        """Count the step of every parameter and make it."""
        with _full_precision(step, _counted(self.rows, self.params.repeated)) as rows:
            step.make_custom_step(rows)(rows)


def find_custom_params(step: StepInput, known: CustomParams | None) -> CustomRun | None:
    """Return the parameters of custom steps that have a gradient, all of them checked; nothing is changed.

    Args:
        step: the step.
        known: those of the last step, if nothing of them has changed but values.

    Returns:
        The parameters, None if there are none.
    """
    groups = custom_groups(step)
    if not groups:
        return None
    refuse_irregular(step)
    for group in groups:
        for param in group["params"]:
            if step.gradient(param) is not None:
                step.check_param(group, param)
    found = CustomParams(step) if known is None else known
    if not found.slices:
        return None
    if known is None and not all(step.state.get(param) for part in found.slices for param in part.params):
        refuse_new_buckets(step.spec.name)
    slices = [ParamSlice(part.group, part.params) for part in found.slices]
    return CustomRun(found, known is not None, slices, found.take_gradients(), [])


def _make_state(step: StepInput, part: ParamSlice) -> Iterator[tuple[Tensor, dict[str, bool]]]:
    """Make what is missing of the state of a group's parameters; yield each with what was made, see `ensure_state`."""
    group, spec = part.group, step.spec.of(part.group)
    flags = dict(spec.settle_flags(group)) | {"rounded": group.get("rounding") == "stochastic"}
    slots, scalars = spec.active_slots(flags), spec.active_scalars(flags)
    for param in part.params:
        yield param, ensure_state(scalars, group, param, step.state, slots)


def _prepared(
    step: StepInput,
    part: ParamSlice,
    grads: Sequence[Tensor],
    entries: Sequence[dict[str, Any]],
    new: set[Tensor],
    *,
    apart: bool,
) -> list[PreparedParam]:
    """Return the parameters of a group; `new` are those whose average is newly initialized."""
    group, plain = part.group, hyperparameters(part.group)
    part.fresh = [param in new for param in part.params] if group.get("ema") else None
    part.before = [param.detach().clone() for param in part.params] if step.stepping.context.wants_metrics else None
    if step.grad_scale is not None or step.is_clipped(group) or are_transformed(group):
        grads = [_transformed(step, group, grad, part.clip_of(position)) for position, grad in enumerate(grads)]
    rows = zip(part.params, grads, entries, strict=True)
    if not group.get("capturable") and all(param.is_cpu for param in part.params):
        return [PreparedParam(plain, *row, apart) for row in rows]
    moved = functools.cache(lambda place: numbers_on(place, plain))
    on_host = not group.get("capturable")
    return [PreparedParam(plain if on_host and row[0].is_cpu else moved(row[0].device), *row, apart) for row in rows]


def _transformed(step: StepInput, group: dict[str, Any], grad: Tensor, clip: Any) -> Tensor:
    """Return a gradient as an algorithm is to see it, multiplied with `clip`."""
    grad = grad if step.grad_scale is None else grad / step.grad_scale
    return transformed(group, grad * clip if step.is_clipped(group) else grad)


def _refuse_short(rows: Sequence[PreparedParam]) -> None:
    """Refuse parameters that are kept in short formats, where some share memory.

    Raises:
        RuntimeError: there is one.
    """
    if any(not param_format(vars(row.h), row.param, row.state).is_plain for row in rows):
        raise RuntimeError(
            "parameters or their state share memory, so that they cannot be kept with rounding='stochastic' or "
            "master_weight_bits; put them into a group without these options"
        )


def _counted(rows: list[PreparedParam], repeated: set[Tensor]) -> list[PreparedParam]:
    """Count the step of every parameter; one that is there twice has a count of its own each time."""
    for row in rows:
        if ROUNDING_STEP.name in row.state:
            row.state[ROUNDING_STEP.name] += 1
    counts = [row.state["step"] for row in rows if "step" in row.state]
    if not repeated and all(isinstance(count, Tensor) and is_plain(count) for count in counts):
        if counts:
            torch._foreach_add_(counts, 1)
        return rows
    found = []
    for row in rows:
        if "step" in row.state:
            row.state["step"] += 1
            if row.param in repeated:
                found.append(row._replace(state={**row.state, "step": deepcopy(row.state["step"])}))
                continue
        found.append(row)
    return found


@contextmanager
def _full_precision(step: StepInput, rows: Sequence[PreparedParam]) -> Iterator[list[PreparedParam]]:
    """Let a custom step see parameters that are kept in short formats as float32 copies; store these in the end."""
    copies: dict[Tensor, tuple[PreparedParam, Format, Tensor]] = {}
    for row in rows:
        kept = param_format(vars(row.h), row.param, row.state)
        if not kept.is_plain and row.param not in copies:
            copies[row.param] = row, kept, plain_param(vars(row.h), row.param, row.state).float()
    if not copies:
        yield list(rows)
        return
    yield [row._replace(param=copies[row.param][2]) if row.param in copies else row for row in rows]
    keys = step.keys()
    for param, (row, kept, value) in copies.items():
        random = None
        if kept.stochastic:
            who = identity_of(param, keys[param])
            counts = [row.state[name] for name in (STEP.name, ROUNDING_STEP.name) if name in row.state]
            count, local = counts[0], to_local(param)
            random = random_bits(vars(row.h).get("rounding_seed") or 0, who.number, count, who.numbers(local), 0)
        targets = (param, row.state[CORRECTION]) if kept.part else (param,)
        for target, stored in zip(targets, encode(kept, to_local(value), random), strict=True):
            to_local(target).copy_(stored)
