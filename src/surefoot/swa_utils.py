"""Averages of a model's weights over training: stochastic weight averaging (SWA) and exponential moving averages (EMA).

The names and the contract of `torch.optim.swa_utils`.  The averages of this module are computed by the engines, and
what an `AveragedModel` does is kept from one update to the next while nothing but values changes.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from surefoot.averages import Averager, Averaging, watch_modules
from surefoot.dynamo import opaque
from surefoot.lr_scheduler.base import Rate, Recursive, check_optimizer, copied
from surefoot.lr_scheduler.ranges import ANNEAL, LAST_EPOCH, RATE, between

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

Tensors = Sequence[Tensor]
Pairs = list[tuple[Tensor, Tensor]]
Count = Tensor | int
AverageOne = Callable[[Tensor, Tensor, Count], Tensor]
AverageAll = Callable[[Tensors, Tensors, Count], None]


def _checked_decay(decay: float) -> float:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")
    return decay


def get_ema_multi_avg_fn(decay: float = 0.999) -> AverageAll:
    """Return the function that updates exponential moving averages of many tensors in place.

    `average = decay * average + (1 - decay) * current`

    Args:
        decay: in [0, 1]; the average is over about `1 / (1 - decay)` updates.

    Raises:
        ValueError: `decay` is out of range.
    """
    weight = 1 - _checked_decay(decay)
    return Averager(lambda _: weight)


def get_swa_multi_avg_fn() -> AverageAll:
    """Return the function that updates equally weighted averages of many tensors in place.

    `average += (current - average) / (n_averaged + 1)`
    """
    return Averager(lambda num_averaged: 1 / (int(num_averaged) + 1))


def get_ema_avg_fn(decay: float = 0.999) -> AverageOne:
    """Return the function that averages one tensor exponentially, by `decay`; see `get_ema_multi_avg_fn`."""
    _checked_decay(decay)

    @torch.no_grad()
    def ema_update(average: Tensor, current: Tensor, _: Count) -> Tensor:
        return decay * average + (1 - decay) * current

    return ema_update


def get_swa_avg_fn() -> AverageOne:
    """Return the function that returns the new equally weighted average of one tensor; see `get_swa_multi_avg_fn`."""

    @torch.no_grad()
    def swa_update(average: Tensor, current: Tensor, num_averaged: Count) -> Tensor:
        return average + (current - average) / (num_averaged + 1)

    return swa_update


class AveragedModel(Module):
    """A copy of a model whose parameters are the average of the model's over training.

    The first `update_parameters` copies, each later one averages.  With batch normalisation either average the buffers
    as well (`use_buffers`) or call `update_bn` at the end.

    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; for EMA pass
    `multi_avg_fn=get_ema_multi_avg_fn(0.999)`.

    Args:
        model: what is averaged.
        device: where the copy lives; the model's own device by default.
        avg_fn: `(average, current, n_averaged) -> new average`, for each tensor.
        multi_avg_fn: `(averages, currents, n_averaged) -> None`, in place, for all tensors of one device and dtype.
            Without either, all updates weigh the same.
        use_buffers: average the buffers too; otherwise they are copied at each update.

    Attributes:
        module: the copy.
        n_averaged: how many updates there were, an int64 tensor of one element.

    Raises:
        AssertionError: both functions are given.

    Example:
        >>> import torch
        >>> from surefoot.swa_utils import AveragedModel
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = AveragedModel(model)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     average.update_parameters(model)
        >>> average.module.weight.item()
        3.0

    Note:
        Unlike torch: parameters that lazy modules make later are taken over, and a model with another number of
        tensors is refused instead of averaged in part.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: AverageOne | None = None,
        multi_avg_fn: AverageAll | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("Only one of avg_fn and multi_avg_fn should be provided")
        self.module = deepcopy(model, _lazy_buffers(model))
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)

    _update: "_Update | None" = None

    @opaque
    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Take the model's present parameters into the average.

        Tensors are matched by their names where both modules have the same, apart from what torch.compile puts before
        them, and by their order otherwise.

        Raises:
            ValueError: the model has other tensors than the one that was copied; the average is as it was.
        """
        average_all = None if self.avg_fn else self.multi_avg_fn or get_swa_multi_avg_fn()
        update, self._update = self._update, None
        if update is None or not update.holds(self.module, model, self.use_buffers):
            update = _Update(self.module, model, self.use_buffers)
        lasting = isinstance(average_all, Averager)
        if self.n_averaged == 0:
            update.copy_all()
        elif isinstance(average_all, Averager):
            update.move(average_all.weight(self.n_averaged))
        else:
            update.copy_rest()
            self._average(update.averaged, average_all)
        self.n_averaged += 1
        self._update = update if lasting else None

    def _average(self, pairs: Pairs, average_all: AverageAll | None) -> None:
        """Average by a function of the user's."""
        if average_all is None:
            for average, current in pairs:
                average.copy_(self.avg_fn(average, current, self.n_averaged.to(average.device)))  # type: ignore[misc]
            return
        for (device, _), (averages, currents) in _by_kind(pairs).items():
            average_all(averages, currents, self.n_averaged.to(device))


