"""Worlds of the fuzzer: some parameters and an optimizer of them, built from plain data so that they can have twins.

The world under test has an optimizer of surefoot; its twin has the optimizer of the same name in torch.optim, run by
its for-loop, or surefoot's eager engine where torch has no such option.  Both start with the same numbers in memory
that is laid out alike.  What may happen to a world between steps stands in `changes.py`.
"""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import surefoot

# Settings: few, so that their kernels come from the cache on disk


@dataclass(frozen=True)
class Setting:
    """An algorithm with options, and which parameters it gets.

    Attributes:
        algorithm: name of the class.
        options: what its constructor is given.
        dtype: the dtype of parameters.
        groups: into how many groups they are divided.
        shapes: which entries of SHAPES it takes; all, if empty.
        sparse: whether gradients are sparse.
        loose: whether results depend on the order of sums, so that they agree roughly only.
    """

    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    groups: int = 1
    shapes: tuple[int, ...] = ()
    sparse: bool = False
    loose: bool = False

    @property
    def is_ours_only(self) -> bool:
        """Whether torch has no such options, so that the eager engine must be the judge."""
        return self.algorithm == "Combined" or not self.options.keys().isdisjoint(OURS_ONLY)


OURS_ONLY = {"max_grad_norm", "max_grad_value", "nonfinite", "ema", "telemetry"}
SHAPES = (
    (3, 4),
    (7,),
    (5, 2),
    (),
    (2, 3, 2, 2),
    (1,),
    (0,),
    (1, 6),
    (4, 1),
    (2, 1, 3),
    (1, 2, 1, 2, 1, 3),
    (2, 0, 3),
    (33000,),
    (150, 230),
)
"""Shapes of parameters; the last ones are of several chunks, so that threads are needed."""
LARGE = 12
MATRICES, VECTORS, FILLED = (0, 2, 7, 8), (0, 1, 2, 5, 7, 8), (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
LAYOUTS = ("contiguous", "guarded", "neighbour", "transposed", "strided", "channels_last")
SETTINGS: dict[str, Setting] = {
    "sgd": Setting("SGD", {"lr": 0.1}),
    "sgd momentum": Setting("SGD", {"lr": 0.1, "momentum": 0.9}),
    "sgd groups": Setting("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}, groups=2),
    "sgd complex": Setting("SGD", {"lr": 0.1, "momentum": 0.9}, "complex64"),
    "sgd bfloat16": Setting("SGD", {"lr": 0.1, "momentum": 0.9}, "bfloat16"),
    "adam": Setting("Adam", {"lr": 0.01}),
    "adam groups": Setting("Adam", {"lr": 0.01}, groups=2),
    "adam amsgrad": Setting("Adam", {"lr": 0.01, "amsgrad": True}, "float64"),
    "adam complex": Setting("Adam", {"lr": 0.01}, "complex64"),
    "adamw bfloat16": Setting("AdamW", {"lr": 0.01}, "bfloat16"),
    "adamw float16": Setting("AdamW", {"lr": 0.01, "eps": 1e-4}, "float16", groups=2),
    "nadam": Setting("NAdam", {"lr": 0.01}),
    "radam": Setting("RAdam", {"lr": 0.01}),
    "adamax": Setting("Adamax", {"lr": 0.01}),
    "adadelta": Setting("Adadelta", {"lr": 0.5}),
    "adagrad": Setting("Adagrad", {"lr": 0.1}),
    "rmsprop": Setting("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5, "eps": 1e-3}),
    "rprop": Setting("Rprop", {"lr": 0.01}),
    "asgd": Setting("ASGD", {"lr": 0.1, "t0": 2}),
    "adafactor": Setting("Adafactor", {"lr": 0.1}, shapes=FILLED, loose=True),
    "muon": Setting("Muon", {"lr": 0.1}, shapes=MATRICES, loose=True),
    "sparse adam": Setting("SparseAdam", {"lr": 0.01}, shapes=VECTORS, sparse=True),
    "sparse sgd": Setting("SGD", {"lr": 0.1}, shapes=VECTORS, sparse=True),
    "sparse adagrad": Setting("Adagrad", {"lr": 0.1}, shapes=VECTORS, sparse=True),
    "lbfgs": Setting("LBFGS", {"lr": 0.5, "max_iter": 3, "history_size": 2}, loose=True),
    "clipped": Setting("Adam", {"lr": 0.01, "max_grad_norm": 0.5}, groups=2),
    "averaged": Setting("SGD", {"lr": 0.1, "ema": 0.9, "nonfinite": "skip"}),
    "measured": Setting("AdamW", {"lr": 0.01, "telemetry": True}),
    "combined": Setting("Combined", {"lr": 0.05}, loose=True),
    "combined clipped": Setting("Combined", {"lr": 0.05, "max_grad_norm": 0.5, "ema": 0.9}, loose=True),
    "clamped": Setting("SGD", {"lr": 0.1, "momentum": 0.9, "max_grad_value": 0.5}),
}
FEW = ("sgd", "sgd momentum", "adam", "sgd complex", "adam complex", "sgd bfloat16", "sparse sgd", "averaged", "rprop")
"""Settings that have kernels in common, for runs whose cache may be empty."""
ENGINES: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "eager": {"foreach": False}}
WITHOUT_ENGINES = ("SparseAdam", "LBFGS", "Muon")


class Kind(NamedTuple):
    """A parameter to be made: its shape and layout by number, and whether it has another dtype than the setting's."""

    shape: int
    layout: int
    other_dtype: bool = False


OTHER_DTYPE = {
    torch.float32: torch.float64,
    torch.float64: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex64,
}
"""To which dtype the dtypes of a setting are changed; only one, since each pair has a kernel of its own."""


# Numbers


def _bank() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 17, generator=generator, dtype=torch.float64)
    numbers[::17] = 0.0
    return numbers


torch.set_num_threads(1)  # a child that is forked has none of its parent's threads, and would wait for them
_BANK = _bank()


def values(shape: Iterable[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Return a new contiguous tensor of numbers that depend on the seed."""
    size = math.prod(shape := tuple(shape))
    start = seed * 7919 % ((1 << 17) - 2 * size)
    if dtype.is_complex:
        start -= start % 2
        return torch.view_as_complex(_BANK[start : start + 2 * size].view(*shape, 2)).to(dtype, copy=True)
    if not dtype.is_floating_point:
        return (_BANK[start : start + size] * 10).to(dtype).view(shape)
    return _BANK[start : start + size].to(dtype, copy=True).view(shape)


def laid_out(tensor: Tensor, layout: str, flat: Tensor | None = None, offset: int = 0) -> Tensor:
    """Return a copy of a tensor in a layout, as a view of a larger storage where the layout has gaps or guards.

    Args:
        tensor: what is copied.
        layout: one of LAYOUTS.
        flat: the storage that "neighbour" takes its memory from.
        offset: where in `flat`.
    """
    shape, size = tensor.shape, tensor.numel()
    if layout == "guarded":
        new = canaries(size + 16, tensor.dtype)[8 : 8 + size].view(shape)
    elif layout == "neighbour" and flat is not None:
        new = flat[offset : offset + size].view(shape)
    elif layout == "transposed" and tensor.dim() > 1:
        new = torch.empty(tuple(shape)[::-1], dtype=tensor.dtype).permute(*reversed(range(tensor.dim())))
    elif layout == "strided" and tensor.dim():
        new = canaries(2 * size + 9, tensor.dtype)[5 : 5 + 2 * size].view(*shape, 2)[..., 1]
    elif layout == "channels_last" and tensor.dim() == 4:
        new = torch.empty_like(tensor, memory_format=torch.channels_last)
    else:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return new.copy_(tensor.detach())


def canaries(size: int, dtype: torch.dtype) -> Tensor:
    """Return memory that holds the same odd byte everywhere."""
    return torch.full((size * dtype.itemsize,), 0x3A, dtype=torch.uint8).view(dtype)


# Worlds


class World:
    """Parameters and an optimizer, or two optimizers that step at the same time.

    Attributes:
        setting: what it was made from.
        who: "ours", "torch" or "eager".
        params: all parameters.
        names: their names.
        optimizer: the optimizer.
        second: another optimizer with parameters of its own, if there is one.
        extras: other tensors that a step must leave alone.
        partner: the twin, for changes that need it.
        pending: changes since the last repair after which a step may be refused for what cannot be seen in tensors.
        deferred: what a hook or a closure does in the coming step.
        hooked: the handle of that hook.
    """

    def __init__(self, setting: Setting, engine: str, kinds: Iterable[Kind], who: str, seed: int = 0) -> None:
        self.setting, self.engine, self.who, self.seed = setting, engine, who, seed
        self.dtype = getattr(torch, setting.dtype)
        self.params: list[nn.Parameter] = []
        self.extras: list[Any] = []
        self.partner: World | None = None
        self.pending: set[str] = set()
        self.deferred: Any = None
        self.kinds = list(kinds)
        self._make_params()
        self.names = [f"weight{index}" for index in range(len(self.params))]
        self.named = seed % 2 == 1 or setting.is_ours_only  # names that were not given are looked for everywhere
        self.optimizer = self.build(self.params, self.names)
        self.second: torch.optim.Optimizer | None = None
        self.fresh_groups = [options_of(group) for group in self.optimizer.param_groups]
        self.hook()

    def _make_params(self) -> None:
        dtypes = [OTHER_DTYPE[self.dtype] if kind.other_dtype else self.dtype for kind in self.kinds]
        made = [
            values(SHAPES[k.shape], d, self.seed + 31 * i)
            for i, (k, d) in enumerate(zip(self.kinds, dtypes, strict=True))
        ]
        neighbours = sum(tensor.numel() + 4 for tensor in made) + 8
        flat, offset = canaries(neighbours, self.dtype), 4
        for kind, tensor in zip(self.kinds, made, strict=True):
            layout = LAYOUTS[kind.layout] if tensor.dtype is self.dtype else "guarded"
            self.params.append(nn.Parameter(laid_out(tensor, layout, flat, offset)))
            offset += tensor.numel() + 3

    def build(self, params: list[Any], names: list[str]) -> torch.optim.Optimizer:
        """Return a new optimizer of some parameters."""
        setting = self.setting
        module = torch.optim if self.who == "torch" else surefoot
        engine = ENGINES[self.engine if self.who == "ours" else "eager"]
        options = {**setting.options, **({} if setting.algorithm in WITHOUT_ENGINES else engine)}
        items = list(zip(names, params, strict=True)) if self.named else list(params)
        if setting.algorithm == "Combined":
            return combined(items, engine, **setting.options)
        cut = len(items) if setting.groups == 1 or len(items) < 2 else len(items) // 2
        groups = [{"params": part} for part in (items[:cut], items[cut:]) if part]
        if len(groups) > 1 and setting.algorithm != "LBFGS":
            groups[1]["lr"] = setting.options["lr"] / 2
        return getattr(module, setting.algorithm)(groups, **deepcopy(options))

    def hook(self) -> None:
        """Let a hook run what is deferred."""
        self.hooked = self.optimizer.register_step_pre_hook(lambda *_: self.run_deferred("hook"))

    def run_deferred(self, where: str) -> None:
        """Run what is deferred to a place."""
        if self.deferred is not None and self.deferred[0] == where:
            (_, call), self.deferred = self.deferred, None
            call()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers."""
        return [self.optimizer] if self.second is None else [self.optimizer, self.second]

    def param(self, number: int) -> nn.Parameter:
        """Return the parameter of a number, counted round."""
        return self.params[number % len(self.params)]

    def state(self, number: int) -> dict[str, Any]:
        """Return the state of a parameter, an empty dict that counts for nothing if there is none."""
        found = self.optimizer.state.get(self.param(number))
        return found if isinstance(found, dict) else {}

    def slot(self, number: int, which: int) -> tuple[dict[str, Any], str | None]:
        """Return a parameter's state and the name of one of its tensors that are no scalars, if there is one."""
        state = self.state(number)
        names = sorted(
            name
            for name, value in state.items()
            if isinstance(value, Tensor) and value.layout is torch.strided and name not in SCALARS and name != "d"
        )
        return state, names[which % len(names)] if names else None

    def new_grad(self, param: Tensor, seed: int) -> Tensor:
        """Return a gradient as a backward pass would make it."""
        grad = values(param.shape, param.dtype, seed)
        if not self.setting.sparse or not param.dim():
            return grad
        rows = torch.tensor([0, max(0, len(param) - 1), 0][: 1 + seed % 3])
        if not param.numel():
            rows = rows[:0]
        return torch.sparse_coo_tensor(rows[None], grad[rows], param.shape, check_invariants=False)

    def repair(self, seed: int) -> None:
        """Return every parameter new memory and the optimizer no state, as if it had just been made."""
        params, self.params = self.params, []
        self._make_params()
        fresh, self.params = self.params, params
        for optimizer in self.optimizers:
            optimizer.state.clear()
        fresh += [nn.Parameter(values((3, 2), self.dtype, seed)) for _ in self.params[len(fresh) :]]
        for param, new in zip(self.params, fresh, strict=True):
            param.grad = None
            if param.is_meta:
                torch.utils.swap_tensors(param, new)
            else:
                param.data = new.data
        for group, options in zip(self.optimizer.param_groups, self.fresh_groups, strict=False):
            group.update(deepcopy(options))
        self.extras.clear()
        self.pending.clear()


def combined(items: list[Any], engine: Mapping[str, Any], lr: float, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer of matrices by Muon and of all else by AdamW, as far as there are such."""
    parts = [surefoot.Part(surefoot.Muon, is_matrix, lr=lr), surefoot.Part(surefoot.AdamW, lr=lr, **engine)]
    return surefoot.Combined(items, parts[not any(is_matrix(*item) for item in items) :], **options)


def is_matrix(name: str, param: Tensor) -> bool:
    return param.dim() == 2


SCALARS = {"step", "eta", "mu", "mu_product"}


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a group."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
