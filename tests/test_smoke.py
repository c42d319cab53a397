"""The short run, for versions that the whole suite does not run on: every optimizer, and what stands around them."""

import copy

import pytest
import torch
from torch import nn

import surefoot
from helpers import ALGORITHMS, accepted, make_params, name_of, params_of, train, twin
from surefoot import doctor, functional, lr_scheduler, swa_utils
from surefoot.tensors import guards
from surefoot.tensors.native import guards as native

WAYS = {"default": {}, "eager": {"foreach": False}, "foreach": {"foreach": True}}
each_algorithm = pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)


def assert_equal_training(ours, theirs):
    for actual, expected in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@each_algorithm
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_goes_the_way_of_torch_and_takes_its_checkpoint(cls, way):
    if not WAYS[way].keys() <= accepted(cls):
        pytest.skip("has no choice of engines")
    ours, theirs = cls(make_params(), **WAYS[way]), twin(cls)(make_params())
    assert_equal_training(train(ours, steps=4), train(theirs, steps=4))
    resumed, model = cls(make_params(), **WAYS[way]), twin(cls)(make_params())
    resumed.load_state_dict(copy.deepcopy(theirs.state_dict()))
    model.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_equal_training(train(resumed, first=4), train(model, first=4))


@each_algorithm
def test_a_saved_training_goes_on_with_the_same_bits(cls, tmp_path):
    first, resumed = (nn.ParameterList(make_params(seed=seed)) for seed in (0, 1))
    optimizer, other = cls(first), cls(resumed)
    surefoot.save(tmp_path / "training", model=first, optimizer=train(optimizer))
    surefoot.load(tmp_path / "training", model=resumed, optimizer=other)
    for actual, expected in zip(params_of(train(other, 3)), params_of(train(optimizer, 3)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cls", [surefoot.SGD, surefoot.AdamW])
def test_what_stands_around_a_step(cls):
    model = nn.Linear(3, 2)
    optimizer = cls(model.parameters(), lr=0.1, max_grad_norm=1.0, ema=0.9, nonfinite="skip", telemetry=True)
    scheduler, average = lr_scheduler.StepLR(optimizer, 2), swa_utils.AveragedModel(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert all(param.isfinite().all() for param in (*model.parameters(), *average.parameters()))


@pytest.mark.filterwarnings("ignore")  # torch warns of what it does not compile
def test_a_compiled_function_trains():
    model = nn.Linear(3, 2)
    optimizer = surefoot.AdamW(model.parameters())
    before = model.weight.detach().clone()

    @torch.compile(backend="eager")
    def training_step():
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()

    training_step()
    assert not torch.equal(model.weight, before)


def test_a_step_without_an_optimizer():
    params, grads, averages, squares = ([torch.ones(3, 4)] for _ in range(4))
    steps = [torch.tensor(0.0)]
    options = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
    functional.adam(params, grads, averages, squares, [], steps, lr=0.1, **options)
    assert steps[0] == 1
    assert (params[0] < 1).all()


def test_guards_are_native_or_the_doctor_says_why_not():
    found = doctor.examine().facts["guard"]
    assert found["kind"] == ("native" if found["reason"] is None else "plain")
    assert (type(guards.make_guard([[torch.zeros(3)]])) is native.TensorGuard) == (found["kind"] == "native")
