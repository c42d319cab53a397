"""Several algorithms in one optimizer: each parameter is stepped as by its own algorithm's, all else is that of one."""

import copy
import functools
import io
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import surefoot
from helpers import Noted, assert_same, params_of, snapshot
from surefoot import Combined, Part
from surefoot.errors import NonFiniteGradientError

STEPS = 6
ENGINES = {"default": {}, "eager": {"foreach": False}, "foreach": {"foreach": True}, "cpu": {"fused": True}}


class Model(nn.Module):
    """Matrices of two shapes, vectors, a scalar and an embedding."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.wide = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 7)

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.wide(x).tanh() * self.scale)


def give_gradients(model, seed, scale=1.0, spoil=None):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)
        if name == spoil:
            param.grad.view(-1)[0] = torch.nan


def is_hidden(name, param):
    return param.dim() == 2 and name.startswith(("blocks", "wide"))


MIXES = {
    "SGD, AdamW": [(surefoot.SGD, "blocks.*", {"lr": 0.1, "momentum": 0.9}), (surefoot.AdamW, "*", {"lr": 0.01})],
    "Muon, AdamW": [(surefoot.Muon, is_hidden, {"lr": 0.02}), (surefoot.AdamW, "*", {"lr": 0.01})],
    "Muon, Lion": [(surefoot.Muon, is_hidden, {"lr": 0.02}), (surefoot.Lion, "*", {"lr": 0.01})],
    "Adafactor, Muon, AdamW": [
        (surefoot.Adafactor, ["*.bias", "scale"], {}),
        (surefoot.Muon, re.compile("^blocks"), {"lr": 0.02, "nesterov": False}),
        (surefoot.AdamW, "*", {"lr": 0.01}),
    ],
    "Muon, Adafactor": [(surefoot.Muon, is_hidden, {"lr": 0.02}), (surefoot.Adafactor, "*", {})],
    "Prodigy, Muon": [
        (surefoot.Prodigy, "*.bias", {"d0": 1e-3}),
        (surefoot.Muon, is_hidden, {"lr": 0.02}),
        (surefoot.Adan, "*", {}),
    ],
    "LAMB, Adagrad": [(surefoot.LAMB, is_hidden, {"lr": 0.1}), (surefoot.Adagrad, "*", {"lr": 0.1})],
    "AdamW, AdamW": [
        (surefoot.AdamW, is_hidden, {"lr": 0.02, "weight_decay": 0.1}),
        (surefoot.AdamW, "*", {"lr": 0.01, "weight_decay": 0.0}),
    ],
}
each_mix = pytest.mark.parametrize("mix", MIXES)


def options_of(cls, engine):
    wanted = ENGINES[engine]
    return wanted if cls.is_rule() and cls.spec.constructor.keys() >= wanted.keys() else {}


def combined(model, mix, engine="default", **options):
    parts = [Part(cls, select, **own, **options_of(cls, engine)) for cls, select, own in MIXES[mix]]
    return Combined(model.named_parameters(), parts, **options)


def by_hand(model, mix, engine="default", **options):
    """Return an optimizer for each part, with the parameters that the first part that fits them takes."""
    named, found = dict(model.named_parameters()), []
    for cls, select, own in MIXES[mix]:
        part = Part(cls, select)
        mine = {name: named.pop(name) for name in list(named) if part.selects(name, named[name])}
        found.append(cls(mine.items(), **own, **options_of(cls, engine), **options))
    assert not named
    return found


def state_by_name(model, optimizers):
    names = {param: name for name, param in model.named_parameters()}
    return {names[param]: entry for optimizer in optimizers for param, entry in optimizer.state.items() if entry}


def assert_alike(model, optimizer, twin, separate):
    """Assert that a combination is where separate optimizers of a twin are, bit by bit."""
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert_same(state_by_name(model, [optimizer]), state_by_name(twin, separate))


# Numbers


@pytest.mark.parametrize("engine", ENGINES)
@each_mix
def test_bits_are_those_of_separate_optimizers(mix, engine):
    model, twin = Model(), Model()
    optimizer, separate = combined(model, mix, engine), by_hand(twin, mix, engine)
    for step in range(STEPS):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
        assert_alike(model, optimizer, twin, separate)


class Descent(surefoot.Optimizer):
    """A step whose length over all parameters is lr, kept in the groups."""

    group_scalars = (surefoot.GroupScalar("norm"),)

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def update(param, grad, c, flags):
        norm = torch.sqrt(surefoot.total_sum(grad * grad))
        return param - c.lr / norm * grad, norm


def test_what_an_algorithm_estimates_is_of_its_own_groups():
    """Two algorithms sum over all their parameters; Prodigy's two groups share d, the others know nothing of it."""
    model, twin = Model(), Model()
    parts = [
        Part(surefoot.Prodigy, "blocks.*", d0=1e-3),
        Part(Descent, "*.bias"),
        Part(surefoot.Prodigy, "tokens.*", d0=1e-3, weight_decay=0.1),
        Part(surefoot.AdamW),
    ]
    optimizer, named = Combined(model.named_parameters(), parts, max_grad_norm=1.0), dict(twin.named_parameters())
    blocks = [item for item in named.items() if item[0].startswith("blocks")]
    biases = [item for item in named.items() if item[0] in ("wide.bias", "head.bias")]
    tokens = {"params": [("tokens.weight", twin.tokens.weight)], "weight_decay": 0.1}
    rest = [item for item in named.items() if item[0] in ("wide.weight", "head.weight", "scale")]
    separate = [surefoot.Prodigy([{"params": blocks}, tokens], d0=1e-3), Descent(biases), surefoot.AdamW(rest)]
    for step in range(STEPS):
        give_gradients(model, step), give_gradients(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for each in (optimizer, *separate):
            each.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, named[name])
    first, descent, second, adamw = optimizer.param_groups
    assert first["k"] == second["k"] == STEPS
    for number in ("d", "d_numerator"):
        assert first[number] == second[number] == pytest.approx(separate[0].param_groups[0][number], rel=1e-4)
    assert descent["norm"] == pytest.approx(separate[1].param_groups[0]["norm"])
    assert not {"d", "norm"} & adamw.keys()
    assert "d" not in descent
    optimizer.add_param_group({"params": [("later", nn.Parameter(torch.ones(2)))], "algorithm": "Prodigy"})
    assert optimizer.param_groups[-1]["d"] == first["d"]
    optimizer.param_groups[2]["betas"] = (0.5, 0.9)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="but one d is estimated for both"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_rows_of_sparse_gradients_and_dense_ones():
    model, twin = Model(), Model()
    for each in model, twin:
        each.tokens.sparse = True
    optimizer = Combined(
        model.named_parameters(), [Part(surefoot.SparseAdam, "tokens.*", lr=0.1), Part(surefoot.AdamW, lr=0.01)]
    )
    rest = [param for name, param in twin.named_parameters() if not name.startswith("tokens")]
    separate = [surefoot.SparseAdam([("tokens.weight", twin.tokens.weight)], lr=0.1), surefoot.AdamW(rest, lr=0.01)]
    for step in range(STEPS):
        for each, optimizers in ((model, [optimizer]), (twin, separate)):
            each.zero_grad()
            torch.manual_seed(step)
            each(torch.randint(7, (5,))).square().sum().backward()
            assert each.tokens.weight.grad.is_sparse
            for one in optimizers:
                one.step()
        assert_alike(model, optimizer, twin, separate)


