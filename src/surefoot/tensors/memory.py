"""Where a strided tensor's elements stand in memory: how far they reach, in which order, and whether they overlap."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.tensors.modes import is_stand_in

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors whose memory kernels may take for what the tensors mean."""
_MOST_WORK, _MOST_PAIRS, _MOST_OFFSETS = 10_000, 10_000, 1 << 20
"""How far overlaps are looked for exactly; beyond that, what may overlap counts as overlapping."""


def is_plain(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor holds what it means."""
    means_other = tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()
    return type(tensor) in PLAIN and not means_other and not is_stand_in(tensor)


def has_address(tensor: Tensor) -> bool:
    """Return whether a tensor has elements in memory, though lazily negated ones perhaps, or such of a subclass."""
    kind: Any = type(tensor)
    of_memory = kind in PLAIN or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    strided = of_memory and tensor.layout is torch.strided and not tensor._is_zerotensor()
    return strided and not is_stand_in(tensor)


def bytes_spanned(tensor: Tensor) -> int:
    """Return the bytes from the address of a strided tensor to the end of its last element."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def bytes_available(tensor: Tensor) -> int:
    """Return the bytes of a strided tensor's storage from the tensor's address on; negative if it begins beyond."""
    return tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.element_size()


def has_memory(tensor: Tensor) -> bool:
    """Return whether the storage of a strided tensor holds all of its elements; it may have been resized."""
    return bytes_spanned(tensor) <= max(bytes_available(tensor), 0)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements of a strided tensor fill its memory without gap or overlap."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def version(tensor: Tensor) -> int:
    """Return a number that grows with each write to a tensor, unless that went through `.data`."""
    return tensor._version


def counts_versions(tensor: Tensor) -> bool:
    """Return whether a tensor has such a number; one that was made in inference mode has none, whatever its data."""
    try:
        return version(tensor) >= 0
    except RuntimeError:
        return False


def is_always_writable(tensor: Tensor) -> bool:
    """Return whether a tensor may be written in every mode: neither it nor its data were made in inference mode."""
    return not tensor.is_inference() and counts_versions(tensor)


def is_writable(tensor: Tensor) -> bool:
    """Return whether a tensor may be written in the mode of now."""
    return torch.is_inference_mode_enabled() or is_always_writable(tensor)


def fingerprint(tensor: Tensor) -> Tensor:
    """Return a number that another content of a strided tensor hardly ever has, on its device: a 0-d int64 tensor.

    The words of its memory are mixed and multiplied with an odd number for their place, and added up modulo 2**64.
    """
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.as_strided((flat.numel(),), (1,)) if is_dense(flat) else flat.contiguous().view(-1)
    many = 8 // flat.element_size()
    aligned = not (flat.numel() % many or flat.storage_offset() % many)
    words = flat.view(torch.int64 if aligned else _WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words), _WORDS_AT_A_TIME):
        mixed = words[start : start + _WORDS_AT_A_TIME].to(torch.int64) * _MIXING
        places = torch.arange(start, start + len(mixed), device=flat.device) * 2 + 1
        total += ((mixed ^ (mixed >> 29)) * places).sum()
    return total


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIXING = -0x61C8864680B583EB  # the golden ratio in 64 bits, as a signed number
_WORDS_AT_A_TIME = 1 << 22


def same_dense_layout(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors of one shape are dense and order their elements alike, so that flat memory serves."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    order = _order(tensors[0])
    return is_dense(tensors[0]) and all(_order(tensor) == order for tensor in tensors)


def _order(tensor: Tensor) -> list[int]:
    """Return the strides that matter."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements of a strided tensor share memory, as those of an expanded one do."""
    if is_dense(tensor) or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return _repeats_an_offset(tensor)
        reach += (size - 1) * stride
    return False


def _repeats_an_offset(tensor: Tensor) -> bool:
    if 0 in _order(tensor) or tensor.numel() > _MOST_OFFSETS:
        return True
    offsets = np.zeros(1, dtype=np.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = (offsets[:, None] + stride * np.arange(size)).ravel()
    return len(np.unique(offsets)) < len(offsets)


def spans_are_apart(start: np.ndarray, size: np.ndarray) -> bool:
    """Return whether no two spans of memory, which begin at addresses and have so many bytes, meet."""
    order = np.argsort(start)
    reached = np.maximum.accumulate((start + size)[order])
    return bool((start[order][1:] >= reached[:-1]).all())


def shared_memory(
    tensors: Sequence[Tensor], counts: Callable[[int, int], bool] = lambda *_: True
) -> tuple[int, int] | None:
    """Return the positions of two strided tensors of one device that share memory, None if there are none.

    Args:
        tensors: the tensors.
        counts: whether a pair of positions counts.
    """
    start = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    spanned = np.fromiter(map(bytes_spanned, tensors), np.int64, len(tensors))
    if spans_are_apart(start, spanned):
        return None
    order = np.argsort(start, kind="stable").tolist()
    for count, (one, other) in enumerate(_near_pairs(start, start + spanned, order)):
        exact = count < _MOST_PAIRS
        if counts(one, other) and (not exact or _share_an_element(tensors[one], tensors[other])):
            return min(one, other), max(one, other)
    return None


def _near_pairs(start: np.ndarray, end: np.ndarray, order: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of tensors whose spans meet."""
    open_: list[int] = []
    for position in order:
        if not start[position]:
            continue  # what has no memory shares none
        open_ = [other for other in open_ if end[other] > start[position]]
        yield from ((other, position) for other in open_ if end[position] > start[position])
        open_.append(position)


class _Memory:
    """A tensor's memory as NumPy understands it on any device, to reason about and not to read."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


def _share_an_element(one: Tensor, other: Tensor) -> bool:
    try:
        return np.shares_memory(np.asarray(_Memory(one)), np.asarray(_Memory(other)), max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
