"""The GPU engine without a GPU: its numerics under Triton's interpreter, on CPU tensors that it is made to admit.

What needs a device is in test_gpu_device.py; what the compiler makes of the kernels, in test_gpu_compiled.py.
"""

import functools
import inspect
import os
import runpy
import subprocess
import sys
import weakref
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import surefoot
from conformance import (
    ELEMENTWISE,
    STEADY,
    STEPS,
    assert_close,
    assert_same,
    normals,
    results,
    train,
    unclipped,
    with_third,
    zoo,
)
from helpers import Noted
from surefoot import averages, doctor, engines
from surefoot.engines import foreach, gpu
from surefoot.engines.bucket import reduce
from surefoot.engines.identity import Identity
from surefoot.errors import NonFiniteGradientError
from surefoot.explain import rule_of
from surefoot.optimizers.orthogonal import newton_schulz
from surefoot.rule import TELEMETRY, Reduction, bind, gradient_rule
from surefoot.state import check
from surefoot.step import clipping, device
from surefoot.storage import format_8_bits, format_16_bits, format_of
from surefoot.tensors import guards, modes
from surefoot.tensors.memory import same_dense_layout
from surefoot.tensors.native import guards as native

pytest.importorskip("triton", reason="the GPU engine's tests need Triton, which is there on Linux")

import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter as interpreting
from triton.runtime.interpreter import InterpretedFunction

from surefoot.engines.gpu import compile as compiling
from surefoot.engines.gpu import plan, proof, tables
from surefoot.engines.gpu.measured import combined

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy on inf and NaN
FEW = STEADY + 2
"""Steps of which the last uses a plan again, with another learning rate: the interpreter takes long for each."""
FUSED = {"fused": True}
CAPTURABLE = {"fused": True, "capturable": True}
ways = pytest.mark.parametrize("way", [FUSED, CAPTURABLE], ids=["host", "capturable"])


@pytest.fixture
def language():
    """Return Triton's language back as it was: the interpreter replaces much of it, and nothing compiles then."""
    places = (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base, tl.dtype)
    before = [dict(vars(place)) for place in places]
    yield
    for place, names in zip(places, before, strict=True):
        for name, value in dict(vars(place)).items():
            if name not in names:
                delattr(place, name)
            elif value is not names[name]:
                setattr(place, name, names[name])


def _by_numpy(function):
    return lambda x, *others: type(x)(
        interpreting.TensorHandle(function(x.handle.data, *(y.handle.data for y in others)), x.handle.dtype), x.type
    )


def _once_for_each_scalar(dtype_of):
    """Types of blocks cannot be hashed."""
    known = {}

    def found(type_):
        name = type_.scalar.name
        if name not in known:
            known[name] = dtype_of(type_)
        return known[name]

    return found


def _with_known_types(make):
    """Return a method that makes a block's type, which takes longer than an operation on it, once for each scalar."""
    known = {}

    def with_element_ty(self, scalar):
        key = self.name, scalar.name
        if key not in known:
            known[key] = make(self, scalar)
        return known[key]

    return with_element_ty


def _once_for_each_type(initialize):
    """Let a tensor take everything but its value from the first of its type."""
    known = {}

    def first_or_copy(self, handle, type_):
        if type_.name not in known:
            initialize(self, handle, type_)
            known[type_.name] = dict(vars(self))
        vars(self).update(known[type_.name], handle=handle, type=type_)

    return first_or_copy


def _unless_alike(convert):
    """Convert operands to a common type unless they have it; what has less than 32 bits may be divided in another."""

    def converted(self, left, right, *more, **options):
        if isinstance(left, tl.tensor) and isinstance(right, tl.tensor) and left.type.name == right.type.name:
            scalar = left.type.scalar
            if not scalar.is_ptr() and scalar.primitive_bitwidth >= 32:
                return left, right
        return convert(self, left, right, *more, **options)

    return converted


@pytest.fixture(autouse=True)
def interpreter(request, monkeypatch, language):
    """Let the engine serve the CPU, through Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # At each call of a function the interpreter replaces the language anew, which takes longer than the call.
    monkeypatch.setattr(interpreting, "_patch_lang", functools.cache(interpreting._patch_lang))
    # And at each operation a table of dtypes.
    monkeypatch.setattr(interpreting, "_get_np_dtype", _once_for_each_scalar(interpreting._get_np_dtype))
    # And tensors' types, shapes and conversions.
    for place, name, faster in (
        (tl.block_type, "with_element_ty", _with_known_types),
        (tl.tensor, "__init__", _once_for_each_type),
        (interpreting.TritonSemantic, "binary_op_type_checking_impl", _unless_alike),
    ):
        monkeypatch.setattr(place, name, faster(getattr(place, name)))
    if later := getattr(interpreting, "_LangPatchScope", None):  # after the call Triton 3.9 puts back what was there
        monkeypatch.setattr(later, "restore", lambda scope: None)
    for name in ("sum", "max"):  # written in Triton themselves, for its compiler if it was imported before
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    # The interpreter lacks the device's library, so NumPy stands in for it.
    functions = {"pow": np.power, "exp": np.exp, "log": np.log, "tanh": np.tanh, "atan2": np.arctan2}
    for name, function in functions.items():
        monkeypatch.setattr(libdevice, name, _by_numpy(function))
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setattr(check, "CAPTURABLE_DEVICES", ("cpu",))
    for size, launch in plan.LAUNCH.items():  # a loop of two goes like one of four
        monkeypatch.setitem(plan.LAUNCH, size, launch._replace(repeat=2))
    if "unproved" not in request.fixturenames:  # what is compared with another engine anyway is not proved before
        monkeypatch.setattr(proof, "doubt", lambda *arguments: None)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    """Keep interpreted kernels apart from those of other modules' tests."""
    compiling.load.cache_clear()
    yield
    compiling.load.cache_clear()


@pytest.fixture
def large_blocks(monkeypatch):
    """Work on more elements at a time, which the interpreter takes no longer for; no random bit depends on it."""
    for size, block in ((2, 2048), (4, 16384)):
        monkeypatch.setitem(plan.LAUNCH, size, plan.Launch(block, 4, 1))


@pytest.fixture
def enough_elements(monkeypatch):
    """Have so many elements in a block that the largest of their errors says something."""
    monkeypatch.setitem(plan.LAUNCH, 4, plan.Launch(4096, 4, 1))


def few(dtype):
    """Make parameters of every kind, small ones; the last has whole blocks, two chunks and an end."""
    kinds = {name: param for name, param in zoo(dtype).items() if name != "long"}
    chunk = plan.LAUNCH[min(dtype.itemsize, 8)].chunk
    return kinds | {"blocks": normals(dtype, seed=7)(chunk + 72).requires_grad_()}


def named(*names):
    """Make these of the few."""
    return lambda dtype: {name: param for name, param in few(dtype).items() if name in names}


three = named("odd", "matrix", "blocks")
"""For what does not depend on parameters' kinds."""
two = named("odd", "blocks")
"""For what depends on neither kinds nor number of parameters."""
some = named("odd", "strided view", "offset view", "now and then", "blocks")
"""Of which one has no gradient at times and some are not aligned or no flat memory."""


def variants(*names, plain=(), full=()):
    """Every rule, or those named, without any of its flags and with all; each under marks, or not at all if None."""
    rows = [row for row in ELEMENTWISE if not names or row.name in names]
    found = [] if plain is None else [pytest.param(row, {}, id=f"{row.name}-False", marks=plain) for row in rows]
    found += [pytest.param(row, row.all_flags(), id=f"{row.name}-True", marks=full) for row in rows]
    return pytest.mark.parametrize(("row", "options"), found)


def trained(row, options, dtype, *, kinds=few, steps=FEW, **way):
    params = kinds(dtype)
    optimizer = row.ours(list(params.values()), **options, **way)
    train(optimizer, params, dtype, steps=range(steps))
    assert way.get("fused") is None or all(run.engine is gpu for run in optimizer._step_cache.runs)
    return results(optimizer, params)


