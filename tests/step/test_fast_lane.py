"""The fast lane takes the steps in which nothing has changed, and no others."""

import collections
import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.autograd.profiler import profile

import surefoot
from helpers import set_grads, train
from surefoot import optimizer as optimizer_module
from surefoot.engines.cpu import copied, sparse
from surefoot.step import pipeline
from surefoot.step.partition import partition
from surefoot.step.pipeline import run_step
from surefoot.telemetry import Telemetry


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def started(cls=surefoot.AdamW, sizes=(5, 3), count=5, **options):
    """An optimizer that has taken the fast lane already, with gradients for the next step."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    optimizer = train(cls(params, **options), steps=count)
    assert options.get("foreach") or not optimizer.is_rule() or optimizer._step_cache.fast
    set_grads(optimizer, 77)
    return optimizer, params


def takes_fast_lane(optimizer):
    """Step, and tell whether the fast lane has done it."""
    lane, made = optimizer._step_cache.fast, []
    run = lane.run
    lane.run = lambda *args: made.append(run(*args)) or made[-1]
    optimizer.step()
    del lane.run
    return made == [True]


def test_a_step_like_the_one_before_takes_it():
    optimizer, _ = started()
    assert takes_fast_lane(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler does
    set_grads(optimizer, 78)
    assert takes_fast_lane(optimizer)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
@pytest.mark.parametrize("way", ["closure", "hooks", "profiler", "subclass", "zero_grad"])
def test_steps_with_closures_hooks_and_profilers_take_it(cls, way, monkeypatch):
    class Subclass(cls):
        def step(self, closure=None):
            return super().step(closure)

    optimizer, params = started(
        Subclass if way == "subclass" else cls, sizes=[(3, 2)], lr=0.1, zero_grad_after_step=way == "zero_grad"
    )
    plain, copies = started(cls, sizes=[(3, 2)], lr=0.1)
    seen, count = [], optimizer.step_statistics.steps
    if way == "hooks":
        optimizer.register_step_pre_hook(lambda one, *_: one.param_groups[0].update(lr=0.5))
        optimizer.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone()))
        plain.param_groups[0]["lr"] = 0.5
    set_grads(plain, 5)
    plain.step()
    with monkeypatch.context() as patched, profile() if way == "profiler" else contextlib.nullcontext():
        patched.setattr(optimizer_module, "run_step", None)
        set_grads(optimizer, 6 if way == "closure" else 5)
        result = optimizer.step((lambda: set_grads(optimizer, 5) or 3.0) if way == "closure" else None)
    assert result == (3.0 if way == "closure" else None)
    assert torch.equal(params[0], copies[0])
    assert optimizer.step_statistics.steps == count + 1
    if way == "hooks":
        assert torch.equal(seen[0], params[0])
    assert (params[0].grad is None) == (way == "zero_grad")
    set_grads(optimizer, 5)
    optimizer.step_options.max_grad_norm = 1e-3
    optimizer.step()
    assert torch.norm(params[0] - copies[0]) > 0
    assert optimizer.step_statistics.steps == count + 2


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Muon", "Adafactor"])
def test_schedules_of_one_group_change_its_numbers_only_and_take_it(name, monkeypatch):
    results = []
    for module in (surefoot, torch.optim):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 5)]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
        optimizer = train(getattr(module, name)(groups, lr=0.1), steps=4)
        for step in range(6):
            optimizer.param_groups[1]["lr"] = 0.1 / (step + 2)
            if name == "AdamW":
                optimizer.param_groups[0]["betas"] = (0.9 - step / 10, 0.99)
            set_grads(optimizer, step)
            with monkeypatch.context() as patched:
                patched.setattr(optimizer_module, "run_step", None)
                optimizer.step()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["weight_decay"] = 0.0
        train(optimizer, steps=2)
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Lion"])
def test_numbers_in_tensors_take_it_with_the_bits_of_the_pipeline(name, monkeypatch):
    results = []
    for telemetry in (False, True):  # what is measured goes through the pipeline
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 5)]
        decay = torch.tensor(0.1, dtype=torch.float64)
        groups = [{"params": params[:2], "weight_decay": decay}, {"params": params[2:], "lr": torch.tensor(0.2)}]
        optimizer = train(getattr(surefoot, name)(groups, lr=torch.tensor(0.1), telemetry=telemetry), steps=3)
        for step in range(6):
            optimizer.param_groups[step % 2]["lr"].fill_(0.0 if step == 3 else 0.1 / (step + 2))
            decay.data = torch.tensor(0.1 / (step + 1), dtype=torch.float64)
            set_grads(optimizer, step)
            with monkeypatch.context() as patched:
                if not telemetry:
                    patched.setattr(optimizer_module, "run_step", None)
                optimizer.step()
        decay.zero_()  # which is another update
        train(optimizer, steps=3)
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert one.detach().view(torch.int32).equal(other.detach().view(torch.int32))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Muon", "Adafactor"])
def test_what_a_schedule_has_replaced_may_become_anything(name):
    results = []
    for module in (surefoot, torch.optim):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 3)]
        optimizer = getattr(module, name)([{"params": [param]} for param in params], lr=0.1)
        rates = (0.1, 0.1, 0.1, 0.2, 0.3, torch.tensor(0.05), 0.4, 0.3, 0.0, 0.1, 0.2, np.float64(0.1), 0.2, 0.2)
        for step, rate in enumerate(rates):
            optimizer.param_groups[1]["lr"] = rate
            if step == 7:
                optimizer.param_groups[1]["weight_decay"] = 0.3
            if step == 10:
                optimizer.param_groups[0] = optimizer.param_groups[1]
            set_grads(optimizer, step)
            optimizer.step()
        del optimizer.param_groups[1]["lr"]
        with pytest.raises((KeyError, AttributeError)):
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


def clipped(name, params, own, **options):
    """An optimizer of two groups, of which the second may have a limit of its own."""
    options |= {"max_grad_norm": 0.5}
    others = {} if own is None else {"max_grad_norm": own}
    if name != "Combined":
        groups = [{"params": params[:2]}, {"params": params[2:], **others}]
        return getattr(surefoot, name)(groups, lr=0.1, **options)
    named = [(str(number), param) for number, param in enumerate(params)]
    parts = [surefoot.Part(surefoot.Muon, ["0", "1"], lr=0.1), surefoot.Part(surefoot.AdamW, lr=0.1, **others)]
    return surefoot.Combined(named, parts, **options)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "Muon", "Adafactor", "Combined"])
@pytest.mark.parametrize("own", [None, 0.01])
def test_clipped_steps_take_it_with_the_bits_of_the_pipeline(own, name, monkeypatch):
    results = []
    for telemetry in (False, True):  # what is measured goes through the pipeline
        shapes = [(700, 100) if i == 3 else (3, i) for i in range(1, 5)]
        params = [torch.nn.Parameter(torch.linspace(-1, 1, a * b).view(a, b)) for a, b in shapes]
        optimizer = clipped(name, params, own, telemetry=telemetry)
        train(optimizer, steps=3)
        for step in range(8):
            if step == 4:
                optimizer.step_options.max_grad_norm = 0.3
            set_grads(optimizer, step)
            if step in (5, 6):
                params[step - 5].grad *= torch.inf if step == 5 else 0
            with monkeypatch.context() as patched:
                if not telemetry:
                    patched.setattr(optimizer_module, "run_step", None)
                optimizer.step()
        optimizer.step_options.max_grad_norm = None
        train(optimizer, steps=3)
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert one.detach().view(torch.int32).equal(other.detach().view(torch.int32))


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
@pytest.mark.parametrize(
    "options",
    [{"max_grad_value": 0.5}, {"gradient_centralization": True}, {"maximize": True}, {"max_grad_norm": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_steps_with_other_gradients_take_it_with_the_bits_of_the_pipeline(dtype, options, name, monkeypatch):
    if (name, *options) == ("Muon", "maximize"):
        pytest.skip("Muon has no maximize")
    results = []
    for telemetry in (False, True):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 12).view(3, 4).to(dtype)) for i in range(1, 4)]
        optimizer = getattr(surefoot, name)(params, lr=0.1, telemetry=telemetry, **options)
        train(optimizer, steps=3)
        with monkeypatch.context() as patched:
            if not telemetry:
                patched.setattr(optimizer_module, "run_step", None)
            train(optimizer, first=3, steps=3)
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert one.detach().view(torch.int16).equal(other.detach().view(torch.int16))


@pytest.mark.parametrize("name", ["SGD", "Muon"])
def test_the_norm_of_enormous_gradients_is_infinite(name):
    params = [torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(2)]
    optimizer = getattr(surefoot, name)(params, lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    for _ in range(4):
        for param in params:
            param.grad = torch.full_like(param, 6e153)  # their squares are less than the greatest number
        optimizer.step()
    assert all(torch.equal(param, torch.ones_like(param)) for param in params)


WITHOUT = {
    "two losses": lambda step: (0, 1) if step % 2 else (2, 3),
    "one sometimes": lambda step: (0,) if step % 3 == 0 else (),
    "frozen at first": lambda step: (0, 2) if step < 4 else (),
    "more than are kept": lambda step: [i for i in range(4) if step * 7 >> i & 1],
    "experts": lambda step: [step % 4],
}


@pytest.mark.in_turn("foreach")
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "ASGD"])
@pytest.mark.parametrize("which", list(WITHOUT))
@pytest.mark.parametrize("foreach", [None, True, False])
def test_gradients_that_come_and_go_are_stepped_as_by_torch(foreach, which, name):
    results = []
    for module in (surefoot, torch.optim):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 5)]
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(module, name)(params, lr=0.01, **options, foreach=foreach if module is surefoot else False)
        for step in range(24):
            set_grads(optimizer, step)
            for absent in WITHOUT[which](step):
                params[absent].grad = None
            optimizer.step()
        results.append([params, [dict(optimizer.state[param]) for param in params]])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("which", ["two losses", "one sometimes", "frozen at first", "experts"])
@pytest.mark.parametrize("foreach", [None, True])
def test_gradients_that_come_and_go_make_buckets_a_few_times(foreach, which, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    optimizer, made = surefoot.AdamW(params, foreach=foreach), []
    monkeypatch.setattr(pipeline, "partition", lambda step: made.append(step) or partition(step))
    monkeypatch.setattr(optimizer_module, "run_step", lambda *args: through.append(run_step(*args)) or through[-1])
    for step in range(48):
        set_grads(optimizer, step)
        for absent in WITHOUT[which](step):
            params[absent].grad = None
        through = []
        optimizer.step()
    assert len(made) <= 10
    assert through == [] or foreach


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Lion"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"max_grad_norm": 0.3}, {"rounding": "stochastic"}])
def test_parameters_that_have_taken_unlike_steps_take_it_with_the_bits_of_the_pipeline(options, name, monkeypatch):
    if options.get("foreach") and name == "Lion":
        options = {"foreach": True, "weight_decay": 0.1}
    results, dtype = [], torch.bfloat16 if "rounding" in options else torch.float32
    for forget in (False, True):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).to(dtype)) for i in range(1, 7)]
        groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:]}]
        optimizer = getattr(surefoot, name)(groups, lr=0.1, **options)
        for step in range(14):
            set_grads(optimizer, step)
            for position in range(5 - step):
                params[position].grad = None
            if step == 10 and name in ("AdamW", "NAdam"):  # counts become the same, and others
                for entry in list(optimizer.state.values())[:3]:
                    entry["step"].fill_(7)
            with monkeypatch.context() as patched:
                if forget:
                    optimizer._step_cache = None
                elif step > 6:
                    patched.setattr(optimizer_module, "run_step", None)
                optimizer.step()
        results.append((params, [dict(optimizer.state[param]) for param in params]))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one.detach().view(torch.int16).equal(other.detach().view(torch.int16))
    torch.testing.assert_close(*(state for _, state in results), rtol=0, atol=0)


def test_a_hundred_sets_of_parameters_with_gradients_are_known_again(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(16)]
    optimizer, pairs = surefoot.AdamW(params), [(i, j) for i in range(15) for j in range(i + 1, min(i + 8, 16))]
    for again in range(4):
        if again == 3:
            monkeypatch.setattr(optimizer_module, "run_step", None)
        for pair in pairs:
            optimizer.zero_grad()
            for position in pair:
                params[position].grad = torch.ones(3)
            optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [
        4 * sum(position in pair for pair in pairs) for position in range(16)
    ]


def test_no_more_caches_are_kept_than_come_to_so_many_parameters(monkeypatch):
    monkeypatch.setattr("surefoot.step.cache._MOST_PARAMS", 6)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = surefoot.AdamW(params)
    for step in range(30):
        set_grads(optimizer, step)
        for position in range(4):
            params[position].grad = None if step * 7 >> position & 1 else params[position].grad
        optimizer.step()
        kept = optimizer._step_cache.others or {}
        assert sum(len(run.params) for cache in kept.values() for run in cache.runs) <= 6


def test_caches_of_gradients_that_come_and_go_are_dropped_when_these_stay():
    optimizer, params = started()
    for step in range(90):
        set_grads(optimizer, step)
        if step < 10 and step % 2:
            params[0].grad = None
        optimizer.step()
        if step == 9:
            assert len(optimizer._step_cache.others) == 1
    assert optimizer._step_cache.others is None
    assert optimizer._step_cache.fast


@pytest.mark.parametrize("away", ["nonfinite", "telemetry", "clip", "tensor", "decay", "hook"])
def test_it_is_taken_again_when_what_was_asked_for_is_over(away, monkeypatch):
    optimizer, _ = started(weight_decay=0.0)
    group, options = optimizer.param_groups[0], optimizer.step_options
    before = {"nonfinite": options.nonfinite, "lr": group["lr"], "weight_decay": 0.0}
    if away == "nonfinite":
        options.nonfinite = "skip"
    elif away == "telemetry":
        options.telemetry = Telemetry()
    elif away == "clip":
        options.max_grad_norm = 1.0
    elif away == "tensor":
        group["lr"] = torch.tensor(group["lr"])
    elif away == "decay":
        group["weight_decay"] = 0.5
    else:
        handle = optimizer.register_step_pre_hook(lambda one, *_: one.param_groups[0].update(maximize=True))
    train(optimizer, steps=2)
    options.nonfinite, options.telemetry, options.max_grad_norm = before["nonfinite"], None, None
    group.update(lr=before["lr"], weight_decay=0.0, maximize=False)
    if away == "hook":
        handle.remove()
    train(optimizer, steps=3)
    monkeypatch.setattr(optimizer_module, "run_step", None)
    set_grads(optimizer, 3)
    optimizer.step()


@pytest.mark.parametrize("away", ["scaler", "combined"])
def test_numbers_that_come_back_count_in_the_pipeline_too(away):
    first, second, moved = 0.1, 0.2, []
    if away == "scaler":
        params = [torch.nn.Parameter(torch.ones(1))]
        optimizer = surefoot.SGD(params, lr=first)
    else:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        optimizer = surefoot.muon_with(model, rest=surefoot.SGD, head="1.*")
        params = [model[1].bias]
    for step, rate in enumerate((*[first] * 5, second, first, first)):
        set_grads(optimizer, step)
        params[0].grad = torch.ones_like(params[0])
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step == 6:
            if away == "scaler":
                optimizer.found_inf = torch.zeros(())
            else:
                model[0].weight.grad = None
        before = params[0].detach().clone()
        optimizer.step()
        optimizer.found_inf = None
        moved.append((before - params[0].detach()).mean().item())
    assert moved == pytest.approx([0.1] * 5 + [0.2, 0.1, 0.1])


@pytest.mark.parametrize("name", ["SGD", "Muon"])
@pytest.mark.parametrize("change", ["removed", "inserted", "replaced"])
def test_lists_of_groups_and_numbers_that_change_together_count(change, name):
    results = []
    for module in (surefoot, torch.optim):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 4)]
        optimizer = train(getattr(module, name)([{"params": [param]} for param in params[:2]], lr=0.1), steps=4)
        groups = optimizer.param_groups
        old = groups[0]
        if change == "removed":
            groups.pop(0)
        elif change == "inserted":
            groups.insert(0, dict(groups[0], params=params[2:]))
        else:
            groups[0] = dict(old)
        old["lr"] = groups[-1]["lr"] = 0.05
        train(optimizer, steps=3)
        results.append(params)
    torch.testing.assert_close(*results)


def test_keys_of_groups_that_are_no_names_are_left_alone():
    optimizer, _ = started()
    for value in (0.1, 0.2, 0.3, 0.3):
        optimizer.param_groups[0][5] = value
        train(optimizer, steps=1)
        optimizer.step()
    assert optimizer.param_groups[0][5] == 0.3


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
@pytest.mark.parametrize("change", ["cleared", "replaced"])
def test_caches_of_gradients_that_come_and_go_drop_state_that_was(change, name):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    optimizer = getattr(surefoot, name)(params)
    for step in range(12):
        set_grads(optimizer, step)
        for absent in WITHOUT["two losses"](step):
            params[absent].grad = None
        optimizer.step()
    held = [
        weakref.ref(optimizer.state[param][n])
        for param in params
        for n in ("exp_avg", "row_var")
        if n in optimizer.state[param]
    ]
    if change == "cleared":
        optimizer.state.clear()
    else:
        optimizer.state.update({param: {k: v.clone() for k, v in optimizer.state[param].items()} for param in params})
    train(optimizer, steps=2)
    gc.collect()
    assert [each() for each in held] == [None] * 4


def test_parameters_that_share_memory_are_stepped_in_order_whatever_their_counts():
    results = []
    for module in (surefoot, torch.optim):
        memory = torch.linspace(-1, 1, 8)
        params = [torch.nn.Parameter(memory[start : start + 4]) for start in (0, 2, 4)]
        optimizer = module.AdamW(params, lr=0.1, weight_decay=3.0, foreach=False)
        for step in range(4):
            set_grads(optimizer, step)
            if step < 2:
                params[1].grad = None
            optimizer.step()
        results.append(memory)
    torch.testing.assert_close(*results)


def test_caches_of_gradients_that_come_and_go_keep_nothing_alive():
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    optimizer = surefoot.AdamW(params)
    for step in range(12):
        set_grads(optimizer, step)
        for absent in WITHOUT["two losses"](step):
            params[absent].grad = None
        optimizer.step()
    assert optimizer._step_cache.others
    held = [weakref.ref(param) for param in params]
    gc.disable()
    try:
        del optimizer, params
        assert [param() for param in held] == [None] * 4
    finally:
        gc.enable()


def test_a_closure_that_fails_leaves_everything_as_it_was():
    optimizer, params = started()
    before = [param.detach().clone() for param in params]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert all(map(torch.equal, before, params))
    assert takes_fast_lane(optimizer)


def change_one(change, optimizer, params):
    entry = optimizer.state[params[-1]]
    match change:
        case "rate":
            optimizer.param_groups[0]["lr"] = 0.5
        case "data":
            params[-1].data = params[-1].data.clone()
        case "gradient":
            params[-1].grad = None
        case "state":
            entry["exp_avg"] = entry["exp_avg"] + 1
        case "state lost":
            optimizer.state.pop(params[-1])
        case "count" | "counts":
            for param in params[-1:] if change == "count" else params:
                optimizer.state[param]["step"] += 3


@pytest.mark.parametrize("change", ["nothing", "rate", "data", "gradient", "state", "state lost", "count", "counts"])
def test_many_tensors_take_it_guarded_by_several_threads(change, two_threads):
    pairs = [started(sizes=[170] * 400, count=3, **options) for options in ({}, {"foreach": True})]
    (optimizer, params), (_, copies) = pairs
    assert optimizer._step_cache.runs[0].guard.tensors.needs_threads
    for pair in pairs:
        change_one(change, *pair)
    assert takes_fast_lane(optimizer) == (change not in ("gradient", "state", "state lost"))
    pairs[1][0].step()
    for one, _ in pairs:
        train(one, first=80, steps=2)
    torch.testing.assert_close(params, copies)
    assert all(param.grad is not None for param in params)
    held = weakref.ref(params[0].grad)
    optimizer.zero_grad()
    assert held() is None


@pytest.mark.parametrize("edit", ["other parameter", "removed", "same again"])
def test_replaced_lists_of_parameters_count(edit):
    optimizer, params = started(surefoot.SGD, lr=1.0)
    other = torch.nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    new = {"other parameter": [other], "removed": [params[0]], "same again": list(params)}[edit]
    optimizer.param_groups[0]["params"] = new
    before = {param: param.detach().clone() for param in (*params, other)}
    optimizer.step()
    for param, value in before.items():
        assert torch.equal(param, value) != any(param is each for each in new)
    late = torch.nn.Parameter(torch.ones(2))
    late.grad = torch.ones(2)
    new.append(late)
    set_grads(optimizer, 79)
    optimizer.step()
    assert not torch.equal(late, torch.ones(2))


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon, surefoot.Adafactor])
def test_parameters_replaced_in_a_list_that_has_replaced_another_count(cls):
    optimizer, params = started(cls, sizes=[(3, 2), (3, 2)])
    group = optimizer.param_groups[0]
    group["params"] = list(params)
    train(optimizer, steps=3)
    other = group["params"][0] = torch.nn.Parameter(torch.ones(3, 2))
    before = params[0].detach().clone()
    train(optimizer, steps=2)
    assert torch.equal(params[0], before)
    assert not torch.equal(other, torch.ones(3, 2))


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
@pytest.mark.parametrize("kind", [tuple, collections.deque, collections.UserList])
@pytest.mark.parametrize("which", ["params", "param_groups"])
@pytest.mark.parametrize("anew", [True, False])
def test_parameters_and_groups_need_not_stand_in_lists(cls, kind, which, anew):
    (optimizer, params), (twin, copies) = (started(cls, sizes=[(3, 2), (3, 2)]) for _ in range(2))
    if which == "params":
        optimizer.param_groups[0]["params"] = kind(params)
    else:
        optimizer.param_groups = kind(optimizer.param_groups)
    for each in (optimizer, twin):
        if anew:
            each.state.clear()
        train(each, steps=5)
    assert all(map(torch.equal, params, copies))


def test_options_that_become_tensors_count_when_they_change_in_place():
    optimizer, _ = started(surefoot.SGD, lr=1.0)
    twin, _ = started(surefoot.SGD, lr=1.0)
    decay = torch.tensor(0.0)
    optimizer.param_groups[0]["weight_decay"] = decay
    for step, value in enumerate((0.0, 0.5, 0.25)):
        decay.fill_(value)
        twin.param_groups[0]["weight_decay"] = value
        for each in (optimizer, twin):
            set_grads(each, 80 + step)
            each.step()
        assert all(map(torch.equal, optimizer.param_groups[0]["params"], twin.param_groups[0]["params"]))


@pytest.mark.parametrize("looking", ["compiled", "plain"])
def test_a_gradient_that_moves_within_a_storage_to_its_parameter_is_refused(looking, monkeypatch):
    if looking == "plain":
        monkeypatch.setattr("surefoot.tensors.native.guards.available", lambda: False)
    flat = torch.zeros(8)
    param = torch.nn.Parameter(flat[:4])
    optimizer = surefoot.SGD([param], lr=1.0)
    for _ in range(5):
        param.grad = flat[4:8]
        optimizer.step()
    param.grad = flat[2:6]
    with pytest.raises(RuntimeError, match=r"the gradient of `params\[0\]` of shape \(4,\) shares memory"):
        optimizer.step()


@pytest.mark.parametrize("looking", ["compiled", "plain"])
@pytest.mark.parametrize("of", ["parameter", "state"])
def test_a_gradient_that_moves_to_what_another_bucket_writes_is_refused(of, looking, monkeypatch):
    if looking == "plain":
        monkeypatch.setattr("surefoot.tensors.native.guards.available", lambda: False)
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = train(surefoot.Adam([{"params": params[:1]}, {"params": params[1:], "maximize": True}]), steps=5)
    set_grads(optimizer, 5)
    params[0].grad = params[1].data if of == "parameter" else optimizer.state[params[1]]["exp_avg"]
    with pytest.raises(RuntimeError, match=r"the gradient of `params\[0\]` of shape \(4,\) shares memory"):
        optimizer.step()


MOVES = {
    "each": lambda params, _: [setattr(param, "data", param.data.clone()) for param in params],
    "one": lambda params, _: setattr(params[2], "data", params[2].data.clone()),
    "a vector": lambda params, _: torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(params).detach().clone(), params
    ),
    "backwards": lambda params, _: [
        setattr(param, "data", part.view_as(param).copy_(param.detach()))
        for param, part in zip(reversed(params), torch.zeros(24).split(6), strict=True)
    ],
    "storage": lambda params, _: params[1].data.set_(params[1].data.clone()),
    "slots": lambda _, state: [
        setattr(entry[name], "data", entry[name].clone())
        for entry in state.values()
        for name in entry
        if name != "step"
    ],
    "counts": lambda _, state: [
        setattr(entry["step"], "data", entry["step"].clone()) for entry in state.values() if "step" in entry
    ],
    "over one another": lambda params, _: params[3].data.set_(params[0].data),
    "over one another in part": lambda params, _: params[3].data.set_(
        torch.cat([params[0].detach().ravel(), torch.ones(3)])[3:].view(2, 3)
    ),
}


BY_MOVES = [
    *((name, options) for name in ("SGD", "AdamW") for options in ({}, {"foreach": True}, {"max_grad_norm": 0.3})),
    ("AdamW", {"state_dtype": "float8"}),
    *((name, options) for name in ("Muon", "Adafactor") for options in ({}, {"max_grad_norm": 0.3})),
]


@pytest.mark.parametrize(("name", "options"), BY_MOVES)
@pytest.mark.parametrize("move", list(MOVES))
def test_tensors_that_move_are_stepped_where_they_are(options, move, name):
    results = []
    for moves in (MOVES[move], None):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 5)]
        groups = [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:]}]
        own = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = train(getattr(surefoot, name)(groups, lr=0.1, **own, **options), steps=4)
        kept = [params[3].data]
        for step in range(5):
            if step < 3 and (moves or "over" in move):
                MOVES[move](params, optimizer.state)
            kept += [param.data for param in params]  # whose memory must not be given to gradients before it is moved
            if moves is None:
                optimizer._step_cache = None
            train(optimizer, first=step, steps=1)
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert one.detach().view(torch.int32).equal(other.detach().view(torch.int32))


@pytest.mark.parametrize(("name", "options"), BY_MOVES)
@pytest.mark.parametrize("move", ["each", "one", "a vector", "backwards", "storage", "slots"])
def test_tensors_that_have_moved_take_it(move, options, name, monkeypatch):
    params = [torch.nn.Parameter(torch.linspace(-1, i, 6).view(2, 3)) for i in range(1, 5)]
    groups = [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:]}]
    optimizer = train(getattr(surefoot, name)(groups, lr=0.1, **options), steps=4)
    monkeypatch.setattr(optimizer_module, "run_step", None)
    for step in range(4):
        MOVES[move](params, optimizer.state)
        train(optimizer, first=step, steps=1 + step % 2)


LAID_OUT = {
    "transposed": lambda grad: grad.mT.contiguous().mT,
    "expanded": lambda grad: grad[..., :1].expand(grad.shape),
    "in a wider one": lambda grad: torch.nn.functional.pad(grad, (1, 2))[..., 1:-2],
}


NO_MEMORY = [("parameter", "expanded"), ("slots", "expanded")]


def lay_out(of, change, optimizer, params):
    """Lay out parameters, slots or gradients otherwise, of all parameters but the first."""
    for param in params[1:]:
        if of == "gradient":
            param.grad = change(param.grad)
        elif of == "parameter":
            param.data = change(param.data)
        else:
            entry = optimizer.state[param]
            entry |= {key: change(value) for key, value in entry.items() if value.dim()}


@pytest.mark.parametrize("name", ["RMSprop", "AdamW", "Lion"])
@pytest.mark.parametrize(
    ("of", "laid_out"),
    [(of, kind) for of in ("gradient", "parameter", "slots") for kind in LAID_OUT if (of, kind) not in NO_MEMORY],
)
def test_tensors_that_are_laid_out_otherwise_take_it(of, laid_out, name, monkeypatch):
    monkeypatch.setattr(copied, "TILE", 30)
    results = []
    for change in (LAID_OUT[laid_out], lambda tensor: LAID_OUT[laid_out](tensor).contiguous()):
        params = [torch.nn.Parameter(torch.linspace(-1, i, 6 * i).view(2, 3, i)) for i in range(1, 5)]
        optimizer = train(getattr(surefoot, name)(params, lr=0.1), steps=3)
        for step in range(5):
            set_grads(optimizer, step)
            params[0].grad.requires_grad_()
            if of == "gradient" or step == 0:
                lay_out(of, change, optimizer, params)
            if step == 4:
                params[1].data = params[1].data.clone(memory_format=torch.preserve_format)
            with monkeypatch.context() as patched:
                if step > 1 and (step < 4 or laid_out == "transposed"):
                    patched.setattr(optimizer_module, "run_step", None)
                optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert one.detach().contiguous().view(torch.int32).equal(other.detach().view(torch.int32))


@pytest.mark.parametrize(("name", "options"), [("SGD", {}), ("Prodigy", {"slice_p": 2})])
def test_copies_are_made_in_inference_mode_and_outside_of_it(name, options):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    for inferring, param in enumerate(params):
        optimizer = getattr(surefoot, name)([param], **options)
        for step in range(4):
            param.grad = torch.full((3, 2), step + 1.0).t()
            with torch.inference_mode(step < 2 * inferring):
                optimizer.step()
    assert torch.equal(*params)


def test_of_gradients_that_are_laid_out_otherwise_nothing_is_kept():
    param = torch.nn.Parameter(torch.ones(2, 3))
    optimizer, storages = surefoot.SGD([param], lr=0.1), []
    for _ in range(4):
        param.grad = torch.ones(3, 2).t()
        storages.append(weakref.ref(param.grad.untyped_storage()))
        optimizer.step()
        optimizer.zero_grad()
    assert [storage() for storage in storages] == [None] * 4


def same_without_cache(make, steps=3):
    """Return whether some steps have the bits that they have where nothing is kept of the step before.

    Args:
        make: returns an optimizer and its parameters.
        steps: how many.
    """
    results = []
    for forgets in (False, True):
        optimizer, params = make()
        for step in range(steps):
            if forgets:
                optimizer._step_cache = None
            train(optimizer, first=step, steps=1)
        results.append(params)
    return all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_parameters_that_move_over_one_another_in_storages_that_begin_elsewhere(name):
    def make():
        params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
        optimizer = train(getattr(surefoot, name)(params, lr=0.1), steps=4)
        shared = np.linspace(0, 1, 9, dtype=np.float32)
        for param, part in zip(params, (shared[:6], shared[3:]), strict=True):
            param.data = torch.from_numpy(part.reshape(2, 3))
        return optimizer, params

    assert same_without_cache(make)


def test_parameters_that_come_apart_are_stepped_as_such():
    def make():
        flat = torch.linspace(-1, 1, 9)
        params = [torch.nn.Parameter(flat[:6]), torch.nn.Parameter(flat[3:])]
        optimizer = train(surefoot.ASGD(params, lr=0.1), steps=3)
        params[1].data = params[1].data.clone()
        return optimizer, params

    assert same_without_cache(make)


@pytest.mark.parametrize("engine", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_that_are_measured_later(engine):
    results = []
    for telemetry in (None, Telemetry(every=2)):
        params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
        optimizer = train(surefoot.AdamW(params, lr=0.1, **engine), steps=2)
        optimizer.step_options.telemetry = telemetry
        train(optimizer, steps=4)
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("unlike", ["custom", "rule"])
def test_what_is_not_kept_is_stepped_when_it_has_a_gradient_again(unlike):
    results = []
    for forgets in (False, True):
        matrix = torch.nn.Parameter(torch.ones(2, 3))
        vector = torch.nn.Parameter(torch.ones(5, dtype=torch.complex64 if unlike == "rule" else torch.float32))
        parts = [surefoot.Part(surefoot.Muon, lambda _, param: param.dim() > 1), surefoot.Part(surefoot.AdamW)]
        optimizer = train(surefoot.Combined([("matrix", matrix), ("vector", vector)], parts), steps=2)
        if unlike == "custom":
            state = optimizer.state[matrix]
            state["momentum_buffer"] = torch._neg_view(state["momentum_buffer"])
        for step, without in enumerate([None, unlike, unlike, unlike, None, None]):
            set_grads(optimizer, step)
            if without:
                (matrix if without == "custom" else vector).grad = None
            if forgets:
                optimizer._step_cache = None
            optimizer.step()
        results.append([matrix, vector])
    assert all(map(torch.equal, *results))


def test_a_parameter_that_moves_to_its_gradient_is_refused():
    optimizer, params = started()
    params[0].data = params[0].grad
    with pytest.raises(RuntimeError, match=r"the gradient of `params\[0\]` of shape \(5,\) shares memory"):
        optimizer.step()


def test_a_parameter_that_moves_to_less_memory_is_refused():
    optimizer, params = started()
    params[0].data = params[0].data.clone()
    params[0].untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="has lost memory"):
        optimizer.step()


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_a_step_without_gradients_leaves_what_is_kept_of_custom_steps(name, monkeypatch):
    optimizer, _ = started(getattr(surefoot, name), sizes=[(2, 3)])
    for step in range(4):
        with monkeypatch.context() as patched:
            patched.setattr(optimizer_module, "run_step", None)
            train(optimizer, first=step, steps=1)
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"telemetry": True}])
def test_a_step_without_gradients_leaves_buckets_as_they_are(options, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
    optimizer, made = surefoot.AdamW(groups, **options), []
    monkeypatch.setattr(pipeline, "partition", lambda step: made.append(step) or partition(step))
    for step in range(12):
        set_grads(optimizer, step)
        if step % 3 == 0:
            optimizer.zero_grad()
        elif step > 6:
            params[step % 2].grad = None
        optimizer.step()
    assert len(made) == 3
    assert optimizer.step_statistics.steps == 12
    assert [optimizer.state[param]["step"].item() for param in params] == [6, 6, 8]
    before = [param.detach().clone() for param in params]
    optimizer.zero_grad()
    params[2].data = params[2].data.clone()
    optimizer.step()
    assert all(map(torch.equal, params, before))
    train(optimizer, steps=2)
    assert not torch.equal(params[2], before[2])


def test_buckets_of_all_sizes_are_stepped_in_their_order():
    results = []
    for options in ({}, {"foreach": False}):
        flat = torch.linspace(-1, 1, 70_000)
        groups = [{"params": [torch.nn.Parameter(flat[:10])]}, {"params": [torch.nn.Parameter(flat)]}]
        train(surefoot.SGD(groups, lr=0.1, weight_decay=0.5, **options), steps=6)
        results.append(flat)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{"momentum": np.float32(0.9)}, {"weight_decay": np.float64(0.1)}])
def test_numbers_of_numpy_are_numbers(options):
    results = []
    for kind in (lambda value: value, float):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        train(surefoot.SGD([param], lr=0.1, **{name: kind(value) for name, value in options.items()}), steps=5)
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
def test_rates_of_numpy_as_schedules_give_them_cost_nothing(cls, monkeypatch):
    optimizer, _ = started(cls, sizes=[(3, 2)], lr=0.1)
    schedule = surefoot.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(step / 9))
    train(optimizer, steps=1)
    monkeypatch.setattr(optimizer_module, "run_step", None)
    for seed in range(3):
        schedule.step()
        assert isinstance(optimizer.param_groups[0]["lr"], np.floating)
        set_grads(optimizer, seed)
        optimizer.step()


def test_state_is_left_as_it_was_when_making_it_fails(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = surefoot.SGD(params, momentum=0.9)
    set_grads(optimizer, 1)
    make, made = surefoot.Slot.new, []

    def fail_at_the_second(self, param, group):
        made.append(param)
        if len(made) == 2:
            raise MemoryError
        return make(self, param, group)

    monkeypatch.setattr(surefoot.Slot, "new", fail_at_the_second)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state


def test_steps_that_fail_are_counted_as_the_pipeline_counts_them():
    counts = []
    for again in (False, True):
        optimizer, _ = started()
        if not again:
            optimizer._step_cache.fast = False
        optimizer.param_groups[0]["betas"] = (0.5,)
        with pytest.raises(ValueError, match="not enough values to unpack"):
            optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        optimizer.step()
        counts.append(optimizer.step_statistics.steps)
    assert counts[0] == counts[1]


def test_what_coefficients_give_must_be_numbers():
    class Odd(surefoot.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @staticmethod
        def coefficients(h, step):
            return {"rate": None if h.lr == 1 else h.lr}

        @staticmethod
        def update(param, grad, c, flags):
            return param - c.rate * grad

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Odd([{"params": [params[0]]}, {"params": [params[1]], "lr": 1}], lr=0.5)
    set_grads(optimizer, 1)
    with pytest.raises(surefoot.errors.RuleError, match="Odd.coefficients gives rate=None, which is not a number"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones(3)) for param in params)


def test_moving_the_state_frees_what_was():
    optimizer, _ = started()
    optimizer.to("meta")
    assert "_step_cache" not in vars(optimizer)


# Sparse gradients


def sparse_started(cls, *, tables=2, dtype=torch.float32):
    """An optimizer of sparse tables that has taken the fast lane, torch's of copies, and what sets all gradients."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(40, 6, generator=generator).to(dtype)) for _ in range(tables)]
    theirs = [torch.nn.Parameter(table.detach().clone()) for table in ours]
    pair = [getattr(module, cls)(tables, lr=0.1) for module, tables in ((surefoot, ours), (torch.optim, theirs))]

    def set_grads(rows=(3, 39, 3, 0, 3), **options):
        index, values = torch.tensor([rows], dtype=torch.long), torch.randn(len(rows), 6, generator=generator).to(dtype)
        for table in (*ours, *theirs):
            table.grad = torch.sparse_coo_tensor(index, values.clone(), (40, 6), check_invariants=False, **options)

    for _ in range(3):
        set_grads()
        for optimizer in pair:
            optimizer.step()
    set_grads()
    return pair, ours, theirs, set_grads


