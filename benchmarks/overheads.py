"""What surefoot costs beside its steps: imports, first steps, memory, Python per tensor.

    python benchmarks/overheads.py                       # all of it, in about twelve minutes on two quiet cores
    python benchmarks/overheads.py --part import memory  # some of it

It prints a table and writes `benchmarks/results/overheads.csv`.  What depends on a fresh process runs in one.
"""

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import Parameter

import surefoot
from surefoot.benchmark import SHAPE_LISTS, Case, Quartiles, ShapeList, circumstances, measure, write_csv
from surefoot.benchmark import TORCH_VARIANTS as VARIANTS

IMPORT = """
import torch
from time import perf_counter
start = perf_counter()
import surefoot
print(perf_counter() - start)
"""
PROCESS = """
import torch
from time import perf_counter
param = torch.nn.Parameter(torch.zeros(10, 10))
param.grad = torch.ones(10, 10)
start = perf_counter()
import {package}
{package}.Adam([param], {options}).step()
print(perf_counter() - start)
"""
MEBIBYTE = 1 << 20
SIDE, TENSORS = 2000, 4
"""Parameters in the measurement of memory: a temporary of the size of one takes 15 MiB."""
ONE = ShapeList("one", "1 x 1", ((1,),))
TORCH = "torch foreach"


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        what: the quantity.
        of: the optimizer or engine.
        case: under which circumstances.
        value: median; then the quartiles.
        unit: of the values.
        most: what it must not exceed, NaN for a value that stands there to compare with.
    """

    what: str
    of: str
    case: str
    value: float
    q1: float
    q3: float
    unit: str
    most: float

    @property
    def verdict(self) -> str:
        """Whether the value is in its limit."""
        if np.isnan(self.most):
            return ""
        return f"{'at most' if self.value <= self.most else '**over**'} {self.most:g}"


def main() -> None:
    """Measure what is asked for, print and write it; or be the fresh process of a measurement."""
    parser = argparse.ArgumentParser(description="Measure what surefoot costs beside its steps.")
    names = list(PARTS)
    parser.add_argument("--part", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeat", type=int, default=3, help="processes for each value")
    parser.add_argument("--optimizer", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps(CHILDREN[name](*arguments)))
        return
    lines: list[Line] = []
    for part in options.part:
        for line in PARTS[part](options.optimizer, options.repeat):
            print(f"{line.what}, {line.of}, {line.case}: {line.value:.3g} {line.unit}", file=sys.stderr, flush=True)
            lines.append(line)
    print(markdown(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    columns = ("machine", "date", "torch", "threads", *Line._fields)
    write_csv(options.out / "overheads.csv", ((*circumstances(), *line) for line in lines), columns)


def markdown(lines: Sequence[Line]) -> str:
    """Write the table."""
    rows = [f"| {line.what} | {line.of} | {line.case} | {_value(line)} | {line.verdict} |" for line in lines]
    return "\n".join(["| what | of | case | median (quartiles) | limit |", "|---|---|---|---|---|", *rows])


def _value(line: Line) -> str:
    return f"{line.value:.3g} ({line.q1:.3g} to {line.q3:.3g}) {line.unit}"


def _line(what: str, of: str, case: str, values: Sequence[float], unit: str, most: float = np.nan) -> Line:
    return Line(what, of, case, *Quartiles.of(np.array(values)), unit, most)


def _child(*arguments: str, cache: str | None = None) -> Any:
    """Run this script in a fresh process and give what it measured."""
    return json.loads(_fresh([sys.executable, __file__, "--child", *arguments], cache))


def _fresh(command: Sequence[str], cache: str | None = None) -> str:
    """Run a command in a fresh process, which finds Python's bytecode on disk as that of an installed package is."""
    environment = {**os.environ, **({"SUREFOOT_CACHE_DIR": cache} if cache else {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout  # noqa: S603


# Imports


def imports(_variants: Sequence[str], repeat: int) -> Iterator[Line]:
    """Time `import surefoot` where torch is imported already."""
    command = [sys.executable, "-c", IMPORT]
    times = [float(_fresh(command)) for _ in range(2 * repeat + 1)]
    yield _line("import", "surefoot", "after torch", times, "s", 0.1)


# First steps


def first_steps(variants: Sequence[str], repeat: int) -> Iterator[Line]:
    """Time a first step: in an empty cache folder, with all but the kernel in it, with that too, and in use already."""
    for variant in variants:
        yield from _first_steps(variant, ONE, repeat)
    for shapes in ("overhead", "tiny", "large"):
        yield from _first_steps("Adam", SHAPE_LISTS[shapes], repeat)


def _first_steps(variant: str, shapes: ShapeList, repeat: int) -> Iterator[Line]:
    cold, new, warm = [], [], []
    for _ in range(max(5, repeat)):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_child("first", variant, shapes.name, cache=cache))
            warm.append(_child("first", variant, shapes.name, cache=cache))
            for kernel in Path(cache).glob(f"{VARIANTS[variant].optimizer.lower()}_*"):
                kernel.unlink()
            new.append(_child("first", variant, shapes.name, cache=cache))
    limits = (0.5, 0.2, 0.15) if shapes is ONE else (np.nan,) * 3
    for state, values, most in zip(
        ("nothing cached", "kernel new", "kernel on disk"), (cold, new, warm), limits, strict=True
    ):
        yield _line("first step", variant, f"{shapes.title}, {state}", [first for first, _ in values], "s", most)
    yield _line("first step", variant, f"{shapes.title}, kernel in use", [second for _, second in (*cold, *warm)], "s")


def _first_step(variant: str, shapes: str) -> tuple[float, float]:
    """Time the first step of an optimizer, and that of a second one, which has to make its state as well."""
    return _new_optimizer(variant, shapes), _new_optimizer(variant, shapes)


def _new_optimizer(variant: str, shapes: str) -> float:
    params = [Parameter(torch.zeros(shape)) for shape in (SHAPE_LISTS.get(shapes) or ONE).shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    return _timed(_ours(variant, params).step)


def _ours(variant: str, params: list[Parameter]) -> surefoot.Optimizer:
    made: surefoot.Optimizer = getattr(surefoot, VARIANTS[variant].optimizer)(params, **VARIANTS[variant].options)
    return made


def _timed(step: Callable[[], object]) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start


# Kernels


def kernels(_variants: Sequence[str], repeat: int) -> Iterator[Line]:
    """Time where the time of a first kernel goes: the import of LLVM, our lowering, LLVM's passes, linking, reading."""
    for of in KERNELS:
        with tempfile.TemporaryDirectory() as cache:
            measured = [_child("kernel", of, cache=cache) for _ in range(max(5, repeat))]
        for stage in measured[0]:
            most = {"new, all of it": 0.2, "on disk, all of it": 0.05}.get(stage, np.nan)
            yield _line("a kernel", of, stage, [each[stage] for each in measured], "s", most)


def _kernel(of: str) -> Mapping[str, float]:
    """Time the stages of a kernel from its source to an address."""
    from surefoot.explain import source  # noqa: PLC0415
    from surefoot.tensors.native.guards import guard_source  # noqa: PLC0415

    text = guard_source() if KERNELS[of] is None else source(*KERNELS[of]())  # type: ignore[misc]
    times = {"import of llvmlite": _timed(lambda: importlib.import_module("llvmlite.binding"))}
    from surefoot.codegen import compile as compiling  # noqa: PLC0415
    from surefoot.codegen.lower import lower  # noqa: PLC0415
    from surefoot.codegen.processor import host  # noqa: PLC0415

    times["processor"] = _timed(lambda: compiling._key(text, host()))
    times["lowering"] = _timed(lambda: lower(text))
    times["LLVM, with lowering"] = _timed(lambda: compiling._compile(text, host()))
    code = compiling._compile(text, host())
    times["linking"] = _timed(lambda: compiling._link(code))
    times["new, all of it"] = _timed(lambda: compiling.build_kernel(f"{text}\n# {os.getpid()}", "new"))
    compiling.build_kernel(text, "old")
    times["on disk, all of it"] = _timed(lambda: compiling.build_kernel(text, "old"))
    return times


def _optimizer_of_kernel(name: str, **options: Any) -> Callable[[], tuple[surefoot.Optimizer, torch.Tensor]]:
    param = torch.zeros(2, 2)
    return lambda: (getattr(surefoot, name)([param], **options), param)


KERNELS: Mapping[str, Callable[[], tuple[surefoot.Optimizer, torch.Tensor]] | None] = {
    "the guard": None,
    "SGD": _optimizer_of_kernel("SGD"),
    "NAdam, weight decay": _optimizer_of_kernel("NAdam", weight_decay=0.1),
}


def processes(_variants: Sequence[str], repeat: int) -> Iterator[Line]:
    """Time what a process that has imported torch needs for its first step, with all kernels on disk; and torch's own.

    Both make an optimizer, which in torch imports a good part of what compiles models.
    """
    with tempfile.TemporaryDirectory() as cache:
        for of, package, most in (("surefoot", "surefoot", 0.15), ("torch foreach", "torch.optim", np.nan)):
            command = [sys.executable, "-c", PROCESS.format(package=package, options="foreach=True" * (of != package))]
            _fresh(command, cache)  # fills the cache
            times = [float(_fresh(command, cache)) for _ in range(max(5, repeat))]
            yield _line("import, constructor and first step", of, "after torch", times, "s", most)


# Memory


def memory(variants: Sequence[str], repeat: int) -> Iterator[Line]:
    """Reduction how far the first step, and a later one, exceed the state; and, to compare with, torch's foreach."""
    for variant in variants:
        yield from _memory(variant, "surefoot", "contiguous", repeat, 1.0)
    yield from _memory("Adam", "surefoot", "transposed", repeat, 1.0)
    yield from _memory("Adam", TORCH, "contiguous", 1, np.nan)


def _memory(variant: str, engine: str, layout: str, repeat: int, most: float) -> Iterator[Line]:
    measured = [_child("memory", variant, engine, layout) for _ in range(repeat)]
    of = variant if engine == "surefoot" else f"{variant}, {engine}"
    for step in ("first", "later"):
        values = [each[step] / MEBIBYTE for each in measured]
        yield _line("memory beyond the state", of, f"{step} step, {layout}", values, "MiB", most)


def _memory_of_steps(variant: str, engine: str, layout: str) -> Mapping[str, float]:
    """Give the bytes by which a first and a later step exceed the state, in a process that has compiled already."""
    _optimizer(variant, engine, layout, 300)[0].step()
    optimizer, state = _optimizer(variant, engine, layout, SIDE)
    gc.collect()
    first = _peak(optimizer.step) - state()
    return {"first": first, "later": _peak(optimizer.step)}


def _optimizer(variant: str, engine: str, layout: str, side: int) -> tuple[torch.optim.Optimizer, Callable[[], int]]:
    """Make an optimizer of square matrices, and what counts the bytes of its state."""
    params = [torch.full((side, side), 1.0) for _ in range(TENSORS)]
    leaves = [Parameter(param.t() if layout == "transposed" else param) for param in params]
    for param in leaves:
        param.grad = torch.full((side, side), 0.5)
    optimizer: torch.optim.Optimizer = (
        getattr(torch.optim, VARIANTS[variant].optimizer)(leaves, foreach=True, **VARIANTS[variant].options)
        if engine == TORCH
        else _ours(variant, leaves)
    )

    def state_bytes() -> int:
        tensors = (value for state in optimizer.state.values() for value in state.values())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor))

    return optimizer, state_bytes


def _peak(step: Callable[[], object]) -> int:
    """Give the bytes by which the process grew during a step, at most.  Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark of most memory starts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# Python


def python(variants: Sequence[str], _repeat: int) -> Iterator[Line]:
    """Reduction what a tensor of one element costs in a step, which is all overhead: one of many, and one alone."""
    for variant, (shapes, limit) in product(variants, ((SHAPE_LISTS["overhead"], 0.5), (ONE, np.nan))):
        measurement = measure(Case(VARIANTS[variant], shapes, torch.float32), seconds=2.0)
        for name, most in (("surefoot", limit), (measurement.best_of_torch, np.nan)):
            of = variant if name == "surefoot" else f"{variant}, {name}"
            values = 1e6 * measurement.seconds[name] / len(shapes.shapes)
            yield _line("a tensor in a step", of, shapes.title, list(values), "us", most)


# The GPU engine's host


def gpu_host(variants: Sequence[str], _repeat: int) -> Iterator[Line]:
    """Reduction what a tensor costs the host in a step of the GPU engine, launches left out; it needs no GPU."""
    for variant in variants:
        for way in ("host", "capturable"):
            for count in ("1000", "5000"):
                values = _child("gpu-host", variant, way, count)
                yield _line("a tensor in a step on a GPU", f"{variant}, {way}", f"{count} x 1", values, "us", 1.0)


def _host_of_gpu_steps(variant: str, way: str, count: str) -> list[float]:
    """Time steps of the GPU engine on tensors of the CPU; nothing is launched, and each step has other gradients.

    What torch computes on the device when `capturable` is computed by the CPU here, in place of being launched.
    """
    from surefoot.engines import gpu  # noqa: PLC0415
    from surefoot.engines.gpu.plan import Plan  # noqa: PLC0415 (Triton)
    from surefoot.engines.gpu.scalars import Scattered  # noqa: PLC0415
    from surefoot.state import check  # noqa: PLC0415

    gpu.DEVICES = check.CAPTURABLE_DEVICES = ("cpu",)  # type: ignore[assignment]
    Plan._start = Scattered._launch = lambda *_: None  # type: ignore[method-assign,assignment]
    torch.set_num_threads(1)
    params = [Parameter(torch.zeros(1)) for _ in range(int(count))]
    gradients = [[torch.ones(1) for _ in params] for _ in range(2)]
    options = {**VARIANTS[variant].options, "fused": True, "capturable": way == "capturable"}
    optimizer = getattr(surefoot, VARIANTS[variant].optimizer)(params, **options)
    times = []
    for step in range(100):
        for param, gradient in zip(params, gradients[step % 2], strict=True):
            param.grad = gradient
        start = thread_time()  # of the processor: other programs' is not counted
        optimizer.step()
        times.append(1e6 * (thread_time() - start) / len(params))
    return times[5:]


PARTS = {
    "import": imports,
    "first-step": first_steps,
    "kernel": kernels,
    "process": processes,
    "memory": memory,
    "python": python,
    "gpu-host": gpu_host,
}
CHILDREN: Mapping[str, Callable[..., Any]] = {
    "first": _first_step,
    "kernel": _kernel,
    "memory": _memory_of_steps,
    "gpu-host": _host_of_gpu_steps,
}


if __name__ == "__main__":
    main()
