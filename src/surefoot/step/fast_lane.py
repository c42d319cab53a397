"""The fast lane: a step in which nothing has changed and nothing is asked for but the update, clipped perhaps.

It is the pipeline with the stages left out that are known to have nothing to do: one compiled call that guards all that
may have changed and reads the scalars (many tensors are guarded by a call of their own, on several threads), the
algorithm's `coefficients`, and one compiled call that runs the kernels, counts versions and writes the scalars (kernels
that several threads run are called one by one before that).  What it cannot do it leaves to the pipeline, with nothing
changed.
"""

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch

from surefoot.codegen.threads import ONE_THREAD, thread_count
from surefoot.engines import cpu, gpu
from surefoot.step.bucket_lanes import BucketLane, KernelLane, TorchLane, is_clipped
from surefoot.step.cache import StepCache, are_guardable, are_numbers_of_update
from surefoot.step.clipping import clip_or_skip
from surefoot.step.custom_lane import CustomLane, is_fit
from surefoot.step.device import capturing, refuse_capture
from surefoot.step.inputs import StepInput
from surefoot.step.options import check_changed
from surefoot.step.ranks import due_exchange
from surefoot.step.types import BucketRun
from surefoot.tensors.memory import PLAIN
from surefoot.tensors.native.guards import (
    DictGuard,
    LaunchSequence,
    Replaced,
    gradients_launch,
    lists_launch,
)

_GRAD = operator.attrgetter("grad")


