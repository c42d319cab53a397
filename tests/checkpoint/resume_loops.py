"""Training loops with everything in them, for the test of resuming; run as a program, it is the process that resumes.

python resume_loops.py FOLDER    # loads each loop's checkpoint, trains on, and saves what came of it
"""

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn

import surefoot
from conformance import ROWS, Row, label
from surefoot import lr_scheduler
from surefoot.lr_scheduler import Schedule, schedules

STEPS = 2
"""A loop trains so many steps, is saved, and trains as many again in the other process."""

SCHEDULERS = {
    "none": lambda optimizer: None,
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3, 3], 0.3),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.9),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 4),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 8, 2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4, 1e-5),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 3, cycle_momentum=False),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.02, 8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, cooldown=1),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, 1, 2), lr_scheduler.ExponentialLR(optimizer, 0.8)], [3]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.8), lr_scheduler.StepLR(optimizer, 2, 0.5)]
    ),
    "Schedule": lambda optimizer: Schedule(optimizer, lr=schedules.warmup(2, schedules.cosine(1, 0, 8))),
    "torch's OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, 8, cycle_momentum=False
    ),
    "torch's SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1, 2), torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])],
        [2],
    ),
}
KINDS = {"float32": {}, "bfloat16": {"state_dtype": torch.float32}, "complex64": {}, "float64": {}}


@dataclass(frozen=True)
class Case:
    """One loop: an optimizer with options, a scheduler, a dtype of the parameters; a rare one is for the long run."""

    row: Row
    options: Any
    engine: str
    scheduler: str
    kind: str = "float32"
    rare: bool = False

    @property
    def name(self) -> str:
        return f"{self.row.name}-{label(self.options)}-{self.engine}-{self.scheduler}-{self.kind}"


def cases() -> list[Case]:
    """Return every case once."""
    return list({case.name: case for case in _cases()}.values())


def _cases() -> Iterator[Case]:
    """Yield every optimizer with every combination of its flags and with every dtype, schedulers in turn.

    Rare are combinations of some flags, and of dtypes and of further settings, which take turns, all but some.
    """
    schedulers = cycle(SCHEDULERS)
    for turn, row in enumerate(ROWS):
        # An iteration of LBFGS is a step of the others.
        variants = [{"max_iter": 3}] if row.needs_closure else list(row.flag_variants())
        few = [*variants[:1], *row.flag_variants(few=True)]
        for options, engine in zip(variants, cycle(row.engines(["eager", "foreach"])), strict=False):
            yield Case(row, options, engine, next(schedulers), rare=options not in few)
        for place, options in enumerate(({}, {"lr": torch.tensor(1e-3)}, *row.more)):
            rare = place > 0 and place % 3 != turn % 3
            yield Case(row, options, row.engines(["cpu"])[0], "StepLR", rare=rare)
        for place, kind in enumerate(("bfloat16", "complex64", "float64")):
            if row.elementwise:
                options, engine = {**row.all_flags(), **KINDS[kind]}, "cpu" if row.name == "AdamW" else "eager"
                yield Case(row, options, engine, "none", kind, rare=engine == "eager" and place != turn % 3)


