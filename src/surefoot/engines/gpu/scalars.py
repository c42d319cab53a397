"""Scalars of many parameters, each a 0-d tensor of its own on the device, read and written in one launch.

The two kernels are plain functions here, and Triton's when they are first launched; it takes no annotation but its own.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from surefoot.engines.gpu.compile import jitted
from surefoot.engines.gpu.tables import Table, capturing, keep_for_graphs, on
from surefoot.tensors.gate import admit
from surefoot.tensors.native.guards import VersionCounters

_BLOCK = 256


def gather(table, values, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """Read numbers from `count` addresses: float64 if WIDE, else float32."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(table + lane, lane < count, other=0)
    if WIDE:
        number = tl.load(place.to(tl.pointer_type(tl.float64)), lane < count)
    else:
        number = tl.load(place.to(tl.pointer_type(tl.float32)), lane < count).to(tl.float64)
    tl.store(values + lane, number, lane < count)


def scatter(table, values, found_inf, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """Write numbers to `count` addresses, unless `found_inf` is there and not zero."""
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) != 0, 0, count)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(table + lane, lane < count, other=0)
    number = tl.load(values + lane, lane < count, other=0.0)
    if WIDE:
        tl.store(place.to(tl.pointer_type(tl.float64)), number, lane < count)
    else:
        tl.store(place.to(tl.pointer_type(tl.float32)), number.to(tl.float32), lane < count)


class Scattered:
    """0-d tensors of one dtype, float32 or float64, on one device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device, self._wide = tensors[0].device, tensors[0].dtype is torch.float64
        self._pointers = admit([tensors], [""], "scalar state {}".format).addresses[0]
        self._table = Table(self._pointers, self._device, for_graphs=1)
        self._count, self._versions = len(tensors), VersionCounters(tensors)

    def read(self) -> Tensor:
        """Return the numbers: float64 of shape (tensors,)."""
        self._table.update(self._pointers)
        if capturing(self._device):
            keep_for_graphs(self._table.there)
        values = torch.empty(self._count, dtype=torch.float64, device=self._device)
        self._launch(gather, values)
        return values

    def write(self, values: Tensor, found_inf: Tensor | None) -> None:
        """Set the numbers from float64 of shape (tensors,), unless `found_inf` is there and not zero."""
        self._launch(scatter, values, found_inf)
        self._versions.count()

    def _launch(self, function: Callable[..., None], *arguments: Tensor | None) -> None:
        with on(self._device):
            jitted(function, "count")[(triton.cdiv(self._count, _BLOCK),)](
                self._table.there, *arguments, self._count, WIDE=self._wide, BLOCK=_BLOCK, enable_fp_fusion=True
            )
