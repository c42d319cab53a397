"""What calls on lists keep for the next: the same steps as without it, whatever has changed, and nobody's tensors."""

import gc
import sys
import threading
import weakref

import pytest
import torch

import surefoot
from surefoot import functional
from surefoot.functional import launch_cache
from surefoot.tensors.memory import has_memory
from surefoot.tensors.native import guards as native

pytestmark = pytest.mark.skipif(not native.available(), reason="nothing is kept without native guards")

SETTINGS = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "beta1": 0.9, "beta2": 0.999}
FLAGS = {"amsgrad": False, "maximize": False}
SHAPES = ((3, 4), (5,), (), (2, 3))


class Own(torch.Tensor):
    """A tensor of somebody's own type."""


class Lists:
    """Parameters, their gradients and their state, and steps of them."""

    def __init__(self):
        drawn = torch.Generator().manual_seed(7)
        self.params, self.grads, self.averages, self.squares = (
            [torch.rand(shape, generator=drawn) for shape in SHAPES] for _ in range(4)
        )
        self.steps, self.options = [torch.tensor(0.0) for _ in SHAPES], {**SETTINGS, **FLAGS}
        self.maxima = []

    def step(self):
        lists = (self.params, self.grads, self.averages, self.squares, self.maxima, self.steps)
        functional.adam(*lists, **self.options)

    def tensors(self):
        return [*self.params, *self.averages, *self.squares, *self.maxima, *self.steps]


@pytest.fixture
def long_way(monkeypatch):
    """Return a step that goes the long way."""

    def step(lists):
        with monkeypatch.context() as patch:
            patch.setenv(native.VARIABLE, "0")
            lists.step()

    return step


@pytest.fixture
def served(monkeypatch):
    """Return a list to which every step by a launch that was kept adds."""
    found, run = [], launch_cache.ListLaunch.run
    monkeypatch.setattr(
        launch_cache.ListLaunch, "run", lambda launch, *args: (found.append(launch), run(launch, *args))
    )
    return found


def set_step(lists):
    lists.steps[1].fill_(7)


def change_lr(lists):
    lists.options["lr"] = 0.01


def take_lr_as_tensor(lists):
    lists.options["lr"] = torch.tensor(0.01)


def move_everything(lists):
    for name in ("params", "grads", "averages", "squares", "steps"):
        setattr(lists, name, [tensor.clone() for tensor in getattr(lists, name)])


SERVED = [set_step, change_lr, take_lr_as_tensor, move_everything]


def start_maxima(lists):
    lists.options["amsgrad"], lists.maxima = True, [torch.zeros(shape) for shape in SHAPES]


def maximize(lists):
    lists.options["maximize"] = True


def transpose_a_gradient(lists):
    lists.grads[0] = lists.grads[0].t().contiguous().t()


def transpose_a_parameter(lists):
    lists.params[0] = lists.params[0].t().contiguous().t()


def widen_a_gradient(lists):
    lists.grads[0] = lists.grads[0].double()


def negate_a_gradient_lazily(lists):
    lists.grads[1] = torch._neg_view(lists.grads[1])


def leave_out_a_gradient(lists):
    lists.grads[2] = None


def share_a_gradient(lists):
    lists.params[1].set_(lists.grads[1])


def expand_a_gradient(lists):
    lists.grads[1] = torch.ones(1).expand(5)


def step_a_parameter_twice(lists):
    for each in (lists.params, lists.grads, lists.averages, lists.squares, lists.steps):
        each[3] = each[0]


def share_a_step_count(lists):
    lists.steps[1] = lists.steps[0]


def put_a_step_count_into_shared_memory(lists):
    lists.steps[1].share_memory_()


def take_back_memory(lists):
    lists.params[0].untyped_storage().resize_(4)


def take_back_memory_of_a_gradient(lists):
    lists.grads[3].untyped_storage().resize_(0)


def change_a_shape(lists):
    lists.squares[1] = torch.ones(1)


def double_a_slot(lists):
    lists.averages[1] = lists.averages[1].double()


def put_something_else(lists):
    lists.averages[0] = 3.0


def drop_a_slot(lists):
    lists.averages.pop()


def take_a_subclass(lists):
    lists.params[0] = lists.params[0].as_subclass(Own)


def take_a_tensor_of_inference_mode(lists):
    with torch.inference_mode():
        lists.params[0] = lists.params[0].clone()


