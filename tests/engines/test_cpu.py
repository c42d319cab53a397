"""The CPU engine: its threads, its plans, and what it answers when it cannot serve."""

import contextlib
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import surefoot
from helpers import make_sized as make
from helpers import train_sized as train
from surefoot.codegen import compile as compiling
from surefoot.codegen import threads
from surefoot.codegen.processor import host
from surefoot.engines import eager
from surefoot.engines.checked import checked
from surefoot.engines.cpu import copied, launch, plan
from surefoot.engines.cpu.source import LAUNCH, Layout, print_kernel
from surefoot.errors import InternalError, KernelError, NonFiniteGradientError
from surefoot.explain import rule_of
from surefoot.step import coefficients
from surefoot.storage import format_of
from surefoot.tensors import guards
from surefoot.tensors.native import guards as native
from surefoot.tensors.native import layout


def source_of(cls=surefoot.AdamW):
    optimizer, _ = make(cls)
    rule = rule_of(optimizer, optimizer.param_groups[0])
    return print_kernel(rule, Layout(torch.float32, (format_of(torch.float32),) * (2 + len(rule.slots))))


@pytest.fixture(params=["unchecked", "checked"])
def mode(request, monkeypatch):
    """Both modes: in the checked one kernels verify every access before it is made."""
    monkeypatch.setenv("SUREFOOT_CHECKED", "1" if request.param == "checked" else "")


IN_BOTH_MODES = pytest.mark.usefixtures("mode")


# Errors in kernels

_STOPPED = """
def kernel(launch):
    store(launch + 8, 1)
"""


def raising():
    return compiling.build_kernel(_STOPPED, "raising")


