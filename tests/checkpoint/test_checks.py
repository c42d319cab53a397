"""What `load` refuses: each message says which and what to do, and nothing has changed."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from checkpoint_helpers import make, state_of, train
from torch import nn

import surefoot
from helpers import assert_same
from surefoot import lr_scheduler
from surefoot.lr_scheduler import Schedule, schedules


def net(*, width=4, bias=True, dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, width, bias=bias), nn.Linear(width, 2)).to(dtype)


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    model = net()
    optimizer = surefoot.AdamW(model.parameters(), lr=0.1, foreach=False)
    return surefoot.save(tmp_path, model=train(model, optimizer), optimizer=optimizer, extra=[1])


def refused(path, message, error=ValueError, **objects):
    """Assert that loading is refused with a message, and that objects and generators are as they were."""
    named = [value for value in objects.values() if hasattr(value, "state_dict")]
    before = [*state_of(*named), torch.get_rng_state(), random.getstate()]
    options = {
        name: [tensor.data_ptr() for tensor in one.parameters()]
        for name, one in objects.items()
        if isinstance(one, nn.Module)
    }
    with pytest.raises(error, match=message):
        surefoot.load(path, **objects)
    assert_same([*state_of(*named), torch.get_rng_state(), random.getstate()], before)
    assert options == {name: [tensor.data_ptr() for tensor in objects[name].parameters()] for name in options}


MODELS = [
    (lambda: net(width=5), r"`0.weight` was saved with shape \(4, 3\), in the model it has \(5, 3\)"),
    (lambda: net(bias=False), r"`0.bias` of shape \(4,\) was saved, but is not in the model"),
    (
        lambda: nn.Sequential(*net(), nn.Linear(2, 2)),
        r"`2.weight` of shape \(2, 2\) is in the model, but was not saved",
    ),
    (
        lambda: net(dtype=torch.float64),
        r"`0.weight` was saved as torch.float32, in the model it is torch.float64; load into",
    ),
    (lambda: nn.ModuleDict({"a": net()}), r"`a.0.weight` of shape \(4, 3\) is in the model.*"),
]


@pytest.mark.parametrize(("make_model", "message"), MODELS)
def test_another_model(path, make_model, message):
    model = make_model()
    refused(path, r"(?s)does not fit; nothing was loaded.*model: " + message + ".*Use rename=", model=model)


def test_the_optimizer_is_left_alone_if_the_model_does_not_fit(path):
    model = net(width=5)
    refused(path, "does not fit", model=model, optimizer=surefoot.AdamW(net().parameters()))


def test_another_optimizer(path):
    refused(path, "optimizer: AdamW was saved, this is SGD", optimizer=surefoot.SGD(net().parameters()))


def test_an_optimizer_of_other_parameters(path):
    model = net(width=5)
    optimizer = surefoot.AdamW(model.named_parameters())
    refused(path, r"optimizer: `0.weight` was saved with shape \(4, 3\), here it has \(5, 3\)", optimizer=optimizer)
    unnamed = surefoot.AdamW(model.parameters())
    refused(path, r"optimizer: `0.weight` was saved with shape \(4, 3\), here it has \(5, 3\)", optimizer=unnamed)


def test_an_optimizer_of_fewer_parameters(path):
    model = net()
    refused(path, "(?s)unexpected: parameter `1.bias`", optimizer=surefoot.AdamW([*model.named_parameters()][:3]))
    refused(path, "that doesn't match the size", optimizer=surefoot.AdamW([*model.parameters()][:3]))


def test_hyperparameters_out_of_range_are_refused_with_a_note(tmp_path):
    model = net()
    optimizer = surefoot.SGD(model.parameters())
    optimizer.param_groups[0]["lr"] = -1.0
    path = surefoot.save(tmp_path, optimizer=optimizer)
    other = surefoot.SGD(net().parameters())
    with pytest.raises(ValueError, match="Invalid learning rate: -1.0") as caught:
        surefoot.load(path, optimizer=other)
    assert caught.value.__notes__ == [f"Raised while loading `optimizer` of {path}; everything is as it was."]
    assert other.param_groups[0]["lr"] > 0


def test_what_was_not_saved(path):
    scaler = torch.amp.GradScaler("cpu")
    refused(
        path, "has no `scaler`; it has `model`, `optimizer`, `rng`, `extra`. Leave it out, or save it", scaler=scaler
    )


def test_a_part_of_another_kind(tmp_path):
    path = surefoot.save(tmp_path, sampler=torch.Generator())
    scheduler = lr_scheduler.ExponentialLR(surefoot.SGD(net().parameters()), 0.5)
    refused(path, "`sampler` of .* is a generator, not a stateful", sampler=scheduler)


@pytest.mark.parametrize(
    ("role", "value", "message"),
    [
        ("model", 3, "`model` must be a torch.nn.Module, but is int"),
        ("optimizer", {"a": nn.Linear(1, 1)}, "`optimizer.a` must be an optimizer, but is Linear"),
        ("scheduler", [object()], "`scheduler.0` must be an object with state_dict and load_state_dict, but is object"),
        ("sampler", "x", "`sampler` must be a torch.Generator or an object with state_dict"),
    ],
)
@pytest.mark.parametrize("function", [surefoot.save, surefoot.load], ids=["save", "load"])
def test_arguments_of_a_wrong_type(tmp_path, function, role, value, message):
    with pytest.raises(TypeError, match=message):
        function(tmp_path, **{role: value})


# Schedulers, scalers, generators


def scheduled(make_scheduler, steps=3):
    optimizer = surefoot.SGD(net().parameters(), lr=0.5)
    scheduler = make_scheduler(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def test_another_scheduler(tmp_path):
    optimizer, scheduler = scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    path = surefoot.save(tmp_path, optimizer=optimizer, scheduler=scheduler)
    other, step_lr = scheduled(lambda o: lr_scheduler.StepLR(o, 2), 0)
    refused(path, "scheduler: ExponentialLR was saved, this is StepLR", optimizer=other, scheduler=step_lr)


def test_a_scheduler_that_refuses_leaves_the_optimizer_as_it_was(tmp_path):
    optimizer, scheduler = scheduled(lambda o: Schedule(o, lr=schedules.linear(1, 0, 9)))
    path = surefoot.save(tmp_path, optimizer=optimizer, scheduler=scheduler)
    other, another = scheduled(lambda o: Schedule(o, momentum=schedules.linear(1, 0, 9)), 1)
    refused(
        path,
        "the state dict schedules lr of group 0, but this Schedule has momentum",
        optimizer=other,
        scheduler=another,
    )


def test_a_scaler_that_is_disabled_now(tmp_path):
    path = surefoot.save(tmp_path, scaler=torch.amp.GradScaler("cpu"))
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    refused(path, "scaler: it was enabled when it was saved, now it is disabled, or has no state", scaler=disabled)


def test_generators_of_devices_that_are_not_here(path, tmp_path):
    from surefoot.checkpoint.rng import rng_problems, rng_state  # noqa: PLC0415

    state = rng_state()
    assert rng_problems(state) == []
    cuda = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    here = torch.cuda.device_count()
    assert rng_problems({**state, "cuda": cuda}) == [
        f"it has generators of {here + 1} CUDA devices, here are {here}; rng=False"
    ]
    assert rng_problems({**state, "cuda": 3}) == ["the states of CUDA's generators are malformed"]
    for name in ("python", "numpy", "torch"):
        assert rng_problems({**state, name: (1, 2)})[0].startswith(f"the state of {name}'s generator is not valid here")
        assert len(rng_problems({key: value for key, value in state.items() if key != name})) == 1


def test_random_generators_come_back_with_an_optimizer_or_when_asked(path):
    optimizer = surefoot.AdamW(net().parameters())
    cases = [({"model": net()}, False), ({"rng": True}, True), ({"optimizer": optimizer}, True)]
    for options, changed in [*cases, ({"optimizer": optimizer, "rng": False}, False)]:
        torch.manual_seed(5)
        random.seed(6)
        np.random.seed(7)  # noqa: NPY002
        before = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
        surefoot.load(path, **options)
        assert (not torch.equal(torch.get_rng_state(), before[0])) == changed
        assert (random.getstate() != before[1]) == changed
        assert (np.random.get_state()[1].tolist() != before[2]) == changed  # noqa: NPY002


# All or nothing


class Stubborn(nn.Linear):
    """A model whose loading raises when half of it is loaded."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.weight.mean() == 1:
            raise OSError("hook")


