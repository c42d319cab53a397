"""The text that the demo learns: the help topics which ship with Python, as numbers.

It is real English, about 370,000 characters of it, and needs no download.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.cli._demo.errors import DemoError

HELD_OUT_PERCENT = 10


def help_topics() -> str:
    """Return the text of Python's help topics without its tables.

    Each paragraph comes once, so that none is both trained on and held out.

    Raises:
        DemoError: if this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte that only the demo needs
    except ImportError as error:
        raise DemoError(
            "this Python comes without pydoc_data.topics, the text that the demo learns: "
            "install your system's full Python package"
        ) from error
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    return "\n\n".join(part for part in dict.fromkeys(paragraphs) if not part.lstrip().startswith(("|", "+-")))


@dataclass(frozen=True)
class Corpus:
    """A text as indices into its alphabet, its end held out from training.

    Attributes:
        alphabet: the characters that occur, in order; a character's place is its number.
        train: int64, shape (characters,); the first nine tenths of the text.
        held_out: int64, shape (characters,); the rest.
    """

    alphabet: str
    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, text: str) -> "Corpus":
        """Number the characters of a text and hold out its end."""
        alphabet = "".join(sorted(set(text)))
        place = {character: number for number, character in enumerate(alphabet)}
        numbers = torch.tensor([place[character] for character in text])
        cut = len(text) * (100 - HELD_OUT_PERCENT) // 100
        return cls(alphabet, numbers[:cut], numbers[cut:])

    def encode(self, text: str) -> Tensor:
        """Return the numbers of a text's characters: int64, shape (1, characters)."""
        return torch.tensor([[self.alphabet.index(character) for character in text]])

    def decode(self, numbers: Tensor) -> str:
        """Return the text of a tensor of numbers, whatever its shape."""
        return "".join(self.alphabet[number] for number in numbers.flatten().tolist())


@dataclass(frozen=True)
class Batch:
    """What a model reads and what it should say: int64, both of shape (batch, context)."""

    inputs: Tensor
    targets: Tensor


def draw_starts(data: Tensor, shape: tuple[int, int], context: int, seed: int) -> Tensor:
    """Draw places in `data` where sequences start: int64, of the given shape, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(data) - context, shape, generator=generator)


def batch_at(data: Tensor, starts: Tensor, context: int) -> Batch:
    """Cut the sequences that start at `starts`, shape (batch,), and the same shifted by one character."""
    window = data[starts[:, None] + torch.arange(context + 1)]
    return Batch(window[:, :-1], window[:, 1:])
