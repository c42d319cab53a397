"""Hooks and profiler ranges: the order, the arguments and the handles of torch.optim."""

import pytest
import torch
from torch.optim import optimizer as torch_hooks

import surefoot
from helpers import assert_same, make, name_of, set_grads, snapshot, train

KINDS = ["step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]


def use(optimizer, kind):
    """Call what runs the hooks of a kind."""
    if kind.startswith("step"):
        optimizer.step()
    elif kind.startswith("load"):
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer.state_dict()


def ready(cls=surefoot.SGD, **options):
    """Make an optimizer whose parameters have gradients."""
    optimizer = make(cls, **options)
    set_grads(optimizer, 0)
    return optimizer


def recorder(seen, name):
    return lambda *_: seen.append(name)


@pytest.mark.parametrize("kind", KINDS)
def test_order_prepend_and_handles(kind):
    optimizer, seen = ready(), []
    register = getattr(optimizer, f"register_{kind}_hook")
    handles = [
        register(recorder(seen, "first")),
        register(recorder(seen, "second")),
        register(recorder(seen, "zeroth"), prepend=True),
    ]
    use(optimizer, kind)
    assert seen == ["zeroth", "first", "second"]
    handles[0].remove()
    handles[0].remove()
    with handles[2]:
        pass
    seen.clear()
    use(optimizer, kind)
    assert seen == ["second"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [surefoot.SGD, torch.optim.SGD], ids=["surefoot", "torch"])
def test_hooks_are_of_one_optimizer_and_come_with_it(kind, cls):
    seen, optimizer, other = [], ready(cls), ready(cls)
    getattr(optimizer, f"register_{kind}_hook")(lambda hooked, *_: seen.append(hooked))
    use(other, kind)
    use(optimizer, kind)
    assert [hooked is optimizer for hooked in seen] == [True]


@pytest.fixture
def hooks_everywhere():
    """Register hooks that write down their order, on the given optimizer and globally."""
    handles = []

    def register(optimizer, seen):
        handles.extend(
            [
                torch_hooks.register_optimizer_step_post_hook(recorder(seen, "global post")),
                torch_hooks.register_optimizer_step_pre_hook(recorder(seen, "global pre")),
                optimizer.register_step_post_hook(recorder(seen, "post")),
                optimizer.register_step_pre_hook(recorder(seen, "pre")),
            ]
        )

    yield register
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("cls", [surefoot.AdamW, torch.optim.AdamW], ids=["surefoot", "torch"])
def test_step_hooks_stand_around_the_step_in_torchs_order(cls, hooks_everywhere):
    seen, optimizer = [], ready(cls)
    hooks_everywhere(optimizer, seen)
    optimizer.step(lambda: seen.append("closure"))
    assert seen == ["global pre", "pre", "closure", "post", "global post"]


@pytest.mark.parametrize("cls", [surefoot.SGD, torch.optim.SGD], ids=["surefoot", "torch"])
def test_step_hooks_see_and_replace_the_arguments(cls):
    optimizer, seen = ready(cls), []

    def look(*call):
        seen.append(call)

    def replace(optimizer, args, kwargs):
        return (optimizer, lambda: "new"), {}

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_pre_hook(replace)
    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    assert optimizer.step(closure=lambda: "old") == "new"
    (first, args, kwargs), (_, new_args, new_kwargs), (_, *after) = seen
    assert first is optimizer
    assert args == (optimizer,)
    assert kwargs["closure"]() == "old"
    assert len(new_args) == 2
    assert new_kwargs == {}
    assert after == [new_args, new_kwargs]


@pytest.mark.parametrize("kind", ["step_pre", "step_post"])
@pytest.mark.parametrize("cls", [surefoot.AdamW, torch.optim.AdamW], ids=["surefoot", "torch"])
def test_a_hook_may_step_once_more(cls, kind):
    optimizer, calls = ready(cls), []

    def again(optimizer, args, kwargs):
        calls.append(None)
        if len(calls) == 1:
            optimizer.step()

    getattr(optimizer, f"register_{kind}_hook")(again)
    optimizer.step()
    assert len(calls) == 2
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 2


@pytest.mark.parametrize("wrong", [3, (1,), (1, 2, 3), [(), {}]], ids=str)
@pytest.mark.parametrize("cls", [surefoot.SGD, torch.optim.SGD], ids=["surefoot", "torch"])
def test_a_pre_hook_that_returns_something_else_is_refused(cls, wrong):
    optimizer = train(ready(cls, momentum=0.9))
    before = snapshot(optimizer)
    optimizer.register_step_pre_hook(lambda *_: wrong)
    with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\), but got "):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_state_dict_post_hook_may_replace_the_result():
    optimizer = ready()
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "extra": 1})
    optimizer.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(more=2))
    assert {"extra": 1, "more": 2}.items() <= optimizer.state_dict().items()


def test_load_pre_hook_gets_a_shallow_copy_and_may_replace_it():
    optimizer, source = ready(lr=0.1), ready(lr=0.2)
    given = source.state_dict()
    other = ready(lr=0.3).state_dict()

    def damage(_, state_dict):
        assert state_dict is not given
        del state_dict["state"]

    optimizer.register_load_state_dict_pre_hook(damage)
    optimizer.register_load_state_dict_pre_hook(lambda *_: other)
    optimizer.load_state_dict(given)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert "state" in given


def test_load_post_hook_sees_the_loaded_optimizer():
    optimizer, seen = ready(lr=0.1), []
    optimizer.register_load_state_dict_post_hook(lambda hooked: seen.append(hooked.param_groups[0]["lr"]))
    optimizer.load_state_dict(ready(lr=0.2).state_dict())
    assert seen == [0.2]


def test_hooks_survive_loading():
    optimizer, seen = ready(), []
    optimizer.register_step_pre_hook(recorder(seen, "pre"))
    optimizer.load_state_dict(ready().state_dict())
    optimizer.step()
    assert seen == ["pre"]


# Profiler ranges


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon, surefoot.SGD], ids=name_of)
def test_profiler_ranges(cls):
    optimizer = ready(cls)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{cls.__name__}.step"] == 1
    assert counts[f"Optimizer.zero_grad#{cls.__name__}.zero_grad"] == 1


def test_profiler_finds_the_optimizer_in_python_traces():
    optimizer = ready()
    calls = []
    optimizer._optimizer_step_code = lambda: calls.append("called")
    optimizer.step()
    assert calls == ["called"]


def test_a_wrapper_that_does_not_call_the_constructor_steps():
    class Wrapper(surefoot.Optimizer):
        def __init__(self, base):
            self.base, self.param_groups, self.state = base, base.param_groups, base.state

        def step(self, closure=None):
            return self.base.step(closure)

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Wrapper(surefoot.SGD([param], lr=1.0))
    optimizer.step()
    assert param.tolist() == [0.0] * 3
    assert optimizer.base.step_statistics.steps == 1
