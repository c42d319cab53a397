"""Gradients released while backward runs: the numbers of the plain step, and what is refused before it changes."""

import copy
import gc
import io
import itertools
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import surefoot
from conformance import ROWS
from helpers import Noted, assert_same, params_of, snapshot, train_whole
from surefoot.errors import NonFiniteGradientError
from surefoot.step import release

STEPS = 10
WIDTHS = (6, 8, 4)
SMALL = 100
"""Bytes of a bucket that holds one or two of the test's parameters."""
AT_ONCE = {surefoot.LBFGS, surefoot.Prodigy}
"""Algorithms that step all parameters at once, and are refused."""
TAKEN = [row.ours for row in ROWS if row.ours not in AT_ONCE]


class Net(nn.Module):
    """Matrices only, as Muon takes; `tied` is used twice, `unused` in odd steps only, `frozen` is not trained."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, WIDTHS[0], sparse=sparse)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(WIDTHS))
        self.tied = nn.Linear(WIDTHS[-1], WIDTHS[-1], bias=False)
        self.unused = nn.Linear(WIDTHS[-1], WIDTHS[-1], bias=False)
        self.frozen = nn.Linear(WIDTHS[-1], WIDTHS[-1], bias=False).requires_grad_(False)

    def forward(self, step):
        x = self.embed(torch.tensor([step % 5, (step + 1) % 5, 2]))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.tied(torch.tanh(self.tied(x)))
        return self.frozen(x + self.unused(x) if step % 2 else x)


def loss_of(model, step):
    return (model(step) - 1).square().sum()


def trained(make, steps=STEPS, *, released=None, sparse=False, between=None, first=0, model=None, optimizer=None):
    """Train with the options `released` of `release_gradients`, or plainly; return model and optimizer."""
    model = model or Net(sparse=sparse)
    optimizer = optimizer or make(model)
    handle = None if released is None else optimizer.release_gradients(model, **released)
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        if handle is not None:
            assert all(param.grad is None for param in params_of(optimizer))
        optimizer.step()
        optimizer.zero_grad()
        if between is not None:
            between(optimizer, step)
    return model, optimizer


def same(make, **options):
    """Assert that training is the same however gradients are released."""
    _, plain = trained(make, **options)
    for bucket_bytes in (1, SMALL, 1 << 20):
        _, other = trained(make, released={"bucket_bytes": bucket_bytes}, **options)
        assert_same(snapshot(other), snapshot(plain))
        assert vars(other.step_statistics) == vars(plain.step_statistics)


def all_params(cls, **options):
    return lambda model: cls(model.named_parameters(), **options)


@pytest.mark.parametrize("cls", TAKEN, ids=lambda cls: cls.__name__)
def test_released_is_plain(cls):
    only_sparse = cls.__name__ == "SparseAdam"

    def make(model):
        options = {"max_grad_norm": None} if cls is surefoot.LAMB else {}
        params = of_different_shapes(model) if cls is surefoot.Muon else model.parameters()
        return cls(model.embed.parameters() if only_sparse else params, lr=0.01, **options)

    same(make, sparse=only_sparse)


OPTIONS = {
    "eager": {"foreach": False},
    "foreach": {"foreach": True},
    "ema": {"ema": 0.9},
    "max_grad_value": {"max_grad_value": 0.01},
    "cautious": {"cautious": True},
    "centralized": {"gradient_centralization": True},
    "float8": {"state_dtype": "float8"},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 3},
    "24 bits": {"master_weight_bits": 24, "state_dtype": "float8"},
    "zero_grad_after_step": {"zero_grad_after_step": True},
    "amsgrad": {"amsgrad": True, "maximize": True},
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_released_is_plain_with_options(options, named):
    short = bool({"rounding", "master_weight_bits"} & options.keys())

    def make(model):
        if short:
            model.to(torch.bfloat16)
        return surefoot.AdamW(model.named_parameters() if named else model.parameters(), lr=0.01, **options)

    same(make)


@pytest.mark.parametrize("cls", [surefoot.Muon, surefoot.Adafactor], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"max_grad_value": 0.01}, {"rounding": "stochastic"}], ids=str)
def test_released_is_plain_with_options_of_custom_steps(cls, options):
    def make(model):
        if "rounding" in options:
            model.to(torch.bfloat16)
        return cls(of_different_shapes(model), lr=0.01, **options)

    same(make)


def of_different_shapes(model):
    """Return parameters of which Muon stacks none, since a stack is rounded otherwise than each of its matrices."""
    return [param for param in model.parameters() if param is not model.unused.weight]


def test_matrices_that_muon_stacks_are_released_to_rounding():
    make = all_params(surefoot.Muon, lr=0.01, max_grad_value=0.01)
    ours, theirs = trained(make, released={"bucket_bytes": 1})[0], trained(make)[0]
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, other, atol=0.005, rtol=0)  # half a step, after 10 of them


def in_parts(*parts):
    """Return what makes an optimizer of several algorithms."""
    return lambda model: surefoot.Combined(
        [(name, param) for name, param in model.named_parameters() if param is not model.unused.weight],
        [surefoot.Part(cls, select, lr=0.01) for cls, select in parts],
    )


PARTS = {
    "rules": in_parts((surefoot.SGD, "tied*"), (surefoot.AdamW, "*")),
    "a custom step": in_parts((surefoot.Muon, "layers*"), (surefoot.AdamW, "*")),
    "custom steps": in_parts((surefoot.Muon, "layers*"), (surefoot.Adafactor, "*")),
}


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS.keys())
def test_combinations(make):
    same(make)


def test_plans_of_combinations_are_kept(monkeypatch):
    model = Net()
    optimizer = PARTS["a custom step"](model)
    handle = optimizer.release_gradients(model)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer.step()
    (bucket,) = handle._buckets
    monkeypatch.setattr(release, "run_step", None)
    before = model.tied.weight.detach().clone()
    loss_of(model, 1).backward()
    assert bucket.stepped
    assert not torch.equal(model.tied.weight, before)


def in_groups(model):
    layers = [("a", model.layers[0].weight), ("b", model.tied.weight)]
    others = [("c", model.embed.weight), ("d", model.layers[1].weight), ("e", model.unused.weight)]
    return surefoot.AdamW(
        [{"params": layers, "weight_decay": 0.0}, {"params": others, "lr": 0.05, "ema": 0.9}], lr=0.01, rounding_seed=1
    )


def test_groups_and_schedules():
    def between(optimizer, step):
        if step == 5:
            optimizer.param_groups[1]["weight_decay"] = 0.3
        if step == 9:
            optimizer.param_groups[0]["amsgrad"] = True
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    same(in_groups, between=between)


def test_a_scheduler_sees_steps(recwarn):
    def make(model):
        optimizer = in_groups(model)
        optimizer.scheduler = surefoot.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        optimizer.theirs = torch.optim.lr_scheduler.LinearLR(optimizer)
        return optimizer

    def between(optimizer, _):
        optimizer.scheduler.step()
        optimizer.theirs.step()

    same(make, between=between)
    assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]


def test_what_is_changed_between_steps_counts():
    def between(optimizer, step):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if step == 4:
            optimizer.state[params[0]]["exp_avg"] = torch.ones_like(params[0])
        if step == 6:
            optimizer.state.clear()
        if step == 8:
            del optimizer.state[optimizer.param_groups[0]["params"].pop()]
            optimizer.param_groups[0]["param_names"].pop()
        if step == 10:
            with torch.no_grad():
                params[1].data = params[1].data.clone()

    same(in_groups, between=between)


def test_a_group_may_be_added():
    def make(model):
        optimizer = surefoot.AdamW(model.layers.parameters(), lr=0.01)
        optimizer.late = model.tied.weight
        return optimizer

    def between(optimizer, step):
        if step == 3:
            optimizer.add_param_group({"params": [optimizer.late], "lr": 0.1})

    (_, plain), (model, other) = (trained_without_check(make, between, released) for released in (False, True))
    assert_same(snapshot(other), snapshot(plain))
    loss_of(model, 0).backward()
    assert model.tied.weight.grad is None


@pytest.mark.parametrize("fast", [True, False])
def test_a_group_may_be_added_between_backward_and_step(fast):
    def train(*, released):
        model = Net()
        late = nn.Parameter(torch.ones(2))
        optimizer = surefoot.AdamW(model.layers.parameters(), lr=0.01, max_grad_value=None if fast else 1.0)
        if released:
            optimizer.release_gradients(model, bucket_bytes=SMALL)
        for step in range(5):
            loss_of(model, step).backward()
            if step == 2:
                optimizer.add_param_group({"params": [late, model.tied.weight], "lr": 0.1})
                late.grad = torch.ones(2)
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        return snapshot(optimizer)

    assert_same(train(released=True), train(released=False))


def trained_without_check(make, between, released):
    model = Net()
    optimizer = make(model)
    if released:
        optimizer.release_gradients(model, bucket_bytes=SMALL)
    for step in range(8):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        between(optimizer, step)
    return model, optimizer


@pytest.mark.parametrize("kept", ["state dict", "checkpoint"])
def test_training_resumes_inside(kept, tmp_path):
    make = all_params(surefoot.AdamW, lr=0.01, ema=0.9)
    expected = trained(make, STEPS)[1]
    model, optimizer = trained(make, 7, released={"bucket_bytes": SMALL})
    other, another = trained(make, 2, released={"bucket_bytes": SMALL})
    if kept == "checkpoint":
        surefoot.save(tmp_path / "it", model=model, optimizer=optimizer)
        surefoot.load(tmp_path / "it", model=other, optimizer=another)
    else:
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        of_model, of_optimizer = torch.load(file)
        other.load_state_dict(of_model)
        another.load_state_dict(of_optimizer)
    for step in range(7, STEPS):
        loss_of(other, step).backward()
        assert other.tied.weight.grad is None
        another.step()
        another.zero_grad()
    assert_same(snapshot(another), snapshot(expected))


def test_plans_are_kept():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    handle = optimizer.release_gradients(model, bucket_bytes=SMALL)
    lanes = []
    for _ in range(6):
        loss_of(model, 1).backward()
        optimizer.step()
        lanes.append([bucket.cache.fast for bucket in handle._buckets])
    assert len(lanes[-1]) > 1
    assert all(lanes[-1])
    assert lanes[-1] == lanes[-2]


# The training loop


def test_what_has_no_hook_is_stepped_by_step():
    def train(released):
        model = Net()
        outside = nn.Parameter(torch.ones(3))
        optimizer = surefoot.AdamW([*model.parameters(), outside], lr=0.01)
        if released:
            optimizer.release_gradients(model)
        for step in range(6):
            if step == 3:
                model.frozen.requires_grad_()
            (loss_of(model, step) + (outside**2).sum()).backward()
            assert (model.tied.weight.grad is None) is released
            assert outside.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    assert_same(train(released=True), train(released=False))


def test_several_backward_passes_of_different_parameters():
    def train(released):
        model, other = Net(), nn.Linear(3, 3)
        optimizer = surefoot.AdamW([*model.parameters(), *other.parameters()], lr=0.01)
        if released:
            optimizer.release_gradients(nn.ModuleList([model, other]))
        for step in range(4):
            loss_of(model, step).backward()
            other(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    assert_same(train(released=True), train(released=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant):
    def train(released):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01)
        handle = optimizer.release_gradients(model) if released else None
        for _ in range(5):
            x = torch.ones(2, 4, requires_grad=True)
            for layer in model:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if released:
            assert len(handle._buckets) == (4 if reentrant else 1)
            assert all(bucket.cache.fast for bucket in handle._buckets)
        return snapshot(optimizer)

    assert_same(train(released=True), train(released=False))


def accumulated(optimizer, model, handle, how):
    """Train with three micro-batches a step, of which the second does not use all parameters."""
    for step in range(6):
        for batch in range(3):
            if how == "context" and batch < 2:
                with handle.accumulate():
                    loss_of(model, 3 * step + batch).backward()
            else:
                loss_of(model, 3 * step + batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(optimizer)


@pytest.mark.parametrize("how", ["context", "number"])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_accumulation(how, bucket_bytes):
    made = [(model := Net(), surefoot.AdamW(model.parameters(), lr=0.01)) for _ in range(2)]
    (model, optimizer), (other, another) = made
    batches = {"micro_batches": 3} if how == "number" else {}
    handle = another.release_gradients(other, bucket_bytes=bucket_bytes, **batches)
    assert_same(accumulated(another, other, handle, how), accumulated(optimizer, model, None, "plain"))


def test_telemetry_gets_the_same():
    def train(released):
        model, telemetry = Net(), Noted(every=2)
        optimizer = surefoot.AdamW(model.named_parameters(), lr=0.01, telemetry=telemetry)
        if released:
            optimizer.release_gradients(model, bucket_bytes=SMALL)
        for step in range(6):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return telemetry.raw

    for ours, theirs in zip(train(released=True), train(released=False), strict=True):
        assert ours.step == theirs.step
        rows = [dict(zip(raw.names, raw.sums.tolist(), strict=True)) for raw in (ours, theirs)]
        assert rows[0] == rows[1]
        assert ours.lrs == theirs.lrs
        assert ours.seconds > 0


def test_telemetry_of_a_custom_step():
    def train(released):
        model, telemetry = Net(), Noted()
        optimizer = surefoot.Adafactor(model.named_parameters(), lr=0.01, telemetry=telemetry)
        if released:
            optimizer.release_gradients(model, bucket_bytes=SMALL)
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [dict(zip(raw.names, raw.sums.tolist(), strict=True)) for raw in telemetry.raw]

    assert train(released=True) == train(released=False)


# Clipping, and gradients that hold inf or NaN


def clipped_by_hand(make, steps, *, previous=None, each=None):
    """Train plainly, with gradients clipped as the options say; return optimizer and the factors."""
    model, before, factors = Net().double(), None, []
    optimizer = make(model)
    for step in range(steps):
        loss_of(model, step).backward()
        grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
        norms = [None if grad is None else grad.norm() for grad in grads]
        factor = 1.0 if before is None or previous is None else min(1.0, previous / (before + 1e-6))
        factors.append(factor)
        before = sum(norm**2 for norm in norms if norm is not None).sqrt().item()
        for grad, norm in zip(grads, norms, strict=True):
            if grad is not None:
                grad.mul_(factor * (1.0 if each is None else min(1.0, each / (norm.item() + 1e-6))))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, factors


CLIPS = {
    "previous": ({"max_previous_grad_norm": 1.0}, {"previous": 1.0}),
    "each": ({"max_param_grad_norm": 0.3}, {"each": 0.3}),
    "both": ({"max_previous_grad_norm": 1.0, "max_param_grad_norm": 0.3}, {"previous": 1.0, "each": 0.3}),
}
CLIPPED = {
    "AdamW": all_params(surefoot.AdamW, lr=0.01),
    "foreach": all_params(surefoot.AdamW, lr=0.01, foreach=True),
    "eager": all_params(surefoot.SGD, lr=0.01, foreach=False),
    "LAMB": all_params(surefoot.LAMB, lr=0.01, max_grad_norm=None),
    "Adafactor": all_params(surefoot.Adafactor, lr=0.01),
    "Combined": PARTS["custom steps"],
}


@pytest.mark.parametrize(("options", "by_hand"), CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.parametrize("make", CLIPPED.values(), ids=CLIPPED.keys())
def test_clipping(make, options, by_hand):
    expected, _ = clipped_by_hand(make, 6, **by_hand)
    found = []
    for bucket_bytes in (1, 2 * SMALL, 1 << 20):
        released = {"bucket_bytes": bucket_bytes, **options}
        found.append(trained(make, 6, released=released, model=Net().double())[1])
    for other in found[1:]:
        assert_same(snapshot(other), snapshot(found[0]))
    for ours, theirs in zip(params_of(found[0]), params_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kept", ["state dict", "checkpoint"])
def test_the_last_norm_is_resumed(kept, tmp_path):
    make, released = all_params(surefoot.AdamW, lr=0.01), {"max_previous_grad_norm": 0.5, "bucket_bytes": SMALL}
    expected = trained(make, 8, released=released)[1]
    model, optimizer = trained(make, 5, released=released)
    other = Net()
    another = make(other)
    if kept == "checkpoint":
        surefoot.save(tmp_path / "it", model=model, optimizer=optimizer)
        surefoot.load(tmp_path / "it", model=other, optimizer=another)
    else:
        other.load_state_dict(model.state_dict())
        another.load_state_dict(optimizer.state_dict())
    trained(make, 3, first=5, released=released, model=other, optimizer=another)
    assert_same(snapshot(another), snapshot(expected))


def test_telemetry_tells_how_gradients_were_clipped():
    model, telemetry = Net(), Noted()
    optimizer = surefoot.AdamW(model.named_parameters(), telemetry=telemetry)
    handle, before = optimizer.release_gradients(model, max_previous_grad_norm=1.0, bucket_bytes=SMALL), None
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        norm = optimizer.param_groups[0]["previous_grad_norm"]
        record = telemetry.raw[-1]
        assert record.sums[:, 0].sum().sqrt().item() == pytest.approx(norm)
        assert record.clip == pytest.approx(1.0 if before is None else min(1.0, 1.0 / (before + 1e-6)))
        before = norm
    handle.remove()
    assert "previous_grad_norm" not in optimizer.param_groups[0]


def test_a_norm_that_is_no_number_clips_nothing_later():
    model = Net()
    optimizer = surefoot.SGD(model.parameters(), lr=0.0)
    optimizer.release_gradients(model, max_previous_grad_norm=1.0)
    loss_of(model, 1).backward()
    optimizer.step()
    norm = optimizer.param_groups[0]["previous_grad_norm"]
    (loss_of(model, 1) * float("inf")).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["previous_grad_norm"] == norm


@pytest.mark.filterwarnings("ignore:a step leaves out")
def test_the_last_norm_is_of_gradients_that_were_used():
    def norms(bucket_bytes):
        model = Net()
        optimizer = surefoot.SGD(model.parameters())
        optimizer.release_gradients(
            model, bucket_bytes=bucket_bytes, max_previous_grad_norm=1.0, nonfinite_params="skip"
        )
        for step in range(3):
            (loss_of(model, 1) + (model.tied.weight.sum() * torch.nan if step < 2 else 0)).backward()
            optimizer.step()
            yield optimizer.param_groups[0]["previous_grad_norm"]

    alone = list(norms(1))
    assert alone == list(norms(1 << 20))
    assert alone[0] < alone[2]


def train_with_nan(make, released, at=3):
    """Train, one gradient of which is NaN once; plainly, it is then left out by hand."""
    model, telemetry = Net(), Noted()
    optimizer = make(model, telemetry=telemetry)
    outside = optimizer.param_groups[0]["params"][-1]
    if released:
        optimizer.release_gradients(model, bucket_bytes=SMALL, nonfinite_params="skip")
    for step in range(6):
        bad = (model.tied.weight, outside) if step == at else ()
        hooks = [param.register_hook(lambda grad: grad * float("nan")) for param in bad]
        (loss_of(model, step) + outside.square().sum()).backward()
        for param in () if released else bad:
            param.grad = None
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
    return optimizer, telemetry


NAMED_BY = {"AdamW": surefoot.AdamW, "Adafactor": surefoot.Adafactor}


@pytest.mark.parametrize("cls", NAMED_BY.values(), ids=NAMED_BY.keys())
def test_a_parameter_with_nan_is_left_out(cls):
    def make(model, **options):
        outside = ("outside", nn.Parameter(torch.ones(2, 2)))
        return cls([*model.named_parameters(), outside], lr=0.01, **options)

    with pytest.warns(
        RuntimeWarning, match="a step leaves out `tied.weight`, whose gradients hold inf or NaN"
    ) as found:
        ours, telemetry = train_with_nan(make, released=True)
    assert len(found) == 1
    assert found[0].filename == __file__
    plain, _ = train_with_nan(make, released=False)
    assert_same(snapshot(ours), snapshot(plain))
    assert ours.step_statistics.skipped_params == 2
    counts = dict(zip(telemetry.raw[3].names, telemetry.raw[3].sums[:, 4].tolist(), strict=True))
    assert {name: count for name, count in counts.items() if count} == {"tied.weight": 16, "outside": 4}


def test_a_parameter_with_nan_raises():
    model, optimizer, _ = begun(nonfinite_params="raise")
    model.tied.weight.register_hook(lambda grad: grad * float("nan"))
    before = snapshot(optimizer)
    with pytest.raises(NonFiniteGradientError, match=r"gradients of `tied.weight` hold inf or NaN; these parameters"):
        loss_of(model, 0).backward()
    assert_same(snapshot(optimizer), before)  # they are of one bucket
    with pytest.raises(NonFiniteGradientError, match="close the iteration with step"):
        optimizer.step()
    model.zero_grad()
    optimizer.step()


def test_hooks_run_at_step():
    model, calls = Net(), []
    optimizer = surefoot.AdamW(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with optimizer.release_gradients(model):
        loss_of(model, 0).backward()
        assert not calls
        optimizer.step()
    assert calls == ["pre", "post"]


def test_the_end_of_the_block_is_the_end_of_it():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    with optimizer.release_gradients(model) as handle:
        assert handle.active
    assert not handle.active
    loss_of(model, 0).backward()
    assert model.tied.weight.grad is not None
    optimizer.step()
    optimizer.release_gradients(model).remove()


def test_handle_keeps_nothing_alive():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    handle = optimizer.release_gradients(model)
    loss_of(model, 0).backward()
    optimizer.step()
    gone = [weakref.ref(model), weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
    del model, optimizer, handle
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_an_optimizer_that_is_gone_takes_no_gradients():
    def make(model):
        return surefoot.AdamW(model.parameters())

    model, other = Net(), Net()
    gc.disable()  # as long as nobody collects, what refers to itself is there
    try:
        handle = make(model).release_gradients(model)
        assert not handle.active
        trained(make, 3, model=other)
        trained(make, 3, model=model, released={})
        trained(make, 3, model=other)
        trained(make, 3, model=model)
    finally:
        gc.enable()
    handle.remove()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_copies_do_not_release():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    optimizer.release_gradients(model)
    copied = copy.deepcopy(optimizer)
    copied.step(lambda: torch.ones(()))
    assert copied.step_statistics.steps == 1


def test_a_constant_scale_is_taken_off_in_the_kernel():
    def train(released):
        model = Net()
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01)
        optimizer.grad_scale = torch.tensor(1024.0)
        if released:
            optimizer.release_gradients(model)
        for step in range(4):
            (1024.0 * loss_of(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    assert_same(train(released=True), train(released=False))


# What is refused


def begun(**options):
    model = Net()
    optimizer = surefoot.AdamW(model.named_parameters(), lr=0.01)
    return model, optimizer, optimizer.release_gradients(model, **options)


def test_a_backward_pass_that_fails_in_the_middle():
    model, optimizer, _ = begun(bucket_bytes=1)
    expected = Net()
    plain = surefoot.AdamW(expected.named_parameters(), lr=0.01)
    for each, of in ((model, optimizer), (expected, plain)):
        failing = each.layers[0].weight.register_hook(fail)
        with pytest.raises(OSError, match="in the middle"):
            loss_of(each, 1).backward()
        failing.remove()
        if of is optimizer:
            assert [each.tied.weight.grad, each.unused.weight.grad] == [None, None]  # stepped
            with pytest.raises(RuntimeError, match=r"after backward has stepped 3 of 5 .* Call step\(\) first"):
                of.zero_grad()
        of.step()
        of.zero_grad()
        loss_of(each, 2).backward()
        of.step()
        of.zero_grad()
    assert_same(snapshot(optimizer), snapshot(plain))


def fail(_):
    raise OSError("in the middle")


def test_a_graph_that_is_kept_knows_of_the_step():
    model, optimizer, _ = begun()
    loss = loss_of(model, 1)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_model_in_a_compiled_loop():
    def train(*, released):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width + 1) for width in range(4, 10)))  # more shapes than recompiles
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01)
        called = torch.compile(model, backend="eager") if released else model
        if released:
            optimizer.release_gradients(called, bucket_bytes=SMALL)
        return train_whole(called, optimizer, compiled=released)

    assert_same(train(released=True), train(released=False))


def test_a_second_gradient_is_refused():
    model, optimizer, _ = begun()
    loss_of(model, 1).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"`.*weight` has got another gradient after it was stepped; call step\(\)"):
        loss_of(model, 1).backward()
    assert_same(snapshot(optimizer), before)


def test_too_many_micro_batches_are_refused():
    model, optimizer, handle = begun(micro_batches=2)
    for _ in range(2):
        loss_of(model, 1).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"at the n-th \(now 2\)"), handle.accumulate():
        loss_of(model, 1).backward()
    assert_same(snapshot(optimizer), before)


def test_zero_grad_cannot_take_back_a_step():
    model, optimizer, _ = begun()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) was called after backward has stepped 4 of 5 parameters"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def test_zero_grad_drops_what_was_accumulated():
    model, optimizer, handle = begun()
    before = snapshot(optimizer)
    with handle.accumulate():
        loss_of(model, 0).backward()
    optimizer.zero_grad()
    assert model.tied.weight.grad is None
    assert_same(snapshot(optimizer), before)
    loss_of(model, 0).backward()
    optimizer.step()


def test_a_state_dict_is_made_between_iterations():
    model, optimizer, _ = begun()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) was called after backward has stepped"):
        optimizer.state_dict()
    optimizer.step()
    assert optimizer.state_dict()["state"]


def test_loading_begins_anew():
    model, optimizer, _ = begun()
    known = optimizer.state_dict()
    loss_of(model, 0).backward()
    optimizer.load_state_dict(known)
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_closures_are_refused():
    model, optimizer, _ = begun()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="was given a closure, but gradients are released while backward runs"):
        optimizer.step(lambda: loss_of(model, 0).backward())
    assert_same(snapshot(optimizer), before)
    optimizer.step(None)
    optimizer.step(closure=None)


def test_late_changes_of_options_are_refused():
    model, optimizer, _ = begun()
    loss_of(model, 0).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="options of param groups were changed after backward has stepped 4"):
        optimizer.step()


def test_a_gradient_given_afterwards_is_refused():
    model, optimizer, _ = begun()
    loss_of(model, 0).backward()
    model.tied.weight.grad = torch.ones_like(model.tied.weight)
    with pytest.raises(RuntimeError, match=r"`tied.weight` was given a gradient after it was stepped"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward")  # torch says so once in a process
def test_graphs_of_gradients_are_refused():
    model, optimizer, _ = begun()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        loss_of(model, 0).backward(create_graph=True)
    assert_same(snapshot(optimizer), before)


class OrNone(torch.autograd.Function):
    """A product with a weight, to which the backward gives a gradient or None."""

    @staticmethod
    def forward(ctx, weight, given):
        ctx.given, ctx.shape = given, weight.shape
        return weight * 2

    @staticmethod
    def backward(ctx, grad):
        return (grad * 2 if ctx.given else None), None


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_a_function_may_give_no_gradient(bucket_bytes):
    weights = []
    for released in (False, True):
        model = nn.ParameterList([torch.ones(2, 3), torch.ones(3)])
        optimizer = surefoot.AdamW(model.parameters(), lr=0.1)
        if released:
            optimizer.release_gradients(model, bucket_bytes=bucket_bytes)
        for given in (False, True, True, False, True, False):
            (OrNone.apply(model[0], given).sum() + model[1].square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([weight.detach() for weight in model])
    assert all(map(torch.equal, *weights))


def test_two_optimizers_of_one_parameter_are_refused():
    model, optimizer, _ = begun(bucket_bytes=1)
    other = surefoot.SGD(model.parameters())
    other.release_gradients(model)
    with pytest.raises(RuntimeError, match="is gone before it was released; another hook has dropped it"):
        loss_of(model, 0).backward()
    optimizer.step()


def test_a_grad_scaler_is_refused():
    model, optimizer, _ = begun()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="a GradScaler leaves out whole steps"):
        scaler.step(optimizer)
    optimizer.found_inf = torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="a GradScaler leaves out whole steps"):
        optimizer.step()


REFUSED = {
    "max_grad_norm": ({"max_grad_norm": 1.0}, "`max_grad_norm` needs the norm .* pass to release_gradients `max_prev"),
    "nonfinite": ({"nonfinite": "skip"}, "nonfinite='skip' looks at all gradients .* pass `nonfinite_params='skip'`"),
    "differentiable": ({"differentiable": True}, "differentiable=True keeps the graph of a step"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_that_need_all_gradients_are_refused(options, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        surefoot.AdamW(model.parameters(), **options).release_gradients(model)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("where", ["optimizer", "group"])
def test_options_set_later_are_refused(where, fast):
    model, optimizer, _ = begun()
    for _ in range(4 * fast):
        loss_of(model, 0).backward()
        optimizer.step()
    if where == "optimizer":
        optimizer.step_options.max_grad_norm = 1.0
    else:
        optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="`max_grad_norm` needs the norm of all gradients"):
        loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="`max_grad_norm` needs the norm of all gradients"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


class Own(surefoot.Optimizer):
    """A custom step of a user."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        return closure


