"""The optimizer on the CPU, parameters on a device: the numbers of the plain step, late copies, and what is refused."""

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

import surefoot
from conformance import ROWS
from helpers import Noted, assert_same, snapshot, train_whole
from surefoot.tensors import links
from test_release import Net, OrNone, in_groups, loss_of

STEPS = 6
SMALL = 256
"""Bytes of a bucket that holds one or two of the test's parameters."""
TAKEN = [row.ours for row in ROWS if row.name != "LBFGS"]
MASTERS = {"master_weight_bits": 32, "state_dtype": torch.float32}
"""Options under which 16-bit weights have masters in float32, and state too."""


class LateLink(links.Link):
    """Copies as late as a device may make them; whoever reads before that reads NaN.

    It raises where memory of the host is written while a copy from there may be under way.

    Attributes:
        log: what was asked, and waited for, in order.
    """

    def __init__(self, log):
        self.log, self.down, self.up, self.joined = log, [], [], []

    def host_memory(self, count):
        return torch.empty(count, dtype=torch.uint8)

    def fetch(self, source, target):
        assert not any(target is kept for kept, _ in self.joined)
        made = (source.detach().clone(), target)  # a device does in order what it is asked
        self.down.append(made)
        self.log.append("fetch")
        return self._asked(made)

    def send(self, source, target):
        made = (source, target)
        self.up.append(made)
        self.log.append("send")
        return self._asked(made)

    def _asked(self, made):
        made[1].fill_(torch.nan)
        return made

    def wait(self, copy):
        self.log.append("wait")
        while any(copy is made for made in self.down):
            source, target = self.down.pop(0)
            target.data.copy_(source)
        if any(copy is made for made in self.up):
            self.join()
        for source, then in self.joined:
            assert torch.equal(source, then), "written while it was being sent"
        self.joined = [(source, then) for source, then in self.joined if source is not copy[0]]

    def join(self):
        for source, target in self.up:
            target.data.copy_(source)  # the host's memory is read as late as that
            self.joined.append((source, source.clone()))
        self.up.clear()


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """What was asked of links."""
    found = []
    monkeypatch.setattr(links, "make_link", lambda _: LateLink(found))
    return found


def trained(make, steps=STEPS, *, offloaded=None, sparse=False, between=None, model=None, first=0, passes=1):
    """Train with the options `offloaded` of `offload`, or plainly; return model and optimizer."""
    model = model or Net(sparse=sparse)
    optimizer = make(model)
    if offloaded is not None:
        optimizer.offload(model, **offloaded)
    for step in range(first, first + steps):
        for part in range(passes):
            loss_of(model, step + part).backward()
        optimizer.step()
        optimizer.zero_grad()
        if between is not None:
            between(model, optimizer, step)
    return model, optimizer


def same(make, sizes=(SMALL,), **options):
    """Assert that training is the same where the optimizer is offloaded."""
    model, plain = trained(make, **options)
    for size in sizes:
        other, offloaded = trained(make, offloaded={"bucket_bytes": size}, **options)
        assert_same(snapshot(offloaded), snapshot(plain))
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert vars(offloaded.step_statistics) == vars(plain.step_statistics)


def accepts(cls, dtype):
    """Return options of masters for those algorithms that take them."""
    if dtype is torch.float32 or cls.__name__ in ("Adafactor", "SOAP", "SparseAdam"):
        return {}
    return MASTERS


@pytest.mark.parametrize("cls", TAKEN, ids=lambda cls: cls.__name__)
def test_offloaded_is_plain(cls):
    only_sparse = cls.__name__ == "SparseAdam"
    dtype = torch.float32 if only_sparse else torch.bfloat16

    def make(model):
        params = model.embed.parameters() if only_sparse else model.to(dtype).named_parameters()
        return cls(params, lr=0.01, max_grad_norm=0.05, **accepts(cls, dtype))

    same(make, sparse=only_sparse)


class Masters:
    """What offloading is to be the same as: float32 masters, stepped plainly by 16-bit gradients, and 16-bit copies."""

    def __init__(self, cls, model, **options):
        self.params = list(model.parameters())
        self.masters = [nn.Parameter(param.detach().float()) for param in self.params]
        self.optimizer = cls(self.masters, **options)

    def step(self):
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                nearest = (master.view(torch.int32) + 0x8000) >> 16  # ties away from zero
                param.copy_(nearest.to(torch.int16).view(torch.bfloat16))

    def zero_grad(self):
        for param in self.params:
            param.grad = None


