"""Sharded parameters: state and gradients that are plain, or laid out over ranks unlike their parameter.

This process is rank 0 of two whose communication is faked, so that shards are truly smaller than their tensors.  The
algorithms work element by element: what is right is what torch's for-loop makes of the shards as plain tensors.
"""

import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from judge import tensor_difference
from memory import Snapshot, everything, lacks_memory, local, overlaps_itself, tensors_in
from torch import Tensor, nn
from worlds import laid_out, values

import surefoot

Failing = Callable[[str, str], Exception]
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam": ("Adam", {"lr": 0.01}),
    "rprop": ("Rprop", {"lr": 0.01}),
    "adagrad": ("Adagrad", {"lr": 0.1}),
}
SHAPES = ((4, 4), (6,), (3, 4), (1, 4), (5, 2), (2, 2, 3))
PLACEMENTS = ("shard 0", "shard 1", "replicate", "plain")
RANKS = 2


class Move(NamedTuple):
    """What happens before a step: a name in MOVES, to which parameter, and two choices."""

    name: str
    param: int = 0
    slot: int = 0
    choice: int = 0


@dataclass(frozen=True)
class ShardedCase:
    """Sharded and plain parameters, each with its shape and its placement by number, and what happens to them."""

    rule: str
    engine: str
    params: tuple[tuple[int, int], ...]
    rounds: tuple[tuple[Move, ...], ...]
    seed: int = 0


