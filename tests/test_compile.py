"""`torch.compile` around a training function: it breaks off at the optimizer's calls, and changes nothing."""

import itertools

import pytest
import torch
from torch import nn

import surefoot
from helpers import assert_same
from surefoot.dynamo import opaque

ALGORITHMS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 0.1},
    "Muon": {"lr": 0.1},
    "LBFGS": {"lr": 0.1},
}
WHOLE = {"max_grad_norm": 0.1, "ema": 0.9, "telemetry": True, "nonfinite": "skip"}


def ways():
    """Yield every algorithm with and without a closure, and options; all of them for one algorithm, others for long."""
    for name, closure, options in itertools.product(ALGORITHMS, (False, True), ({}, WHOLE)):
        if name != "LBFGS" or (closure and not options):  # which needs one, and takes no options
            marks = [] if name == "AdamW" or (closure and not options) else [pytest.mark.long]
            text = f"{name}-{'closure' if closure else 'backward'}-{'whole' if options else 'plain'}"
            yield pytest.param(name, closure, options, id=text, marks=marks)


def trained(name, compiled, *, closure, **options):
    """Train a small model by a function that is compiled or not; give its parameters."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)), torch.ones(5, 3)
    optimizer = getattr(surefoot, name)(model.parameters(), **ALGORITHMS[name], **options)

    def evaluate():
        optimizer.zero_grad()
        loss = model(data).square().sum()
        loss.backward()
        return loss

    def train():
        if closure:
            return optimizer.step(evaluate)
        loss = evaluate()
        optimizer.step()
        return loss

    functions = [train, lambda: optimizer.step(evaluate) if closure else optimizer.step()]
    for function in functions:
        function = torch.compile(function, backend="eager") if compiled else function  # noqa: PLW2901
        for _ in range(4):
            function()
    return [param.detach() for param in model.parameters()]


@pytest.mark.filterwarnings("ignore")  # torch warns of what it does not compile
@pytest.mark.parametrize(("name", "closure", "options"), list(ways()))
def test_a_compiled_function_trains_as_an_uncompiled_one(name, closure, options):
    torch._dynamo.reset()
    assert_same(*(trained(name, compiled, closure=closure, **options) for compiled in (False, True)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_optimizer_is_built_inside_a_compiled_function(name):
    torch._dynamo.reset()

    def trained():
        torch.manual_seed(0)
        model, data = nn.Sequential(nn.Linear(3, 2, bias=False)), torch.ones(5, 3)

        def train(data):
            optimizer = getattr(surefoot, name)(model.parameters(), **ALGORITHMS[name])
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

            def evaluate():
                optimizer.zero_grad()
                loss = model(data).square().sum()
                loss.backward()
                return loss

            for _ in range(3):
                evaluate()
                optimizer.step(evaluate)
                scheduler.step()
            optimizer.load_state_dict(optimizer.state_dict())
            return optimizer

        return model, data, train

    found = []
    for compile_ in (lambda function: function, lambda function: torch.compile(function, backend="eager")):
        model, data, train = trained()
        optimizer = compile_(train)(data)
        if name != "LBFGS":
            optimizer.add_param_group({"params": nn.Parameter(torch.ones(2, 2))})
        assert optimizer.defaults["lr"] == 0.1
        found.append([model[0].weight.detach(), optimizer.param_groups[0]["lr"], optimizer.state_dict()["state"]])
    assert_same(*found)


def test_hooks_work_without_dynamos_private_name(monkeypatch):
    """They are then compiled for each shape, but not into the function."""
    monkeypatch.delattr(torch._dynamo.eval_frame, "skip_code")
    taken = []

    @opaque
    def take(value):
        assert not torch.compiler.is_compiling()
        taken.append(value.sum().item())

    @torch.compile(backend="eager")
    def step(value):
        take(value)
        return value + 1

    assert step(torch.ones(3)).tolist() == [2.0] * 3
    assert step(torch.ones(4)).tolist() == [2.0] * 4
    assert taken == [3.0, 4.0]