def by_torch(row, options, dtype, *, kinds=few, steps=FEW, like=None, foreach=False):
    params = kinds(dtype)
    if like is not None:
        params = {name: param.detach().to(like).requires_grad_() for name, param in params.items()}
    optimizer = row.build_oracle(list(params.values()), options, foreach=foreach)
    train(optimizer, params, dtype, steps=range(steps), plain=True)
    return results(optimizer, params)


def flat(found):
    return torch.cat([value.detach().double().flatten() for _, value in sorted(found.items())])


# The same answers


def distance_to_float64(row, options, way):
    of = {"kinds": two, "steps": STEPS + 2}  # of fewer roundings chance makes more
    exact = flat(by_torch(row, options, torch.float32, **of, like=torch.float64))
    theirs = flat(by_torch(row, options, torch.float32, **of, foreach=row.name != "ASGD")) - exact
    ours = flat(trained(row, options, torch.float32, **of, **way)) - exact
    return ours, theirs


@pytest.mark.in_turn("row", every=2)
@variants(full=pytest.mark.long)  # these are tried with numbers of the device, and in float64
def test_no_farther_from_float64_than_torch(row, options, enough_elements, record_property):
    ours, theirs = distance_to_float64(row, options, FUSED)
    assert ours.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt()
    assert ours.abs().max() <= 1.5 * theirs.abs().max()
    record_property("compared", "gpu, interpreted: no farther from float64 than torch's foreach (ASGD: for-loop)")


@pytest.mark.in_turn("row", every=2)
@variants(plain=None)
def test_no_farther_with_numbers_of_the_device(row, options, enough_elements, record_property):
    ours, theirs = distance_to_float64(row, options, CAPTURABLE)
    assert ours.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt()
    assert ours.abs().max() <= 1.5 * theirs.abs().max()
    record_property("compared", "gpu, interpreted, capturable: no farther from float64 than torch's foreach")


@variants(plain=pytest.mark.long)
def test_float64_agrees_with_the_for_loop(row, options, record_property):
    actual = trained(row, options, torch.float64, kinds=two, **FUSED)
    assert_close(actual, by_torch(row, options, torch.float64, kinds=two), rtol=1e-11, atol=1e-11)
    record_property("compared", "gpu, interpreted: to rounding with the for-loop, float64")


@pytest.mark.in_turn("row", every=5)
@variants(plain=None)
def test_parameters_of_every_kind(row, options, record_property):
    """Their addresses and layouts are no matter of the rule: a few rules meet all kinds, and every rule two."""
    actual = trained(row, options, torch.float64, **FUSED)
    assert_close(actual, by_torch(row, options, torch.float64), rtol=1e-11, atol=1e-11)
    record_property("compared", "gpu, interpreted: parameters of every kind with the for-loop")


@pytest.mark.in_turn("row", every=2)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16], ids=str)
@variants(plain=None)
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(row, options, dtype, record_property):
    """The interpreter fuses no multiplication with an addition, so there is hardly anything to differ."""
    options = {**options, "lr": 2**-8}
    actual, expected = (
        row.slots_of(trained(row, options, dtype, kinds=two, steps=4, **way)) for way in (FUSED, {"foreach": False})
    )
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert (flat(actual) == flat(expected)).double().mean() > 0.99
    record_property("compared", "gpu, interpreted: 16-bit parameters, with the eager engine")


@pytest.mark.parametrize("name", ["Adam", "SGD", "ASGD"])
def test_state_may_be_wider_than_parameters(name):
    row = next(row for row in ELEMENTWISE if row.name == name)
    options = {**row.all_flags(), "lr": 2**-8, "state_dtype": torch.float32}
    ways = (FUSED, {"foreach": False})
    actual, expected = (trained(row, options, torch.bfloat16, kinds=some, steps=4, **way) for way in ways)
    assert_close(actual, expected, rtol=0.02, atol=1e-3)


@variants("Adam", "SGD", "Rprop")
def test_complex_parameters(row, options, record_property):
    ways = (FUSED, {"foreach": False})
    actual, expected = (trained(row, options, torch.complex64, kinds=some, **way) for way in ways)
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    record_property("compared", "gpu, interpreted: complex parameters, with the eager engine")


def special_values(dtype):
    info = torch.finfo(dtype)
    finite = [0.0, -0.0, 1.0, -1.5, 1e-20, info.tiny, -info.tiny / 4, info.tiny * info.eps, info.max, -info.max / 3]
    return torch.tensor([*finite, torch.inf, -torch.inf, torch.nan], dtype=dtype)


@variants()
def test_nan_inf_denormals_and_signed_zero(row, options, record_property):
    """Bit by bit, where the for-loop's order of operations is ours."""
    values = special_values(torch.float32)
    if options.get("centered"):  # whether inf minus a square that overflows is NaN depends on fused multiplication
        values = values[(values.abs() < 1e30) | values.isinf() | values.isnan()]
    found = []
    for way in (FUSED, {"foreach": False}):
        param = values.repeat_interleave(len(values)).requires_grad_()
        optimizer = row.ours([param], **options, **way)
        for step in range(4):
            param.grad = values.roll(3 * step).repeat(len(values))
            optimizer.step()
        found.append(results(optimizer, {"all": param}))
    assert_close(*found)
    zeros = {name: (value == 0) & (found[0][name] == 0) for name, value in found[1].items()}
    assert_same(*({name: result[name][zeros[name]] for name in zeros} for result in found))
    record_property("compared", "gpu, interpreted: NaN, inf, denormals and signed zero, with the eager engine")


class Everything(surefoot.Optimizer):
    """Uses what no optimizer of torch does."""

    slots = (surefoot.Slot("mask"), surefoot.Slot("power"))

    def __init__(self, params, lr=0.5, **options):
        super().__init__(params, {"lr": lr, **options})

    @staticmethod
    def update(param, grad, mask, power, c, flags):
        mask = torch.exp(-torch.abs(grad)) + torch.tanh(param) * torch.rsqrt(mask + 1.0)
        mask = torch.atan2(mask, grad)
        power = torch.pow(torch.abs(grad) + 1.0, c.lr * 3) + torch.log(mask * mask + 1.0) + 1.0 / (power + 2.0)
        bounded = torch.minimum(torch.where(grad > 0, torch.inf, param), torch.full_like(grad, 0.25))
        return torch.clamp(bounded - c.lr * power, -0.5, 2.5) + torch.sign(param), mask, power


def test_every_operation_of_a_rule_is_known():
    found = []
    for way in (FUSED, {"foreach": False}):
        params = three(torch.float32)
        optimizer = Everything(list(params.values()), **way)
        train(optimizer, params, torch.float32, steps=range(3))
        found.append(results(optimizer, params))
    assert_close(*found, rtol=1e-5, atol=1e-5)


def test_every_operation_has_an_expression():
    from surefoot.engines.gpu import source
    from surefoot.rule.ops import OPS

    assert {op.name for op in OPS if not op.reduces} == source._EXPRESSIONS.keys()


# Numbers on the device


class Unread(TorchDispatchMode):
    """Fails when a number is read from a tensor, which on a device would wait for it."""

    def __enter__(self):
        # It is to watch the kernel's way, which a mode of a user's would close.
        self._patch = mock.patch.object(modes, "_dispatch_modes", return_value=0)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


TENSORS = {"lr": 0.05, "weight_decay": 0.1, "momentum_decay": 0.01, "alpha": 0.8, "rho": 0.8, "eps": 1e-3, "lambd": 0.1}


