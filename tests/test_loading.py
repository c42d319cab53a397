"""Loading is verified: by name or by position, all or nothing, with a report, and across from and to torch.optim."""

import contextlib
import copy
import functools
import io
import itertools
import operator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import surefoot
from helpers import (
    ALGORITHMS,
    ENGINES,
    accepted,
    assert_as_torch,
    assert_same,
    make,
    make_params,
    name_of,
    named,
    params_of,
    set_grads,
    snapshot,
    train,
    twin,
)

PER_PARAM = [cls for cls in ALGORITHMS if cls is not surefoot.LBFGS]
"""The state of LBFGS is one flat vector of all parameters; its own tests load it."""
OPTIONS = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
    "ASGD": [{}, {"t0": 1, "lambd": 0.1}],
    "Adagrad": [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}],
}
VARIANTS = [
    pytest.param(cls, options, id="-".join([cls.__name__, *options]))
    for cls in PER_PARAM
    for options in OPTIONS.get(cls.__name__, [{}])
]
each_algorithm = pytest.mark.parametrize("cls", PER_PARAM, ids=name_of)
each_variant = pytest.mark.parametrize(("cls", "options"), VARIANTS)


def stepped(cls, params=None, **options):
    """Make an optimizer and step it three times; with momentum where there can be, so that it has state."""
    if "momentum" in accepted(cls):
        options.setdefault("momentum", 0.9)
    return train(make(cls, params, **options))


def state_of(optimizer):
    return [optimizer.state[param] for param in params_of(optimizer)]


def refused(optimizer, state_dict, match, **options):
    """Assert that loading raises ValueError with the message and changes nothing; give the message."""
    before, state, groups = snapshot(optimizer), optimizer.state, optimizer.param_groups
    with pytest.raises(ValueError, match=match) as caught:
        optimizer.load_state_dict(state_dict, **options)
    assert_same(snapshot(optimizer), before)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    return str(caught.value)


# What loads


def copies(optimizer):
    """Copy the parameters of an optimizer."""
    return [param.detach().clone() for param in params_of(optimizer)]


@pytest.mark.parametrize(
    ("cls", "options"), [*VARIANTS, pytest.param(surefoot.AdamW, {"foreach": None}, id="AdamW-default")]
)
def test_resuming_is_going_on(cls, options):
    source = train(make(cls, **options))
    resumed = make(cls, copies(source), **options)
    assert not resumed.load_state_dict(source.state_dict())
    assert_same(snapshot(resumed), snapshot(source))
    assert_same(snapshot(train(resumed, first=3)), snapshot(train(source, first=3)))


@each_variant
@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
def test_crossing_to_and_from_torch_midway(cls, options, to_torch):
    start, end = (cls, twin(cls)) if to_torch else (twin(cls), cls)
    source = train(make(start, **options))
    crossed = make(end, copies(source), lr=0.7)
    crossed.load_state_dict(source.state_dict())
    assert_as_torch(train(crossed, first=3), train(make(twin(cls), **options), steps=6))


@each_variant
def test_strict_and_lenient_loading_agree_on_what_fits(cls, options):
    source, target = make(cls, **options), stepped(cls, **options)
    set_grads(source, 0)
    params_of(source)[1].grad = None  # has no state
    source.step()
    lenient = copy.deepcopy(target)
    assert not target.load_state_dict(source.state_dict())
    assert not lenient.load_state_dict(source.state_dict(), strict=False)
    assert_same(snapshot(lenient), snapshot(target))
    assert_same(target.state_dict()["state"], {k: v for k, v in source.state_dict()["state"].items() if v})


@each_algorithm
def test_through_a_file_of_weights_only(cls):
    source, file = stepped(cls, named(make_params())), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = cls(named(make_params()))
    target.load_state_dict(torch.load(file, weights_only=True))
    assert_same(snapshot(target)["state"], snapshot(source)["state"])