@each_mix
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(mix, dtype):
    model, twin = Model().to(dtype), Model().to(dtype)
    short = {"rounding": "stochastic"} if dtype is torch.bfloat16 else {}
    parts = [Part(cls, select, **own, **short) for cls, select, own in MIXES[mix]]
    optimizer, separate = Combined(model.named_parameters(), parts), by_hand(twin, mix, **short)
    for step in range(STEPS):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
        assert_alike(model, optimizer, twin, separate)


def test_parameters_without_gradient_stay():
    model, twin = Model(), Model()
    optimizer, separate = combined(model, "Muon, AdamW"), by_hand(twin, "Muon, AdamW")
    for step in range(STEPS):
        give_gradients(model, step), give_gradients(twin, step)
        for each in model, twin:
            names = (
                ["wide.weight", "head.bias"]
                if step % 2
                else ["tokens.weight", *(f"blocks.{i}.weight" for i in range(3))]
            )
            for name in names + ["wide.weight"] * (step == 2):
                each.get_parameter(name).grad = None
        for each in (optimizer, *separate):
            each.step()
        assert_alike(model, optimizer, twin, separate)


# Options of the step


OPTIONS = {
    "norm": {"max_grad_norm": 1.0},
    "value": {"max_grad_value": 0.3},
    "skip": {"nonfinite": "skip"},
    "ema": {"ema": 0.8},
    "zero": {"zero_grad_after_step": True},
    "centralization": {"gradient_centralization": True},
}
OPTIONS["all"] = functools.reduce(lambda a, b: a | b, list(OPTIONS.values()))


def clip(model, options):
    """Do to the gradients by torch's calls what options do."""
    if "max_grad_norm" in options:
        clip_grad_norm_(model.parameters(), options["max_grad_norm"], foreach=False)
    for param in model.parameters() if "gradient_centralization" in options else ():
        if param.dim() > 1:
            param.grad -= param.grad.mean(1, keepdim=True)
    if "max_grad_value" in options:
        clip_grad_value_(model.parameters(), options["max_grad_value"])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mix", ["SGD, AdamW", "Muon, AdamW", "Adafactor, Muon, AdamW", "Muon, Adafactor"])
def test_options_are_those_of_all_parameters_together(mix, option):
    """As by torch's calls on all parameters before the steps of separate optimizers; averages are these optimizers'."""
    options = OPTIONS[option]
    model, twin = Model().double(), Model().double()
    optimizer = combined(model, mix, **options)
    separate = by_hand(twin, mix, **{name: options[name] for name in ("ema",) if name in options})
    for step in range(STEPS):
        spoil = "wide.weight" if step == 3 and "nonfinite" in options else None
        for each in model, twin:
            give_gradients(each, step, spoil=spoil)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        assert all((param.grad is None) == ("zero_grad_after_step" in options) for param in model.parameters())
        if spoil:
            continue
        clip(twin, options)
        for each in separate:
            each.step()
    assert optimizer.step_statistics.skipped == ("nonfinite" in options)
    for name, param in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-9, atol=1e-12)
    ours, theirs = state_by_name(model, [optimizer]), state_by_name(twin, separate)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spoilt", ["blocks.1.weight", "head.weight"])