@pytest.mark.parametrize("portable", [False, True], ids=["openmp", "python threads"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_kernel_raises(count, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(launch, "thread_count", lambda: count)
    optimizer, params = make(surefoot.Adam)
    train(optimizer, params)
    optimizer._step_cache.fast = False
    before, kernel = [param.detach().clone() for param in params], raising()
    assert kernel.name.startswith("raising_")
    monkeypatch.setattr(plan.Plan, "run", lambda plan, bucket: plan.launch.run(kernel, np.zeros((1, 0))))
    with pytest.raises(KernelError, match=f"kernel {kernel.name} was stopped by an error.*may be updated in part"):
        train(optimizer, params)
    assert issubclass(KernelError, InternalError)
    assert issubclass(KernelError, RuntimeError)
    monkeypatch.undo()
    assert {state["step"].item() for state in optimizer.state.values()} == {3}
    assert all(map(torch.equal, params, before))
    train(optimizer, params)


def test_an_error_in_a_kernel_raises_in_the_fast_lane(monkeypatch):
    optimizer, params = make(surefoot.Adam, sizes=(5, 7))
    train(optimizer, params, steps=4)
    grads = [weakref.ref(param.grad) for param in params]
    before, kernel = [param.detach().clone() for param in params], raising()
    optimizer._step_cache.fast._whole._entries[0, 0] = kernel.address
    with pytest.raises(KernelError, match="was stopped by an error.*may be updated in part"):
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {4}
    assert all(map(torch.equal, params, before))
    optimizer.zero_grad()
    assert not any(grad() for grad in grads), "gradients must not be held"


def test_an_error_in_the_guard_kernel_raises(monkeypatch):
    address = raising().address
    launch = native._Launch(native._OTHER_ITEMS)
    monkeypatch.setattr(launch, "_kernel", address)
    with pytest.raises(KernelError, match="the guard kernel was stopped by an error"):
        launch.run()


# The checked mode

CHECKED = {
    "adam": (surefoot.Adam, torch.float32, {}),
    "adam, measured": (surefoot.Adam, torch.float32, {"max_grad_norm": 1.0, "telemetry": True}),
    "adamw of 16 bits": (surefoot.AdamW, torch.bfloat16, {"max_grad_norm": 1.0, "ema": 0.9}),
    "sgd": (surefoot.SGD, torch.float64, {"momentum": 0.9, "telemetry": True}),
    "nadam of 16 bits": (surefoot.NAdam, torch.float16, {"max_grad_value": 0.5}),
    "rprop of complex numbers": (surefoot.Rprop, torch.complex64, {}),
}


@pytest.mark.parametrize(("cls", "dtype", "options"), CHECKED.values(), ids=list(CHECKED))
def test_checked_kernels_give_the_same_bits(cls, dtype, options, monkeypatch):
    expected = train(*make(cls, dtype=dtype, **options))
    monkeypatch.setenv("SUREFOOT_CHECKED", "1")
    optimizer, params = make(cls, dtype=dtype, **options)
    assert all(map(torch.equal, train(optimizer, params), expected))


@pytest.mark.parametrize("cls", [surefoot.SGD, surefoot.SparseAdam])
def test_checked_kernels_give_rows_the_same_bits(cls, monkeypatch):
    def stepped():
        table = torch.nn.Parameter(torch.linspace(-1, 1, 150).reshape(50, 3))
        optimizer = cls([table], lr=0.1)
        for rows in ([7, 0, 7, 49], [3], []):
            table.grad = rows_of(table.detach(), torch.tensor([rows], dtype=torch.long))
            optimizer.step()
        return table.detach()

    expected = stepped()
    monkeypatch.setenv("SUREFOOT_CHECKED", "1")
    assert torch.equal(stepped(), expected)


def plan_of(optimizer):
    return optimizer._step_cache.runs[0].bucket.plan


def shorten(launch, row):
    launch.set_limits = lambda addresses, available: np.copyto(
        launch.limits, available - 4 * (np.arange(4)[:, None] == row)
    )


VIOLATIONS = {
    "short parameter": (lambda launch: shorten(launch, 0), "`param` of tensor 0: 1 elements from 0, of 0 for which"),
    "short gradient": (lambda launch: shorten(launch, 1), "`grad` of tensor 0: 1 elements from 0, of 0 for which"),
    "short state": (lambda launch: shorten(launch, 3), "`exp_avg_sq` of tensor 0: 1 elements from 0, of 0 for which"),
    "no memory": (
        lambda launch: launch.pointers[2].put(1, 0),
        "`exp_avg` of tensor 1: 1000 elements from 0, of 0 for which",
    ),
    "moved": (
        lambda launch: launch.pointers[0].put(1, launch.pointers[0, 1] + 8),
        "`param` of tensor 1: 1000 .*, of 998 for",
    ),
    "elsewhere": (
        lambda launch: launch.pointers[0].put(1, launch.pointers[0, 1] - 8),
        "`param` of tensor 1: 1000 .*, of 0 for",
    ),
    "start": (
        lambda launch: launch._parts[2].put(1, 1 << 62),
        f"`param` of tensor 1: 1000 elements from {1 << 62}, of 1000",
    ),
    "negative start": (
        lambda launch: launch._parts[2].put(1, -1),
        "`param` of tensor 1: 1000 elements from -1, of 1000",
    ),
    "size": (
        lambda launch: launch._parts[3].put(1, 1 << 62),
        f"`param` of tensor 1: {1 << 62} elements from 0, of 1000",
    ),
    "negative size": (lambda launch: launch._parts[3].put(1, -1), "`param` of tensor 1: -1 elements from 0, of 1000"),
    "tensor": (lambda launch: launch._parts[1].put(1, 5), "segment 1 is of tensor 5, of 5"),
    "negative tensor": (lambda launch: launch._parts[1].put(1, -1), "segment 1 is of tensor -1, of 5"),
    "coefficients": (lambda launch: launch.rows.put(4, 1), "tensor 4 takes row 1 of the coefficients, of 1"),
    "segments": (lambda launch: launch._parts[0].put(-1, 99), "takes the segments from 7 to 99, of 8"),
    "segments backwards": (lambda launch: launch._parts[0].put(1, -1), "item 0 takes the segments from 0 to -1, of 8"),
}


@pytest.mark.parametrize(("spoil", "message"), VIOLATIONS.values(), ids=list(VIOLATIONS))
def test_a_violation_raises_and_changes_nothing(spoil, message, monkeypatch):
    monkeypatch.setenv("SUREFOOT_CHECKED", "1")
    optimizer, params = make(surefoot.Adam)
    train(optimizer, params)
    spoil(plan_of(optimizer).launch)
    before = [param.detach().clone() for param in params]
    state = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    with pytest.raises(KernelError, match=f"kernel adam_checked_[0-9a-f]+ was stopped by .*{message}.*none of its"):
        train(optimizer, params)
    assert all(map(torch.equal, params, before))
    for param, entries in zip(params, state, strict=True):
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in entries.items())
    monkeypatch.delenv("SUREFOOT_CHECKED")
    train(optimizer, params)


def test_rows_beyond_their_storage_are_found(monkeypatch):
    monkeypatch.setenv("SUREFOOT_CHECKED", "1")
    table = torch.nn.Parameter(torch.ones(50, 3))
    optimizer = surefoot.SGD([table], lr=0.1)
    for _ in range(3):
        table.grad = rows_of(table.detach(), torch.tensor([[7, 49]]))
        optimizer.step()
    before = table.detach().clone()
    plan_of(optimizer).launch._tables[11] += 4  # where the table begins
    with pytest.raises(KernelError, match="`param` of tensor 1: 3 elements from 0, of 2 for which there is memory"):
        optimizer.step()
    assert torch.equal(table, before)


@pytest.mark.parametrize("value", ["yes", "2", " 1"])
def test_the_mode_is_on_or_off(value, monkeypatch):
    monkeypatch.setenv("SUREFOOT_CHECKED", value)
    with pytest.raises(ValueError, match=f"SUREFOOT_CHECKED must be 1 or 0, but is '{value}'"):
        checked()
    monkeypatch.setenv("SUREFOOT_CHECKED", "0")
    assert not checked()


# Threads


@IN_BOTH_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("portable", [False, True], ids=["openmp", "python threads"])
def test_same_bits_for_any_number_of_threads(monkeypatch, dtype, portable):
    if portable:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(launch, "thread_count", lambda count=count: count)
        results.append(train(*make(dtype=dtype)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@IN_BOTH_MODES
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_same_bits_however_the_work_is_cut(monkeypatch, chunk):
    sizes = (1, 5, 1003, 4096)
    expected = train(*make(surefoot.NAdam, sizes))
    monkeypatch.setattr(launch, "CHUNK", chunk)
    assert all(map(torch.equal, expected, train(*make(surefoot.NAdam, sizes))))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the OpenMP library that torch loads on Linux")
def test_the_openmp_pool_is_torchs():
    assert threads._openmp() is not None


def test_a_forked_child_uses_one_thread(monkeypatch):
    monkeypatch.setattr(threads, "_forked", True)
    assert threads.thread_count() == 1


def test_work_items_cover_every_element_once():
    sizes = np.array([0, 1, launch.CHUNK, 0, 5 * launch.CHUNK + 3, 2, 2, 0])
    tensor, start, size = launch._segments(sizes)
    covered = [set() for _ in sizes]
    for t, first, count in zip(tensor, start, size, strict=True):
        new = set(range(first, first + count))
        assert not covered[t] & new
        covered[t] |= new
    assert [len(elements) for elements in covered] == sizes.tolist()
    first = launch._work_items(size)
    assert first[0] == 0
    assert first[-1] == len(size)
    assert (np.diff(first) > 0).all()


def test_pieces_cover_every_element_once():
    base = torch.zeros(7, 2, 30, 3).transpose(0, 2)
    for (piece,) in copied.cut([base], 11):
        assert piece.numel() <= 11
        piece.add_(1)
    assert (base == 1).all()


@IN_BOTH_MODES
def test_two_optimizers_step_in_two_threads():
    expected = train(*make(), steps=20)
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda _: train(*make(), steps=20), range(4)):
            assert all(map(torch.equal, expected, result))


# Plans


@IN_BOTH_MODES
def test_a_plan_is_used_again_and_given_up():
    optimizer, params = make()
    train(optimizer, params)
    runs = optimizer._step_cache.runs
    train(optimizer, params)
    assert optimizer._step_cache.runs is runs
    optimizer.state[params[0]]["exp_avg"] = torch.zeros_like(params[0])
    train(optimizer, params, steps=1)
    assert optimizer._step_cache.runs is not runs


def test_scalars_that_a_plan_knows_are_not_asked_one_by_one(monkeypatch):
    optimizer, params = make(surefoot.Adam)
    optimizer.step_options.max_grad_norm = 1.0  # not for the fast lane
    train(optimizer, params)
    monkeypatch.setattr(coefficients, "_is_shown", None)
    train(optimizer, params, steps=1)
    assert optimizer.state[params[0]]["step"] == 4


@pytest.mark.parametrize("max_grad_norm", [None, 1e9])
def test_scalars_that_need_gradients_are_counted_as_torch_counts_them(max_grad_norm):
    optimizer, params = make(surefoot.Adam, amsgrad=True)
    theirs, copies = make(torch.optim.Adam, amsgrad=True)
    optimizer.step_options.max_grad_norm = max_grad_norm
    for _ in range(2):
        for one, own in ((optimizer, params), (theirs, copies)):
            train(one, own, steps=2)
            one.state[own[0]]["step"].requires_grad_()
    for ours, other in zip(params, copies, strict=True):
        torch.testing.assert_close(ours, other)
        assert optimizer.state[ours]["step"] == theirs.state[other]["step"] == 4


@pytest.mark.skipif("+fma" not in host().features, reason="the processor cannot multiply and add at once")
@pytest.mark.parametrize("weight_decay", [0, 0.5])
def test_momentum_is_rounded_before_the_gradient_is_added(weight_decay):
    param = torch.linspace(-3, 3, 1000, requires_grad=True)
    optimizer = surefoot.SGD([param], momentum=0.9, dampening=0.3, weight_decay=weight_decay, fused=True)
    param.grad = torch.linspace(1, -2, 1000)
    optimizer.step()
    before = optimizer.state[param]["momentum_buffer"].double()
    grad = (param.grad.double() + weight_decay * param.detach().double()).float().double()
    optimizer.step()
    momentum, weight = (torch.tensor(number).double() for number in (0.9, 1 - 0.3))
    expected = ((momentum * before).float().double() + weight * grad).float()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], expected)


@IN_BOTH_MODES
def test_complex_parameters_may_be_swapped():
    param, other = torch.ones(3, dtype=torch.complex64).requires_grad_(), torch.zeros(3, dtype=torch.complex64)
    optimizer = surefoot.SGD([param], lr=0.5, momentum=0.9)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    param.grad = None
    torch.utils.swap_tensors(param, other.requires_grad_())
    assert param.tolist() == [0j] * 3


def test_an_optimizer_goes_with_its_last_reference():
    optimizer, params = make()
    train(optimizer, params)
    average = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    del optimizer
    assert average() is None


def test_a_loaded_state_replaces_the_one_before_at_once():
    optimizer, params = make()
    train(optimizer, params)
    average = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    assert average() is None


class _Wrapper(torch.Tensor):
    """A tensor whose own memory holds nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        result = function(*inner, **(kwargs or {}))
        return args[0] if function.__name__.split(".")[0].endswith("_") else result


UNSUPPORTED = {
    "wrapper": lambda: _Wrapper(torch.ones(3)),
    "negated": lambda: torch._neg_view(torch.full((3,), -1.0)),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("late", [False, True])
def test_state_that_is_not_what_its_memory_holds(kind, late):
    param = torch.zeros(3, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, momentum=0.5)
    param.grad = torch.ones(3)
    for _ in range(3 * late):
        optimizer.step()
    with torch.no_grad():
        param.zero_()
    optimizer.state[param]["momentum_buffer"] = UNSUPPORTED[kind]()
    optimizer.step()
    assert param.tolist() == [-1.5] * 3


@pytest.mark.parametrize("late", [False, True])
def test_a_negated_parameter(late):
    value = torch.tensor([2 + 3j]).conj().imag
    param = torch.nn.Parameter(value.clone() if late else value)
    optimizer = surefoot.SGD([param], lr=1.0)
    param.grad = torch.zeros(1)
    for _ in range(3 * late):
        optimizer.step()
    if late:
        param.data = value
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.tolist() == [-4.0]


@pytest.mark.parametrize("kind", [native.TensorGuard, guards.PlainTensorGuard])
@pytest.mark.parametrize("end", ["made", "skipped", "refused", "replanned", "failed"])
def test_a_step_holds_gradients_no_longer_than_it_takes(end, kind, monkeypatch):
    if kind is guards.PlainTensorGuard:
        monkeypatch.setattr(guards.native, "available", lambda: False)
    whole = {"skipped": {"nonfinite": "skip"}, "refused": {"nonfinite": "raise"}}.get(end, {})
    optimizer, params = make(surefoot.Adam, (5, 7), **whole)
    train(optimizer, params)
    assert isinstance(optimizer._step_cache.runs[0].guard.tensors, kind)
    for param in params:
        param.grad = torch.full_like(param, torch.inf if whole else 1.0)
    grads = [weakref.ref(param.grad) for param in params]
    if end == "replanned":
        params[1].data = params[1].data.clone()
    if end == "failed":
        optimizer._step_cache.fast = False
        monkeypatch.setattr(plan.Plan, "run", lambda plan, bucket: 1 / 0)
    with {
        "refused": pytest.raises(NonFiniteGradientError),
        "failed": pytest.raises(ZeroDivisionError),
        "skipped": pytest.warns(RuntimeWarning, match="was skipped"),
    }.get(end, contextlib.nullcontext()):
        optimizer.step()
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None, None]


@pytest.mark.parametrize("count", [1, native._FEW // 4 + 1])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("left", [0, 12])
@pytest.mark.parametrize("of", ["param", "gradient", "state"])
def test_storages_without_memory_are_refused(of, late, count, left):
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(count)]
    optimizer = surefoot.SGD(params, momentum=0.9)
    for _ in range(2 if late else of == "state"):
        for param in params:
            param.grad = torch.ones(4, 3)
        optimizer.step()
    for param in params:
        param.grad = torch.ones(4, 3)
    state, before = optimizer.state.get(params[-1], {}), params[0].detach().clone()
    lost = {"param": params[-1], "gradient": params[-1].grad, "state": state.get("momentum_buffer")}[of]
    lost.untyped_storage().resize_(left)
    what = {"param": "", "gradient": "the gradient of ", "state": "state `momentum_buffer` of "}[of]
    with pytest.raises(RuntimeError, match=rf"^{what}`params\[{count - 1}\]` .* has lost memory: its storage has been"):
        optimizer.step()
    if count > 1:
        assert torch.equal(params[0], before)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_a_parameter_that_stands_twice_is_stepped_twice(options):
    results = []
    for kind, given in ((torch.optim.AdamW, {"foreach": False}), (surefoot.AdamW, options)):
        param = torch.linspace(-1, 1, 5).requires_grad_()
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([param, param], lr=0.1, **given)
        for step in range(5):
            param.grad = torch.full((5,), 1.0 + step)
            optimizer.step()
        assert optimizer.state[param]["step"] == 10
        results.append(param.detach())
    torch.testing.assert_close(*results)


def test_gradients_without_memory_are_zeros():
    optimizer, params = make(surefoot.SGD, sizes=(3,), momentum=0.9)
    ordinary, expected = make(surefoot.SGD, sizes=(3,), momentum=0.9)
    for step in range(4):
        params[0].grad = torch._efficientzerotensor(3) if step % 2 else torch.ones(3)
        expected[0].grad = torch.zeros(3) if step % 2 else torch.ones(3)
        optimizer.step()
        ordinary.step()
    assert torch.equal(params[0], expected[0])


# What it cannot serve


def test_fused_says_why_it_cannot_serve():
    base = torch.ones(5)
    params = [torch.nn.Parameter(base[:3]), torch.nn.Parameter(base[2:])]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = surefoot.AdamW(params, fused=True)
    with pytest.raises(
        RuntimeError,
        match=r"`fused=True` cannot serve AdamW here: `params\[0\]` .* and `params\[1\]` .* share memory",
    ):
        optimizer.step()
    assert not optimizer.state


def test_the_environment_overrides_the_engine(monkeypatch):
    monkeypatch.setenv("SUREFOOT_ENGINE", "eager")
    optimizer, params = make(fused=True)
    train(optimizer, params)
    assert {run.engine for run in optimizer._step_cache.runs} == {eager}
    monkeypatch.setenv("SUREFOOT_ENGINE", "quick")
    with pytest.raises(ValueError, match="SUREFOOT_ENGINE must be one of eager, foreach, fused, but is 'quick'"):
        train(*make())


def test_state_may_be_wider_than_parameters():
    optimizer, params = make(dtype=torch.bfloat16, state_dtype=torch.float32)
    train(optimizer, params)
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {torch.float32}
    with pytest.raises(ValueError, match="`state_dtype` must be None, torch.float32"):
        make(state_dtype=torch.int8)


def test_a_gradient_in_other_order_is_right():
    param = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    other = param.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for tensor in (param, other):
        tensor.grad = torch.ones(64, 64, 3, 3) * torch.arange(64.0)[:, None, None, None]
        surefoot.AdamW([tensor], fused=True).step()
    assert torch.equal(param, other)


# Sparse gradients


def rows_of(table, index):
    values = torch.randn(index.shape[1], *table.shape[len(index) :], generator=torch.Generator().manual_seed(3))
    return torch.sparse_coo_tensor(index, values.to(table.dtype), table.shape)


TABLES = {
    "rows": (torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[7, 0, 7, 49]])),
    "numbers": (torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.tensor([[7, 0, 7]])),
    "two indices": (torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 4], [3, 0]])),
    "columns": (torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).t(), torch.tensor([[7, 0, 49]])),
    "every other row": (torch.randn(50, 3, generator=torch.Generator().manual_seed(0))[::2], torch.tensor([[7, 24]])),
    "bfloat16": (torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([[7, 0]])),
    "complex": (torch.randn(9, 3, dtype=torch.complex64), torch.tensor([[7, 0]])),
    "nothing": (torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 0, dtype=torch.long)),
}


@IN_BOTH_MODES
@pytest.mark.parametrize("cls", [surefoot.SGD, surefoot.Adagrad])
@pytest.mark.parametrize(("table", "index"), TABLES.values(), ids=list(TABLES))
def test_rows_of_sparse_gradients(cls, table, index):
    found = []
    for options in ({"fused": True}, {"foreach": False}):
        param = table.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        optimizer = cls([param], lr=0.1, **options)
        version = param._version
        for _ in range(3):
            param.grad = rows_of(table, index)
            optimizer.step()
        assert param._version > version
        found.append(param.detach())
    torch.testing.assert_close(*found, rtol=0.02 if table.dtype is torch.bfloat16 else 1e-6, atol=1e-6)


SPARSE = pytest.mark.parametrize("cls", ["SGD", "Adagrad", "SparseAdam"])


def sparse_pair(cls):
    """An optimizer of ours and torch's of the same table, and what steps both with the same gradient."""
    tables = [torch.nn.Parameter(TABLES["rows"][0].clone()) for _ in range(2)]
    optimizers = [getattr(module, cls)([t], lr=0.1) for module, t in zip((surefoot, torch.optim), tables, strict=True)]

    def step(index):
        for table, optimizer in zip(tables, optimizers, strict=True):
            table.grad = rows_of(table.detach(), index)
            optimizer.step()
        torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-6)

    return optimizers, tables, step


