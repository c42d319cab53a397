"""Numbers of all parameters as one vector, of which each rank holds its shards: the same bits on all ranks.

Ranks gather what each of them knows and add it up themselves, in the order of ranks, so that decisions that follow from
the numbers are the same everywhere, whatever a back end does.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.distributed.exchange import gathered
from surefoot.tensors.shards import is_sharded, sharded_dim, to_local


class Found(NamedTuple):
    """What all ranks know together.

    Attributes:
        dots: dot products.
        largest: greatest absolute values, NaN where there is one.
        means: averages over ranks.
    """

    dots: list[float]
    largest: list[float]
    means: list[float]


class Totals:
    """Adds up over ranks what flat vectors of all parameters' elements give; replicated elements count once.

    A vector on this rank is the elements of its shards and of plain parameters, in the order of the parameters.

    Args:
        params: the parameters, some of them sharded.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        spans: dict[tuple[Any, tuple[int, ...]], list[slice]] = {}
        self._sizes = [to_local(param).numel() for param in params]
        first = 0
        for param, size in zip(params, self._sizes, strict=True):
            own = spans.setdefault(_dividing(param), [])
            if own and own[-1].stop == first:
                own[-1] = slice(own[-1].start, first + size)
            else:
                own.append(slice(first, first + size))
            first += size
        meshes = list(dict.fromkeys(param.device_mesh for param in params if is_sharded(param)))
        self._everyone = (widest := max(meshes, key=lambda mesh: mesh.size()), tuple(range(widest.ndim)))
        spans.setdefault(self._everyone, [])
        self._spans, self._size = spans, first
        self._lines = [(mesh, dim) for mesh in meshes for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        self._place = next(to_local(param).device for param in params if is_sharded(param))
        self.layout = "; ".join(map(_described, params))

    def combine(
        self,
        dots: Sequence[tuple[Tensor, Tensor]] = (),
        largest: Sequence[Tensor] = (),
        means: Sequence[float] = (),
    ) -> Found:
        """Return numbers of all ranks: one gathering for each mesh dimension that divides something.

        Args:
            dots: pairs of vectors, of which the dot products are wanted.
            largest: vectors, of which the greatest absolute values are wanted.
            means: numbers, of which the averages over ranks are wanted.
        """
        table = torch.zeros(len(self._spans), len(dots) + len(largest) + len(means), dtype=torch.float64)
        for row, (key, spans) in zip(table, self._spans.items(), strict=True):
            for column, (a, b) in enumerate(dots):
                row[column] = sum(a[span].dot(b[span]).item() for span in spans)
            for column, vector in enumerate(largest, len(dots)):
                row[column] = _largest([vector[span] for span in spans])
            if key == self._everyone and means:
                row[-len(means) :] = torch.tensor(means, dtype=torch.float64)
        for mesh, dim in self._lines:
            self._gather(table, mesh, dim, len(dots), len(largest), bool(means))
        found = table[:, : len(dots)].sum(dim=0).tolist()
        greatest = table[:, len(dots) : len(dots) + len(largest)].amax(dim=0).tolist() if largest else []
        counted = table[list(self._spans).index(self._everyone), len(dots) + len(largest) :]
        return Found(found, greatest, (counted / self._everyone[0].size()).tolist())

    def fail(self, largest: int, means: int) -> None:
        """Take part in a `combine` of as many numbers, of which the first mean tells that this rank fails."""
        self.combine((), [torch.zeros(self._size)] * largest, [1.0, *[0.0] * (means - 1)])

    def _gather(self, table: Tensor, mesh: Any, dim: int, dots: int, largest: int, means: bool) -> None:
        """Put together what the ranks along a mesh dimension know of what it divides."""
        rows = [
            index
            for index, ((own, dims), spans) in enumerate(self._spans.items())
            if own == mesh and dim in dims and (spans or means)
        ]
        if not rows:
            return
        every = gathered(table[rows].to(self._place), mesh.get_group(dim)).cpu()
        table[rows] = every.sum(dim=0)
        if largest:
            table[rows, dots : dots + largest] = every[:, :, dots : dots + largest].amax(dim=0)


def _dividing(param: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the mesh, and its dimensions, over which a parameter is divided."""
    if not is_sharded(param):
        return None, ()
    dims = (dim for dim, placement in enumerate(param.placements) if sharded_dim(placement) is not None)
    return param.device_mesh, tuple(dims)


def _described(param: Any) -> str:
    """Return which elements of a parameter this rank has."""
    if not is_sharded(param):
        return f"{tuple(param.shape)}"
    mesh, placements = param.device_mesh, ", ".join(map(str, param.placements))
    return f"{tuple(param.shape)} as ({placements}) at {tuple(mesh.get_coordinate())} of {tuple(mesh.shape)}"


def _largest(parts: Sequence[Tensor]) -> float:
    greatest = [part.abs().max().item() for part in parts if part.numel()]
    return math.nan if any(map(math.isnan, greatest)) else max(greatest, default=0.0)


def make_totals(params: Sequence[Tensor]) -> Totals | None:
    """Return what adds up over ranks, None if no parameter is sharded."""
    return Totals(params) if any(map(is_sharded, params)) else None
