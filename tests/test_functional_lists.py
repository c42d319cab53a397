"""surefoot.functional's steps of lists: torch's signatures, and torch's results on every setting of the table."""

import importlib
import inspect

import pytest
import torch

import surefoot
from conformance import (
    DENSE,
    ELEMENTWISE,
    ENGINES,
    ROWS,
    STEPS,
    assert_close,
    assert_same,
    cases,
    gradients,
    unclipped,
    zoo,
)
from surefoot import functional, optimizers

FUNCTIONS = [name for name in functional.__all__ if name not in ("init", "update")]
ROW_OF = {optimizers.function_name(row.name): row for row in ROWS}
IN_TORCH = [name for name in FUNCTIONS if ROW_OF[name].name not in optimizers.NOT_IN_TORCH]
LISTS = {"sum": "state_sums", "step": "state_steps", "variance": "variances"}
PARTS = {
    "betas": ("beta1", "beta2", "beta3"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
    "eps": ("eps1", "eps2"),
}


def torchs(name):
    """Return torch's function of a name, wherever this release has it."""
    home = {"adafactor": "_adafactor", "muon": "_muon", "sparse_adam": "_functional"}.get(name, name)
    public = getattr(torch.optim, "functional", None)
    return getattr(public, name, None) or getattr(importlib.import_module(f"torch.optim.{home}"), name)


def name_of(row):
    return next(name for name, known in ROW_OF.items() if known is row)


@pytest.mark.parametrize("name", IN_TORCH)
def test_signatures_are_torchs(name):
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (getattr(functional, name), torchs(name))
    )
    assert ours == theirs


def test_signatures_of_algorithms_that_torch_does_not_have():
    """Lists as the state has them, options of engines with a default, hyperparameters without."""
    assert str(inspect.signature(functional.novograd)) == (
        "(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, foreach=None, capturable=False, "
        "differentiable=False, fused=None, grad_scale=None, found_inf=None, has_complex=False, *, lr, beta1, beta2, "
        "eps, weight_decay, grad_averaging, amsgrad, decoupled_weight_decay, maximize)"
    )
    assert "max_grad_norm" not in inspect.signature(functional.lamb).parameters  # it is an option of the step
    assert set(functional.__all__) <= set(dir(functional))
    with pytest.raises(AttributeError, match="module 'surefoot.functional' has no attribute 'adamx'"):
        functional.adamx  # noqa: B018


def test_every_algorithm_but_lbfgs_has_a_function():
    assert set(FUNCTIONS) == set(ROW_OF) - {"lbfgs"}


class Caller:
    """Keeps the state of parameters as lists and calls a function, ours or torch's, with those that have a gradient."""

    def __init__(self, row, function, params, options):
        self.function, self.params, self.lists = function, params, {}
        self.group = row.ours([torch.zeros(1, 1)]).defaults | options
        self.arguments = inspect.signature(function).parameters
        self.shared = {
            each.name: torch.tensor(float(each.new(self.group)), dtype=torch.float64) for each in row.ours.group_scalars
        }
        self.counts = "momentum_buffer_list" not in self.arguments or row.name != "SGD"
        slots = [slot for slot in row.ours.slots if slot.when is None or slot.when in self.arguments]
        for each in (*slots, *row.ours.scalars):
            names = {"momentum_buffer": ["momentum_buffer_list", "muon_momentum_bufs"]}
            known = names.get(each.name, [LISTS.get(each.name, f"{each.name}s")])
            name = next(name for name in known if name in self.arguments)
            self.lists[name] = [self.first(row, each, param) for param in params.values()]

    def first(self, row, each, param):
        if (each.name == "momentum_buffer" and row.name == "SGD") or each.name == "z":  # begins as something else
            return None
        if isinstance(each, surefoot.Scalar):
            return each.new(self.group, param.device)
        return None if each.shape_for(param, self.group) is None else each.new(param.detach(), self.group)

    def options(self, **given):
        found = {name: value for name, value in {**self.group, **given}.items() if name in self.arguments}
        for whole, parts in PARTS.items():
            if parts[0] in self.arguments:
                found |= dict(zip(parts, self.group[whole], strict=False))
        found |= self.shared
        if "has_complex" in self.arguments:
            found["has_complex"] = any(map(torch.is_complex, self.params.values()))
        return {name: value for name, value in found.items() if name not in self.lists}

    def unused(self, name):
        when = {"max_exp_avg_sqs": "amsgrad", "grad_avgs": "centered"}
        return name in when and not self.group[when[name]]

    def step(self, grads, **given):
        rows = [row for row, name in enumerate(self.params) if grads[name] is not None]
        params = [list(self.params.values())[row] for row in rows]
        lists = {name: [] if self.unused(name) else [each[row] for row in rows] for name, each in self.lists.items()}
        if self.function.__name__ == "sparse_adam":
            lists["state_steps"] = [count + 1 for count in lists["state_steps"]]
        if self.function.__module__.startswith("torch") and "momentum" in self.group and not self.group["momentum"]:
            lists = {n: [] if n == "momentum_buffer_list" and self.counts else e for n, e in lists.items()}
        given_grads = [grad for grad in grads.values() if grad is not None]
        with torch.no_grad():
            self.function(params, given_grads, **lists, **self.options(**given))
        for name, each in lists.items():
            for row, value in zip(rows, each, strict=False):
                self.lists[name][row] = value

    def results(self):
        state = {f"{name}[{row}]": value for name, each in self.lists.items() for row, value in enumerate(each)}
        return {**{name: param.detach() for name, param in self.params.items()}, **state}


def train(callers, dtype, engine):
    for step in range(STEPS):
        for caller, options in zip(callers, engine, strict=True):
            caller.step(gradients(caller.params, step, dtype), **options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.long)])
@cases([row for row in DENSE if row.name not in optimizers.NOT_IN_TORCH])
def test_eager_steps_have_torchs_bits(row, options, dtype, record_property):
    dtype = getattr(torch, dtype)
    options = {name: value for name, value in options.items() if name not in ENGINES["eager"]}
    params = [zoo(dtype, row.admits) for _ in range(2)]
    functions = getattr(functional, name_of(row)), torchs(name_of(row))
    callers = [
        Caller(row, function, *pair) for function, pair in zip(functions, ((p, options) for p in params), strict=True)
    ]
    train(callers, dtype, ({"foreach": False}, {"foreach": False}))
    equal = assert_same if row.exact else assert_close
    equal(callers[0].results(), callers[1].results())
    record_property("compared", f"functional: {'same bits as' if row.exact else 'to rounding with'} torch's function")


@cases(ELEMENTWISE, engines=["cpu"], only_flags=True)
def test_default_steps_have_the_bits_of_the_class(engine, row, options, record_property):
    ours, theirs = zoo(torch.float32), zoo(torch.float32)
    caller, optimizer = (
        Caller(row, getattr(functional, name_of(row)), ours, options),
        row.build(theirs.values(), options | unclipped(row)),
    )
    for step in range(STEPS):
        grads = gradients(theirs, step, torch.float32)
        for name, grad in grads.items():
            theirs[name].grad = grad
        optimizer.step()
        caller.step(gradients(ours, step, torch.float32))
    assert_same({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in theirs.items()})
    record_property("compared", "functional: same bits as the class, engine of choice")
