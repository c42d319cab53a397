"""Checkpoints side by side with torch.save and torch.load: time, pause, memory; and kill -9 at random moments.

    python benchmarks/checkpoint.py                          # speed, at 1 GB, in about two minutes
    python benchmarks/checkpoint.py --part kill --kills 200  # the stress, in about ten

It prints a table and writes `benchmarks/results/checkpoint-<part>.csv`.  Every save goes to a new name, as in a
training run, and the file before is removed afterwards; contenders take turns.  Every load runs in a fresh process,
with the file in the system's cache.  The folder for the files is `--folder`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

import surefoot
from surefoot.benchmark import Quartiles, circumstances, write_csv
from surefoot.checkpoint import Checkpoint, header, inspection, manifest_of
from surefoot.checkpoint.collect import Contents
from surefoot.checkpoint.folder import newest
from surefoot.checkpoint.header import Place, Summary

GIGABYTE = 10**9
SIDE = 2048
"""Rows and columns of a layer."""
WRITER = Path(__file__).parents[1] / "tests" / "checkpoint" / "killed_writer.py"


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        what: the quantity.
        of: the contender.
        value: median; then the quartiles.
        unit: of the values.
        ratio: to what it is compared with, NaN for that itself.
        most: what the ratio, or the value where there is none, must not exceed; NaN for what is only told.
    """

    what: str
    of: str
    value: float
    q1: float
    q3: float
    unit: str
    ratio: float = np.nan
    most: float = np.nan

    @property
    def verdict(self) -> str:
        """Whether it is in its limit."""
        if np.isnan(self.most):
            return ""
        judged = self.value if np.isnan(self.ratio) else self.ratio
        return f"{'at most' if judged <= self.most else '**over**'} {self.most:g}"


def main() -> None:
    """Measure what is asked for, print and write it; or be the fresh process of a measurement."""
    parser = argparse.ArgumentParser(description="Reduction checkpoints against torch.save and torch.load.")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=["save", "load", "pause", "inspect"])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of model and state together")
    parser.add_argument("--repeat", type=int, default=9, help="rounds")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps(CHILDREN[name](*arguments)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    columns = ("machine", "date", "torch", "threads", *Line._fields)
    lines: list[Line] = []
    for part in options.part:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = list(PARTS[part](Path(folder), options))
        write_csv(options.out / f"checkpoint-{part}.csv", ((*circumstances(), *line) for line in found), columns)
        lines += found
    print(markdown(lines))


def markdown(lines: Sequence[Line]) -> str:
    """Write the table."""
    rows = [f"| {line.what} | {line.of} | {_value(line)} | {_ratio(line)} | {line.verdict} |" for line in lines]
    return "\n".join(["| what | of | median (quartiles) | ratio | limit |", "|---|---|---|---|---|", *rows])


def _value(line: Line) -> str:
    return f"{line.value:.3g} ({line.q1:.3g} to {line.q3:.3g}) {line.unit}"


def _ratio(line: Line) -> str:
    return "" if np.isnan(line.ratio) else f"{line.ratio:.2f}"


def _compared(
    what: str, seconds: Mapping[str, Sequence[float]], base: str, limits: Mapping[str, float]
) -> Iterator[Line]:
    """Give a line for each contender; a ratio is the median of the ratios in each round."""
    for name, values in seconds.items():
        ratio = np.nan if name == base else float(np.median(np.array(values) / np.array(seconds[base])))
        yield Line(what, name, *Quartiles.of(np.array(values)), "s", ratio, limits.get(name, np.nan))


def _timed(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def make(gigabytes: float, *, state: bool) -> tuple[nn.Module, surefoot.Optimizer]:
    """Make a model and its AdamW, which together take so much, with or without its state."""
    layers = max(1, round(gigabytes * GIGABYTE / (3 * 4 * SIDE * SIDE)))
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)])
    optimizer = surefoot.AdamW(model.named_parameters())
    if state:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


# Saving


def saving(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Time saves, each to a new name."""
    model, optimizer = make(options.gigabytes, state=True)
    contenders: dict[str, Callable[[Path], None]] = {
        "torch.save": lambda path: torch.save(_state(model, optimizer), path),
        "torch.save and fsync": lambda path: _save_and_sync(model, optimizer, path),
        "surefoot.save": lambda path: _ignore(surefoot.save(path, model=model, optimizer=optimizer)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    busy: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.repeat + 1):
        for name, save in contenders.items():
            path = folder / f"{name.split()[-1]}-{turn}.safetensors"
            before = process_time()
            taken = _timed(lambda save=save, path=path: save(path))
            path.with_name(f"{name.split()[-1]}-{turn - 1}.safetensors").unlink(missing_ok=True)
            if turn:  # the first touches memory for the first time
                seconds[name].append(taken)
                busy[name].append(process_time() - before)
    for path in folder.iterdir():
        path.unlink()
    yield from _compared("save", seconds, "torch.save", {"surefoot.save": 1.1})
    yield from _compared("save, CPU time of all threads", busy, "torch.save", {})


def _ignore(_: object) -> None:
    pass


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _save_and_sync(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(_state(model, optimizer), file)
        os.fsync(file.fileno())


# Loading

LOADS = (
    "torch.load and load_state_dict",
    "torch.load(mmap=True) and load_state_dict",
    "torch.load alone",
    "surefoot.load",
)


def loading(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Time loads into a model and an optimizer that are there, each in a fresh process."""
    model, optimizer = make(options.gigabytes, state=True)
    torch.save(_state(model, optimizer), folder / "torch.pt")
    surefoot.save(folder / "ours.safetensors", model=model, optimizer=optimizer)
    del model, optimizer
    found: dict[str, list[Any]] = {name: [] for name in LOADS}
    for _ in range(options.repeat):
        for name in LOADS:
            found[name].append(_child("load", name, str(folder), str(options.gigabytes)))
    seconds = {name: [each["seconds"] for each in values] for name, values in found.items()}
    yield from _compared("load", seconds, LOADS[0], {"surefoot.load": 0.5})
    ratio = float(np.median(np.array(seconds["surefoot.load"]) / np.array(seconds["torch.load alone"])))
    yield Line(
        "load, against torch.load alone", "surefoot.load", *Quartiles.of(np.array(seconds["surefoot.load"])), "s", ratio
    )
    for name, values in found.items():
        grown = np.array([each["memory"] for each in values]) / GIGABYTE
        yield Line("memory of the process grows, at most, by", name, *Quartiles.of(grown), "GB")


def _child(*arguments: str) -> Any:
    """Run this script in a fresh process and give what it measured."""
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 (ourselves)


def _load(name: str, folder: str, gigabytes: str) -> dict[str, float]:
    """Load once; the file is read before, so that it is in the system's cache."""
    path = Path(folder) / ("ours.safetensors" if name == LOADS[3] else "torch.pt")
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    model, optimizer = make(float(gigabytes), state=False)

    def load() -> object:
        if name == LOADS[3]:
            return surefoot.load(path, model=model, optimizer=optimizer)
        found = torch.load(path, weights_only=True, mmap="mmap" in name)
        if name != LOADS[2]:
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
        return found

    kept: list[object] = []
    with Watch() as watch:
        seconds = _timed(lambda: kept.append(load()))
    return {"seconds": seconds, "memory": watch.grown}


class Watch:
    """Watches the process's own memory, without mapped files.  Linux only."""

    def __enter__(self) -> Self:
        self._before = self._most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.grown = max(self._most, self._now()) - self._before

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


# The pause


def pausing(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Time how long an asynchronous save keeps the training loop, against a copy of the same tensors in memory."""
    model, optimizer = make(options.gigabytes, state=True)
    copied, paused = [], []
    for _ in range(options.repeat):
        copied.append(_timed(lambda: deepcopy([model.state_dict(), optimizer.state_dict()["state"]])))
        paused.append(_timed(lambda: surefoot.save(folder, model=model, optimizer=optimizer, keep=1, async_=True)))
        surefoot.checkpoint.wait()
    yield from _compared(
        "pause", {"copy": copied, "surefoot.save(async_=True)": paused}, "copy", {"surefoot.save(async_=True)": 1.0}
    )


# Inspecting


def inspecting(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Time looking into 10 GB: a file with a true header of a thousand tensors whose values are a hole in the disk."""
    path = folder / "hole.safetensors"
    _write_hole(path, 10 * GIGABYTE)
    values = [_timed(lambda: inspection.as_json(Checkpoint(path))) for _ in range(options.repeat)]
    yield Line("inspect 10 GB", "in the process", *Quartiles.of(np.array(values)), "s", most=0.3)
    command = [sys.executable, "-c", "from surefoot.cli import main; main()", "ckpt", "inspect", str(path)]
    run = [_timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(3)]  # noqa: S603
    yield Line("inspect 10 GB", "surefoot ckpt inspect, imports and tables included", *Quartiles.of(np.array(run)), "s")
    imports = [sys.executable, "-c", "import torch"]
    run = [_timed(lambda: subprocess.run(imports, check=True)) for _ in range(3)]  # noqa: S603
    yield Line("inspect 10 GB", "import torch alone, to compare", *Quartiles.of(np.array(run)), "s")
    path.unlink()


def _write_hole(path: Path, size: int) -> None:
    model = nn.ParameterDict({f"layer{i}": torch.zeros(1) for i in range(333)})
    optimizer = surefoot.SGD(model.named_parameters())
    contents = Contents()
    from surefoot.checkpoint.collect import collect_contents  # noqa: PLC0415 (only here)

    contents = collect_contents({"model": model, "optimizer": optimizer}, None, rng=False)
    for name in list(contents.tensors):
        contents.keep(torch.zeros(1), (f"{name}.exp_avg",))
        contents.keep(torch.zeros(1), (f"{name}.exp_avg_sq",))
    side = int((size / len(contents.tensors) / 4) ** 0.5)
    places: dict[str, Place] = {}
    begin = 0
    for name in contents.tensors:
        places[name] = Place(torch.float32, (side, side), begin)
        begin = places[name].end
    summaries = {name: Summary((7,) * -(-place.nbytes // header.CHUNK), 1.5) for name, place in places.items()}
    text = header.compose(places, manifest_of(contents, 1, 0), summaries)
    path.write_bytes(text)
    os.truncate(path, len(text) + begin)


# Killing


def killing(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Kill a process that saves all the time, again and again; after each time the newest checkpoint must be whole."""
    chance = random.Random(0)  # noqa: S311
    partial = []
    for number in range(options.kills):
        partial.append(_kill(folder / "run", chance.uniform(0.0, 0.5), background=number % 2 == 1))
        print(f"kill {number + 1}: {'in a write' if partial[-1] else 'between writes'}", file=sys.stderr, flush=True)
    yield Line("kills", "of which none lost a checkpoint", *[float(len(partial))] * 3, "times")
    yield Line("kills", "in the middle of a write", *[float(sum(partial))] * 3, "times")


def _kill(folder: Path, after: float, *, background: bool) -> bool:
    """Kill once; tell whether a write was interrupted.

    Raises:
        RuntimeError: a checkpoint that was said to be saved is lost, or a mixture was loaded.
    """
    command = [sys.executable, str(WRITER), str(folder), "8", *(["async"] if background else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        ready = process.stdout.readline() if process.stdout else ""
        while not any(folder.glob("step-*")):
            time.sleep(0.01)
        time.sleep(after)
        process.kill()
        steps = process.communicate()[0].split()
    interrupted = any(folder.glob(".*"))
    checkpoint, skipped = newest(folder)
    values: list[Tensor] = [checkpoint.tensor(name) for name in checkpoint.places if name.startswith("model.")]
    step = checkpoint.manifest["step"]
    mixed = not all((value == step).all() for value in values)
    if ready != "ready\n" or skipped or mixed or step < int(steps[-1] if steps else 0):
        raise RuntimeError(f"killed after steps {steps}: loaded step {step}, skipped {skipped}")
    return interrupted


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], Iterator[Line]]] = {
    "save": saving,
    "load": loading,
    "pause": pausing,
    "inspect": inspecting,
    "kill": killing,
}
CHILDREN: Mapping[str, Callable[..., Any]] = {"load": _load}


if __name__ == "__main__":
    main()
