"""The whole step: what surrounds an update in a training loop, done in the passes that happen anyway.

Clipping and guarding need the gradients' norms first: one reading pass.  The scaling, the average and what telemetry
measures are part of the update.  Optimizers that are no rule do the same through `rows`, by torch's operations.
"""

import math
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from surefoot.engines.bucket import measure
from surefoot.errors import NonFiniteGradientError
from surefoot.locks import Lock
from surefoot.rule import EMA, TELEMETRY, reading
from surefoot.rule.hyperparameters import Check, Interval
from surefoot.tensors.shards import is_sharded, sharded_type, to_local

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.telemetry import Telemetry


class StepOptions(TypedDict, total=False):
    """Options of every optimizer, keyword-only: what happens around the update.

    Attributes:
        max_grad_norm: greatest norm of all gradients together, > 0; larger ones are scaled down in the step, as by
            `torch.nn.utils.clip_grad_norm_`, and `p.grad` stays as it is.  Under this key in a param group: the
            greatest norm of that group's gradients, which then do not count in the others' norm.
        max_grad_value: greatest absolute value of an element of a gradient, > 0, after clipping by norm; also in a
            param group.
        nonfinite: what to do when a gradient holds inf or NaN: `"ignore"`, `"skip"` the step, changing nothing, or
            `"raise"` NonFiniteGradientError, changing nothing.
        ema: decay of an exponential moving average of the parameters, in (0, 1); see `Optimizer.ema_parameters`.
        zero_grad_after_step: call `zero_grad()` at the end of each step.
        telemetry: True, or a `surefoot.telemetry.Telemetry`: measure norms in the step's own pass.
    """

    max_grad_norm: float | None
    max_grad_value: float | None
    nonfinite: str
    ema: float | None
    zero_grad_after_step: bool
    telemetry: "Telemetry | bool | None"


_POSITIVE = "{} must be a number > 0, or None, but is: "
GROUP_RANGES: Mapping[str, Check] = {
    "max_grad_norm": Interval(_POSITIVE.format("`max_grad_norm`"), low_open=True, optional=True),
    "max_grad_value": Interval(_POSITIVE.format("`max_grad_value`"), low_open=True, optional=True),
    "ema": Interval(
        "`ema` must be a decay > 0 and < 1, or None, but is: ", high=1.0, high_open=True, low_open=True, optional=True
    ),
}
_NONFINITE = ("ignore", "skip", "raise")
_PER_GROUP = ("max_grad_value", "ema")


def refuse_unfit(cls: "type[Optimizer]", asked: set[str]) -> None:
    """Raise ValueError when an algorithm does not take an option."""
    if unfit := asked - cls.step_options():
        raise ValueError(f"{cls.__name__} takes no `{min(unfit)}`: its step is its own; do that in the training loop")


def check_group_options(cls: "type[Optimizer]", group: Mapping[str, Any]) -> None:
    """Refuse options that a group cannot have.

    Raises:
        ValueError: an option of the whole optimizer, or one that this algorithm does not take.
    """
    given = {name for name in StepOptions.__annotations__ if group.get(name) is not None}
    if misplaced := given - set(GROUP_RANGES):
        raise ValueError(
            f"`{min(misplaced)}` is an option of {cls.__name__}, not of a param group; give it to {cls.__name__}()"
        )
    refuse_unfit(cls, given)
    if "ema" in given and any(slot.name == "ema" for slot in cls.slots):
        raise ValueError(
            f"{cls.__name__} has a slot `ema` of its own, so that the option `ema` has no place for its average"
        )