class _Update:
    """The tensors of an update, kept for the next one while both modules have the same tensors; it is never copied.

    Args:
        averaged: the module of averages.
        model: the model.
        use_buffers: whether buffers are averaged rather than copied.
    """

    def __init__(self, averaged: Module, model: Module, use_buffers: bool) -> None:
        pairs, buffers = (_pairs(averaged, model, kind) for kind in ("parameters", "buffers"))
        self.averaged, self.copied = ([*pairs, *buffers], []) if use_buffers else (pairs, buffers)
        self._use_buffers = use_buffers
        self._averaging: Averaging | None = None
        release = weakref.WeakMethod(self._release_model)  # not the update itself, which would then be part of a cycle
        self._modules = (averaged, weakref.ref(model, lambda gone: (found := release()) and found(gone)))
        tensors = list(chain(averaged.parameters(), averaged.buffers(), model.parameters(), model.buffers()))
        own = set(map(id, tensors))
        direct = all(id(current) in own for _, current in (*self.averaged, *self.copied))
        self._items = None if any(map(is_lazy, tensors)) or not direct else watch_modules(averaged, model)

    def _release_model(self, _: Any) -> None:
        """Keep nothing of a model that is gone."""
        self.averaged, self.copied, self._averaging, self._items = [], [], None, None

    def holds(self, averaged: Module, model: Module, use_buffers: bool) -> bool:
        """Whether these are the modules, with the tensors that they had."""
        same = self._modules[0] is averaged and self._modules[1]() is model and self._use_buffers == use_buffers
        known = same and self._items is not None and not self._items.changed()
        return known and (self._averaging is None or self._averaging.holds())

    def copy_all(self) -> None:
        """Copy every value."""
        _copy(self.averaged)
        self.copy_rest()

    def copy_rest(self) -> None:
        """Copy the values that are not averaged."""
        _copy(self.copied)

    def move(self, weight: float) -> None:
        """Average by the engines, and copy the rest."""
        self.copy_rest()
        if self._averaging is None:
            averages, values = zip(*self.averaged, strict=True) if self.averaged else ((), ())
            self._averaging = Averaging(averages, values)
            self._averaging.move(weight)
            self._averaging.watch()
        else:
            self._averaging.move(weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> None:
    """Stand in for what is not copied."""


def _copy(pairs: Pairs) -> None:
    for average, current in pairs:
        average.copy_(current)


def _lazy_buffers(model: Module) -> dict[int, Any]:
    """Return what `deepcopy` needs as memo: torch cannot copy buffers that have no shape yet."""
    new: Any = UninitializedBuffer  # torch's stub has no signature for it
    lazy = [buffer for buffer in model.buffers() if is_lazy(buffer)]
    return {id(buffer): new(device=buffer.device, dtype=buffer.dtype) for buffer in lazy}


def _pairs(averaged: Module, model: Module, kind: str) -> list[tuple[Tensor, Tensor]]:
    """Pair the tensors of both modules, those of the model brought to the average's device."""
    matched = _matched(averaged, model, kind)
    pairs = [(_made_like(average, current), current) for _, average, current in matched]
    if any(is_lazy(current) for _, current in pairs):
        pairs = [(average, current) for average, current in pairs if not is_lazy(current)]
    for name, average, current in matched:
        if not is_lazy(current) and average.shape != current.shape:
            raise ValueError(
                f"{name}: the model has a tensor of shape {tuple(current.shape)} where the average has "
                f"{tuple(average.shape)}; give the model that was averaged"
            )
    if any(average.device != current.device for average, current in pairs):
        pairs = [(average, current.to(average.device)) for average, current in pairs]
    return pairs


def _matched(averaged: Module, model: Module, kind: str) -> list[tuple[str, Tensor, Tensor]]:
    """Return the average's names and tensors, each with the model's."""
    ours, theirs = (_named(module, kind) for module in (averaged, model))
    if len(ours) != len(theirs):
        raise ValueError(
            f"the model has {len(theirs)} {kind}, but the average was made of {len(ours)}; make a new AveragedModel "
            "when you add or remove modules"
        )
    if ours.keys() != theirs.keys():
        # A tensor that modules share has the name of whichever comes first.
        everywhere = _named(model, kind, remove_duplicate=False)
        known = ours.keys() <= everywhere.keys()
        if not known or not theirs.keys() <= _named(averaged, kind, remove_duplicate=False).keys():
            return [(*item, current) for item, current in zip(ours.items(), theirs.values(), strict=True)]
        theirs = everywhere
    return [(name, average, theirs[name]) for name, average in ours.items()]


def _named(module: Module, kind: str, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Return a module's tensors by name, without what torch.compile puts before the names in a module that it wraps."""
    named = getattr(module, f"named_{kind}")(remove_duplicate=remove_duplicate)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named}


def _made_like(average: Tensor, current: Tensor) -> Tensor:
    """Make the tensor of a lazy module, once the model has made its own."""
    if isinstance(average, UninitializedParameter | UninitializedBuffer) and not is_lazy(current):
        average.materialize(current.shape, dtype=current.dtype)
    return average


def _by_kind(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[Any, tuple[list[Tensor], list[Tensor]]]:
    """Sort pairs by device and dtype of the average; the model's values are brought to its dtype."""
    kinds: defaultdict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for average, current in pairs:
        averages, currents = kinds[average.device, average.dtype]
        averages.append(average)
        currents.append(current if current.dtype == average.dtype else current.to(average.dtype))
    return kinds


@contextmanager
def _cumulative(model: Module) -> Iterator[bool]:
    """Let batch normalisation take plain means over all batches; momenta and modes are put back at the end.

    After an exception the statistics are put back, too.
    """
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [module.momentum for module in modules]
    statistics = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers() if not is_lazy(buffer)]
    training = {module: module.training for module in model.modules()} if modules else {}
    for normalisation in modules:
        normalisation.reset_running_stats()
        normalisation.momentum = None
    try:
        yield bool(modules)
    except BaseException:
        for buffer, value in statistics:
            buffer.copy_(value)
        raise
    finally:
        for normalisation, momentum in zip(modules, momenta, strict=True):
            normalisation.momentum = momentum
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: Module, device: int | torch.device | None = None) -> None:
    """Compute the running statistics of batch normalisation anew, in one pass over the data.

    Args:
        loader: batches: tensors, or lists or tuples whose first item is the tensor to give to the model.
        model: the model, usually an `AveragedModel`.
        device: where to bring the batches.

    Raises:
        ValueError: there are no batches, and so no statistics; they are as they were then, as after any exception.
    """
    with _cumulative(model) as needed:
        if not needed:
            return
        model.train()
        batches = 0
        for batch in loader:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            model(inputs if device is None else inputs.to(device))
            batches += 1
        if not batches:
            raise ValueError(
                f"the loader gave no batch to compute statistics of: {loader!r}; give one that has data, not an "
                "iterator that has been used up"
            )


