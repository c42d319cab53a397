"""What tests of the contract share: every algorithm, its twin in torch, training that repeats, and exact comparison."""

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from types import ModuleType
from typing import Any

import torch
from torch import nn

import surefoot
from surefoot import optimizers
from surefoot.telemetry import Telemetry

ALGORITHMS = [getattr(optimizers, name) for name in optimizers.__all__ if name not in optimizers.NOT_IN_TORCH]
EAGER = {"foreach": False}
"""Options of the eager engine, which gives torch's bits and needs no compiler."""
ENGINES = {"eager": EAGER, "default": {}}
OURS_ONLY = {"fused", "capturable", "state_dtype", "rounding", "rounding_seed", "master_weight_bits"}
"""Options that surefoot has for every rule, torch for some."""


class Noted(Telemetry):
    """Keeps what steps hand over."""

    def __init__(self, **options):
        super().__init__(**options)
        self.raw = []

    def record(self, raw):
        self.raw.append(raw)
        super().record(raw)


def twin(cls):
    """Return torch's class of the same name."""
    return getattr(torch.optim, cls.__name__)


def torchs_database() -> ModuleType:
    """Return torch's module that has its database of optimizers.

    It imports one name by way of the database of all of torch's functions, which takes seconds and is left out.
    """
    core = importlib.import_module("torch.testing._internal.opinfo.core")
    functions = "torch.testing._internal.common_methods_invocations"
    left_out = sys.modules.setdefault(functions, core) is core
    try:
        return importlib.import_module("torch.testing._internal.common_optimizers")
    finally:
        if left_out:
            del sys.modules[functions]


def name_of(value: Any) -> str:
    """Name a parametrized value in a test's identifier."""
    return getattr(value, "__name__", str(value))


def make_params(
    shapes: Iterable[tuple[int, ...]] = ((3, 4), (5, 2)), dtype: torch.dtype = torch.float32, seed: int = 0
):
    """Make parameters; matrices by default, since every algorithm takes those."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Name parameters `p0`, `p1`, ..."""
    return [(f"p{index}", param) for index, param in enumerate(params)]


def make(cls, params: Any = None, **options: Any):
    """Make an optimizer on the eager engine, if it can choose."""
    eager = EAGER if "foreach" in accepted(cls) else {}
    return cls(make_params() if params is None else params, **(eager | options))


def pair(cls, groups: Any = None, **options: Any):
    """Make an optimizer of surefoot and its twin over equal parameters; `groups(params)` makes their groups."""
    return tuple(make(kind, (groups or list)(make_params()), **deepcopy(options)) for kind in (cls, twin(cls)))


def accepted(cls) -> set[str]:
    """Names of the arguments of a constructor."""
    return set(inspect.signature(cls).parameters)


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimizer, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Return every parameter a gradient that depends on the seed and its position only; sparse for SparseAdam."""
    generator = torch.Generator().manual_seed(seed)
    for param in params_of(optimizer):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = (
            grad.to_sparse(1) if isinstance(optimizer, torch.optim.SparseAdam | optimizers.SparseAdam) else grad
        )


def train(optimizer: torch.optim.Optimizer, first: int = 0, steps: int = 3) -> torch.optim.Optimizer:
    """Step with the gradients of seeds `first`, `first + 1`, ...; with a closure, which LBFGS needs."""
    for seed in range(first, first + steps):

        def closure(seed: int = seed) -> torch.Tensor:
            set_grads(optimizer, seed)
            return torch.tensor(1.0)

        optimizer.step(closure)
    return optimizer


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy everything that a user can see of an optimizer and its parameters."""
    numbers = {param: number for number, param in enumerate(params_of(optimizer))}
    return deepcopy(
        {
            "values": [param.detach() for param in numbers],
            "state": {numbers.get(key, key): value for key, value in optimizer.state.items() if value != {}},
            "groups": [
                {**group, "params": [numbers[param] for param in group["params"]]} for group in optimizer.param_groups
            ],
            "defaults": optimizer.defaults,
        }
    )


def train_whole(model: nn.Module, optimizer: torch.optim.Optimizer, *, compiled: bool) -> dict[str, Any]:
    """Train on rows of four ones, three iterations that may be compiled each as a whole; return the snapshot."""

    def iterate() -> None:
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch._dynamo.reset()
    iterate = torch.compile(iterate, backend="eager") if compiled else iterate
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(3):
            iterate()
    return snapshot(optimizer)


def difference(left: Any, right: Any, path: str = "") -> str | None:
    """Say where two nested values first differ, bit by bit; None if they do not."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and left.layout == right.layout
        same = same and torch.equal(*(torch.nan_to_num(t.detach().to_dense(), nan=1e30) for t in (left, right)))
    elif type(left) is not type(right):
        same = False
    elif isinstance(left, Mapping):
        if left.keys() != right.keys():
            return f"{path}: keys {sorted(map(str, left))} and {sorted(map(str, right))}"
        found = [difference(left[key], right[key], f"{path}[{key!r}]") for key in left]
        return next(filter(None, found), None)
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"{path}: lengths {len(left)} and {len(right)}"
        found = [difference(*items, f"{path}[{index}]") for index, items in enumerate(zip(left, right, strict=True))]
        return next(filter(None, found), None)
    else:
        same = left == right or left is right
    return None if same else f"{path}: {left!r} and {right!r}"


def assert_same(left: Any, right: Any) -> None:
    """Assert that two nested values are equal bit by bit."""
    assert difference(left, right) is None, difference(left, right)


def assert_as_torch(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Assert that an optimizer is where its twin is: parameters, state, and the options that torch has.

    SparseAdam cannot choose the eager engine and is equal to rounding, as Adafactor is, which sums in another order.
    """
    ours_, theirs_ = snapshot(ours), snapshot(theirs)
    for group, model in zip(ours_["groups"], theirs_["groups"], strict=True):
        assert set(group) - set(model) <= OURS_ONLY | getattr(surefoot, type(ours).__name__).spec.later_options
        assert_same({name: group.get(name) for name in model}, model)
    if type(ours).__name__ in ("SparseAdam", "Adafactor"):
        for part in ("values", "state"):
            torch.testing.assert_close(ours_[part], theirs_[part])
    else:
        assert_same(ours_["values"], theirs_["values"])
        assert_same(ours_["state"], theirs_["state"])


CHUNK = 16384
"""Elements of one tensor that a CPU kernel works on at a time."""
SIZES = (1, 1000, CHUNK - 1, CHUNK, 3 * CHUNK + 5)


def make_sized(cls=surefoot.AdamW, sizes=SIZES, dtype=torch.float32, **options: Any):
    """Return an optimizer of vectors of some sizes, and these."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    return cls(params, **options), params


def train_sized(optimizer, params, steps=3):
    """Make steps with random gradients, and return copies of the parameters."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [param.detach().clone() for param in params]
