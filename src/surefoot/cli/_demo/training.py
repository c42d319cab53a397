"""Two trainings of one model, a step of each in turn, that differ only in the library of their optimizers.

Both start from the same weights and see the same batches; neither draws from torch's global generator.  They
also take turns at going first, so that whatever else the machine does falls on both clocks alike.  Where torch.optim
does not have the optimizer, another of its own stands there for reference.
"""

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own documentation names it so
from torch import Tensor, nn
from torch.func import functional_call

from surefoot.cli._demo.errors import DemoError
from surefoot.cli._demo.model import CharacterModel, Shape, build_model
from surefoot.cli._demo.recipes import RECIPES, Recipe, TrainedPart
from surefoot.cli._demo.text import Batch, Corpus, batch_at, draw_starts
from surefoot.optimizers.schedule_free import ScheduleFree

EVALUATED_SEQUENCES = 256


@dataclass(frozen=True)
class TrainingSetup:
    """What both trainings have in common.

    Attributes:
        optimizer: the name of the second library's optimizer; of the first's too unless the recipe has a reference.
        steps: training steps; 1 or more.
        lr: the learning rate of that optimizer; positive.
        seed: of the weights, the batches and the text written in the end.
        shape: the size of the model.
        libraries: the two modules that have the optimizers.
        dtype: in which both keep the weights; what is computed with them is float32.
        storage: options of the second library's optimizers about how weights and state are kept.
    """

    optimizer: str
    steps: int
    lr: float
    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    libraries: tuple[str, str] = ("torch.optim", "surefoot")
    dtype: torch.dtype = torch.float32
    storage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The settings of the optimizer."""
        return RECIPES[self.optimizer]

    @property
    def reference(self) -> str | None:
        """The optimizer of the first library, if it is another."""
        return self.recipe.reference

    @property
    def labels(self) -> tuple[str, str]:
        """What the two trainings are called."""
        one, other = self.libraries
        return self.label(one), self.label(other)

    def label(self, library: str) -> str:
        """Return what the training of a library is called."""
        return f"{library}.{self.choice(library)[0]}"

    def choice(self, library: str) -> tuple[str, Recipe, float]:
        """Return the name, the settings and the learning rate of a library's optimizer."""
        if self.reference is None or library != self.libraries[0]:
            return self.optimizer, self.recipe, self.lr
        return self.reference, RECIPES[self.reference], RECIPES[self.reference].lr


@dataclass(frozen=True)
class Gap:
    """How far two models are apart: the largest difference of a parameter, and whether all bits agree."""

    largest: float
    same_bits: bool

    @classmethod
    def between(cls, one: nn.Module, other: nn.Module) -> "Gap":
        """Measure two models of the same structure."""
        largest, same_bits = 0.0, True
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            largest = max(largest, (a - b).abs().max().item())
            same_bits = same_bits and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        return cls(largest, same_bits)


@dataclass(frozen=True)
class Clock:
    """Seconds of every step of one training.

    Attributes:
        optimizers: for each optimizer's name, the time inside its `step`, evaluations of a closure taken off.
        whole: the whole training step: clearing gradients, the model forward and backward, the optimizers.
    """

    optimizers: dict[str, list[float]]
    whole: list[float] = field(default_factory=list)

    @property
    def optimizer_ms(self) -> list[float]:
        """Milliseconds that all optimizers took together, for each step."""
        return [1000 * sum(seconds) for seconds in zip(*self.optimizers.values(), strict=True)]

    @property
    def whole_ms(self) -> float:
        """The median of the whole training step, in milliseconds."""
        return 1000 * median(self.whole)

    @property
    def share(self) -> float:
        """The optimizers' part of a training step, from 0 to 1: median over median."""
        return median(self.optimizer_ms) / self.whole_ms

    @property
    def steps_per_second(self) -> float:
        """Whole training steps in a second, over all steps so far."""
        return len(self.whole) / sum(self.whole)

    def median_ms(self, optimizer: str) -> float:
        """The median time of one optimizer's step, in milliseconds."""
        return 1000 * median(self.optimizers[optimizer])


def _optimizer_class(library: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    module = importlib.import_module(library)
    try:
        found: Callable[..., torch.optim.Optimizer] = getattr(module, name)
    except AttributeError:
        there = ", ".join(known for known in sorted(RECIPES) if hasattr(module, known)) or "none at all"
        raise DemoError(f"{library} has no {name} here; with --optimizer name one it has: {there}") from None
    return found


def _part_of(model: CharacterModel, part: TrainedPart) -> list[nn.Parameter]:
    if part is TrainedPart.MATRICES:
        return [param for param in model.blocks.parameters() if param.ndim == 2]  # noqa: PLR2004 - a matrix
    if part is TrainedPart.TABLE and model.pairs is not None:
        return list(model.pairs.parameters())
    return list(model.parameters())


def _build_optimizers(library: str, setup: TrainingSetup, model: CharacterModel) -> dict[str, torch.optim.Optimizer]:
    name, recipe, lr = setup.choice(library)
    own = _part_of(model, recipe.part)
    storage = setup.storage if library == setup.libraries[1] else {}
    try:
        built = {name: _optimizer_class(library, name)(own, lr=lr, **recipe.options, **storage)}
        if recipe.companion is not None:
            taken = {id(param) for param in own}
            others = [param for param in model.parameters() if id(param) not in taken]
            companion = _optimizer_class(library, recipe.companion)
            built[recipe.companion] = companion(others, lr=recipe.companion_lr, **storage)
    except (TypeError, ValueError) as error:
        raise DemoError(str(error)) from None
    return built


def _loss(model: CharacterModel, batch: Batch) -> Tensor:
    wide = {name: param.float() for name, param in model.named_parameters() if param.dtype is not torch.float32}
    scores = functional_call(model, wide, (batch.inputs,)) if wide else model(batch.inputs)
    return F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten())


