"""Checkpoints of sharded training: saved in every layout, loaded in every other, with failures on single ranks."""

import functools
import itertools
import warnings
from pathlib import Path

import torch
from cases_layouts import SHAPES, layouts, spread, tensor
from sharding import whole
from torch import nn
from torch.distributed.fsdp import fully_shard

import surefoot
from surefoot.checkpoint import sharded

OPTIONS = {"lr": 0.1, "amsgrad": True, "ema": 0.9}


class Model(nn.Module):
    """Parameters in one layout, a plain buffer, and two names for one parameter."""

    def __init__(self, layout, seed):
        super().__init__()
        for i, shape in enumerate(SHAPES):
            self.register_parameter(f"p{i}", nn.Parameter(spread(tensor(shape, seed + i), layout)))
        self.tied = self.p0
        self.register_buffer("count", torch.tensor(seed))


def made(layout, seed=0, steps=0, cls=surefoot.AdamW, **options):
    model = Model(layout, seed)
    optimizer = cls(model.named_parameters(), **(options or OPTIONS))
    for step in range(steps):
        trained(model, optimizer, layout, step)
    return model, optimizer


def trained(model, optimizer, layout, step):
    for i, param in enumerate(model.parameters()):
        param.grad = spread(tensor(param.shape, 100 * (step + 1) + i), layout)
    optimizer.step()