def plan_of(optimizer):
    """The plan of the only bucket."""
    (run,) = optimizer._step_cache.runs
    return run.bucket.plan


@pytest.mark.parametrize("cls", ["SGD", "SparseAdam"])
def test_sparse_gradients_like_the_last_ones_are_known_by_a_compiled_look(cls):
    (optimizer, other), ours, theirs, set_grads = sparse_started(cls)
    each = ((1, 2, 3, 4), (4, 3, 2, 1), (3, 3, 3, 3), (0, 39, 0, 0), (7, 7, 7, 7), (6, 7, 8, 9), (8, 8, 9, 9), (5, 6))
    for rows, alike in zip(each, (False, False, True, True, False, False, True, False), strict=True):
        set_grads(rows)
        if rows[0] == 7:  # values that are not contiguous
            ours[0].grad = torch.sparse_coo_tensor([rows], torch.arange(24.0).view(6, 4).t(), (40, 6))
            theirs[0].grad = ours[0].grad.clone()
        known = plan_of(optimizer)._alike
        assert takes_fast_lane(optimizer)
        assert (known is not None and plan_of(optimizer)._alike is known) == alike
        other.step()
        torch.testing.assert_close(ours, theirs)


SPARSE = pytest.mark.parametrize("cls", ["SGD", "Adagrad", "SparseAdam"])


