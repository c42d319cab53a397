"""Muon for the matrices of a model and AdamW for the rest: one optimizer against two, ours and torch.optim's.

    python benchmarks/combined.py                # all of it, in about two minutes on two quiet cores
    python benchmarks/combined.py --part small

It prints a table and writes `benchmarks/results/combined.csv`.  Times are those that one thread is busy, so that others
on the machine disturb little; ratios are of neighbours in time.
"""

from collections.abc import Callable, Iterator, Mapping
from time import thread_time
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from turns import Line, Parts, compare, run

import surefoot
from surefoot.cli._demo.model import Shape, build_model

Named = Mapping[str, Tensor]


def alike(count: int, *shapes: tuple[int, ...]) -> Named:
    """Return parameters of layers that are all alike, the matrices called `hidden`."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{'hidden' if len(shape) > 1 else 'bias'}.{layer}.{number}": Parameter(torch.randn(shape, generator=generator))
        for layer in range(count)
        for number, shape in enumerate(shapes)
    }


def transformer(width: int, blocks: int) -> Named:
    """Return the parameters of the demo's transformer, the matrices of its hidden layers called `hidden`."""
    model = build_model(96, Shape(width=width, blocks=blocks), seed=0)
    select = surefoot.hidden_matrices(model)
    named = dict(model.named_parameters())
    return {f"{'hidden.' if select(n, p) and p.dim() == 2 else ''}{n}": p for n, p in named.items()}  # noqa: PLR2004 (matrices)


CASES: Mapping[str, Mapping[str, Callable[[], Named]]] = {
    "small": {
        "an MLP of 3 layers of 16": lambda: alike(3, (16, 16), (16,)),
        "200 x 16 x 16, 200 x 16": lambda: alike(200, (16, 16), (16,)),
        "100 x 64 x 64, 100 x 64": lambda: alike(100, (64, 64), (64,)),
        "a LoRA: 96 x 8 x 128, 96 x 128": lambda: alike(96, (8, 128), (128,)),
    },
    "models": {
        "the demo's transformer": lambda: transformer(192, 2),
        "12 blocks of width 64": lambda: transformer(64, 12),
        "6 blocks of width 384": lambda: transformer(384, 6),
    },
}


def part_of(name: str) -> Callable[[int], Iterator[Line]]:
    """Return what measures some of the cases."""

    def measure(rounds: int) -> Iterator[Line]:
        for case, make in CASES[name].items():
            yield from compare(name, case, {who: step_of(who, make()) for who in CONTENDERS}, rounds)

    return measure


def one(named: Named) -> list[Any]:
    """Return one optimizer for all parameters."""
    parts = [surefoot.Part(surefoot.Muon, "hidden.*", lr=0.02), surefoot.Part(surefoot.AdamW, lr=3e-4)]
    return [surefoot.Combined(named.items(), parts)]


def two(muon: Any, adamw: Any, named: Named, **options: Any) -> list[Any]:
    """Return an optimizer for the hidden matrices and one for the rest."""
    hidden = [param for name, param in named.items() if name.startswith("hidden.")]
    rest = [param for name, param in named.items() if not name.startswith("hidden.")]
    return [muon(hidden, lr=0.02), adamw(rest, lr=3e-4, **options)]


CONTENDERS: Mapping[str, Callable[[Named], list[Any]]] = {
    "surefoot": one,
    "torch, fused AdamW": lambda named: two(torch.optim.Muon, torch.optim.AdamW, named, fused=True),
    "surefoot, two optimizers": lambda named: two(surefoot.Muon, surefoot.AdamW, named),
}


def step_of(who: str, named: Named) -> Callable[[], float]:
    """Return what takes a step of all parameters and returns the seconds that its thread was busy."""
    generator = torch.Generator().manual_seed(1)
    for param in named.values():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizers = CONTENDERS[who](named)

    def step() -> float:
        start = thread_time()
        for optimizer in optimizers:
            optimizer.step()
        return thread_time() - start

    return step


PARTS: Parts = {name: part_of(name) for name in CASES}

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(PARTS, "combined", __doc__.splitlines()[0])
