"""Sharded matrices, each made whole on one rank of its mesh and divided again: one exchange there and one back.

Who gets which matrix follows from shapes and the mesh alone, so that ranks need not talk about it.  All ranks of a mesh
take part in the work, those that hold the same shards too.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.tensors.shards import sharded_dim, to_local

_Index = slice | Tensor
_Coordinate = tuple[int, ...]


class _Region(NamedTuple):
    """Which elements of a tensor a shard has.

    Attributes:
        shape: the shard's shape.
        indices: of each dimension which elements; a slice where they follow one another.
    """

    shape: tuple[int, ...]
    indices: tuple[_Index, ...]


def irregular_shard(tensor: Any) -> str | None:
    """Return how a sharded tensor's shard on this rank differs from what its placements say, None if it does not."""
    mesh = tensor.device_mesh
    regions = _regions(tuple(tensor.shape), tuple(tensor.placements), tuple(mesh.shape))
    expected, ours = regions[tuple(mesh.get_coordinate())].shape, tuple(to_local(tensor).shape)
    return None if ours == expected else f"has a shard of shape {ours} on this rank, by its placements {expected}"


class _Division(NamedTuple):
    """How matrices are divided among the ranks of a mesh.

    Attributes:
        regions: of each matrix what shards of it the ranks have, by position.
        owned: for each rank the numbers of the matrices that it makes whole.
        senders: of each matrix the ranks that send their shard to its owner.
    """

    regions: tuple[tuple[_Region, ...], ...]
    owned: tuple[tuple[int, ...], ...]
    senders: tuple[frozenset[int], ...]