@pytest.mark.parametrize(
    "cls", [cls for cls in TAKEN if cls.is_rule() and cls.__name__ != "SparseAdam"], ids=lambda cls: cls.__name__
)
def test_masters_are_those_of_plain_training_in_float32(cls):
    expected = Net().to(torch.bfloat16)
    eager = {"lr": 0.01, "foreach": False}  # kernels of different formats contract products and sums differently
    plain = Masters(cls, expected, **eager)
    for step in range(STEPS):
        loss_of(expected, step).backward()
        plain.step()
        plain.zero_grad()
    model, optimizer = trained(lambda m: cls(m.to(torch.bfloat16).parameters(), **eager, **MASTERS), offloaded={})
    for param, theirs, master in zip(model.parameters(), plain.params, plain.masters, strict=True):
        assert torch.equal(param, theirs)
        assert torch.equal(surefoot.full_precision(optimizer, param), master)


OPTIONS = {
    "eager": {"foreach": False},
    "foreach": {"foreach": True},
    "ema": {"ema": 0.9},
    "max_grad_value": {"max_grad_value": 0.01},
    "cautious": {"cautious": True},
    "centralized": {"gradient_centralization": True, "max_grad_norm": 0.1},
    "float8": {"state_dtype": "float8"},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 3},
    "24 bits": {"master_weight_bits": 24, "state_dtype": "float8"},
    "32 bits": MASTERS | {"nonfinite": "skip"},
    "zero_grad_after_step": {"zero_grad_after_step": True},
    "amsgrad": {"amsgrad": True, "maximize": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_offloaded_is_plain_with_options(options):
    same(lambda model: surefoot.AdamW(model.to(torch.bfloat16).named_parameters(), lr=0.01, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_offloaded_is_plain_in_other_dtypes(dtype):
    options = {} if dtype is torch.float64 else MASTERS
    same(lambda model: surefoot.AdamW(model.to(dtype).named_parameters(), lr=0.01, max_grad_norm=0.1, **options))


def test_sizes_of_buckets():
    def make(model):
        return surefoot.LAMB(model.named_parameters(), lr=0.01, max_grad_norm=0.1)

    same(make, sizes=(1, 300, 1 << 20))


def test_groups_schedules_and_options_that_change():
    def make(model):
        optimizer = in_groups(model)
        optimizer.scheduler = surefoot.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return optimizer

    def between(model, optimizer, step):
        optimizer.scheduler.step()
        if step == 1:
            optimizer.param_groups[1]["weight_decay"] = 0.3
            optimizer.param_groups[0]["amsgrad"] = True
        if step == 2:
            optimizer.add_param_group({"params": [("late", model.late)]})
        if step == 3:
            optimizer.state.pop(model.tied.weight)
        if step == 4:
            del optimizer.state[optimizer.param_groups[0]["params"].pop()]
            optimizer.param_groups[0]["param_names"].pop()

    def with_late(make):
        def made(model):
            model.late = model.frozen.weight.requires_grad_()
            return make(model)

        return made

    same(with_late(make), steps=8, between=between)


def test_weights_that_are_written_count():
    def between(model, optimizer, step):
        with torch.no_grad():
            if step == 0:
                model.tied.weight.mul_(0.5)
            if step == 1:
                model.tied.weight.data.clamp_(-0.1, 0.1)  # which no version tells
            if step == 2:
                model.load_state_dict(Net().state_dict())
            if step == 3:
                model.embed.weight.data = model.embed.weight.detach() * 2
            if step == 4:
                model.tied.weight.data.neg_()

    same(lambda m: surefoot.AdamW(m.to(torch.bfloat16).named_parameters(), lr=0.01, **MASTERS), between=between)


def test_a_model_may_change_its_dtype():
    def between(model, optimizer, step):
        if step == 2:
            model.double()
            optimizer.state.clear()

    same(lambda m: surefoot.SGD(m.parameters(), lr=0.01, momentum=0.9), between=between)


def test_a_model_may_have_had_another_dtype_in_between():
    def change(model, _, step):
        if step == 1:
            model.float().double()

    same(lambda m: surefoot.AdamW(m.double().parameters()), between=change, passes=2)


def test_weights_written_through_data_count_where_another_parameter_goes():
    def change(model, optimizer, step):
        if step == 1:
            model.tied.weight.data.mul_(0.5)
            params = optimizer.param_groups[0]["params"]
            optimizer.state.pop(model.unused.weight, None)
            params[:] = [param for param in params if param is not model.unused.weight]

    same(lambda m: surefoot.AdamW(m.parameters(), lr=0.01), between=change)


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16, lambda m: m.half().float(), nn.Module.cpu])
def test_a_model_may_be_converted_while_it_has_gradients(convert):
    def between(model, optimizer, step):
        loss_of(model, step).backward()
        convert(model)
        optimizer.step()
        optimizer.zero_grad()

    same(lambda m: surefoot.SGD(m.parameters(), lr=0.01), steps=2, between=between)


def test_weights_may_be_of_another_dtype_than_the_gradients_that_have_come():
    def between(model, optimizer, step):
        loss_of(model, step).backward()
        for param in model.parameters():
            param.data = param.data.double()
        optimizer.step()
        optimizer.zero_grad()

    same(lambda m: surefoot.SGD(m.parameters(), lr=0.01), steps=2, between=between)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_the_order_of_elements_may_change_while_gradients_accumulate():
    def run(*, offloaded):
        model = Net().to(torch.bfloat16)
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01)
        if offloaded:
            optimizer.offload(model)
        for step in range(4):
            loss_of(model, step).backward()
            weight = model.layers[0].weight
            if step % 2:
                weight.data = weight.data.t().contiguous().t()
            loss_of(model, step + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                optimizer.state.clear()
        return model, optimizer

    (model, plain), (other, optimizer) = run(offloaded=False), run(offloaded=True)
    assert_same(snapshot(optimizer), snapshot(plain))
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_a_parameter_that_thaws_has_its_state_once():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    trained(lambda _: optimizer, model=model, steps=2)
    model.tied.weight.requires_grad_(False)
    optimizer.offload(model)
    optimizer.state_dict()
    model.tied.weight.requires_grad_(True)
    loss_of(model, 2).backward()
    optimizer.step()
    assert all(isinstance(key, int) for key in optimizer.state_dict()["state"])


def test_frozen_parameters_may_be_trained_later():
    def between(model, optimizer, step):
        model.frozen.requires_grad_(step % 2 == 0)

    same(lambda m: surefoot.AdamW(m.parameters(), lr=0.01), between=between)


def test_averages_and_modes():
    def ema(model, optimizer, step):
        with optimizer.ema_parameters():
            optimizer.seen = [param.detach().clone() for param in model.parameters()]

    def modes(model, optimizer, step):
        with optimizer.eval_mode():
            optimizer.seen = [param.detach().clone() for param in model.parameters()]
        optimizer.eval()
        optimizer.saved = copy.deepcopy(optimizer.state_dict())
        optimizer.train()

    for make, between in (
        (lambda m: surefoot.AdamW(m.to(torch.bfloat16).parameters(), lr=0.01, ema=0.5, **MASTERS), ema),
        (lambda m: surefoot.AdamWScheduleFree(m.to(torch.bfloat16).parameters(), lr=0.01, **MASTERS), modes),
    ):
        _, plain = trained(make, between=between)
        _, offloaded = trained(make, between=between, offloaded={})
        assert_same(offloaded.seen, plain.seen)
        assert_same(snapshot(offloaded), snapshot(plain))
        assert_same(offloaded.state_dict(), plain.state_dict())
        if between is modes:
            assert_same(offloaded.saved, plain.saved)


def test_several_algorithms():
    def make(model):
        return surefoot.Combined(
            model.named_parameters(),
            [surefoot.Part(surefoot.Muon, "layers.*", lr=0.02), surefoot.Part(surefoot.AdamWScheduleFree)],
            max_grad_norm=0.1,
        )

    def between(model, optimizer, step):
        with optimizer.eval_mode():
            loss_of(model, step)

    same(make, between=between)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_resume_is_exact(order):
    def make(model):
        return surefoot.AdamW(model.to(torch.bfloat16).named_parameters(), lr=0.01, **MASTERS)

    model, optimizer = trained(make, offloaded={})
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    found = []
    for offloaded in (True, False):
        again = Net().to(torch.bfloat16)
        theirs = make(again)
        if offloaded:
            theirs.offload(again)
        loads = [lambda a=again: a.load_state_dict(saved[0]), lambda o=theirs: o.load_state_dict(saved[1])]
        for load in loads if order == "model first" else reversed(loads):
            load()
        trained(lambda _, o=theirs: o, model=again, first=STEPS)
        found.append(snapshot(theirs))
    trained(lambda _: optimizer, model=model, first=STEPS)
    assert_same(found[0], snapshot(optimizer))
    assert_same(found[1], snapshot(optimizer))


def test_checkpoints(tmp_path):
    def make(model):
        return surefoot.AdamW(model.to(torch.bfloat16).named_parameters(), lr=0.01, **MASTERS)

    model, optimizer = trained(make, offloaded={})
    surefoot.save(tmp_path / "checkpoint", model=model, optimizer=optimizer)
    again = Net().to(torch.bfloat16)
    theirs = make(again)
    theirs.offload(again)
    surefoot.load(tmp_path / "checkpoint", model=again, optimizer=theirs)
    for pair in ((model, optimizer), (again, theirs)):
        trained(lambda _, o=pair[1]: o, model=pair[0], first=STEPS)
    assert_same(snapshot(theirs), snapshot(optimizer))


def test_it_may_begin_and_end_while_training():
    def make(model):
        return surefoot.AdamW(model.to(torch.bfloat16).named_parameters(), lr=0.01, **MASTERS)

    def between(model, optimizer, step):
        if step == 1:
            optimizer.handle = optimizer.offload(model)
        if step == 3:
            loss_of(model, step).backward()
            optimizer.handle.remove()
            optimizer.handle.remove()
            assert all(type(p.grad) is torch.Tensor for p in model.parameters() if p.grad is not None)
            optimizer.zero_grad()
            optimizer.offload(model).remove()

    def plainly(model, optimizer, step):
        if step == 3:
            loss_of(model, step).backward()
            optimizer.zero_grad()

    ours, theirs = trained(make, between=between), trained(make, between=plainly)
    assert_same(snapshot(ours[1]), snapshot(theirs[1]))
    loss_of(ours[0], 1).backward()  # the hooks are gone
    assert type(ours[0].tied.weight.grad) is torch.Tensor


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [2, 3])
def test_gradients_accumulate(dtype, passes):
    same(lambda m: surefoot.AdamW(m.to(dtype).parameters(), lr=0.01, max_grad_norm=0.1), passes=passes)


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False), (True, False, True)], ids=str)
def test_a_function_may_give_no_gradient(given):
    weights = []
    for offloaded in (False, True):
        weight = nn.Parameter(torch.ones(2, 3))
        optimizer = surefoot.SGD([weight], lr=0.1)
        if offloaded:
            optimizer.offload(nn.ParameterList([weight]))
        for _ in range(2):
            for each in given:
                OrNone.apply(weight, each).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(weight.detach())
    assert torch.equal(*weights)