@pytest.mark.in_turn("row", every=2)
@variants(plain=None)
def test_a_capturable_step_reads_nothing(row, options):
    """With hyperparameters that are tensors, and they count."""
    tensors = {name: torch.tensor(value) for name, value in TENSORS.items() if name in row.defaults}
    if "betas" in row.defaults:
        tensors["betas"] = with_third(row, (torch.tensor(0.8), torch.tensor(0.9)))
    options = {name: value for name, value in options.items() if name not in tensors} | tensors
    options |= unclipped(row)  # the norm of gradients on a CPU is read
    found = []
    for way in (CAPTURABLE, {"foreach": False}):
        params = two(torch.float32)
        optimizer = row.ours(list(params.values()), **options, **way)
        train(optimizer, params, torch.float32, steps=range(2))
        for step in range(STEADY, STEADY + 3):
            _set_gradients(params, step)
            options["lr"].mul_(0.9)
            if "capturable" in way:
                with Unread():
                    optimizer.step()
            else:
                optimizer.step()
        options["lr"].fill_(TENSORS["lr"])
        found.append(results(optimizer, params))
    # Numbers of the host are computed in the precision of hyperparameters that are tensors, float32.
    assert_close(*found, rtol=1e-3, atol=1e-4)


def _set_gradients(params, step):
    for position, param in enumerate(params.values()):
        if param.grad is not None:
            param.grad = torch.empty_like(param).copy_(normals(torch.float32, seed=100 * step + position)(*param.shape))


@pytest.mark.parametrize("engine", [{"foreach": False}, {"foreach": True}], ids=["eager", "foreach"])
@variants("Adam", "SGD", "ASGD", "Rprop", "RAdam")
def test_other_engines_take_numbers_on_the_device(row, options, engine):
    expected = trained(row, options, torch.float32, foreach=False)
    assert_close(trained(row, options, torch.float32, **engine, capturable=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (surefoot.Muon, {}),
        (surefoot.Muon, {"normuon": True, "cautious": True, "cautious_weight_decay": True, "split_sizes": (3, 1)}),
        (surefoot.Adafactor, {}),
    ],
    ids=str,
)
def test_steps_of_their_own_read_nothing_when_capturable(cls, options):
    found = []
    for capturable in (False, True):
        normal = normals(torch.float32, seed=3)
        params = [normal(4, 6).requires_grad_() for _ in range(3)]
        lr = torch.tensor(0.1, dtype=torch.float64)
        optimizer = cls(params, lr=lr if capturable else 0.1, weight_decay=0.1, capturable=capturable, **options)
        for step in range(4):
            for param in params:
                param.grad = normal(4, 6)
            if step and capturable:
                with Unread():
                    optimizer.step()
            else:
                optimizer.step()
        found.append(torch.stack([param.detach() for param in params]))
    torch.testing.assert_close(*found)


def _combined(params, **options):
    parts = [surefoot.Part(surefoot.Muon, "[01]", lr=0.1, **options), surefoot.Part(surefoot.AdamW, lr=0.1, **options)]
    return surefoot.Combined([(str(i), param) for i, param in enumerate(params)], parts)


def test_several_algorithms_read_nothing_when_capturable():
    found = []
    for capturable in (False, True):
        normal = normals(torch.float32, seed=3)
        params = [normal(4, 6).requires_grad_() for _ in range(4)]
        optimizer = _combined(params, capturable=capturable)
        for step in range(5):
            for param in params:
                param.grad = torch.empty_like(param).copy_(normal(4, 6))
            _step(optimizer, unread=step > 2 and capturable)
        found.append(torch.stack([param.detach() for param in params]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_several_algorithms_skip_together_what_a_scaler_has_found_infinite():
    normal = normals(torch.float32, seed=3)
    params = [normal(4, 6).requires_grad_() for _ in range(4)]
    twins = [param.detach().clone().requires_grad_() for param in params]
    optimizer, plain = _combined(params, capturable=True), _combined(twins, capturable=True)
    for step in range(4):
        for param, twin in zip(params, twins, strict=True):
            twin.grad = normal(4, 6)
            param.grad = 4.0 * twin.grad
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(step == 2))
        optimizer.step()
        if step != 2:
            plain.step()
        torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)


def test_a_stack_of_matrices_is_orthogonalised_as_each_of_them():
    for shape in ((5, 7, 4), (3, 4, 4), (2, 3, 9)):
        stack = normals(torch.float32, seed=5)(*shape)
        arguments = ((3.4445, -4.775, 2.0315), 5, 1e-7)
        each = torch.stack([newton_schulz(matrix, *arguments) for matrix in stack])
        torch.testing.assert_close(newton_schulz(stack, *arguments), each)


def test_scalars_on_the_device_may_be_edited_and_replaced():
    params = few(torch.float32)
    optimizer = surefoot.Adam(list(params.values()), **CAPTURABLE)
    train(optimizer, params, torch.float32, steps=[0, 1])
    steps = [entry["step"] for entry in optimizer.state.values()]
    steps[0].fill_(10)
    train(optimizer, params, torch.float32, steps=[2])
    assert steps[0] == 11
    optimizer.state[params["matrix"]]["step"] = torch.tensor(20.0)
    train(optimizer, params, torch.float32, steps=[3])
    assert optimizer.state[params["matrix"]]["step"] == 21


def test_scalars_that_are_integers_are_refused_on_the_device():
    class Counting(surefoot.Optimizer):
        scalars = (surefoot.Scalar("step", integer=True),)

        def __init__(self, params, lr=0.5, **options):
            super().__init__(params, {"lr": lr, **options})

        @staticmethod
        def update(param, grad, c, flags):
            return param - grad * c.lr

    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="`step` is declared as an integer, which is kept on the host"):
        Counting([param], capturable=True).step()
    assert not optimizer_state(param)


def optimizer_state(param):
    return {} if torch.equal(param, torch.ones(3)) else {"changed": True}


# A GradScaler's steps


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.ASGD, surefoot.NAdam, surefoot.SGD, surefoot.Prodigy])
def test_a_step_with_infinities_changes_nothing_and_reads_nothing(cls):
    options = {"momentum": 0.9, "dampening": 0.5} if cls is surefoot.SGD else {}
    found = []
    for skipped in (False, True):
        params = two(torch.float32)
        optimizer = cls(list(params.values()), **options, **CAPTURABLE)
        for step in range(STEADY, STEADY + 3):
            _set_all_gradients(params, step)
            if skipped:
                before = results(optimizer, params)
                before = {name: value.clone() for name, value in before.items()}
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
                _step(optimizer, unread=step > STEADY)
                after = results(optimizer, params)
                assert_same({name: after[name] for name in before}, before)
                _set_all_gradients(params, step, scale=4.0)
                optimizer.found_inf = torch.tensor(0.0)
                _step(optimizer, unread=step > STEADY)
                del optimizer.grad_scale, optimizer.found_inf
            else:
                optimizer.step()
        found.append(results(optimizer, params))
    assert_close(*found)


def test_numbers_that_parameters_share_stay_on_the_device_and_are_not_read():
    found = []
    for way in ({"foreach": False}, CAPTURABLE):
        params = list(few(torch.float32).values())
        optimizer = surefoot.Prodigy([{"params": params[:4]}, {"params": params[4:]}], d0=1e-3, **way)
        held = []
        for step in range(6):
            normal = normals(torch.float32, seed=step)
            for param in params:
                param.grad = torch.empty_like(param).copy_(param.detach() + 0.1 * normal(*param.shape))
            if "capturable" in way and step > 1:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(step == 3))
                held.append([group[name] for group in optimizer.param_groups for name in ("d", "d_numerator", "k")])
                before = [number.clone() for number in held[-1]]
                _step(optimizer, unread=step > STEADY)
                assert all(map(torch.equal, held[-1], before)) is (step == 3)
            elif step != 3:
                optimizer.step()
        found.append([[float(group[name]) for name in ("d", "d_numerator", "k")] for group in optimizer.param_groups])
    assert all(number is first for each in held for number, first in zip(each, held[0], strict=True))
    assert held[0][0] is held[0][3]  # of both groups
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[0][0][0] > 1e-3