class Sampler:
    """A sampler that may refuse its state."""

    refuses = False

    def __init__(self, position=0):
        self.position = position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
        if self.refuses:
            raise KeyError("epoch")


def test_whatever_fails_at_last_everything_is_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    nn.init.ones_(model[1].weight)
    optimizer = surefoot.AdamW(model.parameters(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, sampler=Sampler(7))
    other = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    opt = surefoot.AdamW(other.parameters(), lr=0.1)
    sched = lr_scheduler.ExponentialLR(opt, 0.1)
    sampler = Sampler(1)
    groups = opt.param_groups
    refused(path, "hook", OSError, model=other, optimizer=opt, scheduler=sched, sampler=sampler)
    assert opt.param_groups is groups
    assert sampler.position == 1


def test_a_sampler_that_raises_and_cannot_go_back_is_noted(tmp_path):
    path = surefoot.save(tmp_path, sampler=Sampler(7))
    sampler = Sampler(1)
    sampler.refuses = True
    with pytest.raises(KeyError, match="epoch") as caught:
        surefoot.load(path, sampler=sampler)
    assert caught.value.__notes__[1] == "`sampler` could not be put back: KeyError('epoch')"


def test_state_of_tied_and_several_objects(tmp_path):
    models = {"g": net(), "d": net(width=7)}

    def make_optimizers(models):
        sgd = surefoot.SGD(models["g"].parameters(), momentum=0.9, foreach=False)
        return [sgd, surefoot.AdamW(models["d"].parameters(), foreach=False)]

    optimizers = make_optimizers(models)
    for model, optimizer in zip(models.values(), optimizers, strict=True):
        train(model, optimizer)
    path = surefoot.save(tmp_path, model=models, optimizer=optimizers)
    others = {"g": net(), "d": net(width=7)}
    again = make_optimizers(others)
    surefoot.load(path, model=others, optimizer=again)
    assert_same(state_of(*others.values(), *again), state_of(*models.values(), *optimizers))


# Names


def test_parameters_are_matched_by_name_in_another_order(path):
    model = net()
    names = [(name, param) for name, param in model.named_parameters()][::-1]
    optimizer = surefoot.AdamW(names, foreach=False)
    surefoot.load(path, model=model, optimizer=optimizer)
    twin = net()
    straight = surefoot.AdamW(twin.parameters(), foreach=False)
    surefoot.load(path, model=twin, optimizer=straight)
    for (_, param), other in zip(names[::-1], twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[param]["exp_avg"], straight.state[other]["exp_avg"])
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in names]


