"""Does training with short numbers end where that with float32 does?  Held-out loss of a character transformer.

    python benchmarks/short_quality.py --seeds 4

It prints a table and writes `benchmarks/results/short_quality.csv`.

One block of width 96 (about 180 k parameters) on Python's own documentation, 300 steps (400 where beta2 is 0.999), a
cosine schedule, weight decay 0.1.  Gradients are computed in float32 from the weights as they are stored, and rounded
to bfloat16 for bfloat16 weights, so that nothing but the optimizer's storage differs.  What is reported is the mean
over seeds of the difference to torch's float32 AdamW of the same seed, and the largest of a seed.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from characters import SHAPE, Corpus, batch, corpus, held_out_loss, loss_of
from turns import write

import surefoot
from surefoot.cli._demo.model import build_model

BF16 = torch.bfloat16
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 nearest, bf16 state": (BF16, {}),
    "bf16 nearest, float32 state": (BF16, {"state_dtype": torch.float32}),
    "bf16 stochastic, float32 state": (BF16, {"rounding": "stochastic", "state_dtype": torch.float32}),
    "bf16 + 8 bits, float32 state": (BF16, {"master_weight_bits": 24, "state_dtype": torch.float32}),
    "bf16 + 16 bits, float32 state": (BF16, {"master_weight_bits": 32, "state_dtype": torch.float32}),
    "float32, bf16 state": (torch.float32, {"state_dtype": BF16}),
    "float32, float8 state": (torch.float32, {"state_dtype": "float8"}),
    "bf16 stochastic, float8 state": (BF16, {"rounding": "stochastic", "state_dtype": "float8"}),
    "bf16 + 8 bits, float8 state": (BF16, {"master_weight_bits": 24, "state_dtype": "float8"}),
}
SETTINGS = ((3e-3, 0.95, 300), (3e-4, 0.95, 300), (3e-3, 0.999, 400), (3e-4, 0.999, 400))


class Line(NamedTuple):
    """A line of the results.

    Attributes:
        storage: which of `FORMATS`.
        setting: learning rate and beta2.
        seeds: how many there were.
        mean, largest: the difference to float32's held-out loss, over seeds.
    """

    storage: str
    setting: str
    seeds: int
    mean: float
    largest: float


def train(make: Any, dtype: torch.dtype, setting: tuple[float, float, int], seed: int, data: Corpus) -> float:
    """Train a model and return its held-out loss with the weights that the optimizer holds."""
    lr, beta2, steps = setting
    model = build_model(data.kinds, SHAPE, seed)
    weights = [torch.nn.Parameter(param.detach().to(dtype)) for param in model.parameters()]
    optimizer = make(weights, lr=lr, betas=(0.9, beta2), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for param, weight in zip(model.parameters(), weights, strict=True):
                param.copy_(weight)
        model.zero_grad()
        loss_of(model, *batch(data.training, generator, 16)).backward()
        for param, weight in zip(model.parameters(), weights, strict=True):
            weight.grad = param.grad.to(dtype)
        optimizer.step()
    with torch.no_grad():
        for param, weight in zip(model.parameters(), weights, strict=True):
            param.copy_(weight)
    return held_out_loss(model, data, 20)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, lines = corpus(), []
    titles = [f"lr {lr:g}, beta2 {beta2}" for lr, beta2, _ in SETTINGS]
    references = {
        (setting, seed): train(torch.optim.AdamW, torch.float32, setting, seed, data)
        for setting in SETTINGS
        for seed in range(options.seeds)
    }
    print("| storage | " + " | ".join(titles) + " |\n" + "|---" * (1 + len(titles)) + "|")
    for name in options.formats:
        dtype, formats = FORMATS[name]
        cells = []
        for title, setting in zip(titles, SETTINGS, strict=True):
            gaps = [
                train(
                    lambda weights, formats=formats, **given: surefoot.AdamW(weights, **given, **formats),
                    dtype,
                    setting,
                    seed,
                    data,
                )
                - references[setting, seed]
                for seed in range(options.seeds)
            ]
            mean, largest = sum(gaps) / len(gaps), max(gaps, key=abs)
            cells.append(f"{mean:+.4f} ({largest:+.4f})")
            lines.append(Line(name, title, len(gaps), mean, largest))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(
        "float32: "
        + ", ".join(f"{title}: {references[setting, 0]:.4f}" for title, setting in zip(titles, SETTINGS, strict=True))
    )
    write(options.out / "short_quality.csv", lines, Line._fields)


if __name__ == "__main__":
    main()
