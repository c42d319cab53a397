"""Trainings of one model, a step of each in turn, that differ only in who makes the step of their optimizers.

All start from the same weights and see the same batches; none draws from torch's global generator.  They follow one
another in every order in turn, so that whatever else the machine does falls on all clocks alike.  Where torch.optim
has two implementations, both take part: what lies between them is what rounding in another order comes to.  Where it
does not have the optimizer, another of its own stands there for reference.
"""

import copy
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, permutations
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
MEASURED_GAPS = 50


@dataclass(frozen=True)
class Contender:
    """Who makes the optimizers of a training.

    Attributes:
        library: the module that has them, such as "torch.optim".
        engine: the flag that chooses one of its implementations, such as "fused"; empty for the default one.
    """

    library: str
    engine: str = ""

    def label(self, optimizer: str = "") -> str:
        """Return what it is called, or what an optimizer of it is called."""
        name = f"{self.library}.{optimizer}" if optimizer else self.library
        return f"{name}, {self.engine}" if self.engine else name


@dataclass(frozen=True)
class TrainingSetup:
    """What the trainings have in common.

    Attributes:
        optimizer: the name of the second library's optimizer; of the first's too unless the recipe has a reference.
        steps: training steps; 1 or more.
        lr: the learning rate of that optimizer; positive.
        seed: of the weights, the batches and the text written in the end.
        shape: the size of the model.
        libraries: the two modules that have the optimizers.
        dtype: in which all keep the weights; what is computed with them is float32.
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

    @functools.cached_property
    def contenders(self) -> tuple[Contender, ...]:
        """The first library, another of its engines where it has the same optimizer in two, and the second library.

        Raises:
            DemoError: if the first library lacks the optimizer.
        """
        one, other = self.libraries
        engine = "" if self.reference else _second_engine(one, self.optimizer, self.dtype)
        return (Contender(one), *([Contender(one, engine)] if engine else []), Contender(other))

    @property
    def labels(self) -> tuple[str, ...]:
        """What the trainings are called."""
        return tuple(map(self.label, self.contenders))

    def label(self, contender: Contender) -> str:
        """Return what the training of a contender is called."""
        return contender.label(self.choice(contender.library)[0])

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


def _second_engine(library: str, name: str, dtype: torch.dtype) -> str:
    """Return the flag of an implementation beside the default one, empty if there is none.

    In 16 bits foreach is the other one: torch's fused SGD then leaves most of a parameter unchanged (pytorch#191763).
    """
    flags = ("fused", "foreach") if dtype.itemsize >= torch.float32.itemsize else ("foreach",)
    taken = inspect.signature(_optimizer_class(library, name)).parameters
    return next((flag for flag in flags if flag in taken), "")


def _part_of(model: CharacterModel, part: TrainedPart) -> list[nn.Parameter]:
    if part is TrainedPart.MATRICES:
        return [param for param in model.blocks.parameters() if param.ndim == 2]  # noqa: PLR2004 - a matrix
    if part is TrainedPart.TABLE and model.pairs is not None:
        return list(model.pairs.parameters())
    return list(model.parameters())


def _build_optimizers(
    contender: Contender, setup: TrainingSetup, model: CharacterModel
) -> dict[str, torch.optim.Optimizer]:
    library = contender.library
    name, recipe, lr = setup.choice(library)
    own = _part_of(model, recipe.part)
    storage = setup.storage if library == setup.libraries[1] else {}
    engine = {contender.engine: True} if contender.engine else {}
    try:
        built = {name: _optimizer_class(library, name)(own, lr=lr, **recipe.options, **storage, **engine)}
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
    """One model, trained by the optimizers of one contender, with its losses, its clock and its way.

    Args:
        contender: who makes the optimizers.
        setup: what is trained, and how.
        model: the model to train, in place.

    Raises:
        DemoError: if the library lacks an optimizer.
    """

    def __init__(self, contender: Contender, setup: TrainingSetup, model: CharacterModel) -> None:
        self.label = setup.label(contender)
        self.model = model
        self.losses: list[float] = []
        self.gaps: dict[int, Gap] = {}
        self.optimizers = _build_optimizers(contender, setup, model)
        self._closure = setup.choice(contender.library)[1].closure
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
        gaps: how far its model was from the first training's, by how many steps were taken: after the first one, after
            all, and some between; empty of the first training itself.
        train_loss: the loss over sequences of the training text, at the end.
        held_out_loss: the same over text that was held out.
    """

    label: str
    losses: Sequence[float]
    clock: Clock
    gaps: Mapping[int, Gap]
    train_loss: float
    held_out_loss: float


@dataclass(frozen=True)
class Comparison:
    """What the trainings came to, torch's first and ours last.

    Attributes:
        setup: what they had in common.
        outcomes: one for each contender.
        model: the model that the second library trained.
    """

    setup: TrainingSetup
    outcomes: tuple[Outcome, ...]
    model: CharacterModel

    def gaps(self, step: int) -> list[Gap]:
        """Return how far all models but the first were from it when so many steps were taken."""
        return [outcome.gaps[step] for outcome in self.outcomes[1:]]


Watch = Callable[[Sequence[Training]], None]


def _batches(setup: TrainingSetup, data: Tensor) -> Iterator[Batch]:
    context = setup.shape.context
    for starts in draw_starts(data, (setup.steps, setup.recipe.batch), context, setup.seed):
        yield batch_at(data, starts, context)


def _outcome(training: Training, setup: TrainingSetup, corpus: Corpus) -> Outcome:
    train, held_out = (training.held_loss(data, setup.seed) for data in (corpus.train, corpus.held_out))
    return Outcome(training.label, training.losses, training.clock, training.gaps, train, held_out)


def compare(setup: TrainingSetup, corpus: Corpus, watch: Watch | None = None) -> Comparison:
    """Train the same model with each contender, in turns.

    Args:
        setup: what the trainings have in common.
        corpus: the text they learn.
        watch: called with all trainings after every step.

    Raises:
        DemoError: if a library lacks an optimizer, or a loss becomes infinite or not a number.
    """
    model = build_model(len(corpus.alphabet), setup.shape, setup.seed, pairs=setup.recipe.part is TrainedPart.TABLE)
    model.to(setup.dtype)
    trainings = [Training(contender, setup, copy.deepcopy(model)) for contender in setup.contenders]
    every = max(1, setup.steps // MEASURED_GAPS)
    steps = zip(_batches(setup, corpus.train), cycle(permutations(trainings)), strict=False)
    for step, (batch, order) in enumerate(steps, start=1):
        for training in order:
            training.step(batch)
        if step % every == 0 or step in (1, setup.steps):
            _measure_gaps(trainings, step)
        if watch is not None:
            watch(trainings)
    for training in trainings:
        training.finish()
    outcomes = tuple(_outcome(training, setup, corpus) for training in trainings)
    return Comparison(setup, outcomes, trainings[-1].model.float())


def _measure_gaps(trainings: Sequence[Training], step: int) -> None:
    first, *others = trainings
    for other in others:
        other.gaps[step] = Gap.between(first.model, other.model)