class Training:
    """One model, trained by the optimizers of one library, with its losses and its clock.

    Args:
        library: the module that has the optimizers, such as "torch.optim".
        setup: what is trained, and how.
        model: the model to train, in place.

    Raises:
        DemoError: if the library lacks an optimizer.
    """

    def __init__(self, library: str, setup: TrainingSetup, model: CharacterModel) -> None:
        self.label = setup.label(library)
        self.model = model
        self.losses: list[float] = []
        self.optimizers = _build_optimizers(library, setup, model)
        self._closure = setup.choice(library)[1].closure
        self.clock = Clock({name: [] for name in self.optimizers})

    def step(self, batch: Batch) -> None:
        """Train on one batch.

        Raises:
            DemoError: if the loss is no longer a finite number.
        """
        begun = perf_counter()
        loss = self._step_with_closure(batch) if self._closure else self._step(batch)
        self.clock.whole.append(perf_counter() - begun)
        self.losses.append(self._checked(loss.item()))

    def finish(self) -> None:
        """Let the model hold the weights to evaluate, where the optimizer trains others."""
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, ScheduleFree):
                optimizer.eval()

    def held_loss(self, data: Tensor, seed: int) -> float:
        """Return the mean loss over sequences of `data` that depend on the seed alone."""
        context = self.model.shape.context
        starts = draw_starts(data, (EVALUATED_SEQUENCES // 32, 32), context, seed)
        with torch.no_grad():
            losses = [_loss(self.model, batch_at(data, row, context)).item() for row in starts]
        return self._checked(sum(losses) / len(losses))

    def _gradients(self, batch: Batch) -> Tensor:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = _loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _step(self, batch: Batch) -> Tensor:
        loss = self._gradients(batch)
        for name, optimizer in self.optimizers.items():
            begun = perf_counter()
            optimizer.step()
            self.clock.optimizers[name].append(perf_counter() - begun)
        return loss.detach()

    def _step_with_closure(self, batch: Batch) -> Tensor:
        ((name, optimizer),) = self.optimizers.items()
        losses: list[Tensor] = []
        evaluating = 0.0

        def closure() -> float:
            nonlocal evaluating
            begun = perf_counter()
            losses.append(self._gradients(batch).detach())
            evaluating += perf_counter() - begun
            return losses[-1].item()

        begun = perf_counter()
        optimizer.step(closure)
        self.clock.optimizers[name].append(perf_counter() - begun - evaluating)
        return losses[0]

    def _checked(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        raise DemoError(
            f"with {self.label} the loss became {loss} in step {len(self.clock.whole)}: "
            "give a smaller --lr, or leave it out"
        )


@dataclass(frozen=True)
class Outcome:
    """What one training came to.

    Attributes:
        label: library and optimizer.
        losses: the loss of each step's batch, before the step; nats per character.
        clock: its times.
        train_loss: the loss over sequences of the training text, at the end.
        held_out_loss: the same over text that was held out.
    """

    label: str
    losses: Sequence[float]
    clock: Clock
    train_loss: float
    held_out_loss: float


@dataclass(frozen=True)
class Comparison:
    """What both trainings came to, torch's first.

    Attributes:
        setup: what they had in common.
        outcomes: one for each library.
        first_gap: between the models after the first step.
        last_gap: between them in the end.
        model: the model that the second library trained.
    """

    setup: TrainingSetup
    outcomes: tuple[Outcome, Outcome]
    first_gap: Gap
    last_gap: Gap
    model: CharacterModel


Watch = Callable[[Training, Training], None]


def _batches(setup: TrainingSetup, data: Tensor) -> Iterator[Batch]:
    context = setup.shape.context
    for starts in draw_starts(data, (setup.steps, setup.recipe.batch), context, setup.seed):
        yield batch_at(data, starts, context)


def _outcome(training: Training, setup: TrainingSetup, corpus: Corpus) -> Outcome:
    train, held_out = (training.held_loss(data, setup.seed) for data in (corpus.train, corpus.held_out))
    return Outcome(training.label, training.losses, training.clock, train, held_out)


def compare(setup: TrainingSetup, corpus: Corpus, watch: Watch | None = None) -> Comparison:
    """Train the same model with each library, in turns.

    Args:
        setup: what the trainings have in common.
        corpus: the text they learn.
        watch: called with both trainings after every step.

    Raises:
        DemoError: if a library lacks an optimizer, or a loss becomes infinite or not a number.
    """
    model = build_model(len(corpus.alphabet), setup.shape, setup.seed, pairs=setup.recipe.part is TrainedPart.TABLE)
    model.to(setup.dtype)
    one, other = (Training(library, setup, copy.deepcopy(model)) for library in setup.libraries)
    first_gap = Gap(0.0, same_bits=True)
    for step, batch in enumerate(_batches(setup, corpus.train)):
        for training in (one, other) if step % 2 == 0 else (other, one):
            training.step(batch)
        if step == 0:
            first_gap = Gap.between(one.model, other.model)
        if watch is not None:
            watch(one, other)
    for training in (one, other):
        training.finish()
    outcomes = _outcome(one, setup, corpus), _outcome(other, setup, corpus)
    last_gap = Gap.between(one.model, other.model)
    return Comparison(setup, outcomes, first_gap, last_gap, other.model.float())