def test_names_lent_by_the_model_put_state_where_it_belongs_and_do_not_stay(path):
    model = net()
    optimizer = surefoot.AdamW([*model.parameters()][::-1], foreach=False)
    surefoot.load(path, model=model, optimizer=optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (4, 3)
    assert all("param_names" not in group for group in optimizer.param_groups)
    with pytest.raises(ValueError, match=r"was saved with shape"):
        surefoot.load(path, optimizer=surefoot.AdamW([*net().parameters()][::-1]))


def test_names_are_given_back_when_a_load_fails(path):
    model = net()
    optimizer = surefoot.AdamW(model.parameters())
    optimizer.register_load_state_dict_post_hook(lambda _: 1 / 0)
    refused(path, "division", ZeroDivisionError, model=model, optimizer=optimizer)
    assert all("param_names" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "rename",
    [
        {"0": "a.0", "1": "a.1"},
        {"0.weight": "a.0.weight", "0": "a.0", "1": "a.1"},
        lambda name: f"a.{name}",
    ],
)
def test_renamed_parameters(path, rename):
    model, twin = nn.ModuleDict({"a": net()}), net()
    optimizer, straight = (surefoot.AdamW(one.named_parameters(), foreach=False) for one in (model, twin))
    surefoot.load(path, model=model, optimizer=optimizer, rename=rename)
    surefoot.load(path, model=twin, optimizer=straight)
    assert_same(list(model["a"].state_dict().values()), list(twin.state_dict().values()))
    assert_same(optimizer.state_dict()["state"], straight.state_dict()["state"])


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        ({"x": "y"}, ValueError, "rename: nothing saved is called `x`"),
        ({"0": "1"}, ValueError, "rename: 2 parameters would be called `1.weight`"),
        (lambda _: None, TypeError, "`rename` must answer a name, but answered None for `0.weight`"),
        (3, TypeError, "`rename` must be a function or a dict from saved names to present ones, but is 3"),
    ],
)
def test_mistakes_in_a_renaming(path, rename, error, message):
    with pytest.raises(error, match=message):
        surefoot.load(path, model=net(), rename=rename)


def test_names_of_one_model_among_several_begin_with_its_key(tmp_path):
    models = {"g": net(), "d": net()}
    path = surefoot.save(tmp_path, model=models, optimizer=surefoot.SGD([*models["g"].parameters()]))
    others = {"g": nn.ModuleDict({"a": net()}), "d": net()}
    optimizer = surefoot.SGD([*others["g"].parameters()])
    surefoot.load(path, model=others, optimizer=optimizer, rename={"g": "g.a"})
    assert_same(list(others["g"].state_dict().values()), list(models["g"].state_dict().values()))
    with pytest.raises(ValueError, match=r"rename: `0.weight` must begin with `g.`, the key of its model"):
        surefoot.load(path, model=others, rename=lambda name: name.removeprefix("g."))


@pytest.mark.parametrize("with_model", [False, True])
def test_parameters_that_were_added_without_names(tmp_path, with_model):
    model = net()
    optimizer = surefoot.AdamW([("given", model[0].weight)])
    optimizer.param_groups[0]["params"] += [*model.parameters()][1:]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    objects = {"optimizer": optimizer} | ({"model": model} if with_model else {})
    path = surefoot.save(tmp_path / "one.safetensors", **objects)
    before = {param: {name: value.clone() for name, value in state.items()} for param, state in optimizer.state.items()}
    optimizer.step()
    surefoot.load(path, **objects)
    assert_same(dict(optimizer.state), before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_wrappers_are_recognized(tmp_path, prefix):
    wrapper = nn.ModuleDict({prefix[:-1]: net()})
    path = surefoot.save(tmp_path, model=wrapper)
    with pytest.raises(ValueError, match=r"pass rename=lambda name: name.removeprefix\('" + prefix):
        surefoot.load(path, model=net())
    surefoot.load(path, model=net(), rename=lambda name: name.removeprefix(prefix))
    path = surefoot.save(tmp_path, model=net())
    with pytest.raises(ValueError, match=r"pass rename=lambda name: '" + prefix):
        surefoot.load(path, model=wrapper)


def test_a_renamed_layer_is_guessed_from_its_shape(tmp_path):
    path = surefoot.save(tmp_path, model=nn.ModuleDict({"head": nn.Linear(3, 4), "body": nn.Linear(5, 5)}))
    model = nn.ModuleDict({"classifier": nn.Linear(3, 4), "body": nn.Linear(5, 5)})
    with pytest.raises(
        ValueError, match=r"pass rename=\{'head.weight': 'classifier.weight', 'head.bias': 'classifier.bias'\}"
    ):
        surefoot.load(path, model=model)
    surefoot.load(path, model=model, rename={"head": "classifier"})


# Not strict


def test_what_matches_is_loaded_and_the_rest_reported(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 9))
    optimizer = surefoot.AdamW(model.parameters(), foreach=False)
    kept = model[1].weight.detach().clone()
    found = surefoot.load(path, model=model, optimizer=optimizer, strict=False)
    twin = net()
    surefoot.load(path, model=twin)
    assert torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[1].weight, kept)
    assert Counter(line.split(":")[0] for line in found.mismatched) == {"model": 2, "optimizer": 4}
    assert model[0].weight in optimizer.state
    assert model[1].weight not in optimizer.state


