"""The fast lane: a step in which nothing has changed and nothing is asked for but the update, clipped perhaps.

It is the pipeline with the stages left out that are known to have nothing to do: one compiled call that guards all that
may have changed and reads the scalars (many tensors are guarded by a call of their own, on several threads), the
algorithm's `coefficients`, and one compiled call that runs the kernels, counts versions and writes the scalars.  What
it cannot do it leaves to the pipeline, with nothing changed.
"""

import operator
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from surefoot.codegen.threads import ONE_THREAD, thread_count
from surefoot.engines import cpu, gpu
from surefoot.rule import ROUNDING_STEP, STEP, gradient_rule
from surefoot.rule.hyperparameters import is_number
from surefoot.state.check import hyperparameters
from surefoot.state.scalars import write_scalars
from surefoot.step.cache import StepCache, are_guardable, are_numbers_of_update
from surefoot.step.clipping import clip_or_skip
from surefoot.step.coefficients import count_step
from surefoot.step.custom_lane import CustomLane, is_fit
from surefoot.step.device import capturing, refuse_capture
from surefoot.step.inputs import StepInput
from surefoot.step.options import check_changed
from surefoot.step.partition import MOST_COUNTS
from surefoot.step.ranks import due_exchange
from surefoot.step.types import BucketRun
from surefoot.tensors.native.guards import (
    DictGuard,
    LaunchSequence,
    Replaced,
    TensorGuard,
    gradients_launch,
    lists_launch,
)

_GRAD = operator.attrgetter("grad")


