"""A character-level transformer of about a million parameters, in plain torch.

Before its blocks a short causal convolution mixes the last few characters: with it half a minute of training on
two cores reaches words, without it hardly syllables.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own documentation names it so
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        context: the longest sequence that the model reads, in characters.
        width: numbers per character; a multiple of `heads`.
        blocks: transformer blocks.
        heads: attention heads in a block.
        mixed: characters that the convolution mixes.
    """

    context: int = 64
    width: int = 192
    blocks: int = 2
    heads: int = 6
    mixed: int = 4


class Block(nn.Module):
    """Attention to the characters so far, then two dense layers; both add to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.dense_norm = nn.LayerNorm(width)
        self.dense_in = nn.Linear(width, 4 * width)
        self.dense_out = nn.Linear(4 * width, width)
        # A block that adds nothing at first lets the gradient reach the layers below from the first step.
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.dense_out.weight)

    def attend(self, x: Tensor) -> Tensor:
        """Mix each character with those before it: shape (batch, characters, width), in and out."""
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: shape (batch, characters, width), in and out."""
        x = x + self.attend(self.attention_norm(x))
        out: Tensor = x + self.dense_out(F.gelu(self.dense_in(self.dense_norm(x))))
        return out


class CharacterModel(nn.Module):
    """Predicts the next character from the characters so far.

    Args:
        alphabet_size: how many characters there are.
        shape: the size of the model.
        pairs: whether to add a table with a row for each pair of neighbours, whose gradient is sparse.
    """

    def __init__(self, alphabet_size: int, shape: Shape, *, pairs: bool = False) -> None:
        super().__init__()
        self.shape, self.alphabet_size = shape, alphabet_size
        self.characters = nn.Embedding(alphabet_size, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.pairs = nn.Embedding(alphabet_size**2, shape.width, sparse=True) if pairs else None
        self.mix = nn.Conv1d(shape.width, shape.width, shape.mixed, bias=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, alphabet_size, bias=False)
        nn.init.normal_(self.characters.weight, std=0.5)
        nn.init.normal_(self.places.weight, std=0.1)
        nn.init.zeros_(self.head.weight)
        if self.pairs is not None:
            nn.init.normal_(self.pairs.weight, std=0.1)

    def embed(self, characters: Tensor) -> Tensor:
        """Turn characters, int64 of shape (batch, n), into numbers of shape (batch, n, width)."""
        x = self.characters(characters)
        if self.pairs is not None:
            before = F.pad(characters, (1, 0))[:, :-1]
            x = x + self.pairs(before * self.alphabet_size + characters)
        x = x + self.mix(F.pad(x.mT, (self.shape.mixed - 1, 0))).mT
        out: Tensor = x + self.places.weight[: characters.shape[1]]
        return out

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of each next character: int64 (batch, n) to float (batch, n, alphabet_size)."""
        x = self.embed(characters)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def build_model(alphabet_size: int, shape: Shape, seed: int, *, pairs: bool = False) -> CharacterModel:
    """Build a model whose weights depend on the seed alone; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return CharacterModel(alphabet_size, shape, pairs=pairs)


@torch.no_grad()
def continue_text(model: CharacterModel, prompt: Tensor, length: int, seed: int, temperature: float = 0.7) -> Tensor:
    """Let the model go on with a text.

    Args:
        model: the model.
        prompt: int64, shape (1, n).
        length: characters to add.
        seed: of the draws.
        temperature: positive; below 1 the likelier characters are preferred.

    Returns:
        The characters that the model added: int64, shape (1, length).
    """
    generator = torch.Generator().manual_seed(seed)
    text = prompt
    for _ in range(length):
        scores = model(text[:, -model.shape.context :])[:, -1]
        drawn = torch.multinomial(F.softmax(scores / temperature, dim=-1), 1, generator=generator)
        text = torch.cat([text, drawn], dim=1)
    return text[:, prompt.shape[1] :]