def state_of(model, optimizer):
    """Return all tensors, whole."""
    found = {name: whole(value) for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        found |= {f"{key} of {name}": whole(v) for key, v in optimizer.state[param].items() if torch.is_tensor(v)}
    return found


def place(name=""):
    return Path.cwd() / "checkpoints" / name


def together(action):
    """Do something on the first rank alone, and let the others wait for it."""
    found = action() if torch.distributed.get_rank() == 0 else None
    torch.distributed.barrier()
    return found


def saved(name, layout):
    """Save in a layout; a plain model is saved by the first rank."""
    model, optimizer = made(layout, steps=2)
    options = {"model": model, "optimizer": optimizer, "extra": {"layout": name}, "step": 7, "rng": False}
    if layout[0] is None:
        together(lambda: surefoot.save(place(name), **options))
    else:
        assert surefoot.save(place(name), **options) == place(name) / "step-00000007.safetensors"
    return {"state": state_of(model, optimizer), "files": sorted(path.name for path in place(name).rglob("*"))}


def loaded(source, layout):
    model, optimizer = made(layout, seed=50)
    before = [param.data_ptr() if layout[0] is None else param.to_local().data_ptr() for param in model.parameters()]
    found = surefoot.load(source, model=model, optimizer=optimizer)
    after = [param.data_ptr() if layout[0] is None else param.to_local().data_ptr() for param in model.parameters()]
    like = all(
        getattr(value, "placements", None) == getattr(param, "placements", None)
        for param in model.parameters()
        for key, value in optimizer.state[param].items()
        if key != "step"
    )
    result = {"state": state_of(model, optimizer), "in place": before == after, "like": like, "step": found.step}
    trained(model, optimizer, layout, 2)
    return result | {"next": state_of(model, optimizer)}


def expected():
    """Return the state that a single process has when it is saved, and after the next step."""
    layout = (None, None)
    model, optimizer = made(layout, steps=2)
    now = state_of(model, optimizer)
    trained(model, optimizer, layout, 2)
    return now, state_of(model, optimizer)


def in_background(layout):
    model, optimizer = made(layout, steps=2)
    before = state_of(model, optimizer)
    folder = place("background")
    surefoot.save(folder, model=model, optimizer=optimizer, async_=True)
    trained(model, optimizer, layout, 5)
    whole(next(model.parameters()))  # speaks while the thread speaks
    surefoot.save(folder, model=model, optimizer=optimizer, async_=True)
    surefoot.checkpoint.wait()
    torch.distributed.barrier()
    other, another = made(layout, seed=9)
    surefoot.load(folder / "step-00000000.safetensors", model=other, optimizer=another)
    return {"same": equal(before, state_of(other, another)), "names": listed(folder)}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def listed(folder):
    torch.distributed.barrier()
    found = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    return [name[:13] + (".shards" if name.endswith(".shards") else "") for name in found]


def rotated(layout):
    model, optimizer = made(layout, steps=1)
    for step in (1, 2, 2, 3):
        surefoot.save(place("rotated"), model=model, optimizer=optimizer, step=step, keep=2)
    return {"names": listed(place("rotated"))}


def failing(layout, kind, rank):
    """Save while one rank fails; the checkpoint before it stays, and the next save succeeds."""
    folder = place(f"failing {kind} {rank}")
    model, optimizer = made(layout, steps=1)
    surefoot.save(folder, model=model, optimizer=optimizer, step=1)
    own = torch.distributed.get_rank() == rank
    extra = {"f": print} if own and kind == "plain data" else None
    real = sharded.write

    def full(*_):
        raise OSError(28, "No space left on device")

    if own and kind in ("disk", "disk in background"):
        sharded.write = full
    try:
        surefoot.save(
            folder, model=model, optimizer=optimizer, extra=extra, step=2, async_=kind == "disk in background"
        )
        surefoot.checkpoint.wait()
        error = None
    except (TypeError, OSError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    sharded.write = real
    names = listed(folder)
    surefoot.save(folder, model=model, optimizer=optimizer, step=3)
    return {"error": error, "names": names, "after": listed(folder)}


def damaged(layout, kind):
    """Load a folder whose newest checkpoint has a damaged shard, or lacks one: all ranks take the one before."""
    folder = place(f"damaged {kind}")
    model, optimizer = made(layout, steps=1)
    before = state_of(model, optimizer)
    surefoot.save(folder, model=model, optimizer=optimizer, step=1)
    trained(model, optimizer, layout, 1)
    path = surefoot.save(folder, model=model, optimizer=optimizer, step=2)

    def damage():
        (shards,) = folder.glob("step-00000002.*.shards")
        file = shards / "rank-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        if kind == "flipped":
            file.write_bytes(data)
        elif kind == "cut":
            file.write_bytes(data[:-5])
        elif kind == "another":
            file.write_bytes((next(folder.glob("step-00000001.*.shards")) / file.name).read_bytes())
        else:
            file.unlink()

    together(damage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = surefoot.load(folder, model=model, optimizer=optimizer)
    skipped = [(skip.path.name, skip.reason) for skip in found.skipped]
    try:
        surefoot.load(path, model=model, optimizer=optimizer)
        refused = None
    except (ValueError, RuntimeError) as error:
        refused = str(error)
    return {
        "step": found.step,
        "skipped": skipped,
        "same": equal(before, state_of(model, optimizer)),
        "refused": refused,
    }


def misfit(layout, rank):
    """Load into a model that does not fit on one rank: refused on all, and nothing has changed."""
    model, optimizer = made(layout, steps=1)
    path = surefoot.save(place(f"misfit {rank}"), model=model, optimizer=optimizer, step=1)
    trained(model, optimizer, layout, 1)
    if torch.distributed.get_rank() == rank:
        model.register_buffer("more", torch.zeros(1))
    before = state_of(model, optimizer)
    try:
        surefoot.load(path, model=model, optimizer=optimizer)
        error = None
    except (ValueError, RuntimeError) as raised:
        error = str(raised)
    return {"error": error, "unchanged": equal(before, state_of(model, optimizer))}


def generators(layout):
    """Every rank goes on with its own random numbers."""
    model, optimizer = made(layout, steps=1)
    torch.manual_seed(torch.distributed.get_rank())
    path = surefoot.save(place("generators"), model=model, optimizer=optimizer)
    drawn = torch.rand(3)
    torch.manual_seed(99)
    surefoot.load(path, model=model, optimizer=optimizer)
    return {"drawn": drawn, "again": torch.rand(3)}


def of_fsdp():
    """Save a model of FSDP2 whose last layer leaves ranks without a row, and load it into a fresh one."""

    def train(seed, steps):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 1))
        for layer in model[::2]:
            fully_shard(layer)
        fully_shard(model)
        optimizer = surefoot.AdamW(model.parameters(), lr=0.1, max_grad_norm=1.0)
        schedule = surefoot.lr_scheduler.StepLR(optimizer, 1)
        for step in range(steps):
            optimizer.zero_grad()
            model(tensor((4, 6), step)).square().sum().backward()
            optimizer.step()
            schedule.step()
        return model, optimizer, schedule

    model, optimizer, schedule = train(0, 3)
    surefoot.save(place("fsdp"), model=model, optimizer=optimizer, scheduler=schedule, extra=1)
    other, another, later = train(5, 0)
    surefoot.load(place("fsdp"), model=other, optimizer=another, scheduler=later)
    for each, stepper in ((model, optimizer), (other, another)):
        stepper.zero_grad()
        each(tensor((4, 6), 9)).square().sum().backward()
        stepper.step()
    return {"same": equal(state_of(model, optimizer), state_of(other, another)), "epoch": later.last_epoch}


def of_torchs_optimizer(layout):
    options = {"cls": torch.optim.AdamW, "lr": 0.1, "foreach": False}
    model, optimizer = made(layout, steps=2, **options)
    surefoot.save(place("torch"), model=model, optimizer=optimizer)
    other, another = made(layout, seed=4, **options)
    surefoot.load(place("torch"), model=other, optimizer=another)
    return {"same": equal(state_of(model, optimizer), state_of(other, another))}


def own_state(layout):
    """Save state that each rank has for itself."""
    model, optimizer = made(layout, steps=1)
    optimizer.state[model.p0]["mine"] = torch.full((3,), float(torch.distributed.get_rank()))
    try:
        surefoot.save(place("own"), model=model, optimizer=optimizer)
    except ValueError as error:
        return {"error": str(error), "files": listed(place("own"))}


def only_extra(layout):
    value = spread(tensor((4, 6), 0), layout)
    try:
        surefoot.save(place("extra"), extra={"t": value})
    except TypeError as error:
        return {"error": str(error)}


def cases(world):
    known = layouts(world)
    chosen = known["rows"]
    yield "expected", expected
    for name, layout in known.items():
        yield f"saved / {name}", functools.partial(saved, name, layout)
    for name, layout in itertools.product(known, known):
        yield f"loaded / {name} / {layout}", functools.partial(loaded, place(name), known[layout])
    for kind, rank in itertools.product(("plain data", "disk", "disk in background"), range(world)):
        yield f"failing / {kind} / {rank}", functools.partial(failing, chosen, kind, rank)
    for kind in ("flipped", "cut", "another", "missing"):
        yield f"damaged / {kind}", functools.partial(damaged, chosen, kind)
    for rank in range(world):
        yield f"misfit / {rank}", functools.partial(misfit, chosen, rank)
    yield "in background", functools.partial(in_background, chosen)
    yield "rotated", functools.partial(rotated, chosen)
    yield "generators", functools.partial(generators, chosen)
    yield "fsdp", of_fsdp
    yield "torch", functools.partial(of_torchs_optimizer, chosen)
    yield "own state", functools.partial(own_state, chosen)
    yield "only extra", functools.partial(only_extra, chosen)
