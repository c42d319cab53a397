"""LBFGS on sharded parameters beside one process, whose loss and gradients all ranks have."""

import functools
from collections import Counter

import torch
from cases_step import SHAPES, counted, layouts, spread, tensor
from sharding import distribute, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import surefoot

OPTIONS = {
    "fixed": {"lr": 0.3, "max_iter": 5},
    "search": {"line_search_fn": "strong_wolfe", "max_iter": 4},
    "history": {"lr": 0.3, "max_iter": 6, "history_size": 2},
    "tolerance": {"line_search_fn": "strong_wolfe", "max_iter": 25, "tolerance_grad": 1e-3},
    "rates": {"lr": 0.3, "max_iter": 4},
}


def problem(params, mesh, placements, *, share=0.0):
    """Return a closure: a sum of quartic bowls, whose gradients are given; `share` shifts the loss of a rank."""
    targets = [tensor(param.shape, 50 + i, param.dtype) for i, param in enumerate(params)]

    def closure():
        loss = torch.zeros((), dtype=params[0].dtype)
        for i, (param, target, layout) in enumerate(zip(params, targets, placements, strict=True)):
            away = (whole(param) - target) * (1.0 + i)
            loss = loss + (away**2).sum() / 2 + (away**4).sum() / 8
            param.grad = spread((away + away**3 / 2) * (1.0 + i), mesh, layout)
        return loss + share

    return closure


def minimized(option, mesh=None, placements=(None,) * 5, *, shapes=SHAPES, reload=None, dtype=torch.float64, **more):
    """Return parameters, counters and collectives after some steps."""
    params = [
        torch.nn.Parameter(spread(tensor(shape, i, dtype), mesh, p))
        for i, (shape, p) in enumerate(zip(shapes, placements, strict=True))
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}] if option == "rates" else params
    optimizer = surefoot.LBFGS(groups, **OPTIONS[option])
    closure, calls = problem(params, mesh, placements, **more), Counter()
    losses = []
    for step in range(2):
        if step == reload:
            saved, optimizer = optimizer.state_dict(), surefoot.LBFGS(groups, **OPTIONS[option])
            optimizer.load_state_dict(saved)
        with counted(calls):
            losses.append(float(optimizer.step(closure)))
    state = optimizer.state[params[0]]
    return {
        "params": [whole(param) for param in params],
        "counts": (state["func_evals"], state["n_iter"]),
        "losses": losses,
        "final": float(closure()),
        "calls": dict(calls),
    }


def compared(option, mesh, placements, **more):
    plain, sharded = minimized(option, **more), minimized(option, mesh, placements, **more)
    pairs = zip(plain["params"], sharded["params"], strict=True)
    return {
        "difference": max((a - b).abs().max().item() for a, b in pairs),
        "counts": (plain["counts"], sharded["counts"]),
        "final": (plain["final"], sharded["final"]),
        "calls": sharded["calls"],
        "bits": [param.double().sum().item() for param in sharded["params"]],
    }


def reloaded(option, mesh, placements):
    kept, loaded = (minimized(option, mesh, placements, reload=step) for step in (None, 1))
    return {"same": all(map(torch.equal, kept["params"], loaded["params"])), "counts": kept["counts"]}


def collectives(mesh, count):
    """Return the collectives of one step of some tensors, and how many iterations it made."""
    placements, shapes = ((Shard(0),),) * count, ((6, 4),) * count
    found = minimized("fixed", mesh, placements, shapes=shapes)
    return {"calls": found["calls"], "counts": found["counts"]}


def own_losses(mesh):
    """Return how ranks whose batches, and so losses, differ decide."""
    placements = ((Shard(0),),) * 5
    found = minimized("search", mesh, placements, share=float(mesh.get_rank()))
    return {"counts": found["counts"], "bits": [param.double().sum().item() for param in found["params"]]}


