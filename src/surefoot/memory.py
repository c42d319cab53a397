"""What training takes of memory: weights, gradients, and what an optimizer keeps for them.

The library itself makes the state, for parameters on the meta device, which have shapes and no memory; what is made is
added up, so that nothing here says how large anything is.  Nothing here prints.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.checkpoint import Checkpoint
from surefoot.checkpoint.dtypes import BY_NAME
from surefoot.checkpoint.inspection import ParameterInfo, parameters_of
from surefoot.optimizer import Optimizer
from surefoot.rule import EMA, FLOAT8
from surefoot.state.formats import CORRECTION, param_format, slot_format
from surefoot.state.make import ensure_state
from surefoot.storage import format_of

KINDS = ("weights", "gradients", "state", "scales", "corrections", "averages")
"""What memory is taken for, in the order of tables."""

Weights = Mapping[str, Tensor]
"""Parameters and buffers by name, on the meta device; those that are trained require gradients."""


@dataclass(frozen=True)
class Storage:
    """A choice of formats.  It shows as `bfloat16 (24 bits), state float8`.

    Attributes:
        dtype: that of the weights; as they are if None.
        options: the optimizer's options `state_dtype`, `rounding` and `master_weight_bits`, as far as they are given.
    """

    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        """Name the choice in a few words."""
        weights = "weights as they are" if self.dtype is None else _name(self.dtype)
        bits, state = self.options.get("master_weight_bits"), self.options.get("state_dtype")
        notes = [f"{bits} bits"] * bool(bits) + ["stochastic"] * (self.options.get("rounding") == "stochastic")
        return weights + f" ({', '.join(notes)})" * bool(notes) + f", state {_name(state)}" * (state is not None)


def _storage(dtype: torch.dtype, **options: Any) -> Storage:
    return Storage(dtype, MappingProxyType(options))


COMMON = (
    _storage(torch.float32),
    _storage(torch.bfloat16, master_weight_bits=32, state_dtype=torch.float32),
    _storage(torch.float32, state_dtype=FLOAT8),
    _storage(torch.bfloat16),
    _storage(torch.bfloat16, rounding="stochastic"),
    _storage(torch.bfloat16, master_weight_bits=24, state_dtype=FLOAT8),
    _storage(torch.bfloat16, rounding="stochastic", state_dtype=FLOAT8),
)
"""The choices that are usual, for AdamW the largest first."""


def common_storages(algorithm: type[Optimizer]) -> list[Storage]:
    """Return the usual choices of an algorithm: those of `COMMON` whose options it has."""
    spec = algorithm.spec
    in_8_bits = any(slot.float8 for slot in spec.slots)
    usual = [storage for storage in COMMON if in_8_bits or storage.options.get("state_dtype") != FLOAT8]
    return [storage for storage in usual if storage.options.keys() <= spec.constructor.keys()]


@dataclass(frozen=True)
class Item:
    """Tensors of one meaning and one format.

    Attributes:
        kind: one of `KINDS`.
        name: the key in the state of what is kept there.
        kept: the format's name.
        nbytes: bytes of all of them.
    """

    kind: str
    name: str
    kept: str
    nbytes: int


@dataclass(frozen=True)
class ParameterMemory:
    """What a parameter, or a buffer, takes.

    Attributes:
        name: its name.
        shape: its shape.
        optimizer: the name of that which trains it, None if none does.
        items: what there is.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str | None
    items: tuple[Item, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return sum(item.nbytes for item in self.items)

    def of_kind(self, kind: str) -> int:
        """Return the bytes of one of `KINDS`."""
        return sum(item.nbytes for item in self.items if item.kind == kind)


@dataclass(frozen=True)
class Memory:
    """What a training takes, beside what the model computes on its way.

    Attributes:
        parameters: what each parameter and buffer takes.
    """

    parameters: tuple[ParameterMemory, ...]

    @property
    def elements(self) -> int:
        """Elements of all parameters and buffers."""
        return sum(one.elements for one in self.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return sum(one.nbytes for one in self.parameters)

    @cached_property
    def items(self) -> list[Item]:
        """Items of all parameters, those of one meaning and one format together; the largest of a kind first."""
        found: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        for item in (item for one in self.parameters for item in one.items):
            found[item.kind, item.name, item.kept] += item.nbytes
        items = [Item(*key, nbytes) for key, nbytes in found.items()]
        return sorted(items, key=lambda item: (KINDS.index(item.kind), -item.nbytes))

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of each of `KINDS` that there is."""
        found = {kind: sum(item.nbytes for item in self.items if item.kind == kind) for kind in KINDS}
        return {kind: nbytes for kind, nbytes in found.items() if nbytes}

    def by_optimizer(self) -> dict[str | None, int]:
        """Return how many parameters each optimizer trains, and under None how many none does."""
        found: defaultdict[str | None, int] = defaultdict(int)
        for one in self.parameters:
            found[one.optimizer] += 1
        return dict(found)


# Where weights come from


def weights_of(model: nn.Module) -> Weights:
    """Return the parameters and buffers of a model."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: _unallocated(value.shape, value.dtype, trained=value.requires_grad) for name, value in named}


def weights_of_shapes(shapes: Iterable[tuple[int, ...]]) -> Weights:
    """Return parameters of some shapes, called by their numbers."""
    return {str(number): _unallocated(shape, torch.float32, trained=True) for number, shape in enumerate(shapes)}


def weights_of_checkpoint(checkpoint: Checkpoint) -> Weights:
    """Return the parameters and buffers of a checkpoint's models, or of its optimizers if no model was saved.

    Raises:
        ValueError: there are none, or no more is known than their number.
    """
    parts = checkpoint.manifest["parts"]
    models, optimizers = ([label for label in parts if parts[label]["kind"] == kind] for kind in ("model", "optimizer"))
    found: dict[str, Tensor] = {}
    for label in models or optimizers:
        trained = set(parts[label]["parameters"]) if models else set()
        prefix = f"{label}." if len(models or optimizers) > 1 else ""
        for one in parameters_of(checkpoint, label):
            if one.tied_to is None:
                found[prefix + one.name] = _saved(checkpoint, one, trained)
    if not found:
        raise ValueError(f"{checkpoint.path} has neither a model nor an optimizer")
    return found


def _saved(checkpoint: Checkpoint, one: ParameterInfo, trained: set[str]) -> Tensor:
    """Return a saved tensor without its values; where no parameters are named, every one may be a parameter."""
    if one.shape is None or one.dtype is None:
        raise ValueError(f"{checkpoint.path} does not say the shape of parameter {one.name}; save the model with it")
    dtype = BY_NAME[one.dtype]
    can_be = dtype.is_floating_point or dtype.is_complex
    return _unallocated(one.shape, dtype, trained=can_be and (not trained or one.name in trained))


def _unallocated(shape: tuple[int, ...], dtype: torch.dtype, *, trained: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(trained)


def converted(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Return weights with all that are floating point numbers in a dtype."""
    if dtype is None:
        return weights
    return {
        name: _unallocated(one.shape, dtype if one.is_floating_point() else one.dtype, trained=one.requires_grad)
        for name, one in weights.items()
    }


# What they take


def measure(weights: Weights, *optimizers: tuple[type[Optimizer], Mapping[str, Any]]) -> Memory:
    """Return what training takes.

    Args:
        weights: parameters and buffers.
        optimizers: classes, each with its options; a parameter is trained by the first that takes it.

    Raises:
        ValueError: nothing is trained, an optimizer refuses its options or does not declare its state, or none takes
            some parameter.
        TypeError: an optimizer has no such option.
    """
    # Tensors of one shape and dtype take the same, and a model has few of these.
    kinds = {_kind(one): one for one in weights.values()}
    taken: dict[Any, tuple[str | None, tuple[Item, ...]]] = {}
    taken |= {kind: (None, (_weight(one),)) for kind, one in kinds.items() if not one.requires_grad}
    if len(taken) == len(kinds):
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    refusal = None
    for algorithm, options in optimizers:
        optimizer = algorithm([{"params": []}], **options)
        if not optimizer.spec.is_declared:
            raise ValueError(
                f"{optimizer.spec.name} keeps state that grows as it steps, so that it cannot be told before"
            )
        for kind in [kind for kind in kinds if kind not in taken]:
            try:
                optimizer.check_params([kinds[kind]], optimizer.param_groups[0])
            except ValueError as error:
                refusal = error
            else:
                taken[kind] = optimizer.spec.name, tuple(_trained(optimizer, kinds[kind]))
    if refusal is not None and len(taken) < len(kinds):
        raise refusal
    return Memory(tuple(ParameterMemory(name, tuple(w.shape), *taken[_kind(w)]) for name, w in weights.items()))


def _kind(one: Tensor) -> tuple[Any, ...]:
    return (tuple(one.shape), one.dtype, one.requires_grad)


def _weight(one: Tensor) -> Item:
    return Item("weights", "weights", format_of(one.dtype).name, one.nbytes)


def _trained(optimizer: Optimizer, param: Tensor) -> Iterator[Item]:
    """Yield what a parameter that is trained takes."""
    yield _weight(param)
    yield Item("gradients", "gradients", format_of(param.dtype).name, param.nbytes)
    spec, group = optimizer.spec, optimizer.param_groups[0]
    flags = dict(spec.settle_flags(group))
    slots = spec.active_slots(flags)
    formats = {slot.name: slot_format(slot, group, param, None) for slot in slots}
    kept = (param_format(group, param, {}), *formats.values())
    scalars = spec.active_scalars({**flags, "rounded": any(one.stochastic for one in kept)})
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    ensure_state(scalars, group, param, state, slots)
    kinds = dict.fromkeys((*formats, *(scalar.name for scalar in scalars)), "state")
    kinds |= {EMA.name: "averages", CORRECTION: "corrections"}
    for name, value in state[param].items():
        if isinstance(value, Tensor):
            found = formats[name] if name in formats else format_of(value.dtype)
            yield Item(kinds.get(name, "scales"), name, found.name, value.nbytes)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
