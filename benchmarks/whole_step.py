"""What surrounds an update: clipping, averaging, zeroing and telemetry in one pass, and torch's several.

    python benchmarks/whole_step.py                 # all of it, in about five minutes on two quiet cores, with 7 GB
    python benchmarks/whole_step.py --part averages

It prints a table and writes `benchmarks/results/whole_step.csv`.  Contenders take turns in one process; ratios are of
neighbours in time.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import swa_utils as torchs

import surefoot
from surefoot import swa_utils as ours
from surefoot.benchmark import SHAPE_LISTS, Quartiles, circumstances, floor_of, write_csv

DECAY, NORM = 0.999, 1.0
SHAPES = "gpt2-small"


class Line(NamedTuple):
    """A line of the table: a contender's time, and how many times as long another takes.

    Attributes:
        part, case, contender: what was timed.
        ms, q1, q3: milliseconds, median and quartiles.
        other: the contender to compare with.
        ratio, ratio_q1, ratio_q3: its time over this one's.
    """

    part: str
    case: str
    contender: str
    ms: float
    q1: float
    q3: float
    other: str
    ratio: float
    ratio_q1: float
    ratio_q3: float


def main() -> None:
    """Measure what is asked for, print and write it."""
    parser = argparse.ArgumentParser(description="Time what surrounds an update, in one pass and in torch's several.")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    lines = [line for part in options.part for line in PARTS[part](options.rounds)]
    for line in lines:
        print(
            f"{line.part:9} {line.case:24} {line.contender:24} {line.ms:9.3f} ms ({line.q1:.3f} to {line.q3:.3f}), "
            f"{line.other} takes {line.ratio:.2f} times as long ({line.ratio_q1:.2f} to {line.ratio_q3:.2f})"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    columns = ("machine", "date", "torch", "threads", *Line._fields)
    write_csv(options.out / "whole_step.csv", ((*circumstances(), *line) for line in lines), columns)


def _compare(part: str, case: str, steps: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[Line]:
    """Time contenders in turns; each gives its own seconds.  The first is compared with all, all others with it."""
    for step in steps.values():
        step(), step()
    gc.collect()
    seconds = {name: np.zeros(rounds) for name in steps}
    for index in range(rounds):
        for name, step in steps.items():
            step()  # not counted: it finds the caches full of another contender's data
            seconds[name][index] = np.median([step() for _ in range(3)])
    first = next(iter(steps))
    for name in list(steps)[1:]:
        ratios = Quartiles.of(seconds[name] / seconds[first])
        yield Line(part, case, first, *Quartiles.of(1e3 * seconds[first]), name, *ratios)


def _timed(step: Callable[[], object]) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start


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
        return _timed(step)


def whole(rounds: int) -> Iterator[Line]:
    """Clip, step, average and zero: AdamW on the parameters of GPT-2 small."""
    shapes = SHAPE_LISTS[SHAPES]
    grads = _tensors(shapes.shapes, 0.01)
    contenders = {"surefoot": _ours(grads), "torch": _torchs(grads), "traffic floor": _floor(grads)}
    yield from _compare("whole", shapes.title, contenders, rounds)


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


def _floor(grads: Sequence[Tensor]) -> Callable[[], float]:
    """Give the floor: read the gradients; then read and write what AdamW and an average do, and only add."""
    training = _Training(grads)
    floor = floor_of(surefoot.AdamW(training.params, ema=DECAY))
    floor.whole_step.max_grad_norm = NORM
    return lambda: training.timed(floor.step)


def telemetry(rounds: int) -> Iterator[Line]:
    """Telemetry on every step: AdamW on large tensors and on many small ones."""
    for name in ("large", "tiny"):
        shapes = SHAPE_LISTS[name]
        grads = _tensors(shapes.shapes, 0.01)
        plain = _ours(grads, nonfinite="ignore")
        contenders = {"surefoot": plain, "surefoot, telemetry": _ours(grads, telemetry=True)}
        yield from _compare("telemetry", shapes.title, contenders, rounds)


def averages(rounds: int) -> Iterator[Line]:
    """An exponential moving average by AveragedModel."""
    models = {
        "500 layers of 32 x 32": nn.Sequential(*(nn.Linear(32, 32) for _ in range(500))),
        "1000 x 1 k": nn.ParameterList(_tensors([(1000,)] * 1000, 1.0)),
        "8 x 4 M": nn.ParameterList(_tensors([(1 << 22,)] * 8, 1.0)),
    }
    for case, model in models.items():
        contenders = {name: _averaging(library, model) for name, library in (("surefoot", ours), ("torch", torchs))}
        contenders["traffic floor"] = _floor_of_averages(model)
        yield from _compare("averages", case, contenders, 4 * rounds)


def _floor_of_averages(model: nn.Module) -> Callable[[], float]:
    """Give the floor: read both, write one."""
    training = _Training([param.detach() for param in model.parameters()])
    floor = floor_of(surefoot.SGD(training.params))
    return lambda: training.timed(floor.step)


def _averaging(library: Any, model: nn.Module) -> Callable[[], float]:
    average = library.AveragedModel(model, multi_avg_fn=library.get_ema_multi_avg_fn(DECAY))
    return lambda: _timed(lambda: average.update_parameters(model))


PARTS: Mapping[str, Callable[[int], Iterator[Line]]] = {"whole": whole, "telemetry": telemetry, "averages": averages}


if __name__ == "__main__":
    main()
