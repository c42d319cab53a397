"""Tensors that every rank has, as sharded ones and back."""

import functools

from torch.distributed.tensor import DTensor, distribute_tensor

distribute = functools.partial(distribute_tensor, src_data_rank=None)
"""Make a sharded tensor of one that every rank has, so that nothing need be sent."""


def whole(value):
    """Return a copy of a tensor, put together if it is sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