def test_a_step_with_nan_raises_and_changes_nothing(spoilt):
    model = Model()
    optimizer = combined(model, "Muon, AdamW", nonfinite="raise")
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    before = snapshot(optimizer)
    give_gradients(model, 5, spoil=spoilt)
    with pytest.raises(NonFiniteGradientError, match=f"`{spoilt}`"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_one_norm_for_all_and_one_of_a_part():
    model, twin = Model(), Model()
    parts = [Part(surefoot.Muon, is_hidden, max_grad_norm=0.1), Part(surefoot.SGD, lr=0.1)]
    optimizer = Combined(model.named_parameters(), parts, max_grad_norm=0.5)
    named = dict(twin.named_parameters())
    hidden = [param for name, param in named.items() if is_hidden(name, param)]
    rest = [param for name, param in named.items() if not is_hidden(name, param)]
    separate = [surefoot.Muon(hidden, max_grad_norm=0.1), surefoot.SGD(rest, lr=0.1, max_grad_norm=0.5)]
    for step in range(3):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("mix", ["Muon, AdamW", "SGD, AdamW"])
def test_telemetry_tells_of_every_parameter(mix):
    model, twin = Model(), Model()
    optimizer = combined(model, mix, telemetry=Noted())
    separate = by_hand(twin, mix)
    for part in separate:
        part.step_options.telemetry = Noted()
    for step in range(3):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
    raw = optimizer.telemetry.raw[-1]
    rows = dict(zip(raw.names, raw.sums.tolist(), strict=True))
    expected = {}
    for part in separate:
        one = part.telemetry.raw[-1]
        expected |= dict(zip(one.names, one.sums.tolist(), strict=True))
    assert rows == expected
    rates = dict(zip(raw.names, raw.lrs, strict=True))
    assert {rates["blocks.0.weight"], rates["head.bias"]} == {own["lr"] for *_, own in MIXES[mix]}


def test_averages_are_in_the_model_inside_of_a_block():
    model = Model()
    optimizer = combined(model, "Muon, AdamW", ema=0.5)
    give_gradients(model, 0)
    optimizer.step()
    give_gradients(model, 1)
    optimizer.step()
    now = {name: param.detach().clone() for name, param in model.named_parameters()}
    with optimizer.ema_parameters():
        for name, param in model.named_parameters():
            assert torch.equal(param, optimizer.state[param]["ema"])
            assert not torch.equal(param, now[name])
    assert_same({name: param.detach() for name, param in model.named_parameters()}, now)


# GradScaler


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mix", ["SGD, AdamW", "Muon, AdamW", "Muon, Adafactor"])
def test_scaled_training_is_training(mix, fused):
    if fused and mix == "Muon, Adafactor":
        pytest.skip("neither takes fused=True, by which a scaler leaves unscaling to the step")
    model, twin = Model(), Model()
    optimizer = combined(model, mix, "cpu" if fused else "default", max_grad_norm=1.0)
    plain = combined(twin, mix, "cpu" if fused else "default", max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step in range(5):
        before = snapshot(optimizer)
        scaler.scale(torch.tensor(1.0))
        give_gradients(model, step, scaler.get_scale(), spoil="wide.weight" if step == 2 else None)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_same(snapshot(optimizer), before)
            continue
        give_gradients(twin, step)
        plain.step()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-6, atol=1e-7)


def test_telemetry_of_scaled_gradients_is_of_unscaled_ones():
    model, twin = Model(), Model()
    optimizer = combined(model, "Muon, AdamW", "cpu", telemetry=Noted())
    plain = combined(twin, "Muon, AdamW", "cpu", telemetry=Noted())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.tensor(1.0))
    give_gradients(model, 0, scaler.get_scale()), give_gradients(twin, 0)
    scaler.step(optimizer)
    plain.step()
    torch.testing.assert_close(optimizer.telemetry.raw[0].sums, plain.telemetry.raw[0].sums, rtol=1e-6, atol=1e-9)


# All or nothing, and what changes between steps


