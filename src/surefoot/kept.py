"""What is kept between steps: buckets of kernel engines with their plans, as long as all they were made from holds.

Whatever a user may change counts at the next step, so everything is compared with what is there now: groups, options,
the dicts of state and their entries, and the memory, dtype, sizes and strides of every tensor.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot import device
from surefoot.engines import cpu, gpu
from surefoot.engines.bucket import PLAIN

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.step import Work

Signature = tuple[Any, ...]
_DICTS = (dict, defaultdict)


class Watch:
    """Watches the tensors of one bucket, and reads and writes its scalars."""

    def __init__(self, work: "Work") -> None:
        from surefoot.engines.cpu.tensors import Numbers, Versions, watched  # noqa: PLC0415 (compiled, on first use)

        scalars = [scalar.name for scalar in work.optimizer.scalars]
        names = [*scalars, *(slot.name for slot in work.bucket.rule.slots)]
        entries = {name: [state[name] for state in work.states] for name in names}
        self._look: Any = watched((work.params, *entries.values()), work.states, names, gradients=True)
        tensors = list(chain.from_iterable(entries[name] for name in scalars))
        self._numbers, self._versions = Numbers(tensors), Versions(tensors)
        self._shape = (len(scalars), len(work.params))
        self.sound = self._look is not None

    def renew(self, work: "Work") -> bool:
        """Give the bucket this step's gradients; tell whether all else is as it was."""
        grads = work.grads()  # held while kernels run, whatever other threads do
        if self._look.changed():
            return False
        work.bucket.gradient_addresses, work.bucket.grads = self._look.gradients, grads
        return True

    def read(self) -> np.ndarray:
        """Read the scalars: float64 of shape (scalars, parameters)."""
        return self._numbers.read().reshape(self._shape)

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
        if not works or type(optimizer.state) not in _DICTS or not all(_reusable(work) for work in works):
            return cls()
        for work in works:
            work.watch = device.Watch(work) if work.engine is gpu else Watch(work)
        if not all(work.watch and work.watch.sound for work in works):
            return cls()
        params = list(_params(optimizer))
        idle = [param for param in params if param.grad is None]
        groups = [(group, len(group["params"])) for group in optimizer.param_groups]
        return cls(signatures, groups, params, idle, optimizer.state, _items(optimizer.state, works), works)

    def works(self, optimizer: "Optimizer", signatures: list[Signature]) -> "list[Work] | None":
        """Give the works with this step's gradients, or None if anything has changed."""
        holds = (
            self.found
            and self.signatures == signatures
            and _same_groups(self.groups, optimizer.param_groups)
            and _same(self.params, _params(optimizer))
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


class _Items:
    """Tells whether a dict still has the items it had, where there is no compiler to look faster."""

    def __init__(self, items: dict[Any, Any]) -> None:
        self._items, self._own = items, dict(items)

    def changed(self) -> bool:
        return not (_same(self._own, self._items) and _same(self._own.values(), self._items.values()))


def _items(state: Any, works: "list[Work]") -> Any:
    if not any(work.engine is cpu for work in works):
        return _Items(state)
    from surefoot.engines.cpu.tensors import Items  # noqa: PLC0415

    return Items([state])


def _params(optimizer: "Optimizer") -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _same(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    """Whether two iterables give the same objects."""
    end = object()
    ours, theirs = iter(ours), iter(theirs)
    return all(map(is_, ours, theirs)) and next(ours, end) is end and next(theirs, end) is end


def _reusable(work: "Work") -> bool:
    scalars = [state[scalar.name] for state in work.states for scalar in work.optimizer.scalars]
    if work.engine is gpu:
        return all(map(_as_it_is, work.params, work.grads())) and not any(isinstance(value, int) for value in scalars)
    if work.engine is not cpu:
        return False
    from surefoot.engines.cpu.tensors import Numbers  # noqa: PLC0415 (NumPy and the compiler)

    return (
        all(type(state) is dict for state in work.states)
        and all(map(_plain, work.params, work.grads()))
        and Numbers.can_hold(scalars)
    )


def _plain(param: Tensor, grad: Tensor) -> bool:
    """Whether an engine works on a parameter and its gradient themselves rather than on something made from them."""
    return _as_it_is(param, grad) and not param.is_complex()


def _as_it_is(param: Tensor, grad: Tensor) -> bool:
    """Whether the memory of a parameter and its gradient holds what they mean."""
    means_other = grad.layout is not torch.strided or grad.is_neg() or grad.is_conj() or grad._is_zerotensor()
    return type(param) in PLAIN and not means_other