class Now(threading.local):
    """The step that a thread is making: each sees its own, and they take turns, so that none undoes another's.

    A turn begins when the closure, which may wait for other threads, has been called; it ends before callbacks and
    hooks are called.

    Attributes:
        lock: what they take turns by; an interrupted turn does not shut its own thread out.
        inside: whether the algorithm runs, so that a call of `step` is one of its base's.
        step: the step's number.
        parts: its parameters.
        measures: whether it is measured.
        skips: whether it changes nothing.
        start: when it began.
    """

    def __init__(self, lock: Any) -> None:
        self.lock, self._holds = lock, False
        self.inside = self.measures = self.skips = False
        self.parts: list[Part] = []
        self.step, self.start = 0, 0.0

    def take_turn(self) -> None:
        """Wait until no other thread is at the parameters."""
        if not self._holds:
            self.lock.acquire()
            self._holds = True

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False
        if self._holds:
            self._holds = False
            self.lock.release()

    def __reduce__(self) -> Any:
        return _nothing_now, ()


def _nothing_now() -> Now:
    return Now(Lock())


@dataclass(eq=False)
class WholeStep:
    """The options of one optimizer that are not its groups', and what its steps have come to.

    Attributes:
        max_grad_norm, nonfinite, zero_grad_after_step, telemetry: see `StepOptions`.
        steps: how many steps were asked for.
        skipped: how many of them were skipped.
        checked: the options, of groups too, that the last step has found allowed.
        roster: who is measured, once that was needed.
        now: the step that is being made.
    """

    max_grad_norm: float | None = None
    nonfinite: str = "ignore"
    zero_grad_after_step: bool = False
    telemetry: Any = None
    steps: int = 0
    skipped: int = 0
    checked: list[Any] = field(default_factory=list, repr=False)
    roster: "Roster | None" = field(default=None, repr=False)
    now: Now = field(default_factory=_nothing_now, repr=False)

    @classmethod
    def take(cls, defaults: dict[str, Any]) -> "WholeStep":
        """Take the options that are not for groups out of an optimizer's defaults.

        Raises:
            ValueError, TypeError: an option is out of its range.
        """
        given = {name: defaults.pop(name) for name in _OWN if name in defaults}
        for name in _PER_GROUP:
            if name in defaults and defaults[name] is None:
                del defaults[name]
        whole = cls(**given)
        whole.check()
        return whole

    def check(self) -> None:
        """Raise when an option is out of its range; make a telemetry where True asks for one."""
        GROUP_RANGES["max_grad_norm"]("max_grad_norm", self.max_grad_norm)
        if self.nonfinite not in _NONFINITE:
            raise ValueError(
                f"`nonfinite` must be one of {', '.join(map(repr, _NONFINITE))}, but is {self.nonfinite!r}"
            )
        if not isinstance(self.zero_grad_after_step, bool):
            raise TypeError(f"`zero_grad_after_step` must be True or False, but is {self.zero_grad_after_step!r}")
        self.telemetry = _telemetry(self.telemetry)

    def asked(self) -> set[str]:
        """Give the names of the options that ask for something."""
        return {name for name in _OWN if getattr(self, name) not in (None, False, "ignore")}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"checked": [], "roster": None}


_OPTIONS = tuple(StepOptions.__annotations__)
_OWN = ("max_grad_norm", "nonfinite", "zero_grad_after_step", "telemetry")


def _telemetry(wish: Any) -> "Telemetry | None":
    if wish is None:
        return None
    from surefoot.telemetry import as_telemetry  # noqa: PLC0415 (on first use)

    return as_telemetry(wish)


@dataclass(eq=False)
class Part:
    """Parameters of one group in a step, and what was measured of them.

    Attributes:
        group: the param group.
        params: the parameters, n of them.
        gradients: sum of squares and largest absolute value of each gradient: float64 of shape (n, 2).
        clip: what the gradients are multiplied with, a number or a 0-d tensor.
        sums: what `rule.TELEMETRY` names, of each parameter: float64 of shape (n, 5).
        before: copies of the parameters before the step, where updates cannot be measured while they are made.
        fresh: for each parameter whether its average is new, where averages are no part of the update.
    """

    group: dict[str, Any]
    params: list[Tensor]
    gradients: Tensor | None = None
    clip: Any = 1.0
    sums: Tensor | None = None
    before: list[Tensor] | None = None
    fresh: list[bool] | None = None