@SPARSE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_sparse_gradients_take_it(cls, dtype):
    (optimizer, other), ours, theirs, set_grads = sparse_started(cls, dtype=dtype)
    rough = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for rows in ((3, 39, 3, 0, 3), (), (7,), tuple(range(40)), (5,) * 9, (1, 2, 4)):
        set_grads(rows)
        assert takes_fast_lane(optimizer)
        other.step()
        torch.testing.assert_close(ours, theirs, **rough)
    if cls == "SparseAdam":
        assert optimizer.state[ours[0]]["step"] == other.state[theirs[0]]["step"] == 9
        assert type(optimizer.state[ours[0]]["step"]) is int


@SPARSE
def test_sparse_rows_that_are_there_twice_though_coalesced_are_added_up(cls):
    (optimizer, other), ours, theirs, set_grads = sparse_started(cls)
    set_grads((3, 3, 1), is_coalesced=True)
    for table in theirs:
        table.grad = torch.sparse_coo_tensor(table.grad._indices(), table.grad._values(), (40, 6))
    assert takes_fast_lane(optimizer)
    other.step()
    torch.testing.assert_close(ours, theirs)


def test_rows_for_which_there_is_no_memory_are_stepped_when_there_is_again(monkeypatch):
    (optimizer, other), ours, theirs, set_grads = sparse_started("SparseAdam")
    set_grads(range(40))
    monkeypatch.setattr(np, "empty", raises_memory_error)
    with pytest.raises(MemoryError):
        optimizer.step()
    monkeypatch.undo()
    set_grads(range(40))
    assert takes_fast_lane(optimizer)
    other.step()
    torch.testing.assert_close(ours, theirs)