def move_a_slot_to_meta(lists):
    lists.squares[0] = lists.squares[0].to("meta")


def have_no_gradient_but_zero(lists):
    lists.grads[1] = torch._efficientzerotensor(5)


def require_the_gradient_of_a_step_count(lists):
    lists.steps[0].requires_grad_()


def be_out_of_range(lists):
    lists.options["eps"] = -1.0


def want_another_engine(lists):
    lists.options["foreach"] = True


def have_found_infinities(lists):
    lists.options["found_inf"] = torch.tensor(1.0)


def have_scaled(lists):
    lists.options["grad_scale"] = torch.tensor(4.0)


OTHERS = [
    start_maxima, maximize, transpose_a_gradient, transpose_a_parameter, widen_a_gradient, negate_a_gradient_lazily,
    leave_out_a_gradient, share_a_gradient, expand_a_gradient, step_a_parameter_twice, share_a_step_count,
    put_a_step_count_into_shared_memory, take_back_memory, take_back_memory_of_a_gradient, change_a_shape,
    double_a_slot, put_something_else, drop_a_slot, take_a_subclass, take_a_tensor_of_inference_mode,
    move_a_slot_to_meta, have_no_gradient_but_zero, require_the_gradient_of_a_step_count, be_out_of_range,
    want_another_engine,
    have_found_infinities, have_scaled,
]  # fmt: skip


def outcome(step):
    try:
        step()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("change", SERVED + OTHERS, ids=lambda change: change.__name__)
def test_whatever_has_changed_the_step_is_the_same(change, served, long_way):
    ours, theirs = Lists(), Lists()
    for lists in (ours, theirs):
        for _ in range(3):
            lists.step()
        change(lists)
    served.clear()
    for _ in range(2):
        expected = outcome(lambda: long_way(theirs))
        assert outcome(ours.step) == expected
    if change in SERVED:
        assert (len(served), expected) == (2, None)
    for actual, wanted in zip(ours.tensors(), theirs.tensors(), strict=True):
        if isinstance(actual, torch.Tensor) and not actual.is_meta and has_memory(actual):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam", "RMSprop", "Lion"])
def test_pure_steps_of_new_tensors_are_served_and_are_those_of_the_class(name, served):
    kind, drawn = getattr(surefoot, name), torch.Generator().manual_seed(3)
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    owned = [torch.rand(shape, generator=drawn, requires_grad=True) for shape in SHAPES]
    optimizer, params, state = kind(owned, lr=0.01, **options), [param.detach().clone() for param in owned], [{}] * 4
    for _ in range(5):
        grads = [torch.rand(shape, generator=drawn) - 0.5 for shape in SHAPES]
        for param, grad in zip(owned, grads, strict=True):
            param.grad = grad
        optimizer.step()
        params, state = functional.update(kind, params, grads, state, lr=0.01, **options)
    assert len(served) == 3  # neither the first, which makes state, nor the second, which is kept
    assert all(map(torch.equal, params, owned))


def test_nothing_holds_the_tensors_of_a_call():
    gc.disable()
    try:
        lists = Lists()
        for _ in range(3):
            lists.step()
        alive = [weakref.ref(tensor) for tensor in (*lists.tensors(), *lists.grads)]
        del lists
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_autograd_knows_of_steps_that_are_served(served):
    lists = Lists()
    lists.step(), lists.step()
    versions = [tensor._version for tensor in lists.tensors()]
    lists.step()
    assert served
    assert all(tensor._version > before for tensor, before in zip(lists.tensors(), versions, strict=True))


def test_threads_step_lists_alike_at_once(long_way):
    expected, several = Lists(), [Lists() for _ in range(4)]
    for _ in range(20):
        long_way(expected)

    def train(lists):
        for _ in range(20):
            lists.step()

    threads = [threading.Thread(target=train, args=(lists,)) for lists in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lists in several:
        assert all(map(torch.equal, lists.tensors(), expected.tensors()))


def test_threads_keep_launches_of_their_own():
    launches, failed = launch_cache.LaunchCache(), []

    def keep(first):
        try:
            for number in range(first, first + 2000):
                launches._keep(number, None)
        except RuntimeError as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=keep, args=(10_000 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed


def test_few_launches_are_kept():
    launches = launch_cache.LaunchCache()
    for number in range(10):
        launches._keep(number, None)
    assert len(launches._launches) == 4
