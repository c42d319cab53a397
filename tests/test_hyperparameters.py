"""Hyperparameters are validated wherever they come from, with torch's messages, NaN included."""

import copy
import math
import re

import numpy as np
import pytest
import torch

import surefoot
from helpers import ALGORITHMS, assert_same, make, make_params, name_of, snapshot, torchs_database, train
from surefoot.rule.hyperparameters import Each, Interval

NAN, INF = math.nan, math.inf

# What torch refuses and surefoot allows, by torch's message.
ALLOWED = (
    "lr as a Tensor is not supported",  # engines take a learning rate in a tensor
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported",
)


def torchs_error_inputs():
    """Every construction and step that torch's own database says must fail."""
    for info in torchs_database().optim_db:
        cls = getattr(surefoot, info.name)
        for number, entry in enumerate(info.optim_error_inputs_func("cpu", torch.float32)):
            yield pytest.param(cls, entry, id=f"{info.name}-{number}")


@pytest.mark.parametrize(("cls", "entry"), list(torchs_error_inputs()))
def test_torchs_error_inputs(cls, entry):
    given = entry.optimizer_error_input
    params = make_params() if given.params is None else given.params
    if entry.error_type is UserWarning:
        with pytest.warns(UserWarning, match=entry.error_regex):
            cls(params, **given.kwargs)
        return
    if entry.error_regex.startswith(ALLOWED):
        train(cls(params, **(given.kwargs | {"foreach": False})))
        return
    if entry.error_on is torchs_database().OptimizerErrorEnum.STEP_ERROR:
        optimizer = cls(params, **given.kwargs)
        with pytest.raises(entry.error_type, match=entry.error_regex):
            optimizer.step()
        return
    with pytest.raises(entry.error_type, match=entry.error_regex):
        cls(params, **given.kwargs)


def test_torchs_database_is_covered():
    assert {info.name for info in torchs_database().optim_db} >= {cls.__name__ for cls in ALGORITHMS}


# Every declared range, at every entrance


def outside(check):
    """Return values that a check must refuse."""
    if isinstance(check, Interval):
        values = [NAN, math.nextafter(check.low, -INF) if math.isfinite(check.low) else None]
        values += [check.low] * check.low_open + [check.high] * check.high_open
        values += [math.nextafter(check.high, INF)] * (math.isfinite(check.high) and not check.high_open)
        return [value for value in values if value is not None]
    if not isinstance(check, Each):
        return []
    middle = [inside(part) for part in check.checks]
    replaced = [
        tuple(bad if index == place else value for index, value in enumerate(middle))
        for place, part in enumerate(check.checks)
        for bad in outside(part)
    ]
    return [*replaced, middle[:-1], 0.5, None]


def inside(check):
    """Return a value that a check allows."""
    return min(max(check.low, -0.5) + 0.5, check.high)


BAD_VALUES = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{value}")
    for cls in ALGORITHMS
    for name, check in cls.ranges.items()
    for value in outside(check)
] + [
    pytest.param(surefoot.Rprop, "etas", etas, id=f"Rprop-etas-{etas}")
    for etas in [(1.0, 0.5), (0.5, NAN), (NAN, 1.2), (0, 1.2), (0.5, 1), (0.5,), 3]
] + [pytest.param(surefoot.Muon, "adjust_lr_fn", "arbitrary", id="Muon-adjust_lr_fn")]  # fmt: skip


def from_constructor(cls, optimizer, bad):
    cls(make_params(), **bad)


def from_group(cls, optimizer, bad):
    cls([{"params": make_params(), **bad}])


def from_add_param_group(cls, optimizer, bad):
    optimizer.add_param_group({"params": make_params(), **bad})


def from_load(cls, optimizer, bad, *, strict=True):
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0] |= bad
    optimizer.load_state_dict(state_dict, strict=strict)


def from_lenient_load(cls, optimizer, bad):
    from_load(cls, optimizer, bad, strict=False)


ENTRANCES = [from_constructor, from_group, from_add_param_group, from_load, from_lenient_load]