def begin(optimizer: "Optimizer") -> None:
    """Check options that were changed, count a step, and decide whether it is measured."""
    whole, now, options = optimizer.whole_step, optimizer.whole_step.now, _options(optimizer)
    if len(options) != len(whole.checked) or not all(map(is_, options, whole.checked)):
        check_options(optimizer)
        whole.checked = options
    with now.lock:
        whole.steps = now.step = whole.steps + 1
    now.parts, now.skips, now.start = [], False, perf_counter()
    now.measures = whole.telemetry is not None and whole.telemetry.wanted(now.step)


def _options(optimizer: "Optimizer") -> list[Any]:
    """Give what the options of the whole step and of all groups are now."""
    of_groups = [group.get(name) for group in optimizer.param_groups for name in _OPTIONS]
    return [*of_groups, *map(vars(optimizer.whole_step).__getitem__, _OWN)]


def check_options(optimizer: "Optimizer") -> None:
    """Refuse options of the step, of the optimizer's and of its groups', that are out of range or not taken.

    Raises:
        ValueError, TypeError: an option is; nothing has changed.
    """
    whole, cls = optimizer.whole_step, type(optimizer)
    whole.check()
    refuse_unfit(cls, whole.asked())
    for group in optimizer.param_groups:
        check_group_options(cls, group)
        for name, check in GROUP_RANGES.items():
            check(name, group.get(name))


def skip(optimizer: "Optimizer") -> None:
    """Note that this step changes nothing."""
    optimizer.whole_step.skipped += 1
    optimizer.whole_step.now.skips = True


def is_clipped(optimizer: "Optimizer", group: Mapping[str, Any]) -> bool:
    """Whether the gradients of a group are clipped by norm."""
    return bool(optimizer.whole_step.max_grad_norm or group.get("max_grad_norm"))


def needs_reading(optimizer: "Optimizer") -> bool:
    """Whether the gradients' norms must be known before the update."""
    guarded = optimizer.whole_step.nonfinite != "ignore"
    return guarded or any(is_clipped(optimizer, group) for group in optimizer.param_groups)


# Reading


def read_gradients(params: Sequence[Tensor]) -> Tensor:
    """Measure gradients by torch's operations, of sharded ones all shards: float64 of shape (parameters, 2)."""
    return torch.stack([_read(param.grad) for param in params])


def _read(grad: Any) -> Tensor:
    sharded = sharded_type()
    if sharded is not None and isinstance(grad, sharded):
        return torch.stack(
            [_whole(torch.linalg.vector_norm(grad, dtype=torch.float64)).square(), _whole(grad.abs().max())]
        )
    values = _values(grad)
    return measure(reading().measures, (values, values))


