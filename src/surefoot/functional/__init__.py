"""The steps of the algorithms as functions: on lists in place, as in torch.optim.functional, and as pure functions.

`adam`, `sgd` and the others take torch's arguments in torch's order, update `params` and the lists of state in place,
and keep no tensor: the caller has the state.  Functions of algorithms that torch does not have follow from their
classes: the lists in the order of the state, then options of engines, then hyperparameters by keyword.  `init` and
`update` take any optimizer's class and change nothing: they return new parameters and new state, and so work under
`torch.func`.
"""

# A declaration is its arguments, in torch's order; packed, since a line for each would hide their groups.

from collections.abc import Callable
from typing import Any

from torch import Tensor

from surefoot import optimizers
from surefoot.functional.lists import function_of, steps_lists
from surefoot.functional.pure import init, update
from surefoot.rule.hyperparameters import Number

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "init",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sparse_adam",
    "update",
]

_NOT_IN_TORCH = {optimizers.function_name(name): name for name in sorted(optimizers.NOT_IN_TORCH)}
__all__ += list(_NOT_IN_TORCH)


def __getattr__(name: str) -> Callable[..., None]:
    """Make the function of an algorithm that torch does not have when it is first asked for."""
    if name not in _NOT_IN_TORCH:
        raise AttributeError(f"module 'surefoot.functional' has no attribute {name!r}")
    function: Callable[..., None] = globals().setdefault(name, function_of(_NOT_IN_TORCH[name]))
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


Tensors = list[Tensor]
Buffers = list[Tensor | None]
Choice = bool | None
Scaler = Tensor | None

# fmt: off

@steps_lists("Adadelta")
def adadelta(
    params: Tensors, grads: Tensors, square_avgs: Tensors, acc_deltas: Tensors, state_steps: Tensors,
    capturable: bool = False, foreach: Choice = None, differentiable: bool = False, has_complex: bool = False,
    *, lr: Number, rho: float, eps: float, weight_decay: Number, maximize: bool,
) -> Any:
    """Take a step of `surefoot.Adadelta` on lists, in place."""
    return locals()


@steps_lists("Adafactor")
def adafactor(
    params: Tensors, grads: Tensors, row_vars: Buffers, col_vars: Buffers, variances: Buffers, state_steps: Tensors,
    foreach: Choice = None, grad_scale: Scaler = None, found_inf: Scaler = None, has_complex: bool = False,
    *, d: float, lr: Number, beta2_decay: float, weight_decay: Number, eps1: float | None, eps2: float, maximize: bool,
) -> Any:
    """Take a step of `surefoot.Adafactor` on lists, in place.

    A matrix has an entry in `row_vars` and `col_vars`, a vector or a number in `variances`; the others are None.
    """
    return locals()


@steps_lists("Adagrad")
def adagrad(
    params: Tensors, grads: Tensors, state_sums: Tensors, state_steps: Tensors,
    fused: Choice = None, grad_scale: Scaler = None, found_inf: Scaler = None, has_sparse_grad: bool = False,
    foreach: Choice = None, differentiable: bool = False, has_complex: bool = False,
    *, lr: Number, weight_decay: Number, lr_decay: float, eps: float, maximize: bool,
) -> Any:
    """Take a step of `surefoot.Adagrad` on lists, in place; of sparse gradients on their rows only."""
    return locals()


@steps_lists("Adam")
def adam(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors,
    state_steps: Tensors,
    foreach: Choice = None, capturable: bool = False, differentiable: bool = False, fused: Choice = None,
    grad_scale: Scaler = None, found_inf: Scaler = None, has_complex: bool = False,
    decoupled_weight_decay: bool = False,
    *, amsgrad: bool, beta1: Number, beta2: Number, lr: Number, weight_decay: Number, eps: float, maximize: bool,
) -> Any:
    """Take a step of `surefoot.Adam` on lists, in place; without `amsgrad` nobody looks at `max_exp_avg_sqs`."""
    return locals()


@steps_lists("Adamax")
def adamax(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_infs: Tensors, state_steps: Tensors,
    foreach: Choice = None, maximize: bool = False, differentiable: bool = False, capturable: bool = False,
    has_complex: bool = False,
    *, eps: float, beta1: float, beta2: float, lr: Number, weight_decay: Number,
) -> Any:
    """Take a step of `surefoot.Adamax` on lists, in place."""
    return locals()


