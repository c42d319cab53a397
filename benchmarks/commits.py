"""Two commits side by side: how many times as long a step takes with the old one as with the new one.

    python benchmarks/commits.py main                         # the working tree beside main
    python benchmarks/commits.py v0.1.0 HEAD --optimizer AdamW Lion --model tiny large
    python benchmarks/commits.py HEAD HEAD                    # what a ratio of 1 looks like on this machine

Both commits are taken from the repository into a temporary folder, and run in a process each, with kernels of their
own.  The processes take turns, a block of steps each, in random order, so that what disturbs the machine disturbs both
alike.  Where a process's memory lies can cost a few percent for as long as it lives; so there are several pairs of
processes, one after the other, and a difference is one that all pairs show.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np
import torch

from surefoot.benchmark import DTYPES, SHAPE_LISTS, VARIANTS, Case, Quartiles, cases

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("commit_worker.py")
WORKING_TREE = "."
FEWEST_ROUNDS, LONGEST_BLOCK, MOST_STEPS = 5, 0.05, 200
PAUSE = 0.003
"""Seconds before a block: the threads of the other process spin for a while before they sleep."""


class CommitError(Exception):
    """A commit, or its measurement, that the user asked for cannot be had; the message says why."""


class Comparison(NamedTuple):
    """What came out of a case.

    Attributes:
        old_ms, new_ms: milliseconds of a step, medians over all rounds.
        ratio: the old commit's time over the new one's, over all rounds.
        pairs: the same for each pair of processes.
        rounds: how many there were.
    """

    old_ms: float
    new_ms: float
    ratio: Quartiles
    pairs: Sequence[Quartiles]
    rounds: int

    @classmethod
    def of(cls, pairs: Sequence[np.ndarray]) -> "Comparison":
        """Return the comparison of times: for each pair of processes seconds, shape (rounds, 2), old and new."""
        old, new = np.concatenate(pairs).T
        ratios = [Quartiles.of(pair[:, 0] / pair[:, 1]) for pair in pairs]
        return cls(1e3 * np.median(old), 1e3 * np.median(new), Quartiles.of(old / new), ratios, len(old))

    def verdict(self) -> str:
        """Return which is faster, if all pairs of processes show it in at least three quarters of their rounds."""
        if all(pair.q1 > 1 for pair in self.pairs):
            return "faster"
        return "slower" if all(pair.q3 < 1 for pair in self.pairs) else "no difference beyond the spread"

    def __str__(self) -> str:
        """Return all of it in a line."""
        ratio, medians = self.ratio, [pair.median for pair in self.pairs]
        return (
            f"old {self.old_ms:.4g} ms, new {self.new_ms:.4g} ms, old / new {ratio.median:.3f} "
            f"({ratio.q1:.3f} to {ratio.q3:.3f}; pairs {min(medians):.3f} to {max(medians):.3f}): {self.verdict()}"
        )


class Worker:
    """A process that runs a commit.

    Args:
        source: the folder that holds its package.
        kernels: the folder in which it keeps its kernels.

    Raises:
        CommitError: if it ends before it should.
    """

    def __init__(self, source: Path, kernels: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(source), "SUREFOOT_CACHE_DIR": str(kernels)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, str(WORKER)], env=environment, **pipes)  # noqa: S603

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise CommitError("a commit's process has ended; what it had to say stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


# Commits


def source_of(commit: str, repository: Path, folder: Path) -> Path:
    """Return the folder that holds a commit's package, taken out of the repository.

    Args:
        commit: whatever git calls a commit by, or "." for the files as they are.
        repository: a clone.
        folder: where to put it.

    Raises:
        CommitError: there is no such commit, or no package in it.
    """
    if commit == WORKING_TREE:
        return repository / "src"
    command = ["git", "-C", str(repository), "archive", "--format=tar", commit, "src"]
    found = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    if found.returncode:
        raise CommitError(f"git has no src/ of {commit!r} in {repository}: {found.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


# Measuring


def run(
    commits: Sequence[str], selected: Sequence[Case], *, seconds: float, pairs: int, threads: int, repository: Path
) -> Iterator[tuple[Case, Comparison | str]]:
    """Measure all cases with each pair of processes; then yield what came out of each, or why it was left out."""
    measured: list[list[np.ndarray]] = [[] for _ in selected]
    refused: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="surefoot-commits-") as temporary:
        folders = [Path(temporary) / name for name in ("old", "new")]
        sources = [source_of(commit, repository, folder) for commit, folder in zip(commits, folders, strict=True)]
        for _ in range(pairs):
            with contextlib.ExitStack() as stack:
                workers = []
                for source, folder in zip(sources, folders, strict=True):
                    workers.append(Worker(source, folder / "kernels"))
                    stack.callback(workers[-1].close)
                for number, case in enumerate(selected):
                    if reason := _prepare(workers, commits, case, threads):
                        refused[number] = reason
                    else:
                        measured[number].append(_rounds(workers, seconds / pairs))
    for number, case in enumerate(selected):
        yield case, refused.get(number) or Comparison.of(measured[number])


def _prepare(workers: Sequence[Worker], commits: Sequence[str], case: Case, threads: int) -> str:
    """Let both make a case ready; return why one cannot, or nothing."""
    request: Mapping[str, Any] = {
        "optimizer": case.variant.optimizer,
        "options": dict(case.variant.options),
        "shapes": case.shapes.shapes,
        "dtype": case.dtype_name,
        "threads": threads,
    }
    answers = [worker.ask(**request) for worker in workers]
    return next((f"{c}: {a['error']}" for c, a in zip(commits, answers, strict=True) if "error" in a), "")


def _rounds(workers: Sequence[Worker], seconds: float) -> np.ndarray:
    """Return the seconds of a step in each round, shape (rounds, 2): old and new."""
    deadline = perf_counter() + seconds
    slowest = max(worker.ask(steps=1)["seconds"] for worker in workers)
    steps = min(MOST_STEPS, max(1, int(LONGEST_BLOCK / slowest)))
    rounds: list[list[float]] = []
    order, draw = [0, 1], random.Random(0)  # noqa: S311 (not a secret)
    while len(rounds) < FEWEST_ROUNDS or perf_counter() < deadline:
        draw.shuffle(order)
        taken = {}
        for place in order:
            sleep(PAUSE)
            taken[place] = workers[place].ask(steps=steps)["seconds"]
        rounds.append([taken[0], taken[1]])
    return np.array(rounds)


def main() -> None:
    """Compare what the command line names."""
    options = _parser().parse_args()
    selected = cases(options.optimizer, options.model, options.dtype)
    print(f"old: {options.old}, new: {options.new}; {options.threads} threads, torch {torch.__version__}", flush=True)
    try:
        for case, found in run(
            (options.old, options.new),
            selected,
            seconds=options.seconds,
            pairs=options.pairs,
            threads=options.threads,
            repository=options.repository,
        ):
            print(f"{case!s:36} {found if isinstance(found, Comparison) else f'left out, {found}'}", flush=True)
    except CommitError as error:
        raise SystemExit(f"benchmarks/commits.py: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit, or . for the files as they are")
    parser.add_argument("new", nargs="?", default=WORKING_TREE, help="the same; . if it is left out")
    for option, allowed, default in (
        ("--optimizer", VARIANTS, ["AdamW"]),
        ("--model", SHAPE_LISTS, ["tiny", "medium", "large"]),
        ("--dtype", DTYPES, ["float32"]),
    ):
        names = ", ".join(allowed)
        parser.add_argument(option, nargs="+", choices=list(allowed), default=default, metavar="NAME", help=names)
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each case")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes, one after the other")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process")
    parser.add_argument("--repository", type=Path, default=ROOT, help="a clone that has both commits")
    return parser


if __name__ == "__main__":
    main()