def _values(grad: Any) -> Any:
    """Give the real numbers of a gradient."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def guard(optimizer: "Optimizer", parts: Sequence[Part]) -> bool:
    """Decide from what was read of the gradients how they are clipped; tell whether the step is to be made.

    Raises:
        NonFiniteGradientError: a gradient holds inf or NaN and `nonfinite="raise"`; it names the parameters.
        RuntimeError: gradients are to be looked at in a step with `capturable=True`.
    """
    whole = optimizer.whole_step
    if whole.nonfinite != "ignore" and any(group.get("capturable") for group in optimizer.param_groups):
        raise RuntimeError(
            f"nonfinite={whole.nonfinite!r} looks at gradients on the host, which a step with capturable=True must "
            f"not; leave one of them out"
        )
    if whole.nonfinite != "ignore" and (strange := list(_strange(optimizer, parts))):
        if whole.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"the gradients of {listed(strange)} hold inf or NaN; nothing was changed. Look at the loss and the "
                f'learning rate, or pass nonfinite="skip" to leave such steps out'
            )
        skip(optimizer)
        _warn(whole, strange)
        return False
    scale = getattr(optimizer, "grad_scale", None)
    scale = 1.0 if scale is None else scale
    own = [part for part in parts if part.group.get("max_grad_norm")]
    for part in own:
        same_group = [other for other in own if other.group is part.group]
        part.clip = _factor(part.group["max_grad_norm"], same_group, scale)
    others = [part for part in parts if part not in own]
    if whole.max_grad_norm and others:
        clip = _factor(whole.max_grad_norm, others, scale)
        for part in others:
            part.clip = clip
    return True


def _factor(limit: float, parts: Sequence[Part], scale: Any) -> Any:
    """Give what gradients are multiplied with so that their norm is at most `limit`; NaN where the norm is NaN.

    It is a number where the norm is on the host, and stays on the device otherwise.
    """
    squares = [part.gradients[:, 0] for part in parts if part.gradients is not None]
    norm = torch.cat([each.to(squares[0].device) for each in squares]).sum().sqrt() / scale
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return factor.item() if factor.is_cpu else factor


def _strange(optimizer: "Optimizer", parts: Iterable[Part]) -> Iterator[str]:
    """Give the names of parameters whose gradients hold inf or NaN."""
    names = names_of(optimizer)
    for part in parts:
        if part.gradients is not None:
            for index in (~part.gradients[:, 1].isfinite()).nonzero().flatten().tolist():
                yield names[part.params[index]]


def names_of(optimizer: "Optimizer") -> dict[Tensor, str]:
    """Name every parameter."""
    from surefoot.telemetry import parameter_names  # noqa: PLC0415 (on first use)

    params = (param for group in optimizer.param_groups for param in group["params"])
    return dict(zip(params, parameter_names(optimizer), strict=True))


def names_among(optimizer: "Optimizer", params: Iterable[Tensor]) -> list[str]:
    """Name some of the parameters, which need not be the optimizer's any more."""
    known = names_of(optimizer)
    return [known.get(param, "a removed parameter") for param in params]


def listed(names: Sequence[str]) -> str:
    """Name parameters in a message, the first few if there are many."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more parameters"


def _warn(whole: WholeStep, strange: Sequence[str]) -> None:
    """Warn of the first skipped step, and again, each time they have doubled, while most steps are skipped."""
    skipped, steps = whole.skipped, whole.steps
    most = skipped >= _MANY and skipped & (skipped - 1) == 0 and 2 * skipped > steps
    if skipped == 1 or most:
        warnings.warn(
            f"step {steps} was skipped since the gradients of {listed(strange)} hold inf or NaN; {skipped} of {steps} "
            f"steps were skipped so far",
            RuntimeWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """Give the `stacklevel` of the code that called `step`, outside torch and surefoot, for a warning of the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level


_OURS = ("surefoot", "torch")


# After the update


def finish(optimizer: "Optimizer") -> Any:
    """Average what the update has not averaged, and give what was measured, None if nothing was."""
    now = optimizer.whole_step.now
    if not now.skips:
        for part in now.parts:
            if part.fresh is not None:
                _average(optimizer, part)
    raw = _raw(optimizer) if now.measures else None
    now.parts = []
    return raw


def clear(optimizer: "Optimizer") -> None:
    """Drop the gradients at the very end of a step, where that is asked for."""
    if optimizer.whole_step.zero_grad_after_step:
        optimizer.zero_grad()


def _average(optimizer: "Optimizer", part: Part) -> None:
    from surefoot.averages import Averaging  # noqa: PLC0415 (it is an optimizer itself)

    known = part.fresh or []
    for fresh in set(known):
        params = [param for param, new in zip(part.params, known, strict=True) if new is fresh]
        averages = [optimizer.state[param][EMA.name] for param in params]
        Averaging(averages, [param.detach() for param in params]).move(1.0 if fresh else 1 - part.group["ema"])


def _raw(optimizer: "Optimizer") -> Any:
    """Put together what telemetry is to get of this step."""
    from surefoot.telemetry import RawStep  # noqa: PLC0415 (on first use)

    whole, now = optimizer.whole_step, optimizer.whole_step.now
    roster = _roster(optimizer, now.parts)
    blocks = [_sums(now, part) for part in now.parts] or [torch.zeros(0, 5, dtype=torch.float64)]
    sums = blocks[0] if len(blocks) == 1 else torch.cat([block.to(blocks[0].device) for block in blocks])
    return RawStep(
        step=now.step,
        names=roster.names,
        sums=sums if roster.chosen is None else sums[roster.chosen],
        lrs=_rates(now.parts, roster.chosen),
        clip=_least([part.clip for part in now.parts]),
        skipped=whole.skipped,
        seconds=perf_counter() - now.start,
    )