def test_gradients_are_those_that_have_not_been_dropped():
    def between(model, optimizer, step):
        loss_of(model, 3).backward()
        if step == 0:
            model.zero_grad()
        if step == 1:
            model.tied.weight.grad = None
        if step == 2:
            optimizer.zero_grad(set_to_none=False)
        if step == 3:
            optimizer.step()  # again, with what is there
        if step == 4:
            model.tied.weight.grad = torch.ones_like(model.tied.weight)
        if step == 5:
            torch.autograd.grad(loss_of(model, 1), [model.tied.weight])

    same(lambda m: surefoot.SGD(m.parameters(), lr=0.01, momentum=0.9), steps=8, between=between)


def raise_once(param, at):
    """Let a hook ahead of all others raise when a gradient of the parameter comes for the nth time."""
    count = itertools.count(1)

    def hook(_):
        if next(count) == at:
            raise ArithmeticError("of a hook")

    param.register_post_accumulate_grad_hook(hook)


def drop_others(model, optimizer):
    weight = model.tied.weight
    optimizer.zero_grad()
    weight.grad = torch.ones_like(weight)


def go_on(then):
    def run(model, optimizer):
        then(model, optimizer)
        loss_of(model, 4).backward()

    return run


AFTER_A_FAILURE = {
    "step": lambda *_: None,
    "backward": go_on(lambda *_: None),
    "zero": go_on(lambda m, o: o.zero_grad(set_to_none=False)),
    "drop": go_on(lambda m, o: o.zero_grad()),
    "given": drop_others,
    "given, backward": go_on(drop_others),
    "cast": lambda m, _: m.bfloat16(),
    "remove": lambda m, o: o._offloaded.remove() if o._offloading() else None,
}


