"""What every scheduler shares: positions, writing into groups, warnings, state dicts, resuming.

A scheduler is its arguments and a formula; nothing here knows any of them.  The classes keep the contract of
`torch.optim.lr_scheduler` and subclass its base so that `isinstance` holds; every method is ours.
"""

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedulers

from surefoot.dynamo import opaque
from surefoot.lr_scheduler.ranges import ANY, LAST_EPOCH, between, ranges_of
from surefoot.rule.hyperparameters import Check

Rate = float | Tensor

EPOCH_DEPRECATION_WARNING = (
    "The epoch parameter in `scheduler.step()` was not necessary and is being deprecated where possible. It selects "
    "the closed form of the schedule, where there is one; call `step()` without it, or use "
    "`surefoot.lr_scheduler.Schedule`, whose `set_step(n)` jumps to any step"
)
ORDER_WARNING = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`. Call `optimizer.step()` first, otherwise the "
    "first value of the schedule is skipped"
)
REPLACED_WARNING = (
    "Seems like `optimizer.step()` has been overridden after learning rate scheduler initialization, so whether it "
    "precedes `lr_scheduler.step()` cannot be told; replace it before the scheduler is made"
)
GET_LR_WARNING = "To get the last learning rate computed by the scheduler, please use `get_last_lr()`."


_NOT_THE_USERS = ("surefoot.", "torch._dynamo.", "torch._compile")


def warn(message: str) -> None:
    """Warn the user, whose frame is the first one outside of this package and of torch.compile."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def copied(value: Any) -> Any:
    """Return a number as it is, and a tensor's value in a tensor of its own."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def put(group: dict[str, Any], name: str, value: Any) -> None:
    """Set a hyperparameter: a tensor is filled in place, so that captured graphs see the new value.

    A number stays a number, whatever it is computed from: a tensor that came in here would be filled the next time,
    and whoever else holds it would change as well.
    """
    if isinstance(group[name], Tensor):
        with torch.no_grad():
            group[name].fill_(float(value))
    else:
        group[name] = value.item() if isinstance(value, Tensor) else value


def put_item(group: dict[str, Any], name: str, item: int, value: Any) -> None:
    """Set one number of a tuple, such as `betas`, as `put` does."""
    values = dict(enumerate(group[name]))
    put(values, item, value)  # type: ignore[arg-type]
    if values[item] is not group[name][item]:
        group[name] = tuple(values.values())


def put_momentum(group: dict[str, Any], value: Any) -> None:
    """Set `betas[0]` where the group has betas, `momentum` otherwise."""
    if "betas" in group:
        put_item(group, "betas", 0, value)
    else:
        put(group, "momentum", value)


def separate(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Give each param group a tensor of its own where it shares a hyperparameter's with another, or with the defaults.

    Optimizers put the one tensor of their constructor into every group, where to set one group's value would set all.
    The first group keeps it; one that takes gradients stays shared.
    """
    seen: set[int] = set()
    # A wrapper of an optimizer may have no defaults.
    for owner in (*optimizer.param_groups, getattr(optimizer, "defaults", {})):
        if name in owner:
            owner[name] = _own(owner[name], seen)


def _own(value: Any, seen: set[int]) -> Any:
    if isinstance(value, tuple):
        own = tuple(_own(item, seen) for item in value)
        return value if all(a is b for a, b in zip(own, value, strict=True)) else own
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    if id(value) in seen:
        return copied(value)
    seen.add(id(value))
    return value


def check_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer, or raise TypeError if it is none."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    return optimizer


def numbered(indices: Sequence[int]) -> str:
    """Return what a message calls param groups: "param group 2", "param groups 2, 3"."""
    return f"param group{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def function_state(function: Callable[..., Any] | None) -> dict[str, Any] | None:
    """Return what a state dict keeps of a callable: the attributes of an object, nothing of a function."""
    attributes = getattr(function, "__dict__", None)
    return None if attributes is None or isinstance(function, FunctionType) else dict(attributes)


def restore_function(function: Callable[..., Any] | None, attributes: Mapping[str, Any] | None) -> None:
    """Return a callable object the attributes that `function_state` took."""
    if function is not None and attributes is not None:
        vars(function).update(attributes)


def count_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer's `step` note that it was called, as torch's schedulers do and look for."""
    step = optimizer.step
    if getattr(step, "_wrapped_by_lr_sched", False):
        return
    owner = weakref.ref(optimizer)
    function = getattr(step, "__func__", None)
    # A bound method kept by the wrapper would keep the optimizer alive; what a user has put there is kept as it is.
    bind = function.__get__ if function is not None else lambda *_: step

    @functools.wraps(function or step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        instance: Any = owner()
        instance._opt_called = True
        return bind(instance, type(instance))(*args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = counted  # type: ignore[method-assign]


@contextmanager
def as_if_stepped(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep schedulers from warning that the optimizer has not stepped, while one is run up to where it was."""
    before = getattr(optimizer, "_opt_called", False)
    optimizer._opt_called = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer._opt_called = before  # type: ignore[attr-defined]


class LRScheduler(torch_schedulers.LRScheduler):
    """Base class of all schedulers.

    A subclass defines `get_lr`, as with torch, or starts from `Recursive`.

    Args:
        optimizer: any `torch.optim.Optimizer`; what it is changes in place, group by group.
        last_epoch: -1 to start.  `k - 1` to be where a scheduler is after `k` calls of `step`: then every group needs
            an `initial_lr`, which the optimizer's state dict carries.

    Attributes:
        last_epoch: how often `step` has been called.
        base_lrs: the groups' initial learning rates.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        KeyError: `last_epoch` is not -1 and a group has no `initial_lr`.

    Note:
        The constructor sets the learning rates, as in torch; so load an optimizer's state after it, or give
        `last_epoch`.

        A param group that is added to the optimizer later starts from its own rate and follows the same curve: at the
        next step it is where it would be from the beginning.  Where that is not defined, `step` refuses it.
    """

    ranges: ClassVar[Mapping[str, Check]] = {"last_epoch": LAST_EPOCH}
    """For each hyperparameter a check that raises when a value is out of range, from the constructors' signatures."""

    _unsaved: ClassVar[frozenset[str]] = frozenset({"optimizer", "_given"})
    """Attributes that are no part of a state dict."""

    _given: Mapping[str, Any] = {}
    """Arguments that may be lists with one value per param group."""

    base_lrs: list[Rate]
    _last_lr: list[Rate]
    _get_lr_called_within_step: bool = False
    _is_initial: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Collect the ranges of the subclass's constructor."""
        super().__init_subclass__(**kwargs)
        if (constructor := vars(cls).get("__init__")) is not None:
            cls.ranges = {**cls.ranges, **ranges_of(constructor)}

    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: Annotated[int, LAST_EPOCH] = -1) -> None:
        self._check_values({"last_epoch": last_epoch})
        self.optimizer = check_optimizer(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", copied(group["lr"]))
            elif "initial_lr" not in group:
                raise KeyError(
                    f"param 'initial_lr' is not specified in param_groups[{index}] when resuming scheduler with "
                    f"last_epoch={last_epoch}; load the optimizer's state dict first, set the group's 'initial_lr', "
                    "or make the scheduler with last_epoch=-1 and use its load_state_dict"
                )
        separate(optimizer, "lr")
        self.base_lrs = self._initial_lrs()
        self.last_epoch = last_epoch
        count_steps(optimizer)
        self._initial_step()

    def _initial_lrs(self) -> list[Rate]:
        """Return what the schedule starts from, for each group."""
        return [copied(group["initial_lr"]) for group in self.optimizer.param_groups]

    def _check_values(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError when a hyperparameter is out of range; the values may be a constructor's `locals()`."""
        for name, check in self.ranges.items():
            if name in values:
                check(name, values[name])

    def _spread(self, name: str, value: Any) -> list[Any]:
        """Return one value for each group: those of a list or tuple, or the same for all.

        Raises:
            ValueError: the list has another length than `param_groups`.
        """
        count = len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise ValueError(
                f"{name} must have the same length as optimizer.param_groups. {name} has {len(values)} values, "
                f"param_groups has {count}."
            )
        self._note_given(name, value)
        return [copied(item) for item in values]

    def _note_given(self, name: str, value: Any) -> None:
        """Remember an argument that may be a list with one value per param group, for groups that are added later."""
        self._given = {**self._given, name: value}

    # What a subclass says

    def get_lr(self) -> list[Rate]:
        """Return each group's learning rate at `last_epoch`; meant to be called by `step` only.

        To read the present rates use `get_last_lr`.
        """
        if not self._get_lr_called_within_step:
            warn(GET_LR_WARNING)
        return self._new_lrs()

    def _new_lrs(self) -> list[Rate]:
        raise NotImplementedError(f"{type(self).__name__} defines no `get_lr`")

    def _get_closed_form_lr(self) -> list[Rate]:
        """Return the rates at `last_epoch` from the initial ones, whatever the present ones are."""
        return self.get_lr()

    # Moving on

    @opaque
    def step(self, epoch: int | None = None) -> None:
        """Move on by one; call it after `optimizer.step()`.

        Args:
            epoch: deprecated: go to this position, by the closed form where there is one.

        Raises:
            ValueError: param groups were added or removed for which there is no value; nothing has changed then.
        """
        if epoch is not None:
            ANY("epoch", epoch)
        self._take_up_groups()
        if self._step_count == 1:
            self._warn_about_order()
        if epoch is not None:
            warn(EPOCH_DEPRECATION_WARNING)
        self._step_count += 1
        try:
            self._update_lr(epoch)
        except Exception:
            self._step_count -= 1
            raise

    def _warn_about_order(self) -> None:
        if not getattr(self.optimizer.step, "_wrapped_by_lr_sched", False):
            warn(REPLACED_WARNING)
        elif not getattr(self.optimizer, "_opt_called", False):
            warn(ORDER_WARNING)

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def _update_lr(self, epoch: int | None = None) -> None:
        self._take_up_groups()
        before = self.last_epoch
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._get_lr_called_within_step = True
        try:
            lrs = self.get_lr() if epoch is None else self._get_closed_form_lr()
        except Exception:
            self.last_epoch = before
            raise
        finally:
            self._get_lr_called_within_step = False
        self._write(lrs)

    def _rewind(self) -> None:
        """Forget every position, the constructor's included; `_initial_step` begins anew."""
        self.last_epoch = -1

    def _write(self, lrs: Sequence[Rate]) -> None:
        """Put the rates into the groups and note them."""
        if len(lrs) != len(self.optimizer.param_groups):
            raise ValueError(
                f"{type(self).__name__}.get_lr gave {len(lrs)} learning rates, but the optimizer has "
                f"{len(self.optimizer.param_groups)} param groups; it must give one for each"
            )
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            put(group, "lr", lr)
        self._last_lr = self._read()

    def _read(self) -> list[Rate]:
        return [copied(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Rate]:
        """Return each group's learning rate as this scheduler last set it, tensors as copies."""
        return self._last_lr

    # Param groups that come later

    def _known_groups(self) -> int:
        """Return how many param groups this scheduler knows of."""
        return len(self._last_lr)

    def _take_up_groups(self) -> None:
        """Take up the param groups that were added since the last step, at the schedule's present value for them.

        Raises:
            ValueError: there is none, or groups are gone; nothing has changed.
        """
        if not self._is_initial and self._known_groups() != len(self.optimizer.param_groups):
            for index in self._adopt_groups():
                group = self.optimizer.param_groups[index]
                put(group, "lr", self._rate_now(index, copied(group["lr"])))

    def _adopt_groups(self) -> list[int]:
        """Make room for the groups that were added.

        Returns:
            Those that have the rate of their beginning, not one that was loaded or copied together with `initial_lr`.
        """
        known, count = self._known_groups(), len(self.optimizer.param_groups)
        if count < known:
            raise ValueError(
                f"this {type(self).__name__} was made for {known} param groups, but the optimizer has {count}; make a "
                "new scheduler when you take groups away"
            )
        new = range(known, count)
        if reason := self._why_not(new):
            raise ValueError(
                f"{numbered(new)} came after this {type(self).__name__} was made, which {reason}; or make a new "
                "scheduler once all groups are there"
            )
        groups = self.optimizer.param_groups
        # Several schedulers of one optimizer take a group up one after the other: all of them begin at its beginning.
        plain = self.optimizer.__dict__.setdefault("_plain_groups", set())
        plain |= {index for index in new if "initial_lr" not in groups[index]}
        self._extend(count)
        return [i for i in new if i in plain or bool(groups[i]["lr"] == groups[i].get("initial_lr"))]

    def _why_not(self, new: Sequence[int]) -> str | None:  # noqa: ARG002 (parts of a composite look at them)
        """Return why new groups have no value, and what to do, if so it is."""
        lists = [name for name, value in self._given.items() if isinstance(value, list | tuple)]
        return (
            f"has a list for {' and '.join(lists)}, without a value for them; give one for all groups"
            if lists
            else None
        )

    def _extend(self, count: int) -> None:
        """Extend what is kept for each group to `count` groups."""
        groups = self.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", copied(group["lr"]))
        separate(self.optimizer, "lr")
        self.base_lrs = [*self.base_lrs, *self._initial_lrs()[len(self.base_lrs) : count]]
        self._last_lr = [*self._last_lr, *self._read()[len(self._last_lr) : count]]

    def _rate_now(self, index: int, lr: Rate) -> Rate:  # noqa: ARG002 (what a recursion needs)
        """Return group `index`'s rate at the present position if it began with `lr`.

        Where each rate follows from the position alone, the next step sets it, whatever it is before.
        """
        return lr

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes but the optimizer."""
        return {name: value for name, value in self.__dict__.items() if name not in self._unsaved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state dict of this class, or of its namesake in torch.

        A group whose learning rate is still the one that this scheduler set gets the saved one, so that a scheduler
        goes on exactly, whether or not the optimizer's state is loaded, before or after.  (torch leaves it.)

        Raises:
            ValueError: it was made for another number of groups, or a hyperparameter in it is out of range; the
                scheduler is as it was.
        """
        self._check_state(state_dict)
        untouched = self._untouched()
        if self._known_groups() != len(self.optimizer.param_groups):
            new = range(self._known_groups(), len(self.optimizer.param_groups))
            fresh = self._adopt_groups()
            untouched = [*untouched, *(index in fresh for index in new)]
        self._take(dict(state_dict))
        self._go_on(untouched)

    def _take(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in state.items() if name not in self._unsaved})

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Raise when a state dict does not fit."""
        self._check_groups(state_dict)
        # A position that `step(epoch)` set may be a fraction.
        self._check_values({name: value for name, value in state_dict.items() if name != "last_epoch"})
        between(-1)("last_epoch", state_dict.get("last_epoch", 0))

    def _check_groups(self, state_dict: Mapping[str, Any]) -> None:
        saved, present = len(state_dict.get("_last_lr", self._last_lr)), len(self.optimizer.param_groups)
        if saved != present:
            raise ValueError(
                f"the state dict of this {type(self).__name__} has learning rates for {saved} param groups, but the "
                f"optimizer has {present}; give the optimizer the groups it had when the state was saved"
            )

    def _untouched(self) -> list[bool]:
        """Return which of the known groups have the learning rate that this scheduler set."""
        return [bool(now == last) for now, last in zip(self._read(), self._last_lr, strict=False)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copy's or a pickle's attributes; its optimizer has lost the notice of steps."""
        self.__dict__.update(state)
        count_steps(self.optimizer)
        if state.get("_step_count", 0) > 1:
            self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _go_on(self, untouched: Sequence[bool]) -> None:
        pairs = zip(self.optimizer.param_groups, untouched, self._last_lr, strict=True)
        for group, mine, lr in pairs:
            if mine:
                put(group, "lr", copied(lr))


class _LRScheduler(LRScheduler):
    """The base class under its former name."""


class Recursive(LRScheduler):
    """A schedule that computes each rate from the one before it, so that other changes of the rate survive.

    A subclass says in `_next_lr` how, and may say the closed form: as a factor in `_factor`, or in
    `_get_closed_form_lr`.
    """

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        """Return group `index`'s rate at `epoch` from the one at `epoch - 1`, or, at 0, from the initial one."""
        raise NotImplementedError

    def _factor(self) -> float:
        """Return the rate at `last_epoch` in units of the initial one."""
        raise NotImplementedError

    has_closed_form: ClassVar[bool] = True
    """Whether the rate follows from the epoch and the initial rate alone, where nobody else changes it."""

    def _new_lrs(self) -> list[Rate]:
        if self._is_initial and self.last_epoch > 0:
            return [self._resumed_lr(index, lr) for index, lr in enumerate(self._read())]
        return [self._next_lr(self.last_epoch, lr, index) for index, lr in enumerate(self._read())]

    def _get_closed_form_lr(self) -> list[Rate]:
        factor = self._factor()
        return [base * factor for base in self.base_lrs]

    def _resumed_lr(self, index: int, lr: Rate) -> Rate:
        """Return the rate for a constructor's `last_epoch`.

        A rate other than the initial one comes from a loaded optimizer and is right as it is; the initial one is
        taken through all epochs, so that the bits are those of a run that was not interrupted.
        """
        return lr if lr != self.base_lrs[index] else self._rate_now(index, lr)

    def _first_lr(self, index: int, lr: Rate) -> Rate:
        """Return group `index`'s rate at epoch 0."""
        return self._next_lr(0, lr, index)

    def _rate_now(self, index: int, lr: Rate) -> Rate:
        """Take a rate through all epochs."""
        lr = self._first_lr(index, lr)
        for epoch in range(1, int(self.last_epoch) + 1):
            lr = self._next_lr(epoch, lr, index)
        return lr
