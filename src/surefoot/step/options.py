"""Options of the step that every optimizer has: what they may be, and those of one optimizer with what came of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from surefoot.distributed import dividing_group
from surefoot.rule import DIRECTED, FLOAT8, AlgorithmSpec
from surefoot.rule.hyperparameters import Check, Interval
from surefoot.step.context import StepContext, new_context

if TYPE_CHECKING:
    from surefoot.telemetry import Telemetry


class StepOptions(TypedDict, total=False):
    """Options of every optimizer, keyword-only: what happens around the update.

    Attributes:
        max_grad_norm: greatest norm of all gradients together, > 0; larger ones are scaled down in the step, as by
            `torch.nn.utils.clip_grad_norm_`, and `p.grad` stays as it is; inf is no limit.  Under this key in a param
            group: the greatest norm of that group's gradients, which then do not count in the others' norm.
        max_grad_value: greatest absolute value of an element of a gradient, > 0, after clipping by norm; also in a
            param group; inf is no limit.
        nonfinite: what to do when a gradient holds inf or NaN: `"ignore"`, `"skip"` the step, changing nothing, or
            `"raise"` NonFiniteGradientError, changing nothing.
        gradient_centralization: subtract from each row of a gradient its mean, over all dimensions but the first;
            vectors stay as they are (Yong et al. 2020, "Gradient centralization", section 3.1).  After clipping by
            norm, before clipping by value.  Under this key also in a param group, as the next two.
        cautious: leave out the elements of the step's direction that oppose the gradient, and lengthen the others by as
            much (Liang et al. 2024, "Cautious optimizers", algorithm 1).
        cautious_weight_decay: let decoupled weight decay act only where it and the step have the same sign (Chen et
            al. 2025, "Cautious weight decay", algorithm 1).
        ema: decay of an exponential moving average of the parameters, in (0, 1); see `Optimizer.ema_parameters`.
        zero_grad_after_step: call `zero_grad()` at the end of each step.  A GradScaler does not call the steps that it
            skips, unless `fused=True`: then call `zero_grad()` yourself.
        process_group: the `torch.distributed` group over which the parameters are divided where they do not tell
            themselves: by FSDP1, or by `ZeroRedundancyOptimizer`, whose group is found where the optimizer is made by
            it.  Needed by options that look at all gradients, `max_grad_norm` and `nonfinite`.
        telemetry: True, or a `surefoot.telemetry.Telemetry`: measure norms in the step's own pass.
    """

    max_grad_norm: float | None
    max_grad_value: float | None
    nonfinite: str
    gradient_centralization: bool | None
    cautious: bool | None
    cautious_weight_decay: bool | None
    ema: float | None
    zero_grad_after_step: bool
    process_group: Any
    telemetry: "Telemetry | bool | None"


def check_choice(name: str, value: Any) -> None:
    """Raise TypeError unless an option is True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, but is {value!r}")