def raises_memory_error(*_, **__):
    raise MemoryError


def test_memory_of_many_rows_is_not_kept(monkeypatch):
    (optimizer, other), ours, theirs, set_grads = sparse_started("SparseAdam")
    monkeypatch.setattr(sparse, "_KEPT", 0)
    for rows in (range(9), (4, 5), (6, 7), (8, 9), (9, 9)):
        set_grads(rows)
        assert takes_fast_lane(optimizer)
        other.step()
        memory = plan_of(optimizer).launch._memory
        assert not memory.size
        assert memory.base is None
    torch.testing.assert_close(ours, theirs)


@SPARSE
@pytest.mark.parametrize("rows", [(2, -1), (2, 40), (2, 1 << 40), (2, 3, 3, 40, 0)])
def test_rows_outside_are_refused_and_nothing_has_changed(cls, rows):
    (optimizer, _), ours, _, set_grads = sparse_started(cls)
    set_grads((3, 4))
    ours[1].grad = torch.sparse_coo_tensor([rows], torch.ones(len(rows), 6), (40, 6), check_invariants=False)
    before = [table.detach().clone() for table in ours]
    with pytest.raises(IndexError, match="has indices outside of it"):
        optimizer.step()
    assert all(map(torch.equal, ours, before))


@SPARSE
@pytest.mark.parametrize("change", ["dense", "double", "shape", "none", "no memory"])
def test_sparse_gradients_of_another_kind_do_not_take_it(cls, change):
    (optimizer, _), ours, _, _ = sparse_started(cls)
    grad = ours[1].grad
    if change == "dense":
        ours[1].grad = grad.to_dense()
    elif change == "double":
        ours[1].data, ours[1].grad = ours[1].data.double(), None
        ours[1].grad = grad.double()
    elif change == "shape":
        ours[1].data, ours[1].grad = torch.ones(40, 3), None
        ours[1].grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (40, 3))
    elif change == "none":
        ours[1].grad = None
    else:
        grad._values().untyped_storage().resize_(4)
    run, made = optimizer._step_cache.fast.run, []
    optimizer._step_cache.fast.run = lambda *args: made.append(run(*args)) or made[-1]
    try:
        optimizer.step()
    except RuntimeError:
        assert change != "none"
    assert made == [False]