def refused(mesh, case, failing):
    """Return how a step ends that one rank cannot make, whether it has changed something, and how the next one does."""
    placements = ((Shard(0),),) * 5
    params = [torch.nn.Parameter(spread(tensor(s, i), mesh, p)) for i, (s, p) in enumerate(zip(SHAPES, placements))]  # noqa: B905
    optimizer = surefoot.LBFGS(params, **OPTIONS["fixed"])
    closure, calls = problem(params, mesh, placements), Counter()
    optimizer.step(closure)
    fails, state = mesh.get_rank() == failing, optimizer.state[params[0]]
    kept = state["d"]
    if fails and case == "state":
        state["d"] = torch.zeros(999)

    def failing_closure():
        calls["closure"] += 1
        loss = closure()
        if fails and case == "closure" and calls["closure"] > 2:
            raise ZeroDivisionError
        return loss

    before, error = [param.to_local().detach().clone() for param in params], None
    try:
        optimizer.step(failing_closure)
    except (RuntimeError, ZeroDivisionError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    unchanged = all(torch.equal(a, b.to_local()) for a, b in zip(before, params, strict=True))
    state["d"] = kept
    optimizer.step(closure)
    return {"error": error, "unchanged": unchanged, "after": all(p.full_tensor().isfinite().all() for p in params)}


def other_layout(mesh):
    """Return how state of one layout is refused for another, of which shards are as large."""

    def made(placement):
        param = torch.nn.Parameter(distribute(tensor((4, 4), 0), mesh, placement))
        optimizer = surefoot.LBFGS([param], **OPTIONS["fixed"])
        optimizer.step(problem([param], mesh, [placement]))
        return optimizer

    rows, columns = made([Shard(0)]), made([Shard(1)])
    try:
        columns.load_state_dict(rows.state_dict())
    except ValueError as error:
        return {"refused": str(error)}
    return {}


def uneven(mesh):
    """Return the greatest difference where shards are not what `torch.chunk` makes them."""
    rank, world = mesh.get_rank(), mesh.size()
    shape, rows = (world + 4, 3), 5 if rank == 0 else 1
    first = 0 if rank == 0 else 4 + rank
    full, target = tensor(shape, 0), tensor(shape, 1)

    def spread_rows(value):
        local = value[first : first + rows].clone()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(3, 1))

    ours, alone = torch.nn.Parameter(spread_rows(full)), torch.nn.Parameter(full.clone())

    def sharded():
        away = ours.to_local().detach() - target[first : first + rows]
        loss = (away**2).sum()
        torch.distributed.all_reduce(loss)
        ours.grad = DTensor.from_local(
            2 * away, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(3, 1)
        )
        return loss

    def single():
        alone.grad = 2 * (alone.detach() - target)
        return ((alone.detach() - target) ** 2).sum()

    for param, closure in ((ours, sharded), (alone, single)):
        optimizer = surefoot.LBFGS([param], **OPTIONS["search"])
        optimizer.step(closure)
    return {"difference": (ours.to_local() - alone[first : first + rows]).abs().max().item()}


def cases(world):
    line = init_device_mesh("cpu", (world,))
    for name, mesh, placements in layouts(world):
        for option in OPTIONS if name == "mixed" else ("search",):
            yield f"{name} / {option}", functools.partial(compared, option, mesh, placements)
        single = {"dtype": torch.float32}
        yield f"{name} / float32", functools.partial(compared, "rates", mesh, placements, **single)
        yield f"reloaded / {name}", functools.partial(reloaded, "fixed", mesh, placements)
    for count in (2, 9):
        yield f"collectives / {count}", functools.partial(collectives, line, count)
    for case in ("state", "closure"):
        for failing in (0, world - 1):
            yield f"refused / {case} / {failing}", functools.partial(refused, line, case, failing)
    yield "own losses", functools.partial(own_losses, line)
    yield "other layout", functools.partial(other_layout, line)
    yield "uneven", functools.partial(uneven, line)
