"""What is kept between steps: buckets of kernel engines with their plans, as long as all they were made from holds.

Whatever a user may change counts at the next step, so everything is compared with what is there now: groups, options,
the dicts of state and their entries, and the memory, dtype, sizes and strides of every tensor.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from surefoot.engines import cpu, gpu
from surefoot.engines.cpu.tensors import Versions
from surefoot.engines.cpu.threads import needs_threads
from surefoot.engines.looks import can_hold, items_of, look_at, numbers_in, same_objects
from surefoot.rule import Flags
from surefoot.state import flags_of, read_scalars, write_scalars
from surefoot.tensors.gate import admit_rows
from surefoot.tensors.memory import is_plain
from surefoot.tensors.shards import to_local
from surefoot.whole_step import is_clipped

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.step import Work

Signature = tuple[Any, ...]
ENGINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
_DICTS = (dict, defaultdict)
_CONSTANT = (int, float, bool, str, type(None))


def signature(optimizer: "Optimizer", group: Mapping[str, Any]) -> Signature:
    """What of a group decides its buckets, beside its tensors."""
    return (all_flags(optimizer, group), *map(group.get, ENGINE_OPTIONS))


def all_flags(optimizer: "Optimizer", group: Mapping[str, Any]) -> Flags:
    """Settle a group's flags, and those of the step.

    These are: whether telemetry is measured, decided later; whether a GradScaler left the gradients for the step to
    unscale; whether they are clipped by norm.
    """
    scaled = getattr(optimizer, "grad_scale", None) is not None
    step = (("measured", False), ("scaled", scaled), ("clipped", is_clipped(optimizer, group)))
    return (*step, *flags_of(optimizer, group))


class Watch:
    """Watches the tensors of one bucket, and reads and writes those of its scalars that the host has."""

    def __init__(self, work: "Work") -> None:
        scalars, slots = work.optimizer.scalars, [slot.name for slot in work.bucket.rule.slots]
        held = [] if _are_replaced(work) else [scalar.name for scalar in scalars]
        names = [*held, *slots]
        entries = {name: [state[name] for state in work.states] for name in names}
        columns, busy = (work.params, *entries.values()), work.engine is cpu and needs_threads(work.params)
        self._look = look_at(columns, work.states, names, gradients=not work.sparse, threads=busy)
        self._kinds = list(map(_kind, work.grads())) if work.sparse else []
        of_host = [] if work.on_device else list(chain.from_iterable(entries[name] for name in held))
        self._numbers, self._versions = numbers_in(of_host), Versions(of_host)
        self._replaced = None if held or not scalars else (work.states, scalars)
        self._shape = (len(scalars), len(work.params))

    def renew(self, work: "Work") -> bool:
        """Give the bucket this step's gradients; tell whether all else is as it was."""
        if self._replaced and not all(scalar.name in state for state, scalar in product(*self._replaced)):
            return False
        if work.sparse:
            return not self._look.changed() and self._renew_rows(work)
        plan = work.bucket.plan
        grads = work.grads() if plan is None or plan.irregular or plan.checked else []  # else their addresses do
        if self._look.changed():
            return False
        work.bucket.gradient_addresses, work.bucket.grads = self._look.gradients, list(map(to_local, grads))
        return True

    def _renew_rows(self, work: "Work") -> bool:
        grads = work.grads()
        same = list(map(_kind, grads)) == self._kinds
        if same:
            work.bucket.grads = list(map(admit_rows, grads))
        return same

    def let_go(self) -> None:
        """Hold this step's gradients no longer."""
        self._look.let_go()

    def read(self) -> np.ndarray:
        """Read the scalars: float64 of shape (scalars, parameters)."""
        if not self._shape[0]:
            return np.zeros(self._shape)
        if self._replaced:
            return read_scalars(*self._replaced)
        values: np.ndarray = self._numbers.read()
        return values.reshape(self._shape)

    def write(self, values: np.ndarray) -> None:
        """Write the scalars: of shape (scalars, parameters), or (scalars, 1) where parameters share them."""
        if self._replaced:
            write_scalars(*self._replaced, values)
        if self._replaced or not self._shape[0]:
            return
        self._numbers.write(values.ravel() if values.shape == self._shape else np.repeat(values, self._shape[1]))
        self._versions.count()


def _kind(grad: Any) -> tuple[Any, ...]:
    """Give what must stay of a sparse gradient; all else of it may change."""
    if not isinstance(grad, Tensor) or not grad.is_sparse:
        return ()
    return type(grad), grad.dtype, grad.device, grad.shape, grad.sparse_dim()


