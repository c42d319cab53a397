"""Who competes: torch's implementations of an optimizer, ours, and the traffic floor."""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

import surefoot
from surefoot.benchmark.cases import Variant
from surefoot.benchmark.floor import floor_of

Step = Callable[[], object]
Maker = Callable[[list[Parameter]], Step]

FOR_LOOP, FOREACH, FUSED, COMPILED = "torch for-loop", "torch foreach", "torch fused", "torch compile"
OURS, FLOOR = "surefoot", "traffic floor"

TORCH = (FOR_LOOP, FOREACH, FUSED)
"""The implementations of which the best counts as torch's; compiling one, which takes minutes, is reported apart."""

_COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def contenders_of(variant: Variant, *, compiled: bool = False) -> dict[str, Maker]:
    """Give by name what makes a contender's step for some parameters.

    Args:
        variant: the optimizer.
        compiled: whether `torch.compile` of torch's foreach implementation takes part.
    """

    def of_torch(**engine: bool) -> Maker:
        return lambda params: theirs(params, **variant.options, **engine).step

    theirs: Any = getattr(torch.optim, variant.optimizer)
    ours: Any = getattr(surefoot, variant.optimizer)
    found = {FOR_LOOP: of_torch(foreach=False), FOREACH: of_torch(foreach=True)}
    if "fused" in inspect.signature(theirs).parameters:
        found[FUSED] = of_torch(fused=True)
    if compiled:
        found[COMPILED] = lambda params: _compiled(of_torch(foreach=True)(params))
    found[OURS] = lambda params: ours(params, **variant.options).step
    found[FLOOR] = lambda params: floor_of(ours(params, **variant.options)).step
    return found


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
