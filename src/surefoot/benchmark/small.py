"""Small models: what a step costs where nearly all of it is overhead, after a real forward and backward pass.

A step in a loop of steps finds processor caches, and Python's own, as it has left them.  Here each step comes after a
pass through the model, as in training.  Only the call of `step` is timed; contenders take turns on copies of one model.
"""

import gc
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear, mse_loss

from surefoot import optimizers
from surefoot.benchmark.cases import TORCH_VARIANTS, VARIANTS, Variant
from surefoot.benchmark.contenders import FOR_LOOP, FUSED, OURS, implementations_of
from surefoot.benchmark.results import Quartiles, best_of_torch, speedup
from surefoot.errors import InternalError

WIDTH, BATCH, RANK = 64, 16, 4
MATRIX = 2
OF_ROWS = ("SGD", "Adagrad", "SparseAdam")
"""Variants that step rows of sparse gradients."""
_WARM_UP = 5
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SmallModel:
    """A model to step.

    Attributes:
        name: how options call it.
        title: how people read it.
        inputs: width of its inputs.
        make: makes it; it gives one number for each input.
        rows: of how many rows, drawn anew each time, it looks up how many; None where inputs are numbers.
    """

    name: str
    title: str
    inputs: int
    make: Callable[[], nn.Module]
    rows: tuple[int, int] | None = None


class Tables(nn.Module):
    """Embeddings with sparse gradients, of which each looks up the same rows."""

    def __init__(self, tables: int, rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, WIDTH, sparse=True) for _ in range(tables))

    def forward(self, index: Tensor) -> Tensor:
        """Return one number for each index."""
        return torch.stack([table(index) for table in self.tables]).sum((0, 2)).unsqueeze(1)


class LowRank(nn.Module):
    """A frozen layer with a trained update of low rank: `inputs` and `outputs`, the two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5, requires_grad=False)
        self.inputs = Parameter(torch.randn(RANK, WIDTH) / WIDTH**0.5)
        self.outputs = Parameter(torch.randn(WIDTH, RANK) / RANK**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for rows of `x`."""
        return linear(x, self.frozen) + linear(linear(x, self.inputs), self.outputs)


class Dot(nn.Module):
    """A product with one vector."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each row of `x`."""
        return (x @ self.weight).unsqueeze(1)


def _mlp(layers: int) -> nn.Module:
    """Make a perceptron; each layer has two tensors."""
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 1))


def _lora(layers: int) -> nn.Module:
    adapted = [module for _ in range(layers) for module in (LowRank(), nn.Tanh())]
    head = nn.Linear(WIDTH, 1).requires_grad_(requires_grad=False)
    return nn.Sequential(*adapted, head)


SMALL_MODELS: Mapping[str, SmallModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            SmallModel("one", "1 tensor of 10", 10, lambda: Dot(10)),
            SmallModel("mlp4", "MLP, 4 tensors", WIDTH, lambda: _mlp(2)),
            SmallModel("mlp6", "MLP, 6 tensors", WIDTH, lambda: _mlp(3)),
            SmallModel("mlp16", "MLP, 16 tensors", WIDTH, lambda: _mlp(8)),
            SmallModel("lora64", "LoRA, 64 tensors", WIDTH, lambda: _lora(32)),
            SmallModel("rows32", "32 of 1 k rows", WIDTH, lambda: Tables(1, 1000), (1000, 32)),
            SmallModel("rows32x4", "32 of 1 k rows, 4 tables", WIDTH, lambda: Tables(4, 1000), (1000, 32)),
            SmallModel("rows4k", "4 k of 100 k rows", WIDTH, lambda: Tables(1, 100_000), (100_000, 4000)),
            SmallModel("rows4kx4", "4 k of 100 k rows, 4 tables", WIDTH, lambda: Tables(4, 100_000), (100_000, 4000)),
        )
    }
)

_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"LBFGS": {"lr": 1e-2, "max_iter": 4, "history_size": 10, "tolerance_grad": 0, "tolerance_change": 0}}
)
SMALL_VARIANTS: Mapping[str, Variant] = MappingProxyType(
    dict(TORCH_VARIANTS)
    | {
        name: Variant(name, name, _OPTIONS.get(name, {}))
        for name in optimizers.__all__
        if name not in {variant.optimizer for variant in VARIANTS.values()} | optimizers.NOT_IN_TORCH
    }
)
"""Every optimizer that torch.optim has too, those that are no dense rule included."""


@dataclass(frozen=True, eq=False)
class SmallMeasurement:
    """Times of an optimizer's steps on a small model.

    Attributes:
        variant: the optimizer.
        model: the model.
        seconds: for each contender the time of its step in each round.
        calls: for each contender the calls of Python functions in a step.
    """

    variant: Variant
    model: SmallModel
    seconds: Mapping[str, np.ndarray]
    calls: Mapping[str, int]

    @property
    def best_of_torch(self) -> str | None:
        """Torch's implementation with the least median."""
        return best_of_torch(self.seconds)

    def microseconds(self, contender: str = OURS) -> Quartiles:
        """Return the time of a contender's step."""
        return Quartiles.of(1e6 * self.seconds[contender])

    def speedup(self, contender: str = OURS) -> Quartiles:
        """Return the time of torch's best implementation over the contender's, round by round."""
        return speedup(self.seconds, contender)


