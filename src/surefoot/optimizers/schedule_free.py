"""AdamW, SGD and RAdam without a schedule: the weights to evaluate are an average that the steps keep up to date."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import ema_of_square, larger, readable, rectification, smaller
from surefoot.rule import STEP, Scalar, Slot, narrow, scalar_dtype
from surefoot.rule.hyperparameters import (
    LR,
    WEIGHT_DECAY,
    Each,
    Eps,
    Interval,
    LearningRate,
    Number,
    at_least_zero,
    finite,
)
from surefoot.state.check import check_state, format_param
from surefoot.state.convert import plain_param
from surefoot.state.formats import CORRECTION
from surefoot.tensors.fit import unfit_param
from surefoot.tensors.modes import has_no_values
from surefoot.tensors.shards import to_local

_MOMENTUM = Interval("Invalid momentum value: ", high=1.0, low_open=True, high_open=True)
_BETAS = Each(
    (
        Interval("Invalid beta parameter at index 0: ", high=1.0, low_open=True, high_open=True),
        Interval("Invalid beta parameter at index 1: ", high=1.0, high_open=True),
    )
)
_POWER = finite("r", low=-math.inf)
_LR_POWER = finite("weight_lr_power")
_Betas = Annotated[
    tuple[float, float],
    _BETAS,
    "(beta1, beta2): weight of the average x in the parameters, decay of the average of g**2",
]
_Decay = Annotated[Number, WEIGHT_DECAY, "multiple of the parameter that is added to the direction"]
_WarmUp = Annotated[int, at_least_zero("warmup_steps"), "steps in which the learning rate grows to `lr`"]
_Power = Annotated[float, _POWER, "power of the step's number in its weight in the average"]
_LrPower = Annotated[float, _LR_POWER, "power of the greatest learning rate so far in that weight"]

_TINY = 1e-38
"""Stands for a sum of weights that is zero, and so are its parts."""
_JUST_TRACTABLE = 4.001
"""At 4 itself the variance of the adaptive learning rate is infinite."""
TRAIN_WEIGHTS, EVAL_WEIGHTS = "y", "x"
"""Keys of the state: of the weights to train while parameters hold those to evaluate, and in state dicts the other way
round."""
_Held = tuple[dict[str, Any], Tensor, dict[str, Any]]


def _momentum(group: Mapping[str, Any]) -> float:
    """Return the momentum of a group; 1, under which y is x, where a transform hides it."""
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    return 1.0 if isinstance(momentum, Tensor) and has_no_values(momentum) else float(momentum)


class ScheduleFree(Optimizer):
    """What the schedule-free optimizers share: two sets of weights, one in the parameters at a time.

    While training the parameters hold y, at which gradients are taken.  `eval` lets them hold x, the average, and
    `train` y again, with the same bits; a step in eval mode is refused.  A state dict holds x beside y in either mode,
    under the keys "x" and "y" of each parameter's state, whichever the model has not.

    x is not kept: y = (1 - m) * z + m * x with the momentum m of the step that made y, which is kept as
    `last_momentum`.  So a momentum that changes moves y, in the next step, and never x.
    """

    scalars = (STEP, Scalar("weight_sum"), Scalar("lr_max", init=-1.0), Scalar("last_momentum", init=_momentum))
    flags = ("weight_decay",)
    has_modes = True
    eval_slots = (Slot(TRAIN_WEIGHTS, float8=False),)
    also_called = MappingProxyType({"k": ("step",), "scheduled_lr": ()})
    derived_state = (EVAL_WEIGHTS,)
    refused_options = {"ema": "its average x is what an EMA is for; evaluate inside of `with optimizer.eval_mode():`"}

    def train(self) -> None:
        """Let the parameters hold the weights to train.

        What was written to them in eval mode, by loading a model for instance, counts as new weights to evaluate; an
        element that was not written gets back the bits that it had.

        Raises:
            RuntimeError: a parameter has changed so that its state does not fit it; nothing has changed then.
        """
        with self._on_host():
            self._train(self.param_groups)

    def eval(self) -> None:
        """Let the parameters hold the weights to evaluate, and to ship.

        Raises:
            RuntimeError: a parameter has changed so that its state does not fit it; nothing has changed then.
        """
        with self._on_host(), torch.no_grad():
            found = self._in_mode(self.param_groups, train=True)
            new = [self._eval_weights(*held).to(held[1].dtype) for held in found]
            for (_, param, entry), weights in zip(found, new, strict=True):
                trained = param.detach().clone()
                param.copy_(weights)
                entry[TRAIN_WEIGHTS] = weights.copy_(trained)
            for group in self.param_groups:
                group["train_mode"] = False

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Let the parameters hold the weights to evaluate inside a `with` block, then those that they held before.

        Each group is in the mode afterwards in which it was; one that is added inside the block, in that of the others.
        """
        training = [bool(group["train_mode"]) for group in self.param_groups]
        self.eval()
        try:
            yield
        finally:
            training += [all(training)] * (len(self.param_groups) - len(training))
            with self._on_host():
                self._train(list(compress(self.param_groups, training)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as any optimizer does; it is in eval mode if all others are.

        Raises:
            TypeError, ValueError: see `Optimizer.add_param_group`.
        """
        inherits = isinstance(param_group, dict) and "train_mode" not in param_group and bool(self.param_groups)
        training = any(group["train_mode"] for group in self.param_groups)
        super().add_param_group(param_group)
        if inherits:
            param_group["train_mode"] = training

    def derive_state(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the weights to evaluate, where the parameter holds those to train."""
        if not group.get("train_mode", True) or entry.get("z") is None:
            return {}
        check_state(self.spec, group, param, entry)
        with torch.no_grad():
            return {EVAL_WEIGHTS: self._eval_weights(group, param, entry).to(param.dtype)}

    def exact_param(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """Return the full value of a parameter; in eval mode, where a correction belongs to y, x before rounding."""
        if group["train_mode"] or CORRECTION not in entry:
            return super().exact_param(group, param, entry)
        if (kept := entry.get(TRAIN_WEIGHTS)) is None:
            return param.detach()
        check_state(self.spec, group, param, entry)
        exact = self._eval_weights(group, kept, entry)
        return torch.where(_same(param.detach(), exact.to(param.dtype)), exact, param.detach())

    def _train(self, groups: list[dict[str, Any]]) -> None:
        """Let the parameters of groups hold the weights to train."""
        found = self._in_mode(groups, train=False)
        with torch.no_grad():
            new = [self._train_weights(*held) for held in found]
            for (_, param, entry), weights in zip(found, new, strict=True):
                param.copy_(weights)
                entry.pop(TRAIN_WEIGHTS, None)
        for group in groups:
            group["train_mode"] = True

    def _in_mode(self, groups: list[dict[str, Any]], *, train: bool) -> list[_Held]:
        """Return the parameters that have been stepped, of groups in a mode, each once and with its state.

        Raises:
            RuntimeError: the state of one does not fit it.
        """
        found: dict[Tensor, _Held] = {}
        for group in groups:
            for param in group["params"] if bool(group["train_mode"]) is train else ():
                entry = self.state.get(param, {})
                if entry.get("z") is not None and param not in found:
                    if (reason := unfit_param(param)) is not None:
                        raise RuntimeError(f"{format_param(group, param)} {reason}")
                    check_state(self.spec, group, param, entry)
                    found[param] = group, param, entry
        return list(found.values())

    @staticmethod
    def _eval_weights(group: Mapping[str, Any], train_weights: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """Return x, in float32 at least: y, in all the bits that the state has of it, seen from z."""
        exact = plain_param(group, train_weights, entry)
        return _interpolated(exact, entry["z"], 1 - 1 / _last_momentum(group, train_weights, entry))

    @classmethod
    def _train_weights(cls, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """Return y where the parameter holds x: as it was, but for elements that are not those that `eval` wrote."""
        momentum = _last_momentum(group, param, entry)
        kept: Tensor | None = entry.get(TRAIN_WEIGHTS)
        if kept is None:
            return _interpolated(param.detach(), entry["z"], 1 - momentum)
        kept = kept.to(param.dtype) if CORRECTION in entry else kept  # of which it is the correction
        written = cls._eval_weights(group, kept, entry).to(param.dtype)
        present = to_local(param.detach())
        if not has_no_values(present) and torch.equal(present, to_local(written)):
            return kept
        made = _interpolated(param.detach(), entry["z"], 1 - momentum)
        return torch.where(_same(param.detach(), written), kept, made)


def _last_momentum(group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> float:
    """Return the momentum by which y follows from x and z, with all digits if it is still the group's.

    Raises:
        RuntimeError: the state has none that is possible.
    """
    present, kept = _momentum(group), entry.get("last_momentum")
    if kept is None or (isinstance(kept, Tensor) and has_no_values(kept)):
        return present
    last = float(kept)
    if math.isclose(present, last, rel_tol=1e-7):  # the state has it in float32
        return present
    if not _MOMENTUM.contains(last) and last != 1:
        raise RuntimeError(
            f"state `last_momentum` of {format_param(group, param)} must be > 0 and <= 1, but is {last}; delete the "
            f"state with `del optimizer.state[param]`"
        )
    return last


def _interpolated(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Return `start + weight * (end - start)`, in float32 at least, laid out over ranks as `start`."""
    wide = torch.promote_types(start.dtype, torch.float32)
    return start.to(wide) + weight * (end.to(wide) - start.to(wide))


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Return where two tensors are the same, NaN being the same as NaN."""
    return (one == other) | (torch.isnan(one) & torch.isnan(other))


def _averaging(
    h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any, last_momentum: Any, lr: Any
) -> dict[str, Any]:
    """Return the numbers of a step of a learning rate: the weight of z in y, and what y and z move by.

    With the weight c of z in x, and the momentum m after m' in the last step, y - z = m' * (x - z) becomes
    (1 - c) * m / m' times as long.

    Raises:
        ValueError: a number, changed since it was given, is out of its range.
    """
    momentum = h.momentum if hasattr(h, "momentum") else h.betas[0]
    _refuse_changed(momentum, lr, h)
    lr_max = narrow(larger(lr_max, lr))
    try:
        weight = step**h.r * lr_max**h.weight_lr_power
    except OverflowError:
        weight = math.inf
    weight_sum = narrow(weight_sum + weight)
    if isinstance(weight_sum, float) and math.isinf(weight_sum):
        raise ValueError(
            f"the weights step**r * lr_max**weight_lr_power of the average are too large for float32 in step {step:g}, "
            f"with r={h.r} and weight_lr_power={h.weight_lr_power}; take smaller powers"
        )
    average = weight / larger(weight_sum, _TINY)
    return {
        "lr_max": lr_max,
        "weight_sum": weight_sum,
        "last_momentum": momentum,
        "toward_z": average + (1 - average) * (1 - _as_stored(momentum) / last_momentum),
        "y_step": lr * (momentum * (1 - average) - 1),
        "neg_lr": -lr,
    }


def _refuse_changed(momentum: Any, lr: Any, h: SimpleNamespace) -> None:
    """Raise ValueError where a number would leave x without an answer; tensors are not read."""
    if any(isinstance(number, Tensor) for number in (momentum, lr, h.weight_lr_power)):
        return
    if not (0 < momentum < 1 and lr >= 0 and h.weight_lr_power >= 0):
        _MOMENTUM("momentum", momentum)
        LR("lr", h.lr)
        _LR_POWER("weight_lr_power", h.weight_lr_power)


def _as_stored(number: Any) -> Any:
    """Return a number, or a tensor of one, rounded as the state has it."""
    return number.to(scalar_dtype()) if isinstance(number, Tensor) else narrow(number)


def _rate(h: SimpleNamespace) -> Any:
    """Return the learning rate: a number if it can be read, so that averages carry all of its digits."""
    return h.lr if getattr(h.lr, "requires_grad", False) else readable(h, h.lr)


def _warmed_up(h: SimpleNamespace, step: Any) -> Any:
    return _rate(h) * smaller(step / h.warmup_steps, 1.0) if h.warmup_steps else _rate(h)


def _moved(param: Tensor, direction: Tensor, z: Tensor, c: Any, flags: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return y and z after a step in a direction, to which weight decay is added."""
    if flags.weight_decay:
        direction = torch.add(direction, param, alpha=c.weight_decay)
    param = torch.add(torch.lerp(param, z, c.toward_z), direction, alpha=c.y_step)
    return param, torch.add(z, direction, alpha=c.neg_lr)


class AdamWScheduleFree(ScheduleFree):
    """AdamW without a schedule of the learning rate.

    With the gradient g at the parameters y, t the number of the step, and lr_t = lr * min(1, t / warmup_steps)::

        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        n = g / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps) + weight_decay * y
        z -= lr_t * n
        x += c * (z - x), c the share of t**r * lr_max**weight_lr_power in the sum of these over all steps
        y = (1 - beta1) * z + beta1 * x

    z begins as the parameters; x, the weights to evaluate, is not kept but follows from y and z.  Call `eval` before
    evaluating or saving the model, and `train` before going on; see `ScheduleFree`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.AdamWScheduleFree([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.eval_mode():
        ...     print([round(value, 4) for value in weight.tolist()])
        [0.9, -1.9]

    Paper: Defazio et al. 2024, "The road less scheduled", algorithm 1.  Numbers and options are those of the authors'
    `schedulefree`; the counts that it keeps for each group are kept for each parameter.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.0025,
        betas: _Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: _Decay = 0,
        warmup_steps: _WarmUp = 0,
        r: _Power = 0.0,
        weight_lr_power: _LrPower = 2.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()) | {"train_mode": True})

    slots = (Slot("z", slow=True, float8=False), Slot("exp_avg_sq", signed=False, slow=True))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any, last_momentum: Any) -> dict[str, Any]:
        beta2 = h.betas[1]
        found = _averaging(h, step, weight_sum, lr_max, last_momentum, _warmed_up(h, step))
        return found | {"beta2": beta2, "weight2": 1 - beta2, "bias_correction2": 1 - beta2**step}

    @staticmethod
    def update(param: Tensor, grad: Tensor, z: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        z = torch.where(c.fresh, param, z)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        direction = grad / (torch.sqrt(exp_avg_sq / c.bias_correction2) + c.eps)
        return *_moved(param, direction, z, c, flags), exp_avg_sq


class SGDScheduleFree(ScheduleFree):
    """SGD without a schedule of the learning rate.

    With the gradient g at the parameters y, t the number of the step, and lr_t = lr * min(1, t / warmup_steps)::

        z -= lr_t * (g + weight_decay * y)
        x += c * (z - x), c the share of t**r * lr_max**weight_lr_power in the sum of these over all steps
        y = (1 - momentum) * z + momentum * x

    z begins as the parameters; x, the weights to evaluate, is not kept but follows from y and z.  Call `eval` before
    evaluating or saving the model, and `train` before going on; see `ScheduleFree`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.SGDScheduleFree([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.eval_mode():
        ...     print([round(value, 4) for value in weight.tolist()])
        [0.8, -1.6]

    Paper: Defazio et al. 2024, "The road less scheduled", algorithm 1.  Numbers and options are those of the authors'
    `schedulefree`; the counts that it keeps for each group are kept for each parameter.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1.0,
        momentum: Annotated[
            float,
            _MOMENTUM,
            "weight of the average x in the parameters",
        ] = 0.9,
        weight_decay: _Decay = 0,
        warmup_steps: _WarmUp = 0,
        r: _Power = 0.0,
        weight_lr_power: _LrPower = 2.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()) | {"train_mode": True})

    slots = (Slot("z", slow=True, float8=False),)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any, last_momentum: Any) -> dict[str, Any]:
        return _averaging(h, step, weight_sum, lr_max, last_momentum, _warmed_up(h, step))

    @staticmethod
    def update(param: Tensor, grad: Tensor, z: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        return _moved(param, grad, torch.where(c.fresh, param, z), c, flags)


class RAdamScheduleFree(ScheduleFree):
    """RAdam without a schedule of the learning rate, and without a warm-up, which the rectification is.

    As `AdamWScheduleFree` with lr_t = lr * rect, and with rho_inf = 2 / (1 - beta2) - 1::

        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        rect = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) if rho > 4

    Before that, in the first few steps, rect is 0, and nothing moves; or with `silent_sgd_phase=False` it is 1 and
    n = g + weight_decay * y.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.RAdamScheduleFree([weight], lr=0.1, silent_sgd_phase=False)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.eval_mode():
        ...     print([round(value, 4) for value in weight.tolist()])
        [0.8, -1.6]

    Papers: Defazio et al. 2024, "The road less scheduled", algorithm 1; Liu et al. 2020, "On the variance of the
    adaptive learning rate and beyond", algorithm 2.  Numbers and options are those of the authors' `schedulefree`; the
    counts that it keeps for each group are kept for each parameter.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.0025,
        betas: _Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: _Decay = 0,
        r: _Power = 0.0,
        weight_lr_power: _LrPower = 2.0,
        silent_sgd_phase: Annotated[bool, "stand still while the variance cannot be rectified"] = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()) | {"train_mode": True})

    slots = (Slot("z", slow=True, float8=False), Slot("exp_avg_sq", signed=False, slow=True))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any, last_momentum: Any) -> dict[str, Any]:
        beta2 = h.betas[1]
        rho, rect = rectification(beta2, step, _JUST_TRACTABLE)
        tractable = rho > 4  # noqa: PLR2004 (the paper's)
        at_first = 0.0 if h.silent_sgd_phase else 1.0
        if isinstance(rho, Tensor):
            rect = torch.where(tractable, rect, at_first)
        elif not tractable:
            rect = at_first
        found = _averaging(h, step, weight_sum, lr_max, last_momentum, _rate(h) * rect)
        return found | {
            "beta2": beta2,
            "weight2": 1 - beta2,
            "bias_correction2": 1 - beta2**step,
            "tractable": tractable,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, z: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        z = torch.where(c.fresh, param, z)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        adapted = grad / (torch.sqrt(exp_avg_sq / c.bias_correction2) + c.eps)
        direction = torch.where(c.tractable, adapted, grad)
        return *_moved(param, direction, z, c, flags), exp_avg_sq
