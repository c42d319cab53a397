"""Steps of a small model in the loops that people write: schedules, closures, hooks, gradients and memory that change.

    python benchmarks/training_loops.py                     # every loop with SGD, AdamW, Muon and Adafactor
    python benchmarks/training_loops.py --optimizer AdamW --loop schedule "two losses"

Each step comes after a real backward pass, ours and torch's in turn; torch's is the fused one where there is one.  What
is timed is `step()` and what stands beside it in the table: the scheduler's step, the clipping of gradients.  It prints
torch's time over ours, and writes `training-loops.csv` into `benchmarks/results`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import surefoot
from surefoot.benchmark import Quartiles, circumstances, write_csv

TABLE = Path(__file__).parent / "results" / "training-loops.csv"
OPTIMIZERS: dict[str, dict[str, Any]] = {"SGD": {}, "AdamW": {}, "Muon": {}, "Adafactor": {}}
FUSED = ("SGD", "AdamW")
WARM_UP = 40


class Line(NamedTuple):
    """A line of the csv file.

    Attributes:
        machine, date, torch, threads: circumstances.
        optimizer, loop: what was measured.
        ours_us, torch_us: microseconds of a step, medians over rounds.
        speedup: torch's time over ours, median of the ratios; then their quartiles.
        rounds: how many there were.
    """

    machine: str
    date: str
    torch: str
    threads: int
    optimizer: str
    loop: str
    ours_us: float
    torch_us: float
    speedup: float
    speedup_q1: float
    speedup_q3: float
    rounds: int


class Loop:
    """A loop around one optimizer.

    Args:
        module: `surefoot` or `torch.optim`.
        name: the optimizer.
        options: of the optimizer; `max_grad_norm` is ours, and torch's `clip_grad_norm_` beside torch's.
    """

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 32, bias=name != "Muon"), nn.Tanh(), nn.Linear(32, 4, bias=name != "Muon")
        )
        self.params, self.steps = list(self.model.parameters()), 0
        self.limit = None if module is surefoot else options.pop("max_grad_norm", None)
        unfused = module is surefoot or name not in FUSED or "foreach" in options
        self.optimizer = getattr(module, name)(self.params, **options, **({} if unfused else {"fused": True}))
        self.schedulers = module.lr_scheduler

    def backward(self) -> None:
        """Make gradients, which caches hold as after any backward pass."""
        self.steps += 1
        self.optimizer.zero_grad()
        self.model(torch.randn(16, 8)).square().mean().backward()

    def step(self) -> None:
        """Make what is timed."""
        if self.limit is not None:
            nn.utils.clip_grad_norm_(self.params, self.limit)
        self.optimizer.step()


class Scheduled(Loop):
    """A rate that changes before every step."""

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        super().__init__(module, name, **options)
        self.schedule = self.schedulers.CosineAnnealingLR(self.optimizer, 100_000)

    def step(self) -> None:
        """Make what is timed."""
        self.optimizer.step()
        self.schedule.step()


class Closure(Loop):
    """A step that is handed a closure, as Lightning's are."""

    def step(self) -> None:
        """Make what is timed."""
        self.optimizer.step(lambda: 1.0)


class Hooked(Loop):
    """A hook after each step, as tools register them."""

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        super().__init__(module, name, **options)
        self.optimizer.register_step_post_hook(lambda *_: None)


class TwoLosses(Loop):
    """Two halves of the parameters that have gradients in turn, as two losses or two experts give them."""

    def backward(self) -> None:
        """Make gradients of one half."""
        super().backward()
        half = len(self.params) // 2
        for param in self.params[:half] if self.steps % 2 else self.params[half:]:
            param.grad = None


class Frozen(Loop):
    """A parameter that has no gradient in the first steps, and has taken fewer steps than the others from then on."""

    def backward(self) -> None:
        """Make gradients, at first not of all."""
        super().backward()
        if self.steps < WARM_UP // 2:
            self.params[0].grad = None


