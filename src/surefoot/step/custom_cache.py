"""What a custom step keeps for the next one: its parameters, found fit, while nothing has changed but values."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from surefoot.rule import ROUNDING_STEP, AlgorithmSpec
from surefoot.state.check import hyperparameters, validated_gradient
from surefoot.state.formats import CORRECTION, param_format
from surefoot.step.cache import MOST_PATTERNS, UNREAD, is_constant, new_numbers, pattern_of
from surefoot.step.device import refuse_capture
from surefoot.step.inputs import StepInput
from surefoot.step.options import Stepping, check_changed
from surefoot.step.types import CustomStep, ParamSlice, PreparedParam
from surefoot.tensors.guards import make_dict_guard, make_guard, same_objects, share_written
from surefoot.tensors.memory import has_address, is_plain, shared_memory
from surefoot.tensors.native.guards import DictGuard, LaunchSequence, TensorGuard, gradients_launch, lists_launch
from surefoot.tensors.shards import to_local

GRADIENT_OPTIONS = ("maximize", "max_grad_value", "gradient_centralization")
"""Options of a group by which a custom step is handed other gradients than parameters hold."""
_OPTIONS_CHANGED, _FIRST_OF_TENSORS = 1, 5
"""What the compiled guard returns: the number, from 1, of the first part of it that has found a change."""


class CustomLane:
    """The fast lane of a custom step: it only counts, and takes gradients as they are.

    Args:
        rows: hyperparameters, parameter and state of each.
        apart: whether parameters or their state share memory.
    """

    def __init__(self, rows: Sequence[tuple[SimpleNamespace, Tensor, dict[str, Any]]], *, apart: bool) -> None:
        self._rows, self._apart = rows, apart
        self._counts = [entry["step"] for *_, entry in rows if "step" in entry]
        self._custom_step: CustomStep | None = None

    def step(self, make_step: Callable[[list[PreparedParam]], CustomStep]) -> None:
        """Count the step of each parameter and make it; `make_step` is called the first time only."""
        apart = self._apart
        found = [PreparedParam(h, param, param.grad, entry, apart) for h, param, entry in self._rows]  # type: ignore[arg-type]
        if self._counts:
            torch._foreach_add_(self._counts, 1)
        if self._custom_step is None:
            self._custom_step = make_step(found)
        self._custom_step(found)

    def forget_step(self) -> None:
        """Make the step anew the next time."""
        self._custom_step = None


def custom_lane(
    stepping: Stepping, groups: Sequence[Mapping[str, Any]], state: object, step: Callable[[], StepInput]
) -> CustomLane | None:
    """Return the fast lane of custom steps if nothing has changed but values; else None, with nothing changed.

    To be called with the context's lock.

    Args:
        stepping: options and context.
        groups: the param groups of now.
        state: the state of now.
        step: return all that the step is about.
    """
    cache: CustomCache | None = stepping.custom_caches.get(_pattern(groups))
    if cache is None or cache.lane is None or not cache.is_unchanged(groups, state, step):
        return None
    return cache.lane


def take_cache(step: StepInput) -> "CustomCache":
    """Return the cache of steps in which the same parameters have gradients, or a new one, to be put back when used."""
    caches = step.stepping.custom_caches
    cache: CustomCache | None = caches.pop(_pattern(step.groups), None) if step.grads is None else None
    if cache is not None and cache.revalidate(step):
        return cache
    if cache is not None:
        caches.clear()  # what has changed concerns all
    for pattern in [pattern for pattern, each in caches.items() if not each.has_same_entries(step)]:
        del caches[pattern]
    return CustomCache(step)


def keep_cache(step: StepInput, cache: "CustomCache") -> None:
    """Keep a cache for the next step in which the same parameters have gradients."""
    if step.grads is None and cache.slices:
        cache.keep(step)
        caches = step.stepping.custom_caches
        while len(caches) >= MOST_PATTERNS:
            caches.pop(next(iter(caches)))
        caches[_pattern(step.groups)] = cache


def _pattern(groups: Sequence[Mapping[str, Any]]) -> bytes:
    return pattern_of(param for group in groups for param in group["params"])


class CustomCache:
    """Parameters with gradients that were found fit, and whether they still are.

    Attributes:
        slices: the parameters of each group that has some.
        guards: what tells whether their tensors are as they were: first the dict of state, then those; None where that
            cannot be told.
        overlap: whether parameters or their state share memory.
        repeated: parameters that are there twice.
        entries: the state of the parameters of each group.
        lane: what makes a step that only counts and takes gradients as they are; None if other things are asked for.
    """

    def __init__(self, step: StepInput) -> None:
        self.slices, self._grads = [], []
        for group in [group for group in step.groups if step.spec.of(group).update is None]:
            spec = step.spec.of(group)
            found = [(param, grad) for param in group["params"] if (grad := step.gradient(param)) is not None]
            if found:
                self.slices.append(ParamSlice(group, [param for param, _ in found]))
                self._grads.append(
                    [validated_gradient(spec, group, param, grad, step.state.get(param, {})) for param, grad in found]
                )
        self.guards: list[Any] | None = None
        self.lane: CustomLane | None = None
        self._guard: LaunchSequence | None = None
        self._hyperparameters: list[SimpleNamespace] = []
        self._deciding: list[Any] = []
        self.entries = [[step.state.get(param, {}) for param in part.params] for part in self.slices]
        met = Counter(param for part in self.slices for param in part.params)
        self.repeated = {param for param, count in met.items() if count > 1}
        self.overlap = self._shares_memory(step)

    def _shares_memory(self, step: StepInput) -> bool:
        stored = [param for part in self.slices for param in part.params]
        for part, entries in zip(self.slices, self.entries, strict=True):
            slots = step.spec.of(part.group).slots
            stored += [entry[slot.name] for entry in entries for slot in slots if entry.get(slot.name) is not None]
        return shared_memory([local for tensor in stored if has_address(local := to_local(tensor))]) is not None

    def has_same_entries(self, step: StepInput) -> bool:
        """Return whether the state has the entries that it had."""
        pairs = zip(self.slices, self.entries, strict=True)
        return all(step.state.get(p) is e for part, own in pairs for p, e in zip(part.params, own, strict=True))

    def take_gradients(self) -> list[list[Tensor]]:
        """Return the gradients of this step, and keep none."""
        grads: list[Any] = self._grads or [[param.grad for param in part.params] for part in self.slices]
        self._grads = []
        return grads

    def hyperparameters(self) -> list[SimpleNamespace]:
        """Return those of each group."""
        return self._hyperparameters or [hyperparameters(part.group) for part in self.slices]

    # Guards, made when all state is there

    def keep(self, step: StepInput) -> None:
        """Guard all tensors from now on, where their memory is what they mean; `revalidate` asks these guards."""
        if self.guards is not None:
            return
        alike: defaultdict[Any, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        for part in self.slices:
            spec = step.spec.of(part.group)
            kept = [*(scalar.name for scalar in spec.scalars), *(slot.name for slot in spec.all_slots), CORRECTION]
            for param in part.params:
                entry = step.state.get(param, {})
                names = tuple(name for name in kept if entry.get(name) is not None)
                tensors: list[Any] = [param, param.grad, *(entry[name] for name in names)]
                if type(entry) is not dict or not all(isinstance(t, Tensor) and is_plain(t) for t in tensors):
                    return
                alike[names].append((param, entry))
        if not alike or _is_capturable(step) or type(step.state) not in (dict, defaultdict):
            return
        self.guards = [make_dict_guard([cast("dict[Any, Any]", step.state)])]
        for names, found in alike.items():
            entries = [entry for _, entry in found]
            columns = ([param for param, _ in found], *([entry[name] for entry in entries] for name in names))
            self.guards.append(make_guard(columns, entries, names, gradients=True))
        self._written = share_written(self.guards[1:])
        self._deciding = _deciding_options(step)
        self._params = [list(group["params"]) for group in step.groups]
        self._idle = [param for params in self._params for param in params if param.grad is None]
        self._groups, self._list, self._state = list(step.groups), step.groups, step.state
        self._release_grads()
        self._compile(step)

    def _compile(self, step: StepInput) -> None:
        """Let one compiled call guard all from now on, where that can be."""
        guards: list[Any] = self.guards or []
        if type(guards[0]) is not DictGuard or any(type(guard) is not TensorGuard for guard in guards[1:]):
            return
        lists, lists_kept = lists_launch([step.groups, *(group["params"] for group in step.groups)])
        idle, idle_kept = gradients_launch(self._idle)
        guarding, releasing = zip(*(guard.launches() for guard in guards[1:]), strict=True)
        self._kept, self._launches = (lists_kept, idle_kept), [lists, guards[0].launch, idle, *guarding, *releasing]
        self._settle_options(step)

    def _settle_options(self, step: StepInput) -> bool:
        """Guard the options of now; return whether they decide the same, and can change by being replaced only."""
        self._guard, self._hyperparameters, self.lane = None, [], None
        named = (pair for group in step.groups for pair in group.items())
        if not all(name in UNREAD or is_constant(value) for name, value in named):
            return False
        if self._deciding != _deciding_options(step):
            return False
        self._hyperparameters = [hyperparameters(part.group) for part in self.slices]
        self._guarded_groups = list(step.groups)
        self._options = DictGuard([*step.groups, vars(step.stepping.options)])
        self._guard = LaunchSequence([self._options.launch, *self._launches])
        if _is_capturable(step):
            return False
        self.lane = self._make_lane(step)
        return True

    def _only_numbers(self, spec: AlgorithmSpec) -> bool:
        """Take over options if those that were changed are numbers, as schedules change them; return whether."""
        if not self._hyperparameters:
            return False
        spec.check_groups(self._groups)
        numbers = new_numbers(self._options, list(map(spec.of, self._guarded_groups)))
        if numbers is None:
            return False
        for h, part in zip(self._hyperparameters, self.slices, strict=True):
            own = zip(self._guarded_groups, numbers, strict=True)  # groups of now are compared later
            vars(h).update(next(new for group, new in own if group is part.group))
        return True

    def _make_lane(self, step: StepInput) -> CustomLane | None:
        """Return the fast lane if a step only counts and takes gradients as they are."""
        rows = [
            (h, param, entry)
            for h, part, entries in zip(self._hyperparameters, self.slices, self.entries, strict=True)
            for param, entry in zip(part.params, entries, strict=True)
        ]
        asks_more = step.options_ask_more() or self.repeated
        around = (*GRADIENT_OPTIONS, "ema")
        if asks_more or any(part.group.get(name) for part in self.slices for name in around):
            return None
        return CustomLane(rows, apart=self.overlap) if all(starmap(_only_counts, rows)) else None

    # Whether all is as it was

    @property
    def has_state(self) -> bool:
        """Return whether all state is there, so that none needs to be made."""
        return self.guards is not None

    def revalidate(self, step: StepInput) -> bool:
        """Return whether everything is as it was but for values."""
        if self._guard is None or step.groups is not self._list or step.state is not self._state:
            return self._revalidate_uncompiled(step)
        found = self._run_guard(self._guard)
        if found == _OPTIONS_CHANGED and (self._only_numbers(step.spec) or self._settle_options(step)):
            found = self._run_guard(self._guard)
        return self._revalidate_uncompiled(step) if found == _OPTIONS_CHANGED else not found

    def is_unchanged(self, groups: object, state: object, step: Callable[[], StepInput]) -> bool:
        """Return whether the compiled guard finds everything as it was, but for options that decide the same."""
        if self._guard is None or groups is not self._list or state is not self._state:
            return False
        found = self._run_guard(self._guard)
        if found == _OPTIONS_CHANGED:
            now = step()
            refuse_capture(now.spec.name, now.groups)
            if not self._only_numbers(now.spec):
                check_changed(now.stepping, now.spec, now.groups)
                if not self._settle_options(now) or self.lane is None:
                    return False
            found = self._run_guard(self._guard)
        return not found

    def _run_guard(self, guard: LaunchSequence) -> int:
        """Return the number of what has changed, from 1, or 0; gradients are held no longer."""
        found = guard.run()
        if found >= _FIRST_OF_TENSORS and self._readmit():
            found = guard.run()
        if found:
            self._release_grads()
        if found >= _FIRST_OF_TENSORS:
            # For good: a guard that has found a change would find none the next time.
            self.guards, self._guard, self.lane = None, None, None
        return found

    def _readmit(self) -> bool:
        """Take over where tensors are now; return whether that is all that has changed of them."""
        if self.overlap or self._written is None or not self._written.admits_moves():
            return False
        for guard in (self.guards or ())[1:]:
            guard.readmit()
        if self.lane is not None:
            self.lane.forget_step()
        return True

    def _revalidate_uncompiled(self, step: StepInput) -> bool:
        """Return what `revalidate` does, guard by guard, with options as they are now."""
        self._hyperparameters, self.lane = [], None
        if self.guards is None or self._state is not step.state or not same_objects(self._groups, step.groups):
            return False
        same = all(same_objects(own, group["params"]) for own, group in zip(self._params, step.groups, strict=True))
        if not same or any(param.grad is not None for param in self._idle):
            return False
        changed = _is_capturable(step) or any(guard.changed() for guard in self.guards)
        self._release_grads()
        return not changed and self._deciding == _deciding_options(step)

    def _release_grads(self) -> None:
        for guard in (self.guards or ())[1:]:
            guard.release_grads()


def _is_capturable(step: StepInput) -> bool:
    return any(group.get("capturable") for group in step.groups)


def _only_counts(h: SimpleNamespace, param: Tensor, entry: Mapping[str, Any]) -> bool:
    """Return whether a step needs of a parameter's state no more than its count, on the host."""
    # Whether it is kept in a short format is decided by the state, whatever options say by now.
    plain = param.is_cpu and param_format(vars(h), param, entry).is_plain and ROUNDING_STEP.name not in entry
    return plain and ("step" not in entry or isinstance(entry["step"], Tensor))


def _deciding_options(step: StepInput) -> list[Any]:
    """Return what of the groups' options decides which parameters and state are fit: flags, and no real numbers."""
    found = []
    for group in step.groups:
        spec = step.spec.of(group)
        found.append((spec, spec.settle_flags(group), {n: value for n, value in group.items() if _is_discrete(value)}))
    return found


def _is_discrete(value: object) -> bool:
    parts = value if type(value) is tuple else (value,)
    return is_constant(value) and not any(isinstance(each, (float, np.floating)) for each in parts)
