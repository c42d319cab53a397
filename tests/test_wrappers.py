"""Optimizers inside the wrappers of trainers, and wrappers that are optimizers themselves."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from torch import nn

import surefoot
from helpers import ALGORITHMS, assert_same, make, make_params, name_of, params_of, set_grads, snapshot, train

each_algorithm = pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)


class Forwarding:
    """Takes on the class of what it wraps and forwards every attribute that it lacks, as Lightning's wrapper does."""

    def __init__(self, wrapped):
        kind = type(wrapped)
        object.__setattr__(self, "wrapped", wrapped)
        self.__class__ = type(f"Forwarding{kind.__name__}", (Forwarding, kind), {})

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "wrapped"), name)

    def step(self, closure=None):
        return self.wrapped.step(closure)


class Copying:
    """Copies the attributes of what it wraps, but for its hooks, and takes on its class."""

    def __init__(self, wrapped):
        kind = type(wrapped)
        kept = {name: value for name, value in vars(wrapped).items() if "hooks" not in name and name != "step"}
        self.__dict__ = kept
        self.__class__ = type(f"Copying{kind.__name__}", (Copying, kind), {})
        self.wrapped = wrapped

    def step(self, closure=None):
        return self.wrapped.step(closure)


class Subclassing(torch.optim.Optimizer):
    """What a subclass of the optimizer's own class gets, made from its groups, as Horovod's wrapper is."""

    def __init__(self, params):
        super(self.__class__, self).__init__(params)
        self.reduced = 0

    def step(self, closure=None):
        self.reduced += 1
        return super(self.__class__, self).step(closure)


def subclassing(wrapped):
    kind = type(wrapped)
    return type(kind.__name__, (kind,), dict(vars(Subclassing)))(wrapped.param_groups)


WRAPPERS = {"forwarding": Forwarding, "copying": Copying, "subclassing": subclassing}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@each_algorithm
@each_wrapper
def test_a_wrapped_optimizer_trains_as_a_bare_one(cls, wrap):
    wrapped, bare = wrap(make(cls)), make(cls)
    assert isinstance(wrapped, cls)
    train(wrapped), train(bare)
    assert_same(snapshot(wrapped)["values"], snapshot(bare)["values"])
    assert_same(wrapped.state_dict(), bare.state_dict())
    wrapped.zero_grad()
    assert all(param.grad is None for param in params_of(wrapped))
    assert cls.__name__ in repr(wrapped)


@each_algorithm
@each_wrapper
def test_a_wrapper_loads(cls, wrap):
    trained, wrapped = train(make(cls)), wrap(make(cls))
    wrapped.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert_same(wrapped.state_dict(), trained.state_dict())


@each_algorithm
def test_what_a_forwarding_wrapper_loads_is_there_for_what_it_wraps(cls):
    trained, inner = train(make(cls)), make(cls)
    Forwarding(inner).load_state_dict(copy.deepcopy(trained.state_dict()))
    assert_same(inner.state_dict(), trained.state_dict())
    for optimizer in inner, trained:
        for param, value in zip(params_of(optimizer), make_params(), strict=True):
            param.data.copy_(value.data)
        train(optimizer, first=5, steps=2)
    assert_same(snapshot(inner), snapshot(trained))


@each_wrapper
def test_a_wrapper_takes_groups_hooks_and_schedulers(wrap):
    wrapped = wrap(make(surefoot.AdamW))
    wrapped.add_param_group({"params": make_params([(2,)])})
    calls = []
    wrapped.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    wrapped.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    wrapped.load_state_dict(wrapped.state_dict())
    assert calls == ["state_dict", "load"]
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped, 1)
    train(wrapped, steps=1)
    scheduler.step()
    assert len(wrapped.param_groups) == 2
    assert wrapped.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_forwarding_wrapper_shows_the_options_of_what_it_wraps():
    inner = surefoot.AdamW(make_params(), max_grad_norm=0.5)
    wrapper = Forwarding(inner)
    assert wrapper.step_options is inner.step_options
    train(wrapper, steps=2)
    assert wrapper.step_statistics.steps == inner.step_statistics.steps == 2