def _step(optimizer, *, unread):
    if not unread:
        optimizer.step()
        return
    with Unread():
        optimizer.step()


def _set_all_gradients(params, step, scale=1.0):
    for position, param in enumerate(params.values()):
        grad = normals(torch.float32, seed=100 * step + position)(*param.shape) * scale
        param.grad = torch.empty_like(param).copy_(grad)


def test_a_momentum_buffer_whose_first_steps_were_skipped_is_still_new():
    """Also when something else has changed in between."""
    param = torch.ones(5, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, momentum=0.9, dampening=0.5, **CAPTURABLE)
    param.grad = torch.full((5,), torch.inf)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(param, torch.ones(5))
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.param_groups[0]["nesterov"] = 0
    optimizer.param_groups[0]["maximize"] = True
    param.grad = torch.full((5,), -1.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(param, torch.zeros(5))


def test_an_average_whose_first_steps_were_skipped_is_still_new():
    """Also when something else has changed in between, and where the algorithm has no slots."""
    param = torch.ones(5, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, ema=0.9, **CAPTURABLE)
    param.grad = torch.full((5,), torch.inf)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    optimizer.param_groups[0]["maximize"] = True
    param.grad = torch.full((5,), -1.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(param, torch.zeros(5))
    assert torch.equal(optimizer.state[param]["ema"], param)


# Short formats


class Converts(surefoot.Optimizer):
    """Stores the gradient in every format, and what was loaded from them in slots of float32."""

    slots = tuple(map(surefoot.Slot, ("signed", "unsigned", "weights", "codes", "unsigned_codes")))

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def update(param, grad, signed, unsigned, weights, codes, unsigned_codes, c, flags):
        return grad, grad, grad, param, signed, unsigned


FORMATS_16_BITS = [
    format_16_bits(dtype, stochastic=stochastic, correction=correction)
    for dtype in (torch.bfloat16, torch.float16)
    for stochastic, correction in ((True, None), (False, torch.int8), (True, torch.int8), (False, torch.int16))
]


def converted(engine, kept, step):
    """Load every pattern of 16 bits and of 8, and store floats of any pattern, from an odd element on."""
    generator, count = torch.Generator().manual_seed(step), 1 << 16

    def drawn(low, high, dtype, size=count):
        return torch.randint(low, high, (size,), generator=generator).to(dtype)

    params = [torch.arange(count).to(torch.uint16).view(kept.dtype)]
    grads = drawn(-(1 << 31), 1 << 31, torch.int32).view(torch.float32)
    grads[::3] = torch.randn(len(grads[::3]), generator=generator) * 2.0 ** drawn(-30, 4, torch.float32)[::3]
    grads[::100], grads[1::100], grads[2::100] = torch.nan, torch.inf, -torch.inf
    grads[4096:4736] = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 2.0**-126]).repeat(128)
    every = torch.arange(count).to(torch.uint8)
    scales = [2.0 ** drawn(-126, 127, torch.float32, count // 128) for _ in range(2)]
    corrections = [[drawn(-(1 << 15), 1 << 15, kept.correction)]] if kept.correction else []
    bucket = engines.Bucket(
        bind(Converts.spec, (*Converts.spec.settle_flags({}), ("rounded", True))),
        params,
        [grads],
        {},
        slots=[[every], [every.clone()], *([torch.zeros(count)] for _ in range(3))],
        coefficients=[{"rounding_step": float(step)}],
        row=np.zeros(1, dtype=np.int64),
        formats=(kept, format_8_bits(signed=True), format_8_bits(signed=False), *[format_of(torch.float32)] * 3),
        parts=[*corrections, *([scale] for scale in scales)],
        identities=[Identity(-(1 << 63) + 5, (1 << 20,), (4095,), (count,))],
        seed=(1 << 63) - 7,
    )
    engine.run(bucket)
    return {str(index): column[0] for index, column in enumerate(bucket.columns())}


@pytest.mark.parametrize("kept", FORMATS_16_BITS, ids=lambda kept: kept.name)
def test_short_formats_are_those_of_the_reference(kept, large_blocks):
    """All 256 codes, all 65,536 numbers of 16 bits, and rounding by the same random bits."""
    assert_same(converted(gpu, kept, 3), converted(engines.eager, kept, 3))


FLOAT8 = {"state_dtype": "float8", "rounding": "stochastic"}
BITS_24 = {"state_dtype": "float8", "master_weight_bits": 24}
STOCHASTIC_STATE = {"master_weight_bits": 32}


@pytest.mark.parametrize("options", [FLOAT8 | FUSED, BITS_24 | CAPTURABLE, STOCHASTIC_STATE | FUSED], ids=str)
def test_steps_with_short_formats_are_those_of_the_eager_engine(options, large_blocks):
    """Whatever the layout: blocks and random bits go by elements in C order unless all tensors are alike."""
    normal, found = normals(torch.bfloat16, seed=9), []
    values = [normal(4225), normal(66, 65).t(), normal(2, 3, 5, 7).to(memory_format=torch.channels_last)]
    for way in ({}, {"fused": None, "capturable": False, "foreach": False}):
        params = {str(index): value.clone().requires_grad_() for index, value in enumerate(values)}
        optimizer = surefoot.AdamW(list(params.values()), lr=2**-8, weight_decay=0.5, **(options | way))
        for step in range(2):
            _set_all_gradients(params, step)
            optimizer.step()
        assert way or all(run.engine is gpu for run in optimizer._step_cache.runs)
        found.append(results(optimizer, params))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    equal = [torch.isclose(ours[name].float(), value.float(), rtol=1e-6, atol=1e-7) for name, value in theirs.items()]
    assert min(each.float().mean() for each in equal) > 0.99, "the last place of the arithmetic explains a few"


def test_a_skipped_step_changes_no_code_and_no_scale(large_blocks):
    param = torch.randn(4225).to(torch.bfloat16).requires_grad_()
    optimizer = surefoot.AdamW([param], **BITS_24, **CAPTURABLE, max_grad_norm=1e6, telemetry=True)
    for skipped in (0.0, 1.0):
        before = {name: value.clone() for name, value in results(optimizer, {"p": param}).items()}
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(skipped)
        param.grad = torch.full_like(param, torch.inf if skipped else 1.0)
        optimizer.step()
    assert len(before) == 1 + 6
    assert_same(results(optimizer, {"p": param}), before)


# What is measured


def strange_values(dtype):
    """Make tensors that are empty, small, of one chunk and of many; with NaN, inf and what overflows when squared."""
    made = [*few(dtype).values(), torch.empty(0, dtype=dtype), normals(dtype, seed=8)(2 * 4096)]
    made = [tensor.detach() for tensor in made]
    spoilt = [made[-1].clone() for _ in range(4)]
    spoilt[0][5000], spoilt[1][70], spoilt[2][-1] = torch.nan, -torch.inf, torch.inf
    spoilt[2][0] = -torch.nan
    spoilt[3] *= torch.finfo(dtype).max / 8
    return [*made, *spoilt, made[-1] * torch.finfo(dtype).tiny, torch.full_like(made[-1], -0.0)]


def measured_of(params, grads):
    optimizer = surefoot.SGD(params)
    rule = rule_of(optimizer, optimizer.param_groups[0])
    return gpu.measure(engines.Bucket(rule, [param.detach() for param in params], grads, {}), gradient_rule())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_are_read_precisely(dtype):
    """As sums in float64, whatever the dtype: no square overflows or vanishes on the way."""
    grads = strange_values(dtype)
    found = measured_of([torch.zeros_like(grad) for grad in grads], grads)
    exact = torch.stack([reduce(gradient_rule().reductions, (grad, grad)) for grad in grads])
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0.0, equal_nan=True)
    assert torch.equal(found[:, 1].nan_to_num(-1.0), exact[:, 1].nan_to_num(-1.0))
    assert found.dtype is torch.float64


def test_gradients_of_any_layout_are_read():
    grads = [torch.randn(6, 4).t(), torch.randn(1).expand(4, 6), torch.randn(8, 10)[:, ::2], torch.randn(5000)[1:]]
    params = [torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(8, 5), torch.zeros(4999)]
    before = [grad.clone() for grad in grads]
    found = measured_of(params, grads)
    exact = torch.stack([reduce(gradient_rule().reductions, (grad, grad)) for grad in grads])
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0.0)
    assert all(map(torch.equal, grads, before))
    assert not any(param.any() for param in params)


