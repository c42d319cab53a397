"""Schedule-free optimizers: their two modes, what a checkpoint holds, and what is refused."""

import copy

import pytest
import torch

import surefoot
from conformance import normals
from helpers import assert_same, snapshot

CLASSES = (surefoot.AdamWScheduleFree, surefoot.SGDScheduleFree, surefoot.RAdamScheduleFree)
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def made(cls, dtype=torch.float32, **options):
    normal = normals(torch.float32, seed=0)
    params = [normal(*shape).to(dtype).requires_grad_() for shape in ((4, 3), (7,), ())]
    extra = {"silent_sgd_phase": False} if cls is surefoot.RAdamScheduleFree else {}
    return cls(params, lr=0.05, **extra, **options), params


def step(optimizer, params, number):
    for index, param in enumerate(params):
        param.grad = normals(torch.float32, seed=100 * number + index)(*param.shape).to(param.dtype)
    optimizer.step()


def values(params):
    return [param.detach().clone() for param in params]


def by_hand(start, grads_of, lr, beta1, steps):
    """SGD in the form of the paper, which keeps x and z: the weights to evaluate, in float64."""
    x, z = start.double(), start.double()
    for t in range(1, steps + 1):
        y = (1 - beta1) * z + beta1 * x
        z = z - lr * (grads_of(t).double() + 0.1 * y)
        x = x + (z - x) / t
    return x, (1 - beta1) * z + beta1 * x


def test_it_is_the_algorithm_of_the_paper():
    optimizer, params = made(surefoot.SGDScheduleFree, torch.float64, momentum=0.8, weight_decay=0.1)
    start = params[0].detach().clone()
    for number in range(1, 11):
        step(optimizer, params, number)

    def grads_of(t):
        return normals(torch.float32, seed=100 * t)(4, 3)

    x, y = by_hand(start, grads_of, 0.05, 0.8, 10)
    torch.testing.assert_close(params[0].detach(), y, rtol=1e-6, atol=1e-8)
    optimizer.eval()
    torch.testing.assert_close(params[0].detach(), x, rtol=1e-6, atol=1e-8)


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_switching_back_and_forth_changes_no_bit(cls, dtype):
    optimizer, params = made(cls, dtype)
    twin, others = made(cls, dtype)
    for number in range(6):
        step(optimizer, params, number)
        step(twin, others, number)
        before = values(params)
        for _ in range(3):
            optimizer.eval()
            optimizer.eval()
            assert not torch.equal(params[0], before[0]) or number == 0
            optimizer.train()
            optimizer.train()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert_same(snapshot(optimizer), snapshot(twin))


@each_class
def test_a_step_in_eval_mode_is_refused(cls):
    optimizer, params = made(cls)
    for number in range(3):
        step(optimizer, params, number)
    optimizer.eval()
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"is in eval mode, .* call optimizer.train\(\) before"):
            step(optimizer, params, 3)
    assert_same(snapshot(optimizer), before)
    optimizer.train()
    step(optimizer, params, 3)


@each_class
def test_a_context_puts_the_mode_back(cls):
    optimizer, params = made(cls)
    step(optimizer, params, 0)
    step(optimizer, params, 1)
    before = values(params)

    def fail():
        with optimizer.eval_mode():
            assert not torch.equal(params[0], before[0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.eval()
    with optimizer.eval_mode():
        pass
    assert not optimizer.param_groups[0]["train_mode"]


@each_class
def test_a_state_dict_holds_the_weights_to_evaluate_beside_those_to_train(cls):
    optimizer, params = made(cls)
    for number in range(3):
        step(optimizer, params, number)
    saved = copy.deepcopy(optimizer.state_dict())
    trained = values(params)
    assert all("x" not in entry for entry in optimizer.state.values())
    optimizer.eval()
    for index, param in enumerate(params):
        assert torch.equal(saved["state"][index]["x"], param)
        assert torch.equal(optimizer.state_dict()["state"][index]["y"], trained[index])


@each_class
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resume_from_either_mode_goes_on_with_the_same_bits(cls, mode, dtype):
    optimizer, params = made(cls, dtype)
    for number in range(3):
        step(optimizer, params, number)
    if mode == "eval":
        optimizer.eval()
    model, saved = values(params), copy.deepcopy(optimizer.state_dict())
    resumed, others = made(cls, dtype)
    for other, value in zip(others, model, strict=True):
        other.detach().copy_(value)
    resumed.load_state_dict(saved)
    assert all("x" not in entry for entry in resumed.state.values())
    for each, its in ((optimizer, params), (resumed, others)):
        each.train()
        for number in range(3, 6):
            step(each, its, number)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert_same(snapshot(optimizer), snapshot(resumed))


def test_weights_that_are_loaded_in_eval_mode_are_those_to_evaluate():
    optimizer, params = made(surefoot.AdamWScheduleFree)
    for number in range(3):
        step(optimizer, params, number)
    optimizer.eval()
    with torch.no_grad():
        params[0].fill_(1.0)
    optimizer.train()
    optimizer.eval()
    torch.testing.assert_close(params[0].detach(), torch.ones(4, 3))


def test_parameters_that_were_not_stepped_are_the_same_in_both_modes():
    optimizer, params = made(surefoot.AdamWScheduleFree)
    before = values(params)
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not optimizer.state


@each_class
def test_an_average_of_the_parameters_is_refused_with_the_reason(cls):
    with pytest.raises(ValueError, match="takes no `ema`: its average x is what an EMA is for"):
        made(cls, ema=0.99)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (surefoot.SGDScheduleFree, {"momentum": 0.0}),
        (surefoot.SGDScheduleFree, {"momentum": 1.0}),
        (surefoot.AdamWScheduleFree, {"betas": (0.0, 0.9)}),
    ],
)
def test_without_weight_of_the_average_there_is_nothing_to_evaluate(cls, options):
    with pytest.raises(ValueError, match="Invalid"):
        made(cls, **options)


@each_class
def test_kept_corrections_count_in_the_weights_to_evaluate(cls):
    """A bfloat16 parameter with 32 bits trains, and evaluates, as the float32 one that it stands for."""
    short, params = made(cls, torch.bfloat16, master_weight_bits=32, state_dtype=torch.float32)
    with torch.no_grad():
        start = [surefoot.full_precision(short, param) for param in params]
    extra = {"silent_sgd_phase": False} if cls is surefoot.RAdamScheduleFree else {}
    others = [value.clone().requires_grad_() for value in start]
    exact = cls(others, lr=0.05, **extra)
    for number in range(5):
        step(short, params, number)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.float()
        exact.step()
    short.eval()
    exact.eval()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other.to(torch.bfloat16))
