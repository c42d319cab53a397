"""Steps that need more of a tensor than a shard, beside those of one process: Adafactor, Muon, SOAP."""

import functools
from collections import Counter
from copy import deepcopy

import torch
from cases_step import COLUMNS, COPIES, OPTIONS, ROWS, compared, counted, layouts, nan_in, spread, tensor, train
from sharding import distribute, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import surefoot
from surefoot.distributed.matrices import exchange_pairwise, exchange_together
from surefoot.optimizers import soap

MATRICES = ((4, 6), (7, 3), (1, 5), (33, 40), (6, 4))
OF_HEADS = ((4, 6), (8, 3), (2, 5), (32, 40), (6, 4))
STACKS = ((4, 6, 3), (3, 6, 5), (6, 1), (6, 40), (2, 3, 6, 4))
NORMED = {"normuon": True, "cautious": True, "cautious_weight_decay": True}
ALGORITHMS = {
    "Adafactor": (surefoot.Adafactor, {"weight_decay": 0.01}, {}),
    "Muon": (surefoot.Muon, {"lr": 0.02}, {"shapes": MATRICES}),
    "Muon of heads": (surefoot.Muon, {"lr": 0.02, "num_heads": 2, **NORMED}, {"shapes": OF_HEADS}),
    "Muon of stacks": (
        surefoot.Muon,
        {"lr": 0.02, "flatten": False, "split_sizes": (2, 4), "ns_dtype": torch.float32, **NORMED},
        {"shapes": STACKS},
    ),
    # Bases of gradients of full rank, which do not hang on the last bits of what was clipped.
    "SOAP": (surefoot.SOAP, {"precondition_frequency": 2, "max_precond_dim": 4}, {}),
}
ASKED = ("norm", "ema", "telemetry")
"""What is asked for in turn: an option for each layout and algorithm."""


def reloaded(cls, options, mesh, placements, **more):
    """Return whether a training whose state went through a state dict goes on as one whose state did not."""
    kept, loaded = (train(cls, options, mesh, placements, reload=step, **more) for step in (None, 2))
    pairs = zip(kept["params"], loaded["params"], strict=True)
    return {"same": all(torch.equal(*pair) for pair in pairs), "state": str(kept["state"]) == str(loaded["state"])}


def collectives(cls, options, mesh, count):
    """Return how many collectives a step of `count` matrices makes."""
    params = [torch.nn.Parameter(distribute(tensor((6, 4), i), mesh, ROWS)) for i in range(count)]
    optimizer = cls(params, **options)
    for step in range(2):
        calls = Counter()
        for i, param in enumerate(params):
            param.grad = distribute(tensor((6, 4), 100 * step + i), mesh, ROWS)
        with counted(calls):
            optimizer.step()
    return {"calls": dict(calls)}


def refused(cls, options, mesh, case, failing):
    """Return how a step ends that one rank cannot make, whether it has changed something, and how the next one does."""
    params = [torch.nn.Parameter(distribute(tensor((6, 4), i), mesh, ROWS)) for i in range(3)]
    optimizer = cls([(f"p{i}", param) for i, param in enumerate(params)], **options)

    def give_gradients(seed):
        for i, param in enumerate(params):
            param.grad = distribute(tensor((6, 4), seed + i), mesh, ROWS)

    def closure():
        return 1 / (case != "closure" or mesh.get_rank() != failing)

    give_gradients(10)
    optimizer.step()
    give_gradients(20)
    fails, slot = mesh.get_rank() == failing, next(k for k, v in optimizer.state[params[1]].items() if v.dim())
    kept = optimizer.state[params[1]][slot]
    if fails and case == "state":
        optimizer.state[params[1]][slot] = torch.zeros(2, 2)
    if fails and case == "gradient":
        params[1].grad = None
    before, error = [param.to_local().detach().clone() for param in params], None
    try:
        optimizer.step(closure)
    except (RuntimeError, ZeroDivisionError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    unchanged = all(torch.equal(a, b.to_local()) for a, b in zip(before, params, strict=True))
    optimizer.state[params[1]][slot] = kept
    give_gradients(30)
    optimizer.step()
    return {"error": error, "unchanged": unchanged, "after": all(p.full_tensor().isfinite().all() for p in params)}


def irregular(cls, options, mesh):
    """Return how a step ends of a parameter whose shards are not what its placements say."""
    rows = 1 if mesh.get_rank() == 0 else 3
    shape = (3 * mesh.size() - 2, 4)

    def made(value):
        local = torch.full((rows, 4), value)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(4, 1))

    param = torch.nn.Parameter(made(1.0))
    param.grad = made(0.5)
    try:
        cls([("p", param)], **options).step()
    except RuntimeError as error:
        return {"refused": str(error)}
    return {}


def layout_of_state(mesh):
    """Return the placements of Adafactor's state of a matrix in each layout, and how another layout is refused."""
    found = {}
    for name, placements in (("rows", ROWS), ("columns", COLUMNS)):
        param = torch.nn.Parameter(spread(tensor((7, 6), 0), mesh, placements))
        param.grad = spread(tensor((7, 6), 1), mesh, placements)
        optimizer = surefoot.Adafactor([("weight", param)])
        optimizer.step()
        state = optimizer.state[param]
        found[name] = {key: str(state[key].placements) for key in ("row_var", "col_var")}
        state["row_var"], other = spread(tensor((7, 1), 2).abs(), mesh, COLUMNS if name == "rows" else ROWS), None
        try:
            optimizer.step()
        except RuntimeError as error:
            other = str(error)
        found[name]["refused"] = other
    return found


