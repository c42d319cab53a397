"""What each optimizer learns of a small character transformer, each at its own tuned learning rate.

    python benchmarks/curves.py           # all of it, in about half an hour on one core
    python benchmarks/curves.py --draw    # the picture anew, from the csv file that is there

One block of width 96 (about 180 k parameters) on Python's own documentation: 300 steps of 16 sequences; the rate rises
for 30 steps and falls along a cosine to 0 (schedule-free: it stays); weight decay 0.1 where it is decoupled and none
where not.  The rate is the best of a grid of factors of about 3, widened until both neighbours are worse, by the
held-out loss of one seed; the curves are of three seeds, that one among them.  What is written is the held-out loss in
nats of a character.  It says which settings to begin with, not which optimizer is best: one small model, one short
training, differences of seeds of 0.01, and a rate tuned for each where people often tune none.
"""

import argparse
import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from characters import SHAPE, Corpus, batch, corpus, held_out_loss, loss_of
from matplotlib.figure import Figure
from turns import write

import surefoot
from surefoot.cli._demo.model import build_model

STEPS, WARM_UP, EVERY = 300, 30, 25
SEEDS = (0, 1, 2)
FACTOR = 10**0.5
OUT = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "optimizers.png"
DECAY = {"weight_decay": 0.1}


class Setting(NamedTuple):
    """How an optimizer is made.

    Attributes:
        lr: where the search for a rate begins.
        options: its hyperparameters beside.
        title: what it is called, the class's name if empty.
    """

    lr: float
    options: Mapping[str, Any] = {}
    title: str = ""


SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "SGD": (Setting(0.3, {"momentum": 0.9, "nesterov": True}, "SGD, Nesterov 0.9"),),
    "Adam": (Setting(1e-2),),
    "AdamW": (Setting(1e-2, DECAY), Setting(1e-2, {**DECAY, "cautious": True}, "AdamW, cautious")),
    "NAdam": (Setting(1e-2, {**DECAY, "decoupled_weight_decay": True}),),
    "RAdam": (Setting(1e-1, {**DECAY, "decoupled_weight_decay": True}),),
    "Adamax": (Setting(3e-2),),
    "Adadelta": (Setting(3.0),),
    "Adagrad": (Setting(3e-2),),
    "RMSprop": (Setting(1e-2),),
    "ASGD": (Setting(1.0),),
    "Adafactor": (Setting(1e-1, DECAY),),
    "Lion": (Setting(3e-3, {"weight_decay": 0.3}),),
    "Signum": (Setting(3e-3, {"weight_decay": 0.3}),),
    "AdEMAMix": (Setting(1e-2, {**DECAY, "alpha": 5.0, "beta3_warmup": STEPS, "alpha_warmup": STEPS}),),
    "Adan": (Setting(1e-2, {"weight_decay": 0.02}),),
    "AdaBelief": (Setting(1e-2, DECAY),),
    "ADOPT": (Setting(1e-2, {**DECAY, "decoupled_weight_decay": True}),),
    "AdamAtan2": (Setting(1e-2, DECAY),),
    "LaProp": (Setting(3e-3, DECAY),),
    "QHAdam": (Setting(1e-2, {**DECAY, "decoupled_weight_decay": True, "nus": (0.7, 1.0), "betas": (0.995, 0.999)}),),
    "Yogi": (Setting(1e-2),),
    "AdamWScheduleFree": (Setting(1e-2, {**DECAY, "warmup_steps": WARM_UP}),),
    "SGDScheduleFree": (Setting(3.0, {"warmup_steps": WARM_UP}),),
    "RAdamScheduleFree": (Setting(1e-2, DECAY),),
    "LAMB": (Setting(1e-2, DECAY),),
    "LARS": (Setting(3.0, {"momentum": 0.9, "weight_decay": 1e-4, "trust_coeff": 0.01}),),
    "StableAdamW": (Setting(1e-2, DECAY),),
    "NovoGrad": (Setting(1e-2, {"betas": (0.95, 0.98), "weight_decay": 1e-3}),),
    "MARS": (Setting(3e-3, DECAY),),
    "Prodigy": (Setting(1.0, {**DECAY, "use_bias_correction": True, "safeguard_warmup": True}),),
    "Muon": (Setting(3e-2, {**DECAY, "rest_options": DECAY}, "Muon, with AdamW at 0.01"),),
    "SOAP": (Setting(1e-2, DECAY),),
}


class Line(NamedTuple):
    """A point of a curve.

    Attributes:
        optimizer: what it is called.
        lr: its rate, at its highest.
        seed: of the weights and of the order of the data.
        step: how many steps have been taken.
        loss: the held-out loss then, in nats.
    """

    optimizer: str
    lr: float
    seed: int
    step: int
    loss: float