@pytest.mark.parametrize("then", AFTER_A_FAILURE.values(), ids=AFTER_A_FAILURE)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_hook_that_raises_loses_no_gradient(then, at):
    weights = []
    for offloaded in (False, True):
        model = Net()
        raise_once(model.tied.weight, at)
        optimizer = surefoot.SGD(model.parameters(), lr=0.01)
        if offloaded:
            optimizer.offload(model)
        for step in range(3):
            with contextlib.suppress(ArithmeticError):
                loss_of(model, step).backward()
        then(model, optimizer)
        optimizer.step()
        weights.append(list(model.parameters()))
    assert all(map(torch.equal, *weights))


def test_hooks_are_called_in_their_order():
    found = []
    weight = nn.Parameter(torch.ones(2))
    weight.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.tolist()))
    optimizer = surefoot.SGD([weight], lr=0.1)
    optimizer.offload(nn.ParameterList([weight]))
    weight.register_post_accumulate_grad_hook(lambda p: found.append(p.grad is not None and "away"))
    (3 * weight).sum().backward()
    assert found == [[3.0, 3.0], "away"]


def test_closures():
    def between(model, optimizer, step):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.losses = [*getattr(optimizer, "losses", ()), optimizer.step(closure).item()]

    same(lambda m: surefoot.AdamW(m.parameters(), lr=0.01), between=between)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_graphs_of_gradients():
    def between(model, optimizer, step):
        loss_of(model, step).backward(create_graph=True)
        optimizer.step()

    same(lambda m: surefoot.AdamW(m.parameters(), lr=0.01), between=between)


