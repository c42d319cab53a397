"""Sharded tensors (DTensor): the part of one that this process holds, and laying one out as another is."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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


def needs_ranks(tensor: Any, param: Any, *, placements: bool = True) -> bool:
    """Return whether `lay_out` asks other ranks; of tensors that all ranks describe alike, all get the same answer."""
    if not is_sharded(tensor):
        return False
    if not is_sharded(param) or tensor.device_mesh != param.device_mesh:
        return True
    return placements and tensor.placements != param.placements


def lay_out(tensor: Any, param: Any, *, placements: bool = True) -> Any:
    """Return state laid out over ranks as its parameter is; itself if it is so already.

    A plain tensor is cut by each rank for itself. All ranks of the meshes must come here if `needs_ranks`.

    Args:
        tensor: state of the parameter, in any layout, without a history of gradients.
        param: the parameter.
        placements: whether state has the parameter's shape, and so its placements; any other is kept as it is on the
            parameter's mesh, or else put there as a whole on every rank.
    """
    if sharding_mismatch(tensor, param, placements=placements) is None:
        return tensor
    if is_sharded(tensor) and is_sharded(param) and _are_redistributed(tensor, param):
        return tensor.redistribute(param.device_mesh, param.placements)
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return _cut(whole, param, placements=placements) if is_sharded(param) else whole


def _are_redistributed(tensor: Any, param: Any) -> bool:
    """Return whether torch gets from one layout to the other; of strided shards torch 2.13 makes wrong ones."""
    strided = any(map(_is_strided, (*tensor.placements, *param.placements)))
    return tensor.device_mesh == param.device_mesh and not strided


def _cut(whole: Tensor, param: Any, *, placements: bool) -> Tensor:
    """Return the part of a plain tensor that this process holds of a sharded one."""
    from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: PLC0415 (there is a sharded parameter)

    mesh = param.device_mesh
    chosen = param.placements if placements else [Replicate()] * mesh.ndim
    part = distribute_tensor(whole, mesh, chosen, src_data_rank=None)
    make = torch.empty_like if placements else torch.Tensor.new_empty
    of = (param,) if placements else (param, whole.shape)
    made: Tensor = make(*of, dtype=whole.dtype, requires_grad=False)
    sharded_type().to_local(made).copy_(part.to_local())
    return made


def _is_strided(placement: Any) -> bool:
    """Return whether a placement is that of FSDP on top of tensor parallelism, where shards interleave."""
    from torch.distributed.tensor.placement_types import _StridedShard  # noqa: PLC0415

    return isinstance(placement, _StridedShard)


def has_blocks(tensor: Any) -> bool:
    """Return whether every rank holds one block of a sharded tensor, as DTensors without strided shards do."""
    sizes, placements = tensor.device_mesh.shape, tensor.placements
    for index, placement in enumerate(placements):
        if placement.is_partial():
            return False
        if _is_strided(placement):
            later = zip(sizes[index + 1 :], placements[index + 1 :], strict=True)
            factor = math.prod(size for size, other in later if other.is_shard(placement.dim))
            if factor != placement.split_factor:
                return False
    return True


def block_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offsets of the block of a sharded tensor that this rank holds; it must have `has_blocks`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offsets)


def misplaced_shard(tensor: Any) -> str | None:
    """Return how this rank's shard is not what the placements of its tensor say, None if it is."""
    expected, held = block_of(tensor)[0], tuple(sharded_type().to_local(tensor).shape)
    return None if expected == held else f"has a shard of shape {held} on this rank, its placements say {expected}"


@contextmanager
def refused_together(meshes: Iterable[Any]) -> Iterator[None]:
    """Let all ranks of meshes raise if one of them raises inside of the `with` block; nothing without meshes.

    Raises:
        ValueError: another rank has raised.
    """
    asked = list(dict.fromkeys(meshes))
    asked = asked * min(len(asked), 2)  # what one mesh has told, another's ranks must hear too
    try:
        yield
    except BaseException:
        for mesh in asked:
            _count(mesh, 1)
        raise
    others = 0
    for mesh in asked:
        others = max(others, _count(mesh, int(others > 0)))
    if others:
        raise ValueError("the state dict was refused on another rank; nothing was loaded")


def _count(mesh: Any, failing: int) -> int:
    """Return on how many ranks of a mesh something has failed."""
    from torch import distributed  # noqa: PLC0415 (there is a mesh)

    if mesh.get_coordinate() is None:
        return failing
    told = torch.tensor([failing], dtype=torch.int64, device=mesh.device_type)
    for dimension in range(mesh.ndim):
        distributed.all_reduce(told, group=mesh.get_group(dimension))
    return int(told)


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
