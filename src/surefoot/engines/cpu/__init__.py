"""The CPU engine: the graph printed as a Numba function, all of a bucket in one call, one pass over memory."""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from surefoot.engines.bucket import Bucket, obstacles
from surefoot.engines.cpu.source import storage


def supports(bucket: Bucket) -> str | None:
    """Give the reason why a bucket cannot be served, if there is one."""
    return next(_reasons(bucket), None)


def _reasons(bucket: Bucket) -> Iterator[str]:
    if bucket.device.type != "cpu":
        yield f"parameters are on {bucket.device}, this engine serves the CPU"
    yield from obstacles(bucket, storage)
    if not _has_compiler():
        yield "Numba is not installed; pip install numba"


@functools.cache
def _has_compiler() -> bool:
    return importlib.util.find_spec("numba") is not None


def run(bucket: Bucket) -> None:
    """Update every parameter of the bucket and its slots in place."""
    _plan(bucket).run(bucket)


def read(bucket: Bucket) -> torch.Tensor:
    """Measure the bucket's gradients: float64 of shape (parameters, measures of `rule.reading`)."""
    measured: torch.Tensor = _plan(bucket).read(bucket)
    return measured


def run_rows(bucket: Bucket) -> bool:
    """Update only the rows at which sparse gradients have values; False, and nothing is changed, where it cannot."""
    from surefoot.engines.cpu.sparse import run_rows as run_in_place  # noqa: PLC0415 (the compiler, on first use)

    return run_in_place(bucket)


def _plan(bucket: Bucket) -> Any:
    if bucket.plan is None:
        from surefoot.engines.cpu.plan import Plan  # noqa: PLC0415 (NumPy and the compiler, on first use)

        bucket.plan = Plan(bucket)
    return bucket.plan