def test_bad_gradients_change_nothing():
    def between(model, optimizer, step):
        loss_of(model, step).backward()
        if step == 2:
            model.tied.weight.grad = torch.full_like(model.tied.weight, torch.inf)
        optimizer.step()

    def make(model):
        return surefoot.AdamW(model.parameters(), lr=0.01, nonfinite="skip")

    with pytest.warns(RuntimeWarning, match="step 6 was skipped"):
        same(make, between=between)


def test_telemetry():
    found = []
    for offloaded in (None, {}):
        _, optimizer = trained(
            lambda m: surefoot.AdamW(m.named_parameters(), lr=0.01, telemetry=Noted()), offloaded=offloaded
        )
        found.append([dict(zip(raw.names, raw.sums.tolist(), strict=True)) for raw in optimizer.telemetry.raw])
    assert found[0] == found[1]


def test_gradients_on_the_cpu_cannot_be_taken_for_none():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters(), fused=True)
    optimizer.offload(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="this gradient is in the CPU's memory.*`max_grad_norm`"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.unscale_(optimizer)


def test_sparse_gradients_are_not_added_to_what_is_away():
    model = nn.Embedding(4, 3)
    optimizer = surefoot.SGD(model.parameters(), lr=0.1)
    optimizer.offload(model)
    model(torch.tensor([1])).sum().backward()
    model.sparse = True
    with pytest.raises(RuntimeError, match="cannot be added to one that is in the CPU's memory"):
        model(torch.tensor([1])).sum().backward()


# Copies


def test_copies_overlap_with_steps(log):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = surefoot.AdamW(model.parameters(), lr=0.01)
    optimizer.offload(model, bucket_bytes=64)  # a matrix or a vector
    model(torch.ones(2, 4)).sum().backward()
    assert log.count("fetch") == 2 * 6  # weights at first, gradients
    log.clear()
    optimizer.step()
    assert log[:3] == ["wait", "send", "wait"]  # one of six goes back while others are still on the way
    assert log == ["wait", "send"] * 6
    log.clear()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert log[:6] == ["fetch"] * 6
    assert log[-6:] == ["send"] * 6


def test_a_link_that_blocks(monkeypatch):
    monkeypatch.undo()
    same(lambda m: surefoot.AdamW(m.to(torch.bfloat16).parameters(), lr=0.01, **MASTERS), sizes=(1, 1 << 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("passes", [1, 2])
def test_copies_on_streams_are_those_that_block(monkeypatch, passes):
    found = []
    for link in (links.StreamLink, lambda _: links.BlockingLink()):
        monkeypatch.setattr(links, "make_link", link)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12))).to("cuda", torch.bfloat16)
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01, max_grad_norm=1.0, **MASTERS)
        optimizer.offload(model, bucket_bytes=1 << 20)
        for step in range(10):
            for part in range(passes):
                rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(step + part))
                model(rows.to("cuda", torch.bfloat16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([param.cpu() for param in model.parameters()])
    assert all(map(torch.equal, *found))


def test_layouts_of_memory():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
            self.view = nn.Parameter(torch.randn(6, 6)[:, ::2])
            self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.empty = nn.Parameter(torch.randn(0, 3))

        def forward(self, step):
            x = self.conv(torch.ones(1, 3, 4, 4).to(memory_format=torch.channels_last)).sum()
            return x + self.view.square().sum() + (self.complex * (1 + 2j)).abs().sum() + self.empty.sum()

    found = []
    for offloaded in (None, {"bucket_bytes": 100}):
        model = Conv()
        optimizer = surefoot.AdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)
        trained(lambda _, o=optimizer: o, model=model, offloaded=offloaded)
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_nothing_is_kept_alive():
    model = Net()
    optimizer = surefoot.AdamW(model.parameters())
    handle = weakref.ref(optimizer.offload(model))
    loss_of(model, 0).backward()
    optimizer.step()
    del optimizer
    gc.collect()
    assert handle() is None
    model.zero_grad()
    loss_of(model, 0).backward()
    assert type(model.tied.weight.grad) is torch.Tensor


@pytest.mark.parametrize("kept", [True, False], ids=["with its handle", "whole"])
def test_gradients_of_an_optimizer_that_is_gone(kept):
    def train(*, offloaded):
        model = Net()
        optimizer = surefoot.AdamW(model.parameters())
        handle = optimizer.offload(model) if offloaded else None
        loss_of(model, 0).backward()
        if not (offloaded or kept):
            model.zero_grad()
        del optimizer
        if not kept:
            del handle
        gc.collect()
        loss_of(model, 0).backward()
        return [param.grad for param in model.parameters()]

    assert_same(train(offloaded=True), train(offloaded=False))


# What is refused


def adamw(model):
    return surefoot.AdamW(model.parameters())


def test_a_compiled_loop():
    def train(*, offloaded):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width + 1) for width in range(4, 10)))  # more shapes than recompiles
        optimizer = adamw(model)
        if offloaded:
            optimizer.offload(model)
        return train_whole(model, optimizer, compiled=offloaded)

    assert_same(train(offloaded=True), train(offloaded=False))


