"""What is measured: variants of optimizers, lists of parameter shapes, and their combinations."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

import torch

from surefoot import optimizers
from surefoot.optimizer import Optimizer
from surefoot.rule import Sparse

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """An optimizer with some of its options.

    Attributes:
        name: how tables call it.
        optimizer: its class, the same name in torch.optim and here.
        options: further arguments of the constructor, the same for both.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_OPTIONS: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {"SGD": ({}, {"momentum": 0.9}), "Adam": ({}, {"amsgrad": True}), "RMSprop": ({"centered": True},)}
)
"""Options with which an algorithm is timed; without any, if it does not stand here."""


def _variants() -> Iterator[Variant]:
    """Yield the variants of every algorithm that is a rule of dense gradients, and that torch.optim has too."""
    for name in optimizers.__all__:
        algorithm: type[Optimizer] = getattr(optimizers, name)
        dense = algorithm.is_rule() and algorithm.sparse is not Sparse.ONLY
        for options in _OPTIONS.get(name, ({},)) if dense and name not in optimizers.NOT_IN_TORCH else ():
            yield Variant("+".join((name, *options)), name, MappingProxyType(options))


VARIANTS: Mapping[str, Variant] = MappingProxyType({variant.name: variant for variant in _variants()})


@dataclass(frozen=True)
class ShapeList:
    """Shapes of the parameters that an optimizer steps.

    Attributes:
        name: how options call it.
        title: how people read it.
        shapes: one for each parameter.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(map(math.prod, self.shapes))


def resnet50() -> Iterator[Shape]:
    """Return the parameter shapes of ResNet-50 (He et al. 2015, table 1; a convolution's stride changes none)."""
    yield from _convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _convolution(channels, width, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(width, 4 * width, 1)
            if block == 0:
                yield from _convolution(channels, 4 * width, 1)
            channels = 4 * width
    yield from _linear(channels, 1000)


def _convolution(inputs: int, outputs: int, size: int) -> Iterator[Shape]:
    """Return the shapes of a square convolution without bias and of the batch norm after it."""
    yield from ((outputs, inputs, size, size), (outputs,), (outputs,))


def _linear(inputs: int, outputs: int) -> Iterator[Shape]:
    yield from ((outputs, inputs), (outputs,))


def gpt2_small() -> Iterator[Shape]:
    """Return the parameter shapes of GPT-2 small (Radford et al. 2019); the output layer is the token embedding."""
    width, norm = 768, ((768,), (768,))
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from norm
        yield from _linear(width, 3 * width)
        yield from _linear(width, width)
        yield from norm
        yield from _linear(width, 4 * width)
        yield from _linear(4 * width, width)
    yield from norm


SHAPE_LISTS: Mapping[str, ShapeList] = MappingProxyType(
    {
        shapes.name: shapes
        for shapes in (
            ShapeList("overhead", "1000 x 1", ((1,),) * 1000),
            ShapeList("tiny", "1000 x 1 k", ((1000,),) * 1000),
            ShapeList("medium", "200 x 100 k", ((100_000,),) * 200),
            ShapeList("large", "8 x 4 M", ((2000, 2000),) * 8),
            ShapeList("mlp1000", "1000-layer MLP", tuple(_linear(64, 64)) * 1000),
            ShapeList("resnet50", "ResNet-50", tuple(resnet50())),
            ShapeList("gpt2-small", "GPT-2 small", tuple(gpt2_small())),
        )
    }
)

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})


@dataclass(frozen=True)
class Case:
    """What contenders compete in.  It shows as `AdamW, 8 x 4 M, float32`."""

    variant: Variant
    shapes: ShapeList
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        """Name the case in a line."""
        return f"{self.variant.name}, {self.shapes.title}, {self.dtype_name}"


def cases(variants: Iterable[str], shape_lists: Iterable[str], dtypes: Iterable[str]) -> list[Case]:
    """Return every combination of some names of `VARIANTS`, `SHAPE_LISTS` and `DTYPES`, each once."""
    names = product(dict.fromkeys(dtypes), dict.fromkeys(shape_lists), dict.fromkeys(variants))
    return [Case(VARIANTS[variant], SHAPE_LISTS[shapes], DTYPES[dtype]) for dtype, shapes, variant in names]
