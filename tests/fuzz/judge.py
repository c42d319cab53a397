"""What is right: which state and gradients must or may be refused, and how far a step may be from its twin's."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from memory import is_number, lacks_memory, local, overlapping, overlaps_itself, storage_of, tensors_in
from torch import Tensor, nn
from worlds import SCALARS, World

import surefoot
from surefoot.rule import EMA


def stepped(world: World) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], Tensor]]:
    """Yield the parameters that a step is to update, with their optimizers and groups."""
    for optimizer in world.optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield optimizer, group, param


def written_by_step(world: World) -> list[Tensor]:
    """Return the tensors that a step may write."""
    found = []
    for optimizer, _, param in stepped(world):
        found.append(local(param))
        found += [tensor for _, tensor in tensors_in(optimizer.state.get(param, {}), "")]
    if world.setting.algorithm == "LBFGS":
        found += [tensor for state in world.optimizer.state.values() for _, tensor in tensors_in(state, "")]
        found += [param.grad for param in world.params if param.grad is not None]
    return found


# What does not fit


def lost_memory(world: World) -> list[str]:
    """Return what a step would use although its memory is gone: torch would read or write where others live."""
    found = []
    for optimizer, _, param in stepped(world):
        state = optimizer.state.get(param, {})
        state = state.items() if isinstance(state, Mapping) else ()
        held = [(f"state {name}", value) for name, value in state if isinstance(value, Tensor)]
        for what, tensor in (("param", param), ("grad", param.grad), *held):
            if lacks_memory(tensor):
                found.append(what)
    return found


def has_bad_indices(world: World) -> bool:
    """Whether a sparse gradient has rows where its shape has none; torch would write there."""
    for _, _, param in stepped(world):
        grad = param.grad
        if grad.layout is torch.sparse_coo and (index := grad._indices()).numel():
            limit = torch.tensor(grad.shape[: len(index)])[:, None]
            if bool(((index < 0) | (index >= limit)).any()):
                return True
    return False


def misfits(world: World) -> tuple[list[str], list[str]]:
    """Return what must be refused, and what may be: state and gradients that are not of their parameter's kind.

    This is the intended contract, told independently of how surefoot checks it.
    """
    must, may = [f"no memory: {what}" for what in lost_memory(world)], []
    if world.setting.algorithm == "LBFGS":  # its closure gives gradients, and its state is of all parameters
        must = [text for text in must if text != "no memory: grad"]
        return must + ["param: dtype class" for *_, p in stepped(world) if not is_number(p)], ["LBFGS"]
    if has_bad_indices(world):
        must.append("rows outside")
    written: list[Tensor] = []
    for optimizer, group, param in stepped(world):
        state = optimizer.state.get(param, {})
        if not isinstance(state, dict):
            may.append("state is not a dict")
            continue
        _misfits_of_parameter(param, must, may)
        declared = optimizer.spec.of(group).slots if isinstance(optimizer, surefoot.Optimizer) else ()
        slots = {slot.name: slot.shape_for(param, group) for slot in (*declared, EMA)}
        for name, value in state.items():
            if name in SCALARS:
                _misfits_of_scalar(value, may)
            elif name in slots and value is None:
                may.append("state: None")
            elif name in slots:
                _misfits_of_slot(param, value, slots[name], must, may)
        written += [param, *(t for n, t in state.items() if isinstance(t, Tensor) and (n in SCALARS or n in slots))]
    written = [tensor for tensor in written if tensor.layout is torch.strided]
    if overlapping(written) or any(
        storage_of(param.grad) is not None and overlapping([*written, param.grad]) for *_, param in stepped(world)
    ):
        may.append("overlapping")
    return must, may


def _misfits_of_parameter(param: Tensor, must: list[str], may: list[str]) -> None:
    """Add what of a parameter and its gradient does not fit."""
    grad = param.grad
    if not is_number(param):
        must.append("param: dtype class")
    if grad.shape != param.shape:
        must.append("grad: shape")
    if grad.device != param.device:
        must.append("grad: device")
    if not is_number(grad) or grad.is_complex() != param.is_complex():
        must.append("grad: dtype class")
    if grad.dtype != param.dtype or type(grad) is not Tensor or grad.layout is not torch.strided:
        may.append("grad: dtype, type or layout")
    if type(param) is not nn.Parameter or param.is_inference() or overlaps_itself(param) or param._is_zerotensor():
        may.append("param overlaps itself, or is not a plain tensor")


def _misfits_of_scalar(value: Any, may: list[str]) -> None:
    """Add what of a step count or the like is unusual."""
    if not isinstance(value, Tensor) or value.dim() or value.dtype not in (torch.float32, torch.float64):
        may.append("scalar")


def _misfits_of_slot(param: Tensor, value: Any, shape: Any, must: list[str], may: list[str]) -> None:
    """Add what of a slot does not fit its parameter."""
    if not isinstance(value, Tensor):
        must.append("state: no tensor")
        return
    if value.shape != shape:
        must.append("state: shape")
    if value.device != param.device:
        must.append("state: device")
    if not is_number(value) or value.is_complex() != param.is_complex():
        must.append("state: dtype class")
    if value.layout is not torch.strided:
        must.append("state: layout")
    elif overlaps_itself(value) or value._is_zerotensor() or type(value) is not Tensor or value.requires_grad:
        may.append("state overlaps itself, or is not a plain tensor")


def torch_writes_elsewhere(world: World) -> bool:
    """Whether torch's own step would write beside a tensor: adding sparse vectors, it counts offsets twice."""
    of_rows = ((o, param) for o, _, param in stepped(world) if param.grad.layout is torch.sparse_coo)
    written = ([param, *(t for _, t in tensors_in(o.state.get(param, {}), ""))] for o, param in of_rows)
    return any(tensor.storage_offset() for tensors in written for tensor in tensors)


