"""Schedulers of schedulers: one after the other, or all at once."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from surefoot.dynamo import opaque
from surefoot.lr_scheduler.base import LRScheduler, Rate, Recursive, as_if_stepped, put
from surefoot.lr_scheduler.ranges import LAST_EPOCH, Steps
from surefoot.lr_scheduler.schedule_runner import Schedule


class Composite(LRScheduler):
    """What `SequentialLR` and `ChainedScheduler` share; abstract.

    Composites nest.  Each begins its parts anew, whatever their constructors have done to the rates.
    """

    _schedulers: Sequence[torch_schedulers.LRScheduler]

    def _adopt(self, optimizer: torch.optim.Optimizer, schedulers: Sequence[torch_schedulers.LRScheduler]) -> None:
        for index, scheduler in enumerate(schedulers):
            self._check_part(optimizer, scheduler, index)
        for scheduler in schedulers:
            if isinstance(scheduler, LRScheduler):
                scheduler._take_up_groups()
        self._schedulers = schedulers
        self.optimizer = optimizer

    def _check_part(self, optimizer: torch.optim.Optimizer, scheduler: Any, index: int) -> None:
        name = type(self).__name__
        if not hasattr(scheduler, "optimizer"):
            raise TypeError(
                f"{name} at index {index} should have `optimizer` as its attribute, but is a {type(scheduler).__name__}"
            )
        if isinstance(scheduler, torch_schedulers.ReduceLROnPlateau):
            raise ValueError(  # noqa: TRY004 (torch's type)
                f"{name} does not support `ReduceLROnPlateau` scheduler as it requires additional kwargs to be "
                f"specified when calling `step`, but got one at index {index} in the given schedulers sequence; step "
                "it on its own"
            )
        if isinstance(scheduler, Schedule):
            raise ValueError(  # noqa: TRY004 (as for ReduceLROnPlateau)
                f"{name} does not take a Schedule, but got one at index {index}; combine its values instead, by "
                "join(...) or by *, and give the result to one Schedule"
            )
        if scheduler.optimizer is not optimizer:
            raise ValueError(
                f"{name} expects all schedulers to belong to the same optimizer, but got scheduler "
                f"{type(scheduler).__name__} at index {index} with another {type(scheduler.optimizer).__name__}"
            )

    def _reset_lrs(self) -> None:
        for group in self.optimizer.param_groups:
            put(group, "lr", group["initial_lr"])

    def _rewind(self) -> None:
        for scheduler in self._schedulers:
            if isinstance(scheduler, LRScheduler):
                scheduler._rewind()
            else:
                scheduler.last_epoch = -1

    @opaque
    def step(self) -> None:  # type: ignore[override]
        """Move on by one; call it after `optimizer.step()`.

        Raises:
            ValueError: param groups were added or removed for which there is no value; nothing has changed then.
        """
        self._update_lr()

    def _why_not(self, new: Sequence[int]) -> str | None:
        for index, scheduler in enumerate(self._schedulers):
            if not isinstance(scheduler, LRScheduler):
                return (
                    f"has torch's {type(scheduler).__name__} at index {index}, which takes up no group; give the class "
                    "of surefoot.lr_scheduler"
                )
            if reason := scheduler._why_not(new):
                return f"has a {type(scheduler).__name__} at index {index} that {reason}"
        return None

    def _extend(self, count: int) -> None:
        for scheduler in self._schedulers:
            if isinstance(scheduler, LRScheduler) and scheduler._known_groups() < count:
                scheduler._extend(count)
        self._last_lr = self._read()

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes but the optimizer, and the state dicts of the schedulers."""
        return {
            **super().state_dict(),
            "_schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
        }

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        super()._check_state(state_dict)
        saved, present = len(state_dict["_schedulers"]), len(self._schedulers)
        if saved != present:
            raise ValueError(
                f"the state dict of this {type(self).__name__} is of {saved} schedulers, but it has {present}"
            )
        for scheduler, state in zip(self._schedulers, state_dict["_schedulers"], strict=True):
            if isinstance(scheduler, LRScheduler):
                scheduler._check_state(state)

    def _take(self, state: dict[str, Any]) -> None:
        for scheduler, part in zip(self._schedulers, state.pop("_schedulers"), strict=True):
            if isinstance(scheduler, LRScheduler):
                scheduler._take(dict(part))
            else:
                scheduler.load_state_dict(part)
        super()._take(state)


