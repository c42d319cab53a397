"""Parameters of custom steps that were found fit for one, and what tells whether they still are."""

from collections import Counter, defaultdict
from typing import Any

from torch import Tensor

from surefoot.state.check import validated_gradient
from surefoot.state.formats import CORRECTION
from surefoot.step.inputs import StepInput
from surefoot.step.types import ParamSlice
from surefoot.tensors.guards import make_guard
from surefoot.tensors.memory import has_address, is_plain, shared_memory
from surefoot.tensors.shards import to_local

GRADIENT_OPTIONS = ("maximize", "max_grad_value", "gradient_centralization")
"""Options of a group by which a custom step is handed other gradients than parameters hold."""


class CustomParams:
    """Parameters of custom steps that have gradients, found fit; nothing is changed.

    Attributes:
        slices: the parameters of each group that has some.
        entries: as many lists of their state.
        repeated: parameters that are there twice.
        overlap: whether parameters or their state share memory.
        guards: what tells whether their tensors are as they were; None as long as nothing does.
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
        for part, entries in zip(self.slices, self.entries, strict=True):
            spec = step.spec.of(part.group)
            kept = [*(scalar.name for scalar in spec.scalars), *(slot.name for slot in spec.all_slots), CORRECTION]
            for param, entry in zip(part.params, entries, strict=True):
                names = tuple(name for name in kept if entry.get(name) is not None)
                tensors: list[Any] = [param, param.grad, *(entry[name] for name in names)]
                if type(entry) is not dict or not all(isinstance(t, Tensor) and is_plain(t) for t in tensors):
                    return False
                alike[names].append((param, entry))
        if any(group.get("capturable") for group in step.groups):
            return False
        self.guards = []
        for names, found in alike.items():
            held = [entry for _, entry in found]
            columns = ([param for param, _ in found], *([entry[name] for entry in held] for name in names))
            self.guards.append(make_guard(columns, held, names, gradients=True))
        self.release_grads()
        return True

    def revalidate(self) -> bool:
        """Return whether all guarded tensors are as they were; gradients may have moved."""
        changed = self.guards is None or any(guard.changed() for guard in self.guards)
        self.release_grads()
        return not changed

    def release_grads(self) -> None:
        """Hold this step's gradients no longer."""
        for guard in self.guards or ():
            guard.release_grads()


def custom_groups(step: StepInput) -> list[dict[str, Any]]:
    """Return the groups of algorithms that have custom steps."""
    return [group for group in step.groups if step.spec.of(group).update is None]