@steps_lists("AdamW")
def adamw(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors,
    state_steps: Tensors,
    foreach: Choice = None, capturable: bool = False, differentiable: bool = False, fused: Choice = None,
    grad_scale: Scaler = None, found_inf: Scaler = None, has_complex: bool = False,
    *, amsgrad: bool, beta1: Number, beta2: Number, lr: Number, weight_decay: Number, eps: float, maximize: bool,
) -> Any:
    """Take a step of `surefoot.AdamW` on lists, in place; without `amsgrad` nobody looks at `max_exp_avg_sqs`."""
    return locals()


@steps_lists("ASGD")
def asgd(
    params: Tensors, grads: Tensors, axs: Tensors, mus: Tensors, etas: Tensors, state_steps: Tensors,
    foreach: Choice = None, maximize: bool = False, differentiable: bool = False, capturable: bool = False,
    has_complex: bool = False,
    *, lambd: float, lr: Number, t0: float, alpha: float, weight_decay: Number,
) -> Any:
    """Take a step of `surefoot.ASGD` on lists, in place; `mus` begin as 1, `etas` as `lr`."""
    return locals()


@steps_lists("Muon")
def muon(
    params: Tensors, grads: Tensors, muon_momentum_bufs: Tensors,
    *, foreach: Choice = None, lr: Number, weight_decay: Number, momentum: float, nesterov: bool,
    ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float, adjust_lr_fn: str | None, has_complex: bool,
) -> Any:
    """Take a step of `surefoot.Muon` on lists of matrices, in place."""
    return locals()


@steps_lists("NAdam")
def nadam(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, mu_products: Tensors,
    state_steps: Tensors,
    decoupled_weight_decay: bool = False, foreach: Choice = None, capturable: bool = False,
    differentiable: bool = False, has_complex: bool = False, maximize: bool = False,
    *, beta1: float, beta2: float, lr: Number, weight_decay: Number, momentum_decay: float, eps: float,
) -> Any:
    """Take a step of `surefoot.NAdam` on lists, in place; `mu_products` begin as 1."""
    return locals()


@steps_lists("RAdam")
def radam(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, state_steps: Tensors,
    decoupled_weight_decay: bool = False, foreach: Choice = None, differentiable: bool = False,
    capturable: bool = False, has_complex: bool = False, maximize: bool = False,
    *, beta1: float, beta2: float, lr: Number, weight_decay: Number, eps: float,
) -> Any:
    """Take a step of `surefoot.RAdam` on lists, in place."""
    return locals()


@steps_lists("RMSprop")
def rmsprop(
    params: Tensors, grads: Tensors, square_avgs: Tensors, grad_avgs: Tensors, momentum_buffer_list: Tensors,
    state_steps: Tensors,
    foreach: Choice = None, maximize: bool = False, differentiable: bool = False, capturable: bool = False,
    has_complex: bool = False,
    *, lr: Number, alpha: float, eps: float, weight_decay: Number, momentum: float, centered: bool,
) -> Any:
    """Take a step of `surefoot.RMSprop` on lists, in place.

    Nobody looks at `grad_avgs` unless `centered`, and at `momentum_buffer_list` without momentum.
    """
    return locals()


@steps_lists("Rprop")
def rprop(
    params: Tensors, grads: Tensors, prevs: Tensors, step_sizes: Tensors, state_steps: Tensors,
    foreach: Choice = None, capturable: bool = False, maximize: bool = False, differentiable: bool = False,
    has_complex: bool = False,
    *, step_size_min: float, step_size_max: float, etaminus: float, etaplus: float,
) -> Any:
    """Take a step of `surefoot.Rprop` on lists, in place; `step_sizes` begin as the learning rate."""
    return locals()


@steps_lists("SGD")
def sgd(
    params: Tensors, d_p_list: Tensors, momentum_buffer_list: Buffers,
    has_sparse_grad: bool = False, foreach: Choice = None, fused: Choice = None, grad_scale: Scaler = None,
    found_inf: Scaler = None,
    *, weight_decay: Number, momentum: float, lr: Number, dampening: float, nesterov: bool, maximize: bool,
) -> Any:
    """Take a step of `surefoot.SGD` on lists, in place.

    A None in `momentum_buffer_list` says that this is the first step of a parameter, and is replaced by its buffer.
    """
    return locals()


@steps_lists("SparseAdam")
def sparse_adam(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, state_steps: list[int],
    *, eps: float, beta1: float, beta2: float, lr: Number, maximize: bool,
) -> Any:
    """Take a step of `surefoot.SparseAdam` on lists, in place; `state_steps` are ints, which the caller has counted."""
    return locals()
