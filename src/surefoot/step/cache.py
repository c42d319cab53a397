"""The step cache: buckets with their plans and parameters of custom steps, as long as all they were made from holds.

Whatever a user may change counts at the next step, so everything is compared with what is there now: groups, options,
the dicts of state and their entries, and the memory, dtype, sizes and strides of every tensor.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.threads import needs_threads
from surefoot.engines import cpu, gpu
from surefoot.rule import ENGINE_OPTIONS, STORAGE_OPTIONS, AlgorithmSpec
from surefoot.state.check import stepped_gradient
from surefoot.state.scalars import is_between_processes, read_scalars, write_scalars
from surefoot.step.custom_params import CustomParams
from surefoot.step.inputs import StepInput
from surefoot.step.options import ALL_STEP_OPTIONS
from surefoot.step.types import BucketRun
from surefoot.tensors.gate import admit_rows
from surefoot.tensors.guards import (
    are_on_host,
    make_dict_guard,
    make_guard,
    make_scalar_io,
    same_objects,
    share_written,
)
from surefoot.tensors.memory import PLAIN, has_memory, is_always_writable, is_plain, shared_memory
from surefoot.tensors.modes import has_no_values
from surefoot.tensors.native.guards import Replaced, ScalarIO, TensorGuard, VersionCounters
from surefoot.tensors.shards import ShardGuard, is_sharded, to_local

_DICTS = (dict, defaultdict)
UNREAD = ("params", "param_names")
"""Keys of lists in groups that change in place without changing an option: the one is guarded apart, the other decides
no bucket."""
_CONSTANT = (int, float, bool, str, type(None), torch.dtype)
_NUMPYS = (np.number, np.bool_)
_REAL = (float, np.floating)
_STEP_OPTIONS = frozenset(ALL_STEP_OPTIONS)


class BucketGuard:
    """Guards the tensors of one bucket, and reads and writes those of its scalars that the host has.

    Attributes:
        scalars: the tensors of those, where they are tensors.
    """

    def __init__(self, run: BucketRun) -> None:
        scalars, slots = run.bucket.rule.scalars, run.stored_names()
        held = [] if _are_replaced(run) else [scalar.name for scalar in scalars]
        sampled = run.bucket.rule.sampled
        others = (*run.bucket.rule.number_slots, *(sampled.slots if sampled else ()))
        names = [*slots, *held, *(slot.name for slot in others)]
        entries = {name: [entry[name] for entry in run.entries] for name in names}
        self._shards: ShardGuard | None = None
        busy = run.engine is cpu and needs_threads(run.bucket.params)
        if is_sharded(run.params[0]):
            stored = chain.from_iterable(entries[name] for name in slots)
            self._shards, self._items = ShardGuard(run.params, stored), make_dict_guard(run.entries)
            columns = (run.bucket.params, *(entries[name] for name in held), *run.bucket.slots, *run.bucket.parts)
            self.tensors = make_guard(columns, given=self._shards.local_grads(), threads=busy)
            self._wrappers = VersionCounters([*run.params, *chain.from_iterable(entries[name] for name in slots)])
        else:
            columns, given = (run.params, *entries.values()), run.bucket.grads if run.derives_grads() else None
            gradients = not run.sparse and given is None
            self.tensors = make_guard(columns, run.entries, names, gradients=gradients, given=given, threads=busy)
        self._derived = run.derives_grads()
        own = not (run.sparse or self._derived or self._shards is not None)
        own_on_cpu = own and run.engine is not gpu and run.params[0].is_cpu
        self._can_move = own_on_cpu and type(self.tensors) is TensorGuard and (run.engine is cpu or _are_apart(run))
        self._arrays = 2 + len(slots)
        self._fixed = self._can_move and self.tensors.places[0][self._arrays :].tobytes()
        self._kinds = list(map(_kind, run.grads())) if run.sparse else []
        on_host = () if run.has_device_scalars else held
        self.scalars = of_host = list(chain.from_iterable(entries[name] for name in on_host))
        self._shared = (run.entries, scalars) if any(map(is_between_processes, of_host)) else None
        self.numbers, self.versions = make_scalar_io(of_host), VersionCounters(of_host)
        self._kept_numbers = {slot.name: _KeptNumbers.of(entries[slot.name]) for slot in run.bucket.rule.number_slots}
        self._replaced = None if held or not scalars else (run.entries, scalars)
        self._in_memory = self._replaced is None and not any(map(has_no_values, of_host))
        self._shape = (len(scalars), len(run.params))

    def revalidate(self, run: BucketRun) -> bool:
        """Take over this step's gradients; return whether all else is as it was."""
        if self._replaced and not _are_replaced(run):
            return False
        if run.sparse:
            return not self.tensors.changed() and self._revalidate_rows(run)
        if self._derived:
            return self._revalidate_derived(run)
        if self._shards is not None:
            return self._revalidate_shards(run, self._shards)
        plan = run.bucket.plan
        grads = run.grads() if plan is None or plan.irregular or plan.checked else []  # else their addresses do
        if self.tensors.changed() or not all(type(grad) in PLAIN for grad in grads):
            return False
        run.bucket.gradient_addresses, run.bucket.grads = self.tensors.gradients, list(map(to_local, grads))
        return True

    def _revalidate_shards(self, run: BucketRun, shards: ShardGuard) -> bool:
        grads = None if self._items.changed() else shards.local_grads()
        if grads is None or self.tensors.changed(grads) or not all(type(grad) is Tensor for grad in grads):
            return False
        run.bucket.gradient_addresses, run.bucket.grads = self.tensors.gradients, grads
        return True

    def _revalidate_derived(self, run: BucketRun) -> bool:
        grads = run.grads()
        if any(grad is None for grad in grads):
            return False
        if self._shards is not None and (self._items.changed() or self._shards.local_grads() is None):
            return False
        entries = zip(run.params, grads, run.entries, strict=True)
        derived = [stepped_gradient(run.spec, run.group, *each, run.bucket.rule.flags) for each in entries]
        if any(grad.is_sparse for grad in derived):
            return False
        local = list(map(to_local, derived))
        if self.tensors.changed(local):
            return False
        run.bucket.gradient_addresses, run.bucket.grads = self.tensors.gradients, local
        return True

    def _revalidate_rows(self, run: BucketRun) -> bool:
        grads = run.grads()
        same = list(map(_kind, grads)) == self._kinds
        if same:
            names = [functools.partial(run.bucket.row_name, row) for row in range(len(grads))]
            run.bucket.grads = list(map(admit_rows, grads, names))
        return same

    @property
    def can_move(self) -> bool:
        """Return whether its tensors may be readmitted elsewhere."""
        return self._can_move

    def readmit(self, run: BucketRun) -> bool:
        """Take over where parameters and slots are now; return False if other tensors of state have moved."""
        addresses = self.tensors.places[0]
        if addresses[self._arrays :].tobytes() != self._fixed:
            self.tensors.end()
            return False
        if run.bucket.plan is not None:
            run.bucket.plan.move(addresses[: self._arrays])
        self.tensors.readmit()
        return True

    def count_versions(self) -> None:
        """Tell autograd that sharded tensors have been written; the engine tells it of their shards."""
        if self._shards is not None:
            self._wrappers.count()

    def is_compiled(self) -> bool:
        """Return whether compiled code guards the tensors, and can read and write scalars."""
        native = type(self.tensors) is TensorGuard and type(self.numbers) is ScalarIO
        own = self._shards is None and not self._derived  # gradients are what parameters hold
        return native and self.versions.launch is not None and own and self._shared is None

    @property
    def scalars_in_memory(self) -> bool:
        """Whether scalars stand in memory; else they are replaced at every step, or have no values."""
        return self._in_memory

    def release_grads(self) -> None:
        """Hold this step's gradients no longer."""
        self.tensors.release_grads()

    def read_scalars(self) -> np.ndarray:
        """Return the scalars: float64 of shape (scalars, parameters)."""
        if not self._shape[0]:
            return np.zeros(self._shape)
        if by_torch := self._replaced or self._shared:
            return read_scalars(*by_torch)
        values: np.ndarray = self.numbers.read()
        return values.reshape(self._shape)

    def write_scalars(self, values: np.ndarray) -> None:
        """Write the scalars: of shape (scalars, parameters), or (scalars, 1) where parameters share them."""
        if by_torch := self._replaced or self._shared:
            write_scalars(*by_torch, values)
        if by_torch or not self._shape[0]:
            return
        self.numbers.write(values.ravel() if values.shape == self._shape else np.repeat(values, self._shape[1]))
        self.versions.count()

    def kept_numbers(self, name: str) -> "_KeptNumbers | None":
        """Return what reads and writes the tensors of a slot that is one number, None where torch does."""
        return self._kept_numbers.get(name)


class _KeptNumbers:
    """Reads and writes a slot of which every parameter has one number, in a call for all."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._numbers, self._versions = make_scalar_io(tensors), VersionCounters(tensors)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "_KeptNumbers | None":
        """Return what reads and writes these tensors, None where they are not the host's own."""
        fit = are_on_host(tensors) and not any(map(is_between_processes, tensors))
        return cls(tensors) if fit else None

    def read(self) -> Tensor:
        """Return the numbers in float64."""
        return torch.tensor(self._numbers.read())

    def write(self, values: Tensor) -> None:
        """Set the numbers, rounded to the dtype of each."""
        self._numbers.write(values.numpy())
        self._versions.count()


def _are_apart(run: BucketRun) -> bool:
    """Return whether tensors share no memory, for which else an engine was chosen that takes them in turns."""
    return shared_memory(list(chain.from_iterable(run.bucket.columns()))) is None


def _kind(grad: Any) -> tuple[Any, ...]:
    """Return what must stay of a sparse gradient; all else of it may change."""
    if not isinstance(grad, Tensor) or not grad.is_sparse:
        return ()
    return type(grad), grad.dtype, grad.device, grad.shape, grad.sparse_dim()


class OptionsGuard:
    """Guards the options of groups: whether they decide the same buckets, and what custom steps take, as before."""

    def __init__(self, step: StepInput) -> None:
        self._signatures = [_signature(step, group) for group in step.groups]
        self._note(step)

    def _note(self, step: StepInput) -> None:
        self._seen = _options(step)
        lists = [group.get(name) for group in step.groups for name in UNREAD]
        self._constant = all(is_constant(each) or any(each is held for held in lists) for each in self._seen)

    def are_numbers(self, step: StepInput) -> bool:
        """Return whether options that can change in place are numbers of the update, in tensors of the host."""
        if self._constant or not is_constant(step.stepping.options.max_grad_norm):
            return self._constant
        return all(
            is_constant(value) or name in UNREAD or (_is_read(name, step.spec.of(group)) and _is_on_host(value))
            for group in step.groups
            for name, value in group.items()
        )

    def same(self, step: StepInput) -> bool:
        """Return whether nothing can have changed: the same objects, none of which can change its value."""
        return self._constant and same_objects(self._seen, _options(step))

    def decide_the_same(self, step: StepInput) -> bool:
        """Return whether they do; if so, the options of now are those to compare with from then on."""
        if self._signatures != [_signature(step, group) for group in step.groups]:
            return False
        self._note(step)
        return True


def _signature(step: StepInput, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what of a group decides its buckets, beside its tensors; of a custom step all but real numbers may."""
    spec, options = step.spec.of(group), ("gradient_centralization", *ENGINE_OPTIONS, *STORAGE_OPTIONS)
    if spec.update is None:
        discrete = {name: value for name, value in group.items() if _is_discrete(value)}
        return spec, step.is_clipped(group), spec.settle_flags(group), discrete
    own = [spec.flags_of(group, param) for param in group["params"]] if spec.flags_of else None
    sampled = tuple(group.get(slot.sampled) for slot in spec.slots if slot.sampled)
    return (spec, step.flags(group), own, sampled, *map(group.get, options))


def _options(step: StepInput) -> list[object]:
    """Return the names and values of all options, and what else signatures depend on."""
    options: list[object] = [step.stepping.options.max_grad_norm, step.grad_scale is None]
    for group in step.groups:
        shared = {each.name for each in step.spec.of(group).group_scalars}  # every step changes, no bucket depends on
        options += group
        options += [value for name, value in group.items() if name not in shared] if shared else group.values()
    return options


def is_constant(value: object) -> bool:
    """Return whether an option can change by being replaced only."""
    simple = type(value) in _CONSTANT or isinstance(value, _NUMPYS)  # rates come from schedules written with NumPy
    return simple or (type(value) is tuple and all(map(is_constant, value)))


def _is_on_host(value: object) -> bool:
    """Return whether an option is a number in a 0-d tensor of the host, or such numbers and constants."""
    if type(value) is tuple:
        return all(is_constant(each) or _is_on_host(each) for each in value)
    if not (isinstance(value, Tensor) and is_plain(value) and value.is_floating_point()):
        return False
    return value.is_cpu and not value.dim() and has_memory(value)


def _is_discrete(value: object) -> bool:
    parts = value if type(value) is tuple else (value,)
    return is_constant(value) and not any(isinstance(each, _REAL) for each in parts)


def are_numbers_of_update(replaced: Iterable[Replaced], specs: Sequence[AlgorithmSpec]) -> bool:
    """Return whether values that have replaced others among options decide nothing but the numbers of the update.

    So do real numbers, as long as they are as true as before.

    Args:
        replaced: the values, of groups and then of the optimizer.
        specs: the algorithm of each group.
    """
    return all(_is_number_of_update(each, specs) for each in replaced)


def _is_number_of_update(replaced: Replaced, specs: Sequence[AlgorithmSpec]) -> bool:
    of_group = replaced.number < len(specs) and _is_of_update(replaced.key, specs[replaced.number])
    return of_group and _are_alike(replaced.before, replaced.value)


def _is_read(name: object, spec: AlgorithmSpec) -> bool:
    """Return whether a number of this name in a tensor is read at every step; custom steps may keep what it was."""
    return spec.update is not None and _is_of_update(name, spec)


def _is_of_update(name: object, spec: AlgorithmSpec) -> bool:
    """Return whether a real number of this name decides nothing but the numbers of the update, while it is as true."""
    return isinstance(name, str) and name not in _STEP_OPTIONS and spec.flags_of is None


def _are_alike(before: object, value: object) -> bool:
    """Return whether real numbers, or tuples of such, are as true as others."""
    if type(before) is tuple and type(value) is tuple:
        return len(before) == len(value) and all(map(_are_alike, before, value))
    return isinstance(before, _REAL) and isinstance(value, _REAL) and bool(before) == bool(value)


_MOST_PATTERNS = 128
"""For how many sets of parameters with gradients a cache is kept."""
_MOST_PARAMS = 1 << 14
"""Of how many parameters, all sets counted, beside the last one."""
_ALIKE = 64
"""After how many steps with the same ones the caches of others are dropped."""


@dataclass(eq=False)
class StepCache:
    """The buckets and custom parameters of a step, and what they were made from; nothing where nothing can be kept.

    Attributes:
        options: guards the groups' options; None if nothing is kept.
        groups: the groups, and how many parameters each has.
        params: all parameters.
        idle: those without a gradient.
        state: the optimizer's.
        items: guards its items.
        runs: the buckets; none if they cannot be used again.
        custom: the parameters of custom steps; None if there are none, or if nothing can guard them.
        written: where they write, if native guards see it.
        fast: the fast lane; None as long as none was asked for that could serve, False where there can be none.
        pattern: which parameters have gradients, see `_pattern_of`.
        others: the caches of steps in which others had some, by their patterns; None as long as that has not changed.
        alike: how often in a row it was the one that was asked for since.
    """

    options: OptionsGuard | None = None
    groups: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)
    state: Any = None
    items: Any = None
    runs: list[BucketRun] = field(default_factory=list)
    custom: CustomParams | None = None
    written: Any = None
    fast: Any = None
    pattern: bytes = b""
    others: "dict[bytes, StepCache] | None" = None
    alike: int = 0

    @classmethod
    def of(
        cls,
        step: StepInput,
        options: OptionsGuard,
        runs: list[BucketRun],
        custom: CustomParams | None,
        before: "StepCache | None",
    ) -> "StepCache":
        """Keep what was made from these options and can be used again: all buckets or none, custom parameters.

        Args:
            step: the step.
            options: what guards its options.
            runs: its buckets.
            custom: its parameters of custom steps.
            before: what the step before has left.
        """
        if type(step.state) not in _DICTS:
            return cls()
        kept_runs = runs if _guarded(runs) else []
        kept_custom = custom if custom is not None and custom.guard(step) else None
        if not kept_runs and kept_custom is None:
            return cls()
        params = list(_params(step))
        idle = [param for param in params if param.grad is None]
        groups = [(group, len(group["params"])) for group in step.groups]
        items = make_dict_guard([cast("dict[Any, Any]", step.state)])
        pattern = _pattern_of(params)
        made = cls(options, groups, params, idle, step.state, items, kept_runs, kept_custom, pattern=pattern)
        made.written = share_written(made.guards())
        if kept_runs != runs or kept_custom is not custom:
            made.fast = False  # which would leave out what is not kept
        if before is not None:
            made._succeed(before)
        return made

    def _succeed(self, before: "StepCache") -> None:
        """Take over the caches for other parameters with gradients, or begin to keep such."""
        on_host = all(run.device_scalars is None for run in (*self.runs, *before.runs))
        if not on_host or not same_objects(self.params, before.params):
            return
        if before.options is not None and before.pattern == self.pattern:
            return  # what has changed concerns all
        if before.others is not None or before.pattern != self.pattern:
            self.others = dict(before.others or {})
            last = next(reversed(self.others.values()), None)
            if last is not None and not last.has_same_state():
                self.others = {key: other for key, other in self.others.items() if other.has_same_state()}
            while len(self.others) >= _MOST_PATTERNS or sum(map(StepCache.size, self.others.values())) > _MOST_PARAMS:
                self.others.pop(next(iter(self.others)))

    def size(self) -> int:
        """Return how many parameters it is about."""
        parts = [*(run.slice for run in self.runs), *(self.custom.slices if self.custom else ())]
        return sum(len(part.params) for part in parts)

    def has_same_state(self) -> bool:
        """Return whether the state still has what was stepped."""
        return not self.items.changed() and all(guard.has_entries() for guard in self.guards())

    def of_now(self) -> "StepCache":
        """Return the cache for the parameters that have gradients now, an empty one if there is none; keep that one.

        Two losses of one model, layers that are frozen and thawed, experts: what has gradients may change at every
        step, and come again.
        """
        if self.others is None:
            return self
        if (now := _pattern_of(self.params)) == self.pattern or not any(now):
            self.alike += 1
            if self.alike > _ALIKE:
                self.others = None
            return self
        # Only the one that is kept keeps the others: otherwise they would keep one another alive.
        others, self.others, self.alike = self.others, None, 0
        found = others.pop(now, None) or StepCache(params=self.params, pattern=now)
        if self.options is not None:
            others[self.pattern] = self
        found.others = others
        return found

    def revalidate(self, step: StepInput) -> bool:
        """Return whether all that it was made from holds, wherever that is; buckets then have this step's gradients."""
        return self._holds(step) or (self.readmit() and self._holds(step))

    def _holds(self, step: StepInput) -> bool:
        """Take over this step's gradients; return whether all else is as it was."""
        return (
            self._same_options(step)
            and self.has_same_params(step)
            and all(param.grad is None for param in self.idle)
            and self.state is step.state
            and not self.items.changed()
            and all(run.guard.revalidate(run) for run in self.runs)
            and (self.custom is None or self.custom.revalidate())
        )

    def guards(self) -> list[Any]:
        """Return the guards of all tensors."""
        return [*(run.guard.tensors for run in self.runs), *((self.custom.guards if self.custom else None) or ())]

    def readmit(self) -> bool:
        """Take over where all tensors are now; return whether that is all that has changed of them.

        What was made from the tensors depends on their memory by its addresses only, as long as they are apart.
        """
        if self.written is None or not all(run.guard.can_move for run in self.runs):
            return False
        if (self.custom is not None and self.custom.overlap) or not self.written.admits_moves():
            return False
        if self.custom is not None:
            self.custom.readmit()
        return all(run.guard.readmit(run) for run in self.runs)

    def has_same_params(self, step: StepInput) -> bool:
        """Return whether the groups are the same, with the same parameters."""
        return _same_groups(self.groups, step.groups) and same_objects(self.params, _params(step))

    def _same_options(self, step: StepInput) -> bool:
        if self.options is None or self.options.same(step):
            return self.options is not None
        return self.settle_options(step)

    def settle_options(self, step: StepInput) -> bool:
        """Take over options that were changed; return whether they decide the same buckets."""
        for run in self.runs:
            run.options = None
        return self.options is not None and self.options.decide_the_same(step)

    def has_numbers_only(self, step: StepInput) -> bool:
        """Return whether options that can change in place are numbers of the update, which the host can read."""
        return self.options is not None and self.options.are_numbers(step)


def are_guardable(groups: object) -> bool:
    """Return whether compiled code can guard groups: a list of dicts with lists of parameters."""
    if not isinstance(groups, list):
        return False
    return all(isinstance(group, dict) and isinstance(group["params"], list) for group in groups)


def _pattern_of(params: Iterable[Tensor]) -> bytes:
    """Return which parameters have gradients."""
    return bytes([param.grad is not None for param in params])


def _same_groups(ours: list[tuple[dict[str, Any], int]], theirs: list[dict[str, Any]]) -> bool:
    """Return whether these are the groups, with as many parameters in each."""
    same = len(ours) == len(theirs)
    return same and all(
        own is group and count == len(group["params"]) for (own, count), group in zip(ours, theirs, strict=True)
    )


def _params(step: StepInput) -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in step.groups)