@pytest.mark.parametrize("name", ["blocks.0.weight", "head.weight"])
@pytest.mark.parametrize("wrong", ["gradient", "state"])
@pytest.mark.parametrize("warm", [0, 4], ids=["first step", "later step"])
def test_what_does_not_fit_is_refused_before_anything_changes(name, wrong, warm):
    if wrong == "state" and not warm:
        pytest.skip("there is no state yet")
    model = Model()
    optimizer = combined(model, "Muon, AdamW")
    for step in range(warm):
        give_gradients(model, step)
        optimizer.step()
    give_gradients(model, 9)
    param = model.get_parameter(name)
    slot = next((key for key, value in optimizer.state[param].items() if value.dim()), None)
    if wrong == "gradient":
        param.grad = param.grad.to_sparse()
    else:
        optimizer.state[param][slot] = torch.zeros(2, 2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=re.escape(name) if wrong == "state" else "sparse|Sparse"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_short_numbers_that_share_memory_are_refused_before_anything_changes():
    base, head = torch.ones(6, 4, dtype=torch.bfloat16), nn.Parameter(torch.ones(3))
    views = [nn.Parameter(base[:4]), nn.Parameter(base[2:])]
    parts = [Part(surefoot.Muon, "view*", rounding="stochastic"), Part(surefoot.AdamW)]
    optimizer = Combined([("view1", views[0]), ("view2", views[1]), ("head", head)], parts)
    for param in (*views, head):
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="share memory, so that they cannot be kept with rounding='stochastic'"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def started(mix="Muon, AdamW", steps=4):
    """A combination and separate optimizers of a twin, which have taken some steps."""
    model, twin = Model(), Model()
    optimizer, separate = combined(model, mix), by_hand(twin, mix)
    for step in range(steps):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
    return model, optimizer, twin, separate


def test_a_step_like_the_one_before_takes_the_fast_lane():
    model, optimizer, *_ = started()
    lane, made = optimizer._step_cache.fast, []
    run = lane.run
    lane.run = lambda *args: made.append(run(*args)) or made[-1]
    for step in range(3):
        give_gradients(model, 20 + step)
        optimizer.param_groups[step % 2]["lr"] *= 0.5  # as a scheduler does
        optimizer.step()
    assert made == [True] * 3
    assert optimizer.step_statistics.steps == 7


def changed(change, model, optimizers):  # noqa: C901, PLR0912 (a list of changes)
    """Make a change to a combination, or to separate optimizers alike."""
    state = {param: entry for optimizer in optimizers for param, entry in optimizer.state.items()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    hidden, head = model.get_parameter("blocks.1.weight"), model.get_parameter("head.weight")
    if change == "rates":
        groups[0]["lr"], groups[1]["lr"] = 0.5, 0.3
    elif change == "rate as a tensor":
        groups[0]["lr"] = torch.tensor(0.5)
    elif change == "data":
        hidden.data, head.data = torch.ones(4, 4).t(), torch.ones(7, 6)
    elif change == "state in place":
        state[hidden]["momentum_buffer"].mul_(2)
        state[head]["exp_avg"].mul_(3)
    elif change == "state replaced":
        state[hidden]["momentum_buffer"] = state[hidden]["momentum_buffer"] * 3
        state[head]["exp_avg"] = state[head]["exp_avg"] * 3
    elif change == "count":
        state[head]["step"] += 5
    elif change == "cleared":
        for optimizer in optimizers:
            optimizer.state.clear()
    elif change == "double":
        for param in (hidden, head):
            param.data = param.data.double()
            state[param].update({k: v.double() for k, v in state[param].items() if k != "step"})
    elif change == "ema":
        for group in groups:
            group["ema"] = 0.9
    elif change == "no gradient":
        hidden.requires_grad_(False), head.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    ["rates", "rate as a tensor", "data", "state in place", "state replaced", "count", "cleared", "double", "ema",
     "no gradient"],
)  # fmt: skip
def test_what_changes_between_steps_counts(change):
    model, optimizer, twin, separate = started()
    changed(change, model, [optimizer])
    changed(change, twin, separate)
    for step in range(4):
        for each in model, twin:
            give_gradients(each, 30 + step)
            for param in each.parameters():
                param.grad = param.grad if param.requires_grad else None
        for each in (optimizer, *separate):
            each.step()
        assert_alike(model, optimizer, twin, separate)


def test_options_changed_later_count_and_are_checked():
    model, optimizer, *_ = started()
    optimizer.step_options.max_grad_norm = 1e-8
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.param_groups[1]["weight_decay"] = optimizer.param_groups[0]["weight_decay"] = 0.0
    give_gradients(model, 50)
    optimizer.step()
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert (model.blocks[0].weight - before["blocks.0.weight"]).abs().max() < 0.1
    optimizer.param_groups[0]["ema"] = 2.0
    with pytest.raises(ValueError, match="`ema` must be a decay"):
        optimizer.step()


def test_an_algorithm_that_is_not_there_is_refused():
    model, optimizer, *_ = started()
    before = snapshot(optimizer)
    give_gradients(model, 50)
    optimizer.param_groups[0]["algorithm"] = "Adam"
    with pytest.raises(ValueError, match="needs an `algorithm`, one of 'AdamW', 'Muon', but has 'Adam'"):
        optimizer.step()
    optimizer.param_groups[0]["algorithm"] = "AdamW"
    with pytest.raises(ValueError, match=re.escape("param_groups[0] lacks `amsgrad`, which AdamW needs")):
        optimizer.step()
    optimizer.param_groups[0]["algorithm"] = "Muon"
    assert_same(snapshot(optimizer), before)
    optimizer.step()


def test_a_group_may_change_its_algorithm():
    model = Model()
    parts = [Part(surefoot.AdamW, "blocks.*", lr=0.1), Part(surefoot.Lion, lr=0.01)]
    optimizer = Combined(model.named_parameters(), parts)
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    first, second = optimizer.param_groups
    second.update({name: value for name, value in first.items() if name not in ("params", "param_names")})
    twin = surefoot.AdamW([nn.Parameter(model.head.weight.detach().clone())], lr=0.1)
    optimizer.state[model.head.weight].clear()
    for step in range(3):
        give_gradients(model, 40 + step)
        twin.param_groups[0]["params"][0].grad = model.head.weight.grad.clone()
        optimizer.step()
        twin.step()
    assert torch.equal(model.head.weight, twin.param_groups[0]["params"][0])


# Who gets what


def test_the_first_part_that_selects_a_parameter_gets_it():
    model = Model()
    optimizer = Combined(
        model.named_parameters(),
        [
            Part(surefoot.Muon, re.compile(r"^blocks\.[01]\.weight$"), lr=0.02),
            Part(surefoot.Lion, ["blocks.*", "head.*"]),
            Part(surefoot.SGD, lambda name, param: param.dim() == 0, lr=0.5),
            Part(surefoot.AdamW),
        ],
    )
    found = {group["algorithm"]: group["param_names"] for group in optimizer.param_groups}
    assert found == {
        "Muon": ["blocks.0.weight", "blocks.1.weight"],
        "Lion": ["blocks.0.bias", "blocks.1.bias", "blocks.2.weight", "blocks.2.bias", "head.weight", "head.bias"],
        "SGD": ["scale"],
        "AdamW": ["tokens.weight", "wide.weight", "wide.bias"],
    }
    assert optimizer.table().splitlines() == [
        "Muon   blocks.*.weight  2 x (4, 4)  lr=0.02",
        "Lion   blocks.*.bias    3 x (4,)    lr=0.0001",
        "Lion   blocks.2.weight  (4, 4)      lr=0.0001",
        "Lion   head.weight      (7, 6)      lr=0.0001",
        "Lion   head.bias        (7,)        lr=0.0001",
        "SGD    scale            ()          lr=0.5",
        "AdamW  tokens.weight    (7, 4)      lr=0.001",
        "AdamW  wide.weight      (6, 4)      lr=0.001",
        "AdamW  wide.bias        (6,)        lr=0.001",
    ]
    assert "algorithm: Muon" in repr(optimizer)


def test_groups_are_divided_and_keep_what_they_say():
    model = Model()
    groups = surefoot.parameter_groups(model, weight_decay=0.3)
    optimizer = Combined(groups, [Part(surefoot.Muon, is_hidden, lr=0.02), Part(surefoot.AdamW, weight_decay=0.5)])
    found = [(group["algorithm"], group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [("Muon", "decay", 0.3), ("AdamW", "decay", 0.3), ("AdamW", "no decay", 0.0)]
    assert "weight_decay" in groups[0]
    assert "algorithm" not in groups[0]


def test_a_group_that_names_its_algorithm_goes_there_whole():
    model = Model()
    named = dict(model.named_parameters())
    head = {"params": [(name, named.pop(name)) for name in ("head.weight", "head.bias")], "algorithm": "Lion", "lr": 1}
    parts = [Part(surefoot.AdamW, lr=0.1), Part(surefoot.Lion, lr=0.01, weight_decay=0.7)]
    optimizer = Combined([{"params": list(named.items())}, head], parts)
    last = optimizer.param_groups[-1]
    assert (last["algorithm"], last["lr"], last["weight_decay"]) == ("Lion", 1, 0.7)
    assert last["param_names"] == ["head.weight", "head.bias"]


def test_frozen_parameters_are_kept_for_later():
    model = Model()
    model.head.requires_grad_(False)
    optimizer = combined(model, "Muon, AdamW")
    assert any(param is model.head.weight for param in params_of(optimizer))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Combined(m.parameters(), [Part(surefoot.SGD)]), TypeError, "by their names; give it model.named_"),
        (lambda m: Combined(m.named_parameters(), []), TypeError, "Combined needs a list of parts"),
        (lambda m: Combined(m.named_parameters(), Part(surefoot.SGD)), TypeError, "Combined needs a list of parts"),
        (lambda m: Combined([], [Part(surefoot.SGD)]), ValueError, "empty parameter list"),
        (
            lambda m: Combined(m.named_parameters(), [Part(surefoot.SGD, "head.*")]),
            ValueError,
            "no part selects `scale`, `tokens.weight`, .* and 5 more parameters; let the last part take what is left",
        ),
        (
            lambda m: Combined(m.named_parameters(), [Part(surefoot.SGD, "heads.*"), Part(surefoot.AdamW)]),
            ValueError,
            r"Part\(SGD, 'heads\.\*'\) selects none of the parameters",
        ),
        (
            lambda m: Combined(m.named_parameters(), [Part(surefoot.Muon, "head.*"), Part(surefoot.AdamW)]),
            ValueError,
            "Muon only supports 2D parameters",
        ),
        (
            lambda m: Combined(m.named_parameters(), [Part(surefoot.SGD)], lr=0.1),
            TypeError,
            "unexpected keyword argument 'lr'; hyperparameters belong to a part",
        ),
        (
            lambda m: Combined(
                m.named_parameters(), [Part(surefoot.Adafactor, is_hidden), Part(surefoot.AdamW)], cautious=True
            ),
            ValueError,
            "Adafactor takes no `cautious`",
        ),
        (lambda m: Combined(m.named_parameters(), [Part(surefoot.SGD)], max_grad_norm=-1), ValueError, "max_grad_norm"),
        (lambda m: Part(surefoot.SGD, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda m: Part(surefoot.SGD, weight=1.0), TypeError, "weight"),
        (lambda m: Part(surefoot.SGD, nonfinite="skip"), ValueError, "`nonfinite` is an option of the whole optimizer"),
        (lambda m: Part(surefoot.SGD, telemetry=True), ValueError, "`telemetry` is an option of the whole optimizer"),
        (lambda m: Part(surefoot.SGD, differentiable=True), ValueError, "`differentiable` lets gradients flow through"),
        (lambda m: Part(surefoot.LBFGS), TypeError, "LBFGS has a custom step"),
        (lambda m: Part(Combined), TypeError, "Combined has a custom step"),
        (lambda m: Part(torch.optim.SGD), TypeError, "needs an optimizer class of surefoot"),
        (lambda m: Part("SGD"), TypeError, "needs an optimizer class of surefoot"),
        (lambda m: Part(surefoot.SGD, 3), TypeError, "selects by patterns"),
        (lambda m: Part(surefoot.SGD, ["a", 3]), TypeError, "selects by patterns, .* but got 3"),
        (
            lambda m: Combined(m.named_parameters(), [Part(surefoot.SGD, lambda name, param: 1)]),
            TypeError,
            "must answer True or False, but answered 1 for `scale`",
        ),
        (
            lambda m: Combined(
                m.named_parameters(), [Part(surefoot.SGD, "head.*"), Part(type("SGD", (surefoot.AdamW,), {}))]
            ),
            ValueError,
            "two parts have algorithms of the name 'SGD'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(Model())


def test_an_algorithm_with_an_overridden_step_is_refused():
    class Stepping(surefoot.SGD):
        def step(self, closure=None):
            return super().step(closure)

    with pytest.raises(TypeError, match="Stepping has a custom step"):
        Part(Stepping)


def test_an_algorithm_of_ones_own():
    class Signs(surefoot.Optimizer):
        slots = (surefoot.Slot("momentum_buffer"),)

        def __init__(self, params, lr=0.1, momentum=0.9, **options):
            super().__init__(params, dict(lr=lr, momentum=momentum, **options))

        @staticmethod
        def update(param, grad, momentum_buffer, c, flags):
            momentum_buffer = momentum_buffer * c.momentum + grad
            return torch.add(param, torch.sign(momentum_buffer), alpha=-c.lr), momentum_buffer

    model, twin = Model(), Model()
    optimizer = Combined(model.named_parameters(), [Part(surefoot.Muon, is_hidden), Part(Signs, lr=0.2)])
    named = dict(twin.named_parameters())
    separate = [
        surefoot.Muon([p for n, p in named.items() if is_hidden(n, p)]),
        Signs([p for n, p in named.items() if not is_hidden(n, p)], lr=0.2),
    ]
    for step in range(4):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
        assert_alike(model, optimizer, twin, separate)
    copied = copy.deepcopy(optimizer)
    assert_same(snapshot(copied), snapshot(optimizer))


# The contract of an optimizer


def test_a_group_is_added_with_its_algorithm():
    model, late = Model(), nn.Parameter(torch.ones(3, 3))
    optimizer = combined(model, "Muon, AdamW")
    before = copy.copy(optimizer.param_groups)
    for group, message in (
        ({"params": [("late", late)]}, "needs an `algorithm`"),
        ({"params": [("late", late)], "algorithm": "SGD"}, "needs an `algorithm`"),
        ({"params": [("late", nn.Parameter(torch.ones(3)))], "algorithm": "Muon"}, "only supports 2D"),
        ({"params": [("late", late)], "algorithm": "Muon", "momentum": -1}, "momentum should be >= 0"),
        ({"params": [late], "algorithm": "Muon"}, "with/without names"),
    ):
        kept = dict(group)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert group == kept
        assert optimizer.param_groups == before
    give_gradients(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [("late", late)], "algorithm": "Muon", "lr": 0.5})
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["momentum"], group["algorithm"]) == (0.5, 0.95, "Muon")
    twin = nn.Parameter(late.detach().clone())
    alone = surefoot.Muon([twin], lr=0.5)
    for step in range(3):
        give_gradients(model, step)
        late.grad, twin.grad = (torch.full((3, 3), 0.1) + torch.eye(3) for _ in range(2))
        optimizer.step()
        alone.step()
    assert torch.equal(late, twin)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(way):
    model, optimizer, *_ = started("Adafactor, Muon, AdamW")
    if way == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save((model, optimizer), buffer)
        buffer.seek(0)
        other, copied = torch.load(buffer, weights_only=False)
    for step in range(3):
        for each, own in ((model, optimizer), (other, copied)):
            give_gradients(each, 60 + step)
            own.step()
    assert_same(snapshot(copied), snapshot(optimizer))
    assert not {id(param) for param in params_of(copied)} & {id(param) for param in params_of(optimizer)}


def test_hooks_closures_and_zero_grad():
    model = Model()
    optimizer, called = combined(model, "Muon, AdamW"), []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))

    def closure():
        called.append("closure")
        give_gradients(model, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert called == ["pre", "closure", "post"]
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_schedulers_see_all_groups():
    model = Model()
    optimizer = combined(model, "Muon, AdamW")
    torchs = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    give_gradients(model, 0)
    optimizer.step()
    torchs.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.005]
    ours = surefoot.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.2, 0.1], total_steps=10, cycle_momentum=False)
    optimizer.step()
    ours.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(2 * rates[1])


