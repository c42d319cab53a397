"""The contract of the base class, with torch.optim as the oracle: groups, state, copies, schedulers, subclasses."""

import copy
import io
import pickle
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import multiprocessing, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import required

import surefoot
from helpers import (
    ALGORITHMS,
    ENGINES,
    OURS_ONLY,
    accepted,
    assert_as_torch,
    assert_same,
    make,
    make_params,
    name_of,
    named,
    pair,
    params_of,
    set_grads,
    snapshot,
    train,
    twin,
)

each_algorithm = pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
each_engine = pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)


def raised(make):
    """Return the exception that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (compared with torch's)
        make()
    return caught.value


def assert_raises_as_torch(ours, theirs):
    """Assert the same type of error, and a message that begins with torch's."""
    error, model = raised(ours), raised(theirs)
    assert type(error) is type(model)
    assert str(error).startswith(str(model).rstrip(".")[:60]), f"{error} <> {model}"


def extra_options(optimizer):
    """Names of the options that torch's optimizer of the same name does not have."""
    return set(optimizer.defaults) - set(twin(type(optimizer))(make_params()).defaults)


def shown(optimizer):
    """Return the lines of an optimizer's repr, without the options that torch does not have."""
    extra = extra_options(optimizer)
    return [line for line in repr(optimizer).splitlines() if line.strip().partition(":")[0] not in extra]


# Construction

GROUPINGS = {
    "tensors": list,
    "generator": iter,
    "tuple": tuple,
    "named": named,
    "named generator": lambda params: iter(named(params)),
    "dicts": lambda params: [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}],
    "dict of one tensor": lambda params: [{"params": params[0]}],
    "dict of a generator": lambda params: [{"params": iter(params)}],
    "named dicts": lambda params: [{"params": [pair_]} for pair_ in named(params)],
    "extra keys": lambda params: [{"params": params, "name": "all", "initial_lr": 0.3}],
}


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_groups_are_torchs(grouping):
    assert_as_torch(*pair(surefoot.AdamW, grouping, lr=0.1))


LATER = {"LBFGS": {"maximize"}}
"""Options that later releases of torch have."""


@each_algorithm
def test_defaults_and_repr_are_torchs(cls):
    ours, theirs = make(cls), make(twin(cls))
    assert isinstance(ours, torch.optim.Optimizer)
    assert isinstance(ours.state, defaultdict)
    extra = extra_options(ours)
    assert extra <= OURS_ONLY | LATER.get(cls.__name__, set()) | cls.spec.later_options
    assert_same({name: value for name, value in ours.defaults.items() if name not in extra}, theirs.defaults)
    assert shown(ours) == repr(theirs).splitlines()


def test_repr_shows_every_group():
    ours, theirs = pair(surefoot.AdamW, lambda params: [{"params": [pair_], "lr": 0.5} for pair_ in named(params)])
    assert shown(ours) == repr(theirs).splitlines()


def shared_param():
    return [{"params": (params := make_params())}, {"params": params[:1]}]


def non_leaf():
    return [make_params()[0] * 2]


BAD_PARAMS = {
    "tensor": lambda: make_params()[0],
    "nothing": list,
    "used generator": lambda: iter(()),
    "group no dict": lambda: [{"params": make_params()}, make_params()],
    "set": lambda: [{"params": set(make_params())}],
    "no tensor": lambda: [make_params()[0], 1.0],
    "string": lambda: ["weight"],
    "non-leaf": non_leaf,
    "shared": shared_param,
    "some names": lambda: [*named(make_params())[:1], make_params()[1]],
    "names in one group": lambda: [{"params": named(make_params())}, {"params": make_params()}],
    "names in the other group": lambda: [{"params": make_params()}, {"params": named(make_params())}],
    "not iterable": lambda: 3,
}


