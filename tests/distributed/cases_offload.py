"""Models of FSDP2 whose shards, gradients and state are on the CPU by FSDP2's own policy, under every optimizer."""

import functools

import torch
from cases_layouts import tensor
from cases_torch_tools import ROWS_HERE
from sharding import whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import surefoot


def made(row, policy):
    """Make a model, matrices only, which is what Muon takes, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    for layer in (*model[::2], model):
        fully_shard(layer, **policy)
    params = list(model.parameters())
    return model, row.ours(params, lr=0.01)


def trained(row, policy):
    """Return the parameters after some steps, whole."""
    model, optimizer = made(row, policy)
    optimizer.step_options.max_grad_norm = 0.05
    for step in range(2):
        model(tensor((4, 6), step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(param.is_cpu for param in model.parameters())
    return [whole(param.detach()) for param in model.parameters()]


def same(row):
    """Return whether training is the same with the policy as without."""
    offloaded = trained(row, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    return all(map(torch.equal, offloaded, trained(row, {})))


def sharded():
    model, optimizer = made(ROWS_HERE[0], {})
    optimizer.offload(model)


def replicated():
    model = DistributedDataParallel(nn.Linear(2, 2))
    surefoot.SGD(model.parameters()).offload(model)


def cases(_world):
    for row in ROWS_HERE:
        yield row.name, functools.partial(same, row)
    yield "sharded", sharded
    yield "DDP", replicated