def test_momentum_is_cycled_under_each_groups_name():
    optimizer = combined(Model(), "Muon, AdamW")
    scheduler = surefoot.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.9
    )
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[1]["betas"][0]) == (0.9, 0.9)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    momentum = optimizer.param_groups[0]["momentum"]
    assert 0.8 <= momentum < 0.9
    assert optimizer.param_groups[1]["betas"] == (momentum, 0.999)


def test_state_is_there_from_the_beginning_where_an_algorithm_has_it_so():
    model = Model()
    optimizer = combined(model, "LAMB, Adagrad")
    assert set(optimizer.state[model.head.weight]) == {"step", "sum"}
    assert model.blocks[0].weight not in optimizer.state


def test_state_moves():
    optimizer = started("Adafactor, Muon, AdamW")[1]
    before = snapshot(optimizer)
    assert optimizer.to("cpu").to() is optimizer
    assert_same(snapshot(optimizer), before)
    optimizer.to("meta")
    assert {value.device.type for entry in optimizer.state.values() for value in entry.values()} == {"cpu", "meta"}


def test_weights_to_train_and_weights_to_evaluate():
    model, twin = Model(), Model()
    parts = [Part(surefoot.Muon, is_hidden, lr=0.02), Part(surefoot.AdamWScheduleFree, lr=0.01)]
    optimizer = Combined(model.named_parameters(), parts)
    named = dict(twin.named_parameters())
    muon = surefoot.Muon([(n, p) for n, p in named.items() if is_hidden(n, p)], lr=0.02)
    free = surefoot.AdamWScheduleFree([(n, p) for n, p in named.items() if not is_hidden(n, p)], lr=0.01)

    def train():
        for step in range(3):
            give_gradients(model, step), give_gradients(twin, step)
            for each in (optimizer, muon, free):
                each.step()

    train()
    with optimizer.eval_mode(), free.eval_mode():
        assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
        give_gradients(model, 0)
        with pytest.raises(RuntimeError, match="is in eval mode"):
            optimizer.step()
    train()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
    numbers = {name: number for number, name in enumerate(n for g in optimizer.param_groups for n in g["param_names"])}
    saved = optimizer.state_dict()["state"]
    assert "x" in saved[numbers["head.weight"]]
    assert "x" not in saved[numbers["wide.weight"]]
    other = Combined(Model(1).named_parameters(), parts)
    assert not other.load_state_dict(optimizer.state_dict())
    optimizer.eval()
    free.eval()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
    optimizer.train()