def check_limit(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless a limit of gradients is a number > 0, or None."""
    complaint = f"`{name}` must be a number > 0, or None, but is: "
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise TypeError(f"{complaint}{value!r}")
    Interval(complaint, low_open=True, optional=True)(name, value)


GROUP_RANGES: Mapping[str, Check] = {
    "max_grad_norm": check_limit,
    "max_grad_value": check_limit,
    "gradient_centralization": check_choice,
    "cautious": check_choice,
    "cautious_weight_decay": check_choice,
    "ema": Interval(
        "`ema` must be a decay > 0 and < 1, or None, but is: ", high=1.0, high_open=True, low_open=True, optional=True
    ),
}
_NONFINITE = ("ignore", "skip", "raise")


@dataclass(frozen=True)
class ReleaseOptions:
    """What is done, before the update, to gradients that are never there all at once.

    Attributes:
        max_previous_grad_norm: greatest norm of the previous step's gradients.
        max_param_grad_norm: greatest norm of the gradient of each parameter.
        nonfinite_params: what to do with a parameter whose gradient holds inf or NaN.
    """

    max_previous_grad_norm: float | None = None
    max_param_grad_norm: float | None = None
    nonfinite_params: str = "ignore"

    def __post_init__(self) -> None:
        for name in ("max_previous_grad_norm", "max_param_grad_norm"):
            check_limit(name, getattr(self, name))
        _check_nonfinite("nonfinite_params", self.nonfinite_params)

    @property
    def clips(self) -> bool:
        """Whether gradients are multiplied with something."""
        return self.max_previous_grad_norm is not None or self.max_param_grad_norm is not None

    @property
    def measures(self) -> bool:
        """Whether gradients must be measured before the update."""
        return self.clips or self.nonfinite_params != "ignore"

    def of_whole_params(self) -> str | None:
        """Return the name of an option that needs to know the whole gradient of a parameter, if there is one."""
        if self.max_param_grad_norm is not None:
            return "max_param_grad_norm"
        return "nonfinite_params" if self.nonfinite_params != "ignore" else None


def _check_nonfinite(name: str, value: Any) -> None:
    if value not in _NONFINITE:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, _NONFINITE))}, but is {value!r}")


_PER_GROUP = ("max_grad_value", "gradient_centralization", *DIRECTED, "ema")
ALL_STEP_OPTIONS = tuple(StepOptions.__annotations__)
_OF_OPTIMIZER = ("max_grad_norm", "nonfinite", "zero_grad_after_step", "process_group", "telemetry")


@dataclass(eq=False)
class OptimizerOptions:
    """The options of one optimizer that are not its groups'; see `StepOptions`.

    Attributes:
        repeated: whether its maker, a `ZeroRedundancyOptimizer`, puts them into every group as well.
    """

    max_grad_norm: float | None = None
    nonfinite: str = "ignore"
    zero_grad_after_step: bool = False
    process_group: Any = field(default=None, repr=False)
    telemetry: Any = None
    repeated: bool = False

    def check(self) -> None:
        """Raise when an option is out of its range; make a telemetry where True asks for one."""
        GROUP_RANGES["max_grad_norm"]("max_grad_norm", self.max_grad_norm)
        _check_nonfinite("nonfinite", self.nonfinite)
        if not isinstance(self.zero_grad_after_step, bool):
            raise TypeError(f"`zero_grad_after_step` must be True or False, but is {self.zero_grad_after_step!r}")
        self.telemetry = _telemetry(self.telemetry)

    def own(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what of a group is its own: without options that are there as those of the whole optimizer."""
        if not self.repeated:
            return group
        return {k: v for k, v in group.items() if k not in _OF_OPTIMIZER or v != getattr(self, k)}

    def requested(self) -> set[str]:
        """Return the names of the options that ask for something."""
        asking = (name for name in _OF_OPTIMIZER if name != "process_group")
        return {name for name in asking if getattr(self, name) not in (None, False, "ignore")}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": None}  # which is this process's only

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizerOptions":
        return OptimizerOptions(**{name: self._copied(name, memo) for name in (*_OF_OPTIMIZER, "repeated")})

    def _copied(self, name: str, memo: dict[int, Any]) -> Any:
        value = getattr(self, name)
        return value if name == "process_group" else deepcopy(value, memo)


@dataclass(eq=False)
class StepStatistics:
    """What the steps of one optimizer have come to.

    Attributes:
        steps: how many steps were asked for.
        skipped: how many of them were skipped.
        skipped_params: how many times a parameter was left out of one (`release_gradients(nonfinite_params="skip")`).
    """

    steps: int = 0
    skipped: int = 0
    skipped_params: int = 0


@dataclass(eq=False)
class Stepping:
    """What an optimizer keeps of its steps beside its groups and state.

    Attributes:
        options: its options.
        statistics: what the steps have come to.
        checked: the options, of groups too, that the last step has found allowed.
        metric_names: who is measured, once that was needed.
        exchange: what puts numbers of the parameters together over ranks.
        context: the step that is being made.
        constructed: whether the optimizer's own constructor has made this, so that its groups are its own.
    """

    options: OptimizerOptions = field(default_factory=OptimizerOptions)
    statistics: StepStatistics = field(default_factory=StepStatistics)
    checked: list[Any] = field(default_factory=list, repr=False)
    metric_names: Any = field(default=None, repr=False)
    exchange: Any = field(default=None, repr=False)
    context: StepContext = field(default_factory=new_context, repr=False)
    constructed: bool = field(default=True, repr=False)

    @classmethod
    def take(cls, spec: AlgorithmSpec, defaults: dict[str, Any]) -> "Stepping":
        """Take the options that are not for groups out of an optimizer's defaults, but hyperparameters of its own.

        Raises:
            ValueError, TypeError: an option is out of its range.
        """
        own = spec.own_options
        given = {name: defaults.pop(name) for name in _OF_OPTIMIZER if name in defaults and name not in own}
        for name in _PER_GROUP:
            if name in defaults and name not in own and defaults[name] is None:
                del defaults[name]
        found = dividing_group()
        if given.get("process_group") is None:
            given["process_group"] = found
        options = OptimizerOptions(**given, repeated=found is not None)
        options.check()
        return cls(options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"checked": [], "metric_names": None, "exchange": None}


def _telemetry(wish: Any) -> "Telemetry | None":
    if wish is None:
        return None
    from surefoot.telemetry import as_telemetry  # noqa: PLC0415 (on first use)

    return as_telemetry(wish)


def refuse_unsupported(spec: AlgorithmSpec, requested: Iterable[str]) -> None:
    """Raise ValueError when an algorithm does not take an option."""
    if unsupported := set(requested) - spec.step_options:
        option = min(unsupported)
        if option in spec.refused_options:
            raise ValueError(f"{spec.name} takes no `{option}`: {spec.refused_options[option]}")
        undirected = option in DIRECTED and spec.update is not None
        if option == "cautious_weight_decay" and "cautious" in spec.flags:
            reason = "its weight decay is part of the gradient; leave it out, or take an optimizer that decouples it"
        elif undirected:
            reason = "its step goes where the gradient goes, or it does not tell its direction; leave it out"
        else:
            reason = "it has a custom step; do that in the training loop"
        raise ValueError(f"{spec.name} takes no `{option}`: {reason}")


def group_ranges(spec: AlgorithmSpec) -> Iterator[tuple[str, Check]]:
    """Yield the options that a group of this algorithm may have, with their checks."""
    return ((option, check) for option, check in GROUP_RANGES.items() if option not in spec.own_options)


def check_group_options(spec: AlgorithmSpec, group: Mapping[str, Any]) -> None:
    """Refuse options that a group cannot have.

    Raises:
        ValueError: an option of the whole optimizer, or one that the algorithm does not take.
    """
    given = {option for option in ALL_STEP_OPTIONS if group.get(option) is not None} - spec.own_options
    if misplaced := given - set(GROUP_RANGES):
        raise ValueError(
            f"`{min(misplaced)}` is an option of {spec.name}, not of a param group; give it to {spec.name}()"
        )
    refuse_unsupported(spec, {option for option in given if group[option] is not False})
    coupled = "decoupled_weight_decay" in spec.flags and not group.get("decoupled_weight_decay")
    if group.get("cautious_weight_decay") and coupled:
        raise ValueError(
            f"`cautious_weight_decay` of {spec.name} needs weight decay that is no part of the gradient: pass "
            f"decoupled_weight_decay=True as well"
        )
    if "ema" in given and any(slot.name == "ema" for slot in spec.slots):
        raise ValueError(
            f"{spec.name} has a slot `ema` of its own, so that the option `ema` has no place for its average"
        )


def refuse_short(spec: AlgorithmSpec, group: Mapping[str, Any]) -> None:
    """Raise ValueError when a group of an algorithm with a custom step asks for storage that it does not take."""
    asked = [option for option in ("rounding", "master_weight_bits") if group.get(option) not in (None, "nearest")]
    asked = [option for option in asked if option not in spec.constructor]
    asked += ["state_dtype"] * (group.get("state_dtype") == FLOAT8)
    if asked:
        option = asked[0]
        raise ValueError(f"{spec.name} has a custom step, which takes no `{option}={group[option]!r}`; leave it out")


def refuse_eval_mode(spec: AlgorithmSpec, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise RuntimeError when an algorithm with two modes is not in train mode, in which alone it steps."""
    if spec.has_modes and not all(group.get("train_mode", True) for group in groups):
        raise RuntimeError(
            f"{spec.name} is in eval mode, in which the parameters hold the weights to evaluate; call "
            f"optimizer.train() before backward and step()"
        )


def check_changed(stepping: Stepping, spec: AlgorithmSpec, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that were changed since the last step to what is out of range or not taken.

    Raises:
        ValueError, TypeError: an option is; nothing has changed.
        RuntimeError: an algorithm with two modes is not in train mode, or groups do not go together.
    """
    spec.check_groups(groups)
    now = [group.get(option) for group in groups for option in ALL_STEP_OPTIONS]
    now += map(vars(stepping.options).__getitem__, _OF_OPTIMIZER)
    if spec.has_modes:
        now += [group.get("train_mode") for group in groups]
    if len(now) == len(stepping.checked) and all(map(is_, now, stepping.checked)):
        return
    stepping.options.check()
    refuse_unsupported(spec, stepping.options.requested())
    refuse_eval_mode(spec, groups)
    for group in map(stepping.options.own, groups):
        own = spec.of(group)
        check_group_options(own, group)
        for option, check in group_ranges(own):
            check(option, group.get(option))
    stepping.checked = now