class SequentialLR(Composite):
    """One scheduler after the other, each counting its epochs from its own beginning.

    Args:
        optimizer: any optimizer.
        schedulers: at least one, of this optimizer; composites are allowed.
        milestones: the epochs at which the second and later ones begin, whole numbers >= 0 that do not fall.
        last_epoch: see `LRScheduler`.  The schedulers are run to where they were, about 10 µs per epoch;
            `load_state_dict` needs no such time.

    Raises:
        TypeError: something in the list is no scheduler.
        ValueError: there is no scheduler, one of another optimizer, a `ReduceLROnPlateau`, or a wrong number of
            milestones.

    Note:
        Where torch goes wrong, this equals a run that was not interrupted: `last_epoch` other than -1, and a
        `SequentialLR` or `ChainedScheduler` inside.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedulers: list[torch_schedulers.LRScheduler],
        milestones: Annotated[list[int], Steps(rising=True)],
        last_epoch: Annotated[int, LAST_EPOCH] = -1,
    ) -> None:
        if len(schedulers) < 1:
            raise ValueError(f"{type(self).__name__} expects at least one scheduler, but got no scheduler.")
        self._adopt(optimizer, schedulers)
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(
                "Sequential Schedulers expects number of schedulers provided to be one more than the number of "
                f"milestone points, but got number of schedulers {len(schedulers)} and the number of milestones to be "
                f"equal to {len(milestones)}"
            )
        self._check_values(locals())
        self._milestones = [int(milestone) for milestone in milestones]
        self._reset_lrs()
        self._rewind()
        self._initial_step()
        with as_if_stepped(optimizer):
            for _ in range(last_epoch + 1):
                self._update_lr()

    def _rewind(self) -> None:
        super()._rewind()
        self.last_epoch = -1

    def _initial_step(self) -> None:
        self.last_epoch = 0
        self._active()._initial_step()
        self._last_lr = self._read()

    def _why_not(self, new: Sequence[int]) -> str | None:
        active = self._active()
        if active is not self._schedulers[0] and isinstance(active, Recursive) and not active.has_closed_form:
            return (
                f"runs its {type(active).__name__} from the rate at which the one before it ended; use a scheduler "
                "that begins at the initial rate"
            )
        return super()._why_not(new)

    def _rate_now(self, index: int, lr: Rate) -> Rate:
        # Every part begins at the initial rate.
        active: Any = self._active()
        return active._rate_now(index, lr) if isinstance(active, LRScheduler) else lr

    def _active(self) -> torch_schedulers.LRScheduler:
        return self._schedulers[bisect_right(self._milestones, self.last_epoch)]

    def _update_lr(self, epoch: int | None = None) -> None:
        self._take_up_groups()
        before = self.last_epoch
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        try:
            self._move(epoch)
        except Exception:
            self.last_epoch = before
            raise
        self._last_lr = self._read()

    def _move(self, epoch: int | None) -> None:
        begins = self.last_epoch in self._milestones or epoch is not None
        if begins:
            self._active()._update_lr(0)
        else:
            self._active().step()


class ChainedScheduler(Composite):
    """Several schedulers at once, each working on the rates that the one before it left.

    Args:
        schedulers: at least one; chaining makes sense of those that compute a rate from the one before.
        optimizer: the schedulers' optimizer; that of the first by default.

    Raises:
        TypeError: something in the list is no scheduler.
        ValueError: there is no scheduler, one of another optimizer, or a `ReduceLROnPlateau`.
    """

    def __init__(
        self,
        schedulers: Sequence[torch_schedulers.LRScheduler],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if len(schedulers) < 1:
            raise ValueError(
                f"{type(self).__name__} expects at least one scheduler to be chained, but got no scheduler."
            )
        self._adopt(optimizer or schedulers[0].optimizer, schedulers)
        self._last_lr = self._read()

    def _why_not(self, new: Sequence[int]) -> str | None:
        if any(isinstance(scheduler, Composite) for scheduler in self._schedulers):
            return "has schedulers of schedulers inside, whose past cannot be run through; chain simple ones"
        if len({scheduler.last_epoch for scheduler in self._schedulers}) > 1:
            return "has schedulers at different epochs; make them together"
        return super()._why_not(new)

    def _rate_now(self, index: int, lr: Rate) -> Rate:
        parts = [scheduler for scheduler in self._schedulers if isinstance(scheduler, Recursive)]
        if len(parts) < len(self._schedulers):  # one sets the rate from the epoch alone at every step
            return lr
        for part in parts:
            lr = part._first_lr(index, lr)
        for epoch in range(1, int(parts[0].last_epoch) + 1):
            for part in parts:
                lr = part._next_lr(epoch, lr, index)
        return lr

    def _initial_step(self) -> None:
        for scheduler in self._schedulers:
            scheduler._initial_step()
        self._last_lr = self._read()

    def _update_lr(self, epoch: int | None = None) -> None:
        self._take_up_groups()
        if epoch is not None:
            self._reset_lrs()
            self._rewind()
            self._initial_step()
            return
        for scheduler in self._schedulers:
            scheduler.step()
        self._last_lr = self._read()