def test_many_chunks_are_put_together():
    parts = torch.rand(3, 5001, dtype=torch.float64)
    parts[1, 2500] = parts[2, 4000] = torch.nan
    parts[2, 1] = torch.inf
    firsts = torch.tensor([0, 0, 1, 2400, 2400, 5001])
    kinds = ("sum_of_squares", "largest", "largest")
    found = combined([Reduction("gradient", kind) for kind in kinds], parts, firsts)
    rows = [parts[:, a:b] for a, b in pairwise(firsts)]
    exact = [[row[0].sum(), *(part.max() if part.numel() else torch.zeros(()) for part in row[1:])] for row in rows]
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0.0, equal_nan=True)
    assert found[2, 2] == torch.inf


def noted(row, options, dtype, way, **whole):
    params, telemetry = some(dtype), Noted()
    optimizer = row.ours(list(params.values()), **options, **way, telemetry=telemetry, **whole)
    train(optimizer, params, dtype, steps=range(3))
    return telemetry.raw, results(optimizer, params)


@pytest.mark.in_turn("row")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@variants("Adam", "SGD", plain=None)
def test_the_update_measures_what_the_eager_engine_does(row, options, dtype):
    options = {**options, "lr": 2**-8}
    (ours, params), (theirs, expected) = (
        noted(row, options, dtype, way, max_grad_norm=0.5) for way in (FUSED, {"foreach": False})
    )
    tolerance = 1e-5 if dtype.itemsize > 2 else 1e-2
    assert_close(params, expected, rtol=8 * tolerance, atol=8 * tolerance)
    for raw, other in zip(ours, theirs, strict=True):
        assert raw.names == other.names
        torch.testing.assert_close(raw.sums, other.sums, rtol=tolerance, atol=1e-6 * tolerance)
        assert float(raw.clip) == pytest.approx(float(other.clip), rel=1e-6)


@ways
def test_measuring_changes_nothing_and_keeps_the_plan(way):
    """Also where only some steps are measured."""
    found = []
    for telemetry in (None, surefoot.telemetry.Telemetry(every=2)):
        params = two(torch.float32)
        optimizer = surefoot.NAdam(list(params.values()), **way, telemetry=telemetry)
        train(optimizer, params, torch.float32, steps=range(STEADY + 1))
        runs = optimizer._step_cache.runs
        train(optimizer, params, torch.float32, steps=range(STEADY + 1, STEADY + 4))
        assert optimizer._step_cache.runs is runs
        assert all(run.slice.before is None for run in runs)
        found.append(results(optimizer, params))
    assert_same(*found)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.SGD])
