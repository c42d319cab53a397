"""Steps while a mode or transform is active that must see torch's operations: everything is shown, nothing is read."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import surefoot
from helpers import ALGORITHMS, accepted, make_params, name_of, named, params_of, set_grads, snapshot, train
from surefoot.tensors.modes import mode_is_active

STEPPED = [cls for cls in ALGORITHMS if cls is not surefoot.LBFGS]
"""LBFGS decides by values what it computes, which no fake tensor has; torch's raises as well."""
each_algorithm = pytest.mark.parametrize("cls", STEPPED, ids=name_of)
DENSE = [cls for cls in STEPPED if cls is not surefoot.SparseAdam]
RULES = [cls for cls in DENSE if cls not in (surefoot.Adafactor, surefoot.Muon)]


class Log(TorchDispatchMode):
    """Notes every operation that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    """Notes every function of torch that is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def fake_training(cls, **options):
    """Train a layer of fake tensors as memory estimators do."""
    with FakeTensorMode():
        model = nn.Linear(3, 3, bias=False)
        made = {name: value() if callable(value) else value for name, value in options.items()}
        optimizer = cls(model.parameters(), **made)
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            if cls is surefoot.SparseAdam:
                model.weight.grad = model.weight.grad.to_sparse(1)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


OPTIONS = {
    "plain": {},
    "clipped and averaged": {"max_grad_norm": 1.0, "max_grad_value": 1.0, "ema": 0.9},
    "guarded": {"nonfinite": "skip"},
    "measured": {"telemetry": True},
}


@pytest.mark.in_turn("options", every=2)
@each_algorithm
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=OPTIONS)
def test_fake_tensors_are_stepped(cls, options):
    optimizer = fake_training(cls, **options)
    for entry in optimizer.state.values():
        assert all(type(value).__name__ == "FakeTensor" for value in entry.values() if isinstance(value, torch.Tensor))


@each_algorithm
def test_fake_learning_rates_are_taken(cls):
    fake_training(cls, lr=lambda: torch.tensor(0.1))


@pytest.mark.parametrize("cls", RULES, ids=name_of)
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_fake_tensors_are_stepped_by_whatever_shows_operations(cls, options):
    fake_training(cls, **options)


def test_fake_parameters_are_stepped_outside_of_their_mode():
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3))
        optimizer = surefoot.AdamW([param])
        param.grad = torch.ones(3)
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("cls", DENSE, ids=name_of)
@pytest.mark.parametrize("warm", [0, 3], ids=["first step", "fast lane"])
@pytest.mark.parametrize("mode", [Log, FunctionLog], ids=name_of)
def test_a_mode_sees_the_arithmetic_and_the_fast_lane_comes_back(cls, warm, mode):
    watched, alone = (train(cls(make_params()), steps=warm) for _ in range(2))
    for optimizer in watched, alone:
        set_grads(optimizer, 7)
    with mode() as log:
        watched.step()
    alone.step()
    assert len(log.seen) > 2 * len(params_of(watched))
    for seed in range(8, 11):
        train(watched, seed, steps=1)
        train(alone, seed, steps=1)
    torch.testing.assert_close(snapshot(watched)["values"], snapshot(alone)["values"])
    torch.testing.assert_close(snapshot(watched)["state"], snapshot(alone)["state"])
    assert bool(watched.__dict__.get("_step_cache")) == bool(alone.__dict__.get("_step_cache"))
    if cls in RULES:
        assert bool(watched._step_cache.fast) == bool(alone._step_cache.fast)


def test_a_default_device_is_no_reason_to_step_aside():
    assert not mode_is_active()
    with torch.device("cpu"):
        assert not mode_is_active()
        with Log():
            assert mode_is_active()
    with FunctionLog():
        assert mode_is_active()
    assert not mode_is_active()


@pytest.mark.in_turn("tracing")
@pytest.mark.parametrize("cls", RULES, ids=name_of)
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_a_recorded_step_is_the_step(cls, tracing):
    def step(value, grad):
        param = value.clone().requires_grad_()
        param.grad = grad
        cls([param], lr=0.1).step()
        return param.detach()

    value, grad = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.25, -1.0])
    graph = make_fx(step, tracing_mode=tracing)(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(graph(value, grad), step(value, grad))


def test_a_step_is_recorded_that_was_in_the_fast_lane():
    optimizer = train(surefoot.AdamW(make_params([(3,)])), steps=3)
    (param,) = params_of(optimizer)

    def step(grad):
        param.grad = grad
        optimizer.step()
        return param.detach()

    graph = make_fx(step)(torch.ones(3))
    names = {str(node.target) for node in graph.graph.nodes}
    assert any(name.startswith("aten.lerp") for name in names)
    assert any(name.startswith("aten.copy_") for name in names)
    assert "aten._local_scalar_dense.default" not in names


@pytest.mark.parametrize("cls", RULES, ids=name_of)
def test_a_functionalized_step_is_the_step(cls):
    def step(value, grad):
        param = value.clone()
        param.grad = grad
        cls([param], lr=0.1).step()
        return param

    value, grad = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.25, -1.0])
    torch.testing.assert_close(torch.func.functionalize(step)(value, grad), step(value, grad))


def test_flags_that_are_fake_tensors_count_as_set():
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        surefoot.SGD([param], weight_decay=torch.tensor(0.1)).step()


@pytest.mark.parametrize("cls", RULES, ids=name_of)
def test_parameters_without_dimensions_keep_their_dtype_under_a_mode(cls):
    param = nn.Parameter(torch.tensor(2.0))
    optimizer, alone = cls([param]), cls([twin := nn.Parameter(torch.tensor(2.0))])
    for _ in range(3):
        param.grad, twin.grad = torch.tensor(0.5), torch.tensor(0.5)
        with Log():
            optimizer.step()
        alone.step()
    torch.testing.assert_close(param, twin)
    assert "foreach" in accepted(cls)
    assert named([param])[0][1].dtype is torch.float32
