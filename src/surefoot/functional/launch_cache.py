"""The launch cache: what a call on lists keeps for the next one, the tables of its kernel, and no tensor.

A launch depends on its tensors' dtypes, sizes, strides and devices, which compiled code compares with those of an
earlier call, and on their addresses, which are read anew each time.  A call that differs goes through the pipeline.
"""

from collections.abc import Hashable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines import Bucket, cpu
from surefoot.rule import ENGINE_OPTIONS, STORAGE_OPTIONS
from surefoot.state.scalars import is_between_processes
from surefoot.step.coefficients import compute_coefficients, store_scalars
from surefoot.step.device import refuse_capture
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun, ParamSlice
from surefoot.tensors.guards import are_on_host
from surefoot.tensors.memory import PLAIN, bytes_spanned, spans_are_apart
from surefoot.tensors.modes import mode_is_active
from surefoot.tensors.native import guards as native

_MOST_LAUNCHES, _MOST_PARAMS = 4, 20_000
"""How many launches an algorithm keeps, and of how many parameters: about 4 kB are kept for each of these."""
_PLAIN = set(PLAIN)
_needs_grad = attrgetter("requires_grad")


class LaunchCache:
    """The last launches of an algorithm; a call takes one out while using it, so that no other thread can."""

    def __init__(self) -> None:
        self._launches: dict[Hashable, ListLaunch] = {}

    def step(self, step: StepInput, columns: Sequence[Sequence[Tensor]]) -> bool:
        """Make a step by a cached launch and return True; return False, with nothing changed, where none fits.

        Args:
            step: the step, of one group; its tensors are those of `columns`.
            columns: parameters, gradients, slots and scalars.
        """
        key = _key(step, columns)
        launch = self._launches.pop(key, None) if _is_plain_update(step) else None
        if launch is None or not launch.takes(columns):
            return False
        launch.run(step, columns)
        self._keep(key, launch)
        return True

    def keep(self, step: StepInput, columns: Sequence[Sequence[Tensor]], runs: Sequence[BucketRun]) -> None:
        """Cache the launch of a step if another call can use it."""
        if _is_plain_update(step) and len(runs) == 1 and _is_cacheable(runs[0], columns):
            launch = ListLaunch(runs[0], columns)
            if launch.sound:
                self._keep(_key(step, columns), launch)

    def _keep(self, key: Hashable, launch: "ListLaunch") -> None:
        self._launches[key] = launch
        for oldest in list(self._launches)[:-_MOST_LAUNCHES]:  # other threads change it meanwhile
            self._launches.pop(oldest, None)


def _is_plain_update(step: StepInput) -> bool:
    """Return whether a step is its kernel's update and nothing else."""
    centralized = step.groups[0].get("gradient_centralization")
    return native.available() and step.only_updates() and not centralized and not mode_is_active()


def _key(step: StepInput, columns: Sequence[Sequence[Tensor]]) -> Hashable:
    """Return the options that a kernel depends on, with what tells most launches apart."""
    group, params = step.groups[0], columns[0]
    options = (step.spec.settle_flags(group), *map(group.get, (*ENGINE_OPTIONS, *STORAGE_OPTIONS)))
    return options, len(params), getattr(params[0], "shape", None) if params else None


