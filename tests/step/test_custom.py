"""Custom steps of prepared parameters: whatever is changed between two of them counts at the next one."""

import gc
import weakref

import pytest
import torch

import surefoot
from surefoot import optimizer as optimizer_module

SHAPES = {
    "Adafactor": ((6, 4), (6, 4), (5,), (), (2, 3, 4), *((3, 3),) * 16),
    "Muon": ((6, 4), (6, 4), (4, 6), (3, 3)),
}
ALGORITHMS = pytest.mark.parametrize("name", list(SHAPES))


def started(name, steps=3, **options):
    """Ours and torch's optimizer of copies of some parameters, and what steps both with equal gradients."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES[name]]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    pair = [getattr(module, name)(own, lr=0.1, **options) for module, own in ((surefoot, ours), (torch.optim, theirs))]

    def set_grads():
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)
            other.grad = one.grad.clone()

    def step(*, given=True):
        if given:
            set_grads()
        for optimizer in pair:
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    for _ in range(steps):
        step()
    assert pair[0]._step_cache.fast, "nothing was kept"
    return pair, (ours, theirs), set_grads, step


def changed(change, optimizer, params):  # noqa: C901, PLR0912 (a list of changes)
    group, state = optimizer.param_groups[0], optimizer.state[params[0]]
    slot = next(name for name in ("row_var", "momentum_buffer") if name in state)
    if change == "rate":
        group["lr"] = 0.03
    elif change == "rate as a tensor":
        group["lr"] = torch.tensor(0.03)
    elif change == "maximize":
        group["maximize"] = True
    elif change == "data":
        params[0].data = torch.ones(4, 6).t()
    elif change == "state in place":
        state[slot].mul_(2)
    elif change == "state replaced":
        state[slot] = state[slot] * 3
    elif change == "count" and "step" in state:
        for param in (params[0], params[-1]):
            optimizer.state[param]["step"] += 5
    elif change == "count negated" and "step" in state:
        state["step"] = torch._neg_view(-state["step"])
    elif change == "cleared":
        optimizer.state.clear()
    elif change == "double":
        params[0].data = params[0].data.double()
        state.update({name: value.double() for name, value in state.items() if name != "step"})
    elif change == "another parameter":
        group["params"][1] = torch.nn.Parameter(torch.ones(2, 2))
        group["params"][1].grad = torch.ones(2, 2)
    elif change == "a group":
        late = torch.nn.Parameter(torch.ones(2, 2))
        late.grad = torch.ones(2, 2)
        optimizer.add_param_group({"params": [late], "lr": 0.5})


def test_negated_memory_is_averaged():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.data = torch._neg_view(torch.full((3, 4), -2.0))
    optimizer = surefoot.Muon([weight], lr=0.0, ema=0.5)
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["ema"], torch.full((3, 4), 2.0))


@ALGORITHMS
@pytest.mark.parametrize(
    "change",
    ["rate", "rate as a tensor", "maximize", "data", "state in place", "state replaced", "count", "count negated",
     "cleared", "double", "another parameter", "a group"],
)  # fmt: skip
def test_what_changes_between_steps_counts(name, change):
    if (name, change) == ("Muon", "maximize"):
        pytest.skip("Muon has no maximize")
    pair, sides, _, step = started(name)
    for optimizer, params in zip(pair, sides, strict=True):
        changed(change, optimizer, params)
    step()
    step()
    own, others = ([p for group in each.param_groups for p in group["params"]] for each in pair)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@ALGORITHMS
def test_what_is_kept_between_steps_holds_neither_gradients_nor_the_optimizer(name):
    (optimizer, theirs), (params, _), set_grads, step = started(name)
    step()
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert not any(grad() for grad in grads)
    kept = weakref.ref(optimizer._step_cache.fast._custom._custom_step)
    del optimizer, theirs, set_grads, step
    gc.collect()
    assert kept() is None


@ALGORITHMS
def test_a_correction_counts_when_it_is_not_asked_for_any_more(name):
    found = []
    for keeps in (True, False):
        weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        optimizer = getattr(surefoot, name)([weight], lr=1e-3, master_weight_bits=32)
        for step in range(6):
            if step == 2:
                optimizer.param_groups[0]["master_weight_bits"] = None
            if not keeps:
                optimizer.__dict__.pop("_step_cache", None)
            weight.grad = torch.arange(16, dtype=torch.bfloat16).view(4, 4) - step
            optimizer.step()
        found.append((weight.detach(), optimizer.state[weight]["weight_correction"]))
    assert all(map(torch.equal, *found))


@ALGORITHMS
def test_missing_gradients_count(name):
    _, sides, set_grads, step = started(name)
    set_grads()
    for params in sides:
        params[0].grad = None
    step(given=False)
    step()


@ALGORITHMS
def test_gradients_that_come_and_go_find_what_steps_like_theirs_have_left(name, monkeypatch):
    (optimizer, _), sides, set_grads, step = started(name)
    for turn in range(16):
        set_grads()
        for params in sides:
            params[turn % 2].grad = None
        with monkeypatch.context() as patched:
            if turn > 8:
                patched.setattr(optimizer_module, "run_step", None)
            step(given=False)
    assert len(optimizer._step_cache.others) == 1


@ALGORITHMS
def test_options_for_which_gradients_are_measured_may_come_and_go(name):
    (optimizer, other), (params, others), set_grads, _ = started(name)
    for turn, limit in enumerate((None, 0.5, 0.5, 0.5, 0.1, 0.1, None, None, 0.5)):
        optimizer.step_options.max_grad_norm = limit
        optimizer.step_options.nonfinite = "skip" if turn == 4 else "ignore"
        set_grads()
        optimizer.step()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(others, limit)
        other.step()
        for one, twin in zip(params, others, strict=True):
            torch.testing.assert_close(one, twin, rtol=2e-2, atol=1e-3)


def test_buckets_are_kept_beside_custom_parameters_that_nothing_can_guard():
    model = torch.nn.Linear(4, 3)
    parts = [surefoot.Part(surefoot.Muon, "weight"), surefoot.Part(surefoot.AdamW)]
    optimizer = surefoot.Combined(model.named_parameters(), parts)
    runs = []
    for step in range(4):
        for param in model.parameters():
            param.grad = torch.full_like(param, step + 1.0)
        optimizer.step()
        state = optimizer.state[model.weight]
        state["momentum_buffer"] = torch._neg_view(-state["momentum_buffer"])
        runs.append(optimizer._step_cache.runs)
    assert runs[1] is runs[2] is runs[3]
    assert optimizer._step_cache.custom is None
    assert not optimizer._step_cache.fast


@ALGORITHMS
def test_hooks_telemetry_and_options_that_come_later_count(name):
    (optimizer, _), (params, _), set_grads, step = started(name)
    called = []
    handle = optimizer.register_step_post_hook(lambda *_: called.append(1))
    step()
    handle.remove()
    assert called == [1]
    optimizer.step_options.zero_grad_after_step = True
    set_grads()
    optimizer.step()
    assert all(param.grad is None for param in params)
    optimizer.step_options.zero_grad_after_step = False
    optimizer.step_options.nonfinite = "skip"
    set_grads()
    params[0].grad.fill_(torch.nan)
    before = [param.detach().clone() for param in params]
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.step_statistics.skipped == 1
    optimizer.step_options.nonfinite = "perhaps"
    with pytest.raises(ValueError, match="`nonfinite` must be one of"):
        optimizer.step()


@ALGORITHMS
def test_a_state_that_has_lost_its_memory_is_refused(name):
    (optimizer, _), (params, _), set_grads, _ = started(name)
    set_grads()
    slot = next(value for key, value in optimizer.state[params[0]].items() if key != "step")
    slot.untyped_storage().resize_(4)
    before = params[1].detach().clone()
    with pytest.raises(RuntimeError, match="has lost memory"):
        optimizer.step()
    assert torch.equal(params[1], before)


def test_many_small_matrices_of_muon_are_orthogonalised_together():
    params = [[torch.nn.Parameter(torch.eye(3, 5) * (i + 1)) for i in range(9)] for _ in range(2)]
    for library, own in zip((surefoot, torch.optim), params, strict=True):
        optimizer = library.Muon(own, lr=0.1)
        for turn in range(3):
            for i, param in enumerate(own):
                param.grad = torch.arange(15.0).view(3, 5) * (i - 4) + turn
            optimizer.step()
    for one, other in zip(*params, strict=True):
        torch.testing.assert_close(one, other)