def test_what_a_scaler_skips_is_measured_as_it_stands(cls):
    """Gradients as they are, parameters as they stay, no update."""
    params = [torch.randn(5000).requires_grad_(), torch.randn(30, 20).t().requires_grad_()]
    telemetry = Noted()
    optimizer = cls(params, lr=0.1, **CAPTURABLE, telemetry=telemetry, ema=0.9)
    optimizer.grad_scale = torch.tensor(4.0)
    for skipped in (0.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(skipped)
        for param in params:
            param.grad = torch.randn(param.shape)
            param.grad[0] = torch.nan if skipped else 1.0
        state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        before = [param.detach().clone() for param in params]
        optimizer.step()
        after = [value for entry in optimizer.state.values() for value in entry.values()]
        assert not skipped or all(map(torch.equal, (*params, *after), (*before, *state)))
        for sums, param, old in zip(telemetry.raw[-1].sums, params, before, strict=True):
            values = (param.grad / 4, param, param - old, param.grad / 4, param.grad / 4)
            exact = reduce(TELEMETRY, [value.detach() for value in values])
            torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_clipping_waits_for_nothing(monkeypatch):
    """The norm is on the device, and so is what gradients are multiplied with."""
    found = []
    for clip in (torch.tensor(0.25, dtype=torch.float64), 0.25):
        monkeypatch.setattr(clipping, "_factor", lambda *_, clip=clip: clip)
        params = two(torch.float32)
        optimizer = surefoot.Adam(list(params.values()), max_grad_norm=1.0, **FUSED, telemetry=True)
        train(optimizer, params, torch.float32, steps=range(STEADY + 1))
        for step in range(3):
            _set_gradients(params, step)
            with Unread():
                optimizer.step()
        found.append(results(optimizer, params))
    assert_same(*found)


def test_guards_look_at_what_the_kernel_has_read():
    params = {name: torch.ones(5000).requires_grad_() for name in "ab"}
    optimizer = surefoot.SGD(list(params.items()), lr=1.0, **FUSED, nonfinite="raise")
    for step in range(3):
        for param in params.values():
            param.grad = torch.ones(5000)
        if step == 2:
            params["b"].grad[4999] = torch.nan
            with pytest.raises(NonFiniteGradientError, match="the gradients of `b` hold inf or NaN"):
                optimizer.step()
        else:
            optimizer.step()
    assert all(torch.equal(param, torch.full((5000,), -1.0)) for param in params.values())


def test_a_captured_step_may_be_clipped(monkeypatch):
    """Which sends addresses twice: there is pinned memory for as many graphs as without."""
    found = []
    for capture in (False, True):
        with monkeypatch.context() as patch:
            params = two(torch.float32)
            optimizer = surefoot.Adam(list(params.values()), max_grad_norm=0.1, **CAPTURABLE)
            train(optimizer, params, torch.float32, steps=range(STEADY + 1))
            kept = len(tables._kept_for_graphs)
            for module in (tables, plan, device) if capture else ():
                patch.setattr(module, "capturing", lambda *_: True)
            train(optimizer, params, torch.float32, steps=range(STEADY + 1, STEADY + 1 + tables.SPARES))
            del tables._kept_for_graphs[kept:]
        found.append(results(optimizer, params))
    assert_same(*found)


# Averages


def test_averages_of_models_are_kept(monkeypatch):
    monkeypatch.setattr(averages, "choose", lambda bucket: gpu)
    models = [torch.nn.Linear(40, 30) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = surefoot.swa_utils.AveragedModel(models[0]), torch.optim.swa_utils.AveragedModel(models[1])
    kept = []
    for step in range(5):
        for model, average in zip(models, (ours, theirs), strict=True):
            for param in model.parameters():
                param.data.mul_(1 + step)
            average.update_parameters(model)
        kept.append(ours._update)
        if step == 3:
            models[0].weight.data = models[0].weight.data.clone()
    assert kept[1] is kept[2] is kept[3]
    assert kept[4] is not kept[3]
    assert all(map(torch.allclose, ours.parameters(), theirs.parameters()))


# Plans and tables


@pytest.fixture(params=["compiled", "plain"])
def looking(request, monkeypatch):
    """Look at tensors as where llvmlite is installed, and as where it is not."""
    if request.param == "plain":
        monkeypatch.setattr(native, "available", lambda: False)
    return request.param


def test_looks_are_those_asked_for(looking):
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = surefoot.Adam([param], **FUSED)
    optimizer.step()
    (run,) = optimizer._step_cache.runs
    plain = (guards.PlainTensorGuard, guards.PlainScalarIO)
    kinds = plain if looking == "plain" else (native.TensorGuard, native.ScalarIO)
    assert (type(run.guard.tensors), type(run.guard.numbers)) == kinds


@ways
def test_a_plan_is_used_again_and_given_up(way, looking):
    params = few(torch.float32)
    optimizer = surefoot.AdamW(list(params.values()), **way)
    train(optimizer, params, torch.float32, steps=[STEADY])
    plans = [run.bucket.plan for run in optimizer._step_cache.runs]
    train(optimizer, params, torch.float32, steps=[STEADY + 1])
    assert [run.bucket.plan for run in optimizer._step_cache.runs] == plans
    assert all(run.bucket.grads == [] for run in optimizer._step_cache.runs)
    with torch.no_grad():
        params["matrix"].data = params["matrix"].data.clone()
    train(optimizer, params, torch.float32, steps=[STEADY + 2])
    assert [run.bucket.plan for run in optimizer._step_cache.runs] != plans


CHANGES = {
    "data": lambda t: setattr(t, "data", torch.randn(4, 3)),
    "data in other order": lambda t: setattr(t, "data", t.data.view(3, 4).t()),
    "set_": lambda t: t.set_(torch.randn(4, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("what", ["param", "slot"])
@ways
def test_a_changed_tensor_is_noticed(change, what, way, looking):
    found = []
    for each in (way, {"foreach": False}):
        torch.manual_seed(0)
        param = torch.randn(4, 3).requires_grad_()
        optimizer = surefoot.Adam([param], lr=0.1, **each)
        for step in range(4):
            param.grad = torch.randn(4, 3)
            optimizer.step()
            if step == 1:
                with torch.no_grad():
                    change(param if what == "param" else optimizer.state[param]["exp_avg"])
        found.append(results(optimizer, {"p": param}))
    assert_close(*found)


STATE_CHANGES = {
    "step edited": lambda state, last: state[last]["step"].fill_(7),
    "step replaced": lambda state, last: state[last].update(step=torch.tensor(7.0)),
    "step of the host's own": lambda state, last: state[last].update(step=7),
    "slot replaced": lambda state, last: state[last].update(exp_avg=state[last]["exp_avg"] * 2),
    "slot edited": lambda state, last: state[last]["exp_avg"].mul_(2),
    "entry replaced": lambda state, last: state.update({last: {k: v * 2 for k, v in state[last].items()}}),
    "last one deleted": lambda state, last: state.pop(last),
    "cleared": lambda state, last: state.clear(),
}


@ways
@pytest.mark.parametrize("change", STATE_CHANGES.values(), ids=list(STATE_CHANGES))
def test_changed_state_counts(change, way, looking):
    found = []
    for each in (way, {"foreach": False}):
        torch.manual_seed(0)
        params = {name: torch.randn(4, 3).requires_grad_() for name in "bc"}
        optimizer = surefoot.Adam(list(params.values()), lr=0.1, **each)
        for step in range(5):
            for param in params.values():
                param.grad = torch.randn(4, 3)
            optimizer.step()
            if step == 2:
                change(optimizer.state, params["c"])
        found.append({name: value for name, value in results(optimizer, params).items() if "step" not in name})
    assert_close(*found)


@ways
def test_complex_parameters_are_watched(way, looking):
    """Their gradients' memory is that of the real views; one that is only marked as conjugate is not.

    Only graphs need the views kept, which would keep parameters from being swapped.
    """
    param, expected = (torch.ones(3, dtype=torch.complex64).requires_grad_() for _ in range(2))
    optimizer = surefoot.SGD([param], lr=0.5, momentum=0.9, **way)
    reference = surefoot.SGD([expected], lr=0.5, momentum=0.9, foreach=False)
    for step in range(7):
        grad = torch.full((3,), complex(step, 1.0))
        for each in (param, expected):
            each.grad = grad.clone().conj() if step == 3 else grad.clone()
        runs = optimizer._step_cache.runs if step else None
        optimizer.step()
        reference.step()
        assert (optimizer._step_cache.runs is runs) == (way is CAPTURABLE and step in (1, 2, 5, 6))
        assert_close({"p": param}, {"p": expected})


def test_gradients_live_until_the_kernel_has_its_addresses(monkeypatch, looking):
    """Another thread may drop them at any time."""
    param = torch.ones(5, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, **FUSED)
    for _ in range(3):
        param.grad = torch.ones(5)
        optimizer.step()
    param.grad = torch.ones(5)
    grad, start, seen = weakref.ref(param.grad), plan.Plan._start, []

    def start_while_another_thread_drops_it(self, *arguments):
        param.grad = None
        seen.append(grad() is not None)
        return start(self, *arguments)

    monkeypatch.setattr(plan.Plan, "_start", start_while_another_thread_drops_it)
    optimizer.step()
    assert seen == [True]
    assert grad() is None
    assert param.tolist() == [-3.0] * 5


_WITHOUT_LLVM = """
import sys
sys.modules["llvmlite"] = None
import torch, surefoot
from surefoot.state import check
from surefoot.engines import eager, foreach, gpu
for fused in (False, True):
    gpu.DEVICES = check.CAPTURABLE_DEVICES = ("cpu",) if fused else ()
    param = torch.ones(3, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, momentum=0.5, **({"fused": True} if fused else {}))
    for step in range(4):
        param.grad = torch.ones(3)
        optimizer.step()
    assert param.tolist() == [-5.125] * 3, param
runs = optimizer._step_cache.runs
assert [run.engine for run in runs] == [gpu]
from surefoot.tensors import guards
assert type(runs[0].guard.tensors) is guards.PlainTensorGuard
model = torch.nn.Linear(2, 2)
average = surefoot.swa_utils.AveragedModel(model)
for _ in range(3):
    average.update_parameters(model)
"""


def test_llvm_is_not_needed():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _WITHOUT_LLVM], check=True, timeout=120, env=environment)  # noqa: S603 (our own code)


def test_chunks_cover_every_element_once():
    sizes = np.array([0, 1, 1024, 0, 5 * 1024 + 3, 2, 1025])
    covered = [[] for _ in sizes]
    for chunk in plan.chunks_of(sizes, 1024).tolist():
        tensor, number = chunk & 0xFFFFFFFF, chunk >> 32
        covered[tensor] += range(number * 1024, min(int(sizes[tensor]), (number + 1) * 1024))
    assert covered == [list(range(size)) for size in sizes]


def test_offsets_have_64_bits():
    (last,) = plan.chunks_of(np.array([5 * 2**32]), 1024)[-1:]
    assert (int(last) >> 32) * 1024 == 5 * 2**32 - 1024


def test_only_what_has_changed_is_sent(monkeypatch):
    sent = []
    monkeypatch.setattr(
        tables.Table,
        "_send",
        lambda self, first, end, send=tables.Table._send: (sent.append((first, end)), send(self, first, end)),
    )
    values = np.arange(12.0).reshape(3, 4)
    table = tables.Table(values, torch.device("cpu"))
    table.update(values)
    values[1, 1], values[1, 3] = np.nan, -0.0
    table.update(values)
    table.update(values)
    assert sent == [(0, 12), (5, 8)]
    np.testing.assert_array_equal(table.there.numpy(), values)


def test_while_a_graph_is_captured_everything_is_sent_and_kept(monkeypatch):
    values = np.arange(4)
    table = tables.Table(values, torch.device("cpu"), for_graphs=1)
    kept = len(tables._kept_for_graphs)
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    for graph in range(tables.SPARES):
        table.update(values + graph)
    with pytest.raises(
        RuntimeError, match="at most 16 graphs may be captured in a row; take a step outside of a capture"
    ):
        table.update(values)
    memory = tables._kept_for_graphs[kept:]
    assert [pinned.tolist() for _, pinned in memory] == [(values + graph).tolist() for graph in range(tables.SPARES)]
    monkeypatch.setattr(tables, "capturing", lambda device: False)
    for _ in range(2):
        table.there.fill_(-1)  # as a replay would set it
        table.update(values)
        assert table.there.tolist() == values.tolist()
    assert [pinned.tolist() for _, pinned in memory] == [(values + graph).tolist() for graph in range(tables.SPARES)]
    del tables._kept_for_graphs[kept:]


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 5), (1, 3, 1, 2), ()])
def test_copies_are_laid_out_alike(shape):
    tensor = torch.zeros(shape)
    turned = torch.zeros(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    same = plan.laid_out_alike([turned, tensor, turned])
    assert same_dense_layout(same)
    assert same[0] is turned
    assert same_dense_layout(plan.laid_out_alike([tensor.expand(2, *shape), torch.zeros(2, *shape)]))


def test_a_step_writes_nothing_but_its_own():
    base = torch.arange(60.0)
    param = base[3:51].view(8, 6)[:, ::2].detach().requires_grad_()
    param.grad = torch.ones(1).expand(8, 3)
    before = base.clone()
    surefoot.SGD([param], lr=1.0, **FUSED).step()
    mine = torch.zeros(60, dtype=torch.bool)
    mine[3:51].view(8, 6)[:, ::2] = True
    assert torch.equal(base, torch.where(mine, before - 1, before))


def test_versions_are_bumped():
    param = torch.ones(5, requires_grad=True)
    param.grad = torch.ones(5)
    optimizer = surefoot.Adam([param], **FUSED)
    optimizer.step()
    versions = [t._version for t in (param, optimizer.state[param]["exp_avg"])]
    optimizer.step()
    assert [t._version for t in (param, optimizer.state[param]["exp_avg"])] > versions
    assert param.grad._version == 0


# Capture, as far as it shows without a device


def test_capture_needs_capturable(monkeypatch):
    monkeypatch.setattr(device, "capturing", lambda: True)
    message = (
        "Attempting CUDA graph capture of step() for an instance of {} but param_groups' capturable is False. "
        "Set capturable=True before the steps that warm up"
    )
    for cls in (surefoot.Adam, surefoot.Muon, surefoot.Adafactor):
        param = torch.ones(2, 2, requires_grad=True)
        param.grad = torch.ones(2, 2)
        with pytest.raises(RuntimeError) as caught:
            cls([param]).step()
        assert str(caught.value) == message.format(cls.__name__)


@pytest.mark.parametrize("cls", [surefoot.Adam, surefoot.SGD, surefoot.Muon, surefoot.Adafactor])
def test_the_first_step_is_not_captured(monkeypatch, cls):
    monkeypatch.setattr(device, "capturing", lambda: True)
    param = torch.ones(2, 2, requires_grad=True)
    param.grad = torch.ones(2, 2)
    optimizer = cls([param], capturable=True)
    with pytest.raises(RuntimeError, match=f"the step of {cls.__name__} that is captured in a graph must be like the"):
        optimizer.step()
    assert not optimizer.state


def test_a_captured_step_goes_on_from_the_last(monkeypatch):
    """Everything is sent anew, and nothing is made anew."""
    found = []
    for capture in (False, True):
        with monkeypatch.context() as patch:
            params = two(torch.float32)
            optimizer = surefoot.NAdam(list(params.values()), **CAPTURABLE)
            train(optimizer, params, torch.float32, steps=range(STEADY + 1))
            runs = optimizer._step_cache.runs
            if capture:
                patch.setattr(device, "capturing", lambda: True)
                patch.setattr(tables, "capturing", lambda device: True)
                patch.setattr(plan, "capturing", lambda device: True)
            train(optimizer, params, torch.float32, steps=[STEADY + 2, STEADY + 3])
            assert optimizer._step_cache.runs is runs
        found.append(results(optimizer, params))
    assert_same(*found)


@pytest.mark.parametrize("change", ["lr", "grad"])
def test_a_replay_between_two_steps_is_reckoned_with(monkeypatch, change):
    """A replay sets tables to what they were when it was captured, which the next step outside must not rely on."""
    param = torch.zeros(5, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, capturable=True, fused=True)
    first, second = torch.ones(5), torch.full((5,), 10.0)
    param.grad = first
    optimizer.step()
    of_work = optimizer._step_cache.runs[0].bucket.plan
    table, numbers = (
        of_work._table.there,
        of_work._numbers[optimizer._step_cache.runs[0].bucket.rule.coefficients].table,
    )
    captured = table.clone(), numbers.clone()
    with monkeypatch.context() as patch:
        for module in (tables, plan):
            patch.setattr(module, "capturing", lambda device: True)
        optimizer.step()  # here it is not only recorded but taken
    if change == "lr":
        optimizer.param_groups[0]["lr"] = 10.0
    else:
        param.grad = second
    for _ in range(2):
        optimizer.step()
        table.copy_(captured[0])
        numbers.copy_(captured[1])
    assert param.tolist() == [-22.0] * 5


# Who serves


def _bucket(**options):
    rule = engines.Bucket
    param = torch.ones(3, requires_grad=True)
    optimizer = surefoot.Adam([param])
    return rule(rule_of(optimizer, optimizer.param_groups[0]), [param], [torch.ones(3)], options)


def test_reasons_against_it(monkeypatch):
    bucket = _bucket()
    assert gpu.supports(bucket) is None
    monkeypatch.setattr(gpu, "DEVICES", ("cuda", "xpu"))
    assert gpu.supports(bucket) == "parameters are on cpu, this engine serves cuda and xpu"
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    assert gpu.supports(_bucket(differentiable=True)) == "kernels carry no gradients through the step"
    bucket.params *= 2
    assert gpu.supports(bucket) == "a parameter stands in the group twice, and kernels update all at once"
    bucket = _bucket()
    bucket.grads = [torch.ones(3, dtype=torch.int32)]
    assert gpu.supports(bucket) == "kernels do not know float32 parameters with torch.int32 gradients"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.supports(_bucket()) == (
        "Triton is not installed; it comes with PyTorch for GPUs, or by pip install triton"
    )
    assert engines.choose(_bucket()) is engines.eager


def test_old_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    message = "Triton serves compute capability 8.0 and newer, but cuda:0 has 7.5"
    assert gpu._unsupported_reason.__wrapped__(torch.device("cuda", 0)) == message


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Triton brings its tools")
def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "DEVICES", ("xpu",))
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    message = "Triton finds no Python.h, with which it builds its launcher; install Python's development headers"
    assert gpu._unsupported_reason.__wrapped__(torch.device("xpu", 0)) == message
    (tmp_path / "Python.h").touch()
    assert gpu._unsupported_reason.__wrapped__(torch.device("xpu", 0)) is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    message = "Triton finds no C compiler, with which it builds its launcher; install gcc or clang, or set CC"
    assert gpu._unsupported_reason.__wrapped__(torch.device("xpu", 0)) == message