def test_a_forwarding_wrapper_that_inherits_its_step_makes_it():
    class Transparent(Forwarding):
        step = surefoot.AdamW.step

    inner, bare = make(surefoot.AdamW), make(surefoot.AdamW)
    seen = []
    inner.register_step_post_hook(lambda *_: seen.append(1))
    wrapper = Transparent(inner)
    train(wrapper), train(bare)
    assert_same(snapshot(inner)["values"], snapshot(bare)["values"])
    assert len(seen) == 3


def test_a_copying_wrapper_can_be_pickled():
    wrapper = Copying(train(make(surefoot.AdamW)))
    wrapper.__class__ = surefoot.AdamW
    again = pickle.loads(pickle.dumps(wrapper))
    assert_same(again.state_dict(), wrapper.state_dict())


class Owning(torch.optim.Optimizer):
    """Forwards by methods and properties, and replaces the step to see whether it is made, as Accelerate's wrapper."""

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler, self.skipped = optimizer, scaler, False
        self.original = optimizer.step

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        called = []

        def patched(optimizer, *args, **kwargs):
            called.append(1)
            return self.original(*args, **kwargs)

        self.optimizer.step = MethodType(patched, self.optimizer)
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.optimizer.step = self.original
        self.skipped = not called


@pytest.mark.filterwarnings("ignore:`zero_grad_after_step` does nothing")
@pytest.mark.parametrize(
    "options",
    [{}, {"telemetry": True}, {"zero_grad_after_step": True}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}],
    ids=str,
)
def test_who_scales_sees_a_skipped_step(options):
    inner = surefoot.AdamW(make_params(), **options)
    assert not inner._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    wrapper = Owning(inner, scaler)
    for spoilt in (False, True):
        before = snapshot(inner)
        set_grads(inner, 0)
        scaler.scale(torch.tensor(1.0))
        if spoilt:
            params_of(inner)[0].grad[0, 0] = torch.inf
        wrapper.step()
        assert wrapper.skipped is spoilt
    assert_same(snapshot(inner), before)


@each_algorithm
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "max_grad_value": 1.0}], ids=["plain", "averaged"])
def test_a_fresh_state_dict_comes_back(cls, options):
    """Accelerate's `prepare` sends it to a device and loads it."""
    if cls is surefoot.LBFGS and options:
        pytest.skip("it takes no options")
    optimizer = make(cls, **options)
    before = snapshot(optimizer)
    assert not optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(snapshot(optimizer), before)
    train(optimizer)


# Wrappers that are optimizers


class Lookahead(surefoot.Optimizer):
    """Moves slow weights towards those of another optimizer, and calls no constructor of its base."""

    def __init__(self, base, alpha=0.5, every=2):
        self.base, self.defaults, self.param_groups, self.state = base, base.defaults, base.param_groups, base.state
        self.alpha, self.every, self.count = alpha, every, 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        self.count += 1
        for param in params_of(self) if self.count % self.every == 0 else ():
            entry = self.state[param]
            slow = entry.setdefault("slow_buffer", param.detach().clone())
            slow.lerp_(param, self.alpha)
            param.copy_(slow)
        return loss


def test_a_subclass_that_does_not_call_the_constructor_has_everything():
    lookahead = Lookahead(surefoot.AdamW(make_params(), ema=0.9, max_grad_norm=1.0))
    assert lookahead.step_options.max_grad_norm is None
    calls = []
    lookahead.register_step_pre_hook(lambda *_: calls.append("before"))
    lookahead.register_step_post_hook(lambda *_: calls.append("after"))
    train(lookahead, steps=2)
    assert calls == ["before", "after"] * 2
    assert lookahead.base.step_statistics.steps == 2
    lookahead.zero_grad()
    lookahead.load_state_dict(lookahead.state_dict())
    lookahead.add_param_group({"params": make_params([(2,)])})
    assert type(lookahead).__name__ in repr(lookahead)


class Inheriting(surefoot.AdamW):
    """Sets what an optimizer has by itself."""

    def __init__(self, params):
        self.defaults = surefoot.AdamW([nn.Parameter(torch.ones(1))]).defaults
        self.state, self.param_groups = {}, [{"params": list(params), **self.defaults}]


