"""What tests of telemetry share: raw steps with known numbers."""

import torch

from surefoot.telemetry import RawStep

NAMES = ("embed.weight", "blocks.0.weight", "blocks.0.bias")


def raw(step=1, rows=None, names=NAMES, lrs=(0.1,), **options):
    """Make a raw step; rows are sums of squares and so on, by default the same for each name."""
    rows = [(9.0, 400.0, 0.0004, 2.0, 0.0)] * len(names) if rows is None else rows
    return RawStep(step, tuple(names), torch.tensor(rows, dtype=torch.float64).reshape(-1, 5), lrs, **options)
