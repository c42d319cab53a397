"""What is kept between steps: buckets of kernel engines with their plans, as long as all they were made from holds.

Whatever a user may change counts at the next step, so everything is compared with what is there now: groups, options,
the dicts of state and their entries, and the memory, dtype, sizes and strides of every tensor.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines import cpu, gpu
from surefoot.engines.bucket import PLAIN
from surefoot.engines.cpu.tensors import Versions
from surefoot.engines.looks import can_hold, items_of, look_at, numbers_in, same_objects
from surefoot.state import local

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.step import Work

Signature = tuple[Any, ...]
_DICTS = (dict, defaultdict)


class Watch:
    """Watches the tensors of one bucket, and reads and writes those of its scalars that the host has."""

    def __init__(self, work: "Work") -> None:
        scalars = [scalar.name for scalar in work.optimizer.scalars]
        names = [*scalars, *(slot.name for slot in work.bucket.rule.slots)]
        entries = {name: [state[name] for state in work.states] for name in names}
        self._look = look_at((work.params, *entries.values()), work.states, names, gradients=True)
        of_host = [] if work.on_device else list(chain.from_iterable(entries[name] for name in scalars))
        self._numbers, self._versions = numbers_in(of_host), Versions(of_host)
        self._shape = (len(scalars), len(work.params))

    def renew(self, work: "Work") -> bool:
        """Give the bucket this step's gradients; tell whether all else is as it was."""
        grads = work.grads()  # held while kernels run, whatever other threads do
        if self._look.changed():
            return False
        grads = list(map(local, grads)) if work.params[0].is_complex() else grads
        work.bucket.gradient_addresses, work.bucket.grads = self._look.gradients, grads
        return True

    def read(self) -> np.ndarray:
        """Read the scalars: float64 of shape (scalars, parameters)."""
        values: np.ndarray = self._numbers.read()
        return values.reshape(self._shape)

    def write(self, values: np.ndarray) -> None:
        """Write the scalars."""
        self._numbers.write(values.ravel())
        self._versions.count()


@dataclass(eq=False)
class Kept:
    """The works of a step and what they were made from."""

    signatures: list[Signature] = field(default_factory=list)
    groups: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)
    state: Any = None
    items: Any = None
    found: "list[Work]" = field(default_factory=list)

    @classmethod
    def of(cls, optimizer: "Optimizer", signatures: list[Signature], works: "list[Work]") -> "Kept":
        """Keep works, if their engines can use all of them again."""
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
        return cls(signatures, groups, params, idle, optimizer.state, items_of([optimizer.state]), works)

    def works(self, optimizer: "Optimizer", signatures: list[Signature]) -> "list[Work] | None":
        """Give the works with this step's gradients, or None if anything has changed."""
        holds = (
            self.found
            and self.signatures == signatures
            and _same_groups(self.groups, optimizer.param_groups)
            and same_objects(self.params, _params(optimizer))
            and all(param.grad is None for param in self.idle)
            and self.state is optimizer.state
            and not self.items.changed()
            and all(work.watch.renew(work) for work in self.found)  # type: ignore[union-attr]
        )
        return self.found if holds else None


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
    scalars = (state[scalar.name] for state in work.states for scalar in work.optimizer.scalars)
    return all(map(_as_it_is, work.params, work.grads())) and (work.on_device or can_hold(scalars))


def _as_it_is(param: Tensor, grad: Tensor) -> bool:
    """Whether the memory of a parameter and its gradient holds what they mean."""
    means_other = grad.layout is not torch.strided or grad.is_neg() or grad.is_conj() or grad._is_zerotensor()
    return type(param) in PLAIN and not means_other
