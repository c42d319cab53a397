"""Sharded tensors (DTensor): the part of one that this process holds, and whether two are laid out alike."""

import functools
import sys
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

_known: list[Any] = []


def sharded_type() -> Any:
    """Return DTensor if anything has imported it, else None."""
    if not _known and (found := getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)) is not None:
        _known.append(found)
    return _known[0] if _known else None


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    sharded = _known[0] if _known else sharded_type()
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


def sharded_dim(placement: Any) -> int | None:
    """Return the dimension of a tensor that a placement divides over ranks, None if it divides none."""
    dim = getattr(placement, "dim", None)
    return None if placement.is_replicate() else dim


def placements_for(shape: torch.Size, param: Any) -> tuple[Any, ...]:
    """Return how a tensor that belongs to a sharded parameter is laid out: each part of it where its elements are.

    A dimension that both have alike is divided as the parameter's is; over ranks that divide another one the tensor is
    replicated.
    """
    placements: tuple[Any, ...] = param.placements
    return placements if shape == param.shape else _placements_for(shape, param.shape, placements)


@functools.lru_cache(maxsize=1024)
def _placements_for(shape: torch.Size, whole: torch.Size, placements: tuple[Any, ...]) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate  # noqa: PLC0415 (there is a sharded tensor)

    dims = map(sharded_dim, placements)
    kept = [dim is not None and len(shape) == len(whole) and shape[dim] == whole[dim] for dim in dims]
    return tuple(each if keep else Replicate() for each, keep in zip(placements, kept, strict=True))


def local_shape_for(shape: torch.Size, param: Any) -> torch.Size:
    """Return the shape of this process's shard of a tensor that is laid out by `placements_for`."""
    local = to_local(param).shape[: param.dim()]
    divided = set(map(sharded_dim, placements_for(shape, param)))
    return torch.Size(local[dim] if dim in divided else size for dim, size in enumerate(shape))


def full_for(shape: torch.Size, param: Any, value: Any, dtype: torch.dtype) -> Any:
    """Return a new sharded tensor of one value that belongs to a sharded parameter, laid out by `placements_for`."""
    local = to_local(param).new_full(local_shape_for(shape, param), value, dtype=dtype)
    whole = torch.empty(shape, device="meta")
    return sharded_type().from_local(
        local, param.device_mesh, placements_for(shape, param), run_check=False, shape=shape, stride=whole.stride()
    )


def sharding_mismatch(tensor: Any, param: Any, *, placements: bool = True) -> str | None:
    """Return how a tensor is laid out over ranks unlike a parameter, None if each part of it is where it belongs.

    Args:
        tensor: state or gradient of the parameter.
        param: the parameter.
        placements: whether placements, and the shapes of shards, must agree beside the mesh; those of a tensor of
            another shape are to be by `placements_for`.
    """
    if not is_sharded(param):
        return f"is {layout_of(tensor)}, must be a plain tensor" if is_sharded(tensor) else None
    expected = placements_for(tensor.shape, param) if placements else param.placements
    known = is_sharded(tensor) and tensor.device_mesh == param.device_mesh
    if not known or (placements and tensor.placements != expected):
        return f"is {layout_of(tensor)}, must be {_layout(expected, param.device_mesh)}"
    ours, shard = to_local(tensor).shape, to_local(param).shape
    if tensor.shape != param.shape:
        shard = local_shape_for(tensor.shape, param)
    if placements and ours != shard:
        return f"has a shard of shape {tuple(ours)} on this rank, the parameter's is {tuple(shard)}"
    return None


def layout_of(tensor: Any) -> str:
    """Return how a tensor is laid out over ranks, for a message."""
    return _layout(tensor.placements, tensor.device_mesh) if is_sharded(tensor) else "a plain tensor"


def _layout(placements: Sequence[Any], mesh: Any) -> str:
    shown = ", ".join(map(str, placements))
    return f"a DTensor of placements ({shown}) on a mesh of shape {tuple(mesh.shape)}"


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
