"""Options of the whole step: each must give what the sequence of torch's calls gives that it replaces."""

import copy
import itertools
import math
import os
import signal
import sys
import threading
import warnings

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import surefoot
from conformance import ROWS, STEADY, STEPS, assert_close, gradients, groups, normals, results, unclipped, zoo
from helpers import Noted, assert_same, make_params, set_grads, snapshot, train
from surefoot.errors import NonFiniteGradientError, NotRestoredError
from surefoot.optimizers.lbfgs import LBFGS
from surefoot.telemetry import JsonLines, Telemetry, read

OPTIONS = {
    "norm": {"max_grad_norm": 3.0},
    "value": {"max_grad_value": 0.5},
    "skip": {"nonfinite": "skip"},
    "ema": {"ema": 0.8},
    "zero": {"zero_grad_after_step": True},
}
PAIRS = [{**OPTIONS[a], **OPTIONS[b]} for a, b in itertools.combinations(OPTIONS, 2)]
ALL = {name: value for option in OPTIONS.values() for name, value in option.items()}
STRANGE_STEP = STEADY
DENSE = [
    row
    for row in ROWS
    if row.ours.supported_step_options() > {"ema"} and row.ours.sparse is not surefoot.rule.Sparse.ONLY
]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-13}


def gradients_of(params, step, dtype):
    found = gradients(params, step, dtype)
    if step == STRANGE_STEP:
        found["matrix"] = found["matrix"].clone().fill_(math.nan)
    return found


def by_torchs_calls(row, params, dtype, options):
    """Train with the plain optimizer and what surrounds it in a training loop; give results and averages."""
    optimizer = row.build(groups(params), unclipped(row), row.engines(["eager"])[0])
    averages = {}
    for step in range(STEPS):
        for name, grad in gradients_of(params, step, dtype).items():
            params[name].grad = grad if grad is None else grad.clone()
        held = {name: param for name, param in params.items() if param.grad is not None}
        if options.get("nonfinite") == "skip" and not all(p.grad.isfinite().all() for p in held.values()):
            continue
        if "max_grad_norm" in options:
            clip_grad_norm_(params.values(), options["max_grad_norm"], foreach=False)
        if "max_grad_value" in options:
            clip_grad_value_(params.values(), options["max_grad_value"])
        optimizer.step()
        if "ema" in options:
            for name, param in held.items():
                new = param.detach()
                averages[name] = (
                    torch.lerp(averages[name], new, 1 - options["ema"]) if name in averages else new.clone()
                )
    return results(optimizer, params) | {f"ema of {name}": average for name, average in averages.items()}


def by_options(row, params, dtype, options, engine):
    # Without names these would be searched for in all objects of the process.
    optimizer = row.build(groups(params, named=True), unclipped(row) | options, engine)
    for step in range(STEPS):
        for name, grad in gradients_of(params, step, dtype).items():
            params[name].grad = grad
        before = {name: grad.clone() for name, param in params.items() if (grad := param.grad) is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        cleared = options.get("zero_grad_after_step")
        assert all((param.grad is None) == (cleared or name not in before) for name, param in params.items())
        assert cleared or all(torch.equal(params[n].grad.nan_to_num(), grad.nan_to_num()) for n, grad in before.items())
    return results(optimizer, params)


def cases(row):
    """Return sets of options, each with the engines that are tried with it.

    All at once are tried with every engine, pairs with one in turn: every pair for an algorithm of the pipeline and one
    with a step of its own, which are tried with each option by itself too, and one for the others.
    """
    engines, turn = row.engines(["eager", "foreach", "cpu"]), DENSE.index(row)
    pairs = [(pair, [engines[(turn + number) % len(engines)]]) for number, pair in enumerate(PAIRS)]
    if row.name in ("AdamW", "Muon"):
        return [*((options, engines) for options in (*OPTIONS.values(), ALL)), *pairs]
    return [(ALL, engines), pairs[turn % len(pairs)]]


@pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)
def test_options_equal_the_calls_they_replace(row):
    if row.name == "SOAP":
        pytest.skip("where gradients lack rank its bases hang on their last bits; see optimizers/test_soap.py")
    for options, engines in cases(row):
        expected = by_torchs_calls(row, zoo(torch.float64, row.admits), torch.float64, options)
        for engine in engines:
            actual = by_options(row, zoo(torch.float64, row.admits), torch.float64, options, engine)
            assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("engine", ["eager", "foreach", "cpu"])
