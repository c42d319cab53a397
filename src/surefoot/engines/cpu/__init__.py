"""The CPU engine: the graph printed and compiled as a function, all of a bucket in one call, one pass over memory."""

import functools
import importlib.util
from collections.abc import Iterator

import torch

from surefoot.engines.bucket import Bucket, unsupported_reasons
from surefoot.engines.cpu.source import stores
from surefoot.rule import Rule


def supports(bucket: Bucket) -> str | None:
    """Return the reason why a bucket cannot be served, if there is one."""
    return next(_reasons(bucket), None)


def _reasons(bucket: Bucket) -> Iterator[str]:
    if bucket.device.type != "cpu":
        yield f"parameters are on {bucket.device}, this engine serves the CPU"
    yield from unsupported_reasons(bucket, stores)
    if not _has_compiler():
        yield "llvmlite is not installed; pip install llvmlite"


@functools.cache
def _has_compiler() -> bool:
    return importlib.util.find_spec("llvmlite") is not None


def prepare(bucket: Bucket) -> None:
    """Make the bucket's plan, for which its tensors pass the gate, and its kernel."""
    if bucket.plan is None:
        if bucket.grads[0].is_sparse:
            from surefoot.engines.cpu.sparse import RowsPlan  # noqa: PLC0415 (NumPy and the compiler, on first use)

            bucket.plan = RowsPlan(bucket)
        else:
            from surefoot.engines.cpu.plan import Plan  # noqa: PLC0415 (the same)

            bucket.plan = Plan(bucket)
    bucket.plan.prepare(bucket.rule)


def run(bucket: Bucket) -> None:
    """Update every parameter of the bucket and its slots in place."""
    prepare(bucket)
    bucket.plan.run(bucket)


def run_rows(bucket: Bucket) -> bool:
    """Update only the rows at which sparse gradients have values; return False, and change nothing, if it cannot."""
    prepare(bucket)
    if bucket.plan.dense:
        bucket.plan.run(bucket)
    dense: bool = bucket.plan.dense
    return dense


def measure(bucket: Bucket, rule: Rule) -> torch.Tensor:
    """Return what a rule measures of the bucket, which stays as it is: float64 of shape (parameters, reductions)."""
    prepare(bucket)
    measured: torch.Tensor = bucket.plan.measure(bucket, rule)
    return measured
