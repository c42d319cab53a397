"""The gate: whatever reaches a kernel is proved here to be memory of the tensors that it is said to belong to.

Addresses for kernels come from here or, between steps, from guards that watch all that was proved.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from surefoot.tensors.memory import PLAIN, bytes_available, bytes_spanned, has_memory, is_plain, same_dense_layout


class Arrays(NamedTuple):
    """What kernels take of some tensors: n rows (a parameter each) of k arrays (parameter, gradient, slots).

    Attributes:
        addresses: of the first elements: int64 of shape (k, n).
        available: bytes of live storage from each address on: int64 of shape (k, n).
        sizes: elements of every array of a row: int64 of shape (n,).
        dtypes: dtypes of the k arrays, one for all rows.
        flat: whether the arrays of a row are dense and order their elements alike, so that a kernel may take them as
            flat memory: bool of shape (n,).
    """

    addresses: np.ndarray
    available: np.ndarray
    sizes: np.ndarray
    dtypes: tuple[torch.dtype, ...]
    flat: np.ndarray


def admit(columns: Sequence[Sequence[Tensor]], prefixes: Sequence[str], row_name: Callable[[int], str]) -> Arrays:
    """Return tensors as arrays for a kernel, all of which belong to them.

    Args:
        columns: k lists of n tensors; those at one position are a row.
        prefixes: for each of the k columns what stands before the name of a row in a message.
        row_name: what the row at a position is called in a message.

    Raises:
        RuntimeError: a tensor is not plain memory, differs from its row in shape or device or from its column in
            dtype, or ends beyond its storage.  The message names it.
    """
    for position, row in enumerate(zip(*columns, strict=True)):
        for prefix, column, tensor in zip(prefixes, columns, row, strict=True):
            if (reason := _refusal(tensor, row[0], column[0].dtype)) is not None:
                raise RuntimeError(f"{prefix}{row_name(position)} {reason}")
    return Arrays(
        addresses=_table(columns, Tensor.data_ptr),
        available=_table(columns, bytes_available),
        sizes=np.array([row[0].numel() for row in zip(*columns, strict=True)], dtype=np.int64),
        dtypes=tuple(column[0].dtype for column in columns),
        flat=np.array([same_dense_layout(row) for row in zip(*columns, strict=True)], dtype=bool),
    )


def admit_scales(
    arrays: Arrays, scales: Sequence[Tensor], block: int, prefix: str, row_name: Callable[[int], str]
) -> Arrays:
    """Return arrays with one more behind them: a scale for each block of a row's elements, in C order.

    Raises:
        RuntimeError: scales are not plain memory that follows one after the other, or there are fewer than blocks.
    """
    more = admit([scales], [prefix], row_name)
    for position, scale in enumerate(scales):
        needed = -(-int(arrays.sizes[position]) // block)
        if scale.numel() < needed or not scale.is_contiguous():
            raise RuntimeError(
                f"{prefix}{row_name(position)} has shape {tuple(scale.shape)} and strides {scale.stride()}, must be "
                f"contiguous and have at least {needed} elements"
            )
    return Arrays(
        addresses=np.concatenate([arrays.addresses, more.addresses]),
        available=np.concatenate([arrays.available, more.available]),
        sizes=arrays.sizes,
        dtypes=arrays.dtypes + more.dtypes,
        flat=arrays.flat,
    )


def _table(columns: Sequence[Sequence[Tensor]], value: Callable[[Tensor], int]) -> np.ndarray:
    return np.array([[value(tensor) for tensor in column] for column in columns], dtype=np.int64)


def _refusal(tensor: Tensor, first: Tensor, dtype: torch.dtype) -> str | None:
    """Return why a kernel must not take a tensor, None if it may."""
    if not is_plain(tensor):
        return f"is {torch.typename(tensor)} of layout {tensor.layout}, must be a plain tensor with memory of its own"
    if tensor.shape != first.shape:
        return f"has shape {tuple(tensor.shape)}, must have {tuple(first.shape)}"
    if tensor.device != first.device:
        return f"is on {tensor.device}, must be on {first.device}"
    if tensor.dtype != dtype:
        return f"is {tensor.dtype}, must be {dtype}"
    return lost_memory(tensor)


def lost_memory(tensor: Tensor) -> str | None:
    """Return what of a strided tensor's memory is not there any more, None if all of it is."""
    needed, available = bytes_spanned(tensor), bytes_available(tensor)
    if needed <= max(available, 0):
        return None
    held = tensor.untyped_storage().nbytes()
    return f"has lost memory: its storage has been resized to {held} bytes, it needs {needed} from its address on"


def admit_rows(grad: Tensor, name: Callable[[], str]) -> Tensor:
    """Return a sparse (COO) gradient that has every row once, and only rows of its own shape.

    Args:
        grad: the gradient.
        name: return what its parameter is called in a message.

    Raises:
        IndexError: an index is outside of the gradient's shape, as far as that is known without waiting for a device.
        RuntimeError: the storage of its indices or values has been resized to less than they take.
    """
    if type(grad) in PLAIN:
        what, indices = f"a sparse gradient of shape {tuple(grad.shape)}", grad._indices()
        if not (has_memory(indices) and has_memory(grad._values())):
            raise RuntimeError(f"{name()}: {what} has no memory for its values any more")
        # Before rows are put together, for which torch takes their indices as they are.
        index = indices.numpy() if grad.is_cpu else np.zeros((0, 0))
        if index.size and (index.min() < 0 or (index.max(axis=1) >= grad.shape[: len(index)]).any()):
            raise IndexError(f"{name()}: {what} has indices outside of it")
    return grad.coalesce()
