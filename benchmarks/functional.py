"""What a step of Adam costs as a function of lists, as a pure function, and as a class, beside torch's functions.

Milliseconds of processor time of one thread, the least of several calls that take turns:

    python benchmarks/functional.py
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adam import adam

import surefoot

MODELS = ((1, 100), (10, 1000), (100, 1000), (1000, 1000), (8, 4_000_000))
ADAM: dict[str, Any] = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8}


def least(steps: Sequence[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Return the milliseconds that each call takes once everything has been made."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(2 + rounds):
        for step, taken in zip(steps, times, strict=True):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    return [1000 * min(taken[2:]) for taken in times]


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print("| parameters | class | function | pure | torch's, foreach | torch's, fused |\n|---|---|---|---|---|---|")
    for count, size in MODELS:
        params, grads, averages, squares = ([torch.randn(size).abs() for _ in range(count)] for _ in range(4))
        lists = (params, grads, averages, squares, [], [torch.tensor(0.0) for _ in params])
        owned = [param.clone().requires_grad_() for param in params]
        for param, grad in zip(owned, grads, strict=True):
            param.grad = grad
        state = surefoot.functional.init(surefoot.Adam, params)
        calls = (
            surefoot.Adam(owned).step,
            lambda lists=lists: surefoot.functional.adam(*lists, maximize=False, **ADAM),
            lambda params=params, grads=grads, state=state: surefoot.functional.update(
                surefoot.Adam, params, grads, state
            ),
            lambda lists=lists: adam(*lists, foreach=True, maximize=False, **ADAM),
            lambda lists=lists: adam(*lists, fused=True, maximize=False, **ADAM),
        )
        print(f"| {count:,} x {size:,} | " + " | ".join(f"{taken:.2g}" for taken in least(calls)) + " |", flush=True)


if __name__ == "__main__":
    main()
