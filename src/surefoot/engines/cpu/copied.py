"""Tensors that are not flat memory, their own or that of their gradient: copied, stepped there, and copied back.

What does not change is made once: where copies stand, and which views of parameters and state they are of.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.compile import Kernel
from surefoot.engines.bucket import Bucket
from surefoot.engines.cpu.launch import TensorLaunch
from surefoot.rule import Rule
from surefoot.storage import BLOCK
from surefoot.tensors.gate import admit, admit_scales
from surefoot.tensors.memory import is_dense, same_dense_layout
from surefoot.tensors.modes import outside_inference

TILE = 131072
"""Elements of irregular tensors that are copied at a time."""
_GRADIENT = 1


def copying(bucket: Bucket, grads: Sequence[Tensor], rows: Iterable[int]) -> list["CopyLaunch"]:
    """Return launches of some tensors of a bucket, each of as many, or of such tiles, as come to `TILE` elements."""
    columns, together = (bucket.params, grads, *bucket.slots, *bucket.parts), list[list[_Tile]]()
    for row in rows:
        whole = [column[row].detach() for column in columns]
        for views in cut(whole, TILE) if bucket.is_plain else [whole]:
            if not together or _size(together[-1]) + views[0].numel() > TILE:
                together.append([])
            together[-1].append(_Tile.of(row, views, whole[_GRADIENT]))
    most = max(map(_size, together), default=0)
    with outside_inference():  # later steps write them in another mode
        rooms = [torch.empty(most, dtype=column[0].dtype) for column in columns]
    return [CopyLaunch(bucket, tiles, rooms) for tiles in together]


class _Tile(NamedTuple):
    """A tensor that is not flat memory, or a tile of one.

    Attributes:
        row: the position of the tensor in its bucket.
        views: of the parameter, the gradient, each slot, and what stands beside them; None for the gradient, which is
            another at every step.
        gradient: shape and strides of its view of the gradient, and how far behind the first element that begins.
    """

    row: int
    views: Sequence[Tensor | None]
    gradient: tuple[torch.Size, Sequence[int], int]

    @classmethod
    def of(cls, row: int, views: Sequence[Tensor], grad: Tensor) -> "_Tile":
        """Return a tile, given its views; `grad` is all of the gradient."""
        own = views[_GRADIENT]
        kept = [None if column == _GRADIENT else view for column, view in enumerate(views)]
        return cls(row, kept, (own.shape, own.stride(), int(own.storage_offset() - grad.storage_offset())))

    def gradient_of(self, grads: Sequence[Tensor]) -> Tensor:
        """Return its view of a gradient that is laid out like the one that it was made from."""
        grad, (shape, strides, offset) = grads[self.row], self.gradient
        return grad if grad.shape == shape else grad.as_strided(shape, strides, int(grad.storage_offset()) + offset)

    def flat(self, rooms: Sequence[Tensor], start: int, *, in_order: bool) -> list[Tensor]:
        """Return where it is stepped: its views where these are flat memory together, and room for copies otherwise.

        Args:
            rooms: memory for the copies of each column.
            start: where its own begins in that.
            in_order: whether elements must be in C order.
        """
        shape, first = self.gradient[0], self.views[0]
        dense = first is not None and is_dense(first) and not in_order
        strides = first.stride() if dense and first is not None else torch.empty(shape, device="meta").stride()
        found = []
        for view, room in zip(self.views, rooms, strict=True):
            if view is None or view.shape == shape:
                copy = room.as_strided(shape, strides, start)
            else:  # a scale for each block
                copy = room[start : start + view.numel()].view(view.shape)
            found.append(copy if view is None or not same_dense_layout([copy, view]) else view)
        return found


def _size(tiles: Sequence[_Tile]) -> int:
    return sum(tile.gradient[0].numel() for tile in tiles)


class CopyLaunch(TensorLaunch):
    """A launch of tensors that are not flat memory, or of tiles of them: what is laid out otherwise is copied.

    Attributes:
        owners: for each tile the position of its tensor in the bucket.
    """

    def __init__(self, bucket: Bucket, tiles: Sequence[_Tile], rooms: Sequence[Tensor]) -> None:
        sizes = np.array([_size([tile]) for tile in tiles], dtype=np.int64)
        super().__init__(len(rooms), sizes)
        self._tiles, self._kept = tiles, bucket.kept
        self.owners = np.array([tile.row for tile in tiles], dtype=np.int64)
        starts = (np.cumsum(sizes) - sizes).tolist()
        ordered = not bucket.is_plain
        rows = [tile.flat(rooms, at, in_order=ordered) for tile, at in zip(tiles, starts, strict=True)]
        self._gradients = [row[_GRADIENT] for row in rows]
        self._others = [
            (column, view, copy)
            for tile, row in zip(tiles, rows, strict=True)
            for column, (view, copy) in enumerate(zip(tile.views, row, strict=True))
            if view is not None and view is not copy
        ]
        self._admit(list(map(list, zip(*rows, strict=True))), len(bucket.slots))
        if bucket.is_rounded:
            known = [bucket.identities[tile.row] for tile in tiles]
            self.set_random(bucket.seed, [who.number for who in known], [who.first or 0 for who in known])

    def _admit(self, columns: Sequence[Sequence[Tensor]], slots: int) -> None:
        """Let the tensors of all columns pass the gate."""
        shaped = 2 + slots + (self._kept[0].correction is not None)
        arrays = admit(columns[:shaped], [""] * shaped, "a copy".format)
        for scales in columns[shaped:]:
            arrays = admit_scales(arrays, scales, BLOCK, "", "a copy".format)
        self.pointers[:] = arrays.addresses
        self.set_limits(arrays.addresses, arrays.available)

    def run_copied(
        self, rule: Rule, kernel: Kernel, grads: Sequence[Tensor], numbers: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Run the kernel of a rule on copies, and copy back what that has written.

        Args:
            rule: the rule.
            kernel: its kernel.
            grads: the gradients of all tensors of the bucket.
            numbers: the coefficients, see `numbers_of`.
            rows: for each tensor of the bucket its row of these.

        Returns:
            What it measured of each tile.
        """
        self.rows[:] = rows[self.owners]
        torch._foreach_copy_(self._gradients, [tile.gradient_of(grads) for tile in self._tiles])
        for _, view, copy in self._others:
            copy.copy_(view)
        measured = self.run(kernel, numbers, rule.reductions)
        if self._others:
            own = rule.written
            parts = (new for kept, new in zip(self._kept, own, strict=False) if kept.part)
            written = dict(enumerate((own[0], False, *own[1:], *parts)))
            for column, view, copy in self._others:
                if written.get(column):
                    view.copy_(copy)
        return measured


def cut(tensors: Sequence[Tensor], most: int) -> Iterator[Sequence[Tensor]]:
    """Cut tensors of one shape into views of at most `most` elements, along the first tensor's widest strides."""
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.numel() <= most:
        yield tensors
        return
    dimension = max((d for d in range(first.dim()) if first.size(d) > 1), key=first.stride)
    half = first.size(dimension) // 2
    for start, length in ((0, half), (half, first.size(dimension) - half)):
        yield from cut([tensor.narrow(dimension, start, length) for tensor in tensors], most)
