"""Run by `test_two_ranks.py` as one of two processes: prints as JSON what became of each case on this rank."""

import json
import sys
import warnings
from itertools import product

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

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
    return full if placements is None else distribute_tensor(full, mesh, placements)


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


def load_cases(mesh):
    """Load the state of one layout into an optimizer of another, and step."""
    for name, saved, live in product(ALGORITHMS, LAYOUTS, LAYOUTS):
        cls, options = ALGORITHMS[name]
        source, _ = stepped(cls, options, saved, mesh)
        target, param = stepped(cls, options, live, mesh)

        def action(source=source, target=target, param=param, live=live):
            target.load_state_dict(source.state_dict())
            param.grad = laid_out(live, mesh, 9)
            target.step()

        yield f"load {name} {saved} {live}", outcome(action, param)


def state_cases(mesh):
    """Put state of one layout beside a parameter of another, and step."""
    for name, other, live in product(ALGORITHMS, LAYOUTS, LAYOUTS):
        cls, options = ALGORITHMS[name]
        optimizer, param = stepped(cls, options, live, mesh)
        slot = next(k for k, v in optimizer.state[param].items() if v.dim())
        optimizer.state[param][slot] = laid_out(other, mesh, 5)
        param.grad = laid_out(live, mesh, 9)
        yield f"state {name} {other} {live}", outcome(optimizer.step, param)


def shard_cases(mesh):
    """Return a shard of a wrong size to one rank's state, and gradients of other kinds."""
    rank = mesh.get_rank()
    for size in (1, 3):
        optimizer, param = stepped(surefoot.SGD, {"momentum": 0.9}, "rows", mesh)
        shard = torch.zeros(size if rank else 2, SHAPE[1])
        optimizer.state[param]["momentum_buffer"] = DTensor.from_local(
            shard, mesh, [Shard(0)], run_check=False, shape=torch.Size(SHAPE), stride=(SHAPE[1], 1)
        )
        param.grad = laid_out("rows", mesh, 9)
        yield f"shard of {size} rows", outcome(optimizer.step, param, gather=False)


def main():
    rank, store = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = dict([*load_cases(mesh), *state_cases(mesh), *shard_cases(mesh)])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
