"""`Schedule`: the scheduler that runs schedules given as values, for any hyperparameter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from surefoot.dynamo import opaque
from surefoot.lr_scheduler.base import (
    LRScheduler,
    check_optimizer,
    copied,
    count_steps,
    put,
    put_item,
    separate,
)
from surefoot.lr_scheduler.curves import Absolute, Curve
from surefoot.lr_scheduler.ranges import ANY

Function = Callable[[int], float]
Setting = Function | Sequence[Function | None] | None


class Schedule(LRScheduler):
    """Set hyperparameters from schedules: at each step the initial value times the schedule's factor.

    The value at a step does not depend on how one came there: to jump, to resume or to run through gives the same
    bits.  If a scheduled value is changed from outside, the rest of the schedule is scaled to go on from there.

    Args:
        optimizer: any optimizer.
        last_epoch: -1 to start; `k - 1` to be where the schedule is after `k` calls of `step`.
        schedules: for each hyperparameter a schedule, such as `lr=cosine(1, 0, 1000)`.

            A schedule is a value of `surefoot.lr_scheduler.schedules` or any function from steps, counted from 0, to
            factors.  `absolute(...)` gives the hyperparameter itself instead of a factor, and overrides changes from
            outside.  A list stands for one schedule per param group.  For a tuple such as `betas` give a tuple, with
            None for what stays: `betas=(None, linear(1, 0.99, 1000))`.

    Raises:
        TypeError: `optimizer` is not an optimizer, or a schedule is not a function.
        ValueError: no schedule is given, a group has no such hyperparameter, or a list or tuple has a wrong length;
            later, `step` finds groups that were added beside a list of schedules.

    Example:
        >>> import torch, surefoot
        >>> from surefoot.lr_scheduler import Schedule
        >>> from surefoot.lr_scheduler.schedules import cosine, warmup
        >>> optimizer = surefoot.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> schedule = Schedule(optimizer, lr=warmup(10, cosine(1.0, 0.0, 90)))
        >>> schedule.set_step(55)
        >>> schedule.get_last_lr()
        [0.25]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, last_epoch: int = -1, **schedules: Setting) -> None:
        self.optimizer = check_optimizer(optimizer)
        if not schedules:
            raise ValueError("Schedule needs a schedule for at least one hyperparameter, such as lr=cosine(1, 0, 1000)")
        self._check_values({"last_epoch": last_epoch})
        self._given = schedules
        self._scheduled = list(_scheduled(optimizer, schedules, range(len(optimizer.param_groups))))
        self.last_epoch = last_epoch
        count_steps(optimizer)
        for name in schedules:
            separate(optimizer, name)
        for value in self._scheduled:
            value.start()
        self._initial_step()

    @opaque
    def set_step(self, step: int) -> None:
        """Go to a step: as if the schedule had begun anew and `step()` had been called so many times.

        Raises:
            ValueError: `step` is negative or no whole number.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"set_step takes a whole number >= 0, but got {step!r}")
        self._update_lr(step)

    def _why_not(self, new: Sequence[int]) -> str | None:
        lists = [name for name, setting in self._given.items() if isinstance(setting, list)]
        if lists:
            return f"has a list of schedules for {' and '.join(lists)}, without one for them; give one for all groups"
        for _ in _scheduled(self.optimizer, self._given, new):
            pass  # it raises where a group has no such hyperparameter
        return None

    def _extend(self, count: int) -> None:
        added = list(_scheduled(self.optimizer, self._given, range(self._known_groups(), count)))
        for name in self._given:
            separate(self.optimizer, name)
        for value in added:
            value.start()
        order = list(self._given)
        self._scheduled = sorted([*self._scheduled, *added], key=lambda value: order.index(value.name))
        self._last_lr = self._read()

    def _update_lr(self, epoch: int | None = None) -> None:
        self._take_up_groups()
        target = self.last_epoch + 1 if epoch is None else epoch
        # Groups share schedules, and a schedule takes longer than all else.
        schedules = {id(value.schedule): value.schedule for value in self._scheduled}
        factors = {key: float(schedule(target)) for key, schedule in schedules.items()}
        for value in self._scheduled:
            value.turn(self.last_epoch, factors[id(value.schedule)])
        self.last_epoch = target
        self._last_lr = self._read()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the initial values, and the schedules for reading; all of it fits into JSON."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "scheduled": [value.state() for value in self._scheduled],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state dict was made.

        The schedules are the constructor's: a run may be prolonged by a longer one.  Values that have not been
        changed since this object set them get the saved ones; the others, such as those of an optimizer state loaded
        before, stay.

        Raises:
            ValueError: it schedules other hyperparameters or groups, or holds what is not a number; this schedule is as
                it was.
        """
        if self._known_groups() != len(self.optimizer.param_groups):
            fresh = self._adopt_groups()
            for value in self._scheduled:
                if value.index in fresh:
                    value.last = value.read()
        saved = [(value["name"], value["group"], value["item"]) for value in state_dict["scheduled"]]
        present = [(value.name, value.index, value.item) for value in self._scheduled]
        if saved != present:
            raise ValueError(
                f"the state dict schedules {_listed(saved)}, but this Schedule has {_listed(present)}; make it with "
                "the same hyperparameters, for the same param groups"
            )
        for value, state in zip(self._scheduled, state_dict["scheduled"], strict=True):
            for name in ("base", "last"):
                ANY(f"{name} of {value.name}", state[name])
        for value, state in zip(self._scheduled, state_dict["scheduled"], strict=True):
            value.load(state)
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = self._read()