def test_full_precision_knows_each_groups_slots():
    model = Model().bfloat16()
    parts = [Part(surefoot.Muon, is_hidden, master_weight_bits=32), Part(surefoot.AdamW)]
    optimizer = Combined(model.named_parameters(), parts)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    hidden, head = model.wide.weight, model.head.weight
    assert surefoot.full_precision(optimizer, hidden).dtype is torch.float32
    assert surefoot.full_precision(optimizer, head, "exp_avg").dtype is torch.float32
    with pytest.raises(KeyError, match="has no slot 'exp_avg'; it has: momentum_buffer"):
        surefoot.full_precision(optimizer, hidden, "exp_avg")


# State dicts and checkpoints


def go_on(model, optimizer, first=70):
    for step in range(3):
        give_gradients(model, first + step)
        optimizer.step()


def test_a_state_dict_resumes_with_the_same_bits_whatever_the_order():
    model, optimizer, *_ = started("Adafactor, Muon, AdamW")
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["algorithm"] for group in saved["param_groups"]] == ["Adafactor", "Muon", "AdamW"]
    other = Model(5)
    other.load_state_dict(model.state_dict())
    parts = [Part(cls, select, **own) for cls, select, own in MIXES["Adafactor, Muon, AdamW"]]
    resumed = Combined(reversed(list(other.named_parameters())), parts)
    assert not resumed.load_state_dict(saved)
    go_on(model, optimizer), go_on(other, resumed)
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


