"""What AdamW costs with short numbers: milliseconds, bytes and instructions, beside float32 and beside others.

    python benchmarks/short.py           # formats of surefoot, torch's fused AdamW
    python benchmarks/short.py --peers   # also torchao, bitsandbytes, optimi, those that are installed

It prints a table for each list of shapes and writes `benchmarks/results/short.csv`.  All contenders step the same
gradients in turns; a round's ratio is to surefoot's float32 step of that round.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from loops import loops_with
from torch import Tensor
from turns import take_turns, timed, write

import surefoot
from surefoot.benchmark import Quartiles
from surefoot.codegen.compile import assembly
from surefoot.engines.cpu.source import Layout, print_kernel
from surefoot.storage import format_of

Shapes = tuple[tuple[int, ...], ...]
SHAPES: dict[str, Shapes] = {"8 x 4 M": ((2000, 2000),) * 8, "200 x 100 k": ((250, 400),) * 200}
IN_CACHE: Shapes = ((256, 256),)
BF16 = torch.bfloat16
OURS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 weights and state": (BF16, {}),
    "bf16 stochastic, float32 state": (BF16, {"rounding": "stochastic", "state_dtype": torch.float32}),
    "bf16 + 8 bits, float32 state": (BF16, {"master_weight_bits": 24, "state_dtype": torch.float32}),
    "bf16 + 16 bits, float32 state": (BF16, {"master_weight_bits": 32, "state_dtype": torch.float32}),
    "float32, float8 state": (torch.float32, {"state_dtype": "float8"}),
    "bf16 stochastic, float8 state": (BF16, {"rounding": "stochastic", "state_dtype": "float8"}),
    "bf16 + 8 bits, float8 state": (BF16, {"master_weight_bits": 24, "state_dtype": "float8"}),
}
BASE = "float32"


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        parameters: which list of shapes.
        optimizer: the contender.
        ms: milliseconds of a step, median over rounds.
        ratio, ratio_q1, ratio_q3: its time over that of surefoot's float32 step, median of the rounds' and quartiles.
        bytes: of weights and state, for each parameter.
        in_cache_ns: nanoseconds for each of 64 k parameters on one thread, the step's fixed cost included; the least.
        instructions: of the kernel's loops for each parameter, as LLVM makes them for this processor.
    """

    parameters: str
    optimizer: str
    ms: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    bytes: float
    in_cache_ns: float
    instructions: float


class Contender(NamedTuple):
    """An optimizer: its name, the dtype of weights, and what makes it."""

    name: str
    dtype: torch.dtype
    make: Callable[[list[Tensor]], Any]

    def prepared(self, shapes: Shapes) -> tuple[list[Tensor], Any]:
        """Return parameters with gradients, and the optimizer when it has state."""
        params = parameters(shapes, self.dtype)
        optimizer = self.make(params)
        optimizer.step()
        return params, optimizer


def contenders() -> Iterator[Contender]:
    """Yield ours and torch's."""
    for name, (dtype, formats) in OURS.items():
        yield Contender(name, dtype, lambda params, formats=formats: surefoot.AdamW(params, **formats))
    yield Contender("torch fused, float32", torch.float32, lambda params: torch.optim.AdamW(params, fused=True))
    yield Contender("torch fused, bf16", BF16, lambda params: torch.optim.AdamW(params, fused=True))


def peers() -> Iterator[Contender]:
    """Yield those of other packages, where they are installed."""
    for package, name, dtype, options in (
        ("torchao.optim", "AdamW8bit", torch.float32, {}),
        ("torchao.optim", "AdamW8bit", BF16, {"bf16_stochastic_round": True}),
        ("bitsandbytes.optim", "AdamW8bit", torch.float32, {}),
        ("bitsandbytes.optim", "AdamW8bit", BF16, {}),
        ("optimi", "AdamW", BF16, {"kahan_sum": True, "lr": 1e-3}),
    ):
        try:
            make = getattr(importlib.import_module(package), name)
        except ImportError as error:
            print(f"{package}: {error}")
            continue
        title = f"{package.split('.')[0]} {name}, {'bf16' if dtype is BF16 else 'float32'}"
        yield Contender(title, dtype, lambda params, make=make, options=options: make(params, **options))


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    """Return parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 0.01).to(dtype)
    return params


def held_bytes(params: list[Tensor], optimizer: Any) -> float:
    """Return bytes of weights and state for each parameter, as they lie in memory."""
    tensors = [t for param in params for t in (param, *_tensors(optimizer.state[param]))]
    return sum(t.untyped_storage().nbytes() for t in tensors) / sum(param.numel() for param in params)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Tensor) and type(value) is Tensor:
        yield value
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))


def instructions(optimizer: surefoot.Optimizer) -> float:
    """Return the instructions for each element of an optimizer's kernel, NaN if its loops are not those expected.

    They are those of the loop that updates, which alone takes a square root, and of the one that packs slots in 8 bits.
    """
    (run,) = optimizer._step_cache.runs
    param, *slots = run.bucket.kept
    layout = Layout(run.bucket.compute_dtype, (param, format_of(run.bucket.dtype), *slots))
    printed = assembly(print_kernel(run.bucket.rule, layout))
    updating, packing = loops_with(printed, "vsqrtps"), loops_with(printed, "vpmovdb", without="vsqrtps")
    packed = sum(kept.code is not None for kept in slots)
    if not updating or (packed and not packing):
        return float("nan")
    return max(updating) + packed * max(packing, default=0.0)


def in_cache(contender: Contender) -> tuple[float, float]:
    """Return nanoseconds and instructions for each parameter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    params, optimizer = contender.prepared(IN_CACHE)
    seconds = take_turns({contender.name: lambda: timed(optimizer.step)}, 30)[contender.name]
    counted = instructions(optimizer) if contender.name in OURS else float("nan")
    torch.set_num_threads(threads)
    return 1e9 * seconds.min() / params[0].numel(), counted


def measure(title: str, chosen: list[Contender], rounds: int) -> Iterator[Line]:
    """Yield the lines of a list of shapes."""
    prepared = {contender.name: contender.prepared(SHAPES[title]) for contender in chosen}
    held = {name: held_bytes(*each) for name, each in prepared.items()}
    steps = {name: lambda each=each: timed(each.step) for name, (_, each) in prepared.items()}
    seconds = take_turns(steps, rounds)
    for contender in chosen:
        name = contender.name
        ratios = Quartiles.of(seconds[name] / seconds[BASE])
        yield Line(title, name, 1e3 * float(np.median(seconds[name])), *ratios, held[name], *in_cache(contender))


def main() -> None:
    """Print the lines and write them."""
    parser = argparse.ArgumentParser(description="Time AdamW with short numbers.")
    parser.add_argument("--peers", action="store_true", help="with those of other packages")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    chosen = [*contenders(), *(peers() if options.peers else ())]
    lines = []
    print(" | ".join(Line._fields))
    for line in (line for title in SHAPES for line in measure(title, chosen, options.rounds)):
        lines.append(line)
        print(" | ".join(f"{value:.2f}" if isinstance(value, float) else value for value in line), flush=True)
    write(options.out / "short.csv", lines, Line._fields)


if __name__ == "__main__":
    main()