def test_loading_copies():
    source = stepped(surefoot.AdamW, lr=torch.tensor(0.1))
    state_dict = source.state_dict()
    target = make(surefoot.AdamW)
    target.load_state_dict(state_dict)
    given_ = copy.deepcopy(state_dict)
    train(target, first=3)
    target.param_groups[0]["lr"].fill_(0.5)
    target.param_groups[0]["betas"] = (0, 0)
    assert_same(state_dict, given_)
    ours, theirs = ({id(v) for entry in state_of(opt) for v in entry.values()} for opt in (target, source))
    assert not ours & theirs


def test_the_groups_options_become_those_of_the_dict():
    target = make(surefoot.AdamW, lr=1.0, foreach=True)
    target.load_state_dict(make(surefoot.AdamW, lr=0.1, betas=(0, 0), maximize=True, foreach=False).state_dict())
    loaded = target.param_groups[0]
    expected = {"lr": 0.1, "betas": (0, 0), "maximize": True, "foreach": False}
    assert_same({name: loaded[name] for name in expected}, expected)


def test_extra_keys_of_a_group_come_along():
    source = surefoot.SGD([{"params": make_params(), "initial_lr": 0.3, "name": "all"}])
    target = make(surefoot.SGD)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["initial_lr"] == 0.3
    assert target.param_groups[0]["name"] == "all"


def test_state_that_belongs_to_no_parameter_comes_along():
    source = stepped(surefoot.SGD)
    source.state["global"] = {"history": [torch.ones(2)]}
    target = make(surefoot.SGD)
    target.load_state_dict(source.state_dict())
    assert_same(target.state["global"], source.state["global"])
    assert target.state["global"]["history"][0] is not source.state["global"]["history"][0]


@each_algorithm
def test_float32_state_of_bfloat16_parameters_stays(cls):
    source = stepped(cls, make_params(dtype=torch.bfloat16))
    for entry in state_of(source):
        entry.update({k: v.float() + 1e-5 for k, v in entry.items() if isinstance(v, torch.Tensor) and v.dim()})
    target = make(cls, make_params(dtype=torch.bfloat16))
    target.load_state_dict(source.state_dict())
    assert_same(state_of(target), state_of(source))
    train(target, first=3)
    dtypes = [[getattr(value, "dtype", int) for value in entry.values()] for entry in state_of(target)]
    assert dtypes == [[getattr(value, "dtype", int) for value in entry.values()] for entry in state_of(source)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_keeps_its_dtype_and_stays_on_the_host(dtype):
    source = stepped(surefoot.NAdam, make_params(dtype=torch.float64))
    for entry in state_of(source):
        entry.update({name: entry[name].to(dtype) for name in ("step", "mu_product")})
    target = surefoot.NAdam(make_params(dtype=torch.float64))
    target.load_state_dict(source.state_dict())
    for entry in state_of(target):
        assert entry["step"].dtype is entry["mu_product"].dtype is dtype
        assert entry["step"].device.type == "cpu"
        assert entry["step"].shape == ()


def test_a_strided_slot_keeps_its_strides():
    weight = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    target = surefoot.SGD([weight.detach().clone()])
    target.load_state_dict(stepped(surefoot.SGD, [weight]).state_dict())
    assert state_of(target)[0]["momentum_buffer"].stride() == weight.stride()


# Tools of torch that load


def test_torchs_distributed_checkpoints():
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    source, target = (
        make(surefoot.AdamW, model.parameters(), lr=lr) for model, lr in zip(models, (0.1, 0.5), strict=True)
    )
    state_dict = get_optimizer_state_dict(models[0], train(source))
    assert "0.weight" in state_dict["state"]
    set_optimizer_state_dict(models[1], target, state_dict)
    assert_same(snapshot(target)["state"], snapshot(source)["state"])
    assert target.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_torchs_swapping_of_parameters_and_state(options):
    stateless = pytest.importorskip("torch.optim._stateless", reason="torch has no such function yet")
    optimizer = train(surefoot.AdamW(make_params(), **options))
    before, state_dict = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
    others = dict(enumerate(copies(optimizer)))
    with stateless.swap_in_optimizer_params_and_state(optimizer, others, state_dict):
        train(optimizer, first=3)
    assert_same(snapshot(optimizer), before)
    assert_same(list(others.values()), snapshot(train(optimizer, first=3))["values"])


# Dicts of other times


@pytest.mark.parametrize("step", [2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0)], ids=repr)
@each_algorithm
def test_other_forms_of_step(cls, step):
    source = train(make(twin(cls), **{name: 0.9 for name in ["momentum"] if name in accepted(cls)}), steps=2)
    state_dict = copy.deepcopy(source.state_dict())
    for entry in state_dict["state"].values():
        entry |= {name: step for name in ["step"] if name in entry}
    target = make(cls, copies(source))
    target.load_state_dict(state_dict)
    kinds = [[type(value) for value in entry.values()] for entry in state_of(target)]
    assert kinds == [[type(value) for value in entry.values()] for entry in state_of(stepped(cls))]
    assert_as_torch(train(target, 2, 1), train(source, 2, 1))


