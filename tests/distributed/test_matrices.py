"""Which elements ranks have of a sharded tensor, and how matrices are divided among them; a unit test of that room."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from surefoot.distributed.matrices import _balanced, _get, _put, _regions


def by_torch(tensor, placements, mesh_shape, coordinate):
    """Return a shard as the placements themselves split a tensor."""
    for placement, parts, part in zip(placements, mesh_shape, coordinate, strict=True):
        if not placement.is_replicate():
            shards, _ = placement._split_tensor(tensor, parts, with_padding=False, contiguous=False)
            tensor = shards[part]
    return tensor


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (1, 3), (2, 9), (0, 4)])
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Shard(1)),
        (Shard(1), Shard(1)),
        (Replicate(), Shard(0)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=3), Shard(0)),
        (_StridedShard(1, split_factor=3), Replicate()),
        (_StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)),
    ],
    ids=str,
)
def test_regions_are_those_of_torch(shape, placements):
    mesh_shape = (2, 3)
    tensor = torch.arange(shape[0] * shape[1]).view(shape)
    whole, again = tensor.clone(), torch.full(shape, -1)
    for coordinate, region in _regions(shape, placements, mesh_shape).items():
        expected = by_torch(tensor, placements, mesh_shape, coordinate)
        assert region.shape == tuple(expected.shape)
        if expected.numel():
            assert torch.equal(_get(whole, region.indices), expected)
        _put(again, region.indices, expected)
    assert torch.equal(again, tensor)


def test_work_is_divided_by_its_cost():
    costs = [5, 1, 1, 1, 1, 1, 9, 3]
    owners = _balanced(costs, 3)
    loads = [sum(itertools.compress(costs, [owner == rank for owner in owners])) for rank in range(3)]
    assert max(loads) == 9
    assert sum(loads) == sum(costs)