def test_values_of_a_sparse_gradient_that_are_the_parameter_are_read_before_it_is_written():
    (optimizer, _), ours, _, set_grads = sparse_started("SGD", tables=1)
    (table,) = ours
    for _ in range(3):
        set_grads(range(40))
        optimizer.step()
    assert plan_of(optimizer)._alike
    before = table.detach().clone()
    table.grad = torch.sparse_coo_tensor([list(reversed(range(40)))], table.detach(), (40, 6))
    assert table.grad._values().data_ptr() == table.data_ptr()
    assert takes_fast_lane(optimizer)
    torch.testing.assert_close(table.detach(), before - 0.1 * before.flip(0))


def test_counts_of_sparse_steps_that_differ_count():
    (optimizer, other), ours, theirs, set_grads = sparse_started("SparseAdam")
    optimizer.state[ours[1]]["step"] += 4
    other.state[theirs[1]]["step"] += 4
    for _ in range(3):
        set_grads()
        optimizer.step()
        other.step()
        torch.testing.assert_close(ours, theirs)


def test_sparse_and_dense_parameters_take_it_together():
    table, weight = torch.nn.Parameter(torch.ones(9, 3)), torch.nn.Parameter(torch.ones(4))
    optimizer = surefoot.Adagrad([table, weight], lr=0.1)
    for _ in range(4):
        table.grad = torch.sparse_coo_tensor([[2, 2]], torch.ones(2, 3), (9, 3))
        weight.grad = torch.ones(4)
        if optimizer.__dict__.get("_step_cache") and optimizer._step_cache.fast:
            assert takes_fast_lane(optimizer)
        else:
            optimizer.step()
    assert optimizer._step_cache.fast
    assert optimizer.state[table]["step"] == optimizer.state[weight]["step"] == 4
    assert torch.equal(table[3], torch.ones(3))
    assert len(set(table[2].tolist())) == 1