class _Training:
    """A copy of a model, and the optimizer that steps it.  Evaluations by a step, through its closure, do not count."""

    def __init__(self, variant: Variant, model: nn.Module, make: Callable[[list[Parameter]], Any]) -> None:
        self.model, self.variant = model, variant
        self.params = trained(variant, model)
        self.optimizer: Any = make(self.params)
        self._evaluating = 0.0

    def pass_through(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Go forward and backward; gradients are new tensors each time."""
        self.model.zero_grad()
        loss = mse_loss(self.model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        if self.variant.optimizer == "SparseAdam":
            for param in self.params:
                if param.grad is not None and not param.grad.is_sparse:
                    param.grad = param.grad.to_sparse(1)
        return loss

    def take_over(self, other: "_Training") -> None:
        """Go on from another one's parameters: training makes what rounding has made of them ever larger."""
        with torch.no_grad():
            for own, param in zip(self.params, other.params, strict=True):
                own.copy_(param)

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """Take a step and return its seconds."""
        arguments = self._prepared(batch)
        start = perf_counter()
        self.optimizer.step(*arguments)
        return perf_counter() - start - self._evaluating

    def calls(self, batch: tuple[Tensor, Tensor]) -> int:
        """Take a step and return how many Python functions it called."""
        arguments, count = self._prepared(batch), 0

        def note(_frame: object, event: str, _argument: object) -> None:
            nonlocal count
            count += event == "call"

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            self.optimizer.step(*arguments)
        finally:
            sys.setprofile(before)
        return count

    def _prepared(self, batch: tuple[Tensor, Tensor]) -> tuple[Callable[[], Tensor], ...]:
        """Make gradients; return the arguments of the step: a closure, where it needs one."""
        self._evaluating = 0.0
        if self.variant.optimizer != "LBFGS":
            self.pass_through(batch)
            return ()

        def closure() -> Tensor:
            start, profile = perf_counter(), sys.getprofile()
            sys.setprofile(None)
            loss = self.pass_through(batch)
            sys.setprofile(profile)
            self._evaluating += perf_counter() - start
            return loss

        return (closure,)


def trained(variant: Variant, model: nn.Module) -> list[Parameter]:
    """Return the parameters that an optimizer steps: all that are not frozen, of which Muon takes matrices only."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [param for param in params if param.dim() == MATRIX] if variant.optimizer == "Muon" else params


def has_work(variant: Variant, model: SmallModel) -> bool:
    """Return whether an optimizer takes any parameter of a model, and its gradients."""
    if model.rows and variant.name not in OF_ROWS:
        return False
    return bool(trained(variant, model.make()))


def measure_small(variant: Variant, model: SmallModel, rounds: int) -> SmallMeasurement:
    """Time all contenders of a case, interleaved in rounds of random order; each has a copy of the model.

    Args:
        variant: the optimizer.
        model: the model.
        rounds: how many steps of each are timed.

    Raises:
        InternalError: our own step computes something else than torch's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = model.make()
    makers = implementations_of(variant)
    if model.rows:
        makers.pop(FUSED, None)  # takes no sparse gradients
    trainings = {name: _Training(variant, deepcopy(original), make) for name, make in makers.items()}
    batches = _batches(model)
    for batch, _ in zip(batches, range(_WARM_UP), strict=False):
        for training in trainings.values():
            training.step(batch)
        if not _agree(trainings[OURS].params, trainings[FOR_LOOP].params):
            raise InternalError(f"{variant.name}, {model.title}: surefoot's step computes something else than torch's")
        trainings[OURS].take_over(trainings[FOR_LOOP])
    batch = next(batches)
    calls = {name: training.calls(batch) for name, training in trainings.items()}
    return SmallMeasurement(variant, model, _rounds(trainings, batches, rounds), calls)


def _batches(model: SmallModel) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        if model.rows:
            index = torch.randint(*model.rows[:1], (model.rows[1],), generator=generator)
            yield index, torch.randn(len(index), 1, generator=generator)
            continue
        yield torch.randn(BATCH, model.inputs, generator=generator), torch.randn(BATCH, 1, generator=generator)


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.allclose(*pair, rtol=_TOLERANCE, atol=_TOLERANCE) for pair in zip(ours, theirs, strict=True))


def _rounds(
    trainings: Mapping[str, _Training], batches: Iterator[tuple[Tensor, Tensor]], rounds: int
) -> dict[str, np.ndarray]:
    """Return the seconds of a step in each round, for each contender."""
    seconds = {name: np.zeros(rounds) for name in trainings}
    order, draw = list(trainings), random.Random(0)  # noqa: S311 (not a secret)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            draw.shuffle(order)
            batch = next(batches)
            for name in order:
                seconds[name][index] = trainings[name].step(batch)
    finally:
        gc.enable()
    return seconds