class _Lane:
    """One bucket in the fast lane: the arrays in which its numbers stand, and the launches of it."""

    table: Any
    """Where the numbers of the update are put, in the order of the rule's coefficients."""

    def __init__(self, run: BucketRun) -> None:
        guard = run.guard
        self.run = run
        self.tensors: TensorGuard = guard.tensors
        guarding, self.releasing = self.tensors.launches()
        self.guards, self.guarding = [self.tensors], [guarding]
        self.rounds = ROUNDING_STEP.name in run.bucket.rule.coefficients
        self.scalar_names = [scalar.name for scalar in run.bucket.rule.scalars]
        self.count = len(run.params)
        values: Any = np.zeros(len(self.scalar_names) * self.count)
        self.reading: Any = None
        self.writing: Any = None
        if guard.reads:
            self.reading, self.writing, values = guard.numbers.shared_launches(self.count)
        self.values: Any = memoryview(values)
        names = run.bucket.rule.coefficients
        self.clip_place = names.index("step_clip") if _is_clipped(run) else None
        self.settle()

    def settle(self) -> None:
        """Take over the group's options."""
        run = self.run
        options = vars(hyperparameters(run.group))
        around = {"fresh": False, "step_clip": 1.0, "step_ema_weight": 1 - (run.group.get("ema") or 0.0)}
        names = run.bucket.rule.coefficients
        known = {name: options.get(name) for name in names} | around
        self.options = options
        # One that is not a number is given by `coefficients`, as the step before has shown.
        self.constants: list[tuple[int, str, Any]] = [
            (i, name, known[name] if is_number(known[name]) else None) for i, name in enumerate(names)
        ]

    def take_numbers(self, numbers: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over numbers among the options of groups, each by the id of its group, where these are settled."""
        own = numbers[id(self.run.group)]
        if not own:
            return
        self.options.update(own)
        self.run.options = None  # which the pipeline has kept
        self.constants = [(i, name, own.get(name, constant)) for i, name, constant in self.constants]

    def is_as_it_was(self) -> bool:
        """Return whether what was made from the tensors may still be used; another thread may have seen a change."""
        return not self.tensors.is_over

    def compute(self, coefficients: Callable[..., dict[str, Any]]) -> None:
        """Compute the numbers of the update and the new scalars, and put both where they are read."""
        values, count = self.values, self.count
        scalars = dict(zip(self.scalar_names, values[::count], strict=False)) if self.scalar_names else {}
        if self.rounds:
            own = count_step(scalars)
            counted = scalars.get(ROUNDING_STEP.name, scalars.get(STEP.name))
            derived = {**coefficients(SimpleNamespace(**self.options), **own), ROUNDING_STEP.name: counted}
        else:
            if STEP.name in scalars:
                scalars[STEP.name] += 1
            derived = coefficients(SimpleNamespace(**self.options), **scalars)
        table = self.table
        for index, name, constant in self.constants:
            table[index] = derived.get(name, constant)
        for number, (name, value) in enumerate(scalars.items()):
            values[number * count] = derived.get(name, value)
        if self.clip_place is not None:
            table[self.clip_place] = self.run.slice.clip

    def count_of_counts(self) -> int:
        """Return how many different step counts have been read."""
        names, values = self.scalar_names, self.values
        own = names.index(STEP.name) * self.count if STEP.name in names else 0
        return len(set(values[own : own + self.count])) if STEP.name in names else 0

    def launches_before(self) -> list[Any]:
        """Return what guards the bucket and reads its scalars, but for what threads guard."""
        return [] if self.tensors.needs_threads else [*self.guarding, *([self.reading] if self.reading else ())]

    def look_on_threads(self) -> Any:
        """Guard the bucket on several threads and read its scalars; return the launch that finds something, if any."""
        if self.tensors.look():
            return self.guarding[0]
        return self.reading if self.reading and self.reading.run() else None

    def launches_after(self, *, with_kernel: bool) -> list[Any]:  # noqa: ARG002 (there may be none)
        """Return what is done when the numbers are there, or beside the kernel when it has been run."""
        scalars = [self.writing, self.run.guard.versions.launch] if self.writing else []
        return [each for each in (*scalars, self.releasing) if each]

    def release_grads(self) -> None:
        """Hold gradients no longer."""
        self.tensors.release_grads()


class _KernelLane(_Lane):
    """A bucket that a kernel runs."""

    def __init__(self, run: BucketRun) -> None:
        self.plan = plan = run.bucket.plan
        self.launch, self.kernel = plan.launch, plan.kernel(run.bucket.rule)
        self.coefficients = self.launch.coefficients
        self.table = memoryview(self.coefficients.reshape(-1))
        self.measure: Any = plan.gradient_measure(gradient_rule()) if _is_clipped(run) else None
        super().__init__(run)

    def is_as_it_was(self) -> bool:
        """Return whether the arrays are still those of the plan, and all parameters share their numbers."""
        same = self.launch.coefficients is self.coefficients and self.plan.row is self.run.shared_row
        return same and not self.tensors.is_over

    def launches_after(self, *, with_kernel: bool) -> list[Any]:
        """Return what is done when the numbers are there, or beside the kernel when it has been run."""
        some = with_kernel and (self.run.sparse or self.launch.work_items)
        kernel = [(self.kernel.address, self.launch.address)] if some else []
        counting = [launch] if (launch := self.plan.versions.launch) else []
        return [*kernel, *counting, *super().launches_after(with_kernel=with_kernel)]

    def is_small(self) -> bool:
        """Return whether one thread is enough."""
        return bool(self.launch.size < ONE_THREAD)

    def has_numbers(self) -> bool:
        """Return whether its scalars are Python's numbers, which compiled code does not read."""
        return bool(self.scalar_names) and not self.writing

    def read_numbers(self) -> bool:
        """Read scalars that are Python's numbers; return whether all parameters share them."""
        entries = self.run.entries
        for number, name in enumerate(self.scalar_names):
            found = [entry.get(name) for entry in entries]
            if type(found[0]) not in (int, float) or found.count(found[0]) < self.count:
                return False
            self.values[number * self.count] = found[0]
        return True

    def write_numbers(self) -> None:
        """Write scalars that are Python's numbers."""
        write_scalars(self.run.entries, self.run.bucket.rule.scalars, np.asarray(self.values)[:: self.count, None])

    def release_grads(self) -> None:
        """Hold gradients no longer."""
        super().release_grads()
        if self.run.sparse:
            self.plan.release()


class _TorchLane(_Lane):
    """A bucket that torch's operations run."""

    def __init__(self, run: BucketRun) -> None:
        self.table = [None] * len(run.bucket.rule.coefficients)
        super().__init__(run)

    def update(self) -> None:
        """Update the bucket."""
        run = self.run
        bucket = run.bucket
        bucket.coefficients = [dict(zip(bucket.rule.coefficients, self.table, strict=True))]
        bucket.row, bucket.grads = run.shared_row, run.grads()  # type: ignore[assignment]
        try:
            run.engine.run(bucket)
        finally:
            bucket.grads = []


class FastLane:
    """Steps of a step cache whose buckets all have plans of flat memory and scalars of the host.

    Custom steps come after the buckets, when nothing can be refused any more.  Make one with `fast_lane`.
    """

    def __init__(self, step: StepInput, cache: StepCache) -> None:
        self._groups, self._state, self._stepping, self._spec = step.groups, step.state, step.stepping, step.spec
        self._cache = weakref.ref(cache)  # which keeps this
        kernels = [_KernelLane(run) for run in cache.runs if run.engine is cpu]
        self._by_torch = [_TorchLane(run) for run in cache.runs if run.engine is not cpu]
        self._lanes: list[_Lane] = [*kernels, *self._by_torch]
        self._custom = None if cache.custom is None else CustomLane(step, cache.custom)
        self._parts = [*self._lanes, *([self._custom] if self._custom else ())]
        idle, self._idle = gradients_launch(cache.idle)
        self._guarded = [cache.items.launch, idle]
        for part in self._parts:
            self._guarded += part.launches_before()
        self._on_threads = [lane for lane in self._lanes if lane.tensors.needs_threads]
        self._guard_options()
        self._of_rows = [lane for lane in kernels if lane.run.sparse]
        self._dense = [lane for lane in kernels if not lane.run.sparse]
        self._are_small = all(map(_KernelLane.is_small, self._dense))
        self._adds_up = all(lane.launch.adds_up for lane in self._of_rows)
        self._of_numbers = list(filter(_KernelLane.has_numbers, self._of_rows))
        self._clipped = [lane for lane in kernels if lane.measure is not None]
        self._clips = step.needs_gradients()
        after, whole = (
            [launch for part in self._parts for launch in part.launches_after(with_kernel=with_kernel)]
            for with_kernel in (False, True)
        )
        self._after = LaunchSequence(after)
        self._whole = LaunchSequence([*(lane.launch.finding for lane in self._of_rows), *whole])

    def _guard_options(self) -> None:
        self._guarded_groups = list(self._groups)
        self._specs = list(map(self._spec.of, self._groups))
        self._options = DictGuard([*self._groups, vars(self._stepping.options)])
        self._scheduled: list[Replaced] = []
        lists, self._lists = lists_launch([self._groups, *(group["params"] for group in self._groups)])
        self._launches = [self._options.launch, lists, *self._guarded]
        self._guard = LaunchSequence(self._launches)

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
            if not all(part.is_as_it_was() for part in self._parts):
                self._end(fast=None)
                return False
            if self._scheduled and (replaced := self._options.replaced_again(self._scheduled)):
                self._take_numbers(replaced)
            found = self._look()
            if found is not None and (found := self._look_again(found, step)) is not None:
                self._leave(found)
                return False
            try:
                if self._clips:
                    self._clip(step())
                if not (self._take() and self._update(coefficients, step)):
                    self._release()
                    return False
            except BaseException:
                self._release()
                self._count()
                raise
            self._count()
        return True

    def _count(self) -> None:
        """Count the step that was asked for, unless the optimizer has done so."""
        self._stepping.statistics.steps += not self._stepping.context.inside

    def _look(self) -> Any:
        """Look at all that may have changed; return the launch that finds something, or None."""
        if position := self._guard.run():
            return self._launches[position - 1]
        return next(filter(None, map(_Lane.look_on_threads, self._on_threads)), None)

    def _look_again(self, found: Any, step: Callable[[], StepInput]) -> Any:
        """Return what is found when options are settled, if it was these, else what was found."""
        return self._look() if self._are_settled(found, step) else found

    def _are_settled(self, found: Any, step: Callable[[], StepInput]) -> bool:
        """Return whether what was found are options that ask for the same step with other numbers, taken over now."""
        if found is not self._options.launch:
            return False
        replaced = self._options.replaced()
        if replaced is None or not self._take_numbers(replaced):
            return self._options_decide_the_same(step())
        # What a schedule has replaced once it replaces before every step: the guard need not find it again.
        known = {(each.number, each.key) for each in self._scheduled}
        self._scheduled += [each for each in replaced if (each.number, each.key) not in known]
        return True

    def _take_numbers(self, replaced: list[Replaced]) -> bool:
        """Take over options that were replaced if all are numbers of the update; return whether they are."""
        self._spec.check_groups(self._groups)
        if not are_numbers_of_update(replaced, self._specs):
            return False
        self._options.renew(replaced)
        groups = self._guarded_groups  # those of now are compared later
        numbers: dict[int, dict[str, Any]] = {id(group): {} for group in groups}
        for each in replaced:
            numbers[id(groups[each.number])][each.key] = each.value
        for part in self._parts:
            part.take_numbers(numbers)
        return True

    def _options_decide_the_same(self, step: StepInput) -> bool:
        """Return whether options that were changed ask for the same step with other numbers."""
        check_changed(step.stepping, step.spec, step.groups)
        cache = self._cache()
        if cache is None or not _serves(step) or not cache.has_same_params(step):
            return False
        if not cache.settle_options(step) or not cache.has_constant_options():
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
        for lane in self._dense:
            lane.launch.pointers[1] = lane.tensors.gradients
        if not all(map(_KernelLane.read_numbers, self._of_numbers)):
            return False
        return all(lane.plan.take(list(map(_GRAD, lane.run.slice.params))) for lane in self._of_rows)

    def _update(self, coefficients: Callable[..., dict[str, Any]], step: Callable[[], StepInput]) -> bool:
        """Update; return False, with nothing changed, if sparse gradients have unusual rows."""
        for lane in self._lanes:
            lane.compute(coefficients)
        if not self._run_kernels():
            return False
        for of_numbers in self._of_numbers:
            of_numbers.write_numbers()
        for of_rows in self._of_rows:
            of_rows.plan.release()
        if self._by_torch or self._custom is not None:
            with torch.set_grad_enabled(False):
                for by_torch in self._by_torch:
                    by_torch.update()
                if self._custom is not None:
                    self._custom.step(lambda: step().make_custom_step)
        return True

    def _run_kernels(self) -> bool:
        """Run them and write the scalars, in one compiled call where one thread is enough; see `_update`."""
        kernels = (*self._dense, *self._of_rows)
        in_one = self._are_small and self._adds_up
        for lane in self._of_rows:
            in_one = in_one and lane.launch.size < ONE_THREAD
        if in_one:
            found = self._whole.run()
            if found and any(lane.launch.status for lane in self._of_rows):
                return False
        else:
            if not all(lane.plan.find_rows(lane.run.grads()) for lane in self._of_rows):
                return False
            for lane in kernels:
                threads = 1 if lane.is_small() else min(thread_count(), lane.launch.work_items)
                lane.launch.start(lane.kernel, threads)
            found = self._after.run()
        if found:
            for lane in kernels:
                lane.launch.raise_if_stopped(lane.kernel)
        return True

    def _leave(self, found: Any) -> None:
        """Leave this step to the pipeline.

        If the parameters of a bucket do not share their step counts any more, this lane ends.  Where there are few
        counts, buckets are divided anew, one for each.
        """
        apart = [lane for lane in self._lanes if found is lane.reading]
        if apart:
            self._end(fast=False)
            cache = self._cache()
            if cache is not None and all(1 < lane.count_of_counts() <= MOST_COUNTS for lane in apart):
                cache.options = None
        self._note(changed=any(found is guarding for part in self._parts for guarding in part.guarding))
        self._release_held()

    def _end(self, *, fast: bool | None) -> None:
        """Serve no more; `fast` says whether another lane may be made, as `StepCache.fast` does."""
        if (cache := self._cache()) is not None:
            cache.fast = fast

    def _note(self, *, changed: bool) -> None:
        for guard in (guard for part in self._parts for guard in part.guards):
            guard.note(changed=changed)

    def _release_held(self) -> None:
        for part in self._parts:
            part.release_grads()

    def _release(self) -> None:
        self._note(changed=False)
        self._release_held()


def fast_lane(step: StepInput, cache: StepCache) -> FastLane | bool | None:
    """Return the fast lane of a step cache that has just served a step.

    It is None where options ask for more, which may change, and False where there can be none.
    """
    if not _serves(step) or not cache.has_constant_options():
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
        alike = guard.reads and run.bucket.row is run.shared_row
        return plain and alike and not (_is_clipped(run) or run.bucket.is_rounded)
    plan = run.bucket.plan
    own = plan.is_regular and not plan.checked and plan.versions.launch is not None and plan.row is run.shared_row
    return plain and own and (guard.reads or run.sparse) and not (run.sparse and _is_clipped(run))


def _is_clipped(run: BucketRun) -> bool:
    return ("clipped", True) in run.bucket.rule.flags
