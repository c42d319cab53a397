"""Every optimizer's state goes through surefoot.save, through torch's state dicts, whole and flat, and through DCP."""

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import torch
from cases_layouts import tensor, whole
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

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
    """Return the state of parameters by name, whole."""
    return {
        f"{key} of {name}": whole(value) if torch.is_tensor(value) else value
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if torch.is_tensor(value) or isinstance(value, int | float)
    }


def differing(ours, theirs):
    """Return what differs, in a bit."""
    both = ours.keys() & theirs.keys()
    changed = [name for name in both if not torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]))]
    return sorted([*changed, *(ours.keys() ^ theirs.keys())])


def through_torch(row, kind, folder=None):
    """Take the state out, through DCP if there is a folder, and put it into another optimizer."""
    model, optimizer = made(row, 0, 2)
    other, another = made(row, 1, 1)
    options = StateDictOptions(**KINDS[kind])
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if folder is not None:
        checkpoint.save({"optimizer": state}, checkpoint_id=folder)
        found = {"optimizer": get_optimizer_state_dict(other, another, options=options)}
        checkpoint.load(found, checkpoint_id=folder)
        state = found["optimizer"]
    if kind == "from the first rank" and torch.distributed.get_rank():
        state = {}
    set_optimizer_state_dict(other, another, state, options=options)
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    return compared(row, (model, optimizer), (other, another))


def through_surefoot(row, folder):
    model, optimizer = made(row, 0, 2)
    other, another = made(row, 1, 1)
    surefoot.save(folder, model=model, optimizer=optimizer)
    surefoot.load(folder, model=other, optimizer=another)
    return compared(row, (model, optimizer), (other, another))


def compared(row, one, two):
    """Return in what the state of two differs, and whether their next steps are the same."""
    (model, optimizer), (other, another) = one, two
    found = {"differing": differing(state_of(model, optimizer), state_of(other, another))}
    for each, stepper in (one, two):
        stepped(row, each, stepper, 5)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return found | {"next": [torch.equal(whole(ours), whole(theirs)) for ours, theirs in pairs]}


def cases(_world):
    for row in ROWS_HERE:
        yield f"{row.name} / surefoot", functools.partial(through_surefoot, row, Path.cwd() / row.name)
    for row, kind in itertools.product(ROWS_HERE, KINDS):
        yield f"{row.name} / {kind}", functools.partial(through_torch, row, kind)
    for row, kind in itertools.product(ROWS_HERE, ("sharded", "flat")):
        folder = Path.cwd() / f"{row.name} {kind}"
        yield f"{row.name} / {kind} / dcp", functools.partial(through_torch, row, kind, folder)
