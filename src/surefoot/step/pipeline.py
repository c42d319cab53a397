"""A step of a rule, from top to bottom.

Everything that can be refused is refused while buckets are made, before any state exists or changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from surefoot.averages import Averaging
from surefoot.engines import Bucket, Engine, cpu, gpu
from surefoot.rule import EMA, bind
from surefoot.state.make import is_on_device
from surefoot.step.cache import OptionsGuard, StepCache
from surefoot.step.clipping import clip_or_skip, measure_gradients
from surefoot.step.coefficients import compute_coefficients, forget_fresh, store_device_scalars, store_scalars
from surefoot.step.context import StepContext
from surefoot.step.device import refuse_capture
from surefoot.step.fast_lane import fast_lane
from surefoot.step.inputs import StepInput
from surefoot.step.metrics import step_metrics
from surefoot.step.partition import detach_state, partition
from surefoot.step.types import BucketRun, ParamSlice
from surefoot.tensors.shards import is_sharded, to_local


def run_step(step: StepInput, cache: StepCache | None) -> StepCache | None:
    """Step every parameter that has a gradient; a GradScaler's `found_inf` leaves everything as it is.

    Returns:
        What the next step may use again.
    """
    refuse_capture(step.spec.name, step.groups)
    step.stepping.context.acquire()
    if _found_infinities(step):
        step.skip()
        return cache
    known = None if cache is None else cache.revalidate(step)
    if known is None and cache is not None:
        for run in cache.runs:
            forget_fresh(run)
            _release_grads(run)
    options = OptionsGuard(step) if known is None else None
    runs = partition(step) if known is None else known
    try:
        if not _prepare(step, runs):
            return cache if known is not None else None  # what was kept has been found not to hold
        if options is not None:
            cache = StepCache.of(step, options, runs)
        for run in runs:
            if run.repeats:
                compute_coefficients(step, run)
            _update(run)
    finally:
        for run in runs:
            _release_grads(run)
    if known is not None and cache is not None and cache.fast is None:
        cache.fast = fast_lane(step, cache) or False  # False: not again
    return cache


def _found_infinities(step: StepInput) -> bool:
    """Return whether a GradScaler has found infinities, as far as the host is to know."""
    if step.found_inf is None:
        return False
    params = ((group, param) for group in step.groups for param in group["params"])
    return not all(is_on_device(group, param) for group, param in params) and bool(step.found_inf)


def _prepare(step: StepInput, runs: Sequence[BucketRun]) -> bool:
    """Prepare a step and return whether it is to be made; if not, for whatever reason, no state is left."""
    made = False
    try:
        made = _measure_and_compute(step, runs)
    finally:
        if not made:
            detach_state(step, runs)
    return made


def _measure_and_compute(step: StepInput, runs: Sequence[BucketRun]) -> bool:
    """Measure the gradients where asked to, and compute the numbers; return whether the step is to be made."""
    context = step.stepping.context
    context.slices = [run.slice for run in runs]
    for run in runs:
        part = run.slice
        part.gradients, part.clip, part.before, part.fresh = None, 1.0, None, None
        _bind_metrics(run, wanted=context.reductions)
        if run.engine is not gpu or not run.sparse:  # rows are gathered for it
            run.engine.prepare(run.bucket)
    if runs and step.needs_gradients():
        for run in runs:
            by_torch = run.sparse or is_sharded(run.params[0])
            run.slice.gradients = measure_gradients(run.params) if by_torch else run.engine.measure(run.bucket)
        if not clip_or_skip(step, context.slices):
            return False
    for run in runs:
        compute_coefficients(step, run)
    return True


def _bind_metrics(run: BucketRun, *, wanted: bool) -> None:
    """Let the update measure, or not, what telemetry wants to know."""
    if wanted and run.params[0].is_meta:
        raise RuntimeError(f"{run.bucket.row_name(0)} is on meta, where nothing can be measured; leave out `telemetry`")
    if not run.sparse and not is_sharded(run.params[0]):
        flags = run.bucket.rule.flags
        if flags[0] != ("measured", wanted):
            run.bucket.rule = bind(run.spec, (("measured", wanted), *flags[1:]))
    elif wanted:
        run.slice.before = [param.detach().clone() for param in run.params]


def _update(run: BucketRun) -> None:
    """Update a bucket's parameters and count the step."""
    found_inf = run.bucket.found_inf
    if run.device_scalars is None:
        _run_engine(run)
        store_scalars(run)
    else:
        made = run.engine is gpu or found_inf is None or not float(found_inf)
        if made:
            _run_engine(run)
        store_device_scalars(run, run.device_scalars, made=made)
    run.slice.sums, run.bucket.measured = run.bucket.measured, None
    run.made, run.scalars = [], None


def _run_engine(run: BucketRun) -> None:
    if run.sparse:
        _run_rows(run.engine, run.bucket)
    else:
        run.engine.run(run.bucket)


def _run_rows(engine: Engine, bucket: Bucket) -> None:
    """Run an engine on the rows at which coalesced sparse gradients have values."""
    if engine is cpu and cpu.run_rows(bucket):
        return
    # A gradient without sparse dimensions is its only row.
    index = [tuple(grad.indices()) or (torch.zeros(len(grad.values()), dtype=torch.long),) for grad in bucket.grads]
    whole = [
        [t if grad.sparse_dim() else t[None] for t, grad in zip(tensors, bucket.grads, strict=True)]
        for tensors in (bucket.params, *bucket.slots)
    ]
    params, *slots = [[t[i] for t, i in zip(tensors, index, strict=True)] for tensors in whole]
    values = [to_local(grad.values()) for grad in bucket.grads]
    engine.run(replace(bucket, params=params, grads=values, slots=slots, plan=None))
    for tensors, parts in zip(whole, (params, *slots), strict=True):
        for tensor, part, i in zip(tensors, parts, index, strict=True):
            tensor[i] = part


def _release_grads(run: BucketRun) -> None:
    """Hold this step's gradients no longer."""
    run.bucket.grads, run.bucket.gradient_addresses = [], None
    if run.guard:
        run.guard.release_grads()


# After the update


def finish(context: StepContext, step_input: Callable[[], StepInput]) -> Any:
    """Average what the update has not averaged, and return what was measured, None if nothing was."""
    if not context.reductions and all(part.fresh is None for part in context.slices):
        context.slices = []
        return None
    step = step_input()
    if not context.skips:
        for part in context.slices:
            if part.fresh is not None:
                _average(step, part, part.fresh)
    metrics = step_metrics(step) if context.reductions else None
    context.slices = []
    return metrics


def _average(step: StepInput, part: ParamSlice, known: list[bool]) -> None:
    for fresh in set(known):
        params = [param for param, new in zip(part.params, known, strict=True) if new is fresh]
        averages = [step.state[param][EMA.name] for param in params]
        Averaging(averages, [param.detach() for param in params]).move(1.0 if fresh else 1 - part.group["ema"])