@pytest.mark.parametrize("params", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_bad_params_raise_as_torch(params):
    assert_raises_as_torch(lambda: surefoot.SGD(params()), lambda: torch.optim.SGD(params()))


def test_group_without_params_is_refused():
    with pytest.raises(ValueError, match="needs a key `params`, but has only: lr"):
        surefoot.SGD([{"lr": 0.1}])


def test_duplicates_warn():
    params = make_params()
    for cls in (surefoot.SGD, torch.optim.SGD):
        with pytest.warns(UserWarning, match="optimizer contains a parameter group with duplicate parameters"):
            cls([params[0], params[0]])


def test_retained_grad_is_a_leaf_enough():
    (param,) = non_leaf()
    param.retain_grad()
    assert params_of(surefoot.SGD([param])) == [param]
    assert params_of(surefoot.SGD(non_leaf(), differentiable=True))


@pytest.mark.parametrize("ranges", [{}, {"lr": surefoot.SGD.ranges["lr"]}], ids=["torch style", "rule"])
def test_required_options(ranges):
    ours = type("Ours", (surefoot.Optimizer,), {"ranges": ranges, "step": lambda self, closure=None: None})
    theirs = type("Theirs", (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
    defaults = {"lr": required}
    assert_raises_as_torch(lambda: ours(make_params(), defaults), lambda: theirs(make_params(), defaults))
    assert ours([{"params": make_params(), "lr": 0.1}], defaults).param_groups[0]["lr"] == 0.1


# add_param_group

BAD_GROUPS = {
    "no dict": lambda _: [],
    "set": lambda _: {"params": set(make_params())},
    "no tensor": lambda _: {"params": [3.0]},
    "non-leaf": lambda _: {"params": non_leaf()},
    "already there": lambda optimizer: {"params": params_of(optimizer)[:1]},
    "some names": lambda _: {"params": [*named(make_params())[:1], make_params()[1]]},
    "names": lambda _: {"params": named(make_params())},
}
OUT_OF_RANGE = {
    "lr": lambda _: {"params": make_params(), "lr": -1.0},
    "NaN": lambda _: {"params": make_params(), "weight_decay": float("nan")},
    "combination": lambda _: {"params": make_params(), "nesterov": True, "dampening": 0.5},
    "engines": lambda _: {"params": make_params(), "foreach": True, "fused": True},
    "no params": lambda _: {"lr": 0.1},
}


@pytest.mark.parametrize("group", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_bad_groups_raise_as_torch(group):
    ours, theirs = pair(surefoot.SGD)
    assert_raises_as_torch(lambda: ours.add_param_group(group(ours)), lambda: theirs.add_param_group(group(theirs)))


@pytest.mark.parametrize("make_group", (BAD_GROUPS | OUT_OF_RANGE).values(), ids=BAD_GROUPS | OUT_OF_RANGE)
def test_refused_group_changes_nothing(make_group):
    optimizer = train(make(surefoot.SGD, momentum=0.9))
    before = snapshot(optimizer)
    group = make_group(optimizer)
    passed = copy.copy(group)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.add_param_group(group)
    assert_same(snapshot(optimizer), before)
    assert list(group) == list(passed)
    assert not isinstance(group, dict) or all(group[key] is passed[key] for key in group)


@pytest.mark.parametrize("cls", [cls for cls in ALGORITHMS if cls is not surefoot.LBFGS], ids=name_of)
def test_added_group_is_stepped(cls):  # torch's LBFGS takes one group
    ours, theirs = pair(cls, lambda params: params[:1])
    for optimizer in train(ours), train(theirs):
        optimizer.add_param_group(group := {"params": make_params()[1], "lr": 0.05})
        assert optimizer.param_groups[1] is group
        train(optimizer, first=3)
    assert_as_torch(ours, theirs)


# zero_grad


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none, foreach):
    leaf, other, without = make_params([(3,), (2, 2), (4,)])
    optimizer = surefoot.SGD([leaf, other, without], foreach=foreach)
    leaf.grad = leaf.exp()
    other.grad = torch.eye(2).to_sparse()
    kept = leaf.grad
    optimizer.zero_grad(set_to_none)
    assert without.grad is None
    if set_to_none:
        assert leaf.grad is None
        assert other.grad is None
        return
    assert leaf.grad is kept
    assert leaf.grad.grad_fn is None
    assert not leaf.grad.requires_grad
    assert not leaf.grad.any()
    assert other.grad.is_sparse
    assert not other.grad.to_dense().any()


def test_zero_grad_of_gradients_that_require_grad():
    (param,) = make_params([(3,)])
    param.grad = torch.ones(3, requires_grad=True)
    surefoot.SGD([param]).zero_grad(set_to_none=False)
    assert_same(param.grad, torch.zeros(3))


# State dicts


def layout(value, extra):
    """Replace what is no container by its type, shape and dtype; leave out extra options."""
    if isinstance(value, dict):
        return {name: layout(item, extra) for name, item in value.items() if name not in extra}
    if isinstance(value, list):
        return [layout(item, extra) for item in value]
    return (value.dtype, value.shape, value.device) if isinstance(value, torch.Tensor) else type(value)


@pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
def test_state_dict_layout_is_torchs(cls):
    ours, theirs = (train(optimizer) for optimizer in pair(cls))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(*(layout(optimizer.state_dict(), extra_options(ours)) for optimizer in (ours, theirs)))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(
    "grouping",
    [
        lambda params: [{"params": [params[1]]}, {"params": [params[0]]}],
        lambda params: [params[0], params[0], params[1]],
        lambda params: [{"params": [params[0], params[1], params[0]]}, {"params": make_params()}],
        named,
    ],
    ids=["groups", "duplicates", "duplicates before a group", "named"],
)
def test_state_dict_numbers_are_torchs(grouping):
    ours, theirs = (optimizer.state_dict()["param_groups"] for optimizer in pair(surefoot.Adam, grouping))
    for key in "params", "param_names":
        assert [group.get(key) for group in ours] == [group.get(key) for group in theirs]


def test_state_dict_refers_to_the_tensors_and_keeps_foreign_keys():
    optimizer = train(make(surefoot.Adam))
    optimizer.state["global"] = {"count": 3}
    state = optimizer.state_dict()["state"]
    assert state[0]["exp_avg"] is optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    assert state["global"] == {"count": 3}


# Copies


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("cls", "options"),
    [pytest.param(cls, {}, id=cls.__name__) for cls in ALGORITHMS]
    + [pytest.param(cls, {"foreach": None}, id=f"{cls.__name__}-default") for cls in (surefoot.AdamW, surefoot.NAdam)],
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=name_of)
def test_copy_goes_on_identically(cls, options, duplicate):
    optimizer = train(make(cls, named(make_params()), **options))
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("hooks stay behind"))
    twin_ = duplicate(optimizer)
    assert type(twin_) is cls
    assert isinstance(twin_.state, defaultdict)
    assert not set(params_of(optimizer)) & set(params_of(twin_))
    optimizer._optimizer_step_pre_hooks.clear()
    assert_same(snapshot(train(twin_, first=3)), snapshot(train(optimizer, first=3)))


def test_deepcopy_together_with_the_model_keeps_them_tied():
    model = nn.Linear(3, 2)
    optimizer = train(surefoot.AdamW(model.parameters()))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert params_of(optimizer2) == list(model2.parameters())
    assert set(optimizer2.state) == set(model2.parameters())


def test_copy_of_a_copy_keeps_pickled_attributes_only():
    optimizer = make(surefoot.SGD)
    optimizer.remark = "not a part of the contract"
    assert set(optimizer.__getstate__()) == {"defaults", "state", "param_groups"}
    assert not hasattr(copy.deepcopy(optimizer), "remark")


def step_in_child(optimizer, seed):
    """Step a pickled optimizer once, in place of the parent's."""
    train(optimizer, first=seed, steps=1)


def test_shared_with_another_process():
    params = [nn.Parameter(param.detach().share_memory_()) for param in make_params()]
    optimizer = surefoot.Adagrad(params)
    optimizer.share_memory()
    expected = train(make(surefoot.Adagrad), steps=1)
    child = multiprocessing.get_context("spawn").Process(target=step_in_child, args=(optimizer, 0))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert_same([param.detach() for param in params], snapshot(expected)["values"])
    for param, model in zip(params, params_of(expected), strict=True):
        assert_same(optimizer.state[param]["sum"], expected.state[model]["sum"])


# Schedulers

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)], [3]
    ),
}


