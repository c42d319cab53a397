"""Sums of single tensors of which each rank knows what its shard adds up to, put together for all tensors at once."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.tensors.shards import sharded_dim


class PartialSum(NamedTuple):
    """What this rank's shard of a sharded tensor adds up to.

    Attributes:
        values: the sums: of any shape, which is that of all ranks whose shards are to be added.
        tensor: the sharded tensor.
        dims: the dimensions of it that were summed over, from 0.
    """

    values: Tensor
    tensor: Any
    dims: Collection[int]


def sum_over_shards(partials: Sequence[PartialSum]) -> list[Tensor]:
    """Return sums over the ranks that hold other parts of what was summed: one all-reduce for each mesh dimension.

    Every rank of a mesh hands over the same tensors and dimensions in the same order, whatever its shards hold.  What
    replicas know alike is not added, and ranks get the same bits wherever they get the same sum.

    Args:
        partials: any number of sums.

    Returns:
        The sums, of the shapes of `values`, in float64.
    """
    sums = [partial.values.double() for partial in partials]
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for index, partial in enumerate(partials):
        mesh = partial.tensor.device_mesh
        for mesh_dim, placement in enumerate(partial.tensor.placements):
            if mesh.size(mesh_dim) > 1 and sharded_dim(placement) in partial.dims:
                groups[mesh, mesh_dim].append(index)
    meshes = {mesh: order for order, (mesh, _) in reversed(list(enumerate(groups)))}
    for mesh, mesh_dim in sorted(groups, key=lambda group: (meshes[group[0]], group[1])):
        _add_over(mesh.get_group(mesh_dim), sums, groups[mesh, mesh_dim])
    return sums


def _add_over(group: Any, sums: list[Tensor], indices: Sequence[int]) -> None:
    """Put the sums over a process group into the places of some."""
    from torch import distributed  # noqa: PLC0415 (there are ranks)

    flat = torch.cat([sums[index].reshape(-1) for index in indices])
    distributed.all_reduce(flat, group=group)
    parts = torch.split(flat, [sums[index].numel() for index in indices])
    for index, part in zip(indices, parts, strict=True):
        sums[index] = part.view(sums[index].shape)
