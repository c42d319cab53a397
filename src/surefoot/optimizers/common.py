"""Phrases that several rules share, so that each is written once."""

import importlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.rule import AlgorithmSpec
from surefoot.rule.spec import add_catalog
from surefoot.step.types import PreparedParam
from surefoot.tensors.modes import mode_is_active
from surefoot.tensors.shards import to_local


def decay_weights(param: Tensor, grad: Tensor, c: Any, flags: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return parameter and gradient after weight decay: a shrinking where decoupled, else a gradient (L2 penalty).

    What decays only where the step goes the same way is left to `directed`, which knows where it goes.
    """
    if not flags.weight_decay or getattr(flags, "cautious_weight_decay", False):
        return param, grad
    if getattr(flags, "decoupled_weight_decay", False):
        return param * c.shrink, grad
    return param, torch.add(grad, param, alpha=c.weight_decay)


def shrink_weights(param: Tensor, c: Any, flags: SimpleNamespace) -> Tensor:
    """Return the parameter after weight decay that is always decoupled, unless that is left to `directed`."""
    return param if not flags.weight_decay or flags.cautious_weight_decay else param * c.shrink


def directed(
    param: Tensor, direction: Tensor, grad: Tensor, c: Any, flags: SimpleNamespace, shrink: Any = None
) -> tuple[Tensor, Tensor]:
    """Return the parameter and the direction of its step under `cautious_weight_decay` and `cautious`.

    With the first, the parameter decays by `c.shrink` only where the step moves it towards zero (Chen et al. 2025,
    algorithm 1); with the second, the direction is zero where it opposes the gradient, and longer elsewhere by as much
    as keeps its mean length (Liang et al. 2024, algorithm 1, the share of elements that are left taken as 1e-3 at
    least).  A rule that calls this has both names, or that of the second, among its `flags`.

    Args:
        param: the parameter.
        direction: what the step subtracts, but for a positive factor for each element.
        grad: the gradient.
        c: the coefficients.
        flags: the flags.
        shrink: what decoupled weight decay multiplies the parameter with; `c.shrink` if None.
    """
    if getattr(flags, "cautious_weight_decay", False) and getattr(flags, "weight_decay", True):
        decayed = param * (c.shrink if shrink is None else shrink)
        param = torch.where(direction * param >= 0, decayed, param)
    if flags.cautious:
        mask = torch.where(direction * grad > 0, 1.0, 0.0)
        direction = direction * (mask / torch.clamp(torch.mean(mask), min=1e-3))
    return param, direction


def ema(average: Tensor, value: Tensor, decay: Any, weight: Any) -> Tensor:
    """Return an exponential moving average: `decay * average + weight * value`."""
    return torch.add(average * decay, value, alpha=weight)


def ema_of_square(average: Tensor, value: Tensor, decay: Any, weight: Any) -> Tensor:
    """Return an exponential moving average of a square: `decay * average + weight * value**2`."""
    return torch.addcmul(average * decay, value, value, value=weight)


def ema_weights(*betas: Any) -> dict[str, Any]:
    """Return the numbers of moving averages: of each, by its number from 1, its decay `beta` and its `weight`."""
    numbers: dict[str, Any] = {}
    for i, beta in enumerate(betas, 1):
        numbers |= {f"beta{i}": beta, f"weight{i}": 1 - beta}
    return numbers


def adam_weights(h: SimpleNamespace) -> dict[str, Any]:
    """Return the numbers of Adam's two moving averages, see `ema_weights`, and of decoupled weight decay."""
    beta1, beta2 = h.betas
    shrink = 1 - h.lr * h.weight_decay
    return {"beta1": beta1, "weight1": 1 - beta1, "beta2": beta2, "weight2": 1 - beta2, "shrink": shrink}


def adam_averages(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any) -> tuple[Tensor, Tensor]:
    """Return Adam's two moving averages, of the gradient and of its square; `c` has `adam_weights`."""
    return torch.lerp(exp_avg, grad, c.weight1), ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)


def amsgrad(exp_avg_sq: Tensor, maximum: Tensor, flags: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return what a step divides by the root of, and the greatest `exp_avg_sq` so far: with `amsgrad` both are that."""
    if not flags.amsgrad:
        return exp_avg_sq, maximum
    maximum = torch.maximum(maximum, exp_avg_sq)
    return maximum, maximum


def rectification(beta2: Any, step: Any, least: float = 5.0) -> tuple[Any, Any]:
    """Return the length rho of the approximated simple moving average of squares, and the rectification (RAdam).

    Below a length of `least`, greater than 4, the rectification is not used, and its radicand could be negative or
    infinite; it is then that of this length.
    """
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    tractable, limit = larger(rho, least), larger(rho_inf, least)
    radicand = (tractable - 4) * (tractable - 2) * limit / ((limit - 4) * (limit - 2) * tractable)
    return rho, radicand**0.5


def trust_ratio(of: Any, by: Any, ratio: Any) -> Any:
    """Return a trust ratio, 1 where one of the two norms that it is made of is zero."""
    return torch.where(of > 0, torch.where(by > 0, ratio, 1.0), 1.0)


def smaller(x: Any, y: Any) -> Any:
    """Return the smaller of two numbers, of which either may be a tensor."""
    return -larger(-x, -y)


def larger(x: Any, y: Any) -> Any:
    """Return the larger of two numbers, of which either may be a tensor; x where they cannot be compared, as `max`."""
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return torch.where(y > x, y, x)
    return max(x, y)


# For optimizers with a step of their own


def readable(h: SimpleNamespace, value: Any) -> Any:
    """Return a number that may be a tensor as a Python number, unless reading it would wait, or a mode must see it."""
    unread = not isinstance(value, Tensor) or not value.is_cpu or getattr(h, "capturable", False) or mode_is_active()
    return value if unread else value.item()


def batches(found: Iterable[PreparedParam], kind: Callable[[PreparedParam], Any]) -> Iterable[list[PreparedParam]]:
    """Put rows of one kind together, in order; each of kind None, or of a parameter met before, is by itself."""
    together: defaultdict[Any, list[PreparedParam]] = defaultdict(list)
    met: set[int] = set()
    for position, row in enumerate(found):
        known = None if row.apart or id(row.param) in met else kind(row)
        met.add(id(row.param))
        together[position if known is None else (known,)].append(row)
    return together.values()


def in_turns(found: Iterable[PreparedParam]) -> list[list[PreparedParam]]:
    """Return rows in lists of which none has a parameter twice, in order."""
    turns: list[list[PreparedParam]] = []
    met: Counter[Tensor] = Counter()
    for row in found:
        if met[row.param] == len(turns):
            turns.append([])
        turns[met[row.param]].append(row)
        met[row.param] += 1
    return turns


def local_row(row: PreparedParam) -> PreparedParam:
    """Return a sharded parameter's row as one of this process's shards; numbers of state stay as they are."""
    state = {name: to_local(value) if isinstance(value, Tensor) else value for name, value in row.state.items()}
    return row._replace(param=to_local(row.param), grad=to_local(row.grad), state=state)


def add_scaled_(tensor: Tensor, other: Tensor, factor: Any) -> None:
    """Add `factor * other` in place; a factor that is a tensor is not read on the host."""
    if isinstance(factor, Tensor):
        tensor.add_(other.to(torch.promote_types(tensor.dtype, torch.float32)) * factor)
    else:
        tensor.add_(other, alpha=factor)


def _all_specs() -> list[AlgorithmSpec]:
    package = importlib.import_module(__package__ or "")
    return [getattr(package, name).spec for name in package.__all__]


add_catalog(_all_specs)