# How worlds are compared


def tolerance(dtypes: Iterable[torch.dtype], *, loose: bool) -> tuple[float, float]:
    """Return the relative and the absolute difference that rounding explains."""
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    factor = 2000 if loose else 12 if coarsest > 1e-4 else 300
    return min(0.2, factor * coarsest), min(0.1, factor * coarsest / (1 if loose or coarsest > 1e-4 else 4))


def difference(ours: World, twin: World) -> str | None:
    """Say where two worlds differ in parameters or state by more than rounding; None if they do not."""
    pairs: list[tuple[str, Tensor, Tensor, torch.dtype]] = []
    for index, (left, right) in enumerate(zip(ours.params, twin.params, strict=True)):
        pairs.append((f"param {index}", left, right, coarsest((ours, twin), index)))
    if ours.setting.algorithm != "LBFGS":
        for optimizer, other in zip(ours.optimizers, twin.optimizers, strict=True):
            found = _state_pairs(ours, twin, optimizer, other, pairs)
            if found:
                return found
    return next(filter(None, (_difference(*pair, loose=ours.setting.loose) for pair in pairs)), None)


def _state_pairs(ours: World, twin: World, optimizer: Any, other: Any, pairs: list[Any]) -> str | None:
    for index, (param, partner) in enumerate(zip(ours.params, twin.params, strict=True)):
        mine, theirs = optimizer.state.get(param, {}), other.state.get(partner, {})
        if not isinstance(mine, dict) or not isinstance(theirs, dict):
            continue
        mine, theirs = ({k: v for k, v in state.items() if v is not None} for state in (mine, theirs))
        if mine.keys() != theirs.keys():
            return f"state of param {index} has {sorted(mine)}, the twin's {sorted(theirs)}"
        for name in mine:
            left, right = mine[name], theirs[name]
            if isinstance(left, int | float | np.number) or isinstance(right, int | float | np.number):
                left, right = (torch.as_tensor(value, dtype=torch.float64) for value in (left, right))
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                pairs.append((f"state {name!r} of param {index}", left, right, coarsest((ours, twin), index)))
            elif type(left) is not type(right):
                return f"state {name!r} of param {index} is {type(left)}, the twin's {type(right)}"
    return None


