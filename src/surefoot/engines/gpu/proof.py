"""Whether a kernel does on a device what torch's operations do there: found out at its first use, and remembered.

The kernel and the foreach engine update equal small tensors.  What a comparison finds is kept in the folder of kernels,
and holds for the same source, launch, device, driver and releases of torch, Triton and surefoot.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen import store
from surefoot.engines import foreach
from surefoot.engines.bucket import Bucket, Coefficients
from surefoot.engines.gpu.compile import dialect_of
from surefoot.engines.gpu.plan import LAUNCH, Launch, Plan
from surefoot.engines.gpu.scalars import Scattered
from surefoot.engines.gpu.source import print_kernel
from surefoot.rule import Rule
from surefoot.storage import format_of

_SAME = "the same as torch's operations"
_GAP = 16
"""Elements between two tensors, which nobody may change: as many as keep the next one aligned, of any dtype."""
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


@functools.cache
def doubt(rule: Rule, dtypes: tuple[torch.dtype, ...], device: torch.device) -> str | None:
    """Return what speaks against the kernel of a rule on a device; None if it does there what torch's operations do.

    Args:
        rule: the rule.
        dtypes: those of parameters, gradients and slots.
        device: the device.
    """
    compute = torch.promote_types(dtypes[0], torch.float32)
    launch = LAUNCH[max(dtype.itemsize for dtype in dtypes)]
    source = print_kernel(rule, compute, tuple(map(format_of, dtypes)), dialect_of(device))
    key = hashlib.sha256("\n".join([source, repr(launch), *_circumstances(device)]).encode()).hexdigest()[:16]
    name = f"proof_{rule.name.lower()}_{key}.txt"
    if (kept := store.read(name)) is None:
        try:
            kept = (_difference(rule, dtypes, device, launch) or _SAME).encode()
        except Exception as error:  # noqa: BLE001 (whatever compiler and driver raise)
            return f"{type(error).__name__}: {error}"  # not kept: it may have been about memory or the disk
        store.write(name, source, kept)
    return None if kept == _SAME.encode() else kept.decode()


def _circumstances(device: torch.device) -> Iterator[str]:
    """Yield what a kernel's results depend on beside its source."""
    yield from (version("surefoot"), torch.__version__, version("triton"))
    yield from (path.read_text() for path in _DRIVERS if path.exists())
    yield "Triton's interpreter" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


@torch.inference_mode(mode=False)
@torch.no_grad()
def _difference(rule: Rule, dtypes: Sequence[torch.dtype], device: torch.device, launch: Launch) -> str | None:
    """Return where the kernel's results differ from those of torch's operations, None if they do not.

    Elements are left out at which torch's operations give something else when numbers of the update change in their
    last bits: a root of what nearly cancels, for instance.
    """
    results = []
    for by_kernel, shift in ((True, 0), (False, 0), (False, 1)):
        memory, bucket = _small(rule, dtypes, device, launch, shift)
        if by_kernel:
            Plan(bucket).run(bucket)
        else:
            foreach.run(bucket)
        results.append(memory if bucket.measured is None else [*memory, bucket.measured])
    names = ("parameters", "gradients", *(f"`{slot.name}`" for slot in rule.slots), "what it measures")
    for name, actual, expected, other in zip(names, *results, strict=False):
        if differing := _differing(actual, expected, other, bucket.compute_dtype):
            return f"{differing} of {actual.numel()} elements of {name} are not what torch's operations give"
    return _difference_of_scalars(device)


def _small(
    rule: Rule, dtypes: Sequence[torch.dtype], device: torch.device, launch: Launch, shift: int
) -> tuple[list[Tensor], Bucket]:
    """Return small tensors of all the ways that a kernel goes: in wide accesses, at their ends, by elements.

    They are views of one memory for parameters, one for gradients and one for each slot, which are returned as well.
    The numbers of the update are any in (0, 1), of two sets by turns, in which `shift` changes the last bits.
    """
    block, chunk = launch.block, launch.chunk
    sizes = (5, 1, 0, block, block + 8, 2 * chunk + 3 * block + 13, 2 * chunk, block + 31)
    ends = [*accumulate(size + -size % _GAP + _GAP for size in sizes)]
    starts = [0, *ends[:-2], ends[-2] + 1]  # the last begins where no wide access may
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((len(dtypes), ends[-1] + 1), generator=generator, dtype=torch.float32, device="cpu")
    values[1, :5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    values[2:].abs_()
    memory = [row.to(device, dtype, copy=True) for row, dtype in zip(values, dtypes, strict=True)]
    params, grads, *slots = (
        [row[start : start + size] for start, size in zip(starts, sizes, strict=True)] for row in memory
    )
    bucket = Bucket(rule, params, grads, {}, slots)
    eps = torch.finfo(bucket.compute_dtype).eps
    bucket.coefficients = [_numbers(rule, start, shift * eps) for start in (0.3, 0.4)]
    bucket.row = np.arange(len(sizes)) % 2
    return memory, bucket


def _numbers(rule: Rule, start: float, shift: float) -> Coefficients:
    """Return numbers of an update, of which no two nor their simple sums are alike."""
    ways = ((place, name) for place, name in enumerate(rule.coefficients, start=1))
    return {name: (start + 0.59 * (0.618034 * place % 1)) * (1 + shift * place) for place, name in ways}


def _differing(actual: Tensor, expected: Tensor, other: Tensor, compute: torch.dtype) -> int:
    """Count elements that are not as expected, of those that are about the same in `other`."""
    error = max(2 * torch.finfo(actual.dtype).eps, torch.finfo(compute).eps ** 0.6)
    actual, expected, other = (tensor.double() for tensor in (actual, expected, other))
    steady = torch.isclose(other, expected, error / 8, error / 8, equal_nan=True)
    return int((steady & ~torch.isclose(actual, expected, error, error, equal_nan=True)).sum())


def _difference_of_scalars(device: torch.device) -> str | None:
    """Return what is wrong with scalars that are read and written on the device, None if nothing is."""
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.full((), value, dtype=dtype, device=device) for value in (0.5, -3.0)]
        scattered = Scattered(tensors)
        read = scattered.read()
        scattered.write(read * 2, None)
        if (found := [*read.tolist(), *map(float, tensors)]) != [0.5, -3.0, 1.0, -6.0]:
            return f"scalars 0.5 and -3 of {dtype}, read and doubled, are {found}"
    return None
