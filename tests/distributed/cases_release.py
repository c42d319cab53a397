"""Gradients released while backward runs, of models of FSDP2 and of what wraps models otherwise."""

import functools
from contextlib import nullcontext

import torch
from cases_layouts import tensor
from sharding import whole
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import surefoot
from helpers import Noted

OPTIONS = {
    "plain": {},
    "groups and averages": {"ema": 0.9},
    "short": {"state_dtype": "float8", "rounding": "stochastic"},
    "telemetry": {"telemetry": Noted},
    "not resharded": {"reshard": False},
    "accumulated": {"accumulate": "sync"},
    "accumulated by us": {"accumulate": "handle"},
    "combination": {"cls": None},
}


def made(cls=surefoot.AdamW, sharded=True, reshard=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())))
    if "rounding" in options:
        model.to(torch.bfloat16)
    for layer in model[::2] if sharded else ():
        fully_shard(layer, reshard_after_forward=reshard)
    if sharded:
        fully_shard(model, reshard_after_forward=reshard)
    if "telemetry" in options:
        options["telemetry"] = options["telemetry"]()
    if cls is None:
        parts = [surefoot.Part(surefoot.Lion, "0.*", lr=0.01), surefoot.Part(surefoot.AdamW, lr=0.01)]
        return model, surefoot.Combined(model.named_parameters(), parts, **options)
    return model, cls(model.named_parameters(), lr=0.01, **options)


def trained(released, accumulate=None, **options):
    """Return the parameters after some steps, whole, and of released ones how many gradients were left.

    With `accumulate` each step is of two batches: gradients are reduced after the second only, or after each and added
    up by the handle.
    """
    model, optimizer = made(**options)
    handle = None if released is None else optimizer.release_gradients(model, bucket_bytes=released)
    left = 0
    for step in range(6):
        x = tensor((4, 6), step).to(next(model.parameters()).dtype)
        if accumulate is not None:
            model.set_requires_gradient_sync(accumulate == "handle")
            with handle.accumulate() if handle and accumulate == "handle" else nullcontext():
                model(x + 1).square().mean().backward()
            model.set_requires_gradient_sync(True)
        model(x).square().mean().backward()
        left += sum(param.grad is not None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    if "telemetry" in options:
        return left, [dict(zip(raw.names, raw.sums.tolist(), strict=True)) for raw in optimizer.telemetry.raw]
    return left, [whole(param.detach()) for param in model.parameters()]


def clipped():
    """Return parameters and norms of released training that is clipped by the previous norm, sharded and not."""
    found = []
    for sharded in (True, False):
        model, optimizer = made(sharded=sharded)
        optimizer.release_gradients(model, bucket_bytes=300, max_previous_grad_norm=0.05)
        norms = []
        for step in range(4):
            model(tensor((4, 6), step)).square().mean().backward()
            optimizer.step()
            norms.append(optimizer.param_groups[0]["previous_grad_norm"])
        found.append([torch.tensor(norms), *(whole(param.detach()) for param in model.parameters())])
    return found


def of_whole_params(**options):
    model, optimizer = made()
    optimizer.release_gradients(model, **options)


def same(options):
    """Return for sizes of buckets whether released training is plain training, and how many gradients were left."""
    _, expected = trained(None, **options)
    found = [trained(size, **options) for size in (1, 300, 1 << 20)]
    return [(left, all(map(_equal, ours, expected))) for left, ours in found]


def _equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def refused(make):
    model, optimizer = make()
    return optimizer.release_gradients(model)


def cases(_world):
    for name, options in OPTIONS.items():
        yield name, functools.partial(same, options)
    yield "clipped", clipped
    yield "each clipped", functools.partial(of_whole_params, max_param_grad_norm=1.0)
    yield "left out", functools.partial(of_whole_params, nonfinite_params="skip")
    yield "Muon", functools.partial(refused, functools.partial(of_matrices, surefoot.Muon))
    yield "LAMB", functools.partial(refused, functools.partial(of_matrices, surefoot.LAMB, max_grad_norm=None))
    yield "DDP", functools.partial(refused, functools.partial(wrapped, DistributedDataParallel))
    yield (
        "FSDP1",
        functools.partial(
            refused,
            functools.partial(wrapped, functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))),
        ),
    )


def of_matrices(cls, **options):
    model = fully_shard(nn.Linear(6, 6, bias=False))
    return model, cls(model.parameters(), **options)


def wrapped(kind):
    model = kind(made(sharded=False)[0])
    return model, surefoot.AdamW(model.parameters())
