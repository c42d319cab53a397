"""Engines run a rule's graph on buckets of tensors; here one is chosen for each bucket.

An engine is a module with `supports(bucket)`, which answers None or the reason why not, `prepare(bucket)`, which proves
that the tensors are what a kernel takes them for, `run(bucket)`, which updates, and `measure(bucket, rule)`, which
measures what another rule on the same tensors asks for, of gradients for instance, and changes nothing.
What the GPU engine makes is `proved` on a device before it serves there.  An engine knows graphs and tensors,
never an algorithm.
"""

import functools
import os
import warnings
from typing import Protocol

from torch import Tensor

from surefoot.engines import cpu, eager, foreach, gpu
from surefoot.engines.bucket import Bucket, Coefficients
from surefoot.rule import Rule
from surefoot.tensors.modes import mode_is_active

__all__ = ["ENGINES", "Bucket", "Coefficients", "Engine", "choose", "cpu", "eager", "foreach", "gpu", "proved"]

_FOREACH_DEVICES = ("cuda", "xpu", "mtia", "privateuseone")


class Engine(Protocol):
    """What an engine's module offers."""

    def supports(self, bucket: Bucket) -> str | None:
        """Return the reason why this engine cannot serve the bucket, or None."""

    def prepare(self, bucket: Bucket) -> None:
        """Do all that may fail before anything is changed.

        Raises:
            RuntimeError: the memory of a tensor is not what a kernel would take it for.
        """

    def run(self, bucket: Bucket) -> None:
        """Update the bucket's parameters and slots in place, and set `measured` if its rule measures something."""

    def measure(self, bucket: Bucket, rule: Rule) -> Tensor:
        """Return what a rule measures of the bucket, and change nothing: float64 of shape (parameters, reductions)."""


ENGINES: tuple[Engine, ...] = (cpu, gpu, foreach, eager)
"""All engines, the fastest first."""
_BY_OPTION = ("eager", "foreach", "fused")


def choose(bucket: Bucket) -> Engine:
    """Choose the engine for a bucket: the one asked for, or the first that can serve it.

    Asked for is what `$SUREFOOT_ENGINE` names (eager, foreach or fused), else what the group's `fused=True` or
    `foreach=True` says; `foreach=False` or `fused=False` alone ask for eager, as in torch.  While a mode is active that
    must see torch's operations, kernels show none, and another engine stands in for them.

    Raises:
        RuntimeError: an engine was asked for and cannot serve the bucket.
        ValueError: `$SUREFOOT_ENGINE` names no engine.
    """
    wish, asked_by = _wish(bucket)
    reasons = []
    for engine in _candidates(wish, bucket):
        reason = engine.supports(bucket)
        if reason is None:
            return engine
        reasons.append(reason)
    raise RuntimeError(
        f"`{asked_by}` cannot serve {bucket.rule.name} here: {'; '.join(reasons)}. Leave it out to use another engine"
    )


def proved(engine: Engine, bucket: Bucket, *rules: Rule) -> Engine:
    """Return the engine that was chosen for a bucket, or foreach if the GPU engine does otherwise there than torch.

    Raises:
        RuntimeError: the GPU engine was asked for.
    """
    if engine is not gpu:
        return engine
    reason = next(filter(None, (gpu.doubt(bucket, rule) for rule in rules)), None)
    if reason is None:
        return gpu
    wish, asked_by = _wish(bucket)
    doubt = f"the kernel of {bucket.rule.name} for {bucket.dtype} has failed its test on {bucket.device}: {reason}"
    if wish:
        raise RuntimeError(f"`{asked_by}` cannot serve here: {doubt}. Leave it out to use another engine")
    _warn_once(f"{doubt}. The foreach engine serves instead; foreach=True asks for it and does not test")
    return foreach


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _wish(bucket: Bucket) -> tuple[str | None, str]:
    """Return the name of the engine that was asked for, if any, and by what."""
    if named := os.environ.get("SUREFOOT_ENGINE"):
        if named not in _BY_OPTION:
            raise ValueError(f"SUREFOOT_ENGINE must be one of {', '.join(_BY_OPTION)}, but is {named!r}")
        return ("eager" if bucket.options.get("differentiable") else named), f"SUREFOOT_ENGINE={named}"
    options = {name: bucket.options.get(name) for name in ("fused", "foreach")}
    for name, value in options.items():
        if value:
            return name, f"{name}=True"
    return ("eager" if False in options.values() else None), ""


def _candidates(wish: str | None, bucket: Bucket) -> tuple[Engine, ...]:
    """Engines to try for a bucket, the best first; where none was asked for, the last serves everything."""
    kernels: Engine = gpu if bucket.device.type in gpu.DEVICES else cpu
    asked: dict[str, tuple[Engine, ...]] = {"eager": (eager,), "foreach": (foreach,), "fused": (kernels,)}
    lists = (foreach,) if bucket.device.type in _FOREACH_DEVICES else ()
    if mode_is_active():
        asked["fused"] = (kernels, *lists, eager)
    return asked[wish] if wish else (kernels, *lists, eager)
