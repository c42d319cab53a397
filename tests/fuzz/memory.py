"""Memory of tensors: what it holds, which bytes are whose, and snapshots that tell what a step has changed."""

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from worlds import World, options_of


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the strided tensors in a nested value, with where they stand."""
    if isinstance(value, Tensor):
        if value.layout is torch.sparse_coo:
            yield f"{path}.indices", value._indices()
            yield f"{path}.values", value._values()
        elif value.layout is torch.strided:
            yield path, local(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{index}]")


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, any other as it is."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage has become smaller than the tensor."""
    if tensor.layout is torch.sparse_coo:
        return lacks_memory(tensor._values()) or lacks_memory(tensor._indices())
    tensor = local(tensor)
    if not tensor.numel() or storage_of(tensor) is None:
        return False
    if tensor.is_contiguous():
        last = tensor.numel() - 1
    else:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() < (tensor.storage_offset() + last + 1) * tensor.element_size()


def is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements of a tensor share memory."""
    if tensor.layout is not torch.strided:
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < expected:
            return tensor.numel() > 0
        expected = stride * (size - 1) + expected
    return False


def overlapping(tensors: list[Tensor]) -> bool:
    """Whether two tensors share memory; as far as the ranges of bytes tell, or exactly where they might."""
    ranges = []
    for tensor in map(local, tensors):
        if tensor.numel() and storage_of(tensor) is not None:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            start = tensor.data_ptr() if not lacks_memory(tensor) else 0
            ranges.append((start, start + last * tensor.element_size(), tensor))
    ranges.sort(key=lambda item: item[:2])
    reached = -1
    for start, end, _ in ranges:
        if start < reached and start:
            return _overlap_exactly(tensors)
        reached = max(reached, end)
    return False


def _overlap_exactly(tensors: list[Tensor]) -> bool:
    masks: dict[int, np.ndarray] = {}
    for tensor in map(local, tensors):
        storage = storage_of(tensor)
        if storage is None or not tensor.numel() or lacks_memory(tensor):
            continue
        mask = masks.setdefault(storage.data_ptr(), np.zeros(storage.nbytes(), dtype=bool))
        own = np.zeros_like(mask)
        mark(own, tensor)
        if (mask & own).any():
            return True
        mask |= own
    return False


def _identity(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor | list | dict | np.ndarray) else value


def same(left: Any, right: Any) -> bool:
    """Whether two described values are the same; NaN is itself."""
    return left == right or repr(left) == repr(right)


def mark(mine: np.ndarray, tensor: Tensor) -> None:
    """Set the bytes that a tensor consists of."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    strides = (*(stride * size for stride in tensor.stride()), 1)
    if tensor.numel():
        np.lib.stride_tricks.as_strided(mine[start:], (*tensor.shape, size), strides)[...] = True


def storage_of(tensor: Tensor) -> Any:
    """Return the storage of a tensor, None if it has no memory on the host."""
    if tensor.layout is not torch.strided or not tensor.is_cpu or tensor._is_zerotensor():
        return None
    return tensor.untyped_storage()


def facts_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a tensor is, its values aside; last the address of its storage."""
    storage = storage_of(tensor)
    address, length = (0, 0) if storage is None else (storage.data_ptr(), storage.nbytes())
    geometry = (tensor.shape, tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()
    return (id(type(tensor)), tensor.dtype, tensor.requires_grad, *geometry, length, address)


# Snapshots


def everything(world: World) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a world, with where they stand."""
    for index, param in enumerate(world.params):
        yield from tensors_in(param, f"param {index}")
        if param.grad is not None:
            yield from tensors_in(param.grad, f"grad {index}")
    for number, optimizer in enumerate(world.optimizers):
        for param, state in optimizer.state.items():
            position = next((i for i, p in enumerate(world.params) if p is param), "other")
            yield from tensors_in(state, f"state{number} {position}")
    yield from tensors_in(world.extras, "extra")


class Snapshot:
    """All that a user can see of a world, and the bytes of all memory that its tensors are views of."""

    def __init__(self, world: World) -> None:
        self.facts: dict[str, Any] = {}
        self.storages: dict[int, tuple[Any, bytes]] = {}
        self.others: dict[str, Any] = {}
        for path, tensor in everything(world):
            self._add(path, tensor)
        for number, optimizer in enumerate(world.optimizers):
            self._add_structure(f"optimizer{number}", optimizer)
        for index, param in enumerate(world.params):
            self.others[f"grad {index}"] = id(param.grad) if param.grad is not None else None

    def _add(self, path: str, tensor: Tensor) -> None:
        self.facts[path] = facts_of(tensor)
        if (storage := storage_of(tensor)) is not None and storage.data_ptr() not in self.storages:
            address = storage.data_ptr()
            self.storages[address] = storage, ctypes.string_at(address, storage.nbytes()) if address else b""

    def _add_structure(self, path: str, optimizer: torch.optim.Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            self.others[f"{path} group {index}"] = [id(param) for param in group["params"]]
            for name, value in options_of(group).items():
                self.others[f"{path} group {index} {name}"] = value.tolist() if isinstance(value, Tensor) else value
        for param, state in optimizer.state.items():
            if state:
                described = {key: _identity(value) for key, value in state.items()}
                self.others[f"{path} state {id(param)}"] = described

    def difference(self, world: World) -> str | None:
        """Say what a step that was refused has changed; None if nothing."""
        now = Snapshot(world)
        if world.setting.algorithm == "LBFGS":  # its closure gives gradients
            for one in (self, now):
                one.others = {path: value for path, value in one.others.items() if not path.startswith("grad")}
                one.facts = {path: value for path, value in one.facts.items() if not path.startswith("grad")}
        for mine, theirs in ((self.others, now.others), (self.facts, now.facts)):
            for path in mine.keys() | theirs.keys():
                if path not in mine or path not in theirs or not same(mine[path], theirs[path]):
                    return f"{path}: {mine.get(path, 'absent')} has become {theirs.get(path, 'absent')}"
        for address, (_, old) in self.storages.items():
            if address in now.storages and now.storages[address][1] != old:
                return f"memory of {self._owners(address)} has changed"
        return None

    def outside(self, world: World, written: Iterable[Tensor]) -> str | None:
        """Say what a step has changed outside of the tensors that it may write; None if nothing."""
        views: dict[int, list[Tensor]] = {}
        for tensor in written:
            if (storage := storage_of(tensor)) is not None:
                views.setdefault(storage.data_ptr(), []).append(tensor)
        for address, (storage, old) in self.storages.items():
            if storage.data_ptr() != address:
                continue  # resized during the step, by a hook
            if any(tensor.nbytes == len(old) and tensor.is_contiguous() for tensor in views.get(address, ())):
                continue
            new = ctypes.string_at(address, len(old)) if address else b""
            if new == old:
                continue
            mine = np.zeros(len(old), dtype=bool)
            for tensor in views.get(address, ()):
                mark(mine, tensor)
            changed = np.frombuffer(new, np.uint8) != np.frombuffer(old, np.uint8)
            if (changed & ~mine).any():
                return f"{int((changed & ~mine).sum())} bytes beside {self._owners(address)} were written"
        return None

    def _owners(self, address: int) -> str:
        return ", ".join(path for path, facts in self.facts.items() if facts[-1] == address)
