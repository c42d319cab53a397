"""Timing torch's implementations on the shapes that a script's optimizer had."""

import inspect
from typing import Any

import torch

from surefoot import benchmark, optimizers

_SECONDS = 2.0
_ENGINE_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}


def compared(watched: Any) -> dict[str, Any]:
    """Time torch's implementations and ours, interleaved, on parameters of the same shapes.

    All parameters count as one group with the options of the first; gradients are dense.

    Args:
        watched: the optimizer, a `watch.Watched`.

    Returns:
        `{"seconds": {contender: seconds of a step}, "best_of_torch": name, "speedup": ratio}`, or
        `{"reason": why not}`.
    """
    if reason := _reason(watched):
        return {"reason": reason}
    try:
        measured = benchmark.measure(_case(watched), seconds=_SECONDS)
    except (MemoryError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        return {"reason": f"{error}"}
    names = [name for name in measured.seconds if name != benchmark.MEMORY_BOUND]
    seconds = {name: measured.milliseconds(name).median / 1e3 for name in names}
    best = measured.best_of_torch
    return {"seconds": seconds, "best_of_torch": best, "speedup": measured.speedup().median}


def _reason(watched: Any) -> str | None:
    kinds = {(dtype, device) for _, dtype, device in watched.shapes}
    for refused, reason in (
        (not watched.is_ours, "surefoot has no such optimizer"),
        (watched.custom_step, "it is not elementwise, so that its time depends on more than shapes"),
        (watched.algorithm.__module__.partition(".")[0] != "surefoot", "it is a class of the script"),
        (watched.algorithm.__name__ in optimizers.NOT_IN_TORCH, "torch.optim has no such optimizer"),
        (watched.algorithm.__name__ == "SparseAdam", "its time depends on how many rows have gradients"),
        (len(kinds) != 1, "its parameters have several dtypes or devices"),
        (any(device != "cpu" for _, device in kinds), "only the CPU is timed"),
    ):
        if refused:
            return reason
    return None


def _case(watched: Any) -> benchmark.Case:
    name = watched.algorithm.__name__
    taken = set(inspect.signature(getattr(torch.optim, name)).parameters) - _ENGINE_OPTIONS
    options = {option: value for option, value in watched.options.items() if option in taken}
    shapes = benchmark.ShapeList("script", "the script's", tuple(shape for shape, _, _ in watched.shapes))
    return benchmark.Case(benchmark.Variant(name, name, options), shapes, watched.shapes[0][1])