LATE = ["foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"]


@each_variant
def test_dicts_from_before_an_option_existed(cls, options):
    source = train(make(twin(cls), **options))
    state_dict = copy.deepcopy(source.state_dict())
    for name in set(LATE) - set(options):
        state_dict["param_groups"][0].pop(name, None)
    target = make(cls, copies(source))
    target.load_state_dict(state_dict)
    assert set(target.param_groups[0]) == set(make(cls).param_groups[0])
    if "foreach" in target.param_groups[0]:
        target.param_groups[0]["foreach"] = False
    assert_as_torch(train(target, first=3), train(source, first=3))


def test_sparse_and_empty_buffers_of_torchs_sgd():
    state_dict = stepped(surefoot.SGD).state_dict()
    buffer = torch.zeros(3, 4)
    buffer[1] = 1.0
    state_dict["state"] = {0: {"momentum_buffer": buffer.to_sparse()}, 1: {"momentum_buffer": None}}
    target = make(surefoot.SGD)
    assert not target.load_state_dict(state_dict)
    assert_same(state_of(target), [{"momentum_buffer": buffer}, {}])


def test_adam_and_adamw_are_kin():
    source = stepped(surefoot.AdamW, weight_decay=0.1)
    as_adam, as_adamw = make(surefoot.Adam), make(surefoot.AdamW)
    as_adam.load_state_dict(source.state_dict())
    assert as_adam.param_groups[0]["decoupled_weight_decay"] is True
    as_adamw.load_state_dict(stepped(surefoot.Adam).state_dict())
    assert as_adamw.param_groups[0]["decoupled_weight_decay"] is True


# Other algorithms

KIN = {("Adam", "AdamW"), ("AdamW", "Adam")}
COUPLES = [
    pytest.param(source, target, id=f"{source.__name__}-{target.__name__}")
    for source, target in itertools.permutations(ALGORITHMS, 2)
    if (source.__name__, target.__name__) not in KIN
]


@pytest.mark.in_turn("origin")
@pytest.mark.parametrize("origin", [lambda cls: cls, twin], ids=["surefoot", "torch"])
@pytest.mark.parametrize(("source", "target"), COUPLES)
def test_state_of_another_algorithm_is_refused(source, target, origin):
    state_dict = stepped(origin(source)).state_dict()
    message = refused(stepped(target), state_dict, "does not fit this|Nesterov")
    assert target.__name__ in message


@pytest.mark.parametrize(("source", "target"), COUPLES)
def test_lenient_loading_from_another_algorithm_leaves_a_working_optimizer(source, target):
    optimizer = stepped(target)
    before = snapshot(optimizer)
    report = optimizer.load_state_dict(stepped(source).state_dict(), strict=False)
    assert report
    if any("option" in line for line in (*report.missing, *report.unexpected)):
        assert_same(snapshot(optimizer)["groups"], before["groups"])
    train(optimizer, first=3, steps=1)


def test_the_message_names_the_algorithm_that_it_looks_like():
    message = refused(stepped(surefoot.SGD), stepped(surefoot.Rprop).state_dict(), "SGD")
    assert "Its options are those of Rprop." in message
    assert message.endswith("Use strict=False to load what matches.")


# Matching


def by_name(*names, shapes=((3, 4), (5, 2), (2, 2))):
    """Make named parameters; a name always has the same shape."""
    known = dict(zip("abc", make_params(shapes), strict=True))
    return [(name, known[name]) for name in names]