def _rates(parts: Sequence[Part], chosen: Tensor | None) -> tuple[float, ...]:
    """Give the learning rates of those who are measured; one if all parts share it."""
    rates = [float(part.group.get("lr", math.nan)) for part in parts]
    if len(set(rates)) <= 1:
        return tuple(rates[:1]) or (math.nan,)
    each = [rate for rate, part in zip(rates, parts, strict=True) for _ in part.params]
    return tuple(each) if chosen is None else tuple(each[index] for index in chosen.tolist())


class Roster(NamedTuple):
    """Who is measured of the parameters of some parts.

    Attributes:
        parts: the parts, not held.
        given: the names that the groups gave.
        chosen: positions of those that telemetry selects, None if it selects all.
        names: their names.
    """

    parts: list["weakref.ref[Part]"]
    given: list[list[str] | None]
    chosen: Tensor | None
    names: tuple[str, ...]


def _roster(optimizer: "Optimizer", parts: Sequence[Part]) -> Roster:
    """Give who is measured in this step; kept for steps of the same parts and names."""
    whole, old = optimizer.whole_step, optimizer.whole_step.roster
    given = [group.get("param_names") for group in optimizer.param_groups]
    if old is not None and given == old.given and [part() for part in old.parts] == parts:
        return old
    known = names_of(optimizer)
    names = [known[param] for part in parts for param in part.params]
    chosen = [index for index, name in enumerate(names) if whole.telemetry.selects(name)]
    measured = tuple(names[index] for index in chosen)
    whole.roster = new = Roster(
        parts=list(map(weakref.ref, parts)),
        given=[None if each is None else list(each) for each in given],
        chosen=None if len(chosen) == len(names) else torch.tensor(chosen, dtype=torch.int64),
        names=old.names if old is not None and measured == old.names else measured,
    )
    return new


def _least(clips: Sequence[Any]) -> Any:
    on_device = [clip for clip in clips if isinstance(clip, Tensor)]
    return torch.stack(on_device).min() if on_device else min(clips, default=1.0)


def _sums(now: Now, part: Part) -> Tensor:
    """Give a row for each parameter: squares of gradient, parameter, update, largest gradient, how many are strange."""
    return part.sums if part.sums is not None and not now.skips else _sums_afterwards(now, part)


@torch.no_grad()
def _sums_afterwards(now: Now, part: Part) -> Tensor:
    """Measure by torch's operations what the update has not measured."""
    gradients = read_gradients(part.params) if part.gradients is None else part.gradients
    before = part.params if part.before is None or now.skips else part.before
    squares = [torch.stack([_square(p), _square(p - q)]) for p, q in zip(part.params, before, strict=True)]
    strange = torch.zeros(len(gradients), 1, dtype=torch.float64, device=gradients.device)
    suspects = ~gradients[:, 1].isfinite() if gradients.is_cpu else torch.ones(len(gradients))
    for index in suspects.nonzero().flatten().tolist():
        strange[index] = _count_strange(part.params[index].grad)
    return torch.cat([gradients[:, :1], torch.stack(squares), gradients[:, 1:], strange], dim=1)


def _square(tensor: Tensor) -> Tensor:
    if is_sharded(tensor):
        return _whole(torch.linalg.vector_norm(tensor, dtype=torch.float64)).square()
    return measure(TELEMETRY[1:2], (to_local(tensor),))[0]


def _count_strange(grad: Any) -> Tensor:
    return _whole((~_values(grad).isfinite()).sum())


def _whole(number: Any) -> Tensor:
    """Give a number of all shards."""
    sharded = sharded_type()
    whole: Tensor = number.full_tensor() if sharded is not None and isinstance(number, sharded) else number
    return whole.double()


_SHOWN, _MANY = 5, 16