def _in_one_memory(world: World, index: int) -> list[Tensor]:
    """Return a parameter and those that stand in the same storage."""
    param = world.params[index]
    own = storage_of(param)
    if own is None or not own.data_ptr():
        return [param]
    storages = [(other, storage_of(other)) for other in world.params]
    return [other for other, storage in storages if storage is not None and storage.data_ptr() == own.data_ptr()]


def coarsest(worlds: Iterable[World], index: int) -> torch.dtype:
    """Return the coarsest dtype among a parameter, its gradient and its state, and those of others in its memory."""
    tensors: list[Tensor] = []
    pairs = [(world, param) for world in worlds for param in _in_one_memory(world, index)]
    for world, param in pairs:
        tensors += [param, *([] if param.grad is None else [param.grad])]
        for optimizer in world.optimizers:
            state = optimizer.state.get(param)
            if isinstance(state, dict):
                tensors += [t for name, t in state.items() if isinstance(t, Tensor) and name not in SCALARS]
    dtypes = [t.dtype for t in tensors if t.is_floating_point() or t.is_complex()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _difference(what: str, left: Tensor, right: Tensor, computed: torch.dtype, *, loose: bool) -> str | None:
    left, right = (local(t).detach() for t in (left, right))
    for kind in ("shape", "device", "dtype"):
        one, other = getattr(left, kind), getattr(right, kind)
        if one != other and not (kind == "dtype" and one.is_complex == other.is_complex):
            return f"{what} has {kind} {one}, the twin's {other}"
    if left.is_meta or lacks_memory(left) or lacks_memory(right):
        return None
    if left.layout is not torch.strided or right.layout is not torch.strided:
        left, right = left.to_dense(), right.to_dense()
    if left.dtype is right.dtype is torch.complex32:  # torch can do next to nothing with it
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    if left.dtype is right.dtype and torch.equal(left, right):
        return None
    kinds = [d for d in (left.dtype, right.dtype, computed) if d.is_floating_point or d.is_complex]
    relative, absolute = tolerance(kinds or [torch.float32], loose=loose)
    if left.dtype is right.dtype and is_number(left) and (left - right).abs().max().item() <= absolute:
        return None
    wide = torch.complex128 if left.is_complex() else torch.float64
    left, right = left.to(wide), right.to(wide)
    close = torch.isclose(left, right, rtol=relative, atol=absolute, equal_nan=True)
    if bool(close.all()):
        return None
    worst = (left - right).abs().nan_to_num(torch.inf).masked_fill(close, 0).flatten().argmax()
    one, other = (t.flatten()[worst].item() for t in (left, right))
    return f"{what} of {kinds}: {int((~close).sum())} of {close.numel()} elements differ, e.g. {one} and {other}"


def synchronize(ours: World, twin: World) -> None:
    """Return the twin our numbers, so that the roundings of 16 bits do not add up from step to step."""
    pairs: list[Any] = [("", param, other, param.dtype) for param, other in zip(ours.params, twin.params, strict=True)]
    for optimizer, other in zip(ours.optimizers, twin.optimizers, strict=True):
        _state_pairs(ours, twin, optimizer, other, pairs)
    for _, left, right, _ in pairs:
        synchronize_tensor(left.detach(), right.detach())


def synchronize_tensor(left: Tensor, right: Tensor) -> None:
    """Return the right one the numbers of the left, as far as both are plain."""
    plain = left.layout is right.layout is torch.strided and not left._is_zerotensor() and not right._is_zerotensor()
    plain = plain and not lacks_memory(left) and not lacks_memory(right)
    if plain and not overlaps_itself(right) and left.shape == right.shape and left.device == right.device:
        with torch.no_grad():
            right.copy_(left)


def tensor_difference(what: str, left: Tensor, right: Tensor, computed: torch.dtype) -> str | None:
    """Say how two tensors differ by more than rounding, in `computed` at the coarsest; None if they do not."""
    return _difference(what, left, right, computed, loose=False)