def test_the_choice_on_a_gpu(monkeypatch):
    bucket = _bucket()
    monkeypatch.setattr(gpu, "DEVICES", ("meta",))
    monkeypatch.setattr(gpu, "_unsupported_reason", lambda device: None)
    monkeypatch.setattr(engines, "_FOREACH_DEVICES", ("meta",))
    bucket.params, bucket.grads = [torch.ones(3, device="meta")], [torch.ones(3, device="meta")]
    assert engines.choose(bucket) is gpu
    monkeypatch.setattr(gpu, "_unsupported_reason", lambda device: "it is too old")
    assert engines.choose(bucket) is engines.foreach
    bucket.options = {"fused": True}
    with pytest.raises(RuntimeError, match="`fused=True` cannot serve Adam here: it is too old"):
        engines.choose(bucket)


def test_capturable_is_an_option_of_everything_that_can_be_captured():
    without = {
        cls
        for cls in surefoot.optimizers.__all__
        if "capturable" not in inspect.signature(getattr(surefoot, cls)).parameters
    }
    assert without == {"LBFGS", "SOAP", "SparseAdam"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
def test_the_benchmark_says_that_it_measured_nothing(monkeypatch):
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    message = "benchmarks/gpu.py needs a CUDA device, and there is none: nothing was measured"
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(script), run_name="__main__")


