"""Averages of tensors, which reach the kernels without an optimizer: functions of `swa_utils` on lists, and models.

A case is drawn, and plain data, as in `fuzz.py`; the twin is `torch.optim.swa_utils`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from changes import Plain, other_dtype, resize
from judge import synchronize_tensor, tensor_difference
from memory import Snapshot, lacks_memory, overlapping, overlaps_itself
from torch import Tensor, nn
from worlds import LAYOUTS, SHAPES, laid_out, values

from surefoot import swa_utils

Failing = Callable[[str, str], Exception]
DTYPES = ("float32", "float32", "float64", "bfloat16", "complex64", "int64")


class Pair(NamedTuple):
    """An average and the present value."""

    average: Tensor
    value: Tensor


class Move(NamedTuple):
    """What happens to a tensor before an update: a name in MOVES, which pair, whether to its average, and a choice."""

    name: str
    pair: int = 0
    average: bool = False
    choice: int = 0


@dataclass(frozen=True)
class AverageCase:
    """Averages to be made.

    Attributes:
        how: "lists", or "model" for `AveragedModel`.
        tensors: for each pair its shape, dtype and layouts by number.
        updates: what happens before each update.
    """

    how: str
    tensors: tuple[tuple[int, int, int, int], ...]
    updates: tuple[tuple[Move, ...], ...]
    seed: int = 0


MOVES: dict[str, Callable[[list[Pair], int, bool, int], Any]] = {}


def move(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a function into the table, under its name.

    It is given a tensor and a choice and returns what shall stand in its place; other memory of it may change.
    """
    MOVES[function.__name__.replace("_", " ")] = function
    return function


@move
def in_another_layout(tensor, choice):
    return laid_out(tensor, LAYOUTS[choice % len(LAYOUTS)])


@move
def of_another_dtype(tensor, choice):
    return tensor.to(other_dtype(tensor))


@move
def complex_or_real(tensor, choice):
    return tensor.real.clone() if tensor.is_complex() else tensor.to(torch.complex64)


@move
def of_integers(tensor, choice):
    return tensor.real.to([torch.int64, torch.int8, torch.bool][choice % 3])


@move
def of_another_shape(tensor, choice):
    own = tensor.shape
    shapes = ((*own, 2), own[1:], (1,) * len(own), (own.numel(),), (2, *own))
    return values(shapes[choice % 5], tensor.dtype, choice)


@move
def expanded(tensor, choice):
    if not tensor.dim() or not tensor.numel():
        return tensor
    return tensor.select(choice % tensor.dim(), 0).unsqueeze(choice % tensor.dim()).expand(tensor.shape)


@move
def storage_resized(tensor, choice):
    resize(tensor, choice, choice)
    return tensor


@move
def negated_lazily(tensor, choice):
    return tensor.conj() if tensor.is_complex() else torch._neg_view(tensor)


@move
def without_memory(tensor, choice):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


@move
def on_meta(tensor, choice):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@move
def sparse(tensor, choice):
    return tensor.to_sparse() if tensor.dim() else tensor


@move
def of_subclass(tensor, choice):
    return tensor.as_subclass(Plain)


@move
def shared(tensor, choice):
    return "shared"


@move
def itself(tensor, choice):
    return "itself"


def draw_averages(pick: Callable[[int], int]) -> AverageCase:
    """Return a case made of numbers that `pick` gives."""
    how = ("lists", "model")[pick(2)]
    tensors = tuple(
        (SHAPES.index((33000,)) if pick(40) == 39 else pick(12), pick(len(DTYPES) - (how == "model")), pick(6), pick(6))
        for _ in range(1 + pick(4))
    )
    names = tuple(MOVES)
    updates = tuple(
        tuple(
            Move(names[pick(len(names))], pick(4), bool(pick(2)), pick(30)) for _ in range((0, 0, 0, 1, 1, 2)[pick(6)])
        )
        for _ in range(1 + pick(4))
    )
    return AverageCase(how, tensors, updates, pick(1000))


