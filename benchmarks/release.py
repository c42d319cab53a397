"""Gradients released while backward runs: the memory that training takes, seen from outside, and the time.

    python benchmarks/release.py                 # both, in about three minutes on two quiet cores, with 3 GB
    python benchmarks/release.py --part memory
    python benchmarks/release.py --draw          # the picture anew, from the csv file that is there

Memory is what the system has counted as most of a process that does nothing else, less what it had before the model was
made, with kernels compiled and torch warm.  glibc is told to give freed tensors back (MALLOC_MMAP_THRESHOLD_), which it
keeps otherwise, the more the smaller the pieces are that are made between them.  Activations are in it: of eight rows
they are few.  It writes `benchmarks/results/release_memory.csv`, which it draws, and `release.csv`; the ratios of the
latter are of neighbours in time.
"""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from turns import Line as TimeLine
from turns import compare, timed, write

import surefoot

ROWS, ITERATIONS = 8, 4
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "release.png"
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


def read(path: Path) -> list[MemoryLine]:
    """Return the lines of the table of memory."""
    with path.open(newline="") as file:
        return [
            MemoryLine(row["contender"], int(row["parameters"]), float(row["megabytes"]), float(row["bytes_each"]))
            for row in csv.DictReader(file)
        ]


SHOWN = {
    "torch": ("torch.optim.AdamW(fused=True)", "#b8b8b8"),
    "surefoot": ("surefoot.AdamW", "#8fb0dd"),
    HOOKS: ("torch's, one for each parameter in hooks", "#b8b8b8"),
    "released": ("surefoot.AdamW, released", "#1c4f9c"),
    "short numbers": ("24-bit weights, 8-bit state", "#8fb0dd"),
    "short numbers, released": ("24-bit weights, 8-bit state, released", "#1c4f9c"),
}
"""Contenders in the picture, from top to bottom: what they are called, and the colour of their bars."""


def draw(lines: list[MemoryLine], path: Path) -> None:
    """Draw the memory of each contender as a bar."""
    sizes = {line.contender: line.bytes_each for line in lines}
    figure = Figure(figsize=(7.5, 2.7), layout="constrained")
    axis = figure.subplots()
    labels, colours = zip(*SHOWN.values(), strict=True)
    bars = axis.barh(labels, [sizes[name] for name in SHOWN], color=colours)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(sizes.values()))
    axis.set_xlabel(f"most bytes of a training step for each of {lines[0].parameters / 1e6:.0f} million parameters")
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


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
    parser.add_argument("--draw", action="store_true", help="measure nothing, and draw what was written")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    table = options.out / "release_memory.csv"
    if options.draw:
        draw(read(table), options.picture)
        return
    if "memory" in options.part:
        lines = []
        for line in memory():
            lines.append(line)
            print(f"{line.contender:40} {line.megabytes:8.1f} MB {line.bytes_each:6.2f} bytes a parameter", flush=True)
        write(table, lines, MemoryLine._fields)
        draw(lines, options.picture)
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