# Proved before it serves by default


@pytest.fixture
def unproved(monkeypatch, tmp_path):
    """Forget what is known of kernels, in this process and on disk."""
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "kernels"))
    proof.doubt.cache_clear()
    engines._warn_once.cache_clear()
    yield
    proof.doubt.cache_clear()
    compiling.load.cache_clear()  # of kernels that were broken


def break_kernels(monkeypatch, right, wrong):
    """Let kernels have something else in one place."""
    whole = compiling.print_kernel

    def broken(*arguments):
        text = whole(*arguments)
        assert right in text
        return text.replace(right, wrong)

    for place in (compiling, proof):
        monkeypatch.setattr(place, "print_kernel", broken)
    compiling.load.cache_clear()


def one_step(cls=surefoot.AdamW, dtype=torch.float32, **options):
    """Return the engine that makes a step, and the parameter after it."""
    param = torch.linspace(-1, 1, 50, dtype=dtype).requires_grad_()
    param.grad = torch.linspace(0.5, 2, 50, dtype=dtype)
    optimizer = cls([param], **{"lr": 0.1, **options})
    optimizer.step()
    runs = optimizer._step_cache.runs
    return runs[0].engine if runs else None, param.detach()


@pytest.mark.usefixtures("unproved")
@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@variants(plain=pytest.mark.long)
def test_a_right_kernel_serves(row, options, dtype, record_property):
    """A false alarm would be a warning, which is an error here; formats with random bits are not proved."""
    options = options | ({"state_dtype": torch.float32} if dtype is torch.bfloat16 else {})
    assert one_step(row.ours, dtype, **options)[0] is gpu
    record_property("compared", "gpu, interpreted: proved, one step of all ways through the kernel with foreach")


WRONG = {
    "an operation": ("root(", "(1.001 *"),
    "an end is left": ("lanes < rest, ", "lanes < rest - 1, "),
    "a neighbour is written": ("lanes < rest, ", "lanes <= rest, "),
    "an end in wide accesses is left": ("lanes < rest // 8 * 8", "lanes < rest // 8 * 8 - 8"),
    "a block is left": ("while rest > end:", "while rest > end + BLOCK:"),
    "numbers of another tensor": ("row = coefficients + tl.load(entry + 5 * tensors)", "row = coefficients"),
    "it does not compile": ("lanes = tl.arange(0, BLOCK)", "lanes = tl.no_such_thing(0, BLOCK)"),
}


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_does_not_serve(monkeypatch, wrong):
    break_kernels(monkeypatch, *WRONG[wrong])
    with pytest.warns(
        RuntimeWarning, match="the kernel of AdamW for torch.float32 has failed its test on cpu: "
    ) as seen:
        engine, param = one_step()
    assert engine is foreach
    assert len([warning for warning in seen if "failed its test" in str(warning.message)]) == 1
    assert torch.equal(param, one_step(foreach=True)[1])
    assert torch.equal(param, one_step()[1])  # and no second warning, which would be an error
    before = torch.linspace(-1, 1, 50).requires_grad_()
    before.grad = torch.ones(50)
    optimizer = surefoot.AdamW([before], fused=True)
    with pytest.raises(
        RuntimeError, match="`fused=True` cannot serve here: the kernel of AdamW .* has failed its test"
    ):
        optimizer.step()
    assert torch.equal(before.detach(), torch.linspace(-1, 1, 50))
    assert not optimizer.state[before]


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("right", [True, False])
def test_what_was_found_is_remembered(monkeypatch, right):
    if not right:
        break_kernels(monkeypatch, "lanes < rest, ", "lanes < rest - 1, ")
    with nullcontext() if right else pytest.warns(RuntimeWarning, match="has failed its test"):
        one_step()
    proof.doubt.cache_clear()  # another process
    engines._warn_once.cache_clear()
    monkeypatch.setattr(proof, "_difference", lambda *arguments: pytest.fail("compared again"))
    with nullcontext() if right else pytest.warns(RuntimeWarning, match="elements of parameters are not what torch's"):
        assert one_step()[0] is (gpu if right else foreach)


@pytest.mark.usefixtures("unproved")
def test_what_was_found_holds_for_its_driver_and_releases_only(monkeypatch, tmp_path):
    compared = []
    monkeypatch.setattr(proof, "_difference", lambda *arguments: compared.append(arguments))
    driver = tmp_path / "version"
    monkeypatch.setattr(proof, "_DRIVERS", (driver,))
    for release in ("1", "2", "2"):
        driver.write_text(release)
        proof.doubt.cache_clear()
        one_step()
    monkeypatch.setattr(torch, "__version__", "99.0")
    proof.doubt.cache_clear()
    one_step()
    assert len(compared) == 3


@pytest.mark.usefixtures("unproved")
def test_a_failure_is_not_remembered(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(proof, "_difference", mock.Mock(side_effect=RuntimeError("out of memory")))
        with pytest.warns(RuntimeWarning, match="RuntimeError: out of memory. The foreach engine serves instead"):
            one_step()
    proof.doubt.cache_clear()  # another process
    assert one_step()[0] is gpu


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"telemetry": True}], ids=str)
def test_kernels_that_measure_are_proved_too(monkeypatch, options):
    """The update's kernel is right; the one that measures is first used in a later step."""
    param = torch.linspace(-1, 1, 50).requires_grad_()
    optimizer = surefoot.AdamW([param])
    for _ in range(2):
        param.grad = torch.ones(50)
        optimizer.step()
    assert optimizer._step_cache.runs[0].engine is gpu
    monkeypatch.setattr(proof, "_small", mock.Mock(side_effect=RuntimeError("broken")))
    for name, value in options.items():
        setattr(optimizer.step_options, name, value)
    param.grad = torch.ones(50)
    with pytest.warns(RuntimeWarning, match="has failed its test on cpu: RuntimeError: broken"):
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.usefixtures("unproved")
def test_averages_have_kernels_that_are_proved(monkeypatch):
    break_kernels(monkeypatch, "lanes < rest, ", "lanes < rest - 1, ")
    average, value = torch.zeros(5), torch.ones(5)
    with pytest.warns(RuntimeWarning, match="the kernel of Average for torch.float32 has failed its test"):
        averages.Averaging([average], [value]).move(0.5)
    assert average.tolist() == [0.5] * 5


@pytest.mark.usefixtures("unproved")
def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(proof, "_difference", lambda *arguments: pytest.fail("compared"))
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    bucket = mock.Mock(device=torch.device("cpu"))
    assert gpu.doubt(bucket, rule_of(surefoot.SGD([torch.zeros(1)]), {"lr": 1})) is None


@pytest.mark.usefixtures("unproved")
def test_the_doctor_says_that_a_kernel_has_failed(monkeypatch):
    break_kernels(monkeypatch, "lanes < rest, ", "lanes < rest - 1, ")
    found = doctor.Diagnosis()
    doctor._try_kernel(found, torch.device("cpu"))
    assert len(found.problems) == 1
    assert "the kernel of SGD for torch.float32 has failed its test on cpu" in found.problems[0]


@ways
def test_prodigys_slots_of_every_nth_element_are_those_of_the_eager_engine(way):
    found = []
    for options in (way, {"foreach": False}):
        params = two(torch.float32)
        optimizer = surefoot.Prodigy(list(params.values()), slice_p=7, d0=1e-3, **options)
        train(optimizer, params, torch.float32)
        found.append(flat(results(optimizer, params)))
        kernels = [run.sampled.engine is gpu for run in optimizer._step_cache.runs]
        assert all(kernels)
        assert bool(kernels) is (options is way)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