class MatrixExchange:
    """Makes sharded matrices of one mesh whole, each on one rank, and divides them again.

    Every rank of the mesh makes it of the same matrices in the same order.

    Args:
        matrices: the sharded matrices, of which only the layouts count.
        bundles: for each matrix the number of its bundle, from 0: those of a bundle go to one rank.  Each is one by
            itself if None.
    """

    def __init__(self, matrices: Sequence[Any], bundles: Sequence[int] | None = None) -> None:
        mesh = matrices[0].device_mesh
        self._group, ranks = _group_of(mesh)
        self._ranks, self._mine = ranks, ranks.index(mesh.mesh[tuple(mesh.get_coordinate())].item())
        places = mesh.mesh.flatten().tolist()
        coordinates = dict(zip(places, itertools.product(*map(range, mesh.shape)), strict=True))
        self._shapes = tuple(tuple(matrix.shape) for matrix in matrices)
        self._division = _divided(
            self._shapes,
            tuple(tuple(matrix.placements) for matrix in matrices),
            tuple(mesh.shape),
            tuple(coordinates[rank] for rank in ranks),
            tuple(range(len(matrices)) if bundles is None else bundles),
        )

    def indices(self, number: int) -> tuple[_Index, ...]:
        """Return which elements of a matrix this rank's shard has, by dimension."""
        return self._division.regions[number][self._mine].indices

    def collect(self, shards: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the matrices that are this rank's to work on, whole, by their numbers.

        Args:
            shards: this rank's shard of each matrix, all of one dtype.
        """
        regions, owned, senders = self._division
        mine = self._mine
        sent = [[shards[m] for m in theirs if mine in senders[m]] for theirs in owned]
        expected = [
            [regions[m][source].shape for m in owned[mine] if source in senders[m]] for source in range(len(owned))
        ]
        wholes = {m: shards[0].new_empty(self._shapes[m]) for m in owned[mine]}
        for source, parts in enumerate(self._exchanged(sent, expected, shards[0])):
            numbers = (m for m in owned[mine] if source in senders[m])
            for m, part in zip(numbers, parts, strict=True):
                _put(wholes[m], regions[m][source].indices, part)
        return wholes

    def divide(self, wholes: Mapping[int, Tensor], like: Tensor, without: Container[int] = ()) -> dict[int, Tensor]:
        """Return this rank's shard of each matrix, by its number, in their order.

        Args:
            wholes: the matrices that `collect` has given this rank, or what has become of them, by their numbers.
            like: a tensor of their dtype and device.
            without: numbers of matrices that nobody asks for, the same on all ranks.
        """
        regions, mine = self._division.regions, self._mine
        owned = [[m for m in theirs if m not in without] for theirs in self._division.owned]
        sent = [[_get(wholes[m], regions[m][target].indices) for m in owned[mine]] for target in range(len(owned))]
        expected = [[regions[m][mine].shape for m in theirs] for theirs in owned]
        found: dict[int, Tensor] = {}
        for numbers, parts in zip(owned, self._exchanged(sent, expected, like), strict=True):
            found.update(zip(numbers, parts, strict=True))
        return dict(sorted(found.items()))

    def _exchanged(
        self, sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[tuple[int, ...]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send each rank tensors and return what each has sent, of the shapes that are expected."""
        counts = [[torch.Size(shape).numel() for shape in shapes] for shapes in expected]
        flat = [torch.cat([part.reshape(-1) for part in parts] or [like.new_empty(0)]) for parts in sent]
        found = self._transported(flat, list(map(sum, counts)))
        return [
            [part.view(shape) for part, shape in zip(torch.split(each, sizes) if sizes else (), shapes, strict=True)]
            for each, sizes, shapes in zip(found, counts, expected, strict=True)
        ]

    def _transported(self, sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
        if len(sent) == 1:
            return sent
        if self._group is None:
            return exchange_pairwise(sent, sizes, self._ranks, self._mine)
        return exchange_together(sent, sizes, self._group)


def exchange_together(sent: Sequence[Tensor], sizes: Sequence[int], group: Any) -> list[Tensor]:
    """Send each rank of a group a flat tensor and return what each has sent, of `sizes` elements: one all-to-all.

    Bytes are sent, which every back end can, whatever the dtype.
    """
    from torch import distributed  # noqa: PLC0415 (there are ranks)

    width, found = sent[0].element_size(), sent[0].new_empty(sum(sizes))
    distributed.all_to_all_single(
        found.view(torch.uint8),
        torch.cat(list(sent)).view(torch.uint8),
        [width * size for size in sizes],
        [width * each.numel() for each in sent],
        group=group,
    )
    return list(torch.split(found, list(sizes)))


def exchange_pairwise(sent: Sequence[Tensor], sizes: Sequence[int], ranks: Sequence[int], mine: int) -> list[Tensor]:
    """Send each rank a flat tensor and return what each has sent, in one batch, where ranks have no group of their own.

    Args:
        sent: for each rank a flat tensor.
        sizes: of each rank how many elements it sends here.
        ranks: their numbers in the whole world.
        mine: the position of this one among them.
    """
    from torch import distributed  # noqa: PLC0415

    found = [sent[mine] if position == mine else sent[0].new_empty(size) for position, size in enumerate(sizes)]
    wanted = [
        distributed.P2POp(operation, tensor.view(torch.uint8), rank)
        for operation, tensors in ((distributed.isend, sent), (distributed.irecv, found))
        for position, (rank, tensor) in enumerate(zip(ranks, tensors, strict=True))
        if position != mine and tensor.numel()
    ]
    for request in distributed.batch_isend_irecv(wanted) if wanted else ():
        request.wait()
    return found


def _group_of(mesh: Any) -> tuple[Any, list[int]]:
    """Return the process group of all ranks of a mesh, None where there is none, and their numbers in its order."""
    from torch import distributed  # noqa: PLC0415

    wide = [dim for dim, size in enumerate(mesh.shape) if size > 1]
    if len(wide) == 1:
        group = mesh.get_group(wide[0])
    elif mesh.size() == distributed.get_world_size() and wide:
        group = distributed.group.WORLD
    else:
        return None, mesh.mesh.flatten().tolist()
    return group, distributed.get_process_group_ranks(group)


@functools.lru_cache(maxsize=64)
def _divided(
    shapes: tuple[tuple[int, ...], ...],
    placements: tuple[tuple[Any, ...], ...],
    mesh_shape: tuple[int, ...],
    coordinates: tuple[_Coordinate, ...],
    bundles: tuple[int, ...],
) -> _Division:
    """Return how matrices are divided among ranks at `coordinates`."""
    costs = [0] * (1 + max(bundles))
    for shape, bundle in zip(shapes, bundles, strict=True):
        costs[bundle] += _cost(shape)
    of_bundles = _balanced(costs, len(coordinates))
    owners = [of_bundles[bundle] for bundle in bundles]
    regions, senders = [], []
    for shape, own, owner in zip(shapes, placements, owners, strict=True):
        found = _regions(shape, own, mesh_shape)
        regions.append(tuple(found[coordinate] for coordinate in coordinates))
        copies = [dim for dim, placement in enumerate(own) if sharded_dim(placement) is None]
        near = [all(each[dim] == coordinates[owner][dim] for dim in copies) for each in coordinates]
        senders.append(frozenset(itertools.compress(range(len(coordinates)), near)))
    owned = tuple(tuple(m for m, owner in enumerate(owners) if owner == rank) for rank in range(len(coordinates)))
    return _Division(tuple(regions), owned, tuple(senders))


def _cost(shape: tuple[int, ...]) -> int:
    """Return about how much work a matrix is, or a tensor that is seen as one."""
    elements, rows = math.prod(shape), shape[0] if shape else 1
    return elements * min(rows, elements // max(rows, 1))


def _balanced(costs: Sequence[int], ranks: int) -> list[int]:
    """Return an owner for each item, the costly ones first to whoever has least to do."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, rank = heapq.heappop(loads)
        owners[item] = rank
        heapq.heappush(loads, (load + costs[item], rank))
    return owners


@functools.lru_cache(maxsize=1024)
def _regions(
    shape: tuple[int, ...], placements: tuple[Any, ...], mesh_shape: tuple[int, ...]
) -> dict[_Coordinate, _Region]:
    """Return what the rank at each coordinate of a mesh has of a tensor."""
    found = {}
    for coordinate in itertools.product(*map(range, mesh_shape)):
        indices = [torch.arange(size) for size in shape]
        for placement, parts, part in zip(placements, mesh_shape, coordinate, strict=True):
            if (dim := sharded_dim(placement)) is not None:
                indices[dim] = _part_of(indices[dim], parts, part, getattr(placement, "split_factor", 1))
        found[coordinate] = _Region(tuple(map(len, indices)), tuple(map(_as_slice, indices)))
    return found


def _part_of(index: Tensor, parts: int, part: int, split_factor: int) -> Tensor:
    """Return a part as `torch.chunk` makes them; of a strided shard that part of each of `split_factor` chunks."""
    if split_factor == 1:
        size = -(-len(index) // parts)
        return index[part * size : (part + 1) * size]
    size = -(-len(index) // split_factor)
    chunks = [index[i * size : (i + 1) * size] for i in range(split_factor)]
    return torch.cat([_part_of(chunk, parts, part, 1) for chunk in chunks])


def _as_slice(index: Tensor) -> _Index:
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _get(whole: Tensor, indices: Sequence[_Index]) -> Tensor:
    for dim, index in enumerate(indices):
        if isinstance(index, slice):
            whole = whole.narrow(dim, index.start, index.stop - index.start)
        else:
            whole = whole.index_select(dim, index.to(whole.device))
    return whole


def _put(whole: Tensor, indices: Sequence[_Index], part: Tensor) -> None:
    spread = []
    for dim, index in enumerate(indices):
        if isinstance(index, slice):
            whole = whole.narrow(dim, index.start, index.stop - index.start)
            spread.append(torch.arange(whole.size(dim)))
        else:
            spread.append(index)
    if all(isinstance(index, slice) for index in indices):
        whole.copy_(part)
    else:
        whole[torch.meshgrid(*(index.to(whole.device) for index in spread), indexing="ij")] = part