def test_gradients_of_another_dtype():
    class Widened(torch.autograd.Function):
        @staticmethod
        def forward(_, weight):
            return weight.float()

        @staticmethod
        def backward(_, grad):
            return grad

    def train(*, offloaded):
        torch.manual_seed(0)
        model = nn.ParameterList(torch.randn(4, 4).to(torch.bfloat16) for _ in range(2))
        for param in model:
            param.grad_dtype = None
        optimizer = adamw(model)
        if offloaded:
            optimizer.offload(model)
        for _ in range(2):
            for _ in range(2):
                sum(Widened.apply(param).square().sum() for param in model).backward()
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's dtype only")
    assert_same(train(offloaded=True), train(offloaded=False))


def test_an_optimizer_that_is_gone_takes_no_gradients():
    model, other = Net(), Net()
    gc.disable()  # as long as nobody collects, what refers to itself is there
    try:
        handle = trained(adamw, model=model)[1].offload(model)
        assert not handle.active
        trained(adamw, model=other)
        trained(adamw, model=model, offloaded={})
        trained(adamw, model=other)
    finally:
        gc.enable()
    handle.remove()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_two_optimizers_cannot_have_one_gradient():
    model = Net()
    optimizers = [surefoot.AdamW(model.parameters()) for _ in range(2)]
    handles = [optimizer.offload(model) for optimizer in optimizers]
    with pytest.raises(RuntimeError, match="where another optimizer that is offloaded has it; remove"):
        loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="where another optimizer that is offloaded has it; remove"):
        optimizers[1].step()
    handles[0].remove()
    model.zero_grad()
    loss_of(model, 0).backward()
    optimizers[1].step()
    assert optimizers[1].state[model.tied.weight]["step"] == 1


