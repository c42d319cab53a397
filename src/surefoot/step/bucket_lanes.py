"""A bucket in the fast lane: where its numbers stand, what guards it, and how it is stepped."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from surefoot.codegen.threads import ONE_THREAD
from surefoot.rule import ROUNDING_STEP, STEP, gradient_rule
from surefoot.rule.hyperparameters import is_number
from surefoot.state.check import hyperparameters
from surefoot.state.scalars import write_scalars
from surefoot.step.cache import is_constant
from surefoot.step.coefficients import count_step, distinct_columns, number_of
from surefoot.step.types import BucketRun
from surefoot.tensors.native.guards import ScalarRows, TensorGuard


class BucketLane:
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
        self.numbers: ScalarRows | None = guard.numbers.shared(self.count) if guard.scalars_in_memory else None
        values: Any = np.zeros((len(self.scalar_names), self.count))
        if self.numbers is not None:
            values = self.numbers.values
        self.values: Any = memoryview(values.reshape(-1))
        self.differ: Any = self.numbers.differ if self.numbers else (0,)
        self.firsts: list[int] = [0]
        self.rows: Any = run.shared_row
        names = run.bucket.rule.coefficients
        self.clip_place = names.index("step_clip") if is_clipped(run) else None
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
        self.has_tensor_options = not all(map(is_constant, options.values()))

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
        if self.has_tensor_options:
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


class KernelLane(BucketLane):
    """A bucket that a kernel runs."""

    def __init__(self, run: BucketRun) -> None:
        self.plan = plan = run.bucket.plan
        self.launch, self.kernel = plan.launch, plan.kernel(run.bucket.rule)
        self.coefficients: Any = None
        self.measure: Any = plan.gradient_measure(gradient_rule()) if is_clipped(run) else None
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


class TorchLane(BucketLane):
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


def is_clipped(run: BucketRun) -> bool:
    """Return whether a bucket's gradients are multiplied with a number that depends on all of them."""
    return ("clipped", True) in run.bucket.rule.flags