class FastLane:
    """Steps of a step cache whose tensors native guards watch and whose scalars the host has.

    Custom steps come after the buckets, when nothing can be refused any more.  Make one with `fast_lane`.
    """

    def __init__(self, step: StepInput, cache: StepCache) -> None:
        self._groups, self._state, self._stepping, self._spec = step.groups, step.state, step.stepping, step.spec
        self._cache = weakref.ref(cache)  # which keeps this
        kernels = [KernelLane(run) for run in cache.runs if run.engine is cpu]
        by_torch = [TorchLane(run) for run in cache.runs if run.engine is not cpu]
        self._lanes: list[BucketLane] = [*kernels, *by_torch]
        self._custom = None if cache.custom is None else CustomLane(step, cache.custom)
        self._parts = [*self._lanes, *([self._custom] if self._custom else ())]
        self._guarded = [cache.items.launch, gradients_launch(cache.idle)]
        for part in self._parts:
            self._guarded += part.launches_before()
        self._on_threads = [lane for lane in self._lanes if lane.tensors.needs_threads]
        self._guard_options()
        self._sparse = [lane for lane in kernels if lane.run.sparse]
        self._dense = [lane for lane in kernels if not lane.run.sparse]
        self._flat = [lane for lane in self._dense if lane.plan.is_regular]
        self._copying = [lane for lane in self._dense if not lane.plan.is_regular]
        self._updating: list[KernelLane | TorchLane] = [*self._copying, *by_torch]
        self._are_small = all(map(KernelLane.is_small, self._dense))
        self._adds_up = all(lane.launch.adds_up for lane in self._sparse)
        self._with_numbers = list(filter(KernelLane.has_numbers, self._sparse))
        self._clipped = [lane for lane in kernels if lane.measure is not None]
        self._clips = step.needs_gradients()
        after, whole = (
            [launch for part in self._parts for launch in part.launches_after(with_kernel=with_kernel)]
            for with_kernel in (False, True)
        )
        self._after = LaunchSequence(after)
        self._whole = LaunchSequence([*(lane.launch.finding for lane in self._sparse), *whole])

    def _guard_options(self) -> None:
        groups, specs = list(self._groups), list(map(self._spec.of, self._groups))
        options = DictGuard([*groups, vars(self._stepping.options)])
        lists = lists_launch([self._groups, *(group["params"] for group in groups)])
        launches = [options.launch, lists, *self._guarded]
        guard, pairs = LaunchSequence(launches), zip(specs, groups, strict=True)
        changing = ((spec, group) for spec, group in pairs if spec.has_flags_in_tensors(group))
        self._flags = [(spec, group, spec.settle_flags(group)) for spec, group in changing]
        self._has_tensor_options = any(lane.has_tensor_options for lane in self._lanes)
        self._scheduled: list[Replaced] = []
        self._guarded_groups, self._specs, self._options, self._launches = groups, specs, options, launches
        self._guard = guard  # at last: what comes to an end before that is found once more

    def run(
        self,
        groups: object,
        state: object,
        coefficients: Callable[..., dict[str, Any]],
        step: Callable[[], StepInput],
    ) -> bool:
        """Make a step; return False, with nothing changed, where that is for the pipeline to do.

        Args:
            groups: the param groups of now.
            state: the state of now.
            coefficients: the algorithm's.
            step: return all that the step is about.
        """
        if groups is not self._groups or state is not self._state:
            return False
        if capturing():
            refuse_capture(self._spec.name, self._groups)
        with self._stepping.context.lock.now:
            if self._scheduled and (replaced := self._options.replaced_again(self._scheduled)):
                self._take_numbers(replaced)
            found = self._look()
            while found is not None and self._are_settled(found, step):
                found = self._look()
            if found is not None and not self._lacks_all_gradients(found):
                self._release()
                return False
            try:
                if found is not None:
                    self._release()
                elif not self._step(coefficients, step):
                    self._release()
                    return False
            except BaseException:
                self._release()
                self._count()
                raise
            self._count()
        return True

    def _step(self, coefficients: Callable[..., dict[str, Any]], step: Callable[[], StepInput]) -> bool:
        """Make a step in which nothing was found; return False, with nothing changed, if numbers or rows differ."""
        if self._has_tensor_options and not self._tensors_decide_the_same():
            return False
        if self._clips:
            self._clip(step())
        return self._take() and self._update(coefficients, step)

    def _tensors_decide_the_same(self) -> bool:
        """Return whether numbers in tensors, which may have changed in place, ask for the same update."""
        self._spec.check_groups(self._groups)
        return all(spec.settle_flags(group) == flags for spec, group, flags in self._flags)

    def _count(self) -> None:
        """Count the step that was asked for, unless the optimizer has done so."""
        self._stepping.statistics.steps += not self._stepping.context.inside

    def _look(self) -> Any:
        """Look at all that may have changed; return the launch that finds something, or None."""
        if position := self._guard.run():
            return self._launches[position - 1]
        return next(filter(None, map(BucketLane.look_on_threads, self._on_threads)), None)

    def _are_settled(self, found: Any, step: Callable[[], StepInput]) -> bool:
        """Return whether what was found asks for the same step with other numbers or elsewhere, taken over now."""
        if found is self._options.launch:
            return self._only_numbers() or self._options_decide_the_same(step())
        moved = any(guard.has_moved for part in self._parts for guard in part.guards)
        return moved and (cache := self._cache()) is not None and cache.readmit()

    def _lacks_all_gradients(self, found: Any) -> bool:
        """Return whether what was found is only that no parameter has a gradient, so that nothing is stepped."""
        of_tensors = any(found is guarding for part in self._parts for guarding in part.guarding)
        over = any(guard.is_over for part in self._parts for guard in part.guards)
        cache = self._cache()
        return of_tensors and not over and cache is not None and all(param.grad is None for param in cache.params)

    def _only_numbers(self) -> bool:
        """Return whether options that were changed are numbers of the update, as schedules change them."""
        replaced = self._options.replaced()
        if replaced is None or not self._take_numbers(replaced):
            return False
        # What a schedule has replaced once it replaces before every step: the guard need not find it again.
        known = {(each.number, each.key) for each in self._scheduled}
        self._scheduled += [each for each in replaced if (each.number, each.key) not in known]
        return True

    def _take_numbers(self, replaced: list[Replaced]) -> bool:
        """Take over options that were replaced if all are numbers of the update; return whether they are."""
        self._spec.check_groups(self._groups)
        if not are_numbers_of_update(replaced, self._specs):
            return False
        groups = self._guarded_groups  # those of now are compared later
        numbers: dict[int, dict[str, Any]] = {id(group): {} for group in groups}
        for each in replaced:
            numbers[id(groups[each.number])][each.key] = each.value
        for part in self._parts:
            part.take_numbers(numbers)
        self._options.renew(replaced)  # now that all have them
        return True

    def _options_decide_the_same(self, step: StepInput) -> bool:
        """Return whether options that were changed ask for the same step with other numbers."""
        check_changed(step.stepping, step.spec, step.groups)
        cache = self._cache()
        if cache is None or not _serves(step) or not cache.has_same_params(step):
            return False
        if not cache.settle_options(step) or not cache.has_numbers_only(step):
            return False
        for part in self._parts:
            part.settle()
        self._guard_options()
        return True

    def _clip(self, step: StepInput) -> None:
        """Measure the gradients, and decide what they are multiplied with."""
        for lane in self._clipped:
            lane.run.slice.gradients = torch.from_numpy(lane.measure(lane.tensors.gradients))
        slices = [lane.run.slice for lane in self._clipped]
        if self._custom is not None:
            self._custom.measure()
            slices += self._custom.slices
        clip_or_skip(step, slices)

    def _take(self) -> bool:
        """Take the gradients; return whether they are such as before."""
        for lane in self._flat:
            lane.launch.pointers[1] = lane.tensors.gradients
        for lane in self._copying:
            lane.plan.take_gradients(lane.tensors.gradients)
            if not all(type(grad) in PLAIN for grad in lane.run.grads()):
                return False
        if not all(map(KernelLane.read_numbers, self._with_numbers)):
            return False
        return all(lane.plan.take(list(map(_GRAD, lane.run.slice.params))) for lane in self._sparse)

    def _update(self, coefficients: Callable[..., dict[str, Any]], step: Callable[[], StepInput]) -> bool:
        """Update; return False, with nothing changed, if sparse gradients have unusual rows."""
        for lane in self._lanes:
            lane.compute(coefficients)
        if not self._run_kernels():
            return False
        for with_numbers in self._with_numbers:
            with_numbers.write_numbers()
        for sparse in self._sparse:
            sparse.plan.release()
        if self._updating or self._custom is not None:
            with torch.set_grad_enabled(False):
                for updating in self._updating:
                    updating.update()
                if self._custom is not None:
                    self._custom.step(lambda: step().make_custom_step)
        return True

    def _run_kernels(self) -> bool:
        """Run them and write the scalars, in one compiled call where one thread is enough; see `_update`."""
        kernels = (*self._dense, *self._sparse)
        in_one = self._are_small and self._adds_up
        for lane in self._sparse:
            in_one = in_one and lane.launch.size < ONE_THREAD
        if in_one:
            found = self._whole.run()
            if found and any(lane.launch.status for lane in self._sparse):
                return False
        else:
            if not all(lane.plan.find_rows(lane.run.grads()) for lane in self._sparse):
                return False
            for lane in kernels:
                threads = 1 if lane.is_small() else min(thread_count(), lane.launch.work_items)
                lane.launch.start(lane.kernel, threads)
            found = self._after.run()
        if found:
            for lane in kernels:
                lane.launch.raise_if_stopped(lane.kernel)
        return True

    def _release(self) -> None:
        for part in self._parts:
            part.release_grads()


