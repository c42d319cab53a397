"""Guards, native and plain: what of tensors, dicts and numbers they see, hold and count."""

import dataclasses
import functools
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from helpers import make_sized as make
from helpers import train_sized as train
from surefoot.tensors import guards
from surefoot.tensors.native import guards as native
from surefoot.tensors.native import layout


def test_a_guard_that_goes_releases_gradients():
    watch, params, _ = guarded()
    assert not watch.changed()
    grad = weakref.ref(params[0].grad)
    params[0].grad = None
    assert grad() is not None
    del watch
    assert grad() is None


def test_where_torch_keeps_things_elsewhere_the_answers_are_the_same(monkeypatch):
    expected = train(*make())
    monkeypatch.setattr(layout, "_word", lambda address, index: 0)
    monkeypatch.setattr(layout, "tensor_layout", found := functools.cache(layout.tensor_layout.__wrapped__))
    monkeypatch.setattr(native, "tensor_layout", found)
    assert found() is None
    optimizer, params = make()
    assert all(map(torch.equal, expected, train(optimizer, params)))
    assert guards_of(optimizer) == {guards.PlainTensorGuard}


def guards_of(optimizer):
    return {type(work.guard.tensors) for work in optimizer._step_cache.runs}


def test_a_guard_that_sees_something_else_than_python_is_not_used(monkeypatch):
    known = layout.tensor_layout()
    sizes_for_data = (known.getters[3], *known.getters[1:])
    monkeypatch.setattr(native, "tensor_layout", lambda: dataclasses.replace(known, getters=sizes_for_data))
    optimizer, params = make()
    train(optimizer, params)
    assert guards_of(optimizer) == {guards.PlainTensorGuard}
    assert all(map(torch.equal, params, train(*make())))


CHANGES = {
    "data": lambda t: setattr(t, "data", torch.randn(4, 3)),
    "data of another shape": lambda t: setattr(t, "data", t.data[:2]),
    "data in other order": lambda t: setattr(t, "data", t.data.view(3, 4).t()),
    "data of six dimensions": lambda t: setattr(t, "data", t.data.view(1, 1, 1, 1, 4, 3)),
    "dtype": lambda t: setattr(t, "data", t.data.double()),
    "negated": lambda t: setattr(t, "data", torch._neg_view(t.data)),
    "set_": lambda t: t.set_(torch.randn(4, 3)),
    "resize_": lambda t: t.resize_(2, 2),
    "transposed": lambda t: t.t_(),
    "memory of the storage": lambda t: t.untyped_storage().resize_(1 << 16),
    "memory shared with a lazy clone": lambda t: setattr(t, "clone_that_lives", t._lazy_clone()),
}


MANY = native._FEW // 4 + 1  # of each: parameters, gradients, and two entries of state
kinds_of_guard = pytest.mark.parametrize("kind", [native.TensorGuard, guards.PlainTensorGuard])


def guarded(dimensions=(4, 3), kind=native.TensorGuard, count=5):
    params = [torch.randn(dimensions) for _ in range(count)]  # set_ and resize_ refuse those that require gradients
    for param in params:
        param.grad = torch.randn(dimensions)
    states = [{"step": torch.zeros(()), "average": torch.randn(dimensions)} for _ in params]
    entries = [[state[name] for state in states] for name in ("step", "average")]
    options = {} if kind is guards.PlainTensorGuard else {"threads": count >= MANY}
    return kind((params, *entries), states, ("step", "average"), gradients=True, **options), params, states


