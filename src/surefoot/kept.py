"""What is kept between steps: buckets of kernel engines with their plans, as long as all they were made from holds.

Whatever a user may change counts at the next step, so everything is compared with what is there now: groups, options,
the dicts of state and their entries, and the memory, dtype, sizes and strides of every tensor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot import device
from surefoot.engines import cpu, gpu
from surefoot.engines.bucket import addresses

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.step import Work

Signature = tuple[Any, ...]


class Watch:
    """Watches the tensors of one bucket, and reads and writes its scalars."""

    def __init__(self, work: "Work") -> None:
        from surefoot.engines.cpu.tensors import Metadata, Numbers, Watched  # noqa: PLC0415 (compiled, on first use)

        scalars = [scalar.name for scalar in work.optimizer.scalars]
        names = [*scalars, *(slot.name for slot in work.bucket.rule.slots)]
        self._entries = [(itemgetter(name), [state[name] for state in work.states]) for name in names]
        numbers = list(chain.from_iterable(tensors for _, tensors in self._entries[: len(scalars)]))
        self._numbers = Numbers(numbers)
        self._shape = (len(scalars), len(work.params))
        # Parameters are looked at from outside: a reference held here would keep them from being swapped.
        self._params, self._pointers = Metadata(work.params), addresses(work.params)
        self._tensors = Watched(list(chain.from_iterable(tensors for _, tensors in self._entries)))
        self._grads = Metadata(work.grads())
        self._scalar_tensors = numbers

    def renew(self, work: "Work") -> bool:
        """Give the bucket this step's gradients; tell whether all else is as it was."""
        grads = work.grads()
        if not self._grads.same(grads) or not self._params.same(work.params) or self._tensors.changed():
            return False
        if not np.array_equal(self._pointers, addresses(work.params)):
            return False
        try:
            if not all(_same(map(entry, work.states), tensors) for entry, tensors in self._entries):
                return False
        except KeyError:
            return False
        work.bucket.grads = grads
        return True

    def read(self) -> np.ndarray:
        """Read the scalars: float64 of shape (scalars, parameters)."""
        return self._numbers.read().reshape(self._shape)

    def write(self, values: np.ndarray) -> None:
        """Write the scalars."""
        self._numbers.write(values.ravel())
        torch.autograd.graph.increment_version(self._scalar_tensors)


@dataclass(eq=False)
class Kept:
    """The works of a step and what they were made from."""

    signatures: list[Signature] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)
    state: Mapping[Any, Any] = field(default_factory=dict)
    found: "list[Work]" = field(default_factory=list)

    @classmethod
    def of(cls, optimizer: "Optimizer", signatures: list[Signature], works: "list[Work]") -> "Kept":
        """Keep works, if their engines can use all of them again."""
        if not works or not all(_reusable(work) for work in works):
            return cls()
        for work in works:
            work.watch = device.Watch(work) if work.engine is gpu else Watch(work)
        params = list(_params(optimizer))
        idle = [param for param in params if param.grad is None]
        return cls(signatures, params, idle, dict(optimizer.state), works)

    def works(self, optimizer: "Optimizer", signatures: list[Signature]) -> "list[Work] | None":
        """Give the works with this step's gradients, or None if anything has changed."""
        holds = (
            self.found
            and self.signatures == signatures
            and _same(self.params, _params(optimizer))
            and all(param.grad is None for param in self.idle)
            and _same(self.state, optimizer.state)
            and _same(self.state.values(), optimizer.state.values())
            and all(work.watch.renew(work) for work in self.found)  # type: ignore[union-attr]
        )
        return self.found if holds else None


def _params(optimizer: "Optimizer") -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _same(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    """Whether two iterables give the same objects."""
    end = object()
    ours, theirs = iter(ours), iter(theirs)
    return all(map(is_, ours, theirs)) and next(ours, end) is end and next(theirs, end) is end


def _reusable(work: "Work") -> bool:
    from surefoot.engines.cpu.tensors import Numbers  # noqa: PLC0415

    scalars = [state[scalar.name] for state in work.states for scalar in work.optimizer.scalars]
    if work.engine is gpu:
        return all(map(_as_it_is, work.params, work.grads())) and not any(isinstance(value, int) for value in scalars)
    return work.engine is cpu and all(map(_plain, work.params, work.grads())) and Numbers.can_hold(scalars)


def _plain(param: Tensor, grad: Tensor) -> bool:
    """Whether an engine works on a parameter and its gradient themselves rather than on something made from them."""
    return _as_it_is(param, grad) and not param.is_complex()


def _as_it_is(param: Tensor, grad: Tensor) -> bool:
    """Whether the memory of a parameter and its gradient holds what they mean."""
    means_other = grad.layout is not torch.strided or grad.is_neg() or grad.is_conj() or grad._is_zerotensor()
    return type(param) in cpu.PLAIN and not means_other