@IN_BOTH_MODES
@SPARSE
def test_works_of_sparse_gradients_are_kept(cls):
    (optimizer, _), _, step = sparse_pair(cls)
    step(torch.tensor([[7, 0, 7, 49]]))
    found = optimizer._step_cache.runs
    assert found, "nothing was kept"
    for rows in ([3], [], [1, 2, 3, 4, 5, 6], [7, 0, 7, 49]):
        step(torch.tensor([rows], dtype=torch.long))
        assert optimizer._step_cache.runs is found, "runs were made anew"


@IN_BOTH_MODES
@SPARSE
@pytest.mark.parametrize("change", ["data", "rate", "state", "step", "cleared"])
def test_what_changes_between_sparse_steps_counts(cls, change):
    optimizers, tables, step = sparse_pair(cls)
    index = torch.tensor([[7, 0, 7, 49]])
    step(index)
    step(index)
    for optimizer, table in zip(optimizers, tables, strict=True):
        state = optimizer.state[table]
        if change == "data":
            table.data = torch.ones(50, 3).t().contiguous().t()
        elif change == "rate":
            optimizer.param_groups[0]["lr"] = 0.7
        elif change == "state":
            state.update({name: value + 1 for name, value in state.items() if name in {"sum", "exp_avg_sq"}})
        elif change == "step" and "step" in state:
            state["step"] = state["step"] + 5
        elif change == "cleared" and cls != "Adagrad":  # torch's has no other chance to make it
            state.clear()
    step(index)
    step(torch.tensor([[1, 2]]))


