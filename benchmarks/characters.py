"""What trainings are compared on: a small character transformer and Python's own documentation."""

from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from surefoot.cli._demo.model import Shape

SHAPE = Shape(context=64, width=96, blocks=1, heads=4)


class Corpus(NamedTuple):
    """Characters as numbers.

    Attributes:
        training, held: those to train on and those held out.
        kinds: how many kinds there are.
    """

    training: Tensor
    held: Tensor
    kinds: int


def corpus() -> Corpus:
    """Return the characters of the documentation, of which the last tenth is held out."""
    text = "\n".join(topics[name] for name in sorted(topics))
    kinds = sorted(set(text))
    numbers = {character: number for number, character in enumerate(kinds)}
    data = torch.tensor([numbers[character] for character in text])
    cut = int(0.9 * len(data))
    return Corpus(data[:cut], data[cut:], len(kinds))


def batch(data: Tensor, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Draw sequences and what follows each of their characters."""
    starts = torch.randint(len(data) - SHAPE.context - 1, (size,), generator=generator)
    rows = torch.stack([data[start : start + SHAPE.context + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of the next characters, in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def held_out_loss(model: torch.nn.Module, data: Corpus, batches: int) -> float:
    """Return the mean loss on batches of what is held out, the same ones at each call."""
    generator = torch.Generator().manual_seed(1000)
    with torch.no_grad():
        return sum(loss_of(model, *batch(data.held, generator, 32)).item() for _ in range(batches)) / batches