def test_buckets_are_kept_where_momentum_makes_sparse_gradients_dense():
    """One table has a dense gradient at times, one in every step."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(40, 6, generator=generator).requires_grad_() for _ in range(3)]
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer, other = surefoot.SGD(ours, **options), torch.optim.SGD(theirs, **options)

    def set_grads(rows, *, dense=False):
        for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            values = torch.randn(len(rows), 6, generator=generator)
            own.grad = torch.sparse_coo_tensor([rows], values, (40, 6), check_invariants=False)
            other.grad = own.grad.to_dense()  # torch's step takes no sparse gradient after a dense one
            own.grad = other.grad.clone() if number == 2 or (dense and number) else own.grad

    set_grads([3, 39, 3])
    optimizer.step()
    other.step()
    runs = optimizer._step_cache.runs
    for dense in (False, True, False):
        set_grads([5, 0, 5, 7], dense=dense)
        optimizer.step()
        other.step()
        assert optimizer._step_cache.runs is runs
    torch.testing.assert_close(ours, theirs)
    before = [param.detach().clone() for param in ours]
    ours[1].grad = torch.sparse_coo_tensor([[40]], torch.ones(1, 6), (40, 6), check_invariants=False)
    with pytest.raises(IndexError, match=r"`params\[1\]` of shape"):
        optimizer.step()
    assert all(map(torch.equal, ours, before))
    ours[1].grad = None
    optimizer.step()
    assert torch.equal(ours[1], before[1])
    assert not torch.equal(ours[0], before[0])
