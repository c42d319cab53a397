"""What surrounds an update: clipping, averaging, zeroing and telemetry in one pass, and torch's several.

    python benchmarks/whole_step.py                 # all of it, in about five minutes on two quiet cores, with 7 GB
    python benchmarks/whole_step.py --part averages

It prints a table and writes `benchmarks/results/whole_step.csv`.  Ratios are of neighbours in time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import swa_utils as torchs
from turns import Line, Parts, compare, run, timed

import surefoot
from surefoot import swa_utils as ours
from surefoot.benchmark import SHAPE_LISTS, memory_bound_of

DECAY, NORM = 0.999, 1.0
SHAPES = "gpt2-small"


def _tensors(shapes: Sequence[tuple[int, ...]], scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul_(scale) for shape in shapes]


class _Training:
    """Parameters whose gradients are set anew before each step, outside the time that counts."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.grads = grads
        self.params = [Parameter(torch.zeros_like(grad)) for grad in grads]

    def timed(self, step: Callable[[], object]) -> float:
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        return timed(step)


def whole(rounds: int) -> Iterator[Line]:
    """Clip, step, average and zero: AdamW on the parameters of GPT-2 small."""
    shapes = SHAPE_LISTS[SHAPES]
    grads = _tensors(shapes.shapes, 0.01)
    contenders = {"surefoot": _ours(grads), "torch": _torchs(grads), "memory bound": _bound(grads)}
    yield from compare("whole", shapes.title, contenders, rounds)


def _ours(grads: Sequence[Tensor], **options: Any) -> Callable[[], float]:
    training = _Training(grads)
    options = options or {"max_grad_norm": NORM, "ema": DECAY, "zero_grad_after_step": True}
    optimizer = surefoot.AdamW(training.params, **options)
    return lambda: training.timed(optimizer.step)


def _torchs(grads: Sequence[Tensor]) -> Callable[[], float]:
    """Give torch's best sequence; clipping writes gradients, so these are copies of its own."""
    training = _Training([grad.clone() for grad in grads])
    optimizer = torch.optim.AdamW(training.params, fused=True)
    model = nn.ParameterList(training.params)
    average = torchs.AveragedModel(model, multi_avg_fn=torchs.get_ema_multi_avg_fn(DECAY))

    def step() -> None:
        clip_grad_norm_(training.params, NORM, foreach=True)
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad()

    return lambda: training.timed(step)


def _bound(grads: Sequence[Tensor]) -> Callable[[], float]:
    """Give the memory bound: read the gradients; then read and write what AdamW and an average do, and only add."""
    training = _Training(grads)
    bound = memory_bound_of(surefoot.AdamW(training.params, ema=DECAY))
    bound.step_options.max_grad_norm = NORM
    return lambda: training.timed(bound.step)


def telemetry(rounds: int) -> Iterator[Line]:
    """Telemetry on every step: AdamW on large tensors and on many small ones."""
    for name in ("large", "tiny"):
        shapes = SHAPE_LISTS[name]
        grads = _tensors(shapes.shapes, 0.01)
        plain = _ours(grads, nonfinite="ignore")
        contenders = {"surefoot": plain, "surefoot, telemetry": _ours(grads, telemetry=True)}
        yield from compare("telemetry", shapes.title, contenders, rounds)


def averages(rounds: int) -> Iterator[Line]:
    """An exponential moving average by AveragedModel."""
    models = {
        "500 layers of 32 x 32": nn.Sequential(*(nn.Linear(32, 32) for _ in range(500))),
        "1000 x 1 k": nn.ParameterList(_tensors([(1000,)] * 1000, 1.0)),
        "8 x 4 M": nn.ParameterList(_tensors([(1 << 22,)] * 8, 1.0)),
    }
    for case, model in models.items():
        contenders = {name: _averaging(library, model) for name, library in (("surefoot", ours), ("torch", torchs))}
        contenders["memory bound"] = _bound_of_averages(model)
        yield from compare("averages", case, contenders, 4 * rounds)


def _bound_of_averages(model: nn.Module) -> Callable[[], float]:
    """Give the memory bound: read both, write one."""
    training = _Training([param.detach() for param in model.parameters()])
    bound = memory_bound_of(surefoot.SGD(training.params))
    return lambda: training.timed(bound.step)


def _averaging(library: Any, model: nn.Module) -> Callable[[], float]:
    average = library.AveragedModel(model, multi_avg_fn=library.get_ema_multi_avg_fn(DECAY))
    return lambda: timed(lambda: average.update_parameters(model))


PARTS: Parts = {"whole": whole, "telemetry": telemetry, "averages": averages}


if __name__ == "__main__":
    run(PARTS, "whole_step", "Time what surrounds an update, in one pass and in torch's several.")