def fast_lane(step: StepInput, cache: StepCache) -> FastLane | bool | None:
    """Return the fast lane of a step cache that has just served a step.

    It is None where options ask for more, which may change, and False where there can be none.
    """
    if not _serves(step) or not cache.has_numbers_only(step):
        return None
    fit = type(cache.items) is DictGuard and all(map(_is_fit, cache.runs))
    fit = fit and (cache.custom is None or is_fit(step, cache.custom))
    return fit and FastLane(step, cache)


def _serves(step: StepInput) -> bool:
    """Return whether nothing is asked for that only the pipeline can do, by groups that compiled code can guard."""
    if not are_guardable(step.groups):
        return False
    return step.only_updates() or (step.only_clips() and due_exchange(step) is None)


def _is_fit(run: BucketRun) -> bool:
    """Return whether the fast lane can step a bucket."""
    rule, guard = run.bucket.rule, run.guard
    plain = not (run.repeats or rule.reductions or rule.stages) and guard.is_compiled() and run.slice.fresh is None
    if run.engine is gpu:
        return False
    if run.engine is not cpu:
        return plain and guard.scalars_in_memory and not (is_clipped(run) or run.bucket.is_rounded)
    plan = run.bucket.plan
    own = not plan.checked and plan.versions.launch is not None
    whole = plan.is_regular or not (run.sparse or is_clipped(run) or not run.bucket.is_plain)
    return plain and own and whole and (guard.scalars_in_memory or run.sparse) and not (run.sparse and is_clipped(run))
