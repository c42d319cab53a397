"""Prepared parameters: what optimizers with a custom step take theirs from, with everything done around an update."""

import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from surefoot.rule import EMA
from surefoot.state.check import hyperparameters, validated_gradient
from surefoot.state.make import ensure_state, is_on_device
from surefoot.step.clipping import clip_or_skip, measure_gradients
from surefoot.step.device import numbers_on, refuse_capture, refuse_new_buckets
from surefoot.step.inputs import StepInput
from surefoot.step.types import ParamSlice


class PreparedParam(NamedTuple):
    """A parameter to be stepped by a custom step; its state is there, its step counted."""

    h: SimpleNamespace
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


def prepare_params(step: StepInput) -> list[PreparedParam]:
    """Return every parameter that has a gradient, clipped and negated under `maximize`, with its state.

    All are checked first.  There are none in a step that is to be skipped.
    """
    refuse_capture(step.spec.name, step.groups)
    step.stepping.context.acquire()
    found = []
    for group in step.groups:
        params = [param for param in group["params"] if param.grad is not None]
        grads = [validated_gradient(step.spec, group, param, step.state.get(param, {})) for param in params]
        found.append((ParamSlice(group, params), grads))
    if not all(step.state.get(param) for part, _ in found for param in part.params):
        refuse_new_buckets(step.spec.name)
    slices = [part for part, _ in found if part.params]
    step.stepping.context.slices = slices
    if step.needs_gradients():
        for part in slices:
            part.gradients = measure_gradients(part.params)
        if slices and not clip_or_skip(step, slices):
            return []
    return [row for part, grads in found for row in _prepared(step, part, grads)]


def _prepared(step: StepInput, part: ParamSlice, grads: Sequence[Tensor]) -> Iterator[PreparedParam]:
    """Yield the parameters of a group."""
    group, slots = part.group, step.spec.active_slots(dict(step.spec.settle_flags(part.group)))
    made = [ensure_state(step.spec, group, param, step.state, slots) for param in part.params]
    part.fresh = [EMA.name in names for names in made] if group.get("ema") else None
    part.before = [param.detach().clone() for param in part.params] if step.stepping.context.measures else None
    plain = hyperparameters(group)
    moved = functools.cache(lambda place: numbers_on(place, hyperparameters(group)))
    for param, grad in zip(part.params, grads, strict=True):
        entry = step.state.get(param, {})
        if "step" in entry:
            entry["step"] += 1
        h = moved(param.device) if is_on_device(group, param) or not param.is_cpu else plain
        yield PreparedParam(h, param, _seen(step, part, grad), entry)


def _seen(step: StepInput, part: ParamSlice, grad: Tensor) -> Tensor:
    """Return a gradient as an algorithm is to see it."""
    group = part.group
    grad = grad * part.clip if step.is_clipped(group) else grad
    if limit := group.get("max_grad_value"):
        grad = grad.clamp(-limit, limit)
    return -grad if group.get("maximize") else grad