SOAP_OPTIONS = {
    "short bases": {"merge_dims": True, "max_precond_dim": 8, "normalize_grads": True},
    "vectors": {"precondition_1d": True, "precondition_frequency": 1},
    "in rounds": {"precondition_frequency": 2},
}


def soap_with(options, mesh, placements, name):
    """Compare SOAP with options that change what is made whole, in rounds of one parameter for each rank or less."""
    most = soap._MOST_EXCHANGED
    soap._MOST_EXCHANGED = 1 if name == "in rounds" else most
    try:
        return compared(surefoot.SOAP, options, mesh, placements, shapes=((4, 6), (5, 5), (1, 5), (8,), (3, 2, 4)))
    finally:
        soap._MOST_EXCHANGED = most


def soap_relaid(mesh):
    """Return the placements of SOAP's state by rows, and whether training goes on with the same bits in other layouts.

    State comes to one as sharded tensors, to one as plain ones, and from a checkpoint.
    """
    grads = [tensor((4, 6), 10 + step) for step in range(6)]

    def begun(placements):
        param = torch.nn.Parameter(spread(tensor((4, 6), 0), mesh, placements))
        return param, surefoot.SOAP([("weight", param)], precondition_frequency=2)

    def go_on(param, optimizer, steps, placements):
        for grad in steps:
            param.grad = spread(grad, mesh, placements)
            optimizer.step()
        return whole(param)

    param, optimizer = begun(ROWS)
    go_on(param, optimizer, grads[:3], ROWS)
    now, saved = whole(param), deepcopy(optimizer.state_dict())
    surefoot.save("soap", optimizer=optimizer)
    found = {"placements": {n: str(v.placements) for n, v in optimizer.state[param].items() if v.dim()}}
    plain = saved | {"state": {0: {name: whole(value) for name, value in saved["state"][0].items()}}}
    expected = go_on(param, optimizer, grads[3:], ROWS)
    for name, state, placements in (("sharded", saved, COLUMNS), ("plain", plain, COLUMNS), ("file", None, COPIES)):
        param, optimizer = begun(placements)
        param.data.copy_(spread(now, mesh, placements))
        if state is None:
            surefoot.load("soap", optimizer=optimizer)
        else:
            optimizer.load_state_dict(state)
        found[name] = torch.equal(go_on(param, optimizer, grads[3:], placements), expected)
    return found


def transports(mesh):
    """Return whether both ways to send each rank something give the same."""
    rank, world = mesh.get_rank(), mesh.size()
    sent = [torch.arange(3.0 * rank + i).bfloat16() + 10 * rank for i in range(world)]
    sizes = [3 * source + rank for source in range(world)]
    together = exchange_together(sent, sizes, mesh.get_group())
    pairwise = exchange_pairwise(sent, sizes, list(range(world)), rank)
    expected = [torch.arange(3.0 * source + rank).bfloat16() + 10 * source for source in range(world)]
    return {
        "together": all(map(torch.equal, together, expected)),
        "pairwise": all(map(torch.equal, pairwise, expected)),
    }


def cases(world):
    line = init_device_mesh("cpu", (world,))
    for number, (algorithm, (cls, own, more)) in enumerate(ALGORITHMS.items()):
        for turn, (name, mesh, placements) in enumerate(layouts(world), start=number):
            of = functools.partial(compared, cls, mesh=mesh, placements=placements, **more)
            for option in ("nothing", "all", ASKED[turn % len(ASKED)]):
                yield f"{name} / {algorithm} / {option}", functools.partial(of, own | OPTIONS[option])
            row, dtype = ((0, torch.bfloat16), (3, torch.float64))[turn % 2]
            spoiled = own | {"nonfinite": "skip"}
            yield f"{name} / {algorithm} / nan in row {row}", functools.partial(of, spoiled, spoil=nan_in(row))
            yield f"{name} / {algorithm} / {str(dtype)[6:]}", functools.partial(of, own, dtype=dtype)
            if turn % 2:
                yield (
                    f"reloaded / {algorithm} / {name}",
                    functools.partial(reloaded, cls, own, mesh, placements, **more),
                )
        for count in (2, 9):
            yield f"collectives / {algorithm} / {count}", functools.partial(collectives, cls, own, line, count)
        for case in ("state", "gradient", "closure"):
            for failing in (0, world - 1):
                yield (
                    f"refused / {algorithm} / {case} / {failing}",
                    functools.partial(refused, cls, own, line, case, failing),
                )
        unsplit = {name: None if name == "split_sizes" else value for name, value in own.items()}
        yield f"irregular / {algorithm}", functools.partial(irregular, cls, unsplit, line)
    for name, mesh, placements in layouts(world):
        for kind, options in SOAP_OPTIONS.items():
            yield f"soap / {name} / {kind}", functools.partial(soap_with, options, mesh, placements, kind)
    yield "soap relaid", functools.partial(soap_relaid, line)
    yield "state", functools.partial(layout_of_state, line)
    yield "transports", functools.partial(transports, line)
