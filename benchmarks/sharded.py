"""Steps of sharded parameters beside torch's: time, collectives and their bytes, on two processes of this machine.

    python benchmarks/sharded.py

Each contender has the same parameters, `Shard(0)` over two ranks; contenders take turns in one run, so that what
disturbs the machine disturbs all alike.  Times are of the slower rank.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import surefoot
from surefoot.benchmark import circumstances, write_csv

CASES = {"200 x 1 k": (200, (32, 32)), "50 x 100 k": (50, (320, 320)), "8 x 4 M": (8, (2048, 2048))}
COLLECTIVES = {
    distributed: ("all_reduce", "all_gather_single", "all_to_all_single", "all_gather", "broadcast"),
    functional: ("all_reduce", "all_gather_tensor", "all_to_all_single", "reduce_scatter_tensor", "broadcast"),
}
COLUMNS = (
    "case",
    "contender",
    "ms",
    "ms_q1",
    "ms_q3",
    "other",
    "ratio",
    "ratio_q1",
    "ratio_q3",
    "collectives",
    "bytes",
)


@contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    """Count collectives and the bytes that a rank puts into them."""
    originals = {(module, name): getattr(module, name) for module, names in COLLECTIVES.items() for name in names}

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            calls["collectives"] += 1
            calls["bytes"] += min((each.numel() * each.element_size() for each in tensors), default=0)
            return function(*args, **kwargs)

        return call

    for (module, name), function in originals.items():
        setattr(module, name, counting(function))
    try:
        yield
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)


def contenders() -> dict[str, tuple[Any, dict[str, Any], float | None, str]]:
    """Return for each contender what makes its optimizer, and the most that its gradients' norm may be."""
    return {
        "AdamW": (surefoot.AdamW, {}, None, "torch AdamW foreach"),
        "AdamW, max_grad_norm": (surefoot.AdamW, {"max_grad_norm": 1.0}, None, "torch AdamW foreach, clip_grad_norm_"),
        "AdamW, plain tensors": (surefoot.AdamW, {}, None, "torch AdamW fused"),
        "Muon": (surefoot.Muon, {}, None, "torch Muon"),
        "Adafactor": (surefoot.Adafactor, {}, None, ""),
        "torch AdamW foreach": (torch.optim.AdamW, {"foreach": True}, None, ""),
        "torch AdamW fused": (torch.optim.AdamW, {"fused": True}, None, ""),
        "torch AdamW foreach, clip_grad_norm_": (torch.optim.AdamW, {"foreach": True}, 1.0, ""),
        "torch Muon": (torch.optim.Muon, {}, None, ""),
    }


class Contender:
    """An optimizer with parameters of its own."""

    def __init__(self, name: str, count: int, shape: tuple[int, ...], mesh: DeviceMesh) -> None:
        cls, options, self.norm, _ = contenders()[name]
        local = (shape[0] // mesh.size(), *shape[1:])
        self.plain, self.mesh = "plain" in name, mesh
        self.locals = [torch.randn(local, generator=torch.Generator().manual_seed(i)) for i in range(count)]
        self.params = [torch.nn.Parameter(self.made(torch.randn(local))) for _ in range(count)]
        self.optimizer = cls(self.params, **options)

    def made(self, local: Tensor) -> Tensor:
        """Return a shard as a parameter or gradient of this contender."""
        return local if self.plain else DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False)

    def step(self) -> float:
        """Return the seconds of a step."""
        for param, grad in zip(self.params, self.locals, strict=True):
            param.grad = self.made(grad.clone())
        distributed.barrier()
        start = perf_counter()
        if self.norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.norm)
        self.optimizer.step()
        return perf_counter() - start


def measured(
    count: int, shape: tuple[int, ...], mesh: DeviceMesh, rounds: int
) -> tuple[dict[str, list[float]], dict[str, Counter[str]]]:
    """Return for each contender the slower rank's seconds of each round, and its collectives."""
    found = {}
    heavy = count * shape[0] * shape[1] > 1 << 24
    for name in contenders():
        if heavy and name in ("torch Muon", "Muon"):
            continue
        found[name] = Contender(name, count, shape, mesh)
    seconds, calls = {name: [] for name in found}, {}
    for name, contender in found.items():
        contender.step()
        calls[name] = Counter()
        with counted(calls[name]):
            contender.step()
    for _ in range(rounds):
        for name, contender in found.items():
            own = torch.tensor(contender.step(), dtype=torch.float64)
            distributed.all_reduce(own, distributed.ReduceOp.MAX)
            seconds[name].append(own.item())
    return seconds, calls


def quartiles(values: list[float]) -> tuple[float, ...]:
    """Return median and quartiles."""
    return statistics.median(values), *(statistics.quantiles(values, n=4)[i] for i in (0, 2))


def run_rank(rank: int, store: str, rounds: int, out: Path) -> None:
    """Measure on one of the processes; the first prints and writes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, lines = init_device_mesh("cpu", (2,)), []
    for case, (count, shape) in CASES.items():
        seconds, calls = measured(count, shape, mesh, rounds)
        for name, (_, _, _, other) in contenders().items():
            if name not in seconds:
                continue
            ratios = [b / a for a, b in zip(seconds[name], seconds.get(other, []), strict=False)]
            of_torch = quartiles(ratios) if ratios else ("", "", "")
            ms = [1e3 * value for value in quartiles(seconds[name])]
            called = calls[name]
            lines.append((case, name, *ms, other if ratios else "", *of_torch, called["collectives"], called["bytes"]))
            if rank == 0:
                shown = f"{of_torch[0]:.2f} ({of_torch[1]:.2f} to {of_torch[2]:.2f})" if ratios else ""
                numbers = f"{called['collectives']:5} {called['bytes']:>10} B"
                print(f"{case:10} {name:38} {ms[0]:9.2f} ms  {shown:24} {numbers}", flush=True)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        columns = ("machine", "date", "torch", "threads", *COLUMNS)
        write_csv(out / "sharded.csv", ((*circumstances(), *line) for line in lines), columns)
    distributed.destroy_process_group()


def main() -> None:
    """Measure on two processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.store, options.rounds, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--out", str(options.out), "--store"]
        ranks = [subprocess.Popen([*command, f"{folder}/store", "--rank", str(rank)]) for rank in range(2)]  # noqa: S603
        sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
