"""What is no dense rule: rows of sparse gradients, Adafactor, Muon and LBFGS, against torch.optim's.

    python benchmarks/others.py                # all of it, in about three minutes on two quiet cores
    python benchmarks/others.py --part sparse

It prints a table and writes `benchmarks/results/others.csv`.  Ratios are of neighbours in time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from turns import Line, Parts, compare, run, timed

import surefoot

Shapes = Sequence[tuple[int, ...]]
LIBRARIES = {"surefoot": surefoot, "torch": torch.optim}
TABLES = {
    "32 of 1 k rows of 16": (1000, 16, 32),
    "4 k of 100 k rows of 64": (100_000, 64, 4096),
    "32 k of 1 M rows of 64": (1_000_000, 64, 32768),
}
MATRICES: Mapping[str, Shapes] = {
    "8 x 1024 x 1024": [(1024, 1024)] * 8,
    "100 x 64 x 64": [(64, 64)] * 100,
    "12 layers of width 256": [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 12,
}
HISTORY = 10


def sparse(rounds: int) -> Iterator[Line]:
    """Rows of one table."""
    for name in ("SGD", "Adagrad", "SparseAdam"):
        for case, (rows, width, present) in TABLES.items():
            generator = torch.Generator().manual_seed(0)
            index = torch.randint(rows, (1, present), generator=generator)
            values = torch.randn(present, width, generator=generator)
            grad = torch.sparse_coo_tensor(index, values, (rows, width), check_invariants=True).coalesce()
            steps = {
                library: _step(module, name, [grad], [Parameter(torch.zeros(rows, width))])
                for library, module in LIBRARIES.items()
            }
            yield from compare("sparse", f"{name}, {case}", steps, 10 * rounds)


def matrices(rounds: int) -> Iterator[Line]:
    """Optimizers of whole matrices; of torch's implementations the for-loop, and foreach where there is one."""
    for name, others in (("Adafactor", {"torch foreach": {"foreach": True}}), ("Muon", {})):
        for case, shapes in MATRICES.items():
            generator = torch.Generator().manual_seed(0)
            grads = [torch.randn(shape, generator=generator) for shape in shapes]
            steps = {
                library: _step(module, name, grads, _params(shapes), **options)
                for library, module, options in (
                    *((library, module, {}) for library, module in LIBRARIES.items()),
                    *((library, torch.optim, options) for library, options in others.items()),
                )
            }
            yield from compare("matrices", f"{name}, {case}", steps, rounds)


def _params(shapes: Shapes) -> list[Parameter]:
    return [Parameter(torch.zeros(shape)) for shape in shapes]


def _step(module: Any, name: str, grads: Sequence[Tensor], params: list[Parameter], **options: Any) -> Any:
    """Give what takes a step of an optimizer and tells its seconds."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = getattr(module, name)(params, **options)
    return lambda: timed(optimizer.step)


def lbfgs(rounds: int) -> Iterator[Line]:
    """Four iterations of LBFGS on a quadratic bowl, the closure included, its history full."""
    for case, shapes in {"1 x 1 M": [(1_000_000,)], "200 x 1 k": [(1000,)] * 200}.items():
        yield from compare(
            "lbfgs", case, {name: _descent(module, shapes) for name, module in LIBRARIES.items()}, rounds
        )


def _descent(module: Any, shapes: Shapes) -> Callable[[], float]:
    params = [Parameter(torch.ones(shape)) for shape in shapes]
    scales = [torch.linspace(0.1, 1.0, param.numel()).view_as(param) for param in params]
    options = {"lr": 1e-3, "max_iter": 4, "history_size": HISTORY, "tolerance_grad": 0, "tolerance_change": 0}
    optimizer = module.LBFGS(params, **options)

    def closure() -> float:
        """Set gradients without autograd, whose time is not what is compared."""
        for param, scale in zip(params, scales, strict=True):
            param.grad = scale * param.detach()
        return 1.0

    for _ in range(HISTORY):
        optimizer.step(closure)
    return lambda: timed(lambda: optimizer.step(closure))


PARTS: Parts = {"sparse": sparse, "matrices": matrices, "lbfgs": lbfgs}


if __name__ == "__main__":
    run(PARTS, "others", "Time what is no dense rule against torch.optim.")
