"""A step, from top to bottom.

Everything that can be refused is refused before parameters or state change; state that was made for a step that is not
made is taken away again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.averages import Averaging
from surefoot.distributed import Exchange
from surefoot.engines import Bucket, Engine, cpu, eager, gpu, proved
from surefoot.rule import EMA, bind, gradient_rule
from surefoot.state.make import is_on_device
from surefoot.step.cache import OptionsGuard, StepCache
from surefoot.step.clipping import clip_or_skip, measure_gradients, refuse_unmeasurable, warn_left_out
from surefoot.step.coefficients import compute_coefficients, forget_fresh, store_device_scalars, store_scalars
from surefoot.step.context import StepContext
from surefoot.step.custom import CustomRun, find_custom_params
from surefoot.step.custom_params import CustomParams
from surefoot.step.device import refuse_capture
from surefoot.step.fast_lane import fast_lane
from surefoot.step.group_scalars import store_group_scalars
from surefoot.step.inputs import StepInput
from surefoot.step.metrics import measured_sums, step_metrics
from surefoot.step.partition import detach_state, partition
from surefoot.step.ranks import RankSums, due_exchange, report_failure, sums_over_ranks
from surefoot.step.reductions import measure_tensors, store_numbers
from surefoot.step.types import BucketRun, ParamSlice
from surefoot.tensors.memory import counts_versions
from surefoot.tensors.modes import mode_is_active
from surefoot.tensors.shards import is_sharded, to_local


def run_step(
    step: StepInput, cache: StepCache | None, stepped: Callable[[Sequence[BucketRun]], None] | None = None
) -> StepCache | None:
    """Step every parameter that has a gradient; a GradScaler's `found_inf` leaves everything as it is.

    Where `nonfinite_params` leaves out some, all others are stepped.  To be called inside of
    `with step.stepping.context`, which releases the lock that is taken here.

    Args:
        step: the step.
        cache: what the last step has returned.
        stepped: is told of the buckets when they have been stepped.

    Returns:
        What the next step may use again; nothing while a mode is active that must see the operations, or where
        gradients are not the parameters' own.
    """
    cache, context = _run(step, cache, stepped), step.stepping.context
    if not context.left_out:
        return cache
    left_out, context.left_out = set(context.left_out), []
    context.slices = []  # what was measured with them
    params = step.params()
    finite = {param: None if param in left_out else param.grad for param in params}
    _run(step._replace(grads=finite), None, stepped)
    warn_left_out(step.whole or step, [param for param in params if param in left_out])
    for group in step.groups:
        if own := [param for param in group["params"] if param in left_out]:
            step.slices.append(ParamSlice(group, own))
    return None


def _run(
    step: StepInput, cache: StepCache | None, stepped: Callable[[Sequence[BucketRun]], None] | None
) -> StepCache | None:
    """Step every parameter that has a gradient, see `run_step`, or note those that are to be left out."""
    refuse_capture(step.spec.name, step.groups)
    step.stepping.context.acquire()
    cache = None if cache is None else cache.of_now()
    exchange = due_exchange(step)
    if exchange is None and _skip(step):
        return cache
    with report_failure(step, exchange):
        _wait_for_gradients(step)
        parts = _find_parts(step, cache)
    try:
        agreed = _prepare(step, parts, exchange)
        if agreed is None:
            return cache if parts.holds else None  # what was kept has been found not to hold
        if not parts.holds:
            cache = _new_cache(step, parts, cache)
        _update_all(agreed, parts, exchange)
        if stepped is not None:
            stepped(parts.runs)
    finally:
        step.stepping.context.group_scalars = []
        _release_grads(parts.runs, parts.custom_params)
    if parts.holds and cache is not None and cache.fast is None and parts.are_all_of(cache):
        cache.fast = fast_lane(step, cache)  # from the second step like this one on
    return cache


class _Parts(NamedTuple):
    """The buckets and custom parameters that a step updates.

    Attributes:
        runs: the buckets.
        custom: the parameters of custom steps, None if there are none.
        holds: whether they are those of the last step, as far as its cache has them.
        options: otherwise what guards the options that they come from; None where nothing is to be kept.
    """

    runs: list[BucketRun]
    custom: CustomRun | None
    holds: bool = False
    options: OptionsGuard | None = None

    @property
    def custom_params(self) -> CustomParams | None:
        """The parameters of custom steps, as a cache keeps them."""
        return None if self.custom is None else self.custom.params

    def are_all_of(self, cache: StepCache) -> bool:
        """Return whether a cache has these, and there are some."""
        return bool(self.runs or self.custom) and self.custom_params is cache.custom


def _find_parts(step: StepInput, cache: StepCache | None) -> _Parts:
    """Return the buckets and custom parameters of the last step as far as they hold, else of this one."""
    if step.has_no_gradients():  # what the last step has left still holds, or the next one sees that it does not
        return _Parts([], find_custom_params(step, None), holds=True)
    watched = mode_is_active() or step.grads is not None
    known = cache if cache is not None and not watched and cache.revalidate(step) else None
    custom = find_custom_params(step, None if known is None else known.custom)
    if known is not None and known.runs:
        for run in known.runs:
            if run.sampled is not None:
                run.sampled.renew(run)
        return _Parts(known.runs, custom, holds=True)
    if cache is not None:
        for run in cache.runs:
            forget_fresh(run)
        _release_grads(cache.runs, None if known is not None else cache.custom)
    runs = partition(step)
    if known is not None and not runs:
        return _Parts(runs, custom, holds=True)
    kept = not watched and (runs or custom is not None)
    return _Parts(runs, custom, options=OptionsGuard(step) if kept else None)


def _new_cache(step: StepInput, parts: _Parts, before: StepCache | None) -> StepCache | None:
    """Return what the next step may use again of what this one has to do with."""
    if parts.options is None:
        return None
    return StepCache.of(step, parts.options, parts.runs, parts.custom_params, before)


def _update_all(step: StepInput, parts: _Parts, exchange: Exchange | None) -> None:
    """Update buckets and custom parameters, for which all is prepared."""
    runs = parts.runs
    for run in _in_order(step, runs):
        if run.repeats:
            compute_coefficients(step, run)
            measure_tensors(step, [run], exchange)
        _update(run)
    if parts.custom is not None:
        parts.custom.update(step)
    store_group_scalars(step, step.stepping.context.group_scalars, runs[0].bucket.found_inf if runs else None)


def _skip(step: StepInput) -> bool:
    """Skip a step for which a GradScaler has found infinities; return whether there is nothing else to be done."""
    if step.released is not None and step.has_no_gradients():
        return True
    found = _found_infinities(step)
    if found:
        step.skip()
    return found


def _wait_for_gradients(step: StepInput) -> None:
    """Wait until all gradients are there where they are read before the first bucket is stepped."""
    if step.transfers is not None and step.takes_whole_gradients():
        step.transfers.wait()


def _in_order(step: StepInput, runs: Sequence[BucketRun]) -> Iterator[BucketRun]:
    """Yield buckets in the order in which their gradients arrive, and send back each that has been dealt with."""
    transfers = step.transfers
    if transfers is None:
        yield from runs
        return
    for run in sorted(runs, key=lambda run: (run.repeats, transfers.order(run.params[0]))):
        transfers.wait(run.params)
        yield run
        transfers.send(run.params)


def evaluate_step(step: StepInput) -> list[tuple[BucketRun, list[tuple[Tensor, ...]]]]:
    """Return the buckets of a step, each with what its rule gives for its parameters; no tensor is changed.

    There are none where the step is to be skipped.  Gradients must be dense.
    """
    step.stepping.context.acquire()
    runs = partition(step)
    if any(run.sampled is not None for run in runs):
        raise RuntimeError(
            f"{step.spec.name} with state of every n-th element cannot be transformed by torch.func; let it keep all"
        )
    made = _prepare(step, _Parts(runs, None), None)
    return [] if made is None else [(run, list(eager.evaluate_rows(run.bucket))) for run in runs]


def _found_infinities(step: StepInput) -> bool:
    """Return whether a GradScaler has found infinities, as far as the host is to know."""
    if step.found_inf is None:
        return False
    by_rules = all(step.spec.of(group).update is not None for group in step.groups)
    params = ((group, param) for group in step.groups for param in group["params"])
    on_device = by_rules and all(is_on_device(group, param) for group, param in params)
    return not on_device and bool(step.found_inf)


def _prepare(step: StepInput, parts: _Parts, exchange: Exchange | None) -> StepInput | None:
    """Prepare a step and return it, as all ranks know it; None if it is not to be made, and then no state is left."""
    made, runs, custom = None, parts.runs, parts.custom
    try:
        with report_failure(step, exchange):
            _measure(step, runs, custom)
        sums = None if exchange is None else sums_over_ranks(step, exchange, step.slices)
        known = step if sums is None else step._replace(found_inf=sums.found_inf)
        if _is_to_be_made(known, sums):
            for run in runs:
                compute_coefficients(known, run)
            measure_tensors(known, [run for run in runs if not run.repeats], exchange)
            if custom is not None:
                custom.prepare(known)
            made = known
    finally:
        if made is None:
            detach_state(step, runs)
    return made


def _measure(step: StepInput, runs: Sequence[BucketRun], custom: CustomRun | None) -> None:
    """Let engines prepare, and measure the gradients where that is asked for."""
    context = step.stepping.context
    context.slices = [*(run.slice for run in runs), *(custom.slices if custom else ())]
    for run in runs:
        part = run.slice
        part.gradients, part.clip, part.before, part.fresh = None, 1.0, None, None
        _bind_metrics(run, wanted=context.wants_metrics)
        _prove(run, measuring=step.needs_gradients())
        if run.engine is not gpu or not run.sparse:  # rows are gathered for it
            run.engine.prepare(run.bucket)
        if run.sampled is not None:
            run.sampled.engine.prepare(run.sampled.bucket)
    if step.needs_gradients():
        refuse_unmeasurable(step)
        for run in _in_order(step, runs):
            run.slice.gradients = _measure_gradients(step, run).detach()
        if custom is not None:
            custom.measure()


def _measure_gradients(step: StepInput, run: BucketRun) -> Tensor:
    """Return what is measured of gradients as parameters hold them: float64 of shape (parameters, 2)."""
    if run.group.get("gradient_centralization"):
        return measure_gradients([step.gradient(param) for param in run.params])
    return measure_gradients(run.bucket.grads) if run.sparse else run.engine.measure(run.bucket, gradient_rule())


def _prove(run: BucketRun, *, measuring: bool) -> None:
    """Let a bucket be run by another engine if its own cannot be relied on for what it is to do."""
    if run.sampled is not None:
        bucket, stages = run.sampled.bucket, run.bucket.rule.stages
        rules = [stage.sampled for stage in stages if stage.sampled is not None]
        run.sampled.engine = proved(run.sampled.engine, bucket, bucket.rule, *rules)
    rules = [run.bucket.rule, *(stage.measures for stage in run.bucket.rule.stages)]
    rules += [gradient_rule()] * (measuring and not run.sparse)
    engine = proved(run.engine, run.bucket, *rules)
    if engine is not run.engine:
        run.engine, run.bucket.plan = engine, None
        # Of those of a bucket that is used again a kernel needs the addresses only.
        run.bucket.grads = run.bucket.grads or list(map(to_local, run.grads()))


def _is_to_be_made(step: StepInput, sums: RankSums | None) -> bool:
    """Return whether the step is to be made, with gradients clipped as asked for; all ranks decide alike."""
    if sums is not None and _found_infinities(step):
        step.skip()
        return False
    if not step.needs_gradients() or (sums is None and not step.slices):
        return True
    return clip_or_skip(step, step.slices, sums)


def _bind_metrics(run: BucketRun, *, wanted: bool) -> None:
    """Let the update measure, or not, what telemetry wants to know."""
    if wanted and run.params[0].is_meta:
        raise RuntimeError(f"{run.bucket.row_name(0)} is on meta, where nothing can be measured; leave out `telemetry`")
    if not run.sparse:
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
    store_numbers(run)
    _count_versions(run)
    run.slice.sums, run.bucket.measured = run.bucket.measured, None
    run.made, run.scalars = [], None


def _count_versions(run: BucketRun) -> None:
    """Tell autograd that sharded tensors have been written, of which the engine has seen the shards only."""
    if run.guard:
        run.guard.count_versions()
    elif is_sharded(run.params[0]):
        slots = [entry[name] for name in run.stored_names() for entry in run.entries]
        torch.autograd.graph.increment_version(list(filter(counts_versions, (*run.params, *slots))))


def _run_engine(run: BucketRun) -> None:
    if run.sparse:
        _run_rows(run.engine, run.bucket)
    else:
        run.engine.run(run.bucket)
    if run.sampled is not None:
        whole, apart = run.bucket, run.sampled.bucket
        apart.coefficients, apart.row, apart.found_inf = whole.coefficients, whole.row, whole.found_inf
        run.sampled.engine.run(apart)


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


def _release_grads(runs: Sequence[BucketRun], custom: CustomParams | None) -> None:
    """Hold this step's gradients no longer."""
    for run in runs:
        run.bucket.grads, run.bucket.gradient_addresses = [], None
        if run.guard:
            run.guard.release_grads()
    if custom is not None:
        custom.release_grads()