@pytest.mark.parametrize("twins", [False, True], ids=["surefoot", "torch"])
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_by_name_in_another_order(order, twins):
    source = stepped(twin(surefoot.AdamW) if twins else surefoot.AdamW, by_name("a", "b", "c"))
    target = surefoot.AdamW(by_name(*order))
    assert not target.load_state_dict(source.state_dict())
    states = dict(zip("abc", state_of(source), strict=True))
    assert_same(state_of(target), [states[name] for name in order])
    assert target.param_groups[0]["param_names"] == list(order)


def test_by_name_across_groups_in_another_order():
    a, b, c = by_name("a", "b", "c")
    source = stepped(surefoot.AdamW, [{"params": [a, c], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    a, b, c = by_name("a", "b", "c")
    target = surefoot.AdamW([{"params": [b]}, {"params": [c]}, {"params": [a]}])
    assert not target.load_state_dict(source.state_dict())
    assert [group["lr"] for group in target.param_groups] == [0.2, 0.1, 0.1]
    state = dict(zip("acb", state_of(source), strict=True))
    assert_same(state_of(target), [state[name] for name in "bca"])


def test_an_empty_group_has_no_names():
    source = stepped(surefoot.AdamW, by_name("a", "b"))
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["param_groups"].append({**state_dict["param_groups"][0], "params": []})
    del state_dict["param_groups"][1]["param_names"]
    target = surefoot.AdamW(by_name("b", "a"))
    assert not target.load_state_dict(state_dict)
    assert_same(state_of(target), state_of(source)[::-1])


def test_one_group_of_two_by_name_is_refused():
    a, b, _ = by_name("a", "b", "c")
    source = stepped(surefoot.AdamW, [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    target = stepped(surefoot.AdamW, by_name("a", "b"))
    refused(target, source.state_dict(), r"param_groups\[0\]: its parameters stand in 2 groups of the state dict")


def test_names_that_differ_are_listed():
    source, target = stepped(surefoot.AdamW, by_name("a", "b")), stepped(surefoot.AdamW, by_name("b", "c"))
    message = refused(target, source.state_dict(), "missing: parameter `c`")
    assert "unexpected: parameter `a`" in message
    report = target.load_state_dict(source.state_dict(), strict=False)
    assert report == (["parameter `c`"], ["parameter `a`"], [], [], [])
    assert_same(state_of(target)[0], state_of(source)[1])


@pytest.mark.parametrize(
    ("saved", "live"),
    [(list, named), (named, list), (list, list), (lambda params: [("same", p) for p in params], named)],
    ids=["names here", "names there", "no names", "names twice"],
)
def test_by_position_when_names_do_not_decide(saved, live):
    source = stepped(surefoot.AdamW, saved(make_params()))
    target = surefoot.AdamW(live(make_params()))
    before = target.param_groups[0].get("param_names", source.param_groups[0].get("param_names"))
    assert not target.load_state_dict(source.state_dict())
    assert_same(state_of(target), state_of(source))
    assert target.param_groups[0].get("param_names") == before


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicate_parameters():
    params = make_params()
    source, target = (cls([params[0], params[0], params[1]]) for cls in (torch.optim.Adam, surefoot.Adam))
    target.load_state_dict(train(source).state_dict())
    assert_same([target.state[param] for param in params], [source.state[param] for param in params])


# What does not fit


def with_shape(shape):
    def change(state_dict):
        state_dict["state"][1]["exp_avg"] = torch.zeros(shape)

    return change


def setting(*path, value=None):
    """Make a change that sets what stands at a path in a state dict, or deletes it when `value` is `del`."""

    def change(state_dict):
        *way, last = path
        place = state_dict
        for key in way:
            place = place[key]
        if value is del_:
            del place[last]
        else:
            place[last] = value

    return change


del_ = object()
GROUP = ("param_groups", 0)
CHANGES = {
    "transposed slot": (
        with_shape((2, 5)),
        "mismatched",
        r"`p1`: state `exp_avg` has shape \(2, 5\), must be \(5, 2\)",
    ),
    "scalar slot": (with_shape(()), "mismatched", r"`p1`: state `exp_avg` has shape \(\), must be \(5, 2\)"),
    "slot missing": (setting("state", 0, "exp_avg", value=del_), "missing", "`p0`: state `exp_avg`"),
    "step missing": (setting("state", 0, "step", value=del_), "missing", "`p0`: state `step`"),
    "slot of a flag missing": (setting("state", 0, "max_exp_avg_sq"), "missing", "`p0`: state `max_exp_avg_sq`"),
    "state of another": (setting("state", 0, value={"sum": torch.ones(3, 4)}), "unexpected", "`p0`: state `sum`"),
    "slot of integers": (
        setting("state", 0, "exp_avg", value=torch.ones(3, 4, dtype=torch.int64)),
        "mismatched",
        "`p0`: state `exp_avg` is torch.int64, the parameter torch.float32",
    ),
    "slot complex": (
        setting("state", 0, "exp_avg", value=torch.ones(3, 4, dtype=torch.complex64)),
        "mismatched",
        "`p0`: state `exp_avg` is torch.complex64, the parameter torch.float32",
    ),
    "slot no tensor": (
        setting("state", 0, "exp_avg", value=[1.0]),
        "mismatched",
        "`p0`: state `exp_avg` is list, must be a tensor",
    ),
    "step no number": (
        setting("state", 0, "step", value="three"),
        "mismatched",
        "`p0`: state `step` is str, must be a number",
    ),
    "step complex": (
        setting("state", 0, "step", value=torch.tensor(1j)),
        "mismatched",
        "`p0`: state `step` is Tensor, must be a number",
    ),
    "step NaN": (
        setting("state", 0, "step", value=torch.tensor(float("nan"))),
        "mismatched",
        "`p0`: state `step` is nan, must be a whole number >= 0",
    ),
    "step of several": (
        setting("state", 0, "step", value=torch.ones(2)),
        "mismatched",
        r"`p0`: state `step` has shape \(2,\), must be one number",
    ),
    "option missing": (setting(*GROUP, "eps", value=del_), "missing", r"param_groups\[0\]: option `eps`"),
    "option of another": (
        setting(*GROUP, "momentum", value=0.9),
        "unexpected",
        r"param_groups\[0\]: option `momentum` of another algorithm",
    ),
    "state of nobody": (setting("state", 7, value={"step": 1}), "unexpected", "state of parameter number 7"),
    "group missing": (
        setting("param_groups", value=[]),
        "mismatched",
        "loaded state dict has a different number of parameter groups: 0, but the optimizer has 1",
    ),
    "group shorter": (
        setting(*GROUP, "params", value=[0]),
        "mismatched",
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    ),
}


@pytest.mark.parametrize(("change", "kind", "line"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_is_refused_and_reported(change, kind, line):
    state_dict = copy.deepcopy(stepped(surefoot.AdamW, amsgrad=True).state_dict())
    change(state_dict)
    target = stepped(surefoot.AdamW, named(make_params()), amsgrad=True)
    refused(target, state_dict, f"{kind}: {line}")
    report = target.load_state_dict(state_dict, strict=False)
    assert report
    with pytest.raises(ValueError, match=f"^{line}"):
        raise ValueError("\n".join(getattr(report, kind)))
    train(target, first=3, steps=1)


@pytest.mark.parametrize("cls", [surefoot.SparseAdam, surefoot.AdamW], ids=name_of)
@pytest.mark.parametrize("value", [1.5, -1.0, float("inf"), float("nan")])
def test_steps_are_counted(cls, value):
    state_dict = copy.deepcopy(stepped(cls).state_dict())
    state_dict["state"][0]["step"] = value
    refused(stepped(cls), state_dict, f"state `step` is {value}, must be a whole number >= 0")


def test_lenient_loading_leaves_what_did_not_match():
    source = stepped(surefoot.AdamW, make_params(seed=1), lr=0.5)
    state_dict = copy.deepcopy(source.state_dict())
    with_shape((2, 5))(state_dict)
    target = train(make(surefoot.AdamW), first=5)
    before = snapshot(target)
    report = target.load_state_dict(state_dict, strict=False)
    assert report.mismatched == ["`param_groups[0]['params'][1]`: state `exp_avg` has shape (2, 5), must be (5, 2)"]
    assert (report.missing, report.unexpected) == ([], [])
    assert_same(state_of(target)[0], state_of(source)[0])
    assert_same(state_of(target)[1], before["state"][1])
    assert target.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("extra", [1, -1], ids=["group more", "group less"])
def test_lenient_loading_of_other_groups(extra):
    def groups(count):
        return [{"params": [param], "lr": 0.1 * count} for param in make_params([(3, 4), (5, 2), (2, 2)])[:count]]

    source, target = stepped(surefoot.AdamW, groups(2)), stepped(surefoot.AdamW, groups(2 + extra))
    kept = copy.deepcopy(state_of(target))
    refused(target, source.state_dict(), "different number of parameter groups")
    report = target.load_state_dict(source.state_dict(), strict=False)
    assert report.mismatched == [
        f"loaded state dict has a different number of parameter groups: 2, but the optimizer has {2 + extra}"
    ]
    common = min(2, 2 + extra)
    assert_same(state_of(target)[:common], state_of(source)[:common])
    assert_same(state_of(target)[common:], kept[common:])
    assert [group["lr"] for group in target.param_groups] == [0.2] * common + [0.1 * 3] * (2 + extra - common)
    train(target, first=3, steps=1)


def test_lenient_loading_takes_no_names_that_do_not_fit():
    source, target = stepped(surefoot.AdamW, by_name("a", "b", "c")), stepped(surefoot.AdamW)
    report = target.load_state_dict(source.state_dict(), strict=False)
    assert len(report.mismatched) == 1
    assert "param_names" not in target.param_groups[0]
    train(target, first=3, steps=1)


def test_many_lines_are_cut():
    params = [((3,), f"n{index}") for index in range(30)]
    make = [(name, torch.zeros(shape, requires_grad=True)) for shape, name in params]
    message = refused(stepped(surefoot.AdamW, make), stepped(surefoot.AdamW, by_name("a")).state_dict(), "missing")
    assert "and 11 more" in message
    assert len(message.splitlines()) == 23


NO_STATE_DICTS = {
    "None": None,
    "a number": 3,
    "a string": "checkpoint.pt",
    "a list": [1, 2],
    "a checkpoint": {"model": {}, "optimizer": {}},
    "state no dict": {"state": [], "param_groups": []},
    "groups no list": {"state": {}, "param_groups": 3},
    "group no dict": {"state": {}, "param_groups": [3]},
    "group without params": {"state": {}, "param_groups": [{"lr": 0.1}]},
    "params no list": {"state": {}, "param_groups": [{"params": 2}]},
    "params unhashable": {"state": {}, "param_groups": [{"params": [[0]]}]},
    "names no list": {"state": {}, "param_groups": [{"params": [0], "param_names": 3}]},
    "entry no dict": {"state": {0: 3}, "param_groups": [{"params": [0]}]},
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("state_dict", NO_STATE_DICTS.values(), ids=NO_STATE_DICTS)
def test_what_is_no_state_dict(state_dict, strict):
    refused(stepped(surefoot.AdamW), state_dict, "^not an optimizer's state dict: ", strict=strict)


# All or nothing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("strict", [False, True])
def test_a_post_hook_that_raises_rolls_back(error, strict):
    target = stepped(surefoot.AdamW)
    before = snapshot(target)

    def spoil(optimizer):
        optimizer.param_groups[0]["lr"] = 9.0
        for entry in optimizer.state.values():
            entry["step"] = "spoilt"
        optimizer.state["more"] = 1
        raise error

    state_dict = train(surefoot.AdamW(make_params()[:1]), first=7).state_dict()
    if strict:
        state_dict = train(make(surefoot.AdamW), first=7).state_dict()
    handle = target.register_load_state_dict_post_hook(spoil)
    with pytest.raises(error):
        target.load_state_dict(state_dict, strict=strict)
    assert_same(snapshot(target), before)
    handle.remove()
    assert not target._optimizer_load_state_dict_post_hooks


def test_a_setstate_that_raises_rolls_back():
    class Picky(surefoot.AdamW):
        def __setstate__(self, state):
            super().__setstate__(state)
            raise KeyError("missing")

    target = stepped(Picky)
    before = snapshot(target)
    with pytest.raises(KeyError):
        target.load_state_dict(stepped(surefoot.AdamW).state_dict())
    assert_same(snapshot(target), before)


VALUES = [
    None, "text", -1, 0, 2.5, float("nan"), float("inf"), True, (), [], {}, [0.5, 0.5], {"a": 1}, b"bytes", object,
    torch.tensor(2.0), torch.tensor(3), torch.tensor(1j), torch.ones(2), torch.ones(3, 4), torch.ones(3, 4).to_sparse(),
    torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.float64), torch.tensor(1.0).to_sparse(),
]  # fmt: skip


def places(value, path=()):
    """Return the paths of everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def corrupt(state_dict, number, how, value):
    """Delete, rename or replace something; in a list, move it to the end instead of renaming it."""
    paths = list(places(state_dict))
    if not paths:
        return
    *way, last = paths[number % len(paths)]
    place = functools.reduce(operator.getitem, way, state_dict)
    if how == "replace":
        place[last] = copy.deepcopy(value)
    elif how == "delete":
        place.pop(last)
    elif isinstance(place, dict):
        place["renamed"] = place.pop(last)
    else:
        place.append(place.pop(last))


FUZZED = [
    (surefoot.SGD, {"momentum": 0.9}),
    (surefoot.AdamW, {"amsgrad": True}),
    (surefoot.RMSprop, {"centered": True}),
    (surefoot.ASGD, {}),
    (surefoot.Adafactor, {}),
    (surefoot.SparseAdam, {}),
    (surefoot.Rprop, {}),
]


def fuzzed_dict(cls, options, *, names):
    params = make_params([(3, 4), (4, 3), (3, 4)])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    if names:
        groups = [{**group, "params": named(group["params"])} for group in groups]
        groups[1]["params"] = [("last", params[2])]
    return stepped(cls, groups, **options)


CORRUPTIONS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["delete", "rename", "replace"]), st.sampled_from(VALUES)),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(("cls", "options"), FUZZED, ids=lambda value: getattr(value, "__name__", ""))
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corruptions=CORRUPTIONS, names=st.booleans(), strict=st.booleans())
def test_a_corrupt_dict_loads_right_or_changes_nothing(cls, options, corruptions, names, strict):
    target = fuzzed_dict(cls, options, names=names)
    state_dict = copy.deepcopy(train(copy.deepcopy(target), first=3, steps=1).state_dict())
    for number, how, value in corruptions:
        corrupt(state_dict, number, how, value)
    given_, before = copy.deepcopy(state_dict), snapshot(target)
    try:
        report = target.load_state_dict(state_dict, strict=strict)
    except (ValueError, TypeError):
        assert_same(snapshot(target), before)
    else:
        assert not (strict and report)
        if strict:
            assert_loaded(target, given_)
        with contextlib.suppress(RuntimeError, AssertionError):  # engines that are not there
            train(target, first=3, steps=1)
    assert_same(printable(state_dict), printable(given_))


def assert_loaded(optimizer, state_dict):
    """Assert that the state is what stands in the dict under the same names, or in the same positions."""
    live, saved = (
        [str(name) for group in groups for name in group.get("param_names") or ()]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    )
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    if set(live) == set(saved) and len(set(live)) == len(keys):
        keys = [keys[saved.index(name)] for name in live]
    for param, key in zip(params_of(optimizer), keys, strict=True):
        expected = {name: value for name, value in (state_dict["state"].get(key) or {}).items() if value is not None}
        loaded = optimizer.state.get(param, {})
        assert loaded.keys() == expected.keys()
        for name, value in loaded.items():
            new, old = (torch.as_tensor(item).double().to_dense() for item in (value, expected[name]))
            assert_same(new, old.reshape(new.shape))


def printable(value):
    """Replace what cannot be compared."""
    if isinstance(value, dict):
        return {key: printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return repr(value)


def test_parameters_that_were_added_without_names_keep_their_state():
    params = make_params()
    optimizer = make(surefoot.AdamW, [("a", params[0])])
    optimizer.param_groups[0]["params"].append(params[1])  # as some code does, past `add_param_group`
    train(optimizer)
    before = snapshot(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(snapshot(optimizer), before)


# Options of the script, and options of the checkpoint


def with_options(**options):
    return surefoot.AdamW(make_params(), **options)


@pytest.mark.parametrize("origin", [with_options, lambda: torch.optim.AdamW(make_params())], ids=["ours", "torch"])
def test_options_that_a_checkpoint_does_not_know_stay(origin):
    saved = copy.deepcopy(train(origin()).state_dict())
    resumed = with_options(ema=0.9, max_grad_value=0.5)
    resumed.param_groups[0]["max_grad_norm"] = 0.25
    report = resumed.load_state_dict(saved)
    assert not report
    assert report.kept[:3] == [
        "param_groups[0]: option `max_grad_norm` stays 0.25, the state dict has None",
        "param_groups[0]: option `max_grad_value` stays 0.5, the state dict has None",
        "param_groups[0]: option `ema` stays 0.9, the state dict has None",
    ]
    train(resumed, first=3, steps=1)
    assert all("ema" in entry for entry in resumed.state.values())


def test_options_that_were_left_out_at_a_resume_stay_out():
    saved = copy.deepcopy(train(with_options(ema=0.9, max_grad_value=0.5)).state_dict())
    resumed = with_options()
    report = resumed.load_state_dict(saved)
    assert not report
    assert report.kept == [
        "param_groups[0]: option `max_grad_value` stays None, the state dict has 0.5",
        "param_groups[0]: option `ema` stays None, the state dict has 0.9",
    ]
    assert resumed.param_groups[0].get("ema") is None
    averages = [entry["ema"].clone() for entry in resumed.state.values()]
    train(resumed, first=3, steps=1)
    assert all(map(torch.equal, averages, (entry["ema"] for entry in resumed.state.values())))


def test_options_that_both_know_are_the_scripts():
    saved = copy.deepcopy(train(with_options(ema=0.9, lr=0.5)).state_dict())
    resumed = with_options(ema=0.99, lr=0.1)
    assert resumed.load_state_dict(saved).kept == ["param_groups[0]: option `ema` stays 0.99, the state dict has 0.9"]
    assert (resumed.param_groups[0]["ema"], resumed.param_groups[0]["lr"]) == (0.99, 0.5)


def test_torchs_checkpoint_leaves_options_that_torch_has_not():
    saved = copy.deepcopy(train(torch.optim.RMSprop(make_params())).state_dict())
    resumed = surefoot.RMSprop(make_params(), state_dtype=torch.float64, fused=True)
    report = resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["state_dtype"] is torch.float64
    assert resumed.param_groups[0]["fused"] is True
    assert "param_groups[0]: option `fused` stays True, the state dict does not know it" in report.kept


def test_keys_of_a_group_that_a_checkpoint_does_not_know_stay():
    saved = copy.deepcopy(train(with_options()).state_dict())
    resumed = surefoot.AdamW([{"params": make_params(), "lr_scale": 0.5}])
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr_scale"] == 0.5


def test_numbers_are_torchs_where_groups_share_parameters():
    for repeat in (lambda o: o.param_groups.extend(o.param_groups), lambda o: o.param_groups[0]["params"].reverse()):
        ours, theirs = (make(surefoot.SGD), torch.optim.SGD(make_params()))
        for optimizer in ours, theirs:
            repeat(optimizer)
        numbers = [[group["params"] for group in o.state_dict()["param_groups"]] for o in (ours, theirs)]
        assert numbers[0] == numbers[1]
    one, other = make_params()
    with pytest.warns(UserWarning, match="duplicate"):
        pair = [cls([one, one, other], lr=0.1) for cls in (surefoot.SGD, torch.optim.SGD)]
    assert pair[0].state_dict()["param_groups"][0]["params"] == pair[1].state_dict()["param_groups"][0]["params"]
