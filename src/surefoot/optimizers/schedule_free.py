"""AdamW, SGD and RAdam without a schedule: the weights to evaluate are an average that the steps keep up to date."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import ema_of_square, larger, readable, rectification, smaller
from surefoot.rule import STEP, Scalar, Slot, narrow
from surefoot.rule.hyperparameters import (
    WEIGHT_DECAY,
    Each,
    Eps,
    Interval,
    LearningRate,
    Number,
    at_least_zero,
    number,
)
from surefoot.state.convert import plain_param
from surefoot.tensors.shards import to_local

_BETAS = Each(
    (
        Interval("Invalid beta parameter at index 0: ", high=1.0, low_open=True, high_open=True),
        Interval("Invalid beta parameter at index 1: ", high=1.0, high_open=True),
    )
)
_Betas = Annotated[
    tuple[float, float],
    _BETAS,
    "(beta1, beta2): weight of the average x in the parameters, decay of the average of g**2",
]
_Decay = Annotated[Number, WEIGHT_DECAY, "multiple of the parameter that is added to the direction"]
_WarmUp = Annotated[int, at_least_zero("warmup_steps"), "steps in which the learning rate grows to `lr`"]
_Power = Annotated[float, number("r"), "power of the step's number in its weight in the average"]
_LrPower = Annotated[float, number("weight_lr_power"), "power of the greatest learning rate so far in that weight"]

TRAIN_WEIGHTS, EVAL_WEIGHTS = "y", "x"
"""Keys of the state: of the weights to train while parameters hold those to evaluate, and in state dicts the other way
round."""


class ScheduleFree(Optimizer):
    """What the schedule-free optimizers share: two sets of weights, one in the parameters at a time.

    While training the parameters hold y, at which gradients are taken.  `eval` lets them hold x, the average, and
    `train` y again, with the same bits; a step in eval mode is refused.  A state dict holds x beside y in either mode,
    under the keys "x" and "y" of each parameter's state, whichever the model has not.
    """

    scalars = (STEP, Scalar("weight_sum"), Scalar("lr_max", init=-1.0))
    flags = ("weight_decay",)
    has_modes = True
    derived_state = (EVAL_WEIGHTS,)
    refused_options = {"ema": "its average x is what an EMA is for; evaluate inside of `with optimizer.eval_mode():`"}

    def train(self) -> None:
        """Let the parameters hold the weights to train.

        What was written to them in eval mode, by loading a model for instance, counts as new weights to evaluate.
        """
        with torch.no_grad():
            for group, param, entry in self._in_mode(train=False):
                kept = entry.pop(TRAIN_WEIGHTS, None)
                if kept is None or not _equal(param, self._eval_weights(group, kept, entry)):
                    kept = _interpolated(param, entry["z"], 1 - _momentum(group))
                param.copy_(kept)
        self._set_mode(train=True)

    def eval(self) -> None:
        """Let the parameters hold the weights to evaluate, and to ship."""
        with torch.no_grad():
            new = [
                (param, entry, self._eval_weights(group, param, entry))
                for group, param, entry in self._in_mode(train=True)
            ]
            for param, entry, weights in new:
                entry[TRAIN_WEIGHTS] = param.detach().clone()
                param.copy_(weights)
        self._set_mode(train=False)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Let the parameters hold the weights to evaluate inside a `with` block, then those that they held before."""
        was_training = [group for group in self.param_groups if group["train_mode"]]
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    def derive_state(self, group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the weights to evaluate, where the parameter holds those to train."""
        if not group["train_mode"] or entry.get("z") is None:
            return {}
        with torch.no_grad():
            return {EVAL_WEIGHTS: self._eval_weights(group, param, entry)}

    def _in_mode(self, *, train: bool) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
        """Yield the parameters that have been stepped, of groups in a mode, each with its state."""
        for group in self.param_groups:
            if bool(group["train_mode"]) is train:
                for param in group["params"]:
                    if (entry := self.state.get(param, {})).get("z") is not None:
                        yield group, param, entry

    def _set_mode(self, *, train: bool) -> None:
        for group in self.param_groups:
            group["train_mode"] = train

    @staticmethod
    def _eval_weights(group: Mapping[str, Any], train_weights: Tensor, entry: Mapping[str, Any]) -> Tensor:
        """Return x in the dtype of the parameter: y, in all the bits that the state has of it, seen from z."""
        exact = plain_param(group, train_weights, entry)
        return _interpolated(exact, entry["z"], 1 - 1 / _momentum(group)).to(train_weights.dtype)


def _momentum(group: Mapping[str, Any]) -> float:
    return float(group["momentum"] if "momentum" in group else group["betas"][0])


def _interpolated(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Return `start + weight * (end - start)`, in float32 at least, laid out over ranks as `start`."""
    wide = torch.promote_types(start.dtype, torch.float32)
    return start.to(wide) + weight * (end.to(wide) - start.to(wide))


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(to_local(one.detach()), to_local(other))


def _averaging(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any, lr: Any) -> dict[str, Any]:
    """Return the numbers of a step of a learning rate: the weight of z in x, and what y and z move by."""
    momentum = h.momentum if hasattr(h, "momentum") else h.betas[0]
    lr_max = narrow(larger(lr_max, lr))
    weight = step**h.r * lr_max**h.weight_lr_power
    weight_sum = narrow(weight_sum + weight)
    average = weight / larger(weight_sum, _TINY)
    return {
        "lr_max": lr_max,
        "weight_sum": weight_sum,
        "average": average,
        "y_step": lr * (momentum * (1 - average) - 1),
        "neg_lr": -lr,
    }


_TINY = 1e-38
"""Stands for a sum of weights that is zero, and so are its parts."""


def _rate(h: SimpleNamespace) -> Any:
    """Return the learning rate: a number if it can be read, so that averages carry all of its digits."""
    return h.lr if getattr(h.lr, "requires_grad", False) else readable(h, h.lr)


def _warmed_up(h: SimpleNamespace, step: Any) -> Any:
    return _rate(h) * smaller(step / h.warmup_steps, 1.0) if h.warmup_steps else _rate(h)


def _moved(param: Tensor, direction: Tensor, z: Tensor, c: Any, flags: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return y and z after a step in a direction, to which weight decay is added."""
    if flags.weight_decay:
        direction = torch.add(direction, param, alpha=c.weight_decay)
    param = torch.add(torch.lerp(param, z, c.average), direction, alpha=c.y_step)
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
    def coefficients(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any) -> dict[str, Any]:
        beta2 = h.betas[1]
        found = _averaging(h, step, weight_sum, lr_max, _warmed_up(h, step))
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
            Interval("Invalid momentum value: ", high=1.0, low_open=True, high_open=True),
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
    def coefficients(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any) -> dict[str, Any]:
        return _averaging(h, step, weight_sum, lr_max, _warmed_up(h, step))

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
    def coefficients(h: SimpleNamespace, step: Any, weight_sum: Any, lr_max: Any) -> dict[str, Any]:
        beta2 = h.betas[1]
        rho, rect = rectification(beta2, step, _JUST_TRACTABLE)
        tractable = rho > 4  # noqa: PLR2004 (the paper's)
        at_first = 0.0 if h.silent_sgd_phase else 1.0
        if isinstance(rho, Tensor):
            rect = torch.where(tractable, rect, at_first)
        elif not tractable:
            rect = at_first
        found = _averaging(h, step, weight_sum, lr_max, _rate(h) * rect)
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


_JUST_TRACTABLE = 4.001
"""At 4 itself the variance of the adaptive learning rate is infinite."""