class Stepping(surefoot.AdamW):
    """A rule with a custom step around it."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("cls", [surefoot.LBFGS, Own, Stepping], ids=lambda cls: cls.__name__)
def test_custom_steps_are_refused(cls):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=f"{cls.__name__} has a custom step that takes all parameters at once"):
        cls(model.parameters()).release_gradients(model)


def test_what_is_given_is_checked():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    with pytest.raises(TypeError, match="needs the model, a torch.nn.Module, but got list"):
        optimizer.release_gradients(list(model.parameters()))
    with pytest.raises(ValueError, match="no parameter of AdamW that requires a gradient is one of the model's"):
        optimizer.release_gradients(nn.Linear(2, 2))
    for name in ("micro_batches", "bucket_bytes"):
        for value in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1, but is {value!r}"):
                optimizer.release_gradients(model, **{name: value})
    for name in ("max_previous_grad_norm", "max_param_grad_norm"):
        for value, error in ((0.0, ValueError), (math.nan, ValueError), (True, TypeError)):
            with pytest.raises(error, match=f"`{name}` must be a number > 0, or None, but is: {value}"):
                optimizer.release_gradients(model, **{name: value})
    with pytest.raises(ValueError, match="`nonfinite_params` must be one of 'ignore', 'skip', 'raise', but is 'drop'"):
        optimizer.release_gradients(model, nonfinite_params="drop")
    optimizer.release_gradients(model)
    with pytest.raises(RuntimeError, match="gradients are released already"):
        optimizer.release_gradients(model)


def test_what_steps_all_parameters_together_is_refused():
    model = Net()
    with pytest.raises(RuntimeError, match="Prodigy sums over all parameters before the first is stepped"):
        surefoot.Prodigy(model.parameters()).release_gradients(model)


def test_a_parameter_that_stands_there_twice_is_refused():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = surefoot.AdamW([model.weight, model.weight])
    with pytest.raises(RuntimeError, match="a parameter stands in the groups twice"):
        optimizer.release_gradients(model)


def test_without_torchs_private_names_step_does_the_rest(monkeypatch):
    monkeypatch.setattr("surefoot.tensors.backward._available", False)

    def train(released):
        model = Net()
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01)
        if released:
            optimizer.release_gradients(model, bucket_bytes=SMALL)
        for step in range(5):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    assert_same(train(released=True), train(released=False))
