"""Names of parameters that the optimizer was given without."""

import gc

import pytest
import torch
from torch import nn

from surefoot import SGD
from surefoot.telemetry import Telemetry, parameter_names


@pytest.fixture(autouse=True, scope="module")
def no_other_objects():
    """Hide what earlier tests have left, models among it; to look through all of it takes long, too."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_other_models():
    """Collect the models of earlier tests."""
    gc.collect()


def model():
    """Make a small model, named as no other test's."""
    return nn.Sequential(nn.ModuleDict({"embed_in_names_test": nn.Linear(2, 2)}), nn.Linear(2, 1))


NAMES = ["0.embed_in_names_test.weight", "0.embed_in_names_test.bias", "1.weight", "1.bias"]


def test_names_that_were_given_count():
    net = model()
    assert parameter_names(SGD([("a", net[1].weight), ("b", net[1].bias)])) == ["a", "b"]


def test_parameters_that_were_added_without_names_are_named_by_their_place():
    params = [torch.ones(2, requires_grad=True) for _ in range(4)]
    groups = [{"params": [("a", params[0])]}, {"params": [(7, params[1])]}]
    optimizer = SGD(groups, telemetry=Telemetry("7"), nonfinite="skip")
    optimizer.param_groups[0]["params"] += params[2:3]
    optimizer.param_groups[1]["params"].clear()
    optimizer.param_groups[1]["params"] += [params[1], params[3]]
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    assert parameter_names(optimizer) == ["a", "param_groups[0].params[1]", "7", "param_groups[1].params[1]"]
    assert optimizer.telemetry.latest().names == ("7",)
    params[2].data = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"the gradient of `params\[1\]` of shape \(3,\) has shape"):
        optimizer.step()


def test_a_model_in_memory_names_its_parameters():
    net = model()
    names = parameter_names(SGD(net.parameters()))
    assert names[:2] == NAMES[:2]
    assert [name.removeprefix("Sequential.") for name in names] == NAMES


def test_tensors_of_no_model_are_named_by_their_place():
    net, free = model(), [torch.ones(2, requires_grad=True) for _ in range(2)]
    assert parameter_names(SGD([free[0], net[0]["embed_in_names_test"].weight])) == ["params[0]", NAMES[0]]
    groups = [{"params": [free[0]]}, {"params": free[1:]}]
    assert parameter_names(SGD(groups)) == ["param_groups[0].params[0]", "param_groups[1].params[0]"]


def test_models_of_the_same_kind_keep_apart():
    class Critic(nn.Sequential):
        pass

    one, other = model(), Critic(*model())
    names = parameter_names(SGD([*one.parameters(), *other.parameters()]))
    assert names[0] == f"Sequential.{NAMES[0]}"
    assert names[4] == f"Critic.{NAMES[0]}"
    twins = [model(), model()]
    names = parameter_names(SGD([param for twin in twins for param in twin.parameters()]))
    assert names[0] == f"Sequential.{NAMES[0]}"
    assert names[4] == f"Sequential.{NAMES[0]} (2)"
    assert len(set(names)) == 8


def test_names_are_looked_for_again_when_there_are_other_parameters(monkeypatch):
    net, free = model(), torch.ones(2, requires_grad=True)
    optimizer = SGD(net[1].parameters())
    looked = []
    monkeypatch.setattr("surefoot.telemetry.names.gc.get_objects", lambda: looked.append(1) or [net])
    assert parameter_names(optimizer) == parameter_names(optimizer) == ["1.weight", "1.bias"]
    assert len(looked) == 1
    optimizer.add_param_group({"params": [free]})
    assert parameter_names(optimizer) == ["1.weight", "1.bias", "param_groups[1].params[0]"]
    assert len(looked) == 2


def test_wrappers_leave_no_trace():
    net = model()
    wrapped = nn.DataParallel(net)
    holder = nn.Module()
    holder._orig_mod = wrapped
    assert parameter_names(SGD(wrapped.parameters()))[:2] == NAMES[:2]
    del holder
    gc.collect()
    assert parameter_names(SGD(wrapped.parameters()))[:2] == NAMES[:2]


def test_half_made_modules_are_passed_over():
    class Broken(nn.Module):
        def __init__(self):
            self.left = True

    broken = Broken.__new__(Broken)
    assert parameter_names(SGD(model().parameters()))
    assert isinstance(broken, nn.Module)