def test_what_is_interrupted_while_it_is_sent_is_sent_later(monkeypatch):
    weights = []
    for offloaded in (False, True):
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        optimizer = surefoot.SGD(model.parameters(), lr=0.1)
        handle = optimizer.offload(model) if offloaded else None
        for step in range(3):
            model(torch.ones(1, 3)).sum().backward()
            if step == 1 and handle is not None:
                with monkeypatch.context() as patch:
                    patch.setattr(handle, "send", interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        optimizer.step()
                assert optimizer.param_groups[0]["params"][0] is model.weight
                assert not handle.inside
            else:
                optimizer.step()
            optimizer.zero_grad()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def interrupt(_):
    raise KeyboardInterrupt


def test_it_may_end_in_a_closure():
    def run(*, offloaded):
        model = Net()
        optimizer = surefoot.AdamW(model.parameters())
        handle = optimizer.offload(model) if offloaded else None

        def closure():
            loss_of(model, 0).backward()
            if handle is not None:
                handle.remove()

        optimizer.step(closure)
        optimizer.zero_grad()
        return trained(lambda _: optimizer, model=model)

    (model, plain), (other, optimizer) = run(offloaded=False), run(offloaded=True)
    assert_same(snapshot(optimizer), snapshot(plain))
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_what_cannot_be_offloaded_is_refused():
    model = Net()
    params = list(model.parameters())
    with pytest.raises(TypeError, match="LBFGS has a custom step that takes all parameters at once; it can be"):
        surefoot.LBFGS(params).offload(model)
    with pytest.raises(TypeError, match="offload needs the model, a torch.nn.Module, but got list"):
        surefoot.SGD(params).offload(params)
    with pytest.raises(ValueError, match="no parameter of the optimizer is one of the model's"):
        surefoot.SGD(params).offload(Net())
    with pytest.raises(ValueError, match="`bucket_bytes` must be an integer >= 1, but is 0"):
        surefoot.SGD(params).offload(model, bucket_bytes=0)
    with pytest.raises(ValueError, match="differentiable=True wants parameters to be stepped on their device"):
        surefoot.SGD(params, differentiable=True).offload(model)
    model.tied.weight.data = model.unused.weight.data
    with pytest.raises(RuntimeError, match="share memory, of which each would have a copy"):
        surefoot.SGD(params).offload(model)
    with pytest.raises(RuntimeError, match="has no memory that can be copied"):
        surefoot.SGD(model.to("meta").parameters()).offload(model)


def test_it_excludes_released_gradients_and_itself():
    model = Net()
    optimizer = surefoot.SGD(model.parameters())
    with optimizer.offload(model):
        with pytest.raises(RuntimeError, match="the optimizer is offloaded already; remove"):
            optimizer.release_gradients(model)
        with pytest.raises(RuntimeError, match="the optimizer is offloaded already; remove"):
            optimizer.offload(model)
    with optimizer.release_gradients(model), pytest.raises(RuntimeError, match="gradients are released already"):
        optimizer.offload(model)
    optimizer.offload(model)


def test_refused_options_leave_everything_as_it_was():
    model = Net()
    optimizer = surefoot.SGD(model.parameters(), lr=0.1)
    optimizer.offload(model)
    loss_of(model, 0).backward()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable=True wants parameters to be stepped on their device"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = False
    assert_same(snapshot(optimizer), before)
    optimizer.step()