class Options:
    """The options of groups, and whether they decide the same buckets as before."""

    def __init__(self, optimizer: "Optimizer") -> None:
        self._signatures = [signature(optimizer, group) for group in optimizer.param_groups]
        self._note(optimizer)

    def _note(self, optimizer: "Optimizer") -> None:
        self._seen = _options(optimizer)
        lists = [group["params"] for group in optimizer.param_groups]
        self._constant = all(_is_constant(each) or any(each is params for params in lists) for each in self._seen)

    def same(self, optimizer: "Optimizer") -> bool:
        """Whether nothing can have changed: the same objects, none of which can change its value."""
        return self._constant and same_objects(self._seen, _options(optimizer))

    def decide_the_same(self, optimizer: "Optimizer") -> bool:
        """Whether the buckets are the same; the options of now are the ones to compare with from then on."""
        self._note(optimizer)
        return self._signatures == [signature(optimizer, group) for group in optimizer.param_groups]


def _options(optimizer: "Optimizer") -> list[object]:
    """Give the names and values of all options, and what else of an optimizer signatures depend on."""
    options: list[object] = [optimizer.whole_step.max_grad_norm, getattr(optimizer, "grad_scale", None) is None]
    for group in optimizer.param_groups:
        options += group
        options += group.values()
    return options


def _is_constant(value: object) -> bool:
    return type(value) in _CONSTANT or (type(value) is tuple and all(map(_is_constant, value)))


@dataclass(eq=False)
class Kept:
    """The works of a step and what they were made from."""

    options: Options | None = None
    groups: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)
    state: Any = None
    items: Any = None
    found: "list[Work]" = field(default_factory=list)

    @classmethod
    def of(cls, optimizer: "Optimizer", options: Options, works: "list[Work]") -> "Kept":
        """Keep works, made from these options, if their engines can use all of them again."""
        if not works or type(optimizer.state) not in _DICTS:
            return cls()
        for work in works:
            if work.engine is gpu and not work.on_device:
                _bring_home(work)
        if not all(_reusable(work) for work in works):
            return cls()
        for work in works:
            work.watch = Watch(work)
        params = list(_params(optimizer))
        idle = [param for param in params if param.grad is None]
        groups = [(group, len(group["params"])) for group in optimizer.param_groups]
        return cls(options, groups, params, idle, optimizer.state, items_of([optimizer.state]), works)

    def works(self, optimizer: "Optimizer") -> "list[Work] | None":
        """Give the works with this step's gradients, or None if anything has changed."""
        holds = (
            self.found
            and self._same_options(optimizer)
            and _same_groups(self.groups, optimizer.param_groups)
            and same_objects(self.params, _params(optimizer))
            and all(param.grad is None for param in self.idle)
            and self.state is optimizer.state
            and not self.items.changed()
            and all(work.watch.renew(work) for work in self.found)  # type: ignore[union-attr]
        )
        return self.found if holds else None

    def _same_options(self, optimizer: "Optimizer") -> bool:
        if self.options is None or self.options.same(optimizer):
            return self.options is not None
        for work in self.found:
            work.options = None
        return self.options.decide_the_same(optimizer)


def _same_groups(ours: list[tuple[dict[str, Any], int]], theirs: list[dict[str, Any]]) -> bool:
    """Whether these are the groups, with as many parameters in each."""
    same = len(ours) == len(theirs)
    return same and all(
        own is group and count == len(group["params"]) for (own, count), group in zip(ours, theirs, strict=True)
    )


def _params(optimizer: "Optimizer") -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _bring_home(work: "Work") -> None:
    """Let the host have the scalars that it reads at every step, if somebody has put them on a device."""
    for state, scalar in product(work.states, work.optimizer.scalars):
        if isinstance(value := state[scalar.name], Tensor) and not value.is_cpu:
            state[scalar.name] = value.cpu()


def _reusable(work: "Work") -> bool:
    if work.engine not in (cpu, gpu) or not all(type(state) is dict for state in work.states):
        return False
    if work.params[0].is_complex() and not work.on_device:
        return False  # their real views, if kept, would keep them from being swapped
    if work.sparse and (work.engine is gpu or work.group.get("ema")):
        return False  # averages are none of a sparse update's slots
    stored = work.params if work.sparse else (*work.params, *work.grads())
    return all(map(is_plain, stored)) and (work.on_device or _are_replaced(work) or can_hold(_scalars(work)))


def _scalars(work: "Work") -> Iterable[Any]:
    return (state[scalar.name] for state in work.states for scalar in work.optimizer.scalars)


def _are_replaced(work: "Work") -> bool:
    """Whether scalars are Python's numbers, so that every step puts others into the state."""
    return not work.on_device and all(isinstance(value, (int, float)) for value in _scalars(work))
