"""Draw the pictures of `docs/schedules.md`: the curve of each schedule, and of each scheduler of torch's names.

`python benchmarks/draw_schedules.py` writes them to `docs/pictures`.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surefoot import lr_scheduler, swa_utils
from surefoot.lr_finder import find_lr
from surefoot.lr_scheduler.expression import parse
from surefoot.lr_scheduler.plot import COLORS, figure, load_pyplot, save_figure, style

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

CURVES = {
    "constant": ["constant(0.5)"],
    "linear": ["linear(0.1, 1, 300)", "linear(1, 0, 900)"],
    "cosine": ["cosine(1, 0.1, 900)", "cosine(1, 0.1, 900) * step(300, 0.6)"],
    "polynomial": ["polynomial(1, 0, 900, 0.5)", "polynomial(1, 0, 900, 1)", "polynomial(1, 0, 900, 3)"],
    "sqrt_decay": ["sqrt_decay(1, 0, 900)"],
    "exponential": ["exponential(0.5, 200)", "exponential(0.995)"],
    "inverse_sqrt": ["inverse_sqrt(100)"],
    "step": ["step(250, 0.4)", "multi_step([100, 600], 0.3)"],
    "piecewise": ["piecewise([(0, 0), (100, 1), (500, 0.4), (900, 0)])"],
    "restarts": ["restarts(cosine(1, 0, 130), 130, 2)", "restarts(cosine(1, 0, 300), 300, decay=0.6)"],
    "cyclic": ["cyclic(0.1, 1, 100, 200)", "cyclic(0.1, 1, 150, decay=0.5)"],
    "join": ["join(constant(0.3), cosine(1, 0.2, 400), constant(0.1), at=[200, 700])"],
    "warmup": ["warmup(200, cosine(1, 0, 700))", "warmup(200, shape='cosine')"],
    "warmup_stable_decay": ["warmup_stable_decay(100, 600, 200)", "warmup_stable_decay(100, 600, 200, shape='sqrt')"],
    "one_cycle": ["one_cycle(900)", "one_cycle(900, three_phase=True)", "one_cycle(900, shape='linear')"],
    "presets": [
        "constant_with_warmup(100)",
        "linear_with_warmup(100, 900)",
        "cosine_with_warmup(100, 900)",
        "cosine_with_restarts(100, 900, 3)",
        "polynomial_with_warmup(100, 900, 2)",
        "inverse_sqrt_with_warmup(100)",
    ],
}
STEPS = 1000
EPOCHS = 100

Make = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.97**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95 if epoch > 30 else 1.0),  # noqa: PLR2004
    "StepLR": lambda o: lr_scheduler.StepLR(o, 25, 0.4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [20, 70], 0.4),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.4, 40),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 60),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.96),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 80, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 40, 0.1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 14, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 12, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, EPOCHS + 1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 20), lr_scheduler.CosineAnnealingLR(o, 80)], [20]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 20), lr_scheduler.ExponentialLR(o, 0.97)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=10, factor=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.2, anneal_epochs=50),
}


def rates(make: Make) -> list[float]:
    """Run a scheduler and give the learning rates; `ReduceLROnPlateau` sees a loss that stays the same."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    scheduler: Any = make(optimizer)
    metrics = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
    seen = []
    for _ in range(EPOCHS):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step(*metrics)
    return seen


def draw_schedulers() -> None:
    """Draw the schedulers of torch's names side by side."""
    plt = load_pyplot()
    result, axes = plt.subplots(4, 4, figsize=(11, 8), layout="constrained", sharex=True, sharey=True)
    for axis, (name, make) in zip(axes.flat, SCHEDULERS.items(), strict=True):
        axis.plot(rates(make), color=COLORS[0], linewidth=1.8)
        axis.set_title(name, fontsize=10)
        style(axis, "", "")
    axes[0, 0].set_ylim(0, 1.05)
    result.supxlabel("epoch", fontsize=10)
    result.supylabel("learning rate", fontsize=10)
    plt.close(result)
    save_figure(result, PICTURES / "schedulers.png")


def draw_range_test() -> None:
    """Draw a range test of a small network."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)

    def train_step() -> torch.Tensor:
        inputs = torch.randn(64, 16)
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    find_lr(train_step, model, optimizer, lowest=1e-5, highest=10, steps=150).plot(PICTURES / "lr_finder.png")


def main() -> None:
    """Draw everything."""
    warnings.simplefilter("error")
    PICTURES.mkdir(exist_ok=True)
    for name, texts in CURVES.items():
        figure({text: parse(text) for text in texts}, STEPS, PICTURES / f"{name}.png")
    draw_schedulers()
    draw_range_test()


if __name__ == "__main__":
    main()