def test_a_rule_that_does_not_call_the_constructor_is_stepped():
    optimizer, model = Inheriting(make_params()), surefoot.AdamW(make_params())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.state = model.state.__class__(dict)
    train(optimizer), train(model)
    assert_same(snapshot(optimizer)["values"], snapshot(model)["values"])
    assert len(calls) == optimizer.step_statistics.steps == 3


class Lamb(surefoot.Optimizer):
    """Has hyperparameters of its own that are called like options of the step, which it does not take."""

    def __init__(self, params, lr=0.1, max_grad_norm=1.0, ema=0.0, nonfinite="mine"):
        super().__init__(params, {"lr": lr, "max_grad_norm": max_grad_norm, "ema": ema, "nonfinite": nonfinite})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"] * group["max_grad_norm"])


def test_hyperparameters_of_its_own_stay():
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = Lamb([{"params": [param], "max_grad_norm": 0.0}], max_grad_norm=2.0, nonfinite=3)
    assert optimizer.defaults == {"lr": 0.1, "max_grad_norm": 2.0, "ema": 0.0, "nonfinite": 3}
    optimizer.step()
    assert param.tolist() == [1.0, 1.0]
    optimizer.param_groups[0]["max_grad_norm"] = 2.0
    optimizer.step()
    assert param.tolist() == pytest.approx([0.8, 0.8])
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["max_grad_norm"] = 5.0
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["max_grad_norm"] == 5.0


def test_an_option_that_a_custom_step_does_not_take_is_refused_unless_it_names_it():
    class Custom(surefoot.Optimizer):
        def __init__(self, params, lr=0.1, **options):
            super().__init__(params, {"lr": lr, **options})

        def step(self, closure=None):
            pass

    class Named(Custom):
        def __init__(self, params, max_grad_norm=1.0):
            super().__init__(params, max_grad_norm=max_grad_norm)

    for make_one in (lambda: Custom(make_params(), max_grad_norm=1.0), lambda: Named(make_params())):
        with pytest.raises(ValueError, match="takes no `max_grad_norm`: it has a custom step"):
            make_one()


def test_an_option_that_a_subclass_of_an_algorithm_names_is_the_option():
    class Clipped(surefoot.AdamW):
        def __init__(self, params, max_grad_norm=0.25):
            super().__init__(params, max_grad_norm=max_grad_norm)

    assert Clipped(make_params()).step_options.max_grad_norm == 0.25


def test_names_of_torchs_module_are_there():
    names = ("Optimizer", "register_optimizer_step_pre_hook", "register_optimizer_step_post_hook")
    assert set(names) <= set(vars(surefoot.optimizer))
    calls = []
    handle = surefoot.optimizer.register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    train(make(surefoot.SGD), steps=1)
    handle.remove()
    assert calls == [1]


# What wrappers keep in the state


@pytest.mark.parametrize("cls", [cls for cls in ALGORITHMS if cls is not surefoot.SparseAdam], ids=name_of)
def test_what_a_wrapper_keeps_in_the_state_is_saved_and_loaded(cls):
    def wrapped():
        return Lookahead(make(cls))

    source, target = train(wrapped(), steps=3), wrapped()
    target.base.load_state_dict(copy.deepcopy(source.base.state_dict()))
    assert_same(target.base.state_dict(), source.base.state_dict())
    for ours, theirs in zip(params_of(target), params_of(source), strict=True):
        assert torch.equal(target.base.state[ours]["slow_buffer"], source.state[theirs]["slow_buffer"])


def test_state_of_others_alone_is_kept_too():
    optimizer = make(surefoot.AdamW)
    first, second = params_of(optimizer)
    optimizer.state[first]["slow_buffer"] = torch.ones(3, 4)
    optimizer.state[second].update(history=[torch.ones(2), 3], module="head")
    again = make(surefoot.AdamW)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(again.state_dict(), optimizer.state_dict())
    train(again)
    assert torch.equal(again.state[params_of(again)[0]]["slow_buffer"], torch.ones(3, 4))