class RateInTensor(Loop):
    """A rate that stands in a tensor, which is changed in place before every step."""

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        super().__init__(module, name, **options)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3)

    def step(self) -> None:
        """Make what is timed."""
        self.optimizer.param_groups[0]["lr"].mul_(0.999)
        self.optimizer.step()


class OtherMemory(Loop):
    """Parameters that are handed other memory before every step, as averaging and communication do."""

    def backward(self) -> None:
        """Make gradients."""
        super().backward()
        for param in self.params:
            param.data = param.data.clone()


class Vector(Loop):
    """Parameters that are copied into a vector and read from it before every step."""

    def backward(self) -> None:
        """Make gradients."""
        super().backward()
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(self.params).detach(), self.params)


class Transposed(Loop):
    """Gradients of matrices that are laid out by columns, as those are that are not made by a backward pass."""

    def backward(self) -> None:
        """Make gradients."""
        super().backward()
        for param in self.params:
            if param.dim() > 1:
                param.grad = param.grad.t().contiguous().t()


class Nothing(Loop):
    """A step without gradients before each that is timed."""

    def backward(self) -> None:
        """Make gradients."""
        self.optimizer.zero_grad()
        self.optimizer.step()
        super().backward()


class Experts(Loop):
    """Eight layers of which each step uses two, drawn anew: 28 sets of parameters, which come again."""

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        super().__init__(module, name, **options)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=name != "Muon") for _ in range(8))
        self.optimizer.add_param_group({"params": list(self.experts.parameters())})
        self.generator = torch.Generator().manual_seed(0)

    def backward(self) -> None:
        """Make gradients of two."""
        self.optimizer.zero_grad()
        first, second = torch.randperm(8, generator=self.generator)[:2].tolist()
        both = self.experts[first](torch.randn(16, 8)) + self.experts[second](torch.randn(16, 8))
        both.square().mean().backward()


LOOPS: dict[str, tuple[Callable[..., Loop], dict[str, Any]]] = {
    "plain": (Loop, {}),
    "schedule": (Scheduled, {}),
    "closure": (Closure, {}),
    "hook": (Hooked, {}),
    "two losses": (TwoLosses, {}),
    "frozen at first": (Frozen, {}),
    "foreach=True": (Loop, {"foreach": True}),
    "foreach=False": (Loop, {"foreach": False}),
    "rate in a tensor": (RateInTensor, {}),
    "other memory": (OtherMemory, {}),
    "vector": (Vector, {}),
    "transposed": (Transposed, {}),
    "nothing between": (Nothing, {}),
    "experts": (Experts, {}),
    "clipped": (Loop, {"max_grad_norm": 1.0}),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--loop", nargs="+", choices=LOOPS, default=list(LOOPS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known, lines = circumstances(), []
    for name in options.optimizer:
        for loop in options.loop:
            make, own = LOOPS[loop]
            if "foreach" in own and name == "Muon":
                continue  # it has no such option
            pair = [make(module, name, **OPTIMIZERS[name], **own) for module in (surefoot, torch.optim)]
            ours, theirs = _rounds(pair, options.rounds)
            ratio = Quartiles.of(theirs / ours)
            medians = [float(np.median(taken)) * 1e6 for taken in (ours, theirs)]
            lines.append(Line(*known, name, loop, *medians, ratio.median, ratio.q1, ratio.q3, options.rounds))
            print(f"{name:10} {loop:16} {ratio.median:5.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})", flush=True)
    if len(options.optimizer) == len(OPTIMIZERS) and len(options.loop) == len(LOOPS):
        write_csv(TABLE, lines, Line._fields)


def _rounds(pair: list[Loop], rounds: int) -> np.ndarray:
    """Return the seconds of a step in each round: shape (2, rounds), ours and torch's."""
    taken = np.zeros((2, rounds))
    for round_ in range(-WARM_UP, rounds):
        for row, loop in enumerate(pair):
            loop.backward()
            start = perf_counter()
            loop.step()
            seconds = perf_counter() - start
            if round_ >= 0:
                taken[row, round_] = seconds
    return taken


if __name__ == "__main__":
    main()
