"""Steps of sharded parameters beside those of plain ones, in all layouts and with all options."""

import functools
import itertools
from collections import Counter
from contextlib import contextmanager

import torch
from sharding import distribute
from torch import distributed
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import surefoot
from conformance import ELEMENTWISE
from surefoot.errors import NonFiniteGradientError

SHAPES = ((4, 6), (7, 3), (1, 5), (8,), (3, 2, 4))
ROWS, COLUMNS, COPIES = (Shard(0),), (Shard(1),), (Replicate(),)
STEPS = 4


def layouts(world):
    """Yield names of layouts, meshes and the placements of each parameter, None for plain ones."""
    line = init_device_mesh("cpu", (world,))
    yield "rows", line, (ROWS,) * 5
    yield "columns", line, (COLUMNS, COLUMNS, COLUMNS, ROWS, COLUMNS)
    yield "copies", line, (COPIES,) * 5
    yield "mixed", line, (None, ROWS, ROWS, None, COLUMNS)
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        yield "hybrid", square, ((Replicate(), Shard(0)),) * 5
        yield "fsdp and tp", square, ((Shard(0), Shard(1)),) * 3 + ((Shard(0), Replicate()), (Shard(1), Shard(0)))
        yield "two meshes", square, ((Shard(0), Shard(1)), "line", "line", (Shard(0), Replicate()), None)


def tensor(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(full, mesh, placements):
    if placements is None:
        return full
    if placements == "line":
        mesh, placements = mesh["shard"], (Shard(0),)
    return distribute(full, mesh, placements)


def parts(full, value):
    """Return this rank's part of what is expected, which every rank has whole, and of what there is."""
    if not isinstance(value, DTensor):
        return full, value
    part = distribute(full, value.device_mesh, value.placements)
    return part.to_local(), value.to_local()


GATHER = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = {
    distributed: ("all_reduce", GATHER, "all_to_all_single", "all_gather", "broadcast", "all_to_all"),
    functional: ("all_reduce", "all_gather_tensor", "all_to_all_single", "reduce_scatter_tensor", "broadcast"),
}


@contextmanager
def counted(calls):
    """Count collectives, torch's own for sharded tensors too, by name."""
    originals = {(module, name): getattr(module, name) for module, names in COLLECTIVES.items() for name in names}

    def counting(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for (module, name), function in originals.items():
        setattr(module, name, counting(function, name))
    try:
        yield
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)


def train(
    cls,
    options,
    mesh=None,
    placements=(None,) * 5,
    *,
    shapes=SHAPES,
    dtype=torch.float32,
    spoil=None,
    groups=1,
    reload=None,
):
    """Return what becomes of parameters and state.

    `spoil(step, index, grad)` may change a whole gradient; before step `reload` state goes through a state dict.
    """
    params = [
        torch.nn.Parameter(spread(tensor(shape, i, dtype), mesh, p))
        for i, (shape, p) in enumerate(zip(shapes, placements, strict=True))
    ]
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    if groups > 1:
        named = [{"params": named[:2], "max_grad_norm": 0.5}, {"params": named[2:]}]
    optimizer = cls(named, **options)
    calls, refused = Counter(), []
    for step in range(STEPS):
        if step == reload:
            saved, optimizer = optimizer.state_dict(), cls(named, **options)
            optimizer.load_state_dict(saved)
        for i, (param, p) in enumerate(zip(params, placements, strict=True)):
            grad = tensor(shapes[i], 100 * (step + 1) + i, dtype)
            if spoil is not None:
                grad = spoil(step, i, grad)
            param.grad = None if grad is None else spread(grad, mesh, p)
        with counted(calls):
            try:
                optimizer.step()
            except NonFiniteGradientError as error:
                refused.append(str(error))
    found = {
        "params": [param.detach() for param in params],
        "state": [{k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params],
        "skipped": optimizer.step_statistics.skipped,
        "refused": refused,
        "calls": dict(calls),
    }
    if optimizer.step_options.telemetry is not None:
        raw = optimizer.telemetry.latest().raw
        order = sorted(range(len(raw.names)), key=raw.names.__getitem__)
        found["telemetry"] = raw.sums[order], raw.clip
    return found


def plain_training(cls, options, **more):
    """Return what `train` does of plain parameters, which all layouts are compared with."""
    key = cls, repr(options), repr(more)
    if key not in PLAIN:
        PLAIN[key] = train(cls, options, **more)
    return PLAIN[key]


PLAIN = {}


def compared(cls, options, mesh, placements, **more):
    """Return how a sharded training differs from a plain one: the greatest difference, and what else is to be seen."""
    plain, sharded = plain_training(cls, options, **more), train(cls, options, mesh, placements, **more)
    pairs = list(map(parts, plain["params"], sharded["params"]))
    for ours, theirs in zip(plain["state"], sharded["state"], strict=True):
        assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
        pairs += [parts(ours[name], theirs[name]) for name in ours]
    differences = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return {
        "difference": max(differences, default=0.0),
        "nan": any(bool((a.isnan() != b.isnan()).any()) for a, b in pairs),
        **{f"plain {name}": plain[name] for name in ("skipped", "refused")},
        **{name: sharded[name] for name in ("skipped", "refused", "calls")},
        **({"telemetry": (plain["telemetry"], sharded["telemetry"])} if "telemetry" in plain else {}),
    }


@functools.cache
def nan_in(row):
    """Spoil an element of the first parameter's gradient at step 1, in a row that one rank has."""

    def spoil(step, index, grad):
        if (step, index) == (1, 0):
            grad = grad.clone()
            grad[row, 0] = torch.nan
        return grad

    return spoil


OPTIONS = {
    "nothing": {},
    "norm": {"max_grad_norm": 1.0},
    "value": {"max_grad_value": 0.5},
    "ema": {"ema": 0.9},
    "guarded": {"nonfinite": "skip"},
    "foreach": {"foreach": True, "max_grad_norm": 1.0},
    "eager": {"foreach": False, "max_grad_norm": 1.0},
    "telemetry": {"telemetry": True},
    "cautious": {"cautious": True, "gradient_centralization": True, "max_grad_norm": 1.0},
    "all": {"max_grad_norm": 1.0, "max_grad_value": 0.5, "ema": 0.9, "nonfinite": "skip", "telemetry": True},
}


def cases(world):
    for name, mesh, placements in layouts(world):
        of = functools.partial(compared, mesh=mesh, placements=placements)
        for row in ELEMENTWISE:
            option, options = ("measured", row.all_flags()) if row.reduces else ("nothing", {})
            yield f"{name} / {row.ours.__name__} / {option}", functools.partial(of, row.ours, options)
        for option, options in OPTIONS.items():
            yield f"{name} / SGD / {option}", functools.partial(of, surefoot.SGD, options | {"momentum": 0.9})
            yield f"{name} / AdamW / {option}", functools.partial(of, surefoot.AdamW, options)
        yield f"{name} / AdamW / groups", functools.partial(of, surefoot.AdamW, {"max_grad_norm": 1.0}, groups=2)
        for row, option in itertools.product((0, 3), ("skip", "raise")):
            options = {"nonfinite": option, "max_grad_norm": 1.0}
            yield (
                f"{name} / nan in row {row} / {option}",
                functools.partial(of, surefoot.AdamW, options, spoil=nan_in(row)),
            )
        wide = {"state_dtype": torch.float32, "max_grad_norm": 1.0}
        yield f"{name} / AdamW / bfloat16", functools.partial(of, surefoot.AdamW, wide, dtype=torch.bfloat16)