class Net(nn.Module):
    """A small network with what makes resuming hard: dropout, buffers, tied weights, another memory format."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6, sparse=sparse)
        self.hidden = nn.Linear(6, 6, bias=False)
        self.again = self.hidden
        self.norm = nn.BatchNorm1d(6, affine=not sparse)
        self.conv = nn.Conv1d(1, 2, 3, bias=False).to(memory_format=torch.contiguous_format)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.again(torch.tanh(self.hidden(self.table(index)))))
        return self.conv(nn.functional.dropout(hidden, 0.3, self.training)[:, None]).square().mean()


class Loop:
    """A training loop of a case: built from scratch, trained, saved or loaded, trained on."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(5)
        random.seed(6)
        np.random.seed(7)  # noqa: NPY002 (the global one is what is saved)
        self.case = case
        self.sampler = torch.Generator().manual_seed(8)
        self.model, params = self._params()
        self.optimizer = case.row.build(params, case.options, case.engine)
        others = [(n, p) for n, p in self.model.named_parameters() if all(p is not q for _, q in params)]
        self.other = surefoot.SGD(others, lr=1e-3, momentum=0.9, foreach=False) if others else None
        self.scheduler = SCHEDULERS[case.scheduler](self.optimizer)
        scaled = not (case.row.needs_closure or case.kind != "float32" or case.row.name == "SparseAdam")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) if scaled else None

    def _params(self) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
        if self.case.kind != "float32":
            weights = {name: torch.randn(shape, dtype=getattr(torch, self.case.kind)) for name, shape in SHAPES.items()}
            weights["channels_last"] = weights["channels_last"].contiguous(memory_format=torch.channels_last)
            model = nn.ParameterDict(weights)
            return model, list(model.named_parameters())
        model = Net(sparse=self.case.row.name == "SparseAdam")
        wanted = {"Muon": ("hidden.weight", "unused"), "SparseAdam": ("table.weight",)}.get(self.case.row.name)
        return model, [(n, p) for n, p in model.named_parameters() if wanted is None or n in wanted]

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        if self.case.kind == "float32":
            return self.model(index)
        noise = [torch.randn(p.shape, dtype=torch.float64).to(p.dtype) for p in self.model.parameters()]
        return sum(((p - q) * (p - q).conj()).real.sum() for p, q in zip(self.model.parameters(), noise, strict=True))

    def step(self) -> torch.Tensor:
        """Draw from every generator, and take a step."""
        count = 4 + random.randrange(3)  # noqa: S311
        index = torch.randint(10, (count,), generator=self.sampler)
        scale = 1.0 + float(np.random.rand())  # noqa: NPY002

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(index) * scale
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            return loss

        if self.scaler:
            loss = closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss = self.optimizer.step(closure)
        if self.other:
            self.other.step()
            self.other.zero_grad()
        if self.case.scheduler == "ReduceLROnPlateau":
            self.scheduler.step(float(loss.detach()))
        elif self.scheduler:
            self.scheduler.step()
        return loss.detach()

    def train(self, steps: int = STEPS) -> list[torch.Tensor]:
        return [self.step() for _ in range(steps)]

    def parts(self) -> dict[str, Any]:
        """Give the arguments of `save` and `load`."""
        optimizers = {"main": self.optimizer, "other": self.other} if self.other else self.optimizer
        return {
            "model": self.model,
            "optimizer": optimizers,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "sampler": self.sampler,
        }

    def outcome(self) -> dict[str, Any]:
        """Give everything that a resumed loop must have like one that was never interrupted."""
        state = {
            role: value.get_state() if isinstance(value, torch.Generator) else value.state_dict()
            for role, value in (self.parts() | {"optimizer": self.optimizer, "other": self.other}).items()
            if value is not None
        }
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p in self.optimizer.state]
        entries = [self.optimizer.state[param] for param in params]
        strides = [{n: v.stride() for n, v in each.items() if isinstance(v, torch.Tensor)} for each in entries]
        draws = [random.random(), float(np.random.rand()), torch.rand(2)]  # noqa: S311, NPY002
        return {**state, "strides": strides, "draws": draws}


SHAPES = {"matrix": (3, 5), "number": (), "empty": (0,), "channels_last": (2, 3, 2, 2)}


def resume(folder: Path, case: Case) -> None:
    """Make the loop anew, load, train on, and save what came of it."""
    loop = Loop(case)
    torch.manual_seed(99)
    surefoot.load(folder / f"{case.name}.safetensors", **loop.parts())
    losses = loop.train()
    torch.save({"losses": losses, **loop.outcome()}, folder / f"{case.name}.pt")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in cases():
        if (folder / f"{case.name}.safetensors").exists():
            resume(folder, case)


if __name__ == "__main__":
    main()
