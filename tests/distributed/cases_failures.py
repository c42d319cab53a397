"""What becomes of a step that one rank cannot make, or that other wrappers divide over ranks."""

import functools

import torch
from sharding import distribute
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard

import surefoot

ASKED = {
    "norm": {"max_grad_norm": 1.0},
    "guard": {"nonfinite": "skip"},
    "telemetry": {"telemetry": True},
}


def made(mesh, **options):
    params = [nn.Parameter(distribute(torch.ones(4, 3) * i, mesh, [Shard(0)])) for i in range(1, 4)]
    return surefoot.AdamW([(f"p{i}", param) for i, param in enumerate(params)], lr=0.1, **options), params


def give_gradients(params, mesh, value=1.0):
    for param in params:
        param.grad = distribute(torch.full(param.shape, value), mesh, [Shard(0)])


def locals_of(params):
    return [param.to_local().detach().clone() for param in params]


def outcome(action, params):
    """Return how an action ends and whether parameters are as they were, and then step once more."""
    before, error = locals_of(params), None
    try:
        action()
    except (RuntimeError, ValueError, ZeroDivisionError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "unchanged": all(map(torch.equal, before, locals_of(params)))}


def refused_gradient(mesh, options, failing):
    """Return what becomes of a step in which one rank has a gradient on another device."""
    optimizer, params = made(mesh, **options)
    give_gradients(params, mesh)
    optimizer.step()
    give_gradients(params, mesh)
    if mesh.get_rank() == failing:
        optimizer.state[params[1]]["exp_avg"] = torch.zeros(2, 2)
    found = outcome(optimizer.step, params)
    del optimizer.state[params[1]]
    give_gradients(params, mesh)
    optimizer.step()
    return found | {"after": [param.full_tensor().isfinite().all().item() for param in params]}


def failing_closure(mesh, options, failing):
    """Return what becomes of a step whose closure raises on one rank."""
    optimizer, params = made(mesh, **options)
    give_gradients(params, mesh)

    def closure():
        return 1 / (mesh.get_rank() != failing)

    return outcome(lambda: optimizer.step(closure), params)


def missing_gradients(mesh):
    """Return the parameters' whole sums when one rank has no gradients at all."""
    optimizer, params = made(mesh, max_grad_norm=1.0, nonfinite="skip")
    give_gradients(params, mesh)
    if mesh.get_rank() == 1:
        for param in params:
            param.grad = None
    return outcome(optimizer.step, params) | {"steps": optimizer.step_statistics.steps}


def scaled(mesh, infinite_rank):
    """Return whether a step that a GradScaler undoes on one rank is skipped on all."""
    optimizer, params = made(mesh, max_grad_norm=1.0)
    give_gradients(params, mesh)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.found_inf = torch.tensor(float(mesh.get_rank() == infinite_rank))
    return outcome(optimizer.step, params) | {"skipped": optimizer.step_statistics.skipped}


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))


def trained(network, make, shard_of_batch, steps=4):
    optimizer = make(network)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        network(inputs[shard_of_batch]).square().mean().backward()
        optimizer.step()
    return optimizer


def options():
    return {"lr": 0.1, "max_grad_norm": 0.05, "nonfinite": "skip"}


def fully_sharded(rank, world):
    """Return the parameters after training with FSDP2 and as one process trains, which has the whole batch."""
    alone, sharded = model(), model()
    trained(alone, lambda network: surefoot.AdamW(network.parameters(), **options()), slice(None))
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    fully_shard(sharded)
    size = 8 // world
    trained(
        sharded,
        lambda network: surefoot.AdamW(network.named_parameters(), **options()),
        slice(rank * size, (rank + 1) * size),
    )
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in sharded.parameters()]
    return {"pairs": [(a.detach(), b.detach()) for a, b in zip(alone.parameters(), full, strict=True)]}


def zero_redundancy(rank, world):
    """Return the parameters after training with `ZeroRedundancyOptimizer` and as one process trains."""
    alone, divided = model(), nn.parallel.DistributedDataParallel(model())
    trained(alone, lambda network: surefoot.AdamW(network.parameters(), **options()), slice(None))
    size = 8 // world
    optimizer = trained(
        divided,
        lambda network: ZeroRedundancyOptimizer(network.parameters(), surefoot.AdamW, **options()),
        slice(rank * size, (rank + 1) * size),
    )
    found = optimizer.optim.step_options.process_group is not None
    pairs = zip(alone.parameters(), divided.parameters(), strict=True)
    return {"pairs": [(a.detach(), b.detach()) for a, b in pairs], "group": found}


def flattened(rank, world, *, told):
    """Return the parameters after training with FSDP1 and as one process trains; or how that is refused."""
    alone = model()
    trained(alone, lambda network: surefoot.AdamW(network.parameters(), **options()), slice(None))
    sharded = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    more = {"process_group": distributed.group.WORLD} if told else {}
    size = 8 // world
    trained(
        sharded,
        lambda network: surefoot.AdamW(network.parameters(), **options(), **more),
        slice(rank * size, (rank + 1) * size),
    )
    with FullyShardedDataParallel.summon_full_params(sharded):
        full = [param.detach().clone() for param in sharded.parameters()]
    return {"pairs": [(a.detach(), b) for a, b in zip(alone.parameters(), full, strict=True)]}


def flattened_whole(rank, world, cls):
    """Return how FSDP1's parameters are refused by an algorithm that needs them whole."""
    sharded = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = cls(sharded.parameters())
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(5 + rank))

    def closure():
        optimizer.zero_grad()
        loss = sharded(inputs[:: max(world, 1)]).square().mean()
        loss.backward()
        return loss

    before = [param.detach().clone() for param in sharded.parameters()]
    try:
        optimizer.step(closure)
    except RuntimeError as error:
        return {"error": str(error), "unchanged": all(map(torch.equal, before, sharded.parameters()))}
    return {"error": None}


def cases(world):
    mesh = init_device_mesh("cpu", (world,))
    rank = mesh.get_rank()
    for (name, asked), failing in ((pair, failing) for pair in ASKED.items() for failing in (0, world - 1)):
        yield f"refused / {name} / {failing}", functools.partial(refused_gradient, mesh, asked, failing)
        yield f"closure / {name} / {failing}", functools.partial(failing_closure, mesh, asked, failing)
    yield "missing gradients", functools.partial(missing_gradients, mesh)
    for infinite in range(world):
        yield f"scaled / {infinite}", functools.partial(scaled, mesh, infinite)
    yield "fully_shard", functools.partial(fully_sharded, rank, world)
    yield "ZeRO", functools.partial(zero_redundancy, rank, world)
    yield "FSDP1 / told", functools.partial(flattened, rank, world, told=True)
    yield "FSDP1 / not told", functools.partial(flattened, rank, world, told=False)
    for cls in (surefoot.Adafactor, surefoot.LBFGS):
        yield f"FSDP1 / {cls.__name__}", functools.partial(flattened_whole, rank, world, cls)
