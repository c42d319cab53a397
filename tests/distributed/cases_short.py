"""Short numbers of sharded parameters beside those of plain ones."""

import torch
from sharding import distribute, whole
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import surefoot

BF16 = torch.bfloat16
SHAPES = ((65, 128), (130, 256), (33, 100), (6000,), (3, 5))
OPTIONS = {
    "stochastic": (BF16, {"rounding": "stochastic"}),
    "bf16 + 8": (BF16, {"master_weight_bits": 24}),
    "bf16 + 16": (BF16, {"master_weight_bits": 32}),
    "float8": (torch.float32, {"state_dtype": "float8"}),
    "all": (BF16, {"state_dtype": "float8", "master_weight_bits": 24, "rounding": "stochastic"}),
}
LAYOUTS = {"rows": (Shard(0),), "copies": (Replicate(),), "columns": (Shard(1),)}


def tensor(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(dtype, mesh=None, placements=None, **options):
    params = []
    for number, shape in enumerate(SHAPES):
        value = tensor(shape, number, dtype)
        if placements is not None:
            value = distribute(value, mesh, placements if len(shape) > 1 else (Shard(0),))
        params.append((f"p{number}", torch.nn.Parameter(value)))
    return surefoot.AdamW(params, lr=1e-2, **options)


def train(optimizer, first=0, steps=3):
    params = optimizer.param_groups[0]["params"]
    for step in range(first, first + steps):
        for number, param in enumerate(params):
            grad = tensor(param.shape, 100 * step + number, param.dtype)
            is_sharded = isinstance(param, DTensor)
            param.grad = distribute(grad, param.device_mesh, param.placements) if is_sharded else grad
        optimizer.step()
    return optimizer


def held(optimizer):
    """Whole parameters and their state, as values: which slots are in 8 bits may depend on how a parameter is cut."""
    found = {}
    for number, param in enumerate(optimizer.param_groups[0]["params"]):
        found[f"param {number}"] = whole(surefoot.full_precision(optimizer, param))
        for slot in ("exp_avg", "exp_avg_sq"):
            found[f"{slot} {number}"] = whole(surefoot.full_precision(optimizer, param, slot))
    return found


def difference(one, other, names):
    return {
        name: (one[name] - other[name]).abs().max().item() for name in names if not torch.equal(one[name], other[name])
    }


def compared(sharded, plain):
    """Differences of what has the same format in both."""
    alike = []
    for number, (ours, theirs) in enumerate(
        zip(sharded.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True)
    ):
        if {k: v.dtype for k, v in sharded.state[ours].items()} == {k: v.dtype for k, v in plain.state[theirs].items()}:
            alike += [f"{name} {number}" for name in ("param", "exp_avg", "exp_avg_sq")]
    return {"different": difference(held(sharded), held(plain), alike), "alike": len(alike)}


def steps(mesh, placements, dtype, options):
    given = {"foreach": False} if placements == LAYOUTS["columns"] else {}
    sharded, plain = train(build(dtype, mesh, placements, **options, **given)), train(build(dtype, **options, **given))
    return compared(sharded, plain)


def loading(mesh, dtype, options):
    """A plain state dict into sharded parameters and back."""
    plain, sharded = train(build(dtype, **options)), build(dtype, mesh, LAYOUTS["rows"], **options)
    with torch.no_grad():
        for ours, theirs in zip(sharded.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            ours.copy_(distribute(theirs.detach(), mesh, ours.placements))
    sharded.load_state_dict(plain.state_dict())
    result = compared(sharded, plain)
    back = build(dtype, **options)
    back.load_state_dict(sharded.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(back.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            ours.copy_(theirs)
    return {"in": result, "back": compared(back, plain), "on": compared(train(sharded, 3), train(plain, 3))}


def files(mesh, dtype, options):
    """Through torch.distributed.checkpoint, and through `surefoot.save`."""
    source = train(build(dtype, mesh, LAYOUTS["rows"], **options))
    found = {}
    checkpoint.save(source.state_dict(), checkpoint_id="dcp")
    target = train(build(dtype, mesh, LAYOUTS["rows"], **options), first=7)
    state = target.state_dict()
    checkpoint.load(state, checkpoint_id="dcp")
    target.load_state_dict(state)
    with torch.no_grad():
        for ours, theirs in zip(target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
            ours.copy_(theirs)
    found["dcp"] = compared(target, source)
    surefoot.save("ours", optimizer=source)
    target = build(dtype, mesh, LAYOUTS["rows"], **options)
    surefoot.load("ours", optimizer=target)
    with torch.no_grad():
        for ours, theirs in zip(target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
            ours.copy_(theirs)
    found["surefoot"] = compared(target, source)
    return found


def cases(world):
    mesh = init_device_mesh("cpu", (world,))
    for name, (dtype, options) in OPTIONS.items():
        for layout, placements in LAYOUTS.items():
            yield f"{name} / {layout}", lambda p=placements, d=dtype, o=options: steps(mesh, p, d, o)
        yield f"{name} / loading", lambda d=dtype, o=options: loading(mesh, d, o)
    yield "all / files", lambda: files(mesh, *OPTIONS["all"])
