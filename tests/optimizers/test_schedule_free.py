"""Schedule-free optimizers: their two modes, what a checkpoint holds, and what is refused."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import surefoot
from conformance import normals
from helpers import assert_same, snapshot
from surefoot.checkpoint.inspection import summarize_values
from surefoot.checkpoint.reader import Checkpoint

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


# What fails changes nothing


def stepped(cls=surefoot.SGDScheduleFree, steps=5, **options):
    optimizer, params = made(cls, **options)
    for number in range(steps):
        step(optimizer, params, number)
    return optimizer, params


def put_other(param):
    """Let a parameter have another shape; return what it was."""
    good, param.data = param.data, torch.ones(17)
    return good


@each_class
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_switch_that_fails_changes_nothing(cls, mode):
    """The last parameter is the one that does not fit; the others must not have been written before it is met."""
    optimizer, params = stepped(cls)
    trained = values(params)
    if mode == "train":
        optimizer.eval()
    before, good = snapshot(optimizer), put_other(params[1])
    now = values(params)
    with pytest.raises(RuntimeError, match=r"`params\[1\]` of shape \(17,\).* has shape \(7,\), must have \(17,\)"):
        getattr(optimizer, mode)()
    assert all(torch.equal(a, b) for a, b in zip(params, now, strict=True))
    params[1].data = good
    assert_same(snapshot(optimizer), before)
    getattr(optimizer, mode)()
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(params, trained, strict=True))


def test_kept_weights_that_were_replaced_by_others_are_refused_by_name():
    optimizer, params = stepped()
    optimizer.eval()
    kept = optimizer.state[params[0]]["y"]
    for wrong, reason in ((kept[:2], "has shape"), (kept.long(), "must be real and floating point"), (3, "is int")):
        optimizer.state[params[0]]["y"] = wrong
        with pytest.raises(RuntimeError, match=rf"state `y` of `params\[0\]` .*{reason}"):
            optimizer.train()
    optimizer.state[params[0]]["y"] = kept
    optimizer.train()
    assert torch.equal(params[0], kept)


def test_a_parameter_that_stands_twice_in_a_group_gets_its_weights_back():
    normal = normals(torch.float32, seed=0)
    param = normal(5).requires_grad_()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = surefoot.SGDScheduleFree([param, param], lr=0.1)
    for _ in range(3):
        param.grad = normal(5)
        optimizer.step()
    trained = param.detach().clone()
    optimizer.eval()
    assert not torch.equal(param, trained)
    optimizer.train()
    assert torch.equal(param, trained)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_odd_element_does_not_change_the_bits_of_others(odd, dtype):
    optimizer, params = made(surefoot.AdamWScheduleFree, dtype)
    for number in range(6):
        step(optimizer, params, number)
    with torch.no_grad():
        params[0][1, 1] = odd
    before = values(params)
    for _ in range(3):
        optimizer.eval()
        optimizer.train()
    for param, value in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=0, atol=0, equal_nan=True)


def test_only_elements_that_are_written_in_eval_mode_are_new():
    optimizer, params = stepped(surefoot.AdamWScheduleFree)
    trained = values(params)
    optimizer.eval()
    with torch.no_grad():
        params[0][0] = 1.0
    optimizer.train()
    assert torch.equal(params[0][1:], trained[0][1:])
    optimizer.eval()
    torch.testing.assert_close(params[0][0].detach(), torch.ones(3))


# Modes


def grouped(**options):
    normal = normals(torch.float32, seed=0)
    params = [normal(4).requires_grad_() for _ in range(2)]
    optimizer = surefoot.SGDScheduleFree(params[:1], lr=0.1, **options)
    for param in params:
        param.grad = normal(4)
    optimizer.step()
    return optimizer, params


def modes(optimizer):
    return [group["train_mode"] for group in optimizer.param_groups]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_group_that_is_added_is_in_the_mode_of_the_others(mode):
    optimizer, params = grouped()
    getattr(optimizer, mode)()
    optimizer.add_param_group({"params": params[1:]})
    assert modes(optimizer) == [mode == "train"] * 2
    optimizer.train()
    optimizer.step()
    assert all("z" in optimizer.state[param] for param in params)


def test_a_group_that_is_refused_is_left_as_it_was():
    optimizer, params = grouped()
    optimizer.eval()
    group = {"params": params[1:], "momentum": 2.0}
    with pytest.raises(ValueError, match="Invalid momentum value"):
        optimizer.add_param_group(group)
    assert group == {"params": params[1:], "momentum": 2.0}


def test_a_context_puts_back_the_mode_of_each_group():
    optimizer, params = grouped()
    optimizer.eval()
    optimizer.add_param_group({"params": params[1:], "train_mode": True})
    with optimizer.eval_mode():
        assert modes(optimizer) == [False, False]
    assert modes(optimizer) == [False, True]


def test_a_group_that_is_added_inside_of_a_context_trains_afterwards():
    optimizer, params = grouped()
    with optimizer.eval_mode():
        optimizer.add_param_group({"params": params[1:]})
        assert modes(optimizer) == [False, False]
    assert modes(optimizer) == [True, True]


@each_class
def test_a_closure_that_switches_to_eval_mode_is_refused_and_nothing_is_stepped(cls):
    optimizer, params = stepped(cls)

    def closure():
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.eval()

    before = values(params)
    with pytest.raises(RuntimeError, match=r"is in eval mode, .* call optimizer.train\(\)"):
        optimizer.step(closure)
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_pure_step_of_state_in_eval_mode_is_refused_by_name():
    optimizer, params = stepped(surefoot.AdamWScheduleFree)
    grads = [torch.ones_like(param) for param in params]
    optimizer.eval()
    state = [dict(optimizer.state[param]) for param in params]
    with pytest.raises(RuntimeError, match=r"`params\[0\]` of shape \(4, 3\) has `y`, so it is that .* in eval mode"):
        surefoot.functional.update(surefoot.AdamWScheduleFree, params, grads, state)
    optimizer.train()
    state = [dict(optimizer.state[param]) for param in params]
    surefoot.functional.update(surefoot.AdamWScheduleFree, params, grads, state)


# A momentum that changes


def set_momentum(optimizer, momentum):
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, group["betas"][1])


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_momentum_that_changes_moves_the_weights_to_train_and_not_the_average(options):
    """In the form of the paper, which keeps x and z, only the line that makes y reads the momentum."""
    param = normals(torch.float64, seed=0)(6).requires_grad_()
    x = z = y = param.detach().clone()
    optimizer = surefoot.SGDScheduleFree([param], lr=0.05, momentum=0.9, **options)
    for t, momentum in enumerate((0.9, 0.9, 0.8, 0.5, 0.95, 0.95, 0.85), start=1):
        optimizer.param_groups[0]["momentum"] = momentum
        param.grad = normals(torch.float64, seed=t)(6)
        optimizer.step()
        z = z - 0.05 * param.grad
        x = x + (z - x) / t
        y = (1 - momentum) * z + momentum * x
        torch.testing.assert_close(param.detach(), y, rtol=1e-6, atol=1e-7)
        optimizer.param_groups[0]["momentum"] = 0.3  # which no step has seen
        optimizer.eval()
        torch.testing.assert_close(param.detach(), x, rtol=1e-6, atol=1e-7)
        optimizer.train()


@each_class
def test_the_average_is_the_same_whatever_the_momentum_is_set_to(cls):
    optimizer, params = stepped(cls)
    expected = [optimizer.state_dict()["state"][index]["x"] for index in range(len(params))]
    for momentum in (0.5, 0.0, 1.0, 0.98):
        set_momentum(optimizer, momentum)
        found = optimizer.state_dict()["state"]
        for index, value in enumerate(expected):
            torch.testing.assert_close(found[index]["x"], value)


@each_class
def test_a_schedule_that_cycles_the_momentum_trains(cls):
    optimizer, params = made(cls)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    for number in range(15):
        step(optimizer, params, number)
        scheduler.step()
    momentum = optimizer.state[params[0]]["last_momentum"]
    optimizer.eval()
    for param in params:
        y, z = (optimizer.state[param][name] for name in ("y", "z"))
        torch.testing.assert_close(torch.lerp(z, param.detach(), momentum.item()), y)


@each_class
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("momentum", 0.0, "Invalid momentum value: 0.0"),
        ("momentum", 1.5, "Invalid momentum value: 1.5"),
        ("lr", -0.1, "Invalid learning rate: -0.1"),
        ("weight_lr_power", -1.0, "Invalid weight_lr_power value: -1.0"),
    ],
)
def test_a_number_that_leaves_no_average_is_refused_by_the_step_and_changes_nothing(cls, option, value, message):
    optimizer, params = stepped(cls, weight_lr_power=1.5)
    before = snapshot(optimizer)["state"]
    if option == "momentum":
        set_momentum(optimizer, value)
    else:
        optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=message):
        step(optimizer, params, 9)
    assert_same(snapshot(optimizer)["state"], before)


@each_class
@pytest.mark.parametrize(
    ("option", "value"), [("weight_lr_power", -1.0), ("weight_lr_power", float("inf")), ("r", float("inf"))]
)
def test_powers_that_have_no_weight_are_refused(cls, option, value):
    with pytest.raises(ValueError, match=f"Invalid {option} value: {value}"):
        made(cls, **{option: value})


@each_class
@pytest.mark.parametrize("r", [80.0, 1000.0])
def test_weights_that_outgrow_the_state_are_refused_by_name_and_nothing_changes(cls, r):
    """With an infinite sum of weights the average would stand still without a word."""
    optimizer, params = made(cls, r=r)
    step(optimizer, params, 0)
    optimizer.state[params[0]]["step"].fill_(4.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"are too large for float32 in step 5, with r={r} .*take smaller powers"):
        step(optimizer, params, 1)
    assert_same(snapshot(optimizer), before)


# State dicts


@pytest.mark.parametrize("other", ["moved", "reshaped"])
def test_a_state_dict_without_weights_to_evaluate_warns_and_has_all_else(other):
    optimizer, params = stepped(surefoot.AdamWScheduleFree)
    if other == "moved":
        optimizer.to("meta")
    else:
        put_other(params[1])
    with pytest.warns(
        RuntimeWarning, match=r"has no 'x' of \d parameters, where it cannot be derived.*`params\[[01]\]`"
    ):
        saved = optimizer.state_dict()
    assert saved["state"].keys() == {0, 1, 2}
    assert all({"z", "exp_avg_sq", "step"} <= entry.keys() for entry in saved["state"].values())
    assert "x" not in saved["state"][1]
    assert ("x" in saved["state"][0]) == (other == "reshaped")


@each_class
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:2], "state `y` has shape"),
        (lambda y: y.to(torch.int64), "state `y` is torch.int64"),
        (lambda y: y.to(torch.complex64), "state `y` is torch.complex64"),
        (lambda _: "weights", "state `y` is str, must be a tensor"),
    ],
)
def test_kept_weights_that_do_not_fit_are_not_loaded(cls, change, message):
    optimizer, _ = stepped(cls)
    optimizer.eval()
    saved, before = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer)
    saved["state"][0]["y"] = change(saved["state"][0]["y"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


def test_kept_weights_of_a_group_in_train_mode_are_not_loaded():
    optimizer, _ = stepped()
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["train_mode"] = True
    with pytest.raises(ValueError, match="state `y` of eval mode, but param_groups say train mode"):
        optimizer.load_state_dict(saved)


def test_kept_weights_are_loaded_into_another_dtype():
    source, params = stepped(surefoot.SGDScheduleFree)
    source.eval()
    target, others = made(surefoot.SGDScheduleFree, torch.bfloat16)
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    target.load_state_dict(source.state_dict())
    target.train()
    source.train()
    for other, param in zip(others, params, strict=True):
        assert torch.equal(other, param.to(torch.bfloat16))


@pytest.mark.parametrize("bits", [24, 32])
def test_full_precision_in_eval_mode_is_that_of_the_weights_to_evaluate(bits):
    optimizer, params = made(
        surefoot.AdamWScheduleFree, torch.bfloat16, master_weight_bits=bits, state_dtype=torch.float32
    )
    for number in range(5):
        step(optimizer, params, number)
    exact, trained = ([surefoot.full_precision(optimizer, param) for param in params] for _ in range(2))
    optimizer.eval()
    for param, y in zip(params, exact, strict=True):
        x = surefoot.full_precision(optimizer, param)
        assert x.dtype is torch.float32
        assert torch.equal(x.to(torch.bfloat16), param)
        z = optimizer.state[param]["z"]
        torch.testing.assert_close(torch.lerp(z, x, 0.9), y)
    optimizer.train()
    for param, y in zip(params, trained, strict=True):
        assert torch.equal(surefoot.full_precision(optimizer, param), y)
    optimizer.eval()
    with torch.no_grad():
        params[1].fill_(3.0)
    assert torch.equal(surefoot.full_precision(optimizer, params[1]), torch.full((7,), 3.0))


def as_theirs(saved):
    """Return a state dict as `schedulefree` lays it out, with numbers of the whole group and no momentum of a step."""
    theirs = copy.deepcopy(saved)
    for group in theirs["param_groups"]:
        for key in group["params"]:
            entry = theirs["state"][key]
            group["k"], group["weight_sum"], group["lr_max"] = (
                entry.pop(name).item() for name in ("step", "weight_sum", "lr_max")
            )
            theirs["state"][key] = {name: entry[name] for name in ("z", "exp_avg_sq") if name in entry}
        group["k"], group["scheduled_lr"] = int(group["k"]), group["lr"]
    return theirs


@each_class
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_dict_of_the_authors_goes_on(cls, mode):
    optimizer, params = stepped(cls)
    if mode == "eval":
        optimizer.eval()
    resumed, others = made(cls)
    for other, value in zip(others, values(params), strict=True):
        other.detach().copy_(value)
    resumed.load_state_dict(as_theirs(optimizer.state_dict()))
    assert not {"k", "step", "weight_sum", "lr_max", "scheduled_lr"} & resumed.param_groups[0].keys()
    for each, its in ((optimizer, params), (resumed, others)):
        each.train()
        for number in range(5, 8):
            step(each, its, number)
    for param, other in zip(params, others, strict=True):
        if mode == "train":
            assert torch.equal(param, other)
        torch.testing.assert_close(param, other)
    assert resumed.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


@each_class
def test_a_state_dict_without_counts_is_refused_by_name(cls):
    optimizer, _ = stepped(cls)
    theirs = as_theirs(optimizer.state_dict())
    del theirs["param_groups"][0]["k"]
    with pytest.raises(ValueError, match="missing: .* state `step`"):
        optimizer.load_state_dict(theirs)


# Functions


@pytest.mark.parametrize("name", ["adamw_schedule_free", "sgd_schedule_free"])
def test_a_function_begins_without_slots_and_makes_the_steps_of_the_class(name):
    cls = {"adamw_schedule_free": surefoot.AdamWScheduleFree, "sgd_schedule_free": surefoot.SGDScheduleFree}[name]
    optimizer, params = made(cls)
    ours = values(params)
    slots = {f"{slot.name}s": [None] * len(ours) for slot in cls.slots}
    begin = {"state_steps": 0.0, "weight_sums": 0.0, "lr_maxs": -1.0, "last_momentums": 0.9}
    scalars = {name: [torch.tensor(value) for _ in ours] for name, value in begin.items()}
    group = optimizer.param_groups[0]
    options = {name: group[name] for name in ("lr", "weight_decay", "warmup_steps", "r", "weight_lr_power", "maximize")}
    betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8} if "betas" in group else {"momentum": 0.9}
    for number in range(4):
        step(optimizer, params, number)
        grads = [param.grad for param in params]
        getattr(surefoot.functional, name)(ours, grads, **slots, **scalars, **options, **betas)
    assert all(torch.equal(a, b) for a, b in zip(ours, params, strict=True))
    assert all(torch.equal(z, optimizer.state[param]["z"]) for z, param in zip(slots["zs"], params, strict=True))


def test_the_function_says_what_its_lists_begin_as():
    text = surefoot.functional.adamw_schedule_free.__doc__
    assert "entry in `zs` and `exp_avg_sqs` is None" in text
    assert "`lr_maxs` begin as -1, `last_momentums` begin as the class has it (0.9 by default)" in text
    assert "begin" not in surefoot.functional.lion.__doc__
    assert "`exp_avgs` begin as `initial_accumulator`" in surefoot.functional.yogi.__doc__


def test_a_checkpoint_in_eval_mode_has_the_norms_of_both_weights(tmp_path):
    """A correction belongs to the weights to train, also while the model holds those to evaluate."""
    model = torch.nn.Linear(40, 30).to(torch.bfloat16)
    optimizer = surefoot.SGDScheduleFree(model.parameters(), lr=0.1, master_weight_bits=32)
    for number in range(4):
        step(optimizer, list(model.parameters()), number)
    trained = surefoot.full_precision(optimizer, model.weight)
    optimizer.eval()
    checkpoint = Checkpoint(surefoot.save(tmp_path, model=model, optimizer=optimizer))
    summarize_values(checkpoint)
    found = {name: place.summary.norm for name, place in checkpoint.places.items()}
    assert found["model.weight"] == pytest.approx(model.weight.double().norm().item(), rel=1e-6)
    assert found["optimizer.weight.y"] == pytest.approx(trained.double().norm().item(), rel=1e-6)


def test_fake_tensors_switch_and_have_whole_state_dicts():
    with FakeTensorMode():
        optimizer, params = stepped(surefoot.AdamWScheduleFree)
        assert {"x", "z"} <= optimizer.state_dict()["state"][0].keys()
        optimizer.eval()
        assert optimizer.state[params[0]]["y"].shape == params[0].shape
        optimizer.train()