class _Side:
    """Lists of averages and values, or a model and its average, of one library."""

    def __init__(self, case: AverageCase, library: Any) -> None:
        self.how = case.how
        made = [
            [values(SHAPES[shape], getattr(torch, DTYPES[dtype]), case.seed + 3 * i + j) for j in range(2)]
            for i, (shape, dtype, *_) in enumerate(case.tensors)
        ]
        laid = [
            [laid_out(t, LAYOUTS[layout]) for t, layout in zip(pair, layouts, strict=True)]
            for pair, (_, _, *layouts) in zip(made, case.tensors, strict=True)
        ]
        self.update = library.get_ema_multi_avg_fn(0.75)
        if self.how == "model":
            self.model = nn.ParameterList([nn.Parameter(pair[1]) for pair in laid])
            self.averaged = library.AveragedModel(self.model, multi_avg_fn=self.update)
            self.averaged.update_parameters(self.model)
        else:
            self.lists = [pair[0] for pair in laid], [pair[1] for pair in laid]
        self.extras = [value for _, value in self.pairs()]
        self.optimizers: list[Any] = []
        self.setting = SimpleNamespace(algorithm="averages")

    @property
    def params(self) -> list[Tensor]:
        """The averages, where `Snapshot` looks for what is to be written."""
        return [average for average, _ in self.pairs()]

    def pairs(self) -> list[Pair]:
        """Return averages and values of now."""
        if self.how == "model":
            lists: Any = self.averaged.module.parameters(), self.model.parameters()
        else:
            lists = self.lists
        return [Pair(*pair) for pair in zip(*lists, strict=True)]

    def change(self, each: Move) -> None:
        """Let a move happen."""
        pairs = self.pairs()
        index = each.pair % len(pairs)
        old = pairs[index].average if each.average else pairs[index].value
        new = MOVES[each.name](old.detach(), each.choice)
        if isinstance(new, str):
            other = pairs[(index + 1) % len(pairs)]
            new = pairs[index].average if new == "itself" else other.average if each.average else other.value
            new = new.detach()
        if self.how == "model":
            old.requires_grad_(requires_grad=False)
            old.data = new
        else:
            self.lists[0 if each.average else 1][index] = new
        self.extras = [value for _, value in self.pairs()]

    def step(self) -> None:
        """Update the averages."""
        if self.how == "model":
            self.averaged.update_parameters(self.model)
        else:
            self.update(*self.lists, 3)


def run_averages(case: AverageCase, failure: Failing, attempt: Callable[..., Any]) -> Counter[str]:
    """Run a case; return how its updates ended.

    Raises:
        Failure: a fault.
    """
    ended: Counter[str] = Counter()
    ours, twin = _Side(case, swa_utils), _Side(case, torch.optim.swa_utils)
    for moves in case.updates:
        for each in moves:
            if any(lacks_memory(tensor) for pair in ours.pairs() for tensor in pair if tensor.is_cpu):
                break  # most moves would read what is not there
            done = [attempt(lambda s=side: s.change(each)) for side in (ours, twin)]  # noqa: B023 (called at once)
            if (done[0] is None) != (done[1] is None):
                raise failure("change in one world only", repr(done))
        how = _update(ours, twin, failure, attempt)
        ended[how] += 1
        if how != "averaged":
            break
    return ended


def _update(ours: _Side, twin: _Side, failure: Failing, attempt: Callable[..., Any]) -> str:
    """Update both averages and compare; tell how it ended."""
    lost = [t for pair in ours.pairs() for t in pair if t.is_cpu and lacks_memory(t)]
    unfit = [pair for pair in ours.pairs() if _unfit(*pair)]
    must = [why for pair in unfit if (why := _must_be_refused(*pair))]
    before, counted = Snapshot(ours), _count(ours)
    error = attempt(ours.step)
    if error is not None:
        _check_refusal(error, failure)
        if (found := before.difference(ours)) or _count(ours) != counted:
            raise failure("changed by a refusal", f"{found or 'n_averaged'}; {error!r} from {error.origin}")
        if not (lost or unfit) and attempt(twin.step) is None:
            raise failure("refused what torch averages", f"{error!r} from {error.origin}")
        return "refused"
    _check_outcome(lost, must, failure)
    written = [average for average in ours.params if average.layout is torch.strided]
    if found := before.outside(ours, written):
        raise failure("wrote outside", found)
    if attempt(twin.step) is not None:
        return "averaged where torch refuses"
    for index, ((left, value), right) in enumerate(zip(ours.pairs(), twin.params, strict=True)):
        if found := tensor_difference(f"average {index}", left, right, value.dtype):
            raise failure("averages differ from torch", found)
        if left.dtype.itemsize == 2:
            synchronize_tensor(left, right)
    return "averaged"


def _check_outcome(lost: list[Tensor], must: list[str], failure: Failing) -> None:
    if lost:
        raise failure("averaged without memory", f"{len(lost)} tensors")
    if must:
        raise failure("averaged what must be refused", str(must))


def _check_refusal(error: Any, failure: Failing) -> None:
    if not isinstance(error, RuntimeError | ValueError | TypeError | AssertionError) or not str(error):
        raise failure("raw error", f"{error!r} from {error.origin}")


def _count(side: _Side) -> int:
    return int(side.averaged.n_averaged) if side.how == "model" else 0


def _unfit(average: Tensor, value: Tensor) -> str | None:
    """Say why a pair may be refused."""
    for t in (average, value):
        if type(t) is Plain or t._is_zerotensor() or t.is_meta or t.is_neg() or t.is_conj():
            return "not a plain tensor"
        if t.layout is not torch.strided:
            return "layout"
    if overlaps_itself(average) or overlapping([average, value]) or average.dtype != value.dtype:
        return "overlap"
    return _must_be_refused(average, value)


def _must_be_refused(average: Tensor, value: Tensor) -> str | None:
    """Say why a pair must be refused."""
    if average.shape != value.shape:
        return f"shapes {tuple(average.shape)} and {tuple(value.shape)}"
    if average.is_complex() != value.is_complex():
        return f"dtypes {average.dtype} and {value.dtype}"
    return None