def test_a_state_dict_of_other_algorithms_is_refused():
    optimizer = Combined(Model().named_parameters(), [Part(surefoot.Lion, is_hidden), Part(surefoot.AdamW)])
    other = combined(Model(), "Muon, AdamW")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"does not fit this Combined; nothing was loaded(.|\n)*Muon steps it"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"(?s)does not fit this Combined.*the state dict None does"):
        other.load_state_dict(surefoot.AdamW(Model().named_parameters()).state_dict())
    assert_same(snapshot(other), before)
    one = surefoot.AdamW(Model().named_parameters())
    with pytest.raises(ValueError, match="does not fit this AdamW"):
        one.load_state_dict(optimizer.state_dict())


def test_state_that_does_not_fit_is_refused_and_reported():
    _, optimizer, *_ = started()
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = {name: number for group in saved["param_groups"]
               for name, number in zip(group["param_names"], group["params"], strict=True)}  # fmt: skip
    saved["state"][numbers["wide.weight"]]["momentum_buffer"] = torch.zeros(2, 2)
    saved["state"][numbers["head.bias"]]["exp_avg"] = torch.zeros(2)
    other = combined(Model(), "Muon, AdamW")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"(?s)`wide.weight`: state `momentum_buffer`.*`head.bias`: state `exp_avg`"):
        other.load_state_dict(saved)
    assert_same(snapshot(other), before)
    report = other.load_state_dict(saved, strict=False)
    assert len(report.mismatched) == 2
    assert other.state[params_of(other)[0]]


@pytest.mark.parametrize("source", ["surefoot, named", "surefoot", "torch"])
def test_state_dicts_of_separate_optimizers_load(source):
    package = torch.optim if source == "torch" else surefoot
    model, twin = Model(), Model()
    named = [(name, param) for name, param in twin.named_parameters()]
    mine = [[(n, p) for n, p in named if is_hidden(n, p)], [(n, p) for n, p in named if not is_hidden(n, p)]]
    if source != "surefoot, named":
        mine = [[param for _, param in each] for each in mine]
    separate = [package.Muon(mine[0], lr=0.02), package.AdamW(mine[1], lr=0.01)]
    for step in range(3):
        give_gradients(twin, step)
        for each in separate:
            each.step()
    model.load_state_dict(twin.state_dict())
    optimizer = combined(model, "Muon, AdamW")
    report = optimizer.load_state_dicts({"AdamW": separate[1].state_dict(), "Muon": separate[0].state_dict()})
    assert not report
    assert_same(state_by_name(model, [optimizer]), state_by_name(twin, separate))
    for step in range(3):
        give_gradients(model, step), give_gradients(twin, step)
        for each in (optimizer, *separate):
            each.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-5, atol=1e-6)


