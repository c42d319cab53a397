"""Sharded tensors (DTensor): the part of one that this process holds, and laying one out as another is."""

import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

from surefoot.tensors.memory import PLAIN

_known: list[Any] = []


def sharded_type() -> Any:
    """Return DTensor if anything has imported it, else None."""
    if not _known and (found := getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)) is not None:
        _known.append(found)
    return _known[0] if _known else None


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    if type(tensor) in PLAIN:  # most are, and each is asked about some twenty times before a first step
        return False
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


def sharded_dim(placement: Any) -> int | None:
    """Return the dimension of a tensor that a placement divides over ranks, None if it divides none."""
    dim = getattr(placement, "dim", None)
    return None if placement.is_replicate() else dim


def placements_for(shape: torch.Size, param: Any) -> tuple[Any, ...]:
    """Return how a tensor that belongs to a sharded parameter is laid out: each part of it where its elements are.

    A dimension that both have alike is divided as the parameter's is; over ranks that divide another one the tensor is
    replicated.  A tensor that does not go with the parameter's elements, of no shape that broadcasts to its, is divided
    along its first dimension over all ranks that divide the parameter.
    """
    placements: tuple[Any, ...] = param.placements
    return placements if shape == param.shape else _placements_for(shape, param.shape, placements)


@functools.lru_cache(maxsize=1024)
def _placements_for(shape: torch.Size, whole: torch.Size, placements: tuple[Any, ...]) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415 (there is a sharded tensor)

    dims = [sharded_dim(each) for each in placements]
    if not _broadcasts(shape, whole):
        return tuple(Replicate() if dim is None else Shard(0) for dim in dims)
    kept = [dim is not None and len(shape) == len(whole) and shape[dim] == whole[dim] for dim in dims]
    return tuple(each if keep else Replicate() for each, keep in zip(placements, kept, strict=True))


def _broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    """Return whether a shape broadcasts to another."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(size in (1, other) for size, other in pairs)


def local_shape_for(shape: torch.Size, param: Any) -> torch.Size:
    """Return the shape of this process's shard of a tensor that is laid out by `placements_for`."""
    placements = placements_for(shape, param)
    if not _broadcasts(shape, param.shape):
        return torch.Size(_block_of(shape, param.device_mesh, placements)[0])
    local, divided = to_local(param).shape[: param.dim()], set(map(sharded_dim, placements))
    return torch.Size(local[dim] if dim in divided else size for dim, size in enumerate(shape))


def has_whole_blocks(param: Any, block: int) -> bool:
    """Return whether blocks of so many elements along the last dimension of a sharded tensor lie on one rank each."""
    divided = set(map(sharded_dim, param.placements))
    last = param.dim() - 1
    return last > 0 and param.shape[-1] % block == 0 and not divided & {last, -1}


def full_for(shape: torch.Size, param: Any, value: Any, dtype: torch.dtype) -> Any:
    """Return a new sharded tensor of one value that belongs to a sharded parameter, laid out by `placements_for`."""
    local = to_local(param).new_full(local_shape_for(shape, param), value, dtype=dtype)
    whole = torch.empty(shape, device="meta")
    return sharded_type().from_local(
        local, param.device_mesh, placements_for(shape, param), run_check=False, shape=shape, stride=whole.stride()
    )


def wrap_local(local: Tensor, like: Any, shape: torch.Size) -> Any:
    """Return this process's shard of what belongs to a sharded tensor as a sharded tensor, laid out as that is.

    Args:
        local: the shard.
        like: the sharded tensor.
        shape: of the whole; as that of `like` in all dimensions that are divided.
    """
    whole = torch.empty(shape, device="meta")
    return sharded_type().from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=whole.stride()
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
        return f"is {format_layout(tensor)}, must be a plain tensor" if is_sharded(tensor) else None
    expected = placements_for(tensor.shape, param) if placements else param.placements
    known = is_sharded(tensor) and tensor.device_mesh == param.device_mesh
    if not known or (placements and tensor.placements != expected):
        return f"is {format_layout(tensor)}, must be {_layout(expected, param.device_mesh)}"
    ours, shard = to_local(tensor).shape, to_local(param).shape
    if tensor.shape != param.shape:
        shard = local_shape_for(tensor.shape, param)
    if placements and ours != shard:
        return f"has a shard of shape {tuple(ours)} on this rank, the parameter's is {tuple(shard)}"
    return None


def format_layout(tensor: Any) -> str:
    """Return how a tensor is laid out over ranks, for a message."""
    return _layout(tensor.placements, tensor.device_mesh) if is_sharded(tensor) else "a plain tensor"


def _layout(placements: Sequence[Any], mesh: Any) -> str:
    shown = ", ".join(map(str, placements))
    return f"a DTensor of placements ({shown}) on a mesh of shape {tuple(mesh.shape)}"


def needs_ranks(tensor: Any, param: Any) -> bool:
    """Return whether `lay_out` asks other ranks; of tensors that all ranks describe alike, all get the same answer."""
    if not is_sharded(tensor):
        return False
    if not is_sharded(param) or tensor.device_mesh != param.device_mesh:
        return True
    return bool(tensor.placements != placements_for(tensor.shape, param))


def lay_out(tensor: Any, param: Any) -> Any:
    """Return state laid out over ranks as belongs to its parameter (`placements_for`); itself if it is so already.

    A plain tensor is cut by each rank for itself. All ranks of the meshes must come here if `needs_ranks`.

    Args:
        tensor: state of the parameter, in any layout, without a history of gradients.
        param: the parameter.
    """
    if sharding_mismatch(tensor, param) is None:
        return tensor
    if tensor.dtype is torch.int16:  # which gloo and NCCL do not carry
        return lay_out(tensor.to(torch.int32), param).to(torch.int16)
    if is_sharded(tensor) and is_sharded(param) and _are_redistributed(tensor, param):
        return tensor.redistribute(param.device_mesh, placements_for(tensor.shape, param))
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return _cut(whole, param) if is_sharded(param) else whole


def _are_redistributed(tensor: Any, param: Any) -> bool:
    """Return whether torch gets from one layout to the other; of strided shards torch 2.13 makes wrong ones."""
    strided = any(map(_is_strided, (*tensor.placements, *param.placements)))
    return tensor.device_mesh == param.device_mesh and not strided


def _cut(whole: Tensor, param: Any) -> Tensor:
    """Return the part of a plain tensor that this process holds of a sharded one."""
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 (there is a sharded parameter)

    part = distribute_tensor(whole, param.device_mesh, placements_for(whole.shape, param), src_data_rank=None)
    if whole.shape != param.shape:
        return part
    made: Tensor = torch.empty_like(param, dtype=whole.dtype, requires_grad=False)
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
    return _block_of(tensor.shape, tensor.device_mesh, tensor.placements)


def _block_of(shape: torch.Size, mesh: Any, placements: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    size, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(size), tuple(offsets)


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