def test_complex_and_16_bit_parameters(engine):
    row = next(row for row in ROWS if row.name == "AdamW")
    for dtype, tolerance in ((torch.complex128, TOLERANCE), (torch.bfloat16, {"rtol": 0.05, "atol": 0.02})):
        expected = by_torchs_calls(row, zoo(dtype), dtype, ALL if not dtype.is_complex else OPTIONS["norm"])
        options = ALL if not dtype.is_complex else OPTIONS["norm"]
        actual = by_options(row, zoo(dtype), dtype, options, engine)
        wide = {name: value.to(expected[name].dtype) for name, value in actual.items()}
        assert_close(wide, expected, **tolerance)


def test_an_infinite_limit_limits_nothing():
    (optimizer, params), (plain, others) = make(max_grad_norm=math.inf, max_grad_value=math.inf), make()
    for each in (params, others):
        set_gradients(each)
    optimizer.step()
    plain.step()
    assert_same(params, others)


def test_averages_of_16_bit_parameters_are_kept_in_float32():
    param = torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    optimizer = surefoot.SGD([param], lr=0.5, ema=0.999)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    average = optimizer.state[param]["ema"]
    assert average.dtype is torch.float32
    torch.testing.assert_close(average, torch.full((4,), 0.5 - 0.001 * 0.5 * 0.999 - 0.001 * 1.0))


def make(sizes=(3, 40_000), cls=surefoot.AdamW, dtype=torch.float32, **options):
    normal = normals(dtype, seed=0)
    params = [normal(size).requires_grad_() for size in sizes]
    return cls(params, **options), params


def set_gradients(params, seed=1):
    normal = normals(params[0].dtype, seed=seed)
    for param in params:
        param.grad = normal(*param.shape)


# Clipping


def test_a_group_may_be_clipped_by_itself():
    normal = normals(torch.float64, seed=0)
    params = [normal(5).requires_grad_() for _ in range(4)]
    set_gradients(params)
    optimizer = surefoot.SGD(
        [
            {"params": params[:2], "max_grad_norm": 0.1},
            {"params": params[2:3]},
            {"params": params[3:], "max_grad_value": 0.2},
        ],
        lr=1.0,
        max_grad_norm=0.5,
    )
    before = [param.detach().clone() for param in params]
    optimizer.step()
    change = [then - param.detach() for then, param in zip(before, params, strict=True)]
    assert torch.cat(change[:2]).norm().item() == pytest.approx(0.1, rel=1e-5)
    factor = 0.5 / (torch.cat([param.grad for param in params[2:]]).norm() + 1e-6)
    torch.testing.assert_close(change[2], params[2].grad * factor)
    torch.testing.assert_close(change[3], (params[3].grad * factor).clamp(-0.2, 0.2))


def test_small_gradients_are_not_scaled():
    optimizer, params = make(cls=surefoot.SGD, lr=1.0, max_grad_norm=1e6)
    plain, expected = make(cls=surefoot.SGD, lr=1.0)
    for each in (params, expected):
        set_gradients(each)
    optimizer.step()
    plain.step()
    assert all(map(torch.equal, params, expected))


def test_norms_are_the_same_for_any_number_of_threads():
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizer, params = make(sizes=(1, 100_003, 7), max_grad_norm=0.5, ema=0.9)
            for step in range(3):
                set_gradients(params, step)
                optimizer.step()
            found.append([*params, *(optimizer.state[param]["ema"] for param in params)])
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_a_norm_beyond_float32_is_right():
    optimizer, params = make(cls=surefoot.SGD, lr=1.0, max_grad_norm=1.0)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.full_like(param, 1e30)
    optimizer.step()
    change = torch.cat([then - param.detach() for then, param in zip(before, params, strict=True)])
    assert change.norm().item() == pytest.approx(1.0, rel=1e-3)