def train_on_schedule(optimizer, make_scheduler):
    scheduler = make_scheduler(optimizer)
    rates = []
    for seed in range(7):
        train(optimizer, seed, steps=1)
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [(surefoot.SGD, {"momentum": 0.9}), (surefoot.AdamW, {}), (surefoot.AdamW, {"lr": torch.tensor(0.1)})],
    ids=["SGD", "AdamW", "tensor lr"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_torchs_schedulers_drive_it(cls, options, make_scheduler):
    ours, theirs = pair(cls, lambda params: [{"params": [param]} for param in params], **options)
    rates = [train_on_schedule(optimizer, make_scheduler) for optimizer in (ours, theirs)]
    assert_same(*rates)
    assert_as_torch(ours, theirs)


def test_scheduler_before_the_step_warns_as_torch():
    optimizer = make(surefoot.SGD)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


# Steps and closures


@each_algorithm
def test_closure(cls):
    optimizer = make(cls)
    loss, modes = torch.tensor(3.0), []

    def closure():
        modes.append(torch.is_grad_enabled())
        set_grads(optimizer, 0)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is loss
    assert set(modes) == {True}
    assert torch.is_grad_enabled()


@each_algorithm
def test_closure_that_raises_leaves_everything(cls):
    optimizer = train(make(cls))
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same(snapshot(optimizer), before)
    assert torch.is_grad_enabled()


@each_algorithm
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=name_of)
def test_grad_mode_around_the_step_does_not_matter(cls, context):
    ours, expected = make(cls), train(make(cls))
    train(ours, steps=1)
    with context():
        train(ours, first=1, steps=2)
    assert_same(snapshot(ours), snapshot(expected))
    assert all(param.requires_grad and param.is_leaf for param in params_of(ours))