@pytest.mark.parametrize(("cls", "name", "value"), BAD_VALUES)
def test_values_out_of_range_are_refused_everywhere(cls, name, value):
    optimizer = train(make(cls), steps=1)
    before = snapshot(optimizer)
    for entrance in ENTRANCES:
        with pytest.raises(ValueError, match=rf"{re.escape(name)}|{re.escape(str(value))}"):
            entrance(cls, optimizer, {name: value})
        assert_same(snapshot(optimizer), before)


def test_every_number_of_every_algorithm_has_a_range():
    free = {"etas", "max_iter", "max_eval", "history_size", "rounding_seed"}
    for cls in ALGORITHMS:
        numbers = {
            name
            for name, value in cls(make_params()).defaults.items()
            if isinstance(value, float | tuple) or (isinstance(value, int) and not isinstance(value, bool))
        }
        assert numbers - free <= set(cls.ranges), cls


@pytest.mark.parametrize("value", ["0.1", None, [0.1], 1j, torch.tensor(1j), {}], ids=repr)
def test_what_is_no_number_is_a_type_error(value):
    optimizer = surefoot.AdamW(make_params())
    for entrance in ENTRANCES:
        with pytest.raises(TypeError, match="`lr` must be a number, but got"):
            entrance(surefoot.AdamW, optimizer, {"lr": value})


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable"])
@pytest.mark.parametrize("value", ["false", [False], torch.ones(2)], ids=repr)
def test_flags_are_plainly_true_or_false(name, value):
    optimizer = surefoot.AdamW(make_params())
    for entrance in ENTRANCES:
        with pytest.raises(TypeError, match=f"`{name}` must be True or False, but got "):
            entrance(surefoot.AdamW, optimizer, {name: value})


@pytest.mark.parametrize("value", [1, 0, None, np.bool_(1), torch.tensor(True)], ids=repr)
def test_other_ways_to_write_a_flag(value):
    ours, expected = (train(make(surefoot.AdamW, maximize=flag)) for flag in (value, bool(value)))
    assert_same(snapshot(ours)["values"], snapshot(expected)["values"])


def test_an_array_of_numbers_is_a_type_error():
    with pytest.raises((TypeError, ValueError)):
        surefoot.AdamW(make_params(), lr=np.ones(2))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_tensors_have_one_element(name):
    with pytest.raises(ValueError, match=f"Tensor {name} must be 1-element, but its shape is \\(2,\\)"):
        surefoot.AdamW(make_params(), **{name: torch.ones(2)})


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"nesterov": True, "momentum": 0.0}, "Nesterov momentum requires a momentum and zero dampening"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires a momentum and zero"),
    ],
)
def test_nesterov_needs_momentum(entrance, bad, message):
    with pytest.raises(ValueError, match=message):
        entrance(surefoot.SGD, surefoot.SGD(make_params()), bad)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
    ],
    ids=["foreach", "differentiable"],
)
def test_engines_that_exclude_one_another(entrance, bad, message):
    with pytest.raises(RuntimeError, match=message):
        entrance(surefoot.AdamW, surefoot.AdamW(make_params()), bad)


# What is allowed

GOOD = [
    (surefoot.Adam, {"betas": (0, 0.99)}, {"betas": (0.0, 0.99)}),
    (surefoot.AdamW, {"betas": [0.8, 0.9]}, {"betas": (0.8, 0.9)}),
    (surefoot.NAdam, {"betas": (0, 0), "lr": 1}, {"betas": (0.0, 0.0), "lr": 1.0}),
    (surefoot.AdamW, {"lr": np.float32(0.5)}, {"lr": 0.5}),
    (surefoot.AdamW, {"lr": np.float64(0.1)}, {"lr": 0.1}),
    (surefoot.AdamW, {"lr": torch.tensor([0.5])}, {"lr": 0.5}),
    (surefoot.AdamW, {"betas": (torch.tensor(0.5), 0.75)}, {"betas": (0.5, 0.75)}),
    (surefoot.SGD, {"lr": 0, "momentum": 0.9}, {"lr": 0.0, "momentum": 0.9}),
    (surefoot.SGD, {"lr": 1, "weight_decay": torch.tensor(0.5)}, {"lr": 1.0, "weight_decay": 0.5}),
    (surefoot.Adadelta, {"rho": 1}, {"rho": 1.0}),
]