def mesh() -> Any:
    """Return the mesh of two ranks, of which this process is the first."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 (slow to import)
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    if not torch.distributed.is_initialized():
        os.environ.setdefault("RANK", "0")
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    return init_device_mesh("cpu", (RANKS,))


def shard(shape: tuple[int, ...], placement: str) -> tuple[int, ...]:
    """Return the shape of rank 0's shard."""
    dimension = {"shard 0": 0, "shard 1": 1}.get(placement)
    if dimension is None:
        return tuple(shape)
    return (*shape[:dimension], -(-shape[dimension] // RANKS), *shape[dimension + 1 :])


def sharded(own: Tensor, shape: tuple[int, ...], placement: str) -> Tensor:
    """Return a tensor of a shape of which this process has `own`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: PLC0415

    if placement == "plain":
        return own
    kind = {"shard 0": Shard(0), "shard 1": Shard(1), "replicate": Replicate()}[placement]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh(), [kind], run_check=False, shape=torch.Size(shape), stride=stride)


class _World:
    def __init__(self, case: ShardedCase, *, ours: bool) -> None:
        self.ours = ours
        algorithm, options = RULES[case.rule]
        engine = {"default": {}, "foreach": {"foreach": True}, "eager": {"foreach": False}}[
            case.engine if ours else "eager"
        ]
        self.shapes, self.placements = [], []
        self.params: list[nn.Parameter] = []
        for index, (number, place) in enumerate(case.params):
            shape, placement = SHAPES[number], PLACEMENTS[place]
            placement = "shard 0" if placement == "shard 1" and len(shape) < 2 else placement
            self.shapes.append(shape)
            self.placements.append(placement)
            own = values(shard(shape, placement), torch.float32, case.seed + 17 * index)
            own = laid_out(own, "guarded")
            self.params.append(nn.Parameter(sharded(own, shape, placement) if ours else own))
        module = surefoot if ours else torch.optim
        self.optimizer = getattr(module, algorithm)(self.params, **options, **engine)
        self.extras: list[Any] = []
        self.setting = SimpleNamespace(algorithm=algorithm)

    @property
    def optimizers(self) -> list[Any]:
        return [self.optimizer]

    def give(self, seed: int) -> None:
        for index, param in enumerate(self.params):
            param.grad = None
            own = values(local(param).shape, torch.float32, seed + index)
            shape, placement = self.shapes[index], self.placements[index]
            param.grad = sharded(own, shape, placement) if self.ours else own

    def slot(self, param: int, which: int) -> tuple[dict[str, Any], str | None]:
        state = self.optimizer.state.get(self.params[param % len(self.params)], {})
        names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and name != "step")
        return state, names[which % len(names)] if names else None


def draw_sharded(pick: Callable[[int], int], engines: tuple[str, ...]) -> ShardedCase:
    """Return a case made of numbers that `pick` gives."""
    rule = tuple(RULES)[pick(len(RULES))]
    engine = engines[pick(len(engines))]
    params = tuple((pick(len(SHAPES)), pick(len(PLACEMENTS))) for _ in range(1 + pick(3)))
    names = tuple(MOVES)
    rounds = tuple(
        tuple(Move(names[pick(len(names))], pick(4), pick(3), pick(24)) for _ in range((0, 0, 1, 1, 2)[pick(5)]))
        for _ in range(2 + pick(3))
    )
    return ShardedCase(rule, engine, params, rounds, pick(1000))


MOVES: dict[str, Callable[..., Any]] = {}


def move(function: Callable[..., Any]) -> Callable[..., Any]:
    MOVES[function.__name__.replace("_", " ")] = function
    return function


def _variants(world: _World, index: int, choice: int) -> Tensor:
    """Return a tensor that takes the place of something of a parameter, laid out in one of many ways."""
    shape = world.shapes[index]
    placement = PLACEMENTS[choice % 4]
    placement = "shard 0" if placement == "shard 1" and len(shape) < 2 else placement
    own = shard(shape, placement)
    if choice // 4 % 6 == 4:
        own = (own[0] + 1, *own[1:])
    if choice // 4 % 6 == 5:
        own = (max(0, own[0] - 1), *own[1:])
    return sharded(values(own, torch.float32, choice).abs(), shape, placement)


@move
def state_laid_out_otherwise(world, index, slot, choice):
    state, name = world.slot(index, slot)
    if name is not None:
        state[name] = _variants(world, index % len(world.params), choice)


@move
def state_plain_of_shard(world, index, slot, choice):
    state, name = world.slot(index, slot)
    if name is not None:
        state[name] = local(state[name]).clone()


@move
def gradient_laid_out_otherwise(world, index, slot, choice):
    param = world.params[index % len(world.params)]
    new = _variants(world, index % len(world.params), choice)
    try:
        param.grad = new
    except (RuntimeError, TypeError):
        param.grad = None
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))
        param._grad = new


@move
def parameter_laid_out_otherwise(world, index, slot, choice):
    position = index % len(world.params)
    param, grad = world.params[position], world.params[position].grad
    param.grad = None
    torch.utils.swap_tensors(param, nn.Parameter(_variants(world, position, choice)))
    if slot % 2:
        try:
            param.grad = grad
        except (RuntimeError, TypeError):
            own = local(param)
            param.grad = torch.zeros_like(param) + 1 if own is param else torch.ones_like(param)


@move
def state_of_one_shard_resized(world, index, slot, choice):
    state, name = world.slot(index, slot)
    if name is not None and local(state[name]).numel():
        storage = local(state[name]).untyped_storage()
        storage.resize_(storage.nbytes() // 2 if choice % 2 else 0)


@move
def state_dict_loaded(world, index, slot, choice):
    world.optimizer.load_state_dict(deepcopy(world.optimizer.state_dict()))


@move
def state_dict_of_plain_loaded(world, index, slot, choice):
    """Load what an optimizer of whole parameters on one process has saved."""
    found = world.optimizer.state_dict()
    found = {"param_groups": found["param_groups"], "state": {k: dict(v) for k, v in found["state"].items()}}
    for number, state in found["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                state[name] = values(world.shapes[number], torch.float32, choice).abs()
    world.optimizer.load_state_dict(found)


def _placement(tensor: Tensor) -> Any:
    return str(tensor.placements) if hasattr(tensor, "_local_tensor") else "plain"


def _misfits(world: _World) -> list[str]:
    found = []
    for param in world.params:
        if param.grad is None:
            continue
        held = [("grad", param.grad)]
        state = world.optimizer.state.get(param, {})
        held += [(name, value) for name, value in state.items() if isinstance(value, Tensor) and name != "step"]
        for name, tensor in held:
            if _placement(tensor) != _placement(param):
                found.append(f"{name}: {_placement(tensor)} for {_placement(param)}")
            elif local(tensor).shape != local(param).shape:
                found.append(f"{name}: shard {tuple(local(tensor).shape)} for {tuple(local(param).shape)}")
            elif lacks_memory(tensor):
                found.append(f"{name}: no memory")
    return found


def run_sharded(case: ShardedCase, failure: Failing, attempt: Callable[..., Any]) -> Counter[str]:
    """Run a case; return how its steps ended.

    Raises:
        Failure: a fault.
    """
    ended: Counter[str] = Counter()
    ours, twin = _World(case, ours=True), _World(case, ours=False)
    for number, moves in enumerate(case.rounds):
        for world in (ours, twin):
            world.give(case.seed + 13 * number)
        for each in moves:
            if any(lacks_memory(tensor) for _, tensor in everything(ours)):
                break  # most moves would read what is not there
            _move(ours, each, failure, attempt)
        how = _step(ours, twin, failure, attempt)
        ended[how] += 1
        if how != "stepped":
            break
    return ended


def _move(ours: _World, each: Move, failure: Failing, attempt: Callable[..., Any]) -> None:
    """Let a move happen; loading may refuse, and then changes nothing."""
    before = Snapshot(ours)
    error = attempt(lambda: MOVES[each.name](ours, each.param, each.slot, each.choice))
    if error is not None and "loaded" in each.name:
        if not isinstance(error, ValueError | RuntimeError | TypeError):
            raise failure("raw error", f"{each.name}: {error!r} from {error.origin}")
        if found := before.difference(ours):
            raise failure("changed by a refused load", found)


def _step(ours: _World, twin: _World, failure: Failing, attempt: Callable[..., Any]) -> str:
    """Step both and compare; tell how it ended."""
    misfits, before = _misfits(ours), Snapshot(ours)
    _follow(ours, twin)
    error = attempt(ours.optimizer.step)
    if error is not None:
        _check_refusal(error, failure)
        if found := before.difference(ours):
            raise failure("changed by a refusal", f"{found}; {error!r} from {error.origin}")
        if not misfits:
            raise failure("refused what fits", f"{error!r} from {error.origin}")
        return "refused"
    if any(not text.startswith("grad: (") for text in misfits):
        raise failure("stepped what must be refused", ", ".join(misfits))
    if misfits:
        return "gradient redistributed"
    written = [local(param) for param in ours.params]
    written += [t for state in ours.optimizer.state.values() for _, t in tensors_in(state, "")]
    if found := before.outside(ours, written):
        raise failure("wrote outside", found)
    if (theirs := attempt(twin.optimizer.step)) is not None:
        raise failure("the fuzzer failed", repr(theirs))
    for index, (left, right) in enumerate(zip(ours.params, twin.params, strict=True)):
        if found := tensor_difference(f"param {index}", local(left), right, torch.float32):
            raise failure("differs from torch", found)
    return "stepped"


def _check_refusal(error: Any, failure: Failing) -> None:
    if not isinstance(error, RuntimeError | ValueError | TypeError) or not str(error):
        raise failure("raw error", f"{error!r} from {error.origin}")
    if "params[" not in str(error):
        raise failure("nameless refusal", f"{error!r} from {error.origin}")


def _follow(ours: _World, twin: _World) -> None:
    """Return the twin the shards of our parameters, gradients and state, as plain tensors of its own."""
    twin.optimizer.state.clear()
    for param, other in zip(ours.params, twin.params, strict=True):
        own = local(param).detach()
        if lacks_memory(own) or overlaps_itself(own):
            continue
        other.data = own.clone()
        other.grad = None
        grad = local(param.grad).detach() if param.grad is not None else None
        if grad is not None and grad.shape == other.shape:
            other.grad = grad.clone()
        for name, value in ours.optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and not lacks_memory(value):
                twin.optimizer.state[other][name] = local(value).detach().clone()