@each_algorithm
@pytest.mark.parametrize("how", ["step", "load", "to"])
def test_state_made_in_inference_mode_is_like_any_other(cls, how):
    ours, expected = make(cls), train(make(cls), steps=4)
    if how != "step":
        train(ours, steps=1)
    with torch.inference_mode():
        if how == "step":
            train(ours, steps=1)
        elif how == "load":
            ours.load_state_dict(ours.state_dict())
        else:
            ours.to("cpu")
    train(ours, first=1, steps=3)
    assert_same(snapshot(ours), snapshot(expected))


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Adafactor])
@pytest.mark.parametrize("engine", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("which", ["param", "step", "slot"])
@pytest.mark.parametrize("steady", [False, True])
def test_tensors_of_inference_mode_are_refused_outside_of_it(cls, engine, which, steady):
    optimizer = train(make(cls, **engine), steps=1)
    param = params_of(optimizer)[1]
    state = optimizer.state[param]
    with torch.inference_mode():
        if which == "param":
            param.data = param.detach().clone()
        else:
            name = "step" if which == "step" else next(name for name in state if name != "step")
            state[name] = state[name].clone()
        train(optimizer, steps=3 * steady)
    set_grads(optimizer, 5)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="is an inference tensor, which can be written in inference mode only"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    with torch.inference_mode():
        optimizer.step()
    assert not torch.equal(snapshot(optimizer)["values"][1], before["values"][1])


@pytest.mark.parametrize("cls", [surefoot.SGD, surefoot.AdamW, surefoot.Adafactor])
@pytest.mark.parametrize("engine", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_parameters_of_inference_mode_are_refused_outside_of_it_whatever_their_data(cls, engine):
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.zeros(3))
    param.data = torch.ones(3)
    assert not param.is_inference()
    optimizer = cls([param], lr=0.1, **(engine if cls.is_rule() else {}))
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="is an inference tensor, which can be written in inference mode only"):
        optimizer.step()
    assert not optimizer.state
    with torch.inference_mode():
        optimizer.step()
        optimizer.step()
    assert (param < 1).all()


@each_algorithm
def test_gradients_made_in_inference_mode(cls):
    ours, expected = make(cls), train(make(cls), steps=2)
    for seed in range(2):
        with torch.inference_mode():
            set_grads(ours, seed)
        assert all(param.grad.is_inference() for param in params_of(ours))
        ours.step(lambda: torch.tensor(1.0))
    assert_same(snapshot(ours), snapshot(expected))


@each_algorithm
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_state_may_be_any_dict(cls, kind):
    ours, expected = make(cls), make(cls)
    for steps in (0, 2):
        train(ours, steps=steps)
        train(expected, steps=steps)
        ours.state = kind(ours.state)
    train(ours)
    train(expected)
    assert_same(snapshot(ours), snapshot(expected))


@each_algorithm
def test_parameters_without_gradient_are_left(cls):
    optimizer = make(cls)
    set_grads(optimizer, 0)
    first, second = params_of(optimizer)
    value = second.detach().clone()
    second.grad = None
    optimizer.step(lambda: torch.tensor(1.0))
    assert_same(second.detach(), value)
    assert "step" not in optimizer.state.get(second, {}) or cls.state_at_construction
    assert not torch.equal(first, make_params()[0])


def test_step_of_nothing_is_refused():
    with pytest.raises(NotImplementedError, match="defines neither `update` nor `step`"):
        surefoot.Optimizer(make_params(), {}).step()


@each_engine
@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "amsgrad"])
def test_options_changed_between_steps_count_at_the_next(name, options):
    new = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.3, "amsgrad": False}[name]
    ours, theirs = (cls(make_params(), amsgrad=True, **options) for cls in (surefoot.AdamW, torch.optim.AdamW))
    for optimizer in ours, theirs:
        train(optimizer)
        optimizer.param_groups[0][name] = new
        train(optimizer, first=3)
    torch.testing.assert_close(snapshot(ours)["values"], snapshot(theirs)["values"])


