"""State loaded from one layout into another, all pairs of them: it is the same, and so is the next step."""

import functools
import itertools

import torch
from sharding import distribute, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import surefoot

SHAPES = ((4, 6), (7, 3), (1, 5), (8,), (3, 2, 4))
ALGORITHMS = {
    "SGD": (surefoot.SGD, {"momentum": 0.9}),
    "AdamW": (surefoot.AdamW, {"amsgrad": True, "ema": 0.9}),
}


def layouts(world):
    """Return meshes and placements by name; None for plain tensors.  A row's placement stands for vectors too."""
    line = init_device_mesh("cpu", (world,))
    found = {
        "plain": (None, None),
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
    }
    column = init_device_mesh("cpu", (world, 1))
    found["two dimensions"] = (column, [Shard(0), Replicate()])
    found["columns of two"] = (column, [Shard(1), Shard(0)])
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        found["hybrid"] = (square, [Replicate(), Shard(0)])
        found["blocks"] = (square, [Shard(0), Shard(1)])
        found["rows twice"] = (square, [Shard(0), Shard(0)])
        found["strided"] = (square, [_StridedShard(0, split_factor=2), Shard(0)])
        found["strided alone"] = (square, [_StridedShard(0, split_factor=2), Replicate()])
    return found


def tensor(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(full, layout):
    mesh, placements = layout
    if mesh is None:
        return full.clone()
    fitting = [p if not p.is_shard() or p.dim < full.dim() else Shard(0) for p in placements]
    return distribute(full, mesh, fitting)


def made(cls, options, layout, shapes=SHAPES):
    params = [torch.nn.Parameter(spread(tensor(shape, i), layout)) for i, shape in enumerate(shapes)]
    return cls([(f"p{i}", param) for i, param in enumerate(params)], lr=0.1, **options), params


def step(optimizer, params, layout, seed):
    for i, param in enumerate(params):
        param.grad = spread(tensor(param.shape, 100 * seed + i), layout)
    optimizer.step()


def state_of(optimizer, params):
    return [{k: whole(v) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params]


@functools.cache
def plain(name):
    cls, options = ALGORITHMS[name]
    layout = (None, None)
    optimizer, params = made(cls, options, layout)
    for seed in (1, 2):
        step(optimizer, params, layout, seed)
    state = state_of(optimizer, params)
    step(optimizer, params, layout, 3)
    return state, [whole(param) for param in params]


def loaded(name, saved, live):
    """Return whether state came over bit for bit, laid out as its parameter is, and the next step is the plain one."""
    cls, options = ALGORITHMS[name]
    source, params = made(cls, options, saved)
    for seed in (1, 2):
        step(source, params, saved, seed)
    target, own = made(cls, options, live)
    for mine, theirs in zip(own, params, strict=True):
        with torch.no_grad():
            mine.copy_(spread(whole(theirs), live))
    target.load_state_dict(source.state_dict())
    state, after = plain(name)
    placed = all(
        isinstance(value, DTensor) == isinstance(param, DTensor)
        and getattr(value, "placements", None) == getattr(param, "placements", None)
        and getattr(value, "device_mesh", None) == getattr(param, "device_mesh", None)
        for param in own
        for key, value in target.state[param].items()
        if key != "step"
    )
    same = all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        for ours, theirs in zip(state_of(target, own), state, strict=True)
    )
    shared = any(
        local(target.state[mine][k]).untyped_storage().data_ptr() == local(value).untyped_storage().data_ptr()
        for mine, theirs in zip(own, params, strict=True)
        for k, value in source.state[theirs].items()
        if isinstance(value, torch.Tensor) and local(value).numel()
    )
    step(target, own, live, 3)
    stepped = all(torch.equal(whole(ours), theirs) for ours, theirs in zip(own, after, strict=True))
    return {"placed": placed, "same": same, "shared": shared, "stepped": stepped}


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def factored(saved, live):
    """Load Adafactor's state, some of which has other shapes than its parameter."""
    source, params = made(surefoot.Adafactor, {}, (None, None), SHAPES[:2])
    for seed in (1, 2):
        step(source, params, (None, None), seed)
    state = source.state_dict()
    for number, entry in state["state"].items():
        spread_out = {name: spread(entry[name], saved) for name in ("row_var", "col_var")}
        state["state"][number] = entry | spread_out
    target, own = made(surefoot.Adafactor, {}, live, SHAPES[:2])
    target.load_state_dict(state)
    return {
        "same": all(
            torch.equal(whole(target.state[ours][name]), source.state[theirs][name])
            for ours, theirs in zip(own, params, strict=True)
            for name in ("row_var", "col_var")
        ),
        "kinds": all(
            isinstance(target.state[param][name], DTensor) == isinstance(param, DTensor)
            for param in own
            for name in ("row_var", "col_var")
        ),
    }


def refused(layout, live, failing, strict):
    """One rank has state that does not fit: all refuse, none waits for the others."""
    source, params = made(*ALGORITHMS["SGD"], layout)
    step(source, params, layout, 1)
    target, _ = made(*ALGORITHMS["SGD"], live)
    state = source.state_dict()
    if torch.distributed.get_rank() == failing:
        held, wrong = state["state"][0]["momentum_buffer"], torch.zeros(1)
        if not strict:
            layout = held.device_mesh, held.placements
            wrong = DTensor.from_local(
                torch.zeros(9, 6), *layout, run_check=False, shape=held.shape, stride=held.stride()
            )
        state["state"][0] = {"momentum_buffer": wrong}
    try:
        target.load_state_dict(state, strict=strict)
    except ValueError as error:
        message = str(error)
    torch.distributed.barrier()
    return {"message": message, "unchanged": not target.state}


def cases(world):
    known = layouts(world)
    for name, saved, live in itertools.product(ALGORITHMS, known, known):
        yield f"{name} / {saved} / {live}", functools.partial(loaded, name, known[saved], known[live])
    for saved, live in itertools.product(known, known):
        yield f"Adafactor / {saved} / {live}", functools.partial(factored, known[saved], known[live])
    for live, failing, strict in itertools.product(("plain", "columns", "two dimensions"), range(2), (True, False)):
        case = functools.partial(refused, known["rows"], known[live], failing, strict)
        yield f"refused / {live} / {failing} / {strict}", case
