"""Every optimizer's state goes through surefoot.save, through torch's state dicts, whole and flat, and through DCP."""

import functools
from pathlib import Path
from types import SimpleNamespace

import torch
from cases_layouts import tensor
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import surefoot
from conformance import ROWS

KINDS = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "from the first rank": {"full_state_dict": True, "broadcast_from_rank0": True},
}


def combined(params, lr):
    """Return an optimizer that steps the first matrix by Muon and the second by AdamW."""
    parts = [surefoot.Part(surefoot.Muon, "0.weight", lr=lr), surefoot.Part(surefoot.AdamW, lr=lr)]
    return surefoot.Combined(zip(("0.weight", "2.weight"), params, strict=True), parts)


ROWS_HERE = (
    *(row for row in ROWS if row.name not in ("SparseAdam", "LBFGS")),
    SimpleNamespace(name="Combined", ours=combined, needs_closure=False),
)
"""SparseAdam takes sparse gradients only, which DTensor does not have.  The state of LBFGS torch's tools refuse, since
it is all with the first parameter, as in torch.optim; ours refuse what each rank has for itself.
"""


def made(row, seed, steps):
    """Make a model of FSDP2 and its optimizer; matrices only, which is what Muon takes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    for layer in model[::2]:
        fully_shard(layer)
    fully_shard(model)
    options = {"momentum": 0.9} if row.name in ("SGD", "LARS") else {}  # torch's tools ask for state
    optimizer = row.ours(model.parameters(), lr=0.01, **options)
    for step in range(steps):
        stepped(row, model, optimizer, step)
    return model, optimizer


def stepped(row, model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = model(tensor((5, 6), step)).square().mean()
        loss.backward()
        return loss

    if row.needs_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def state_of(model, optimizer):
    """Return copies of the state of parameters by name, of sharded state this rank's part."""
    return {
        f"{key} of {name}": local(value)
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if torch.is_tensor(value) or isinstance(value, int | float)
    }


def local(value):
    return torch.as_tensor(value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def differing(ours, theirs):
    """Return what differs, in a bit."""
    both = ours.keys() & theirs.keys()
    return sorted(
        [*(name for name in both if not torch.equal(ours[name], theirs[name])), *(ours.keys() ^ theirs.keys())]
    )


def through_torch(kind, state, folder, other, another):
    """Put state that was taken out into another optimizer, through DCP if there is a folder."""
    options = StateDictOptions(**KINDS[kind])
    if folder is not None:
        checkpoint.save({"optimizer": state}, checkpoint_id=folder)
        found = {"optimizer": get_optimizer_state_dict(other, another, options=options)}
        checkpoint.load(found, checkpoint_id=folder)
        state = found["optimizer"]
    if kind == "from the first rank" and torch.distributed.get_rank():
        state = {}
    set_optimizer_state_dict(other, another, state, options=options)


def through_all(row, by_dcp, folder):
    """Return for each way into another optimizer what of its state differs, and whether the next steps are equal."""
    model, optimizer = made(row, 0, 2)
    ways = {"surefoot": made(row, 1, 1)}
    surefoot.save(folder / "surefoot", model=model, optimizer=optimizer)
    surefoot.load(folder / "surefoot", model=ways["surefoot"][0], optimizer=ways["surefoot"][1])
    for kind, place in (*((kind, None) for kind in KINDS), (by_dcp, folder / "dcp")):
        other, another = ways[f"{kind}, {place}"] = made(row, 1, 1)
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**KINDS[kind]))
        through_torch(kind, state, place, other, another)
        with torch.no_grad():
            for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
    expected = state_of(model, optimizer)
    found = {way: {"differing": differing(expected, state_of(*each))} for way, each in ways.items()}
    for each in ((model, optimizer), *ways.values()):
        stepped(row, *each, 5)
    for way, (other, _) in ways.items():
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        found[way]["next"] = [torch.equal(local(ours), local(theirs)) for ours, theirs in pairs]
    return found


def cases(_world):
    """Take every optimizer each way, through DCP with sharded and with flat names in turn."""
    for number, row in enumerate(ROWS_HERE):
        by_dcp = ("sharded", "flat")[number % 2]
        yield row.name, functools.partial(through_all, row, by_dcp, Path.cwd() / row.name)
