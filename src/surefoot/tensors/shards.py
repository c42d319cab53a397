"""Sharded tensors (DTensor): the part of one that this process holds, and whether two are laid out alike."""

import sys
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor


def sharded_type() -> Any:
    """Return DTensor if anything has imported it, else None."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    sharded = sharded_type()
    return sharded is not None and isinstance(tensor, sharded)


def to_local(tensor: Tensor) -> Tensor:
    """Return what an engine works on: of a sharded tensor this process's shard, of a complex one its real view."""
    if is_sharded(tensor):
        tensor = sharded_type().to_local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def match_layout(param: Any, grad: Any) -> Any:
    """Return the gradient of a sharded parameter in the parameter's own placements; any other as it is."""
    if not is_sharded(param) or grad.placements == param.placements:
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def sharding_mismatch(tensor: Any, param: Any, *, placements: bool = True) -> str | None:
    """Return how a tensor is laid out over ranks unlike a parameter, None if it is laid out alike.

    Args:
        tensor: state or gradient of the parameter.
        param: the parameter.
        placements: whether placements, and the shapes of shards, must agree beside the mesh.
    """
    if is_sharded(tensor) != is_sharded(param):
        return f"is {layout_of(tensor)}, must be {layout_of(param)}"
    if not is_sharded(param):
        return None
    if tensor.device_mesh != param.device_mesh or (placements and tensor.placements != param.placements):
        return f"is {layout_of(tensor)}, must be {layout_of(param)}"
    if placements and (ours := to_local(tensor).shape) != (shard := to_local(param).shape):
        return f"has a shard of shape {tuple(ours)} on this rank, the parameter's is {tuple(shard)}"
    return None


def layout_of(tensor: Any) -> str:
    """Return how a tensor is laid out over ranks, for a message."""
    if not is_sharded(tensor):
        return "a plain tensor"
    placements = ", ".join(map(str, tensor.placements))
    return f"a DTensor of placements ({placements}) on a mesh of shape {tuple(tensor.device_mesh.shape)}"


class ShardGuard:
    """Guards which shards sharded tensors have, and finds those of their gradients.

    Args:
        params: sharded parameters, not complex.
        others: sharded tensors that belong to them.
    """

    def __init__(self, params: Sequence[Any], others: Iterable[Any]) -> None:
        self._params, self._tensors = params, [*params, *others]
        self._shards = [tensor._local_tensor for tensor in self._tensors]
        self._kinds = [sharded_type()] * len(params)
        self._meshes, self._placements = [p.device_mesh for p in params], [p.placements for p in params]

    def local_grads(self) -> list[Tensor] | None:
        """Return this process's shards of the gradients of now; None if a tensor, or a layout, is another."""
        if not all(map(is_, [tensor._local_tensor for tensor in self._tensors], self._shards)):
            return None
        with torch._C.DisableTorchFunctionSubclass():  # twice as fast
            grads: list[Any] = [param.grad for param in self._params]
        if list(map(type, grads)) != self._kinds:
            return None
        specs = [grad._spec for grad in grads]
        alike = [spec.placements for spec in specs] == self._placements and [s.mesh for s in specs] == self._meshes
        return [grad._local_tensor for grad in grads] if alike else None
