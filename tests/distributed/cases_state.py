"""State that is not laid out over ranks as its parameter is: loaded, or put there by hand."""

import functools
from itertools import product

import torch
from sharding import distribute
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import surefoot

LAYOUTS = {"plain": None, "rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}
ALGORITHMS = {
    "SGD": (surefoot.SGD, {"momentum": 0.9}),
    "AdamW": (surefoot.AdamW, {"amsgrad": True, "ema": 0.9}),
    "Adagrad": (surefoot.Adagrad, {}),
}
SHAPE = (4, 6)


def laid_out(layout, mesh, seed=0):
    full = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    placements = LAYOUTS[layout]
    return full if placements is None else distribute(full, mesh, placements)


def stepped(cls, options, layout, mesh, steps=2):
    param = torch.nn.Parameter(laid_out(layout, mesh))
    optimizer = cls([("weight", param)], lr=0.1, **options)
    for seed in range(1, 1 + steps):
        param.grad = laid_out(layout, mesh, seed)
        optimizer.step()
    return optimizer, param


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outcome(action, param, gather=True):
    """Say how an action ends: with which numbers, or refused how, and then whether the parameter is as it was.

    Numbers are gathered from both ranks unless one may refuse where the other does not.
    """
    before = local(param)
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error), "unchanged": torch.equal(local(param), before)}
    full = param.full_tensor() if isinstance(param, DTensor) and gather else local(param)
    return {"values": full.detach().tolist()}


def loaded(name, saved, live, mesh):
    """Load the state of one layout into an optimizer of another, and step."""
    source, _ = stepped(*ALGORITHMS[name], saved, mesh)
    target, param = stepped(*ALGORITHMS[name], live, mesh)

    def action():
        target.load_state_dict(source.state_dict())
        param.grad = laid_out(live, mesh, 9)
        target.step()

    return outcome(action, param)


def switched(saved, live, mesh):
    """Load what was saved in eval mode in one layout into parameters of another, and switch to train mode."""
    source, weights = stepped(surefoot.AdamWScheduleFree, {}, saved, mesh, steps=3)
    source.eval()
    whole = weights.detach().full_tensor() if isinstance(weights, DTensor) else weights.detach()
    placements = LAYOUTS[live]
    param = torch.nn.Parameter(whole if placements is None else distribute(whole, mesh, placements))
    target = surefoot.AdamWScheduleFree([("weight", param)])

    def action():
        target.load_state_dict(source.state_dict())
        target.train()

    return outcome(action, param)


def put(name, other, live, mesh):
    """Put state of one layout beside a parameter of another, and step."""
    optimizer, param = stepped(*ALGORITHMS[name], live, mesh)
    slot = next(k for k, v in optimizer.state[param].items() if v.dim())
    optimizer.state[param][slot] = laid_out(other, mesh, 5)
    param.grad = laid_out(live, mesh, 9)
    return outcome(optimizer.step, param)


def wrong_shard(size, mesh):
    """Put a shard of a wrong size into the state of all ranks but the first, and step."""
    optimizer, param = stepped(surefoot.SGD, {"momentum": 0.9}, "rows", mesh)
    shard = torch.zeros(size if mesh.get_rank() else 2, SHAPE[1])
    optimizer.state[param]["momentum_buffer"] = DTensor.from_local(
        shard, mesh, [Shard(0)], run_check=False, shape=torch.Size(SHAPE), stride=(SHAPE[1], 1)
    )
    param.grad = laid_out("rows", mesh, 9)
    return outcome(optimizer.step, param, gather=False)


def cases(world):
    mesh = init_device_mesh("cpu", (world,))
    for name, other, live in product(ALGORITHMS, LAYOUTS, LAYOUTS):
        yield f"load {name} {other} {live}", functools.partial(loaded, name, other, live, mesh)
        yield f"state {name} {other} {live}", functools.partial(put, name, other, live, mesh)
    for other, live in product(LAYOUTS, LAYOUTS):
        yield f"switch AdamWScheduleFree {other} {live}", functools.partial(switched, other, live, mesh)
    for size in (1, 3):
        yield f"shard of {size} rows", functools.partial(wrong_shard, size, mesh)
