"""Sums over parameters where these are divided over ranks: d of Prodigy beside that of one process."""

import copy
import functools

import torch
from cases_failures import model, trained
from cases_step import SHAPES, layouts, spread, tensor
from sharding import whole
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import surefoot

NUMBERS = ("d", "d_max", "d_numerator", "k")
OPTIONS = {
    "one d": {},
    "split": {"split_groups": True},
    "clipped": {"max_grad_norm": 0.5, "nonfinite": "skip"},
    "decayed": {"weight_decay": 0.1, "decouple": False, "foreach": True},
    "eager": {"foreach": False, "use_bias_correction": True},
}


def numbers(optimizer):
    return [{name: float(group[name]) for name in NUMBERS} for group in optimizer.param_groups]


def estimated(options, mesh=None, placements=(None,) * 5, *, reload=None):
    """Return what becomes of parameters and of d; one gradient is missing in some steps."""
    params = [
        torch.nn.Parameter(spread(tensor(shape, i), mesh, p))
        for i, (shape, p) in enumerate(zip(SHAPES, placements, strict=True))
    ]

    def make():
        return surefoot.Prodigy([{"params": params[:2]}, {"params": params[2:]}], **{"d0": 1e-3} | options)

    optimizer = make()
    for step in range(8):
        if step == reload:
            saved, optimizer = copy.deepcopy(optimizer.state_dict()), make()
            optimizer.load_state_dict(saved)
        for i, (param, p) in enumerate(zip(params, placements, strict=True)):
            missing = i == 3 and step % 3 == 1
            grad = tensor(SHAPES[i], 7 + i) + 0.1 * tensor(SHAPES[i], 100 * (step + 1) + i)
            param.grad = None if missing else spread(grad, mesh, p)
        optimizer.step()
    return [whole(param) for param in params], numbers(optimizer)


def compared(options, mesh, placements, reload=None):
    params, expected = estimated(options)
    ours, found = estimated(options, mesh, placements, reload=reload)
    return {"pairs": list(zip(params, ours, strict=True)), "numbers": found, "expected": expected}


def parts_of_a_batch(kind, rank, world):
    """Train with divided parameters, each rank with its part of the batch; and as one process."""
    alone, size = model(), 8 // world
    one = trained(alone, lambda network: surefoot.Prodigy(network.parameters(), d0=1e-2), slice(None), steps=8)
    network, make = divided(kind)
    optimizer = trained(network, make, slice(rank * size, (rank + 1) * size), steps=8)
    if kind == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(network):
            full = [param.detach().clone() for param in network.parameters()]
    else:
        full = [p.full_tensor() if isinstance(p, DTensor) else p for p in network.parameters()]
    pairs = [(a.detach(), b.detach()) for a, b in zip(alone.parameters(), full, strict=True)]
    return {"pairs": pairs, "numbers": numbers(optimizer), "expected": numbers(one)}


def divided(kind):
    """Return a network whose parameters are divided over ranks, and what makes its optimizer."""
    if kind == "ZeRO":
        network = nn.parallel.DistributedDataParallel(model())
        return network, lambda net: ZeroRedundancyOptimizer(net.parameters(), surefoot.Prodigy, d0=1e-2)
    if kind == "fully_shard":
        network = model()
        for layer in (network[0], network[2]):
            fully_shard(layer)
        fully_shard(network)
        return network, lambda net: surefoot.Prodigy(net.parameters(), d0=1e-2)
    more = {"process_group": distributed.group.WORLD} if kind == "FSDP1" else {}
    network = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    return network, lambda net: surefoot.Prodigy(net.parameters(), d0=1e-2, **more)


def idle_rank(rank):
    """Return d where one rank of a process group has no gradient: it follows all the same."""
    param, idle = torch.full((3,), float(rank + 1)).requires_grad_(), torch.ones(2, requires_grad=True)
    groups = [{"params": [idle]}, {"params": [param]}]
    optimizer = surefoot.Prodigy(groups, d0=1e-2, process_group=distributed.group.WORLD)
    for step in range(6):
        param.grad = None if rank == 0 and step % 2 else torch.full((3,), 0.5)
        optimizer.step()
    return {"numbers": numbers(optimizer)}


def cases(world):
    rank = distributed.get_rank()
    for name, mesh, placements in layouts(world):
        for option, options in OPTIONS.items():
            yield f"{name} / {option}", functools.partial(compared, options, mesh, placements)
        yield f"{name} / reloaded", functools.partial(compared, {}, mesh, placements, reload=3)
    for kind in ("fully_shard", "ZeRO", "FSDP1", "FSDP1 not told"):
        yield kind, functools.partial(parts_of_a_batch, kind, rank, world)
    yield "idle", functools.partial(idle_rank, rank)
