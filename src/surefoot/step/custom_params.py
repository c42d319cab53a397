"""Parameters of custom steps that were found fit for one, and what tells whether they still are."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from surefoot.engines import Bucket, cpu
from surefoot.rule import gradient_rule
from surefoot.state.check import centralized, validated_gradient
from surefoot.state.formats import CORRECTION
from surefoot.step.clipping import measure_gradients
from surefoot.step.inputs import StepInput
from surefoot.step.types import ParamSlice
from surefoot.tensors.guards import make_guard
from surefoot.tensors.memory import PLAIN, has_address, is_always_writable, is_plain, shared_memory
from surefoot.tensors.shards import to_local


class CustomParams:
    """Parameters of custom steps that have gradients, found fit; nothing is changed.

    Attributes:
        slices: the parameters of each group that has some.
        entries: as many lists of their state.
        repeated: parameters that are there twice.
        overlap: whether parameters or their state share memory.
        guards: what tells whether their tensors are as they were; None as long as nothing does.
        moves: how often they have been taken over elsewhere.
    """

    def __init__(self, step: StepInput) -> None:
        self.slices, self._grads = [], []
        for group in custom_groups(step):
            spec = step.spec.of(group)
            found = [(param, grad) for param in group["params"] if (grad := step.gradient(param)) is not None]
            if found:
                self.slices.append(ParamSlice(group, [param for param, _ in found]))
                self._grads.append(
                    [validated_gradient(spec, group, param, grad, step.state.get(param, {})) for param, grad in found]
                )
        self.guards: list[Any] | None = None
        self.moves = 0
        self._measuring: list[Bucket | None] | None = None
        self.take_entries(step)
        met = Counter(param for part in self.slices for param in part.params)
        self.repeated = {param for param, count in met.items() if count > 1}
        self.overlap = self._shares_memory(step)

    def take_entries(self, step: StepInput) -> None:
        """Take the state that there is."""
        self.entries = [[step.state.get(param, {}) for param in part.params] for part in self.slices]

    def _shares_memory(self, step: StepInput) -> bool:
        stored = [param for part in self.slices for param in part.params]
        for part, entries in zip(self.slices, self.entries, strict=True):
            slots = step.spec.of(part.group).slots
            stored += [entry[slot.name] for entry in entries for slot in slots if entry.get(slot.name) is not None]
        return shared_memory([local for tensor in stored if has_address(local := to_local(tensor))]) is not None

    def take_gradients(self) -> list[list[Tensor]]:
        """Return the gradients of this step, and keep none."""
        grads: list[Any] = self._grads or [[param.grad for param in part.params] for part in self.slices]
        self._grads = []
        return grads

    def guard(self, step: StepInput) -> bool:
        """Guard all tensors from now on, when all state is there; return whether memory is what they mean."""
        if self.guards is not None:
            return True
        alike: defaultdict[Any, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        places: list[list[tuple[Any, int]]] = []
        for part, entries in zip(self.slices, self.entries, strict=True):
            places.append([])
            spec = step.spec.of(part.group)
            kept = [*(scalar.name for scalar in spec.scalars), *(slot.name for slot in spec.all_slots), CORRECTION]
            for param, entry in zip(part.params, entries, strict=True):
                names = tuple(name for name in kept if entry.get(name) is not None)
                tensors: list[Any] = [param, param.grad, *(entry[name] for name in names)]
                if type(entry) is not dict or not all(isinstance(t, Tensor) and is_plain(t) for t in tensors):
                    return False
                if not all(map(is_always_writable, (param, *tensors[2:]))):
                    return False  # whether it can be written the mode says
                places[-1].append((names, len(alike[names])))
                alike[names].append((param, entry))
        if any(group.get("capturable") for group in step.groups):
            return False
        self.guards, first = [], {}
        for names, found in alike.items():
            first[names] = sum(len(guard.gradients) for guard in self.guards)
            held = [entry for _, entry in found]
            columns = ([param for param, _ in found], *([entry[name] for entry in held] for name in names))
            self.guards.append(make_guard(columns, held, names, gradients=True))
        self._order = [np.array([first[names] + place for names, place in own]) for own in places]
        self.release_grads()
        return True

    def revalidate(self) -> bool:
        """Return whether all guarded tensors are as they were; gradients may have moved, and are held."""
        return self.guards is not None and not any(guard.changed() for guard in self.guards)

    def readmit(self) -> None:
        """Take the tensors for what they were where they are now, which somebody has found fit."""
        self.moves += 1
        guards = self.guards or []
        addresses = np.concatenate(
            [np.zeros((2, 0), dtype=np.int64), *(guard.places[0][:2] for guard in guards)], axis=1
        )
        for bucket, order in zip(self._measuring or (), self._order, strict=False):
            if bucket is not None and bucket.plan is not None:
                bucket.plan.move(addresses[:, order])
        for guard in guards:
            guard.readmit()

    def release_grads(self) -> None:
        """Hold this step's gradients no longer."""
        for guard in self.guards or ():
            guard.release_grads()

    # Gradients measured

    def measure(self, grads: Sequence[list[Tensor]]) -> list[Tensor]:
        """Return what is measured of the gradients of this step, of each group: float64 of shape (parameters, 2)."""
        if self._measuring is None:
            self._measuring = [_measuring(part.params, own) for part, own in zip(self.slices, grads, strict=True)]
        addresses = self.addresses() if self.guards is not None else [None] * len(grads)
        return list(map(_measured, self._measuring, grads, addresses))

    def addresses(self) -> list[np.ndarray]:
        """Return where the gradients of each group are that the guards hold."""
        every = np.concatenate([guard.gradients for guard in self.guards or ()])
        return [every[order] for order in self._order]

    def measures(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        """Return what measures the gradients of each group by their addresses, none where that takes more than that."""
        plans: list[Any] = [None if bucket is None else bucket.plan for bucket in self._measuring or ()]
        if not all(plan is not None and plan.is_regular and not plan.checked for plan in plans):
            return []
        return [plan.gradient_measure(gradient_rule()) for plan in plans]


def _measuring(params: list[Tensor], grads: list[Tensor]) -> Bucket | None:
    """Return a bucket whose gradients a kernel can measure; None where torch must."""
    kinds = {(param.dtype, grad.dtype, param.is_cpu) for param, grad in zip(params, grads, strict=True)}
    if len(kinds) > 1 or not (params[0].is_cpu and params[0].is_floating_point()):
        return None
    bucket = Bucket(gradient_rule(), params, grads, {})
    return bucket if cpu.supports(bucket) is None else None


def _measured(bucket: Bucket | None, grads: list[Tensor], addresses: np.ndarray | None) -> Tensor:
    """Return what is measured of gradients, by a kernel if it can, at these addresses if known; hold none of them."""
    if bucket is None or not all(type(grad) in PLAIN for grad in grads):
        return measure_gradients(grads)
    bucket.grads = grads
    if bucket.plan is not None:
        bucket.gradient_addresses = addresses
    try:
        return cpu.measure(bucket, gradient_rule())
    finally:
        bucket.grads, bucket.gradient_addresses = [], None


_GRADIENT_OPTIONS = ("maximize", "max_grad_value", "gradient_centralization")


def are_transformed(group: Mapping[str, Any]) -> bool:
    """Return whether options of a group ask for other gradients than parameters hold, beside clipping by norm."""
    return any(map(group.get, _GRADIENT_OPTIONS))


def transformed(group: Mapping[str, Any], grad: Tensor) -> Tensor:
    """Return a gradient as options of its group let an algorithm see it."""
    if group.get("gradient_centralization"):
        grad = centralized(grad)
    if limit := group.get("max_grad_value"):
        grad = grad.clamp(-limit, limit)
    return -grad if group.get("maximize") else grad


def custom_groups(step: StepInput) -> list[dict[str, Any]]:
    """Return the groups of algorithms that have custom steps."""
    return [group for group in step.groups if step.spec.of(group).update is None]
