"""Gradients released while backward runs: the memory that training takes, seen from outside, and the time.

    python benchmarks/release.py                 # both, in about three minutes on two quiet cores, with 3 GB
    python benchmarks/release.py --part memory

Memory is what the system has counted as most of a process that does nothing else, less what it had before the model was
made, with kernels compiled and torch warm.  glibc is told to give freed tensors back (MALLOC_MMAP_THRESHOLD_), which it
keeps otherwise, the more the smaller the pieces are that are made between them.  Activations are in it: of eight rows
they are few.  It writes `benchmarks/results/release_memory.csv` and `release.csv`; the ratios of the latter are of
neighbours in time.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from turns import Line as TimeLine
from turns import compare, timed, write

import surefoot

ROWS, ITERATIONS = 8, 4
SHORT = {"master_weight_bits": 24, "state_dtype": "float8"}
Loop = Callable[[nn.Module], Callable[[], object]]


def _loop(model: nn.Module, step: Callable[[], object]) -> Callable[[], object]:
    """Return an iteration of training."""
    param = next(model.parameters())
    rows = torch.ones(ROWS, param.shape[-1], dtype=param.dtype)

    def iterate() -> None:
        model(rows).square().mean().backward()
        step()

    return iterate


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _loop(model, step)


def _ours(model: nn.Module, **options: object) -> Callable[[], object]:
    return _plain(model, surefoot.AdamW(model.parameters(), **options))


def _released(model: nn.Module, **options: object) -> Callable[[], object]:
    optimizer = surefoot.AdamW(model.parameters(), **options)
    optimizer.release_gradients(model)
    return _plain(model, optimizer)


def _torchs(model: nn.Module) -> Callable[[], object]:
    return _plain(model, torch.optim.AdamW(model.parameters(), fused=True))


def _torchs_hooks(model: nn.Module) -> Callable[[], object]:
    """Return an iteration in torch's way: an optimizer and a hook for each parameter."""
    optimizers = {param: torch.optim.AdamW([param], fused=True) for param in model.parameters()}

    def step(param: torch.Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    return _loop(model, lambda: None)


HOOKS = "torch, an optimizer for each parameter"
LOOPS: dict[str, tuple[torch.dtype, Loop]] = {
    "torch": (torch.float32, _torchs),
    HOOKS: (torch.float32, _torchs_hooks),
    "surefoot": (torch.float32, _ours),
    "released": (torch.float32, _released),
    "short numbers": (torch.bfloat16, lambda model: _ours(model, **SHORT)),
    "short numbers, released": (torch.bfloat16, lambda model: _released(model, **SHORT)),
}
"""Contenders of the memory: the dtype of weights, and what makes an iteration."""


def _mlp(width: int, blocks: int, dtype: torch.dtype) -> nn.Module:
    """Return layers as of a transformer, eight `width`² elements a block."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.LayerNorm(width, dtype=dtype), nn.Linear(width, 4 * width, dtype=dtype)]
        layers += [nn.GELU(), nn.Linear(4 * width, width, dtype=dtype)]
    return nn.Sequential(*layers)


class MemoryLine(NamedTuple):
    """A line of the table of memory.

    Attributes:
        contender: what trains.
        parameters: how many there are.
        megabytes: the most that training has taken, in 10^6 bytes.
        bytes_each: the same in bytes a parameter.
    """

    contender: str
    parameters: int
    megabytes: float
    bytes_each: float


def memory(width: int = 1024, blocks: int = 12) -> Iterator[MemoryLine]:
    """Measure what training takes, one process after the other."""
    for name in LOOPS:
        command = [sys.executable, __file__, "--train", name, str(width), str(blocks)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_WAIT_POLICY": "passive"}
        with subprocess.Popen(  # noqa: S603 (this script)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as child:
            if child.stdin is None or child.stdout is None or child.stdout.readline() != "warm\n":
                raise RuntimeError(f"{name} has failed")
            before = _status(child.pid, "VmRSS")
            Path(f"/proc/{child.pid}/clear_refs").write_text("5", encoding="ascii")  # its most begins anew
            print("go", file=child.stdin, flush=True)
            count = int(child.stdout.readline())
            taken = _status(child.pid, "VmHWM") - before
        yield MemoryLine(name, count, round(taken / 1e6, 1), round(taken / count, 2))


def _status(pid: int, name: str) -> int:
    """Return bytes that the system reports of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _train(name: str, width: int, blocks: int) -> None:
    """Be the process that is measured: train a small model, so that all is compiled, then the large one."""
    dtype, make = LOOPS[name]
    for size, count in ((64, 2), (width, blocks)):
        model = _mlp(size, count, dtype)
        iterate = make(model)
        for _ in range(ITERATIONS):
            iterate()
        parameters = sum(param.numel() for param in model.parameters())
        if size == width:
            print(parameters, flush=True)
        else:
            print("warm", flush=True)
        sys.stdin.readline()


def time(rounds: int) -> Iterator[TimeLine]:
    """Time an iteration of models of 120 parameters, forward pass included."""

    def made(loop: Loop, width: int) -> Callable[[], float]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(60)))
        iterate = loop(model)
        return lambda: timed(iterate)

    for width in (512, 16):
        contenders = {name: made(LOOPS[name][1], width) for name in ("released", "surefoot", "torch", HOOKS)}
        yield from compare("time", f"60 linear layers of {width}", contenders, rounds)


def main() -> None:
    """Measure what the command line asks for."""
    if sys.argv[1:2] == ["--train"]:
        _train(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--part", nargs="+", choices=("memory", "time"), default=("memory", "time"), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    if "memory" in options.part:
        lines = []
        for line in memory():
            lines.append(line)
            print(f"{line.contender:40} {line.megabytes:8.1f} MB {line.bytes_each:6.2f} bytes a parameter", flush=True)
        write(options.out / "release_memory.csv", lines, MemoryLine._fields)
    if "time" in options.part:
        found = []
        for each in time(options.rounds):
            found.append(each)
            print(
                f"{each.case}, {each.contender}: {each.ms:.1f} ms; {each.other} takes {each.ratio:.2f} times as long",
                flush=True,
            )
        write(options.out / "release.csv", found, TimeLine._fields)


if __name__ == "__main__":
    main()
