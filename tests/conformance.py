"""The conformance table: one row per optimizer, and the parameters and gradients that generic tests give to every row.

An algorithm is added to the tests by one row here.  What it can do is read from attributes of its class, and what it
must compute from its oracle: the class of the same name in torch.optim, run by its for-loop, or, for an algorithm that
torch does not have, a `loop` over parameters that spells it out as its paper does.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import surefoot
from helpers import torchs_database
from surefoot.rule import Sparse

Params = dict[str, Tensor]
Options = dict[str, Any]

ENGINES: dict[str, Options] = {"eager": {"foreach": False}, "foreach": {"foreach": True}, "cpu": {"fused": True}}
COMPILED = {"cpu"}
"""Engines that compile a kernel for each setting of the flags, in most of a second: they get fewer settings."""
STEPS = 6
STEADY = 4
"""The step from which on every parameter has a gradient of the same layout, so that engines can keep their plans."""


def any_param(param: Tensor) -> bool:
    return True


def with_elements(param: Tensor) -> bool:
    return param.numel() > 0


def a_matrix(param: Tensor) -> bool:
    return param.dim() == 2 and param.numel() > 0


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        ours: the class under test.
        oracle: what says what it must compute: from parameters (or groups) and options it makes something that has
            `param_groups`, `state`, and a `step` that works in place.
        more: sets of hyperparameters to try, beyond torch's database and all combinations of the class's flags.
        admits: which parameters the oracle takes.
        needs_closure: whether `step` asks for a closure.
        exact: whether the eager engine rounds where torch's for-loop does, so that all bits are the same.
        reduces: whether tensors are reduced to numbers, of which each is rounded once for the whole tensor.
    """

    ours: type[surefoot.Optimizer]
    oracle: Callable[..., torch.optim.Optimizer]
    more: tuple[Options, ...] = ()
    admits: Callable[[Tensor], bool] = any_param
    needs_closure: bool = False
    exact: bool = True
    reduces: bool = False

    @property
    def name(self) -> str:
        return self.ours.__name__

    @property
    def elementwise(self) -> bool:
        return self.ours.is_rule() and self.ours.sparse is not Sparse.ONLY

    @functools.cached_property
    def defaults(self) -> Options:
        return self.ours([torch.zeros(1, 1)]).defaults

    def variants(self, *, few: bool = False) -> list[Options]:
        """Return every set of hyperparameters to compare, each once; if `few`, only some sets of flags."""
        found = ({}, *self.more, *torch_variants(self.oracle), *self.flag_variants(few=few))
        return list({self.completed(options): options for options in found}.values())

    def completed(self, options: Options) -> str:
        """Return all hyperparameters that options lead to, as a text by which equal ones are known."""
        return str(sorted((self.defaults | options).items()))

    def flag_variants(self, *, few: bool = False) -> Iterator[Options]:
        """Return all combinations of the flags that the constructor takes; if `few`, none, each by itself, and all."""
        of_torch = getattr(torch.optim, self.name, None)
        takers = (self.ours, self.oracle) if self.oracle is of_torch else (self.ours,)  # torch may be older
        known = [inspect.signature(taker).parameters for taker in takers]
        flags = [name for name in FLAGS if all(name in parameters for parameters in known)]
        if self.ours.is_rule():
            flags = [name for name in flags if name == "maximize" or name in self.ours.flags]
        for setting in itertools.product((0, 1), repeat=len(flags)):
            options = {name: FLAGS[name][on] for name, on in zip(flags, setting, strict=True)}
            allowed = not options.get("nesterov") or options["momentum"]
            if allowed and not (few and 1 < sum(setting) < len(flags)):
                yield options

    def all_flags(self) -> Options:
        """Return hyperparameters that set every flag of the class."""
        return [*self.flag_variants()][-1]

    def engines(self, wanted: Iterable[str]) -> list[str]:
        """Return the engines that the constructor has options for; "default" stands for those without any."""
        names = inspect.signature(self.ours).parameters.keys()
        return [name for name in wanted if ENGINES[name].keys() <= names] or ["default"]

    def build(self, params: Iterable[Any], options: Options, engine: str = "default") -> surefoot.Optimizer:
        return self.ours(params, **deepcopy(options), **ENGINES.get(engine, {}))

    def slots_of(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the parameters and slots among `results`."""
        slots = {slot.name for slot in self.ours.slots}
        return {name: value for name, value in found.items() if " of " not in name or name.split(" of ")[0] in slots}

    def build_oracle(self, params: Iterable[Any], options: Options, *, foreach: bool = False) -> torch.optim.Optimizer:
        wish = {"foreach": foreach} if "foreach" in inspect.signature(self.oracle).parameters else {}
        return self.oracle(params, **deepcopy(options), **wish)


def loop(rule: Callable[..., None], **defaults: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return an oracle that runs a rule on one parameter after the other.

    Args:
        rule: `rule(param, grad, state, **hyperparameters)` changes the parameter and its state in place and adds to the
            state what is missing.  Complex numbers come as pairs of real ones.
        defaults: what groups hold: the hyperparameters, and what the rule does not take; `max_grad_norm` clips the
            gradients before.
    """

    class Loop(torch.optim.Optimizer):
        def __init__(self, params: Iterable[Any], *, maximize: bool = False, **options: Any) -> None:
            super().__init__(params, {**defaults, "maximize": maximize, **options})

        @torch.no_grad()
        def step(self) -> None:
            held = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
            taken = inspect.signature(rule).parameters
            limit, scale = self.defaults.get("max_grad_norm"), 1.0
            if limit is not None:
                norm = sum(param.grad.abs().double().square().sum() for param in held).sqrt()
                scale = (limit / (norm + 1e-6)).clamp(max=1.0).item()
            for group in self.param_groups:
                hyperparameters = {name: group[name] for name in defaults.keys() & taken.keys()}
                for param in group["params"]:
                    if param.grad is not None:
                        grad = (-scale if group["maximize"] else scale) * param.grad
                        state = {name: in_pairs(value) for name, value in self.state[param].items()}
                        known = {"dim": param.dim()} if "dim" in taken else {}
                        rule(in_pairs(param), in_pairs(grad), state, **hyperparameters, **known)
                        paired = param.is_complex()
                        for name in state.keys() - self.state[param].keys():
                            self.state[param][name] = (
                                torch.view_as_complex(state[name]) if paired and state[name].dim() else state[name]
                            )

    return Loop


def in_pairs(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


# Algorithms that torch does not have, as their papers spell them out


def zeros(state: Params, param: Tensor, *names: str) -> list[Tensor]:
    """Return slots, which begin with zeros."""
    return [state.setdefault(name, torch.zeros_like(param)) for name in names]


def counted(state: Params) -> float:
    """Count a step; return its number."""
    state.setdefault("step", torch.tensor(0.0)).add_(1)
    return state["step"].item()


def ema_(average: Tensor, value: Tensor, beta: float) -> Tensor:
    return average.mul_(beta).add_(value, alpha=1 - beta)


def ratio_of(of: Tensor, by: Tensor, ratio: Tensor) -> Tensor:
    return ratio if of > 0 and by > 0 else torch.ones_like(ratio)


def lion(param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, weight_decay: Any) -> None:
    (m,) = zeros(state, param, "exp_avg")
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.add_((m * betas[0]).add_(grad, alpha=1 - betas[0]).sign_(), alpha=-lr)
    ema_(m, grad, betas[1])


def signum(param: Tensor, grad: Tensor, state: Params, lr: Any, momentum: Any, weight_decay: Any) -> None:
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    if momentum:
        grad = zeros(state, param, "momentum_buffer")[0].lerp_(grad, 1 - momentum)
    param.add_(grad.sign(), alpha=-lr)


def ademamix(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, alpha: Any, beta3_warmup: Any, alpha_warmup: Any,
    eps: Any, weight_decay: Any,
) -> None:  # fmt: skip
    t, (fast, slow, v) = counted(state), zeros(state, param, "exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    beta1, beta2, beta3 = betas
    if beta3_warmup:  # in proportion to half-lives, of which that of 0 is 0
        lives = [1 / math.log(beta) if beta else 0.0 for beta in (beta1, beta3)]
        beta3 = math.e ** (1 / ((1 - min(t / beta3_warmup, 1)) * lives[0] + min(t / beta3_warmup, 1) * lives[1]))
    if alpha_warmup:
        alpha = min(alpha * t / alpha_warmup, alpha)
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    ema_(fast, grad, beta1)
    ema_(slow, grad, beta3)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    u = (fast / (1 - beta1**t)).add_(slow, alpha=alpha)
    param.addcdiv_(u, v.sqrt() / (1 - beta2**t) ** 0.5 + eps, value=-lr)


def adan(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, weight_decay: Any, no_prox: Any
) -> None:
    t, (m, d, v, last) = (
        counted(state),
        zeros(state, param, "exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
    )
    beta1, beta2, beta3 = betas
    diff = torch.zeros_like(grad) if t == 1 else grad + last
    ema_(m, grad, beta1)
    ema_(d, diff, beta2)
    z = grad.add(diff, alpha=beta2)
    v.mul_(beta3).addcmul_(z, z, value=1 - beta3)
    u = (m * (lr / (1 - beta1**t))).add_(d, alpha=lr * beta2 / (1 - beta2**t))
    if weight_decay and no_prox:
        param.mul_(1 - lr * weight_decay)
    param.sub_(u / (v.sqrt() / (1 - beta3**t) ** 0.5 + eps))
    if weight_decay and not no_prox:
        param.mul_(1 / (1 + lr * weight_decay))
    last.copy_(-grad)


def adabelief(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: Any,
    decoupled_weight_decay: Any, fixed_decay: Any, rectify: Any, degenerated_to_sgd: Any,
) -> None:  # fmt: skip
    t, (m, v) = counted(state), zeros(state, param, "exp_avg", "exp_avg_var")
    if weight_decay and decoupled_weight_decay:
        param.mul_(1 - (weight_decay if fixed_decay else lr * weight_decay))
    elif weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    ema_(m, grad, betas[0])
    v.mul_(betas[1]).addcmul_(grad - m, grad - m, value=1 - betas[1]).add_(eps)
    if amsgrad:
        (most,) = zeros(state, param, "max_exp_avg_var")
        v = torch.maximum(most, v, out=most)
    size, bias2 = lr / (1 - betas[0] ** t), 1 - betas[1] ** t
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * t * betas[1] ** t / bias2
    if not rectify:
        param.addcdiv_(m, v.sqrt() / bias2**0.5 + eps, value=-size)
    elif length >= 5:
        of = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        param.sub_(m / (v.sqrt() + eps) * (size * of**0.5 * bias2**0.5))
    elif degenerated_to_sgd:
        param.sub_(m * size)


def adopt(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, clip_exp: Any, weight_decay: Any,
    decoupled_weight_decay: Any,
) -> None:  # fmt: skip
    t, (m, v) = counted(state), zeros(state, param, "exp_avg", "exp_avg_sq")
    if weight_decay and not decoupled_weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    if t == 1:
        v.copy_(grad * grad)
        return
    if weight_decay and decoupled_weight_decay:
        param.mul_(1 - lr * weight_decay)
    normed = grad / v.sqrt().clamp_(min=eps)
    if clip_exp is not None:
        normed.clamp_(-((t - 1) ** clip_exp), (t - 1) ** clip_exp)
    m.lerp_(normed, 1 - betas[0])
    param.add_(m, alpha=-lr)
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def adam_atan2(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, weight_decay: Any, a: Any, b: Any
) -> None:
    t, (m, v) = counted(state), zeros(state, param, "exp_avg", "exp_avg_sq")
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    angle = torch.atan2(m * (1 / (1 - betas[0] ** t)), (v * (b * b / (1 - betas[1] ** t))).sqrt())
    param.add_(angle, alpha=-lr * a)


def laprop(param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    counted(state)
    m, v = zeros(state, param, "exp_avg", "exp_avg_sq")
    sums = [state.setdefault(f"exp_avg_lr_{i}", torch.tensor(0.0)) for i in (1, 2)]
    of_lr, of_one = (
        each.item() * beta + (1 - beta) * value for each, beta, value in zip(sums, betas, (lr, 1.0), strict=True)
    )
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    m.mul_(betas[0]).add_(grad / ((v / of_one).sqrt() + eps), alpha=(1 - betas[0]) * lr)
    param.add_(m, alpha=-(lr / of_lr if of_lr else 0.0))
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    for each, value in zip(sums, (of_lr, of_one), strict=True):
        each.fill_(value)


def qhadam(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, nus: Any, weight_decay: Any,
    decoupled_weight_decay: Any, eps: Any,
) -> None:  # fmt: skip
    m, v = zeros(state, param, "exp_avg", "exp_avg_sq")
    if weight_decay and decoupled_weight_decay:
        param.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    sums = [state.setdefault(f"beta{i}_weight", torch.tensor(0.0)) for i in (1, 2)]
    new = [1 + beta * each.item() for beta, each in zip(betas, sums, strict=True)]
    m.mul_(1 - 1 / new[0]).add_(grad, alpha=1 / new[0])
    v.mul_(1 - 1 / new[1]).addcmul_(grad, grad, value=1 / new[1])
    of = (v * nus[1]).addcmul_(grad, grad, value=1 - nus[1])
    param.addcdiv_((m * nus[0]).add_(grad, alpha=1 - nus[0]), of.sqrt() + eps, value=-lr)
    for each, value in zip(sums, new, strict=True):
        each.fill_(value)


def yogi(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, initial_accumulator: Any,
    weight_decay: Any,
) -> None:  # fmt: skip
    t = counted(state)
    m, v = (state.setdefault(name, torch.full_like(param, initial_accumulator)) for name in ("exp_avg", "exp_avg_sq"))
    if weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    ema_(m, grad, betas[0])
    v.addcmul_(torch.sign(v - grad * grad), grad * grad, value=betas[1] - 1)
    param.addcdiv_(m, v.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps, value=-lr / (1 - betas[0] ** t))


def lamb(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, weight_decay: Any, bias_correction: Any,
    grad_averaging: Any, trust_clip: Any, always_adapt: Any, decoupled_weight_decay: Any,
) -> None:  # fmt: skip
    t, (m, v) = counted(state), zeros(state, param, "exp_avg", "exp_avg_sq")
    m.mul_(betas[0]).add_(grad, alpha=1 - betas[0] if grad_averaging else 1.0)
    ema_(v, grad**2, betas[1])
    bias1, bias2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if bias_correction else (1.0, 1.0)
    u = m / bias1 / (v.sqrt() / bias2**0.5 + eps)
    if decoupled_weight_decay:
        param.mul_(1 - lr * weight_decay)
    else:
        u += weight_decay * param
    if weight_decay or always_adapt:
        ratio = ratio_of(param.norm(), u.norm(), param.norm() / u.norm())
        u *= ratio.clamp(max=1) if trust_clip else ratio
    param.sub_(lr * u)


def lars(
    param: Tensor, grad: Tensor, state: Params, lr: Any, momentum: Any, dampening: Any, weight_decay: Any,
    nesterov: Any, trust_coeff: Any, eps: Any, trust_clip: Any, always_adapt: Any,
) -> None:  # fmt: skip
    if weight_decay or always_adapt:
        w, g = param.norm(), grad.norm()
        ratio = ratio_of(w, g, trust_coeff * w / (g + weight_decay * w + eps))
        grad = (grad + weight_decay * param) * ((ratio / lr).clamp(max=1) if trust_clip else ratio)
    if momentum:
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(momentum).add_(grad, alpha=1 - dampening)
        else:
            state["momentum_buffer"] = grad.clone()
        grad = grad + momentum * state["momentum_buffer"] if nesterov else state["momentum_buffer"]
    param.sub_(lr * grad)


def schedule_free(
    param: Tensor, grad: Tensor, state: Params, lr: Any, weight_decay: Any, r: Any, weight_lr_power: Any,
    betas: Any = None, eps: Any = None, momentum: Any = None, warmup_steps: int = 0, silent_sgd_phase: Any = None,
) -> None:  # fmt: skip
    t, weight_sum = counted(state), state.setdefault("weight_sum", torch.tensor(0.0))
    lr_max, z = state.setdefault("lr_max", torch.tensor(-1.0)), state.setdefault("z", param.detach().clone())
    direction, beta1, lr = grad, momentum if betas is None else betas[0], float(lr)
    lr = lr * min(1, t / warmup_steps) if warmup_steps else lr
    if betas is not None:
        (v,) = zeros(state, param, "exp_avg_sq")
        ema_(v, grad**2, betas[1])
        direction = grad / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        if silent_sgd_phase is not None:
            rho_inf = 2 / (1 - betas[1]) - 1
            rho = rho_inf - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
            if rho > 4:
                lr = lr * ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            else:
                lr, direction = lr * (0 if silent_sgd_phase else 1), grad
    lr_max.fill_(max(float(lr_max), float(lr)))
    last = state.setdefault("last_momentum", torch.tensor(1.0))
    weight = t**r * lr_max.item() ** weight_lr_power
    weight_sum.add_(weight)
    c = weight / weight_sum.item() if weight_sum else 0.0
    direction = direction + weight_decay * param if weight_decay else direction
    param.copy_(z + (param - z) * ((1 - c) * beta1 / last.item())) if abs(beta1 - last) > 1e-6 else param.lerp_(z, c)
    param.add_(direction * lr, alpha=beta1 * (1 - c) - 1)
    last.fill_(beta1)
    z.sub_(lr * direction)


def stable_adamw(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, weight_decay: Any, eps: Any, decouple_lr: Any,
    max_lr: Any,
) -> None:  # fmt: skip
    t, (m, v) = counted(state), zeros(state, param, "exp_avg", "exp_avg_sq")
    beta1, beta2 = ((beta**t - beta) / (beta**t - 1) for beta in betas)
    ema_(m, grad, beta1)
    ema_(v, grad**2, beta2)
    rms = (grad**2 / v.clamp(min=eps**2)).mean().sqrt()
    lr = lr / rms.clamp(min=1)
    param.mul_(1 - lr * weight_decay / (max_lr if decouple_lr else 1))
    param.sub_(lr * m / (v.sqrt() + eps))


def novograd(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, weight_decay: Any, grad_averaging: Any,
    amsgrad: Any, decoupled_weight_decay: Any,
) -> None:  # fmt: skip
    _, (m,) = counted(state), zeros(state, param, "exp_avg")
    total = (grad**2).sum()
    v = state.setdefault("exp_avg_sq", torch.zeros_like(total))
    v.copy_(total if not v else betas[1] * v + (1 - betas[1]) * total)
    if amsgrad:
        most = state.setdefault("max_exp_avg_sq", torch.zeros_like(total))
        v = most.copy_(torch.maximum(most, v))
    u = grad / (v.sqrt() + eps)
    if decoupled_weight_decay:
        param.mul_(1 - lr * weight_decay)
    else:
        u += weight_decay * param
    m.mul_(betas[0]).add_(u, alpha=1 - betas[0] if grad_averaging else 1.0)
    param.sub_(lr * m)


def mars(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: Any,
    gamma: Any, optimize_1d: Any, lr_1d_factor: Any, betas_1d: Any, weight_decay_1d: Any, dim: int,
) -> None:  # fmt: skip
    t, (m, v, last) = counted(state), zeros(state, param, "exp_avg", "exp_avg_sq", "last_grad")
    c = grad
    if optimize_1d or dim > 1:
        c = grad + gamma * betas[0] / (1 - betas[0]) * (grad - last)
        c = c / c.norm().clamp(min=1)
        last.copy_(grad)
    else:
        lr, betas, weight_decay = lr * lr_1d_factor, betas_1d, weight_decay_1d
    m.lerp_(c, 1 - betas[0])
    ema_(v, c**2, betas[1])
    if amsgrad:
        (most,) = zeros(state, param, "max_exp_avg_sq")
        v = most.copy_(torch.maximum(most, v))
    param.mul_(1 - lr * weight_decay)
    param.sub_(lr / (1 - betas[0] ** t) * m / (v.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps))


def merged(shape: torch.Size, most: int) -> list[int]:
    """Return the sizes of axes of which neighbours are put together up to a size."""
    sizes = [1]
    for size in shape:
        together = sizes[-1] == 1 or sizes[-1] * size <= most
        sizes[len(sizes) - together :] = [sizes[-1] * size] if together else [size] * (size != 1)
    return sizes


def average_products(grad: Tensor, axes: Iterable[int], state: Params, beta: float) -> None:
    """Move factors towards the products of a gradient with itself, each along its axis."""
    for i in axes:
        rows = grad.movedim(i, 0).reshape(grad.size(i), grad.numel() // max(grad.size(i), 1))
        state.setdefault(f"GG_{i}", torch.zeros_like(rows @ rows.T)).lerp_(rows @ rows.T, 1 - beta)


def soap(
    param: Tensor, grad: Tensor, state: Params, lr: Any, betas: Any, shampoo_beta: Any, eps: Any, weight_decay: Any,
    precondition_frequency: Any, max_precond_dim: Any, merge_dims: Any, precondition_1d: Any, normalize_grads: Any,
    correct_bias: Any, dim: int,
) -> None:  # fmt: skip
    t, (m, v) = counted(state) - 1, zeros(state, param, "exp_avg", "exp_avg_sq")
    sizes = merged(param.shape, max_precond_dim) if merge_dims and dim > 1 else list(param.shape)
    g, takes, beta = grad.reshape(sizes), dim > 1 or precondition_1d, betas[1] if shampoo_beta < 0 else shampoo_beta
    axes = [i for i, size in enumerate(sizes) if takes and size <= max_precond_dim]

    def turned(x: Tensor, side: int) -> Tensor:
        x = x.reshape(sizes)
        for i in axes:
            x = torch.tensordot(x, state[f"Q_{i}"], ([i], [side])).movedim(-1, i)
        return x.reshape(param.shape)

    if not t:
        average_products(g, axes, state, beta)
        for i in axes:
            gg = state[f"GG_{i}"]
            state[f"Q_{i}"] = torch.linalg.eigh(gg + 1e-30 * torch.eye(len(gg), dtype=gg.dtype))[1].flip(1).contiguous()
        return
    p = turned(grad, 0)
    m.lerp_(p, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(p, p, value=1 - betas[1])
    u = turned(m / (v.sqrt() + eps), 1)
    if normalize_grads:
        u = u / (1e-30 + (u**2).mean().sqrt())
    param.sub_(lr * ((1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) if correct_bias else 1) * u)
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    average_products(g, axes, state, beta)
    if not t % precondition_frequency:
        plain = turned(m, 1)
        for i in axes:
            q, gg = state[f"Q_{i}"], state[f"GG_{i}"]
            order = (q * (gg @ q)).sum(0).argsort(descending=True, stable=True)
            v.copy_(v.reshape(sizes).index_select(i, order).reshape(v.shape))
            q.copy_(torch.linalg.qr((gg @ q)[:, order]).Q)
        m.copy_(turned(plain, 0))


class ProdigyLoop(torch.optim.Optimizer):
    """Prodigy as its authors spell it out, one parameter after the other, twice over."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        defaults = {
            "lr": 1.0, "betas": (0.9, 0.999), "beta3": None, "eps": 1e-8, "weight_decay": 0, "decouple": True,
            "use_bias_correction": False, "safeguard_warmup": False, "d0": 1e-6, "d_coef": 1.0,
            "growth_rate": math.inf, "split_groups": False, "maximize": False, "fsdp_in_use": False, "slice_p": 1,
        }  # fmt: skip
        super().__init__(params, defaults | options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        d0 = self.param_groups[-1]["d0"]
        self.param_groups[-1] |= {"d": d0, "d_max": d0, "d_numerator": 0.0, "k": 0}

    @torch.no_grad()
    def step(self) -> None:
        split = self.defaults["split_groups"]
        for groups in [[group] for group in self.param_groups] if split else [self.param_groups]:
            self._step(groups)

    def _step(self, groups: list[dict[str, Any]]) -> None:
        first = groups[0]
        beta1, beta2 = first["betas"]
        beta3 = math.sqrt(beta2) if first["beta3"] is None else first["beta3"]
        d, old, k, lr = first["d"], first["d"], first["k"], max(float(group["lr"]) for group in groups)
        bias = (1 - beta2 ** (k + 1)) ** 0.5 / (1 - beta1 ** (k + 1)) if first["use_bias_correction"] else 1.0
        rate, gain, length = d * lr * bias, 0.0, 0.0
        moving = [group for group in groups if float(group["lr"]) > 0]
        held = [(group, param) for group in moving for param in group["params"] if param.grad is not None]
        for group, param in held:
            state, w, g = self.state[param], in_pairs(param), in_pairs(param.grad)
            every = functools.partial(self.every, group["slice_p"], param.dim())
            if not state:
                state |= {"step": torch.tensor(0.0), "p0": every(param).clone(), "s": torch.zeros_like(every(param))}
                state |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            g = self.direction(group, w, g)
            m, v, s, p0 = (in_pairs(state[name]) for name in ("exp_avg", "exp_avg_sq", "s", "p0"))
            gain += d / group["d0"] * rate * (every(g) * (p0 - every(w))).sum().item()
            m.mul_(beta1).add_(g, alpha=d * (1 - beta1))
            v.mul_(beta2).addcmul_(g, g, value=d**2 * (1 - beta2))
            s.mul_(beta3).add_(every(g), alpha=d / group["d0"] * (d if group["safeguard_warmup"] else rate))
            length += s.abs().sum().item()
            state["step"] += 1
        if length:
            numerator = beta3 * first["d_numerator"] + gain
            d_hat = first["d_coef"] * numerator / length
            d_max, new = max(first["d_max"], d_hat), max(d, d_hat) if d == first["d0"] else d
            d = min(d_max, new * first["growth_rate"])
            for group in groups:
                group |= {"d": d, "d_max": d_max, "d_numerator": numerator, "k": k + 1}
            for group, param in held:
                state, w = self.state[param], in_pairs(param)
                if group["decouple"] and group["weight_decay"]:
                    w.add_(w.clone(), alpha=-float(group["weight_decay"]) * rate)
                m, v = (in_pairs(state[name]) for name in ("exp_avg", "exp_avg_sq"))
                w.addcdiv_(m, v.sqrt() + d * group["eps"], value=-rate * (1 if beta1 else d / old))

    @staticmethod
    def every(count: int, dims: int, tensor: Tensor) -> Tensor:
        return tensor if count == 1 else tensor.reshape(-1, *tensor.shape[dims:])[::count]

    @staticmethod
    def direction(group: dict[str, Any], w: Tensor, g: Tensor) -> Tensor:
        g = -g if group["maximize"] else g
        coupled = group["weight_decay"] and not group["decouple"]
        return g.add(w, alpha=float(group["weight_decay"])) if coupled else g


FLAGS: dict[str, tuple[Any, Any]] = {
    "amsgrad": (False, True),
    "centered": (False, True),
    "clip_exp": (None, 0.333),
    "decouple": (False, True),
    "decoupled_weight_decay": (False, True),
    "always_adapt": (False, True),
    "maximize": (False, True),
    "momentum": (0, 0.9),
    "nesterov": (False, True),
    "no_prox": (False, True),
    "rectify": (False, True),
    "split_groups": (False, True),
    "trust_clip": (False, True),
    "weight_decay": (0, 0.1),
}

ROWS = (
    Row(
        surefoot.SGD, torch.optim.SGD, more=({"momentum": 0.9, "dampening": -0.5}, {"weight_decay": torch.tensor(0.1)})
    ),
    Row(
        surefoot.Adam,
        torch.optim.Adam,
        more=({"betas": (0.0, 0.0)}, {"betas": (0.5, 0.3), "eps": 0.0}, {"weight_decay": torch.tensor(0.1)}),
    ),
    Row(surefoot.AdamW, torch.optim.AdamW, more=({"betas": (0.5, 0.3)},)),
    Row(surefoot.NAdam, torch.optim.NAdam, more=({"betas": (0.0, 0.9)}, {"momentum_decay": 0.0})),
    Row(surefoot.RAdam, torch.optim.RAdam, more=({"betas": (0.5, 0.9)}, {"betas": (0.9, 0.7)})),
    Row(surefoot.Adamax, torch.optim.Adamax, more=({"betas": (0.0, 0.5)},)),
    Row(surefoot.Adadelta, torch.optim.Adadelta, more=({"rho": 0.0}, {"rho": 1.0})),
    Row(surefoot.Adagrad, torch.optim.Adagrad, more=({"eps": 0.1, "lr_decay": 2},)),
    Row(surefoot.RMSprop, torch.optim.RMSprop, more=({"alpha": 0.5, "centered": True},)),
    Row(surefoot.Rprop, torch.optim.Rprop, more=({"step_sizes": (0.009, 0.011)},)),
    Row(surefoot.ASGD, torch.optim.ASGD, more=({"t0": 2, "lambd": 0.5}, {"t0": 0, "alpha": 0.5})),
    # It sums the squares of columns in a faster order than torch's norms do.
    Row(surefoot.Adafactor, torch.optim.Adafactor, more=({"eps": (1e-3, 0.1)},), admits=with_elements, exact=False),
    Row(
        surefoot.Muon,
        torch.optim.Muon,
        more=({"nesterov": False}, {"adjust_lr_fn": "original"}, {"adjust_lr_fn": "match_rms_adamw"}),
        admits=a_matrix,
    ),
    Row(surefoot.SparseAdam, torch.optim.SparseAdam, more=({"betas": (0.0, 0.5)},)),
    Row(
        surefoot.LBFGS,
        torch.optim.LBFGS,
        more=({"history_size": 2, "max_iter": 7}, {"line_search_fn": "strong_wolfe", "max_iter": 4, "max_eval": 50}),
        needs_closure=True,
    ),
    Row(
        surefoot.Lion,
        loop(lion, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0),
        more=({"betas": (0.0, 0.5)}, {"weight_decay": torch.tensor(0.1)}),
    ),
    Row(
        surefoot.Signum,
        loop(signum, lr=1e-3, momentum=0.9, weight_decay=0.0),
        more=({"momentum": 0.5},),
    ),
    Row(
        surefoot.AdEMAMix,
        loop(
            ademamix,
            lr=1e-3,
            betas=(0.9, 0.999, 0.9999),
            alpha=2.0,
            beta3_warmup=None,
            alpha_warmup=None,
            eps=1e-8,
            weight_decay=0.0,
        ),
        more=(
            {"betas": (0.0, 0.5, 0.9), "alpha": 4.0},
            {"beta3_warmup": 5, "alpha_warmup": 6},
            {"betas": (0.0, 0.9, 0.99), "beta3_warmup": 5},
        ),
    ),
    Row(
        surefoot.Adan,
        loop(adan, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False),
        more=({"betas": (0.0, 0.5, 0.0)},),
    ),
    Row(
        surefoot.AdaBelief,
        loop(
            adabelief,
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-16,
            weight_decay=0,
            amsgrad=False,
            decoupled_weight_decay=True,
            fixed_decay=False,
            rectify=True,
            degenerated_to_sgd=True,
        ),
        more=(
            {"eps": 1e-8, "betas": (0.5, 0.9)},
            {"fixed_decay": True, "weight_decay": 0.01},
            {"degenerated_to_sgd": False, "betas": (0.9, 0.6)},
        ),
    ),
    Row(
        surefoot.ADOPT,
        loop(
            adopt,
            lr=1e-3,
            betas=(0.9, 0.9999),
            eps=1e-6,
            clip_exp=0.333,
            weight_decay=0.0,
            decoupled_weight_decay=False,
        ),
        more=({"clip_exp": 0.25, "betas": (0.0, 0.5)},),
    ),
    Row(
        surefoot.AdamAtan2,
        loop(adam_atan2, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, a=1.27, b=1.0),
        more=({"a": 1.0, "b": 2.0, "betas": (0.0, 0.5)},),
    ),
    Row(
        surefoot.LaProp,
        loop(laprop, lr=4e-4, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.0),
        more=({"betas": (0.0, 0.5), "eps": 1e-8}, {"lr": 0.0}),
    ),
    Row(
        surefoot.QHAdam,
        loop(
            qhadam,
            lr=1e-3,
            betas=(0.9, 0.999),
            nus=(1.0, 1.0),
            weight_decay=0.0,
            decoupled_weight_decay=False,
            eps=1e-8,
        ),
        more=({"nus": (0.7, 1.0), "betas": (0.995, 0.999)}, {"nus": (0.5, 0.7), "betas": (0.0, 0.5)}),
    ),
    Row(
        surefoot.Yogi,
        loop(
            yogi,
            lr=1e-2,
            betas=(0.9, 0.999),
            eps=1e-3,
            initial_accumulator=1e-6,
            weight_decay=0,
        ),
        more=({"initial_accumulator": 0.1, "betas": (0.0, 0.5)},),
    ),
    Row(
        surefoot.AdamWScheduleFree,
        loop(
            schedule_free,
            lr=0.0025,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0,
            warmup_steps=0,
            r=0.0,
            weight_lr_power=2.0,
            train_mode=True,
        ),
        more=({"warmup_steps": 3, "r": 1.0}, {"betas": (0.5, 0.0), "weight_lr_power": 0.0}),
        exact=False,
    ),
    Row(
        surefoot.SGDScheduleFree,
        loop(
            schedule_free,
            lr=1.0,
            momentum=0.9,
            weight_decay=0,
            warmup_steps=0,
            r=0.0,
            weight_lr_power=2.0,
            train_mode=True,
        ),
        more=({"warmup_steps": 3, "r": 1.0}, {"momentum": 0.5, "lr": 0.1}),
        exact=False,
    ),
    Row(
        surefoot.RAdamScheduleFree,
        loop(
            schedule_free,
            lr=0.0025,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0,
            r=0.0,
            weight_lr_power=2.0,
            train_mode=True,
            silent_sgd_phase=True,
        ),
        more=({"silent_sgd_phase": False}, {"betas": (0.9, 0.5)}),
        exact=False,
    ),
    Row(
        surefoot.LAMB,
        loop(
            lamb,
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=0.01,
            max_grad_norm=1.0,
            bias_correction=True,
            grad_averaging=True,
            trust_clip=False,
            always_adapt=False,
            decoupled_weight_decay=False,
        ),
        more=({"bias_correction": False, "grad_averaging": False}, {"max_grad_norm": None, "betas": (0.0, 0.5)}),
        exact=False,
        reduces=True,
    ),
    Row(
        surefoot.LARS,
        loop(
            lars,
            lr=1.0,
            momentum=0,
            dampening=0,
            weight_decay=0,
            nesterov=False,
            trust_coeff=0.001,
            eps=1e-8,
            trust_clip=False,
            always_adapt=False,
        ),
        more=({"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "trust_coeff": 0.1},),
        exact=False,
        reduces=True,
    ),
    Row(
        surefoot.StableAdamW,
        loop(
            stable_adamw,
            lr=1e-3,
            betas=(0.9, 0.99),
            weight_decay=1e-2,
            eps=1e-6,
            decouple_lr=False,
            max_lr=None,
        ),
        more=({"betas": (0.0, 0.5)}, {"decouple_lr": True, "max_lr": 0.1, "lr": 0.05}),
        exact=False,
        reduces=True,
    ),
    Row(
        surefoot.NovoGrad,
        loop(
            novograd,
            lr=1e-3,
            betas=(0.95, 0.98),
            eps=1e-8,
            weight_decay=0,
            grad_averaging=False,
            amsgrad=False,
            decoupled_weight_decay=False,
        ),
        more=({"grad_averaging": True, "weight_decay": 0.1}, {"betas": (0.0, 0.0)}),
        exact=False,
        reduces=True,
    ),
    Row(
        surefoot.MARS,
        loop(
            mars,
            lr=3e-3,
            betas=(0.95, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            amsgrad=False,
            gamma=0.025,
            optimize_1d=False,
            lr_1d_factor=1.0,
            betas_1d=(0.9, 0.95),
            weight_decay_1d=0.1,
        ),
        more=({"optimize_1d": True}, {"gamma": 0.5, "lr_1d_factor": 0.1, "weight_decay_1d": 0.0}),
        exact=False,
        reduces=True,
    ),
    Row(
        surefoot.Prodigy,
        ProdigyLoop,
        more=(
            {"use_bias_correction": True, "d_coef": 0.5, "growth_rate": 1.5},
            {"safeguard_warmup": True, "beta3": 0.5, "d0": 1e-3, "betas": (0.0, 0.5), "lr": 0.1},
            {"slice_p": 3},
        ),
        exact=False,
        reduces=True,
    ),
    Row(
        surefoot.SOAP,
        loop(
            soap,
            lr=3e-3,
            betas=(0.95, 0.95),
            shampoo_beta=-1,
            eps=1e-8,
            weight_decay=0.01,
            precondition_frequency=10,
            max_precond_dim=10000,
            merge_dims=False,
            precondition_1d=False,
            normalize_grads=False,
            correct_bias=True,
        ),
        more=(
            {"precondition_frequency": 2, "precondition_1d": True, "shampoo_beta": 0.5},
            {"precondition_frequency": 3, "merge_dims": True, "max_precond_dim": 30},
            {"normalize_grads": True, "correct_bias": False},
        ),
        exact=False,
    ),
)
ELEMENTWISE = tuple(row for row in ROWS if row.elementwise)
DENSE = tuple(row for row in ROWS if row.ours.sparse is not Sparse.ONLY and not row.needs_closure)
SPARSE = tuple(row for row in ROWS if row.ours.sparse is not Sparse.REFUSED and not row.needs_closure)


@functools.cache
def torch_variants(oracle: Callable[..., torch.optim.Optimizer]) -> list[Options]:
    """Return the flag sets of torch's own database, if it has the oracle.

    Those for `capturable=True` are of use on CUDA only; here they are tried without it, for their other options.
    """
    info = next((info for info in torchs_database().optim_db if info.optim_cls is oracle), None)
    inputs = info.optim_inputs_func(device="cuda", dtype=torch.float32) if info else []
    return [{name: value for name, value in one.kwargs.items() if name != "capturable"} for one in inputs]


def label(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items()).replace(" ", "") or "default"


def cases(
    rows: Iterable[Row],
    *,
    engines: Iterable[str] = (),
    only_flags: bool = False,
    ends: bool = False,
    in_turn: Iterable[str] = (),
) -> pytest.MarkDecorator:
    """Parametrize a test over rows and their variants, and over the engines that each row takes.

    With `only_flags` the variants are combinations of flags, for compiled engines none and all of them; combinations of
    some are for the long run, and so they are for other engines than eager, which has the bits of the oracle, where all
    variants are asked for.  With `ends` each flag by itself is for the long run too, which leaves none and all of them.
    Of the engines that take turns (`in_turn`) each variant is tried with one, with the rest in the long run.
    """
    found, turns = [], list(in_turn)
    for number, row in enumerate(rows):
        settings = [*row.flag_variants()]
        for engine in row.engines(engines) if engines else [None]:
            variants = row.variants(few=engine in COMPILED)
            if only_flags:
                variants = [{}, settings[-1]] if engine in COMPILED else settings
            every = not only_flags and engine in (None, "eager", "default")
            few = row.flag_variants(few=True) if only_flags else row.variants(few=True)
            few = [settings[0], settings[-1]] if ends else variants if every else few
            short = {row.completed(options) for options in ({}, *few)}
            turn = number
            for options in variants:
                is_short = row.completed(options) in short
                waits = engine in turns and turns[turn % len(turns)] != engine
                asked = [engine] if engine else []
                name = "-".join((*asked, row.name, label(options)))
                marks = [pytest.mark.long] if waits or not is_short else []
                found.append(pytest.param(*asked, row, options, id=name, marks=marks))
                turn += is_short
    return pytest.mark.parametrize(("engine", "row", "options") if engines else ("row", "options"), found)


def each_row(rows: Iterable[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows])


each_engine = pytest.mark.parametrize("engine", list(ENGINES))


def with_third(row: Row, betas: tuple[Any, Any]) -> tuple[Any, ...]:
    """Return two betas, and the third where the optimizer has three."""
    return (*betas, *row.defaults["betas"][2:])


def unclipped(row: Row) -> Options:
    """Return the option that clips no gradients, where they are clipped by default."""
    return {"max_grad_norm": None} if "max_grad_norm" in inspect.signature(row.ours).parameters else {}


_ONCE: dict[tuple[Any, ...], Any] = {}


def once(make: Callable[..., Any], row: Row, options: Options, *more: Any) -> Any:
    """Return `make(row, options, *more)`, made once for the engines that are compared with it, which leave it alone.

    What was made last is kept, more of it than a row has variants.
    """
    key = (make, row.name, row.completed(options), *more)
    if key not in _ONCE:
        if len(_ONCE) == 64:
            del _ONCE[next(iter(_ONCE))]
        _ONCE[key] = make(row, options, *more)
    return _ONCE[key]


# What is optimized


def zoo(dtype: torch.dtype, admits: Callable[[Tensor], bool] = any_param) -> Params:
    """Make parameters of every kind, with the same values at each call."""
    normal = normals(dtype, seed=0)
    params = {
        "0-d": normal(),
        "empty": normal(0),
        "odd": normal(7),
        "matrix": normal(33, 17),
        "long": normal(20_011),
        "channels_last": normal(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "strided view": normal(8, 10)[:, ::2],
        "offset view": normal(40)[3:],
        "transposed": normal(5, 6).t(),
        "late": normal(4, 9),
        "now and then": normal(9),
        "never": normal(3, 3),
    }
    return {name: param.requires_grad_() for name, param in params.items() if admits(param)}


def normals(dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Return a function from shapes to random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, dtype=dtype, generator=generator)


def gradients(params: Params, step: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Make the gradients of a step: in the first ones of all layouts, some zero, some missing; from STEADY on alike.

    They are drawn in `dtype` and cast to that of the parameter, so that an oracle in float64 meets the same values.
    """
    drawn = _drawn(tuple(param.shape for param in params.values()), dtype, seed=100 + step)
    found: dict[str, Tensor | None] = {}
    for (name, param), values in zip(params.items(), drawn, strict=True):
        grad = values.to(param.dtype, copy=True)
        if name == "offset view":
            grad = grad * (grad.abs() > 1)
        if name == "never" or (step < STEADY and _missing(name, step)):
            found[name] = None
        else:
            found[name] = _laid_out(name, grad, step) if step < STEADY else torch.empty_like(param).copy_(grad)
    return found


@functools.lru_cache(maxsize=64)
def _drawn(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Return random tensors, which must not be written to: many tests ask for the same."""
    normal = normals(dtype, seed)
    return [normal(*shape) for shape in shapes]


def _missing(name: str, step: int) -> bool:
    return (name == "late" and step < 2) or (name == "now and then" and step % 3 == 1)


def _laid_out(name: str, grad: Tensor, step: int) -> Tensor:
    if step == 3:
        grad = torch.zeros_like(grad)
    if name == "matrix" and step == 2:
        return grad[:1, :1].expand(grad.shape)
    if name == "channels_last" and step % 2:
        return grad.to(memory_format=torch.channels_last)
    return grad.t().contiguous().t() if grad.dim() == 2 and step % 2 else grad


def groups(params: Params, *, named: bool = False) -> list[dict[str, Any]]:
    """Divide parameters, or pairs of names and parameters, into two groups."""
    found: list[Any] = list(params.items() if named else params.values())
    return [{"params": found[: len(found) // 2]}, {"params": found[len(found) // 2 :]}]


def train(
    optimizer: torch.optim.Optimizer,
    params: Params,
    dtype: torch.dtype,
    steps: Iterable[int] = range(STEPS),
    *,
    plain: bool = False,
) -> None:
    """Take steps; the learning rate is halved on the way, a number by replacing it, a tensor in place.

    With `plain` all gradients are contiguous; torch's foreach writes into some, which not every layout survives.
    """
    for step in steps:
        if step == STEADY + 1:
            halve_lr(optimizer)
        for name, grad in gradients(params, step, dtype).items():
            params[name].grad = (
                grad.clone(memory_format=torch.contiguous_format) if plain and grad is not None else grad
            )
        optimizer.step()


def halve_lr(optimizer: torch.optim.Optimizer) -> None:
    for lr in {id(group["lr"]): group["lr"] for group in optimizer.param_groups}.values():
        if isinstance(lr, Tensor):
            lr.mul_(0.5)
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] *= 0.5


def results(optimizer: torch.optim.Optimizer, params: Params) -> dict[str, Any]:
    """Return parameters and state by name."""
    found: dict[str, Any] = {}
    for name, param in params.items():
        found[name] = param.detach()
        found |= {f"{key} of {name}": value for key, value in optimizer.state.get(param, {}).items()}
    return found


# How results are compared

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, those of any NaN as -1."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().contiguous()
    return flat.view(_BITS[flat.element_size()]).masked_fill(flat.isnan(), -1)


def same(actual: Any, expected: Any) -> bool:
    """Whether two values have the same type, dtype, shape and bits; all NaN are equal."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return type(actual) is type(expected) and actual == expected
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(bits(actual), bits(expected)) if actual.is_floating_point() else torch.equal(actual, expected)


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same(actual[name], value)] == []


def assert_close(actual: Mapping[str, Any], expected: Mapping[str, Any], **tolerance: float) -> None:
    """Assert agreement, to the rounding of the dtype unless a tolerance is given."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if not same(actual[name], value):  # which is told much faster
            torch.testing.assert_close(
                actual[name], value, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )
