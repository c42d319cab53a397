"""Who competes: torch's implementations of an optimizer, ours, and the memory bound.

What torch.optim does not have competes with the eager engine, which is the rule itself by torch's operations.
"""

import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

import surefoot
from surefoot import optimizers
from surefoot.benchmark.cases import Variant
from surefoot.benchmark.memory_bound import memory_bound_of

Step = Callable[[], object]
Maker = Callable[[list[Parameter]], Step]

FOR_LOOP, FOREACH, FUSED, COMPILED = "torch for-loop", "torch foreach", "torch fused", "torch compile"
OURS, EAGER, MEMORY_BOUND = "surefoot", "surefoot eager", "memory bound"

TORCH = (FOR_LOOP, FOREACH, FUSED)
"""The implementations of which the best counts as torch's; compiling one, which takes minutes, is reported apart."""

REFERENCES = (FOR_LOOP, EAGER)
"""Those of which one takes part, one tensor at a time, and all others must compute the same."""

_COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def contenders_of(variant: Variant, *, compiled: bool = False) -> dict[str, Maker]:
    """Return by name what makes a contender's step for some parameters.

    Args:
        variant: the optimizer.
        compiled: whether `torch.compile` of torch's foreach implementation takes part, where there is one.
    """
    implementations = implementations_of(variant)
    ours = implementations.pop(OURS)
    found = {name: _stepping(make) for name, make in implementations.items()}
    if compiled and FOREACH in found:
        found[COMPILED] = lambda params: _compiled(implementations[FOREACH](params).step)
    return found | {OURS: _stepping(ours), MEMORY_BOUND: lambda params: memory_bound_of(ours(params)).step}


def implementations_of(variant: Variant) -> dict[str, Callable[[list[Parameter]], Any]]:
    """Return by name what makes an optimizer for some parameters: each of torch's implementations, and ours.

    Of an optimizer that torch does not have these are the eager engine and what the engines choose.
    """
    ours = functools.partial(getattr(surefoot, variant.optimizer), **variant.options)
    if variant.optimizer in optimizers.NOT_IN_TORCH:
        return {EAGER: functools.partial(ours, foreach=False), OURS: ours}
    theirs = getattr(torch.optim, variant.optimizer)
    taken = inspect.signature(theirs).parameters
    engines = {
        FOR_LOOP: {"foreach": False} if "foreach" in taken else {},
        **({FOREACH: {"foreach": True}} if "foreach" in taken else {}),
        **({FUSED: {"fused": True}} if "fused" in taken else {}),
    }
    found = {name: functools.partial(theirs, **variant.options, **engine) for name, engine in engines.items()}
    return found | {OURS: ours}


def _stepping(make: Callable[[list[Parameter]], Any]) -> Maker:
    return lambda params: make(params).step


def _compiled(step: Step) -> Step:
    """Compile a step when it is first taken, with nothing left of earlier compilations, nor their limit used up."""
    torch.compiler.reset()
    compiled: Step = torch.compile(step)
    return compiled


@contextmanager
def empty_compile_cache() -> Iterator[None]:
    """Let torch.compile find nothing on disk."""
    before = os.environ.get(_COMPILE_CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_COMPILE_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[_COMPILE_CACHE]
            if before is not None:
                os.environ[_COMPILE_CACHE] = before
