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
        optimizer: its class, the same name here and, unless it is one of `optimizers.NOT_IN_TORCH`, in torch.optim.
        options: further arguments of the constructor, the same for both.
    """

    name: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_OPTIONS: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {
        "SGD": ({}, {"momentum": 0.9}),
        "Adam": ({}, {"amsgrad": True}),
        "RMSprop": ({"centered": True},),
        "LARS": ({}, {"momentum": 0.9, "weight_decay": 1e-4}),
    }
)
"""Options with which an algorithm is timed; without any, if it does not stand here."""


def _variants() -> Iterator[Variant]:
    """Yield the variants of every algorithm that is a rule of dense gradients."""
    for name in optimizers.__all__:
        algorithm: type[Optimizer] = getattr(optimizers, name)
        dense = algorithm.is_rule() and algorithm.sparse is not Sparse.ONLY
        for options in _OPTIONS.get(name, ({},)) if dense else ():
            yield Variant("+".join((name, *options)), name, MappingProxyType(options))


VARIANTS: Mapping[str, Variant] = MappingProxyType({variant.name: variant for variant in _variants()})
TORCH_VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {name: variant for name, variant in VARIANTS.items() if variant.optimizer not in optimizers.NOT_IN_TORCH}
)
"""Those whose optimizer torch.optim has too."""


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


def gpt2(width: int, blocks: int) -> Iterator[Shape]:
    """Return the parameter shapes of a GPT-2 (Radford et al. 2019, table 2); the output layer is the embedding."""
    norm = ((width,), (width,))
    yield from ((50257, width), (1024, width))
    for _ in range(blocks):
        yield from norm
        yield from _linear(width, 3 * width)
        yield from _linear(width, width)
        yield from norm
        yield from _linear(width, 4 * width)
        yield from _linear(4 * width, width)
    yield from norm


def llama(width: int, blocks: int) -> Iterator[Shape]:
    """Return the parameter shapes of a LLaMA (Touvron et al. 2023, section 2.2 and table 2).

    The inner layers are two thirds of four times as wide, rounded up to a multiple of 256 as in the authors' code; the
    32,000 tokens have an embedding and an output layer of its shape.
    """
    inner = -(-(8 * width // 3) // 256) * 256
    yield (32000, width)
    for _ in range(blocks):
        yield (width,)
        yield from ((width, width),) * 4
        yield (width,)
        yield from ((inner, width), (inner, width), (width, inner))
    yield from ((width,), (32000, width))


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
            ShapeList("gpt2-small", "GPT-2 small", tuple(gpt2(768, 12))),
        )
    }
)

LARGE_SHAPE_LISTS: Mapping[str, ShapeList] = MappingProxyType(
    {
        shapes.name: shapes
        for shapes in (
            ShapeList("gpt2-xl", "GPT-2 XL", tuple(gpt2(1600, 48))),
            ShapeList("llama-7b", "LLaMA 7B", tuple(llama(4096, 32))),
            ShapeList("llama-65b", "LLaMA 65B", tuple(llama(8192, 80))),
        )
    }
)
"""Models whose memory can be told, but which few machines could time."""

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