class ListLaunch:
    """A launch of the CPU engine for any tensors of the sizes, strides and dtypes of those that it was made from.

    To a bucket it is the guard that reads and writes scalars.

    Attributes:
        sound: whether compiled code sees what Python sees; do not use it otherwise.
        scalars_in_memory: whether scalars stand in memory.
        scalars: those that may need a gradient: none.
    """

    scalars_in_memory, scalars = True, ()

    def __init__(self, run: BucketRun, columns: Sequence[Sequence[Tensor]]) -> None:
        tensors = list(chain.from_iterable(columns))
        self._rule, self._plan, self._options = run.bucket.rule, run.bucket.plan, run.bucket.options
        self._plan.versions = native.VersionCounters(())  # it holds tensors
        self._formats, self._row = run.bucket.formats, np.zeros(len(run.params), dtype=np.int64)
        self._count, self._arrays = len(run.params), len(self._plan.launch.pointers)
        # All tensors are handed to the guard as gradients are, which may move; it holds the one that they are not.
        self._guard = native.TensorGuard([[torch.empty(0)] * len(tensors)], given=tensors)
        self._numbers = native.ScalarIO(list(chain.from_iterable(columns[self._arrays :])))
        self._spans = np.array(list(map(bytes_spanned, tensors)), dtype=np.int64)
        self._deleters = self._guard.deleters.copy()
        self._apart = np.zeros(0, dtype=np.int64)
        self.sound = self._guard.sound

    def takes(self, columns: Sequence[Sequence[Tensor]]) -> bool:
        """Return whether it can step these tensors; if so, take over their addresses."""
        if any(len(column) != self._count for column in columns):
            return False
        tensors = list(chain.from_iterable(columns))
        known = len(tensors) == len(self._spans) and set(map(type, tensors)) <= _PLAIN
        if not known or self._guard.changed(tensors) or not self._are_apart(self._guard.gradients):
            return False
        steps = slice(self._arrays * self._count, None)
        if any(map(_needs_grad, tensors[steps])) or (self._guard.deleters != self._deleters)[steps].any():
            return False  # autograd sees one of the step counts, or another process shares it
        self._plan.launch.pointers[:] = self._apart[: steps.start].reshape(self._arrays, self._count)
        self._numbers.move(self._apart[steps])
        return True

    def _are_apart(self, addresses: np.ndarray) -> bool:
        """Return whether no two tensors share memory; if so, take over their addresses."""
        if np.array_equal(addresses, self._apart):
            return True
        apart = spans_are_apart(addresses, self._spans)
        self._apart = addresses.copy() if apart else np.zeros(0, dtype=np.int64)
        return apart

    def run(self, step: StepInput, columns: Sequence[Sequence[Tensor]]) -> None:
        """Step the tensors that were taken."""
        group = step.groups[0]
        refuse_capture(step.spec.name, step.groups)
        params, grads, *slots = (list(column) for column in columns[: self._arrays])
        bucket = Bucket(self._rule, params, grads, self._options, slots, plan=self._plan, formats=self._formats)
        bucket.gradient_addresses = self._plan.launch.pointers[1].copy()
        run = BucketRun(step.spec, ParamSlice(group, params), bucket, cpu, guard=self, shared_row=self._row)
        compute_coefficients(step, run)
        written = (column for position, column in enumerate(columns) if position != 1)
        torch.autograd.graph.increment_version(list(chain.from_iterable(written)))
        cpu.run(bucket)
        store_scalars(run)

    def read_scalars(self) -> np.ndarray:
        """Return the scalars: float64 of shape (scalars, parameters)."""
        values: np.ndarray = self._numbers.read()
        return values.reshape(-1, self._count)

    def write_scalars(self, values: np.ndarray) -> None:
        """Write the scalars: of shape (scalars, parameters), or (scalars, 1) where parameters share them."""
        self._numbers.write(np.broadcast_to(values, (len(values), self._count)).ravel())


def _is_cacheable(run: BucketRun, columns: Sequence[Sequence[Any]]) -> bool:
    """Return whether a bucket's plan depends on nothing but sizes, strides and dtypes of `columns`, all its tensors."""
    if run.engine is not cpu or run.sparse or run.repeats or run.spec.flags_of or len(run.params) > _MOST_PARAMS:
        return False
    bucket, rule = run.bucket, run.bucket.rule
    if rule.reductions or rule.stages or rule.number_slots or rule.group_scalars:
        return False
    if not (bucket.is_plain and bucket.plan.is_regular) or bucket.plan.checked:
        return False
    arrays = (bucket.params, bucket.grads, *bucket.slots)
    if [len(column) for column in columns] != [len(run.params)] * (len(arrays) + len(rule.scalars)):
        return False
    tensors, numbers = list(chain.from_iterable(columns)), list(chain.from_iterable(columns[len(arrays) :]))
    if not all(map(is_, chain.from_iterable(arrays), tensors)) or not set(map(type, tensors)) <= _PLAIN:
        return False
    shown = any(map(_needs_grad, numbers)) or any(map(is_between_processes, numbers))
    return are_on_host(numbers) and not shown and not any(tensor.is_inference() for tensor in tensors)
