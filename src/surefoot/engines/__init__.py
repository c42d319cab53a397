"""Engines run a rule's graph on buckets of tensors; here one is chosen for each bucket.

An engine is a module with `supports(bucket)`, which answers None or the reason why not, and `run(bucket)`.
It knows graphs and tensors, never an algorithm.
"""

from typing import Protocol

from surefoot.engines import eager, foreach
from surefoot.engines.bucket import Bucket, Coefficients

__all__ = ["Bucket", "Coefficients", "Engine", "choose"]

_FOREACH_DEVICES = ("cuda", "xpu", "mtia", "privateuseone")


class Engine(Protocol):
    """What an engine's module offers."""

    def supports(self, bucket: Bucket) -> str | None:
        """Give the reason why this engine cannot serve the bucket, or None."""

    def run(self, bucket: Bucket) -> None:
        """Update the bucket's parameters and slots in place."""


def choose(bucket: Bucket) -> Engine:
    """Choose the engine for a bucket from the group's `foreach`, `fused` and `differentiable`.

    Raises:
        RuntimeError: an engine was asked for by `foreach=True` or `fused=True` and cannot serve the bucket.
    """
    wish = {name: bucket.options.get(name) for name in ("foreach", "fused")}
    if wish["fused"]:
        raise RuntimeError(f"`fused=True`: there is no fused engine for {bucket.device.type} yet; use fused=None")
    if wish["foreach"]:
        if reason := foreach.supports(bucket):
            raise RuntimeError(f"`foreach=True` cannot serve {bucket.rule.name} here: {reason}; use foreach=None")
        return foreach
    undecided = wish["foreach"] is None and wish["fused"] is None
    if undecided and bucket.device.type in _FOREACH_DEVICES and foreach.supports(bucket) is None:
        return foreach
    return eager
