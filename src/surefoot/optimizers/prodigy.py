"""Prodigy: Adam that estimates its own learning rate, from all parameters together."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import directed, ema, ema_of_square, smaller
from surefoot.rule import DIRECTED, GroupScalar, Slot, group_sum, total_sum
from surefoot.rule.hyperparameters import WEIGHT_DECAY, Betas, Eps, Interval, LearningRate, Number, finite, number
from surefoot.tensors.shards import is_sharded

_Beta3 = Interval("Invalid beta3 value: ", high=1.0, high_open=True, optional=True)
_D0 = Interval("Invalid d0 value: ", low_open=True, high_open=True)
_Every = Interval("Invalid slice_p value: ", low=1, whole=True)
_Growth = Interval("Invalid growth_rate value: ", low=1.0)
_LARGE = 1e290
"""Stands for a growth rate without bound, through which no gradient could flow."""
_AGREE = ("betas", "beta3", "d0", "d_coef", "growth_rate", "use_bias_correction")
"""What one d for all groups follows from."""


class Prodigy(Optimizer):
    """Prodigy in its Adam form: the step size d is estimated while training, so that `lr` stays at 1.

    With the gradient g, k the number of steps made before, w the parameters, and b = 1, or
    sqrt(1 - beta2**(k + 1)) / (1 - beta1**(k + 1)) with `use_bias_correction`::

        r = d * lr * b
        d_numerator = beta3 * d_numerator + d / d0 * r * sum(g * (p0 - w))
        exp_avg = beta1 * exp_avg + d * (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + d**2 * (1 - beta2) * g**2
        s = beta3 * s + d / d0 * r * g
        d_hat = d_coef * d_numerator / sum(abs(s))
        d_max = max(d_max, d_hat)
        d = min(d_max, growth_rate * max(d, d_hat if d == d0))
        w -= r * weight_decay * w
        w -= r * exp_avg / (sqrt(exp_avg_sq) + d * eps)

    with d * g of the new d in place of exp_avg where beta1 is 0.
    Both sums are over all parameters of all groups, and over all ranks of a sharded training; p0 is w before the first
    step.  d, d_max, d_numerator and k stand in every group, where they are saved, loaded, and may be read or set: on a
    CPU as numbers, elsewhere as tensors that a step changes in place without waiting.  As long as no gradient has been
    other than zero, nothing changes.

    With `slice_p` both sums, s and p0 are over every `slice_p`-th element of the flattened parameter: an approximation
    that takes less memory.

    A group with lr = 0 is left as it is and counts in no sum; otherwise groups must have the same `lr`, and the same of
    all that d follows from, unless `split_groups`.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is sharded and `slice_p` is not 1.
        TypeError: a hyperparameter is not a number.
        RuntimeError: in `step`, groups differ in what one d follows from.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Prodigy([weight])
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     (weight**2).sum().backward()
        ...     optimizer.step()
        >>> bool(weight.norm() < 0.5), bool(optimizer.param_groups[0]["d"] > 1e-2)
        (True, True)

    Paper: Mishchenko & Defazio 2023, "Prodigy: an expeditiously adaptive parameter-free learner", algorithm 4.
    Numbers, options and state are those of the authors' `prodigyopt`, whose state dicts load; there a group with lr = 0
    decays by the rate of the others and follows its averages on.  In float16 both averages vanish while d is small:
    keep them wider with `state_dtype=torch.float32`.  s is never kept in 8 bits, with `slice_p`
    not in 16 either, and p0 in the parameter's dtype.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1.0,
        betas: Betas = (0.9, 0.999),
        beta3: Annotated[float | None, _Beta3, "decay of d_numerator and s; the root of beta2 if None"] = None,
        eps: Eps = 1e-8,
        weight_decay: Annotated[Number, WEIGHT_DECAY, "shrinking of the parameter in units of r, or L2 penalty"] = 0,
        decouple: Annotated[bool, "shrink the parameter (AdamW) rather than adding to the gradient"] = True,
        use_bias_correction: Annotated[bool, "correct the rate for averages that begin with zero"] = False,
        safeguard_warmup: Annotated[bool, "leave lr and b out of s, for schedules that begin with small rates"] = False,
        d0: Annotated[float, _D0, "d before the first step; rarely matters"] = 1e-6,
        d_coef: Annotated[float, finite("d_coef"), "factor of the estimate, by which to tune the step size"] = 1.0,
        growth_rate: Annotated[float, _Growth, "greatest factor by which d grows in a step"] = math.inf,
        fsdp_in_use: Annotated[
            bool,
            "not looked at: sharded parameters tell of themselves; for those of FSDP1 pass its `process_group`",
        ] = False,
        slice_p: Annotated[
            int,
            _Every,
            "n of which every n-th element of each flattened parameter counts in the sums, and in `s` and `p0`, which "
            "are as much shorter; 11 takes little from the estimate.  Not of sharded parameters",
        ] = 1,
        *,
        split_groups: Annotated[bool, "estimate d for each group by itself; each may have its own `lr`"] = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq", signed=False, slow=True),
        Slot("s", slow=True, float8=False, flat_elsewhere=True, sampled="slice_p"),
        Slot("p0", copies_param=True, flat_elsewhere=True, sampled="slice_p"),
    )
    group_scalars = (
        GroupScalar("d", init="d0", split="split_groups"),
        GroupScalar("d_max", init="d0", split="split_groups"),
        GroupScalar("d_numerator", split="split_groups"),
        GroupScalar("k", integer=True, split="split_groups"),
    )
    flags = ("weight_decay", "decouple", "split_groups", *DIRECTED)
    ranges = MappingProxyType({"d": _D0, "d_max": _D0, "d_numerator": number("d_numerator"), "k": finite("k")})
    also_called = MappingProxyType({"d_denom": (), "d_hat": ()})

    def check_params(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        if group["slice_p"] > 1 and (found := next(filter(is_sharded, params), None)) is not None:
            raise ValueError(
                f"`slice_p` must be 1 for sharded parameters, of which ranks would have to agree on the elements that "
                f"count, but is {group['slice_p']} for one of size {tuple(found.shape)}; to save memory, pass "
                f"state_dtype=torch.bfloat16"
            )

    @staticmethod
    def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups that differ in what one d for all of them follows from."""
        first = groups[0]
        for group in groups[1:]:
            names = () if first["split_groups"] and group["split_groups"] else ("split_groups", *_AGREE)
            for name in names:
                if not _same(first[name], group[name]):
                    raise RuntimeError(
                        f"groups have {name}={first[name]!r} and {name}={group[name]!r}, but one d is estimated for "
                        f"both; make them equal, or pass split_groups=True"
                    )
        if len(groups) > 1 and not first["split_groups"]:
            _check_rates([group["lr"] for group in groups])

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:  # noqa: ARG004 (k counts)
        beta1, beta2 = h.betas
        beta3 = beta2**0.5 if h.beta3 is None else h.beta3
        moves = _is_positive(h.lr)
        bias = (1 - beta2 ** (h.k + 1)) ** 0.5 / (1 - beta1 ** (h.k + 1)) if h.use_bias_correction else 1.0
        rate = h.d * h.lr * bias
        return {
            "beta1": beta1**moves,
            "weight1": moves * h.d * (1 - beta1),
            "beta2": beta2**moves,
            "weight2": moves * h.d * h.d * (1 - beta2),
            "beta3": beta3**moves,
            "weight3": moves * h.d / h.d0 * (h.d if h.safeguard_warmup else rate),
            "moves": moves,
            "decay": beta3,
            "weight": h.d / h.d0 * rate,
            "neg_decay": -rate * h.weight_decay,
            "neg_rate": -rate,
            "growth": smaller(h.growth_rate, _LARGE),
        }

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        s: Tensor,
        p0: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        if flags.weight_decay and not flags.decouple:
            grad = torch.add(grad, param, alpha=c.weight_decay)
        exp_avg = ema(exp_avg, grad, c.beta1, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        s = ema(s, grad, c.beta3, c.weight3)
        over_params = group_sum if flags.split_groups else total_sum
        gain, length = over_params(grad * (p0 - param) * c.weight), over_params(torch.abs(s) * c.moves)
        made = length != 0
        d, d_max, d_numerator = _estimated(gain, length, made, c)
        decay: Any = torch.where(made, c.neg_decay, 0.0)
        if flags.weight_decay and flags.decouple and not flags.cautious_weight_decay:
            param = torch.add(param, param, alpha=decay)  # a factor would be 1 in float32 while d is small
        param, direction = directed(param, exp_avg, grad, c, flags, 1 + decay)
        neg_rate = c.neg_rate * torch.where(c.beta1 == 0, d / c.d, 1.0)
        param = torch.addcdiv(param, direction, torch.sqrt(exp_avg_sq) + d * c.eps, value=neg_rate)
        return param, exp_avg, exp_avg_sq, s, p0, d, d_max, d_numerator, torch.where(made, c.k + 1, c.k)


def _estimated(gain: Any, length: Any, made: Any, c: Any) -> tuple[Any, Any, Any]:
    """Return d, d_max and d_numerator after a step: what they were unless one is made."""
    numerator = torch.where(made, c.decay * c.d_numerator + gain, c.d_numerator)
    d_hat = torch.where(made, c.d_coef * numerator / torch.where(made, length, 1.0), c.d)
    d_max = torch.where(d_hat > c.d_max, d_hat, c.d_max)
    least = torch.where(c.d == c.d0, torch.where(d_hat > c.d, d_hat, c.d), c.d)
    grown = least * c.growth
    return torch.where(made, torch.where(grown < d_max, grown, d_max), c.d), d_max, numerator


def _is_positive(lr: Any) -> Any:
    """Return 1 for a learning rate at which something moves, else 0."""
    return torch.where(lr > 0, 1.0, 0.0) if isinstance(lr, Tensor) else float(lr > 0)


def _same(one: Any, other: Any) -> bool:
    """Return whether two hyperparameters are equal, or cannot be compared without waiting for a device."""
    waits = any(isinstance(value, Tensor) and not value.is_cpu for value in (one, other))
    return one is other or waits or bool(one == other)


def _check_rates(rates: Sequence[Any]) -> None:
    """Refuse learning rates that are neither 0 nor all the same, as far as they can be read without waiting."""
    known = {float(lr) for lr in rates if not isinstance(lr, Tensor) or lr.is_cpu} - {0.0}
    if len(known) > 1:
        raise RuntimeError(
            f"groups have the learning rates {', '.join(map(str, sorted(known)))}, but one d is estimated for all; "
            f"give each the same or 0, or pass split_groups=True"
        )
