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
from torch import Tensor

from surefoot.codegen.threads import ONE_THREAD, thread_count
from surefoot.engines import cpu, gpu
from surefoot.rule import ROUNDING_STEP, STEP, gradient_rule
from surefoot.rule.hyperparameters import is_number
from surefoot.state.check import hyperparameters
from surefoot.state.scalars import write_scalars
from surefoot.step.cache import StepCache, are_guardable, are_numbers_of_update, is_constant
from surefoot.step.clipping import clip_or_skip
from surefoot.step.coefficients import count_step, distinct_columns, number_of
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
    SharedNumbers,
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
        self.numbers: SharedNumbers | None = guard.numbers.shared(self.count) if guard.reads else None
        values: Any = np.zeros((len(self.scalar_names), self.count))
        if self.numbers is not None:
            values = self.numbers.values
        self.values: Any = memoryview(values.reshape(-1))
        self.differ: Any = self.numbers.differ if self.numbers else (0,)
        self.firsts: list[int] = [0]
        self.rows: Any = run.shared_row
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
        self.read_at_once = {name: options[name] for name in names if isinstance(options.get(name), Tensor)}
        self.reads = not all(map(is_constant, options.values()))

    def take_numbers(self, numbers: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over numbers among the options of groups, each by the id of its group, where these are settled."""
        own = numbers[id(self.run.group)]
        if not own:
            return
        self.options.update(own)
        self.run.options = None  # which the pipeline has kept
        self.constants = [(i, name, own.get(name, constant)) for i, name, constant in self.constants]

    def compute(self, coefficients: Callable[..., dict[str, Any]]) -> None:
        """Compute the numbers of the update and the new scalars, and put both where they are read."""
        if self.differ[0]:
            self._divide()
        if not self.has_room():
            self.make_room()
        for row, first in enumerate(self.firsts):
            self._compute_row(coefficients, row, first)

    def _divide(self) -> None:
        """Find which parameters have the same scalars, and so share a row of numbers."""
        if self.numbers is None:
            return
        _, rows = distinct_columns(self.numbers.values, [])
        self.rows = self.run.shared_row if rows is None else rows
        found = self.rows.tolist()
        self.firsts = [found.index(row) for row in range(max(found) + 1)]
        self.numbers.share(np.array(self.firsts)[self.rows])

    def has_room(self) -> bool:
        """Return whether there is room for the rows of numbers, for which the pipeline has had it last perhaps."""
        raise NotImplementedError

    def make_room(self) -> None:
        """Let there be room for the rows of numbers."""
        raise NotImplementedError

    def _compute_row(self, coefficients: Callable[..., dict[str, Any]], row: int, first: int) -> None:
        """Compute a row of numbers and the new scalars of those that share it, of which `first` is the first."""
        values, count = self.values, self.count
        scalars = dict(zip(self.scalar_names, values[first::count], strict=False)) if self.scalar_names else {}
        if self.rounds:
            own = count_step(scalars)
            counted = scalars.get(ROUNDING_STEP.name, scalars.get(STEP.name))
            derived = {**coefficients(SimpleNamespace(**self.options), **own), ROUNDING_STEP.name: counted}
        else:
            if STEP.name in scalars:
                scalars[STEP.name] += 1
            derived = coefficients(SimpleNamespace(**self.options), **scalars)
        if self.reads:
            derived = {name: number_of(value) for name, value in {**self.read_at_once, **derived}.items()}
        table, start = self.table, row * len(self.constants)
        for index, name, constant in self.constants:
            table[start + index] = derived.get(name, constant)
        for number, (name, value) in enumerate(scalars.items()):
            values[number * count + first] = derived.get(name, value)
        if self.clip_place is not None:
            table[start + self.clip_place] = self.run.slice.clip

    def launches_before(self) -> list[Any]:
        """Return what guards the bucket and reads its scalars, but for what threads guard."""
        reading = [self.numbers.reading] if self.numbers else []
        return [] if self.tensors.needs_threads else [*self.guarding, *reading]

    def look_on_threads(self) -> Any:
        """Guard the bucket on several threads and read its scalars; return the launch that finds something, if any."""
        if self.tensors.look():
            return self.guarding[0]
        return self.numbers.reading.run() or None if self.numbers else None

    def launches_after(self, *, with_kernel: bool) -> list[Any]:  # noqa: ARG002 (there may be none)
        """Return what is done when the numbers are there, or beside the kernel when it has been run."""
        scalars = [self.numbers.writing, self.run.guard.versions.launch] if self.numbers else []
        return [each for each in (*scalars, self.releasing) if each]

    def release_grads(self) -> None:
        """Hold gradients no longer."""
        self.tensors.release_grads()


class _KernelLane(_Lane):
    """A bucket that a kernel runs."""

    def __init__(self, run: BucketRun) -> None:
        self.plan = plan = run.bucket.plan
        self.launch, self.kernel = plan.launch, plan.kernel(run.bucket.rule)
        self.coefficients: Any = None
        self.measure: Any = plan.gradient_measure(gradient_rule()) if _is_clipped(run) else None
        super().__init__(run)

    def make_room(self) -> None:
        """Let there be room for the rows of numbers."""
        self.launch.make_room((len(self.firsts), len(self.constants)))
        self.coefficients = self.launch.coefficients
        self.table = memoryview(self.coefficients.reshape(-1))
        self.plan.set_rows(self.rows)

    def has_room(self) -> bool:
        """Return whether there is room for the rows of numbers, for which the pipeline has had it last perhaps."""
        return self.plan.row is self.rows and self.launch.coefficients is self.coefficients

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
        return bool(self.scalar_names) and not self.numbers

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

    def update(self) -> None:
        """Update those tensors that are copied to where the kernel runs."""
        bucket = self.run.bucket
        self.plan.run_copied(bucket.rule, bucket, self.run.grads(), self.coefficients, self.rows)


class _TorchLane(_Lane):
    """A bucket that torch's operations run."""

    def __init__(self, run: BucketRun) -> None:
        self.table: list[Any] = []
        super().__init__(run)

    def make_room(self) -> None:
        """Let there be room for the rows of numbers."""
        self.table = [None] * (len(self.firsts) * len(self.constants))

    def has_room(self) -> bool:
        """Return whether there is room for the rows of numbers."""
        return len(self.table) == len(self.firsts) * len(self.constants)

    def update(self) -> None:
        """Update the bucket."""
        run = self.run
        bucket = run.bucket
        rows = zip(*[iter(self.table)] * len(self.constants), strict=True) if self.constants else [()]
        bucket.coefficients = [dict(zip(bucket.rule.coefficients, row, strict=True)) for row in rows]
        bucket.row, bucket.grads = self.rows, run.grads()
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
        by_torch = [_TorchLane(run) for run in cache.runs if run.engine is not cpu]
        self._lanes: list[_Lane] = [*kernels, *by_torch]
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
        self._flat = [lane for lane in self._dense if lane.plan.is_regular]
        self._copying = [lane for lane in self._dense if not lane.plan.is_regular]
        self._updating: list[_KernelLane | _TorchLane] = [*self._copying, *by_torch]
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
        self._reads = any(lane.reads for lane in self._lanes)
        pairs = zip(self._specs, self._guarded_groups, strict=True)
        changing = ((spec, group) for spec, group in pairs if spec.has_flags_in_tensors(group))
        self._flags = [(spec, group, spec.settle_flags(group)) for spec, group in changing]

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
        if self._reads and not self._tensors_decide_the_same():
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
        return next(filter(None, map(_Lane.look_on_threads, self._on_threads)), None)

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
        if self._updating or self._custom is not None:
            with torch.set_grad_enabled(False):
                for updating in self._updating:
                    updating.update()
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
        return plain and guard.reads and not (_is_clipped(run) or run.bucket.is_rounded)
    plan = run.bucket.plan
    own = not plan.checked and plan.versions.launch is not None
    whole = plan.is_regular or not (run.sparse or _is_clipped(run) or not run.bucket.is_plain)
    return plain and own and whole and (guard.reads or run.sparse) and not (run.sparse and _is_clipped(run))


def _is_clipped(run: BucketRun) -> bool:
    return ("clipped", True) in run.bucket.rule.flags