def test_the_scale_of_a_grad_scaler_is_taken_out_before_clipping():
    scaled, params = make(cls=surefoot.SGD, lr=1.0, fused=True, max_grad_norm=0.5, max_grad_value=0.01)
    plain, expected = make(cls=surefoot.SGD, lr=1.0, max_grad_norm=0.5, max_grad_value=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for each in (params, expected):
        set_gradients(each)
    for param in params:
        param.grad.mul_(scaler.scale(torch.tensor(1.0)))
    scaler.step(scaled)
    plain.step()
    assert_close(dict(enumerate(params)), dict(enumerate(expected)), rtol=1e-5, atol=1e-7)


def test_sparse_gradients_are_clipped_and_averaged():
    indices, values = torch.tensor([[0, 3, 3]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    for cls in (surefoot.SGD, surefoot.Adagrad, surefoot.SparseAdam):
        found = []
        for whole in (True, False):
            table = torch.arange(10.0, dtype=torch.float64).view(5, 2).requires_grad_()
            optimizer = cls([table], lr=0.1, **({"max_grad_norm": 1.0, "ema": 0.9} if whole else {}))
            average = None
            for _ in range(3):
                gradient = torch.sparse_coo_tensor(indices, values, (5, 2)).coalesce()
                factor = 1.0 if whole else 1.0 / (gradient.values().norm() + 1e-6)
                table.grad = gradient * factor
                optimizer.step()
                now = table.detach().clone()
                average = now if average is None else torch.lerp(average, now, 1 - 0.9)
            found.append([table.detach(), optimizer.state[table]["ema"] if whole else average])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)


# Guarding


@pytest.mark.parametrize("engine", ["eager", "foreach", "cpu"])
def test_raising_names_the_parameters_and_changes_nothing(engine):
    options = {"eager": {"foreach": False}, "foreach": {"foreach": True}, "cpu": {"fused": True}}[engine]
    params = {"layer.weight": torch.ones(3).requires_grad_(), "layer.bias": torch.ones(2).requires_grad_()}
    optimizer = surefoot.AdamW(params.items(), nonfinite="raise", ema=0.9, **options)
    for param in params.values():
        param.grad = torch.ones_like(param)
    params["layer.bias"].grad[1] = math.inf
    for _ in range(2):
        with pytest.raises(NonFiniteGradientError, match=r"the gradients of `layer.bias` hold inf or NaN; nothing was"):
            optimizer.step()
        assert not optimizer.state
        assert all(torch.equal(param, torch.ones_like(param)) for param in params.values())
    params["layer.bias"].grad[1] = 1.0
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    params["layer.weight"].grad[0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"`layer.weight`"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_skipping_is_counted_and_never_silent():
    optimizer, params = make(nonfinite="skip")
    warned = []
    for step in range(1, 70):
        set_gradients(params)
        if step > 2:
            params[0].grad[0] = math.nan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        warned += [(step, str(warning.message), warning.filename) for warning in caught]
    assert [step for step, *_ in warned] == [3, 18, 34, 66]
    assert warned[0][1].startswith(
        "step 3 was skipped since the gradients of `params[0]` hold inf or NaN; 1 of 3 steps"
    )
    assert all(filename == __file__ for *_, filename in warned)
    assert (optimizer.step_statistics.steps, optimizer.step_statistics.skipped) == (69, 67)
    assert optimizer.state[params[0]]["step"] == 2


def test_the_warning_of_a_skipped_step_is_about_the_line_that_steps():
    optimizer, params = make(nonfinite="skip")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps `step`
    set_gradients(params)
    params[0].grad[:] = math.nan
    with pytest.warns(RuntimeWarning, match="step 1 was skipped") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_the_first_step_may_be_skipped():
    optimizer, params = make(cls=surefoot.SGD, momentum=0.9, nonfinite="skip", ema=0.9)
    set_gradients(params)
    params[1].grad[7] = -math.inf
    with pytest.warns(RuntimeWarning, match="1 of 1 steps were skipped"):
        optimizer.step()
    assert not optimizer.state
    set_gradients(params)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[0]]["momentum_buffer"], params[0].grad, rtol=0, atol=0)
    assert torch.equal(optimizer.state[params[0]]["ema"], params[0])


# Averaging


def test_ema_parameters_are_swapped_in_and_out():
    optimizer, params = make(ema=0.5)
    with (
        pytest.raises(RuntimeError, match="there are no averages of parameters: pass `ema=0.999`"),
        optimizer.ema_parameters(),
    ):
        pass
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    with optimizer.ema_parameters():
        assert all(torch.equal(param, optimizer.state[param]["ema"]) for param in params)
        assert not torch.equal(params[0], before[0])
    assert all(map(torch.equal, params, before))
    with pytest.raises(KeyError), optimizer.ema_parameters():
        raise KeyError
    assert all(map(torch.equal, params, before))


def averaged():
    """Make an optimizer of named parameters with averages; give it, its parameters and what they are."""
    params = {name: torch.randn(4).requires_grad_() for name in "abc"}
    optimizer = surefoot.SGD(params.items(), lr=0.1, ema=0.5)
    for step in range(2):
        set_gradients([*params.values()], step)
        optimizer.step()
    return optimizer, [*params.values()], [param.detach().clone() for param in params.values()]


@pytest.mark.parametrize("shape", [(2,), (1, 4), (3, 4), (0,)], ids=str)
def test_parameters_of_another_shape_are_put_back(shape):
    optimizer, params, before = averaged()
    averages = [optimizer.state[param]["ema"].clone() for param in params]
    with optimizer.ema_parameters():
        params[0].data = torch.ones(shape)
        params[1].data = params[1].data.double()
    assert all(map(torch.equal, params, before))
    assert all(torch.equal(optimizer.state[param]["ema"], old) for param, old in zip(params, averages, strict=True))


def test_all_parameters_that_can_be_are_put_back_and_the_others_named():
    optimizer, params, before = averaged()
    averages = [optimizer.state[param]["ema"].clone() for param in params]

    def break_two():
        for param in params[:2]:
            torch.utils.swap_tensors(param, torch.empty(4, device="meta").requires_grad_())
        raise KeyError

    with (
        pytest.raises(NotRestoredError, match="`a`, `b` could not be put back, .* all others were.") as caught,
        optimizer.ema_parameters(),
    ):
        break_two()
    assert isinstance(caught.value.__context__, KeyError)
    (a, value_of_a), (b, value_of_b) = caught.value.values
    assert a is params[0]
    assert b is params[1]
    assert_same([value_of_a, value_of_b, params[2].detach()], before)
    assert_same([optimizer.state[param]["ema"] for param in params], averages)


def test_an_average_of_another_shape_is_not_swapped_in():
    optimizer, params, before = averaged()
    params[1].data = torch.ones(2, 4)
    with (
        pytest.raises(RuntimeError, match="the averages of `b` have another shape than the parameters have now"),
        optimizer.ema_parameters(),
    ):
        pass
    assert torch.equal(params[0], before[0])
    assert params[1].tolist() == torch.ones(2, 4).tolist()


def test_averages_are_saved_and_go_on():
    optimizer, params = make(ema=0.9)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    resumed, copies = make(ema=0.9)
    for copied, param in zip(copies, params, strict=True):
        copied.data.copy_(param.detach())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((optimizer, params), (resumed, copies)):
        set_gradients(its, 2)
        each.step()
    assert all(
        torch.equal(optimizer.state[p]["ema"], resumed.state[q]["ema"]) for p, q in zip(params, copies, strict=True)
    )
    torchs = torch.optim.AdamW(copies)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(copies)
    torchs.step()


def test_an_average_that_begins_later_starts_with_the_stepped_weights():
    optimizer, params = make(cls=surefoot.SGD, momentum=0.9)
    plain, expected = make(cls=surefoot.SGD, momentum=0.9)
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0]["ema"] = 0.9
        for each, its in ((optimizer, params), (plain, expected)):
            set_gradients(its, step)
            each.step()
        if step == 2:
            assert all(torch.equal(optimizer.state[param]["ema"], param) for param in params)
    assert all(map(torch.equal, params, expected))


# Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": 0}, ValueError, "`max_grad_norm` must be a number > 0, or None, but is: 0"),
        ({"max_grad_norm": "1"}, TypeError, "`max_grad_norm` must be a number"),
        ({"max_grad_norm": True}, TypeError, "`max_grad_norm` must be a number > 0, or None, but is: True"),
        ({"max_grad_norm": torch.tensor(True)}, TypeError, "`max_grad_norm` must be a number > 0, or None"),
        ({"max_grad_value": True}, TypeError, "`max_grad_value` must be a number > 0, or None, but is: True"),
        ({"max_grad_value": -1.0}, ValueError, "`max_grad_value` must be a number > 0, or None, but is: -1.0"),
        ({"ema": 1.0}, ValueError, "`ema` must be a decay > 0 and < 1, or None, but is: 1.0"),
        ({"ema": 0}, ValueError, "`ema` must be a decay > 0 and < 1, or None, but is: 0"),
        ({"nonfinite": "warn"}, ValueError, "`nonfinite` must be one of 'ignore', 'skip', 'raise', but is 'warn'"),
        ({"zero_grad_after_step": 1}, TypeError, "`zero_grad_after_step` must be True or False, but is 1"),
        (
            {"max_norm": 1.0},
            TypeError,
            r"AdamW\(\) got an unexpected keyword argument 'max_norm'; there are: lr, betas",
        ),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("max_grad_norm", -1, ValueError, "`max_grad_norm` must be a number > 0, or None, but is: -1"),
        ("max_grad_value", "x", TypeError, "`max_grad_value` must be a number, but got 'x'"),
        ("ema", 2.0, ValueError, "`ema` must be a decay > 0 and < 1, or None, but is: 2.0"),
        ("nonfinite", "skip", ValueError, "`nonfinite` is an option of .*, not of a param group; give it to"),
    ],
)
def test_options_of_groups_that_are_changed_later_are_checked(cls, name, value, error, message):
    params = make_params()
    optimizer = cls(params, ema=0.9)
    set_gradients(params)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step()
    optimizer.param_groups[0].pop(name)
    if name == "ema":
        optimizer.param_groups[0]["ema"] = 0.9
    assert_same(snapshot(optimizer), before)
    assert optimizer.step_statistics.steps == 1
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("max_grad_norm", float("nan"), ValueError, "`max_grad_norm` must be a number > 0, or None, but is: nan"),
        ("nonfinite", "warn", ValueError, "`nonfinite` must be one of 'ignore', 'skip', 'raise', but is 'warn'"),
        ("zero_grad_after_step", 1, TypeError, "`zero_grad_after_step` must be True or False, but is 1"),
        ("telemetry", "yes", TypeError, "`telemetry` must be True, False, None or a surefoot.telemetry.Telemetry"),
    ],
)
def test_options_of_the_optimizer_that_are_changed_later_are_checked(name, value, error, message):
    optimizer, params = make()
    set_gradients(params)
    before = snapshot(optimizer)
    setattr(optimizer.step_options, name, value)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
