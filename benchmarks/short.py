"""What AdamW costs with short numbers: milliseconds, bytes and instructions, beside float32 and beside others.

    python benchmarks/short.py                     # formats of surefoot, torch's fused AdamW
    python benchmarks/short.py --peers             # also torchao, bitsandbytes, optimi, those that are installed
    python benchmarks/short.py --csv results/short.csv

All contenders step the same gradients in turns, in rounds of random order; a round's ratio is to surefoot's float32
step of that round.  `in cache` is one thread on one tensor of 64 k elements, `instructions` those of the loops per
element, counted in what LLVM prints for this processor.
"""

import argparse
import csv
import gc
import importlib
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import surefoot
from surefoot.codegen import compile as codegen
from surefoot.engines.cpu.source import Layout, print_kernel
from surefoot.storage import format_of

SHAPES = {"8 x 4 M": ((2000, 2000),) * 8, "200 x 100 k": ((250, 400),) * 200}
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
LARGEST_STRIDE = 128
"""Elements that a loop steps over at a time at most; larger numbers are of bytes."""


def peers() -> Iterator[tuple[str, torch.dtype, Callable[[list[Tensor]], Any]]]:
    """Yield the others that are installed: a name, the dtype of weights, and what makes the optimizer."""
    yield "torch fused, float32", torch.float32, lambda params: torch.optim.AdamW(params, fused=True)
    yield "torch fused, bf16", BF16, lambda params: torch.optim.AdamW(params, fused=True)


def installed_peers() -> Iterator[tuple[str, torch.dtype, Callable[[list[Tensor]], Any]]]:
    """Yield those of other packages."""
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
        yield title, dtype, lambda params, make=make, options=options: make(params, **options)


def parameters(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
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


def race(contenders: dict[str, Any], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return for each contender the milliseconds of a step, round by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, draw = list(contenders), random.Random(0)  # noqa: S311 (not a secret)
    gc.collect()
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            step = contenders[name]
            step()
            taken = []
            for _ in range(steps):
                start = time.perf_counter()
                step()
                taken.append(time.perf_counter() - start)
            times[name].append(1000 * statistics.median(taken))
    return times


def instructions(optimizer: surefoot.Optimizer) -> float:
    """Return the instructions per element in the loops of an optimizer's kernel, made for this processor."""
    (run,) = optimizer._step_cache.runs
    param, *slots = run.bucket.kept
    layout = Layout(run.bucket.compute_dtype, (param, format_of(run.bucket.dtype), *slots))
    source = print_kernel(run.bucket.rule, layout)
    total, label, body = 0.0, "", []
    for line in codegen.assembly(source).splitlines():
        if line.startswith(".LBB"):
            label, body = line.split(":")[0], []
        elif line.startswith("\t") and not line.startswith("\t."):
            body.append(line)
            words = line.split()
            if words[0].startswith("j") and words[-1] == label:  # a loop of one block
                lanes = [int(n) for n in re.findall(r"\badd[ql]\s+\$(\d+), %", "\n".join(body))]
                if lanes and any("%ymm" in each or "%zmm" in each for each in body):
                    total += len(body) / max(n for n in lanes if n <= LARGEST_STRIDE)
    return total


def main() -> None:
    """Print a table for each list of shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for title, shapes in SHAPES.items():
        makers = [(n, d, lambda ps, o=o: surefoot.AdamW(ps, **o)) for n, (d, o) in OURS.items()]
        makers += [*peers(), *(installed_peers() if options.peers else ())]
        contenders, held = {}, {}
        torch.set_num_threads(options.threads)
        for name, dtype, make in makers:
            params = parameters(shapes, dtype)
            optimizer = make(params)
            optimizer.step()
            optimizer.step()
            contenders[name], held[name] = optimizer.step, held_bytes(params, optimizer)
        times = race(contenders, options.rounds, options.steps)
        small = {}
        for name, dtype, make in makers:
            params = parameters(((256, 256),), dtype)
            optimizer = make(params)
            torch.set_num_threads(1)
            small[name] = min(race({name: optimizer.step}, 3, 30)[name]) * 1e6 / 65536
            counted = instructions(optimizer) if name in OURS else float("nan")
            torch.set_num_threads(options.threads)
            ratios = sorted(a / b for a, b in zip(times[name], times[BASE], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            rows.append(
                {
                    "parameters": title,
                    "optimizer": name,
                    "ms": round(statistics.median(times[name]), 2),
                    "ratio": round(statistics.median(ratios), 2),
                    "quartiles": f"{low:.2f}-{high:.2f}",
                    "bytes": round(held[name], 2),
                    "in cache ns": round(small[name], 2),
                    "instructions": round(counted, 1),
                }
            )
        print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            if row["parameters"] == title:
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        del contenders
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