class ScheduledValue:
    """One number of one param group and its schedule.

    Args:
        optimizer: whose group it is; loading a state gives it new groups, so none is kept here.
        index: the number of the param group.
        name: the hyperparameter.
        item: which number of a tuple, None if it is no tuple.
        schedule: steps to factors, or to values if it is `Absolute`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, index: int, name: str, item: int | None, schedule: Function
    ) -> None:
        self.optimizer = optimizer
        self.index = index
        self.name = name
        self.item = item
        self.schedule = schedule
        self.base = 0.0
        self.last: float | None = None

    @property
    def group(self) -> dict[str, Any]:
        """The param group."""
        return self.optimizer.param_groups[self.index]

    def start(self) -> None:
        """Take the initial value: the group's `initial_...`, or the present one, which is then noted there."""
        initial = self.group.setdefault(f"initial_{self.name}", _copied(self.group[self.name]))
        self.base = float(initial if self.item is None else initial[self.item])

    def read(self) -> float:
        """Return the present value."""
        value = self.group[self.name]
        return float(value if self.item is None else value[self.item])

    def write(self, value: float) -> None:
        """Set the value; a tensor is filled in place."""
        if self.item is None:
            put(self.group, self.name, value)
            return
        put_item(self.group, self.name, self.item, value)

    def turn(self, present: int, factor: float) -> None:
        """Set the value for a factor; one changed at step `present` by someone else becomes the measure."""
        if isinstance(self.schedule, Absolute):
            self.write(factor)
        else:
            value = self.read()
            if self.last is not None and value != self.last:
                # From a factor 0 there is no way back to a measure: the value itself is the new one.
                self.base = value / (float(self.schedule(present)) or 1.0)
            self.write(self.base * factor)
        # Read again, since a float32 tensor has rounded it.
        self.last = self.read()

    def state(self) -> dict[str, Any]:
        """Return what is saved."""
        schedule = self.schedule.to_dict() if isinstance(self.schedule, Curve) else None
        own = {
            "name": self.name,
            "group": self.index,
            "item": self.item,
            "base": self.base,
            "last": self.last,
        }
        return {**own, "schedule": schedule}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what was saved."""
        if self.read() == self.last:
            self.write(state["last"])
        self.base, self.last = state["base"], state["last"]


def _copied(value: Any) -> Any:
    return tuple(copied(item) for item in value) if isinstance(value, tuple) else copied(value)


def _listed(scheduled: list[tuple[str, int, int | None]]) -> str:
    names = [name if item is None else f"{name}[{item}]" for name, _, item in scheduled]
    return ", ".join(f"{name} of group {group}" for name, (_, group, _) in zip(names, scheduled, strict=True))


def _scheduled(
    optimizer: torch.optim.Optimizer, schedules: Mapping[str, Setting], indices: Sequence[int]
) -> Iterator[ScheduledValue]:
    """Yield the scheduled values of some param groups."""
    groups = optimizer.param_groups
    for name, setting in schedules.items():
        settings = setting if isinstance(setting, list) else [setting] * len(groups)
        if len(settings) != len(groups):
            raise ValueError(f"{name} has {len(settings)} schedules, but the optimizer has {len(groups)} param groups")
        for index in indices:
            if name not in groups[index]:
                known = ", ".join(key for key in groups[index] if key != "params")
                raise ValueError(f"param group {index} has no hyperparameter {name!r} to schedule; it has: {known}")
            for item, part in _parts(name, groups[index][name], settings[index]):
                yield ScheduledValue(optimizer, index, name, item, part)


def _parts(name: str, value: Any, setting: Any) -> list[tuple[int | None, Function]]:
    """Return the numbers of a hyperparameter that have a schedule: their places and their schedules."""
    if setting is None:
        return []
    several = isinstance(value, tuple)
    needed = f"a tuple of {len(value)} schedules, None for what stays" if several else "one schedule"
    parts = setting if isinstance(setting, tuple) else (setting,)
    if several != isinstance(setting, tuple) or (several and len(parts) != len(value)):
        raise ValueError(f"{name} is {value!r} and needs {needed}, but got {setting!r}")
    for part in parts:
        if part is not None and not callable(part):
            raise TypeError(f"the schedule of {name} must be a curve or a function, but got {part!r}")
    return [(item if several else None, part) for item, part in enumerate(parts) if part is not None]