@pytest.mark.parametrize("steps", [0, 4])
def test_options_that_a_closure_changes_are_checked(cls, steps):
    optimizer = train(cls([torch.nn.Parameter(torch.ones(3, 2))]), steps=steps)
    set_grads(optimizer, 9)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="`max_grad_norm` must be a number > 0, or None, but is: -1"):
        optimizer.step(lambda: setattr(optimizer.step_options, "max_grad_norm", -1))
    assert_same(snapshot(optimizer), before)


def test_a_closure_may_end_telemetry():
    telemetry = Noted()
    optimizer = train(surefoot.AdamW([torch.nn.Parameter(torch.ones(3, 2))], telemetry=telemetry))
    optimizer.step(lambda: setattr(optimizer.step_options, "telemetry", None))
    optimizer.step(lambda: setattr(optimizer.step_options, "telemetry", telemetry))
    train(optimizer, steps=1)
    assert [raw.step for raw in telemetry.raw] == [1, 2, 3, 6]


def test_options_may_be_changed_later():
    optimizer, params = make()
    set_gradients(params)
    optimizer.step()
    optimizer.step_options.telemetry = True
    optimizer.param_groups[0]["max_grad_norm"] = 1e-3
    optimizer.step()
    assert optimizer.telemetry.latest().clip < 1
    lbfgs = LBFGS([torch.ones(2).requires_grad_()])
    lbfgs.step_options.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="LBFGS takes no `max_grad_norm`: it has a custom step"):
        lbfgs.step(lambda: torch.tensor(1.0))


