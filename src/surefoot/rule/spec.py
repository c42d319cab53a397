"""AlgorithmSpec: what an algorithm declares, made once for each class; what lies below the optimizer is handed it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from surefoot.rule.declare import EMA, GroupScalar, Scalar, Slot, Sparse
from surefoot.tensors.modes import has_no_values

Flags = tuple[tuple[str, bool], ...]
COMMON_FLAGS = ("maximize", "max_grad_value", "ema")
DIRECTED = ("cautious", "cautious_weight_decay")
"""Flags of rules that tell where the direction of their step is; see `optimizers.common.directed`."""
STORAGE_OPTIONS = ("state_dtype", "rounding", "master_weight_bits", "rounding_seed")
ALGORITHM = "algorithm"
"""The key under which a group of a combination names its algorithm."""
SAMPLED = "sampled"
"""The flag of algorithms that have slots of some elements only."""
ENGINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True, eq=False)
class AlgorithmSpec:
    """What an algorithm is, apart from any optimizer that runs it.

    Attributes:
        name: its name, for messages.
        slots: tensors kept for each parameter, in the order in which `update` takes and returns them.
        scalars: numbers kept for each parameter.
        group_scalars: numbers that parameters share, kept in the param groups.
        check_groups: raises where groups cannot be stepped together.
        flags: hyperparameters whose truth shapes the computation.
        flags_of: gives flags that a parameter of a group has beside the group's, by its shape for instance; None if
            there are none.
        update: the rule; None where the algorithm has a custom step.
        rows_suffice: whether an element without gradient stays as it is, by settled flags.
        sparse: what becomes of sparse gradients.
        instead_of_sparse: what the refusal of a sparse gradient recommends.
        also_called: what other implementations call options and state, with our names for each.
        complex_params: whether complex parameters are taken.
        whole_tensors: whether a step needs to know more of a tensor than a shard of it.
        has_modes: whether groups have a `train_mode`, without which no step is made.
        eval_slots: tensors kept for each parameter in eval mode only.
        derived_state: keys of state that a state dict tells but that is not kept.
        step_options: the options of `StepOptions` that it takes.
        refused_options: why some of them are not taken.
        own_options: hyperparameters of its own that are called like an option of `StepOptions` that it does not take.
        constructor: the constructor's arguments that have a default, with it.
        later_options: those of them that go by keyword only, which state dicts, as those of torch, need not know.
        algorithms: of a combination of several algorithms: each by its name, which groups have under `algorithm`.
    """

    name: str
    slots: tuple[Slot, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    group_scalars: tuple[GroupScalar, ...] = ()
    check_groups: Callable[[Sequence[Mapping[str, Any]]], None] = lambda _: None
    flags: tuple[str, ...] = ()
    flags_of: Callable[[Mapping[str, Any], Tensor], Mapping[str, bool]] | None = None
    update: Callable[..., Any] | None = None
    rows_suffice: Callable[[Mapping[str, bool]], bool] = lambda _: True
    sparse: Sparse = Sparse.REFUSED
    instead_of_sparse: str = ""
    also_called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    complex_params: bool = True
    whole_tensors: bool = False
    has_modes: bool = False
    eval_slots: tuple[Slot, ...] = ()
    derived_state: tuple[str, ...] = ()
    step_options: frozenset[str] = frozenset()
    refused_options: Mapping[str, str] = field(default_factory=dict)
    own_options: frozenset[str] = frozenset()
    constructor: Mapping[str, Any] = field(default_factory=dict)
    later_options: frozenset[str] = frozenset()
    algorithms: Mapping[str, "AlgorithmSpec"] = field(default_factory=dict)

    def of(self, group: Mapping[str, Any]) -> "AlgorithmSpec":
        """Return the algorithm of a group: itself, or of a combination the one that the group names.

        Raises:
            ValueError: the group names none of them.
        """
        if not self.algorithms:
            return self
        name = group.get(ALGORITHM)
        found = self.algorithms.get(name) if isinstance(name, str) else None
        if found is None:
            names = ", ".join(map(repr, self.algorithms))
            raise ValueError(f"a param group of {self.name} needs an `{ALGORITHM}`, one of {names}, but has {name!r}")
        return found

    @property
    def is_declared(self) -> bool:
        """Return whether the class says what state it keeps, so that loading can verify it."""
        return self.update is not None or bool(self.slots)

    @property
    def all_slots(self) -> tuple[Slot, ...]:
        """Slots that a parameter may have: the algorithm's, and the average."""
        return (*self.slots, EMA)

    @property
    def known_slots(self) -> tuple[Slot, ...]:
        """Slots that the state of a parameter may hold, those of eval mode too."""
        return (*self.all_slots, *self.eval_slots)

    def active_slots(self, flags: Mapping[str, bool]) -> tuple[Slot, ...]:
        """Return the slots that exist under settled flags."""
        return tuple(slot for slot in self.all_slots if slot.when is None or flags[slot.when])

    def active_scalars(self, flags: Mapping[str, bool]) -> tuple[Scalar, ...]:
        """Return the scalars that exist under settled flags."""
        return tuple(scalar for scalar in self.scalars if scalar.when is None or flags.get(scalar.when))

    def settle_flags(self, group: Mapping[str, Any]) -> Flags:
        """Return the flags of a group: the truth of each hyperparameter that shapes the computation."""
        found = tuple((name, _truth(group, group.get(name, False))) for name in (*COMMON_FLAGS, *self.flags))
        sampled = [slot.is_sampled(group) for slot in self.slots if slot.sampled]
        return (*found, (SAMPLED, any(sampled))) if sampled else found

    def has_flags_in_tensors(self, group: Mapping[str, Any]) -> bool:
        """Return whether flags of a group may change while its options stay the same objects."""
        return any(isinstance(group.get(name), Tensor) for name in (*COMMON_FLAGS, *self.flags))


def _truth(group: Mapping[str, Any], value: Any) -> bool:
    """Return whether a flag is on; a tensor that cannot be read, or only by waiting for a device, counts as on."""
    unread = isinstance(value, Tensor) and (group.get("capturable") or not value.is_cpu or has_no_values(value))
    return bool(unread or value)


_catalogs: list[Callable[[], Iterable[AlgorithmSpec]]] = []


def add_catalog(algorithms: Callable[[], Iterable[AlgorithmSpec]]) -> None:
    """Let algorithms be known to `known_algorithms`, which calls this when it is first needed."""
    _catalogs.append(algorithms)


def known_algorithms() -> list[AlgorithmSpec]:
    """Return the algorithms of this library, to tell state dicts of one from those of another."""
    return [spec for catalog in _catalogs for spec in catalog()]