@each_engine
def test_state_cleared_between_steps_starts_anew(options):
    optimizer = train(surefoot.Adam(make_params(), **options))
    optimizer.state.clear()
    train(optimizer, first=3, steps=1)
    assert {entry["step"].item() for entry in optimizer.state.values()} == {1.0}


# Subclasses in torch's style


class Heavy(surefoot.Optimizer):
    """Momentum, as one writes it on torch.optim.Optimizer."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("momentum", 0.9)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"buffer": torch.zeros_like(param), "history": [param.clone()], "note": None, "count": 0}
                state["buffer"].mul_(group["momentum"]).add_(param.grad)
                state["count"] += 1
                param.sub_(state["buffer"], alpha=group["lr"])
        return loss


class HeavyTorch(torch.optim.Optimizer):
    """The same on torch's base class."""

    __init__ = None
    step = Heavy.__dict__["step"].__wrapped__


def heavy_torch(params):
    optimizer = torch.optim.Optimizer.__new__(HeavyTorch)
    torch.optim.Optimizer.__init__(optimizer, params, {"lr": 0.1, "momentum": 0.9})
    return optimizer


def test_subclass_in_torchs_style():
    ours, theirs = train(make(Heavy)), train(heavy_torch(make_params()))
    assert_same(ours.state_dict(), theirs.state_dict())
    assert_same(snapshot(train(pickled(ours), first=3)), snapshot(train(theirs, first=3)))


def test_subclass_in_torchs_style_loads_its_state_as_it_is():
    optimizer = train(Heavy(make_params(dtype=torch.bfloat16)))
    for state in optimizer.state.values():
        state["buffer"] = state["buffer"].float()
    state_dict = copy.deepcopy(optimizer.state_dict())
    del state_dict["param_groups"][0]["momentum"]
    loaded = Heavy(make_params(dtype=torch.bfloat16))
    report = loaded.load_state_dict(state_dict, strict=False)
    assert report.missing == ["param_groups[0]: option `momentum`"]
    assert loaded.param_groups[0]["momentum"] == 0.9
    assert_same(snapshot(loaded)["state"], snapshot(optimizer)["state"])


def test_step_assigned_after_the_class_was_made():
    constructor = {"__init__": lambda self, params: surefoot.Optimizer.__init__(self, params, {})}
    cls = type("Late", (surefoot.Optimizer,), constructor)
    cls.step = lambda self, closure=None: "stepped"
    optimizer = cls(make_params())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    assert optimizer.step() == "stepped"
    assert seen == ["post"]


class Loud(surefoot.AdamW):
    """An optimizer whose step calls that of its base."""

    def step(self, closure=None):
        return super().step(closure)


def test_subclass_that_extends_a_step_runs_hooks_once():
    make(surefoot.AdamW)  # its step is wrapped as well
    optimizer = make(Loud)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, steps=2)
    assert seen == ["pre", "post"] * 2
    assert_same(snapshot(optimizer), snapshot(train(make(surefoot.AdamW), steps=2)))


def test_extended_step_that_raises_keeps_its_hooks():
    optimizer = make(Loud)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
    assert seen == ["pre", "pre"]


# Other processes, and what cannot be stepped


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.NAdam, surefoot.Adafactor], ids=name_of)
@pytest.mark.parametrize("options", [{}, {"foreach": False}], ids=["default", "eager"])
def test_steps_that_another_process_counts_meanwhile_are_not_lost(cls, options):
    optimizer = cls(make_params(), **(options if "foreach" in accepted(cls) else {}))
    train(optimizer, steps=1)
    counts = [entry["step"].share_memory_() for entry in optimizer.state.values()]
    own, others = type(optimizer).coefficients, []

    def meanwhile(h, **scalars):
        others.append(counts[0].add_(1))
        return own(h, **scalars)

    optimizer.coefficients = meanwhile
    train(optimizer, first=1, steps=5)
    assert len(others) >= 5 or cls is surefoot.Adafactor
    assert [int(count) for count in counts] == [6 + len(others), 6]
    assert all(entry["step"] is count for entry, count in zip(optimizer.state.values(), counts, strict=True))


def test_shared_parameters_with_counts_of_ones_own_keep_the_fast_lane():
    params = make_params()
    for param in params:
        param.share_memory_()
    optimizer = train(surefoot.AdamW(params), steps=4)
    assert optimizer._step_cache.fast


@pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_what_is_no_number_with_a_fraction_is_refused_before_anything_changes(cls, dtype):
    whole = torch.ones(2, 2, dtype=dtype)
    whole.grad = torch.ones(2, 2, dtype=dtype)
    first = make_params([(2, 2)])[0]
    optimizer = make(cls, [first, whole])
    first.grad = torch.ones(2, 2)
    if cls is surefoot.SparseAdam:
        first.grad, whole.grad = first.grad.to_sparse(1), whole.grad.to_sparse(1)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"`params\[1\]` of shape \(2, 2\) is {dtype}; only floating point and"):
        optimizer.step(lambda: torch.tensor(1.0))
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("cls", [cls for cls in ALGORITHMS if cls is not surefoot.SparseAdam], ids=name_of)
def test_a_sparse_or_nested_parameter_is_refused_by_what_it_is(cls):
    sparse = torch.eye(3).to_sparse().requires_grad_()
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged, requires_grad=True)
    for param, kind in ((sparse, "torch.sparse_coo"), (jagged, "nested")):
        try:
            optimizer = make(cls, [param])
        except ValueError as error:  # a group that takes matrices only
            assert "2D parameters" in str(error)  # noqa: PT017
            continue
        param.grad = (param * 2).detach()
        with pytest.raises(RuntimeError, match=f"is {kind}; only dense parameters .* give the optimizer its values"):
            optimizer.step(lambda: torch.tensor(1.0))


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([0.0] * 3, "is list, must be a tensor"),
        (np.zeros(3), "is ndarray, must be a tensor"),
        (torch.zeros(3, dtype=torch.int8), "is torch.int8, must be real and floating point"),
        (torch.zeros(3, dtype=torch.bool), "is torch.bool, must be real and floating point"),
    ],
    ids=["list", "array", "int8", "bool"],
)
def test_state_that_is_no_slot_is_refused_by_name(options, value, found):
    (param,) = params = make_params([(3,)])
    optimizer = train(surefoot.AdamW(params, **options), steps=3)
    optimizer.state[param]["exp_avg"] = value
    set_grads(optimizer, 7)
    with pytest.raises(RuntimeError, match=rf"state `exp_avg` of `params\[0\]` of shape \(3,\) on cpu {found}"):
        optimizer.step()


@pytest.mark.parametrize("value", [np.ones(2), np.array(["a"]), [1.0], "3"], ids=str)
def test_a_step_count_that_is_no_number_is_refused_by_name(value):
    (param,) = params = make_params([(3,)])
    optimizer = train(surefoot.AdamW(params), steps=1)
    optimizer.state[param]["step"] = value
    set_grads(optimizer, 7)
    with pytest.raises(
        TypeError, match=r"state `step` must be a number or a tensor of one element, but is .*params\[0\]"
    ):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"differentiable": True}], ids=str)
def test_a_step_count_that_all_parameters_share_counts_each_as_in_torch(options):
    ours, theirs = (cls(make_params(), **options) for cls in (surefoot.AdamW, torch.optim.AdamW))
    if "differentiable" in options:
        ours, theirs = (cls([p.detach() for p in make_params()], **options) for cls in (type(ours), type(theirs)))
    for optimizer in ours, theirs:
        train(optimizer, steps=1)
        count = torch.tensor(1.0)
        for entry in optimizer.state.values():
            entry["step"] = count
        train(optimizer, first=1, steps=3)
        assert int(count) == 1 + 3 * 2
    torch.testing.assert_close(snapshot(ours)["values"], snapshot(theirs)["values"])


def after_steps(cls, product, steps):
    """Step a parameter from a given momentum product, differentiably; return where it ends."""
    param = torch.ones(3, dtype=torch.float64)
    optimizer = cls([param], lr=0.1, differentiable=True)
    moments = {name: torch.ones(3, dtype=torch.float64) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": torch.tensor(1.0, dtype=torch.float64), "mu_product": product * 1, **moments}
    for _ in range(steps):
        param.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
    return param.sum()


def test_gradients_flow_through_the_momentum_product():
    product = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    found = [
        torch.autograd.grad(after_steps(twin, product, 1), product)[0] for twin in (surefoot.NAdam, torch.optim.NAdam)
    ]
    assert found[0] != 0
    torch.testing.assert_close(*found)
    # torch's own cannot be differentiated over several steps.
    torch.autograd.gradcheck(lambda product: after_steps(surefoot.NAdam, product, 3), product)