def _share(strategy: str, fraction: float) -> float:
    """Return how much of the way has been gone after a fraction of the time."""
    fraction = max(0.0, min(1.0, fraction))
    return (1 - math.cos(math.pi * fraction)) / 2 if strategy == "cos" else fraction


_ANNEAL_EPOCHS = between(whole=True, words="anneal_epochs must be equal or greater than 0, got ")


class SWALR(Recursive):
    """Go from the present rate to `swa_lr` in `anneal_epochs`, and stay there.

    Args:
        optimizer: any optimizer; its groups get a key `swa_lr`.
        swa_lr: the last rate, >= 0, or a list with one per param group.
        anneal_epochs: how many epochs it takes, a whole number >= 0.
        anneal_strategy: `"cos"` or `"linear"`.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        swa_lr: Annotated[float | Sequence[float], RATE],
        anneal_epochs: Annotated[int, _ANNEAL_EPOCHS] = 10,
        anneal_strategy: Annotated[str, ANNEAL] = "cos",
        last_epoch: Annotated[int, LAST_EPOCH] = -1,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        self._check_values(locals())
        for group, lr in zip(optimizer.param_groups, self._spread("swa_lr", swa_lr), strict=True):
            group["swa_lr"] = lr
        self._anneal_strategy = anneal_strategy
        self.anneal_epochs = anneal_epochs
        super().__init__(optimizer, last_epoch)

    has_closed_form = False

    def _extend(self, count: int) -> None:
        super()._extend(count)
        for group in self.optimizer.param_groups:
            group.setdefault("swa_lr", copied(self._given["swa_lr"]))

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        last = self.optimizer.param_groups[index]["swa_lr"]
        epoch = max(1, epoch) if self.anneal_epochs == 0 else epoch
        before, now = (_share(self._anneal_strategy, e / max(1, self.anneal_epochs)) for e in (epoch - 1, epoch))
        first: Rate = last if before == 1 else (lr - before * last) / (1 - before)
        new: Rate = last * now + first * (1 - now)
        return new

    def _get_closed_form_lr(self) -> list[Rate]:
        return self.get_lr()
