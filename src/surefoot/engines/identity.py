"""Who a parameter, and each of its elements, is to random bits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.storage import identity
from surefoot.tensors.shards import block_of, has_blocks, is_sharded, to_local


@dataclass(frozen=True)
class Identity:
    """Who a parameter is, and which part of it this process holds.

    Attributes:
        number: the parameter's; see `storage.identity`.
        whole: shape of the parameter.
        offsets: where in it the part begins, along each dimension.
        held: shape of the part.
    """

    number: int
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def first(self) -> int | None:
        """The number of the part's first element if they are numbered one after the other, else None."""
        cut = self.held != self.whole
        if cut and (self.held[1:] != self.whole[1:] or math.prod(self.whole) >= 1 << 32):
            return None  # of larger ones kernels count only whole multiples of 2**32
        return self.offsets[0] * math.prod(self.whole[1:]) if self.offsets else 0

    def numbers(self, param: Tensor) -> Tensor:
        """Return the numbers of the elements of this process's part, which has the shape of `param`."""
        if self.first is not None:
            return torch.arange(self.first, self.first + param.numel(), device=param.device).view(param.shape)
        numbers = torch.zeros((), dtype=torch.int64, device=param.device)
        for dim, (start, size) in enumerate(zip(self.offsets, self.held, strict=True)):
            along = torch.arange(start, start + size, device=param.device) * math.prod(self.whole[dim + 1 :])
            numbers = numbers + along.view(-1, *[1] * (len(self.held) - dim - 1))
        return numbers


def identity_of(param: Tensor, name: str | int) -> Identity:
    """Return who a parameter is that has a name, or else a number."""
    held = tuple(to_local(param).shape)
    if not is_sharded(param):
        return Identity(identity(name), held, (0,) * len(held), held)
    # What is no block counts its elements for itself.
    offsets = block_of(param)[1] if has_blocks(param) else (0,) * len(held)
    return Identity(identity(name), tuple(param.shape), offsets, held)