def test_state_dicts_of_separate_optimizers_are_verified():
    model = Model()
    optimizer = combined(model, "Muon, AdamW")
    before = snapshot(optimizer)
    whole = surefoot.AdamW(model.named_parameters()).state_dict()
    with pytest.raises(ValueError, match="there is no algorithm 'SGD' here, only"):
        optimizer.load_state_dicts({"SGD": whole})
    with pytest.raises(ValueError, match="does not fit this Combined"):
        optimizer.load_state_dicts({"AdamW": whole})
    with pytest.raises(ValueError, match="not an optimizer's state dict"):
        optimizer.load_state_dicts({"AdamW": {}})
    assert_same(snapshot(optimizer), before)


def test_a_checkpoint_resumes_with_the_same_bits(tmp_path):
    model, optimizer, *_ = started("Adafactor, Muon, AdamW")
    surefoot.save(tmp_path / "last", model=model, optimizer=optimizer, step=4)
    other = Model(5)
    resumed = combined(other, "Adafactor, Muon, AdamW")
    surefoot.load(tmp_path / "last", model=other, optimizer=resumed)
    go_on(model, optimizer), go_on(other, resumed)
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_tools_for_state_dicts(flat):
    model, optimizer, *_ = started()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = get_optimizer_state_dict(model, optimizer, options=options)
    other = Model()
    other.load_state_dict(model.state_dict())
    resumed = combined(other, "Muon, AdamW")
    set_optimizer_state_dict(other, resumed, found, options=options)
    go_on(model, optimizer), go_on(other, resumed)
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


# Muon for a whole model


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm((2, width // 2))
        self.attention = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width, bias=False)
        self.embed = nn.Linear(width, width, bias=False)


class Gpt(nn.Module):
    def __init__(self, *, tied=False, width=4):
        super().__init__()
        self.wte = nn.Embedding(9, width)
        self.pos_embed = nn.Parameter(torch.zeros(5, width))
        self.cls_token, self.scales = nn.Parameter(torch.zeros(1, 2, width)), nn.Parameter(torch.ones(1, 1, width))
        self.value_head = nn.Linear(width, 3)
        self.adapter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 9, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


HIDDEN = [
    "adapter.weight",
    *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention", "output", "embed")),
]


def hidden(model, **options):
    select = surefoot.hidden_matrices(model, **options)
    return [name for name, param in model.named_parameters() if select(name, param)]


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_hidden_layers(tied):
    assert hidden(Gpt(tied=tied)) == HIDDEN
    assert hidden(nn.ModuleDict({"module": Gpt(tied=tied)})) == [f"module.{name}" for name in HIDDEN]


def test_the_output_layer_by_patterns():
    heads = ["value_head.weight", "lm_head.weight"]
    assert set(hidden(Gpt(), head="adapter.*")) == {*HIDDEN[1:], *heads}
    assert set(hidden(Gpt(), head=())) == {*HIDDEN, *heads}
    assert hidden(Gpt(), head=["adapter.*", "*_head.*"]) == HIDDEN[1:]
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="are the output layer's is not to be told by their names; say so: head="):
        hidden(mlp)
    assert hidden(mlp, head="2.*") == ["0.weight"]
    with pytest.raises(ValueError, match="`head`: no parameter of the Sequential is called '3"):
        hidden(mlp, head="3.*")
    with pytest.raises(TypeError, match="`model` must be"):
        surefoot.hidden_matrices([mlp])


def test_muon_for_a_model():
    torch.manual_seed(0)
    model = Gpt()
    model.blocks[1].output.requires_grad_(False)
    optimizer = surefoot.muon_with(
        model, 0.05, surefoot.Lion, 1e-3, rest_options={"weight_decay": 0.2}, momentum=0.9, max_grad_norm=1.0
    )
    muon, lion = optimizer.param_groups
    assert (muon["algorithm"], muon["lr"], muon["momentum"]) == ("Muon", 0.05, 0.9)
    assert (lion["algorithm"], lion["lr"], lion["weight_decay"]) == ("Lion", 1e-3, 0.2)
    assert muon["param_names"] == [name for name in HIDDEN if name != "blocks.1.output.weight"]
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {*muon["param_names"], *lion["param_names"]} == trainable
    assert optimizer.step_options.max_grad_norm == 1.0
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    optimizer.step()
    others = surefoot.muon_with(Gpt(), others=["adapter.*", re.compile("attention")]).param_groups[0]["param_names"]
    assert others == [name for name in HIDDEN if "adapter" not in name and "attention" not in name]


def test_what_muon_cannot_step_is_left_to_the_rest():
    model = nn.Sequential()
    model.stem, model.body, model.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)
    groups = surefoot.muon_with(model).param_groups
    assert groups[0]["param_names"] == ["body.weight"]
    flattened = surefoot.muon_with(model, flatten=True).param_groups
    assert flattened[0]["param_names"] == ["stem.weight", "body.weight"]


def test_a_model_without_hidden_matrices_is_refused():
    model = nn.Sequential()
    model.tokens, model.head = nn.Embedding(3, 2), nn.Linear(2, 3)
    with pytest.raises(ValueError, match="selects none of the parameters"):
        surefoot.muon_with(model)