def test_a_part_that_was_not_saved_is_refused_also_when_not_strict(path):
    with pytest.raises(ValueError, match="has no `scaler`"):
        surefoot.load(path, scaler=torch.amp.GradScaler("cpu"), strict=False)


# torch's optimizers


def test_optimizers_of_torch_are_saved_and_loaded_too(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    path = surefoot.save(tmp_path, model=train(model, optimizer), optimizer=optimizer)
    other = net()
    theirs = torch.optim.AdamW(other.parameters())
    found = surefoot.load(path, model=other, optimizer=theirs)
    assert_same(state_of(other, theirs), state_of(model, optimizer))
    found.path.write_bytes(b"")  # nothing depends on the file any more
    train(other, theirs)
    ours = surefoot.AdamW(net().parameters(), foreach=False)
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer)
    surefoot.load(path, optimizer=ours)
    assert_same(ours.state_dict()["state"], optimizer.state_dict()["state"])


def test_optimizers_of_torch_that_do_not_match_are_left_alone_when_not_strict(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 9))
    theirs = torch.optim.AdamW(model.parameters(), lr=0.5)
    found = surefoot.load(path, model=model, optimizer=theirs, strict=False)
    assert theirs.param_groups[0]["lr"] == 0.5
    assert not theirs.state
    assert [line for line in found.mismatched if line.startswith("optimizer")] == [
        "optimizer: `1.weight` was saved with shape (2, 4), here it has (9, 4)",
        "optimizer: `1.bias` was saved with shape (2,), here it has (9,)",
    ]


def test_another_class_is_reported_when_not_strict(path):
    model = net()
    found = surefoot.load(path, model=model, optimizer=surefoot.SGD(model.parameters()), strict=False)
    assert "optimizer: AdamW was saved, this is SGD" in found.mismatched


def test_optimizers_of_torch_go_by_the_order_which_is_checked(path):
    model = net()
    theirs = torch.optim.AdamW([*model.parameters()][::-1])
    refused(
        path,
        "the parameters have other names, or another order, and torch's optimizers go by",
        model=model,
        optimizer=theirs,
    )


def test_nothing_depends_on_the_file_after_a_load(tmp_path):
    model, optimizer = make()
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, extra=[torch.ones(4)])
    other, again = make(1)
    found = surefoot.load(path, model=other, optimizer=again)
    path.write_bytes(b"")
    assert_same(state_of(other, again), state_of(model, optimizer))
    assert found.extra[0].sum() == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("background", [False, True])
def test_tensors_and_generators_of_cuda(tmp_path, background):
    model = net().cuda()
    optimizer = surefoot.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3, device="cuda")).sum().backward()
    optimizer.step()
    generator = torch.Generator("cuda").manual_seed(3)
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, sampler=generator, async_=background)
    draws = [torch.rand(3, device="cuda"), torch.rand(3, device="cuda", generator=generator)]
    other = net().cuda()
    again, another = surefoot.AdamW(other.parameters()), torch.Generator("cuda")
    surefoot.load(path, model=other, optimizer=again, sampler=another)
    assert_same(state_of(other, again), state_of(model, optimizer))
    assert again.state[other[0].weight]["exp_avg"].is_cuda
    assert not again.state[other[0].weight]["step"].is_cuda
    assert all(map(torch.equal, draws, [torch.rand(3, device="cuda"), torch.rand(3, device="cuda", generator=another)]))
    refused(path, "a generator of cuda was saved, this is one of cpu", sampler=torch.Generator())


@pytest.mark.parametrize(
    ("value", "kind"),
    [([1.0, 2.0], "list"), (torch.ones(2).numpy(), "ndarray"), ("x", "str")],
    ids=["list", "array", "text"],
)
def test_state_that_is_no_tensor_is_named(tmp_path, value, kind):
    model = nn.Linear(2, 1)
    optimizer = surefoot.Adam(model.named_parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg"] = value
    path = surefoot.save(tmp_path, optimizer=optimizer)
    fresh = surefoot.Adam(nn.Linear(2, 1).named_parameters())
    with pytest.raises(ValueError, match=f"`weight`: state `exp_avg` is {kind}, must be a tensor"):
        surefoot.load(path, optimizer=fresh)
    assert not fresh.state