# After the update


def finish(context: StepContext, step_input: Callable[[], StepInput]) -> Any:
    """Average what the update has not averaged, and return what was measured, None if nothing was."""
    if not context.wants_metrics and all(part.fresh is None for part in context.slices):
        context.slices = []
        return None
    step = step_input()
    _average_rest(step)
    metrics = step_metrics(step) if context.wants_metrics else None
    context.slices = []
    return metrics


def finish_part(step: StepInput) -> list[ParamSlice]:
    """Average what the update of some of the parameters has not averaged; return them, measured, for the whole step.

    There are none where nothing is measured.  They need their gradients no more.
    """
    context = step.stepping.context
    slices, wanted = context.slices, context.wants_metrics
    _average_rest(step)
    for part in slices:
        part.fresh = None
        if wanted:
            part.sums = measured_sums(step, part)
        part.before = None
    context.slices = []
    return slices if wanted or step.needs_gradients() else []


def _average_rest(step: StepInput) -> None:
    if not step.stepping.context.skips:
        for part in step.slices:
            if part.fresh is not None:
                _average(step, part, part.fresh)


def _average(step: StepInput, part: ParamSlice, known: list[bool]) -> None:
    for fresh in set(known):
        params = [param for param, new in zip(part.params, known, strict=True) if new is fresh]
        averages = [step.state[param][EMA.name] for param in params]
        values = [param.detach().resolve_conj().resolve_neg() for param in params]
        Averaging(averages, values).move(1.0 if fresh else 1 - part.group["ema"])