@kinds_of_guard
@pytest.mark.parametrize("of", ["param", "state"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_guard_sees_what_changes_a_tensors_memory(change, of, kind):
    watch, params, states = guarded(kind=kind)
    assert not watch.changed()
    change(params[3] if of == "param" else states[3]["average"])
    assert watch.changed()
    assert watch.changed(), "what was made before the change must never be used again"


@kinds_of_guard
@pytest.mark.parametrize(
    "grad",
    [
        None,
        torch.zeros(4, 3).double(),
        torch.zeros(3, 4).t(),
        torch._neg_view(torch.zeros(4, 3)),
        torch._efficientzerotensor((4, 3)),
        torch.zeros(4, 3).to_sparse(),
    ],
    ids=["none", "dtype", "order", "negated", "without memory", "sparse"],
)
def test_a_guard_sees_another_kind_of_gradient(grad, kind):
    watch, params, _ = guarded(kind=kind)
    params[4].grad = None
    if grad is not None and grad.dtype is torch.float64:
        params[4].data = params[4].data.double()
    params[4].grad = grad
    assert watch.changed()


@kinds_of_guard
def test_a_guard_gives_the_addresses_of_gradients(kind):
    watch, params, _ = guarded(kind=kind)
    for param in params[1:]:
        param.grad = torch.randn(4, 3)
    assert not watch.changed()
    assert watch.gradients.tolist() == [param.grad.data_ptr() for param in params]


@kinds_of_guard
@pytest.mark.parametrize("change", ["replaced", "deleted", "cleared", "none"])
def test_a_guard_sees_another_entry(change, kind):
    watch, _, states = guarded(kind=kind)
    state = states[2]
    {
        "replaced": lambda: state.update(average=state["average"].clone()),
        "deleted": lambda: state.pop("average"),
        "cleared": state.clear,
        "none": lambda: state.update(step=None),
    }[change]()
    assert watch.changed()


def test_a_guard_does_without_room_for_many_dimensions():
    watch, params, _ = guarded((1,) * 7 + (2,))
    assert not watch.changed()
    params[0].grad = torch.zeros((1,) * 6 + (2, 1)).transpose(6, 7)
    params[1].grad = torch.zeros((1,) * 7 + (4,))[..., ::2]
    assert watch.changed()
    assert guarded((1,) * 8 + (2,))[0].changed()
    assert not guarded((1,) * 8 + (2,), guards.make_guard)[0].changed()


@pytest.mark.parametrize("of", ["param", "gradient", "state"])
def test_a_guard_sees_sizes_that_stand_outside_of_a_tensor(of):
    watch, params, states = guarded((1, 1, 1, 1, 3, 3))
    assert not watch.changed()
    changed = {"param": params[2], "gradient": params[2].grad, "state": states[2]["average"]}[of]
    changed.transpose_(4, 5)
    assert watch.changed()


@pytest.mark.parametrize("position", [0, 127, 128, MANY - 1])
@pytest.mark.parametrize("change", ["param", "gradient", "none", "average", "step", "entry"])
def test_a_look_of_several_threads_sees_every_tensor(change, position):
    watch, params, states = guarded(count=MANY)
    assert not watch.changed()
    assert watch.gradients.tolist() == [param.grad.data_ptr() for param in params]
    {
        "param": lambda: params[position].set_(torch.randn(4, 3)),
        "gradient": params[position].grad.t_,
        "none": lambda: setattr(params[position], "grad", None),
        "average": lambda: states[position]["average"].set_(torch.randn(4, 3)),
        "step": lambda: states[position]["step"].set_(torch.zeros(())),
        "entry": lambda: states[position].update(average=torch.randn(4, 3)),
    }[change]()
    assert watch.changed()


def test_a_look_of_several_threads_holds_every_gradient():
    watch, params, _ = guarded(count=MANY)
    gradients = [weakref.ref(param.grad) for param in params]
    addresses = [param.grad.data_ptr() for param in params]
    assert not watch.changed()
    for param in params:
        param.grad = None
    fresh = {torch.randn(4, 3).data_ptr() for _ in range(100)}
    assert fresh.isdisjoint(addresses), "memory that is held must not be given away"
    watch.release_grads()
    assert not any(gradient() for gradient in gradients)


OF_OTHER_KINDS = """
import torch, surefoot

class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        shape, dtype = inner.shape, inner.dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, dispatch_sizes_strides_policy="sizes")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*[arg.inner if isinstance(arg, Wrapper) else arg for arg in args], **(kwargs or {}))

params = [torch.nn.Parameter(torch.zeros(8, 3)) for _ in range(COUNT)]
for param in params:
    param.grad = torch.ones(8, 3)
optimizer = surefoot.SGD(params, lr=1.0, momentum=0.0)
for position in (0, 5, COUNT // 2, COUNT - 1):
    optimizer.step()
    optimizer.step()
    params[position].grad = Wrapper(torch.ones(8, 3))
    optimizer.step()
    params[position].grad = torch.ones(8, 3)
assert all((param == -12).all() for param in params)

for kind in (torch.strided, torch.jagged):
    optimizer = surefoot.SGD(params, lr=1.0, momentum=0.9)
    optimizer.step()
    optimizer.step()
    nested = torch.nested.nested_tensor([torch.ones(3)] * 8, layout=kind)
    torch.utils.swap_tensors(optimizer.state[params[-1]]["momentum_buffer"], nested)
    try:
        optimizer.step()
    except RuntimeError:
        print("refused")
"""


OF_ONE_STORAGE = """
flat, grads = torch.zeros(COUNT * 1000), torch.ones(COUNT * 1000)
params = [torch.nn.Parameter(part) for part in flat.split(1000)]
for param, grad in zip(params, grads.split(1000)):
    param.grad = grad
optimizer = surefoot.SGD(params, lr=1.0)
optimizer.step()
for step in range(8):
    clones = [torch._lazy_clone(flat), torch._lazy_clone(grads)]
    optimizer.step()
    assert (clones[0] == -1 - step).all() and (clones[1] == 1).all()
    assert all((param == -2 - step).all() for param in params)
    flat = clones[0] = params[0].detach().as_strided((COUNT * 1000,), (1,), 0)
"""


def test_a_look_of_several_threads_asks_nothing_that_python_answers_and_takes_lazy_clones_of_one_storage():
    command = [sys.executable, "-W", "ignore", "-c", f"COUNT = {2 * MANY}{OF_OTHER_KINDS}{OF_ONE_STORAGE}"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)  # noqa: S603
    assert result.stdout == "refused\n" * 2


def test_a_change_counts_that_is_seen_with_a_lazy_clone():
    watch, params, _ = guarded(count=MANY)
    clones = [param._lazy_clone() for param in params[100:1000:100]]
    params[3].set_(torch.randn(4, 3))
    assert watch.changed()
    del clones


def test_versions_of_many_tensors_are_counted():
    counted = [torch.zeros(()) for _ in range(native._FEW + 1)]
    for tensor in counted[::3]:
        tensor.add_(1)
    before = [tensor._version for tensor in counted]
    native.VersionCounters(counted).count()
    assert [tensor._version for tensor in counted] == [version + 1 for version in before]


def test_many_numbers_are_read_and_written():
    scalars = [torch.tensor(float(value)) for value in range(native._FEW + 1)]
    numbers = native.ScalarIO(scalars)
    assert numbers.read().tolist() == list(range(native._FEW + 1))
    numbers.write(np.arange(native._FEW + 1) / 2)
    assert [scalar.item() for scalar in scalars] == [value / 2 for value in range(native._FEW + 1)]


def test_a_lazy_clone_keeps_what_it_was_cloned_from():
    optimizer, params = make()
    train(optimizer, params)
    clone, before = params[0].detach()._lazy_clone(), params[0].detach().clone()
    optimizer.step()
    assert torch.equal(clone, before)
    assert not torch.equal(params[0], before)


@pytest.mark.parametrize("kind", [native.DictGuard, guards.PlainDictGuard])
def test_items_of_dicts(kind):
    items = {"a": object(), "b": object()}
    seen = kind([{}, items])
    assert not seen.changed()
    items["c"] = 1
    assert seen.changed()
    del items["c"]
    assert not seen.changed()
    last = items.popitem()
    assert seen.changed()
    items.update([last])
    assert not seen.changed()
    items["a"] = object()
    assert seen.changed()
    items.clear()
    assert seen.changed()


@pytest.mark.parametrize("kind", [native.DictGuard, guards.PlainDictGuard])
def test_items_of_attributes(kind):
    owner = torch.nn.Linear(2, 2)
    seen = kind([owner._parameters], [(owner, "_parameters")])
    assert not seen.changed()
    owner._parameters = dict(owner._parameters)
    assert seen.changed()


def test_versions_count_as_torch_counts_them():
    counted = [torch.ones(3), torch.nn.Parameter(torch.ones(2)), torch.ones(4)[:2]]
    counted[2].add_(1)
    before = [tensor._version for tensor in counted]
    native.VersionCounters(counted).count()
    assert [tensor._version for tensor in counted] == [version + 1 for version in before]


def test_tensors_without_versions_are_left_alone():
    with torch.inference_mode():
        counted = [torch.ones(3), torch.ones(2)]
        native.VersionCounters(counted).count()
    assert all(tensor.is_inference() for tensor in counted)


@pytest.mark.parametrize("kind", [native.ScalarIO, guards.PlainScalarIO])
def test_numbers_are_read_and_rounded_as_their_tensors(kind):
    scalars = [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)]
    numbers = kind(scalars)
    assert numbers.read().tolist() == [scalars[0].item(), 0.1]
    numbers.write(np.array([1 / 3, 1 / 3]))
    assert [scalar.item() for scalar in scalars] == [torch.tensor(1 / 3).item(), 1 / 3]
