"""Timing the contenders of a case: interleaved in one process, in rounds of random order.

What disturbs the machine then disturbs all of them alike, and ratios are taken within a round.
"""

import gc
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

import surefoot
from surefoot.benchmark.cases import Case, ShapeList, Variant
from surefoot.benchmark.contenders import (
    COMPILED,
    MEMORY_BOUND,
    OURS,
    REFERENCES,
    Maker,
    Step,
    contenders_of,
    empty_compile_cache,
)
from surefoot.benchmark.results import Measurement
from surefoot.errors import InternalError
from surefoot.explain import rule_of

SECONDS = 3.0
FEWEST_ROUNDS = 5
_WARM_UP = 3
_LONGEST_BLOCK = 0.05
_TILE = 1 << 20
_ALIKE, _TOLERANCE = 0.9, 0.25


@dataclass(frozen=True)
class Contender:
    """A step ready to be timed.

    Attributes:
        params: the parameters that it steps.
        step: takes one step.
        warm_up: seconds of each of the first steps.
    """

    params: list[Parameter]
    step: Step
    warm_up: list[float]

    @property
    def compile_seconds(self) -> float:
        """Seconds that the first steps took beyond what a step takes."""
        return sum(self.warm_up) - len(self.warm_up) * self.warm_up[-1]


def measure(case: Case, *, seconds: float = SECONDS, compiled: bool = False) -> Measurement:
    """Time all contenders of a case.

    Each has parameters and state of its own; the gradients are shared, made beforehand, and written by none.

    Args:
        case: what they compete in.
        seconds: time to spend, setting up included and compiling excluded; `FEWEST_ROUNDS` are run whatever it is.
        compiled: whether `torch.compile` takes part.

    Raises:
        MemoryError: the machine has not enough free memory.
        InternalError: our own step computes something else than torch's, or than the rule by torch's operations.
    """
    check_memory(case, compiled=compiled)
    start = perf_counter()
    grads = gradients(case)
    with empty_compile_cache():
        makers = contenders_of(case.variant, compiled=compiled)
        contenders = {name: _prepare(case, make, grads) for name, make in makers.items()}
    wrong = {*_wrong(contenders), *wrong_contenders(case.variant, case.dtype)}
    if OURS in wrong:
        raise InternalError(f"{case}: surefoot's step computes something else than {_reference(contenders)}")
    right = {name: contender for name, contender in contenders.items() if name not in wrong}
    compiling = contenders[COMPILED].compile_seconds if COMPILED in contenders else 0.0
    return Measurement(case, _rounds(right, grads, start + compiling + seconds), sorted(wrong), compiling)


# Memory


def check_memory(case: Case, *, compiled: bool = False) -> None:
    """Raise MemoryError unless a case fits into the memory that is free, as far as that can be known."""
    needed, free = bytes_needed(case, compiled=compiled), _free_memory()
    if needed > free:
        raise MemoryError(
            f"{case}: measuring takes about {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free; "
            f"choose smaller parameters or bfloat16"
        )


def bytes_needed(case: Case, *, compiled: bool = False) -> int:
    """Return about how many bytes measuring takes: shared gradients, each contender's own, torch's temporaries."""
    optimizer = getattr(surefoot, case.variant.optimizer)([torch.zeros(1)], **case.variant.options)
    own = 1 + len(rule_of(optimizer, optimizer.param_groups[0]).slots)
    contenders, temporaries = len(contenders_of(case.variant, compiled=compiled)), 3
    return case.shapes.elements * case.dtype.itemsize * (1 + own * contenders + temporaries)


def _free_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


# Setting up


def gradients(case: Case) -> list[Tensor]:
    """Return the gradients of a case."""
    tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)).mul_(0.01).to(case.dtype)
    return [_tiled(tile, math.prod(shape)).reshape(shape) for shape in case.shapes.shapes]


def _tiled(tile: Tensor, elements: int) -> Tensor:
    """Return a repeated `tile`: drawing a hundred million numbers would take longer than timing steps on them."""
    copies = -(-elements // len(tile))
    return tile[:elements].clone() if copies == 1 else tile.repeat(copies)[:elements]


def _prepare(case: Case, make: Maker, grads: Sequence[Tensor]) -> Contender:
    """Return a contender that has taken its first steps."""
    params = [Parameter(torch.zeros(shape, dtype=case.dtype)) for shape in case.shapes.shapes]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    step = make(params)
    return Contender(params, step, [_timed(step) for _ in range(_WARM_UP)])


# Who is wrong


def wrong_contenders(variant: Variant, dtype: torch.dtype) -> list[str]:
    """Return the contenders whose step computes something else than the reference, on a tensor of moderate size.

    In torch 2.13 the fused SGD leaves most of a 16-bit parameter unchanged (pytorch#191763), in however little time.
    """
    case = Case(variant, ShapeList("probe", "4096", ((4096,),)), dtype)
    grads = gradients(case)
    return _wrong({name: _prepare(case, make, grads) for name, make in contenders_of(variant).items()})


def _wrong(contenders: Mapping[str, Contender]) -> list[str]:
    reference = contenders[_reference(contenders)]
    return [name for name in contenders if name != MEMORY_BOUND and not _agree(contenders[name], reference)]


def _reference(contenders: Iterable[str]) -> str:
    return next(name for name in contenders if name in REFERENCES)


def _agree(contender: Contender, reference: Contender) -> bool:
    """Return whether two contenders have brought their first parameter, a million elements of it, to about the same."""
    ours, theirs = (each.params[0].detach().flatten()[:_TILE].float() for each in (contender, reference))
    close = (ours - theirs).abs() <= _TOLERANCE * theirs.abs()
    return close.float().mean().item() >= _ALIKE


# Timing


def _rounds(contenders: Mapping[str, Contender], grads: list[Tensor], deadline: float) -> dict[str, np.ndarray]:
    """Return the seconds of a step in each round, for each contender; rounds are run until the deadline."""
    share = min(_LONGEST_BLOCK, max(contender.warm_up[-1] for contender in contenders.values()))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, draw = list(contenders), random.Random(0)  # noqa: S311 (not a secret)
    gc.collect()
    gc.disable()
    try:
        while len(seconds[OURS]) < FEWEST_ROUNDS or perf_counter() < deadline:
            draw.shuffle(order)
            for name in order:
                seconds[name].append(_block(contenders[name].step, share))
            torch._foreach_neg_(grads)  # averages must not settle, where a variance becomes zero; in one call
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in seconds.items()}


def _block(step: Step, share: float) -> float:
    """Return the median time of a step; as many are taken as fill the share, so that all contenders get about the same.

    The first is not counted: it finds the caches full of another contender's data.
    """
    step()
    times: list[float] = []
    while sum(times) < share:
        times.append(_timed(step))
    return float(np.median(times))


def _timed(step: Step) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start