def test_sparse_steps_go_on_without_a_count_of_steps():
    (optimizer, _), (table, _), step = sparse_pair("SparseAdam")
    index = torch.tensor([[7, 0]])
    step(index)
    step(index)
    del optimizer.state[table]["step"]
    table.grad = rows_of(table.detach(), index)
    optimizer.step()
    assert optimizer.state[table]["step"] == 1


@IN_BOTH_MODES
@SPARSE
@pytest.mark.parametrize("later", ["dense", "double", "none", "outside"])
def test_gradients_that_are_no_longer_as_sparse(cls, later):
    (optimizer, _), (table, _), step = sparse_pair(cls)
    step(torch.tensor([[7, 0]]))
    step(torch.tensor([[7, 0]]))
    before, grad = table.detach().clone(), rows_of(table.detach(), torch.tensor([[7, 0]]))
    with torch.no_grad():
        if later == "double":
            table.data, before, grad = table.data.double(), before.double(), grad.double()
        elif later == "outside":
            grad = torch.sparse_coo_tensor(torch.tensor([[60]]), torch.ones(1, 3), (50, 3), check_invariants=False)
    table.grad = None if later == "none" else grad.to_dense() if later == "dense" else grad
    if (later, cls) == ("dense", "SparseAdam"):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            optimizer.step()
    elif later == "outside":
        with pytest.raises(IndexError, match="has indices outside of it"):
            optimizer.step()
    else:
        optimizer.step()
    changed = (table.detach() != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == ([0, 7] if later == "double" or (later == "dense" and cls != "SparseAdam") else [])


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("rows", [[7], [-1]])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["rows", "to dense"])
def test_indices_outside_change_no_other_bucket(foreach, rows, late, options):
    tables = [torch.nn.Parameter(torch.ones(5, 2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = surefoot.SGD(tables, lr=0.5, foreach=foreach, **options)
    for _ in range(2 * late):
        for table in tables:
            table.grad = rows_of(table.detach(), torch.tensor([[3, 1]]))
        optimizer.step()
    before, entries = [table.detach().clone() for table in tables], len(optimizer.state)
    tables[0].grad = rows_of(tables[0].detach(), torch.tensor([[3, 1]]))
    values = torch.ones(1, 2, dtype=torch.float64)
    tables[1].grad = torch.sparse_coo_tensor([rows], values, (5, 2), check_invariants=False)
    with pytest.raises(IndexError, match=r"a sparse gradient of shape \(5, 2\) has indices outside of it"):
        optimizer.step()
    assert all(map(torch.equal, tables, before))
    assert len(optimizer.state) == entries


@SPARSE
@pytest.mark.parametrize("late", [False, True])
def test_sparse_values_without_memory_are_refused(cls, late):
    (optimizer, _), (table, _), step = sparse_pair(cls)
    for _ in range(2 * late):
        step(torch.tensor([[7, 0]]))
    values = torch.ones(1, 3)
    table.grad = torch.sparse_coo_tensor([[1]], values, (50, 3), is_coalesced=True, check_invariants=True)
    table.grad._values().untyped_storage().resize_(0)
    before = table.detach().clone()
    with pytest.raises(RuntimeError, match=r"a sparse gradient of shape \(50, 3\) has no memory for its values"):
        optimizer.step()
    assert torch.equal(table, before)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("shape", [(3,), ()])
def test_a_sparse_gradient_without_sparse_dimensions(shape, foreach):
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    ours, theirs = surefoot.SGD(params[:1], lr=0.1, foreach=foreach), torch.optim.SGD(params[1:], lr=0.1)
    for present in (1, 2, 0):
        for param in params:
            index = torch.zeros(0, present, dtype=torch.long)
            param.grad = torch.sparse_coo_tensor(index, torch.ones(present, *shape), shape, check_invariants=True)
        ours.step()
        theirs.step()
    torch.testing.assert_close(*params)


def test_weight_decay_that_sparse_adam_does_not_know_is_no_matter():
    (optimizer, other), (table, _), step = sparse_pair("SparseAdam")
    index = torch.tensor([[7, 0]])
    step(index)
    step(index)
    for each in (optimizer, other):
        each.param_groups[0]["weight_decay"] = 0.1
    step(index)
    table.data = table.data.clone()
    step(index)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_no_number_is_refused(late, foreach):
    optimizer, params = make(surefoot.Adam, sizes=(5, 6), foreach=foreach)
    train(optimizer, params)
    for _ in range(2 * late):
        for state in optimizer.state.values():
            state["step"] = int(state["step"])
        train(optimizer, params)
    optimizer.state[params[1]]["step"] = None
    before = [param.detach().clone() for param in params]
    with pytest.raises(TypeError, match="state `step` must be a number or a tensor of one element, but is None"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(
    ("step", "later"), [(5, 6), (5.0, 6.0), (True, 2), (np.array(5.0), 6.0), (np.int64(5), np.int64(6))], ids=repr
)
def test_steps_may_be_any_number(step, later):
    optimizer, params = make(surefoot.Adam, sizes=(5,))
    train(optimizer, params)
    optimizer.state[params[0]]["step"] = step
    train(optimizer, params, steps=1)
    assert optimizer.state[params[0]]["step"] == later
    assert type(optimizer.state[params[0]]["step"]) is type(later)


@IN_BOTH_MODES
def test_averages_of_sparse_parameters_are_made_again():
    table = torch.nn.Parameter(torch.randn(50, 3))
    optimizer = surefoot.SGD([table], lr=0.1, ema=0.9)
    for _ in range(4):
        table.grad = rows_of(table.detach(), torch.tensor([[7, 0]]))
        optimizer.step()
    del optimizer.state[table]["ema"]
    table.grad = rows_of(table.detach(), torch.tensor([[7, 0]]))
    optimizer.step()
    assert torch.equal(optimizer.state[table]["ema"], table)


@IN_BOTH_MODES
def test_rows_of_a_view_leave_their_neighbours_alone():
    whole = torch.ones(20, 6)
    param = whole[:, 1:4].requires_grad_()
    param.grad = torch.sparse_coo_tensor([[2, 5]], torch.ones(2, 3), (20, 3))
    surefoot.SGD([param], lr=0.5, fused=True).step()
    changed = (whole.detach() != 1).nonzero().tolist()
    assert changed == [[row, column] for row in (2, 5) for column in (1, 2, 3)]


def test_a_kernel_that_cannot_be_made_leaves_everything_as_it_was(monkeypatch):
    optimizer, params = make(sizes=(5,))
    params[0].grad = torch.ones(5)
    before = params[0].detach().clone()

    def fail(*arguments):
        raise OSError("no compiler")

    monkeypatch.setattr(plan, "compiled_kernel", fail)
    with pytest.raises(OSError, match="no compiler"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state or optimizer.state[params[0]]["step"] == 0
    monkeypatch.undo()
    optimizer.step()
    expected, others = make(sizes=(5,))
    others[0].grad = torch.ones(5)
    expected.step()
    assert torch.equal(params[0], others[0])


# Found by trying to break it


@IN_BOTH_MODES
@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_options_that_change_in_place_count(kind):
    made = [make(surefoot.AdamW, lr=torch.tensor(0.25) if kind == "tensor" else 0.25) for _ in range(2)]
    for optimizer, params in made:
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        train(optimizer, params)
    (changed, params), (other, others) = made
    changed.param_groups[0]["betas"][0] = 0.5
    other.param_groups[0] |= {"betas": (0.5, 0.99)}
    if kind == "tensor":
        changed.param_groups[0]["lr"].fill_(0.125)
        other.param_groups[0]["lr"] = 0.125
    assert all(map(torch.equal, train(changed, params), train(other, others)))


class _Halving(surefoot.Optimizer):
    """Halves its rate at every step, in the group and in what it is handed."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def coefficients(self, h, step):
        h.lr = h.lr / 2
        self.param_groups[0]["lr"] /= 2
        return {"rate": h.lr}

    @staticmethod
    def update(param, grad, c, flags):
        return param - c.rate * grad


def test_coefficients_may_change_what_they_are_handed():
    param = torch.zeros(3, requires_grad=True)
    optimizer = _Halving([param], lr=1.0)
    param.grad = torch.ones(3)
    for _ in range(4):
        optimizer.step()
    assert param.tolist() == [-15 / 16] * 3


def test_a_replaced_group_counts():
    optimizer, params = make(surefoot.SGD, sizes=(5,), lr=1.0)
    train(optimizer, params)
    before = params[0].detach().clone()
    optimizer.param_groups[0] = dict(optimizer.param_groups[0], lr=0.0)
    train(optimizer, params)
    assert torch.equal(params[0], before)


def test_a_parameter_that_goes_to_another_group_takes_its_rate():
    _, params = make(surefoot.SGD, sizes=(2, 3, 4), lr=1.0)
    optimizer = surefoot.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.0}], lr=1.0)
    train(optimizer, params)
    before = params[1].detach().clone()
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    train(optimizer, params)
    assert torch.equal(params[1], before)


def test_gradients_live_while_kernels_run(monkeypatch):
    optimizer, params = make(surefoot.SGD, sizes=(5,))
    train(optimizer, params)
    params[0].grad = torch.ones(5)
    grad = weakref.ref(params[0].grad)
    optimizer._step_cache.fast = False
    run, seen = plan.Plan.run, []

    def run_while_another_thread_drops_it(self, bucket):
        params[0].grad = None
        seen.append(grad() is not None)
        run(self, bucket)

    monkeypatch.setattr(plan.Plan, "run", run_while_another_thread_drops_it)
    optimizer.step()
    assert seen == [True]
    assert grad() is None


def test_the_first_step_may_be_in_inference_mode():
    layout.tensor_layout.cache_clear()
    param = torch.zeros(4).requires_grad_()
    param.grad = torch.ones(4)
    optimizer = surefoot.SGD([param], lr=1.0)
    with torch.inference_mode():
        optimizer.step()
    assert param.tolist() == [-1.0] * 4
    assert layout.tensor_layout() is not None


def test_indices_outside_of_a_parameter_are_refused():
    param = torch.zeros(4, 2).requires_grad_()
    param.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2))
    param.grad._indices()[0, 0] = 7
    with pytest.raises(IndexError, match=r"a sparse gradient of shape \(4, 2\) has indices outside of it"):
        surefoot.SparseAdam([param]).step()


def test_room_for_numbers_is_made_anew_when_that_was_interrupted():
    class Interrupted(list):
        def __setitem__(self, *_):
            raise KeyboardInterrupt

    tensors = launch.TensorLaunch(2, np.array([4]))
    known, tensors.words = tensors.words, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tensors.make_room((1, 3))
    tensors.words = known
    tensors.make_room((1, 3))
    assert tensors.coefficients.shape == (1, 3)
    assert known[LAUNCH.index("coefficients")] == tensors.coefficients.ctypes.data
