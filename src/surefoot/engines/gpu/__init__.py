"""The GPU engine: the graph printed as a Triton kernel, all of a bucket in one launch, one pass over memory."""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from surefoot.engines.bucket import Bucket, unsupported_reasons
from surefoot.engines.gpu.source import stores
from surefoot.rule import Rule

DEVICES = ("cuda", "xpu")
"""Device types that Triton serves; "cuda" is AMD's too."""
_OLDEST_NVIDIA = (8, 0)


def supports(bucket: Bucket) -> str | None:
    """Return the reason why a bucket cannot be served, if there is one."""
    return next(_reasons(bucket), None)


def _reasons(bucket: Bucket) -> Iterator[str]:
    if bucket.device.type not in DEVICES:
        yield f"parameters are on {bucket.device}, this engine serves {' and '.join(DEVICES)}"
    yield from unsupported_reasons(bucket, stores)
    if not (bucket.is_plain or bucket.options.get("fused")):
        yield "kernels on short formats are not compared with torch's operations first; fused=True asks for them"
    if importlib.util.find_spec("triton") is None:
        yield "Triton is not installed; it comes with PyTorch for GPUs, or by pip install triton"
    if (complaint := _unsupported_reason(bucket.device)) is not None:
        yield complaint


@functools.cache
def _unsupported_reason(device: torch.device) -> str | None:
    """Return the reason why Triton cannot serve a device, or nothing here."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_NVIDIA:
            return f"Triton serves compute capability 8.0 and newer, but {device} has {'.'.join(map(str, capability))}"
    return missing_tool() if device.type in DEVICES and device.type != "cpu" else None


def missing_tool() -> str | None:
    """Name what Triton needs to build its launcher and does not find."""
    if sys.platform != "linux":
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, with which it builds its launcher; install gcc or clang, or set CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton finds no Python.h, with which it builds its launcher; install Python's development headers"
    return None


def doubt(bucket: Bucket, rule: Rule) -> str | None:
    """Return what speaks against the kernel of a rule on a bucket's device; None if it does what torch's operations do.

    That is found out at the kernel's first use there, unless a graph is being captured, in which nothing can be read.
    """
    from surefoot.engines.gpu import proof, tables  # noqa: PLC0415 (Triton, on first use)

    if tables.capturing(bucket.device) or not bucket.is_plain:  # which serve only where they are asked for
        return None
    if bucket.plan is None:
        dtypes = tuple(tensors[0].dtype for tensors in (bucket.params, bucket.grads, *bucket.slots))
    else:  # the gradients may have been given up
        dtypes = bucket.plan.dtypes
    return proof.doubt(rule, dtypes[: 2 + len(rule.slots)], bucket.device)


def prepare(bucket: Bucket) -> None:
    """Make the bucket's plan, for which its tensors pass the gate."""
    from surefoot.engines.gpu.plan import Plan  # noqa: PLC0415 (Triton, on first use)

    if bucket.plan is None:
        bucket.plan = Plan(bucket)


def run(bucket: Bucket) -> None:
    """Update every parameter of the bucket and its slots in place."""
    prepare(bucket)
    bucket.plan.run(bucket)


def measure(bucket: Bucket, rule: Rule) -> torch.Tensor:
    """Return what a rule measures of the bucket, which stays as it is: float64 of shape (parameters, reductions)."""
    prepare(bucket)
    measured: torch.Tensor = bucket.plan.measure(bucket, rule)
    return measured