def _bring_home(run: BucketRun) -> None:
    """Let the host have the scalars that it reads at every step, if somebody has put them on a device."""
    for entry, scalar in product(run.entries, run.bucket.rule.scalars):
        if isinstance(value := entry[scalar.name], Tensor) and not value.is_cpu:
            entry[scalar.name] = value.cpu()


def _guarded(runs: Sequence[BucketRun]) -> bool:
    """Guard buckets from now on; return whether all can be used again."""
    for run in runs:
        if run.engine is gpu and not run.has_device_scalars:
            _bring_home(run)
    if not all(map(_reusable, runs)):
        return False
    for run in runs:
        run.guard = BucketGuard(run)
    return True


def _reusable(run: BucketRun) -> bool:
    engines = (run.engine, run.sampled.engine if run.sampled else run.engine)
    if not all(engine in (cpu, gpu) for engine in engines) and not _is_simple(run):
        return False
    if not all(type(entry) is dict for entry in run.entries):
        return False
    if run.params[0].is_complex() and not run.has_device_scalars:
        return False  # their real views, if kept, would keep them from being swapped
    if run.sparse and (run.engine is gpu or run.group.get("ema")):
        return False  # averages are none of a sparse update's slots
    sharded = is_sharded(run.params[0])
    params = run.bucket.params if sharded else run.params
    grads = run.bucket.grads if sharded or run.derives_grads() else run.grads()
    stored = params if run.sparse else (*params, *grads)
    written = chain(run.params, *run.bucket.slots, () if run.has_device_scalars else _scalars(run))
    if not all(is_always_writable(tensor) for tensor in written if isinstance(tensor, Tensor)):
        return False  # whether it can be written the mode says
    return all(map(is_plain, stored)) and (run.has_device_scalars or _are_replaced(run) or are_on_host(_scalars(run)))


def _is_simple(run: BucketRun) -> bool:
    """Return whether an engine that looks at every tensor itself need not do so again while a guard finds no change."""
    unlike = run.sparse or run.sampled or run.group.get("differentiable") or not run.params[0].is_cpu
    return not unlike and all(is_plain(tensor) for column in run.bucket.columns() for tensor in column)


def _scalars(run: BucketRun) -> Iterable[Any]:
    return (entry.get(scalar.name) for entry in run.entries for scalar in run.bucket.rule.scalars)


def _are_replaced(run: BucketRun) -> bool:
    """Return whether scalars are Python's numbers, so that every step puts others into the state."""
    return not run.has_device_scalars and all(isinstance(value, (int, float)) for value in _scalars(run))