def test_learning_rates_that_are_changed_later_are_used_as_in_torch():
    ours, theirs = (lib.SGD([torch.ones(2).requires_grad_()], lr=0.5) for lib in (surefoot, torch.optim))
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.param_groups[0]["lr"] = -1.0
        optimizer.step()
        assert optimizer.param_groups[0]["params"][0].tolist() == [2.0, 2.0]
        optimizer.param_groups[0]["lr"] = "abc"
        with pytest.raises(TypeError):
            optimizer.step()


def test_a_group_is_checked_before_it_is_added():
    optimizer, _ = make()
    with pytest.raises(ValueError, match="`ema` must be a decay > 0 and < 1"):
        optimizer.add_param_group({"params": [torch.ones(2)], "ema": 2.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["max_grad_norm", "max_grad_value", "ema"])
def test_lbfgs_takes_only_what_it_can_do(option):
    with pytest.raises(
        ValueError, match=f"LBFGS takes no `{option}`: it has a custom step; do that in the training loop"
    ):
        LBFGS([torch.ones(2)], **{option: 0.5})
    param = torch.ones(2).requires_grad_()
    optimizer = LBFGS([param], zero_grad_after_step=True)

    def closure():
        param.grad = param.detach().clone()
        return (param.detach() ** 2).sum() / 2

    optimizer.step(closure)
    assert param.grad is None


def test_state_dicts_have_no_options_that_were_not_asked_for():
    optimizer, _ = make(ema=None, max_grad_value=None, max_grad_norm=1.0)
    assert not {"ema", "max_grad_value", "max_grad_norm", "nonfinite"} & set(optimizer.param_groups[0])


def test_options_are_copied_and_pickled():
    optimizer, params = make(max_grad_norm=0.5, nonfinite="skip")
    again = copy.deepcopy(optimizer)
    assert (again.step_options.max_grad_norm, again.step_options.nonfinite) == (0.5, "skip")
    assert again.step_options is not optimizer.step_options
    set_gradients(params)
    optimizer.step()
    assert again.step_statistics.steps == 0


# Found by trying to break it


def test_a_skipped_step_does_not_hide_what_has_changed():
    param = torch.zeros(4).requires_grad_()
    optimizer = surefoot.SGD([param], lr=1.0, nonfinite="skip")
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
    param.data = torch.full((4,), 10.0)
    param.grad = torch.full((4,), math.nan)
    with pytest.warns(RuntimeWarning, match="was skipped"):
        optimizer.step()
    param.grad = torch.ones(4)
    optimizer.step()
    assert param.tolist() == [9.0] * 4


def test_a_skipped_step_does_not_hide_strides():
    param = torch.zeros(4, 4).requires_grad_()
    optimizer = surefoot.SGD([param], lr=1.0, nonfinite="skip")
    for value in (1.0, 1.0, math.nan, 1.0):
        param.grad = (
            torch.full((4, 4), value) if optimizer.step_statistics.steps < 2 else torch.full((1,), value).expand(4, 4)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
    assert torch.equal(param, torch.full((4, 4), -3.0))


def trained_after_an_overflow(*, zero_grad=False, **options):
    """Train with a GradScaler, of whose steps the third overflows; give optimizer and scaler."""
    model = torch.nn.Linear(2, 1)
    optimizer = surefoot.SGD(model.parameters(), lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(6):
        loss = model(torch.ones(3, 2)).sum() * (math.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if zero_grad:
            optimizer.zero_grad()
    assert all(param.isfinite().all() for param in model.parameters())
    return optimizer, scaler


def test_a_grad_scaler_goes_on_after_an_overflow():
    optimizer, scaler = trained_after_an_overflow(zero_grad_after_step=True, fused=True)
    assert scaler.get_scale() == 2.0**15
    assert (optimizer.step_statistics.steps, optimizer.step_statistics.skipped) == (6, 1)


def test_a_grad_scaler_calls_no_skipped_step_unless_fused():
    with pytest.warns(RuntimeWarning, match="`zero_grad_after_step` does nothing in steps that a GradScaler skips"):
        optimizer, scaler = trained_after_an_overflow(zero_grad_after_step=True, zero_grad=True)
    assert scaler.get_scale() == 2.0**15
    assert (optimizer.step_statistics.steps, optimizer.step_statistics.skipped) == (5, 0)


class Own(surefoot.Optimizer):
    """A rule whose names are those of the step's own numbers."""

    def __init__(self, params, lr=1.0, clip=0.5, ema_weight=2.0, **options):
        super().__init__(params, {"lr": lr, "clip": clip, "ema_weight": ema_weight, **options})

    @staticmethod
    def update(param, grad, c, flags):
        return (param - c.lr * c.clip * c.ema_weight * grad,)


def test_a_rule_may_call_its_numbers_as_it_likes():
    param = torch.zeros(2).requires_grad_()
    param.grad = torch.tensor([3.0, 4.0])
    optimizer = Own([param], max_grad_norm=0.1, ema=0.5)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.06, -0.08]), rtol=1e-4, atol=0)
    assert torch.equal(optimizer.state[param]["ema"], param)


def test_a_slot_may_be_called_ema_where_no_average_is_kept():
    class Slotted(surefoot.Optimizer):
        slots = (surefoot.Slot("ema"),)

        def __init__(self, params, **options):
            super().__init__(params, {"lr": 1.0, **options})

        @staticmethod
        def update(param, grad, ema, c, flags):
            return param - c.lr * grad, ema + grad

    param = torch.zeros(2).requires_grad_()
    param.grad = torch.ones(2)
    optimizer = Slotted([param])
    optimizer.step()
    assert optimizer.state[param]["ema"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="Slotted has a slot `ema` of its own"):
        Slotted([param], ema=0.9)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (
            surefoot.SGD,
            {"nonfinite": "skip"},
            "`nonfinite` is an option of SGD, not of a param group; give it",
        ),
        (surefoot.SGD, {"zero_grad_after_step": True}, "`zero_grad_after_step` is an option of SGD"),
        (LBFGS, {"max_grad_norm": 0.1}, "LBFGS takes no `max_grad_norm`: it has a custom step"),
    ],
)
def test_options_that_a_group_cannot_have(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([{"params": [torch.ones(2)], **options}])


# Threads


def from_threads(optimizer, steps, threads=4):
    """Step an optimizer from several threads at once; give what they have raised."""
    ready, errors = threading.Barrier(threads), []

    def work():
        ready.wait()
        for _ in range(steps):
            try:
                optimizer.step()
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return errors


@pytest.fixture
def frequent_switches():
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
def test_threads_that_step_one_optimizer_take_turns(tmp_path, cls):
    options = {"max_grad_norm": 1.0, "ema": 0.9, "nonfinite": "skip"}
    telemetry = Telemetry(sinks=JsonLines(tmp_path / "run.jsonl", flush_every=3), history=1000)
    found = []
    for threads in (1, 4):
        params = make_params()
        optimizer = cls(params, lr=0.01, telemetry=telemetry if threads == 4 else None, **options)
        set_gradients(params)
        hooked = []
        optimizer.register_step_post_hook(lambda *_, hooked=hooked: hooked.append(None))
        assert from_threads(optimizer, 80 // threads, threads) == []
        assert len(hooked) == optimizer.step_statistics.steps == 80
        found.append([[param, *optimizer.state[param].values()] for param in params])
    assert_same(*found)
    telemetry.close()
    assert sorted(record.step for record in telemetry.history) == list(range(1, 81))
    assert sorted(line.step for line in read(tmp_path / "run.jsonl")) == list(range(1, 81))


def test_closures_of_several_threads_may_wait_for_one_another():
    optimizer, params = make(max_grad_norm=1.0)
    meet = threading.Barrier(2, timeout=60)

    def closure():
        meet.wait()
        set_gradients(params)

    workers = [threading.Thread(target=optimizer.step, args=(closure,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert optimizer.state[params[0]]["step"] == 2


def test_a_step_that_raises_lets_others_step():
    optimizer, params = make(nonfinite="raise")
    set_gradients(params)
    params[0].grad[:] = float("nan")
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    set_gradients(params)
    assert from_threads(optimizer, 1, 2) == []
    assert optimizer.state[params[0]]["step"] == 2


def test_a_child_that_is_forked_during_another_threads_step_steps():
    """The thread that holds the lock is not there to give it back."""
    param = torch.zeros(3, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    lock, held, done = optimizer._stepping.context.lock, threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        optimizer.step()
        os._exit(0 if param.tolist() == [-1.0] * 3 else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