@pytest.mark.parametrize(("cls", "given", "meant"), GOOD, ids=name_of)
def test_other_ways_to_write_a_number(cls, given, meant):
    ours, expected = train(make(cls, **given)), train(make(cls, **meant))
    torch.testing.assert_close(snapshot(ours)["values"], snapshot(expected)["values"])
    torch.testing.assert_close(snapshot(ours)["state"], snapshot(expected)["state"])


def test_group_overrides_are_used():
    params = make_params()
    optimizer = surefoot.SGD([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], lr=0.1)
    train(optimizer)
    assert_same(params[0].detach(), make_params()[0].detach())
    assert not torch.equal(params[1], make_params()[1])


# The checks themselves


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(""), "[0, inf)"),
        (Interval("", low=-INF), "(-inf, inf)"),
        (Interval("", low_open=True, high=1.0, high_open=True), "(0, 1)"),
        (Interval("", low=1.0, high=99), "[1, 99]"),
    ],
)
def test_an_interval_is_written_as_in_mathematics(interval, text):
    assert str(interval) == text


@pytest.mark.parametrize("value", [0.0, 0, 1.0, np.float16(0.5), torch.tensor(0.25)])
def test_an_interval_holds_its_closed_ends(value):
    Interval("", high=1.0)("x", value)


def test_messages_name_the_option_the_value_and_the_range():
    with pytest.raises(ValueError, match=r"^Invalid x: -1; `x` must be a number in \[0, 1\)$"):
        Interval("Invalid x: ", high=1.0, high_open=True)("x", -1)
    with pytest.raises(ValueError, match=r"^bad: nan; `y\[1\]` must be a number in \(-inf, inf\)$"):
        Each((Interval("bad: ", low=-INF),) * 2)("y", (0.5, NAN))
    with pytest.raises(ValueError, match=r"^`y` must be 1 numbers, but got \(1, 2\)$"):
        Each((Interval(""),))("y", (1, 2))


def test_an_optional_number_may_be_none():
    Interval("", optional=True)("x", None)
    with pytest.raises(TypeError, match="must be a number, but got None"):
        Interval("")("x", None)


# What can only end in NaN


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (surefoot.ASGD, {"lambd": -1}),
        (surefoot.ASGD, {"lambd": math.inf}),
        (surefoot.ASGD, {"alpha": -0.5}),
        (surefoot.Adagrad, {"lr_decay": math.inf}),
        (surefoot.RMSprop, {"alpha": 1.5}),
        (surefoot.SGD, {"momentum": math.inf}),
        (surefoot.SGD, {"dampening": -math.inf}),
        (surefoot.AdamW, {"lr": math.inf}),
        (surefoot.Adam, {"weight_decay": math.inf}),
        (surefoot.Muon, {"momentum": math.inf}),
        (surefoot.Adafactor, {"weight_decay": math.inf}),
        (surefoot.LBFGS, {"lr": math.inf}),
        (surefoot.SparseAdam, {"lr": math.inf}),
    ],
    ids=str,
)
def test_what_can_only_end_in_nan_is_refused(cls, options):
    ((name, _),) = options.items()
    for params in ([torch.ones(2, 2)], [{"params": [torch.ones(2, 2)], **options}]):
        with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
            cls(params, **(options if isinstance(params[0], torch.Tensor) else {}))


def test_a_set_of_parameters_is_refused_in_a_group_and_warned_of_at_the_top():
    params = {torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)}
    with pytest.warns(FutureWarning, match="ordered collections"):
        optimizer = surefoot.SGD(params)
    assert set(optimizer.param_groups[0]["params"]) == params
    with pytest.raises(TypeError, match="ordered collections"):
        surefoot.SGD([{"params": params}])


def test_muon_follows_the_shape_of_a_matrix_both_ways():
    steps = []
    for way in ("original", "spectral_unclamped"):
        weight = torch.nn.Parameter(torch.zeros(2, 8))
        weight.grad = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
        surefoot.Muon([weight], lr=1.0, weight_decay=0, adjust_lr_fn=way).step()
        steps.append(weight.detach())
    torch.testing.assert_close(steps[1], steps[0] * 0.5)
