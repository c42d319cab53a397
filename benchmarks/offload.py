"""What the CPU does for a model on a device: AdamW with float32 masters and state, gradients and weights in bfloat16.

    python benchmarks/offload.py        # two minutes on two quiet cores, with 3 GB

The step of `Optimizer.offload` reads 16-bit gradients and writes masters, state and 16-bit weights in one pass; it is
compared with its memory bound, a kernel that moves the same memory and only adds, and with what others do: convert
gradients to float32, step float32 masters, convert these to bfloat16.  That is torch's fused AdamW, and DeepSpeed's
CPUAdam where that is installed and can be built.  Contenders take turns; ratios are of neighbours in time.  It writes
`benchmarks/results/offload.csv`.

Part `iterations` trains layers on a GPU, with the optimizer there and offloaded, and prints the most memory of the GPU
that was taken.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from turns import Line, compare, run, timed

import surefoot
from surefoot.benchmark.memory_bound import memory_bound_of

SHAPES = {"8 x 4 M": ((2000, 2000),) * 8, "200 x 100 k": ((250, 400),) * 200}
MASTERS = {"master_weight_bits": 32, "state_dtype": torch.float32}


def _params(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def _ours(shapes: Iterable[tuple[int, ...]], **options: Any) -> surefoot.AdamW:
    return surefoot.AdamW(_params(shapes, torch.bfloat16), **options)


def _converting(shapes: Iterable[tuple[int, ...]], cls: Callable[[list[Tensor]], Any]) -> Callable[[], object]:
    """Return a step of float32 masters between conversions."""
    params = _params(shapes, torch.bfloat16)
    masters: list[Tensor] = [nn.Parameter(param.detach().float()) for param in params]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = cls(masters)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_([master.grad for master in masters], [param.grad for param in params])
        optimizer.step()
        torch._foreach_copy_(params, masters)

    return step


def _deepspeed() -> Callable[[list[Tensor]], Any] | None:
    """Return DeepSpeed's optimizer, None where it is not installed or cannot be built."""
    try:
        made: Callable[[list[Tensor]], Any] = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        made([nn.Parameter(torch.ones(8))])
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways)
        print(f"without DeepSpeed: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
        return None
    return made


def steps(rounds: int) -> Iterator[Line]:
    """Yield the times of steps, for each list of shapes."""
    deepspeed = _deepspeed()
    for case, shapes in SHAPES.items():
        short = _ours(shapes, master_weight_bits=24, state_dtype="float8")
        contenders = {
            "surefoot": _ours(shapes, **MASTERS).step,
            "memory bound": memory_bound_of(_ours(shapes, **MASTERS)).step,
            "torch fused": _converting(shapes, partial(torch.optim.AdamW, fused=True)),
            "24 bits, float8 state": short.step,
        }
        if deepspeed is not None:
            contenders["DeepSpeed CPUAdam"] = _converting(shapes, deepspeed)
        yield from compare("steps", case, {name: partial(timed, step) for name, step in contenders.items()}, rounds)


def iterations(rounds: int) -> Iterator[Line]:
    """Yield the times of whole iterations on a GPU, and print the most memory of it that they take beside weights."""
    if not torch.cuda.is_available():
        print("iterations are timed on a GPU, and here is none", file=sys.stderr)
        return
    made = {"offloaded": _iterating(offloaded=True), "on the device": _iterating(offloaded=False)}
    yield from compare("iterations", "24 linear layers of 2048", made, rounds)


def _iterating(*, offloaded: bool) -> Callable[[], float]:
    """Return an iteration of training."""
    with torch.device("cuda"):
        model = nn.Sequential(*(nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(24)))
        rows = torch.ones(4096, 2048, dtype=torch.bfloat16)
    optimizer = surefoot.AdamW(model.parameters(), **MASTERS)
    if offloaded:
        optimizer.offload(model)

    def iterate() -> None:
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        iterate()
    taken = torch.cuda.max_memory_allocated() - before
    print(f"{'offloaded' if offloaded else 'on the device'}: {taken / 2**20:.0f} MiB beside weights")
    return lambda: timed(iterate)


if __name__ == "__main__":
    run({"steps": steps, "iterations": iterations}, "offload", "The CPU's step for a model on a device.")