def train(algorithm: str, setting: Setting, lr: float, seed: int, data: Corpus) -> Iterator[Line]:
    """Train and yield the curve; it ends early where the loss is not a number any more."""
    model = build_model(data.kinds, SHAPE, seed)
    optimizer = _optimizer(algorithm, setting, lr, model)
    generator = torch.Generator().manual_seed(seed)
    scheduled, rates = not optimizer.has_modes, [group["lr"] for group in optimizer.param_groups]
    for step in range(1, STEPS + 1):
        if scheduled:
            falling = 0.5 * (1 + math.cos(math.pi * max(0, step - WARM_UP) / (STEPS - WARM_UP)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(step / WARM_UP, falling)
        optimizer.zero_grad()
        loss_of(model, *batch(data.training, generator, 16)).backward()
        optimizer.step()
        if step % EVERY == 0 or step == STEPS:
            loss = _evaluated(model, optimizer, data, 20 if step == STEPS else 5)
            if not math.isfinite(loss):
                return
            yield Line(setting.title or algorithm, lr, seed, step, loss)


def _optimizer(algorithm: str, setting: Setting, lr: float, model: torch.nn.Module) -> surefoot.Optimizer:
    if algorithm == "Muon":
        return surefoot.muon_with(model, lr=lr, rest_lr=1e-2, **setting.options)
    made: surefoot.Optimizer = getattr(surefoot, algorithm)(model.parameters(), lr=lr, **setting.options)
    return made


def _evaluated(model: torch.nn.Module, optimizer: surefoot.Optimizer, data: Corpus, batches: int) -> float:
    if not optimizer.has_modes:
        return held_out_loss(model, data, batches)
    with optimizer.eval_mode():
        return held_out_loss(model, data, batches)


def tuned(algorithm: str, setting: Setting, data: Corpus) -> list[Line]:
    """Return the curves of an optimizer at the best rate of a grid."""
    found: dict[int, list[Line]] = {}
    losses: dict[int, float] = {}
    best = 0
    while missing := [place for place in (best - 1, best, best + 1) if place not in found]:
        for place in missing:
            found[place] = list(train(algorithm, setting, _rate(setting, place), SEEDS[0], data))
            ended = found[place] and found[place][-1].step == STEPS
            losses[place] = found[place][-1].loss if ended else math.inf
        best = min(losses, key=lambda place: losses[place])
    shown = " ".join(f"{_rate(setting, place):.2g}: {losses[place]:.3f}" for place in sorted(losses))
    print(f"{setting.title or algorithm:24} {shown}", flush=True)
    others = (line for seed in SEEDS[1:] for line in train(algorithm, setting, _rate(setting, best), seed, data))
    return [*found[best], *others]


def _rate(setting: Setting, place: int) -> float:
    """Return a rate of the grid, of two digits."""
    return float(f"{setting.lr * FACTOR**place:.1e}")


def read(path: Path) -> list[Line]:
    """Return the lines of a csv file."""
    with path.open(newline="") as file:
        return [
            Line(row["optimizer"], float(row["lr"]), int(row["seed"]), int(row["step"]), float(row["loss"]))
            for row in csv.DictReader(file)
        ]


def last(lines: list[Line]) -> dict[str, list[Line]]:
    """Return the last points of each optimizer's curves, the best optimizer first."""
    ends: dict[str, list[Line]] = {}
    for line in lines:
        if line.step == STEPS:
            ends.setdefault(line.optimizer, []).append(line)
    return dict(sorted(ends.items(), key=lambda item: _mean(item[1])))


def _mean(lines: list[Line]) -> float:
    return sum(line.loss for line in lines) / len(lines)


def table(lines: list[Line]) -> str:
    """Return a table of rates and losses at the end, in Markdown."""
    rows = ["| optimizer | lr | held-out loss | of its seeds |", "|---|---|---|---|"]
    for name, ends in last(lines).items():
        losses = [line.loss for line in ends]
        rows.append(f"| {name} | {ends[0].lr:g} | {_mean(ends):.3f} | {min(losses):.3f} to {max(losses):.3f} |")
    return "\n".join(rows)


def draw(lines: list[Line], path: Path) -> None:
    """Draw each optimizer's curves beside AdamW's."""
    names = list(last(lines))
    columns = 5
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.4 * columns, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        for of, colour, width in (("AdamW", "#b8b8b8", 3.0), (name, "#1c4f9c", 1.2)):
            for seed in SEEDS:
                curve = [line for line in lines if line.optimizer == of and line.seed == seed]
                axis.plot([line.step for line in curve], [line.loss for line in curve], color=colour, lw=width)
        ends = last(lines)[name]
        axis.set_title(f"{name}, lr {ends[0].lr:g}: {_mean(ends):.3f}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(visible=True, alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].set_ylim(1.35, 3.2)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("held-out loss, nats of a character; grey: AdamW; three seeds each", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, or read, then print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="train nothing, and read what was written")
    parser.add_argument("--optimizer", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if not options.draw:
        torch.set_num_threads(1)
        data = corpus()
        found = [
            line for name in options.optimizer for setting in SETTINGS[name] for line in tuned(name, setting, data)
        ]
        write(options.out / "curves.csv", found, Line._fields)
    lines = read(options.out / "curves.csv")
    print(table(lines))
    draw(lines, options.picture)


if __name__ == "__main__":
    main()
