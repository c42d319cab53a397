"""Muon's options beside a loop in float64 that spells out their formulas; what torch has too is in the table."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

import surefoot
from surefoot.optimizers import orthogonal
from surefoot.optimizers.orthogonal import SCHEDULES, newton_schulz
from surefoot.optimizers.workspace import KEPT, WORKSPACE

STEPS = 5
EXACT = {"lr": 0.1, "ns_dtype": torch.float64}


# The formulas


def orthogonalised(u, triples, steps, eps, safety):
    """Return a matrix after so many iterations, the last triple going on."""
    x = u.T if u.size(0) > u.size(1) else u
    x = x / (safety * max(x.square().sum().sqrt().item(), eps))
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if u.size(0) > u.size(1) else x


def scale_of(way, rows, columns):
    return {
        "original": max(1, rows / columns) ** 0.5,
        "spectral": max(1, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral_unclamped": (rows / columns) ** 0.5,
    }[way or "original"]


def step_of_matrix(w, g, state, options):
    """Step a matrix in place, and its momentum and second momentum."""
    momentum, lr, decay = options.get("momentum", 0.95), options["lr"], options.get("weight_decay", 0.1)
    state["momentum_buffer"].mul_(momentum).add_((1 - momentum) * g)
    u = state["momentum_buffer"]
    if options.get("nesterov", True):
        u = momentum * u + (1 - momentum) * g
    triples, safety = options.get("ns_coefficients", (3.4445, -4.775, 2.0315)), 1.0
    if triples == "polar_express":
        triples, safety = SCHEDULES[triples], 1.01
    triples = triples if isinstance(triples[0], tuple) else (triples,)
    o = orthogonalised(u, triples, options.get("ns_steps", 5), options.get("eps", 1e-7), safety)
    if options.get("normuon"):
        beta2, before = options.get("beta2", 0.95), o.norm()
        v = state["second_momentum_buffer"]
        v.mul_(beta2).add_((1 - beta2) * (o**2).mean(1, keepdim=True))
        o = o / (v.sqrt() + 1e-10)
        o = o * before / (o.norm() + 1e-10)
    shrunk = w * (1 - lr * decay)
    w.copy_(torch.where(o * w >= 0, shrunk, w) if options.get("cautious_weight_decay") else shrunk)
    if options.get("cautious"):
        mask = (o * g > 0).double()
        o = o * mask / mask.mean().clamp(min=1e-3)
    w.sub_(lr * scale_of(options.get("adjust_lr_fn"), *w.shape) * o)


def matrices_of(tensor, options):
    """Return views of a contiguous tensor: its matrices, or of one number for each row its parts."""
    if options.get("flatten") or tensor.dim() == 2:
        stack = [tensor.view(tensor.size(0), -1)]
    else:
        stack = list(tensor.view(-1, *tensor.shape[-2:]))
    sizes = options.get("split_sizes")
    if heads := options.get("num_heads"):
        sizes = (stack[0].size(0) // heads,) * heads
    return [part for matrix in stack for part in (matrix.split(sizes) if sizes else (matrix,))]


def by_loop(w, grads, options):
    """Return a parameter and its state after steps, matrix by matrix."""
    rows = w.shape[:1] if options.get("flatten") or w.dim() == 2 else w.shape[:-1]
    state = {
        "momentum_buffer": torch.zeros_like(w),
        "second_momentum_buffer": w.new_zeros(*rows, *(1,) * (w.dim() - len(rows))),
    }
    for g in grads:
        parts = [matrices_of(each, options) for each in (w, g, *state.values())]
        for matrix, grad, buffer, second in zip(*parts, strict=True):
            step_of_matrix(matrix, grad, dict(zip(state, (buffer, second), strict=True)), options)
    return {"param": w, **state}


def by_us(w, grads, options, **more):
    param = torch.nn.Parameter(w)
    optimizer = surefoot.Muon([param], **options, **more)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return {"param": param.detach(), **optimizer.state[param]}


def drawn(shape, seed=0, count=STEPS):
    generator = torch.Generator().manual_seed(seed)
    w, *grads = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count + 1))
    return w, grads


def assert_like_the_loop(shape, options, tolerance=1e-9, dtype=torch.float64, **more):
    w, grads = drawn(shape)
    expected = by_loop(w.clone(), grads, {**EXACT, **options})
    actual = by_us(w.to(dtype), [grad.to(dtype) for grad in grads], {**EXACT, **options}, **more)
    if not options.get("normuon"):
        del expected["second_momentum_buffer"]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


ALONE = (
    {},
    {"nesterov": False, "momentum": 0.5},
    {"weight_decay": 0.0},
    *({"adjust_lr_fn": way} for way in ("original", "match_rms_adamw", "spectral", "spectral_unclamped")),
    {"ns_coefficients": "polar_express"},
    {"ns_coefficients": "polar_express", "ns_steps": 9},
    {"ns_coefficients": ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0)), "ns_steps": 4},
    {"normuon": True},
    {"normuon": True, "beta2": 0.5, "adjust_lr_fn": "match_rms_adamw", "nesterov": False},
    {"cautious": True},
    {"cautious_weight_decay": True, "weight_decay": 0.5},
    {"normuon": True, "cautious": True, "cautious_weight_decay": True, "ns_coefficients": "polar_express"},
)
DIVIDED = (
    {"num_heads": 2},
    {"num_heads": 4, "normuon": True},
    {"split_sizes": (4, 4, 4)},
    {"split_sizes": [6, 3, 3], "adjust_lr_fn": "match_rms_adamw"},
    {"split_sizes": (6, 3, 3), "normuon": True, "cautious": True, "cautious_weight_decay": True},
    {"num_heads": 3, "cautious": True},
)


def label(options):
    return ",".join(f"{name}={value}" for name, value in options.items()).replace(" ", "") or "default"


@pytest.mark.parametrize("options", ALONE, ids=label)
@pytest.mark.parametrize("shape", [(5, 8), (12, 3)], ids=str)
def test_a_matrix_is_stepped_as_by_the_formulas(shape, options):
    assert_like_the_loop(shape, options)


@pytest.mark.parametrize("options", DIVIDED, ids=label)
@pytest.mark.parametrize("shape", [(12, 5), (2, 12, 5)], ids=str)
def test_heads_and_fused_weights_are_matrices_by_themselves(shape, options):
    assert_like_the_loop(shape, {**options, "flatten": False})


@pytest.mark.parametrize("normuon", [False, True])
@pytest.mark.parametrize(
    ("shape", "flatten"), [((6, 3, 2, 2), True), ((6, 3, 4), True), ((3, 6, 4), False), ((2, 2, 3, 5), False)], ids=str
)
def test_convolutions_and_experts(shape, flatten, normuon):
    assert_like_the_loop(shape, {"flatten": flatten, "normuon": normuon})
    assert_like_the_loop(
        shape,
        {"flatten": flatten, "normuon": normuon, "cautious": True, "num_heads": 3},
    )


@pytest.mark.parametrize("options", [*ALONE, *DIVIDED], ids=label)
def test_float32_is_near_the_formulas(options):
    """A sign at zero may go either way: what is cautious is left out."""
    if not any(map(options.get, ("cautious", "cautious_weight_decay"))):
        assert_like_the_loop((12, 6), {**options, "ns_dtype": torch.float32}, tolerance=2e-4, dtype=torch.float32)


def test_products_in_float32_are_nearer_than_torchs_in_bfloat16():
    w, grads = drawn((24, 40))
    exact = by_loop(w.clone(), grads, EXACT)["param"]
    distances = {}
    for name in ("bfloat16", "float32"):
        options = {"lr": 0.1, "ns_dtype": getattr(torch, name)}
        distances[name] = (by_us(w.float(), [g.float() for g in grads], options)["param"] - exact).norm()
    param = torch.nn.Parameter(w.float())
    theirs = torch.optim.Muon([param], lr=0.1)
    for grad in grads:
        param.grad = grad.float()
        theirs.step()
    assert distances["bfloat16"] <= 1.01 * (param.detach() - exact).norm()
    assert distances["float32"] < 0.01 * distances["bfloat16"]


@pytest.mark.parametrize("multiplies", [False, True])
def test_products_in_float32_are_rounded_as_those_in_bfloat16_are(monkeypatch, multiplies):
    """On a processor that does not multiply bfloat16, and for tiny matrices on any: torch's bits, but for rare ones."""
    monkeypatch.setattr(orthogonal, "multiplies_bfloat16", lambda: multiplies)
    for shape in ((16, 16), (5, 12), (12, 5), (3, 3)) if multiplies else ((24, 40), (40, 24), (16, 16)):
        w, grads = drawn(shape)
        steps = [grad.float() for grad in grads]
        found = by_us(w.float(), steps, {"lr": 0.1})["param"]
        as_torch = by_us(w.float(), steps, {"lr": 0.1, "ns_dtype": torch.bfloat16})["param"]
        wide = by_us(w.float(), steps, {"lr": 0.1, "ns_dtype": torch.float32})["param"]
        assert (found - as_torch).norm() < 0.25 * (wide - as_torch).norm()
        assert multiplies is False or torch.equal(found, as_torch)
        assert newton_schulz(w, (3.4445, -4.775, 2.0315), 5, 1e-7).dtype is torch.bfloat16


# Computed together, in memory that is kept


ALIKE = ((24, 40), (24, 900), (900, 24), (24, 24), (24, 24), (40, 24), (70, 24))


def stepped(cls, params, grads, **options):
    optimizer = cls(params, lr=0.1, **options)
    for number in range(3):
        for param, own in zip(params, grads, strict=True):
            param.grad = own[number].float()
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, *({"ns_steps": steps} for steps in (0, 1, 2))], ids=label)
def test_matrices_of_as_many_rows_are_computed_together_with_the_bits_of_torch(options):
    given = [drawn(shape, seed) for seed, shape in enumerate(ALIKE)]
    grads = [grads for _, grads in given]
    ours, theirs = ([torch.nn.Parameter(w.float()) for w, _ in given] for _ in range(2))
    expected = stepped(torch.optim.Muon, theirs, grads, **options)
    for one, other in zip(stepped(surefoot.Muon, ours, grads, **options), expected, strict=True):
        assert torch.equal(one, other)


def test_what_is_computed_together_is_as_each_alone():
    given = [drawn(shape, seed) for seed, shape in enumerate((*ALIKE, (4, 6), (6, 4), (4, 6)))]
    for options in ({"split_sizes": (2, 2)}, {"normuon": True, "cautious": True}, {"ns_coefficients": "polar_express"}):
        some = [(w, grads) for w, grads in given if "split_sizes" not in options or len(w) == 4]
        if "split_sizes" in options:
            some += [drawn((4, 9000), seed) for seed in range(2)]
        together = [torch.nn.Parameter(w.float()) for w, _ in some]
        made = stepped(surefoot.Muon, together, [grads for _, grads in some], **options)
        for param, (w, grads) in zip(made, some, strict=True):
            (alone,) = stepped(surefoot.Muon, [torch.nn.Parameter(w.float())], [grads], **options)
            torch.testing.assert_close(param, alone, rtol=1e-5, atol=1e-5)


def test_a_parameter_that_stands_twice_is_stepped_twice():
    w, grads = drawn((24, 900))
    for options in ({}, {"nesterov": False}):
        param, other = (torch.nn.Parameter(w.float()) for _ in range(2))
        with pytest.warns(UserWarning, match="duplicate"):
            stepped(surefoot.Muon, [param, param], [grads, grads], **options)
        with pytest.warns(UserWarning, match="duplicate"):
            stepped(torch.optim.Muon, [other, other], [grads, grads], **options)
        assert torch.equal(param, other)


def test_little_memory_is_kept_and_none_of_inference_mode():
    param = torch.nn.Parameter(torch.ones(1 << 10, 1 << 12))
    param.grad = torch.ones_like(param)
    surefoot.Muon([param], ns_steps=1).step()
    assert WORKSPACE.kept_bytes == 0
    for inference in (True, False):
        with torch.inference_mode(inference):
            param = torch.nn.Parameter(torch.ones(200, 300))
            param.grad = torch.ones_like(param)
            optimizer = surefoot.Muon([param], ns_steps=1)
            optimizer.step()
            optimizer.step()
        assert 0 < WORKSPACE.kept_bytes <= KEPT


# Polynomials


def best_quintic(low, high):
    """Return the odd quintic polynomial nearest to 1 between two numbers, by Remez' exchange of points."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    error = np.inf
    for _ in range(100):
        points = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        before = error
        a, b, c, error = np.linalg.solve(np.stack([points, points**3, points**5, signs], 1), np.ones(4))
        if abs(error - before) <= 1e-15:
            break
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return np.array([a, b, c])


def test_polar_express_is_optimal_step_by_step():
    """Amsel et al. 2025, theorem 1 and section 3.4: least values under 0.02407 of the greatest are lifted to that."""
    low, high = 1e-3, 1.0
    for step, (a, b, c) in enumerate(SCHEDULES["polar_express"]):
        safety = 1.01 if step < len(SCHEDULES["polar_express"]) - 1 else 1.0
        served = np.array([a * safety, b * safety**3, c * safety**5])
        if low / high > 1 - 5e-6:
            np.testing.assert_allclose(served, (15 / 8, -10 / 8, 3 / 8), rtol=1e-7)
            break
        expected = best_quintic(max(low, 0.02407327424182761 * high), high)
        ends = [expected @ (x, x**3, x**5) for x in (low, high)]
        expected *= 2 / sum(ends)
        np.testing.assert_allclose(served, expected, rtol=1e-8)
        low = expected @ (low, low**3, low**5)
        high = 2 - low
    else:
        pytest.fail("the schedule has not come to its limit")


@pytest.mark.parametrize("steps", [3, 5, 7, 12])
def test_singular_values_end_where_polar_express_promises(steps):
    """Between l and 2 - l, whatever they were, if they were at least a thousandth of the norm."""
    low = 1e-3
    for a, b, c in itertools.islice(SCHEDULES["polar_express"], steps):
        low = a * low / 1.0 + b * low**3 + c * low**5
    u, _, v = torch.linalg.svd(drawn((12, 20))[0], full_matrices=False)
    for drawn_values in (torch.logspace(-2.9, 0, 12), torch.ones(12), torch.linspace(0.1, 1, 12)):
        values = drawn_values.double() / drawn_values.norm()
        made = newton_schulz(u * values @ v, "polar_express", steps, 1e-7, torch.float64)
        found = torch.linalg.svdvals(made)
        assert found.min() >= min(low, 0.98) * 0.97
        assert found.max() <= 2 - min(low, 0.98) * 0.97
    if steps == 12:
        torch.testing.assert_close(found, torch.ones(12, dtype=torch.float64))


def test_polar_express_is_nearer_to_orthogonal_than_the_default():
    matrix = drawn((40, 64))[0]
    away = []
    for coefficients in ((3.4445, -4.775, 2.0315), "polar_express"):
        made = newton_schulz(matrix, coefficients, 7, 1e-7)
        away.append((torch.linalg.svdvals(made.double()) - 1).abs().max())
    assert away[1] < 0.1 * away[0]


# What is one parameter and several matrices


def assert_as_apart(whole, options, cut, ours):
    """Compare a parameter with parameters of its parts, in a bit more than rounding."""
    w, grads = drawn(whole)
    together = by_us(w, grads, {**EXACT, **options})["param"]
    apart = [by_us(part, [cut(g)[i] for g in grads], {**EXACT, **ours})["param"] for i, part in enumerate(cut(w))]
    for part, other in zip(cut(together), apart, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-9)


EVERYTHING = {"normuon": True, "cautious": True, "cautious_weight_decay": True, "adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=label)
def test_parts_are_stepped_as_parameters_of_their_own(more):
    assert_as_apart(
        (12, 5), {"split_sizes": (6, 4, 2), **more}, lambda t: [x.contiguous() for x in t.split((6, 4, 2))], more
    )
    assert_as_apart((12, 5), {"num_heads": 3, **more}, lambda t: [x.contiguous() for x in t.chunk(3)], more)
    assert_as_apart((4, 6, 5), {"flatten": False, **more}, list, more)
    assert_as_apart((6, 2, 2, 3), {"flatten": True, **more}, lambda t: [t.reshape(6, 12)], more)


def test_strides_of_convolutions_do_not_count():
    w, grads = drawn((6, 3, 2, 2))
    options = {**EXACT, "flatten": True, "normuon": True}
    plain = by_us(w.clone(), grads, options)["param"]
    last = by_us(w.to(memory_format=torch.channels_last), grads, options)["param"]
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last, rtol=1e-9, atol=1e-9)


def test_many_parameters_are_stepped_as_each_alone():
    shapes = [(4, 6)] * 5 + [(3, 2, 4)] * 2 + [(6, 4)]
    for options in ({}, {"split_sizes": (1, 1)}, {"normuon": True, "cautious": True}):
        some = [(2, 6)] * 4 if "split_sizes" in options else shapes
        given = [drawn(shape, seed) for seed, shape in enumerate(some)]
        params = [torch.nn.Parameter(w.clone()) for w, _ in given]
        optimizer = surefoot.Muon(params, flatten=False, **EXACT, **options)
        for step in range(STEPS):
            for param, (_, grads) in zip(params, given, strict=True):
                param.grad = grads[step]
            optimizer.step()
        for param, (w, grads) in zip(params, given, strict=True):
            alone = by_us(w, grads, {**EXACT, **options, "flatten": False})["param"]
            torch.testing.assert_close(param.detach(), alone, rtol=1e-9, atol=1e-9)


def test_what_is_not_a_number_stays_in_its_matrix():
    w, grads = drawn((6, 4))
    grads[1][1, 2] = torch.nan
    for options in ({"split_sizes": (2, 4)}, {"num_heads": 3}):
        for more in ({}, {"normuon": True, "cautious": True}):
            found = by_us(w.clone(), grads, {**EXACT, **options, **more})["param"]
            assert found[:2].isnan().all()
            assert found[2:].isfinite().all()


def test_matrices_without_elements_and_of_zeros():
    for shape, options in (((0, 3), {}), ((3, 0), {}), ((0, 2, 2), {"flatten": False}), ((2, 3), {"num_heads": 2})):
        for more in ({}, EVERYTHING):
            w = torch.ones(shape)
            found = by_us(w, [torch.zeros(shape)] * 2, {"lr": 0.1, "weight_decay": 0.0, **options, **more})
            assert torch.equal(found["param"], torch.ones(shape))


# Momentum in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_momentum_in_16_bits_is_rounded_once_a_step(dtype):
    w, grads = drawn((9, 7), count=12)
    short = by_us(w.float(), [g.float() for g in grads], {"lr": 0.1, "ns_dtype": torch.float32}, state_dtype=dtype)
    assert short["momentum_buffer"].dtype is dtype
    buffer, param = torch.zeros(9, 7), w.float()
    for grad in grads:
        average = torch.lerp(buffer, grad.float(), 0.05)
        buffer = average.to(dtype).float()
        o = newton_schulz(torch.lerp(grad.float(), average, 0.95), (3.4445, -4.775, 2.0315), 5, 1e-7, torch.float32)
        param = (param * (1 - 0.1 * 0.1)).add(o, alpha=-0.1 * (9 / 7) ** 0.5)
    torch.testing.assert_close(short["momentum_buffer"].float(), buffer)
    torch.testing.assert_close(short["param"], param)


def test_the_second_momentum_is_never_short():
    param = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = surefoot.Muon([param], normuon=True)
    optimizer.step()
    assert optimizer.state[param]["second_momentum_buffer"].dtype is torch.float32
    assert optimizer.state[param]["second_momentum_buffer"].shape == (4, 1)
    assert optimizer.state[param]["momentum_buffer"].dtype is torch.bfloat16


# What is refused


def matrix(*shape):
    return torch.nn.Parameter(torch.ones(shape or (6, 4)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"adjust_lr_fn": "spectral_norm"},
            ValueError,
            "must be one of None, 'original', 'match_rms_adamw', 'spectral', 'spectral_unclamped'",
        ),
        ({"ns_coefficients": "polar"}, ValueError, "for each iteration, or 'polar_express', but got 'polar'"),
        (
            {"ns_coefficients": (1.0, 2.0)},
            ValueError,
            "must be 3 numbers, a sequence of 3 numbers for each iteration, or 'polar_express', but got (1.0, 2.0)",
        ),
        ({"ns_coefficients": ((1.0, 2.0, 3.0), (1.0,))}, ValueError, "for each iteration, or 'polar_express', but got"),
        ({"ns_coefficients": (1.0, "2", 3.0)}, TypeError, "`ns_coefficients[1]` must be a number"),
        ({"beta2": 1.0}, ValueError, "`beta2` must be a number in [0, 1)"),
        ({"flatten": 1}, ValueError, "`flatten` must be None, True or False, but got 1"),
        (
            {"ns_dtype": torch.float16},
            ValueError,
            "`ns_dtype` must be None, torch.bfloat16, torch.float32 or torch.float64, but got",
        ),
        ({"num_heads": 0}, ValueError, "`num_heads` must be a number in [1"),
        ({"num_heads": 1.5}, TypeError, "`num_heads` must be a whole number"),
        (
            {"num_heads": 4},
            ValueError,
            "`num_heads` must divide the rows of each matrix, but is 4 for a parameter with size:",
        ),
        ({"num_heads": 2, "split_sizes": (3, 3)}, ValueError, "`num_heads` and `split_sizes` both divide rows"),
        (
            {"split_sizes": (3, 2)},
            ValueError,
            "`split_sizes` must add up to the rows of each matrix, but are (3, 2) for",
        ),
        ({"split_sizes": (6, 0)}, ValueError, "must be a tuple of whole numbers > 0, or None, but got (6, 0)"),
        ({"split_sizes": 6}, ValueError, "`split_sizes` must be a tuple of whole numbers > 0, or None, but got 6"),
        ({"state_dtype": "float8"}, ValueError, "Muon has a custom step, which takes no `state_dtype='float8'`"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, error, message):
    for build in (
        lambda: surefoot.Muon([matrix()], **options),
        lambda: surefoot.Muon([{"params": [matrix()], **options}]),
    ):
        with pytest.raises(error, match=re.escape(message)):
            build()


def test_what_is_no_matrix_is_refused_with_the_way_to_pass_it():
    with pytest.raises(ValueError, match="size: torch.Size\\(\\[4\\]\\); give such parameters to another optimizer"):
        surefoot.Muon([matrix(4)], flatten=True)
    message = (
        "size: torch.Size\\(\\[2, 3, 4\\]\\); pass flatten=True .* or flatten=False for a stack of matrices; or give"
    )
    with pytest.raises(ValueError, match=message):
        surefoot.Muon([matrix(2, 3, 4)])
    surefoot.Muon([{"params": [matrix(2, 3, 4)], "flatten": True}, {"params": [matrix()]}])


def test_a_group_that_is_changed_to_what_does_not_fit_is_refused_before_anything_changes():
    param = matrix()
    optimizer = surefoot.Muon([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["num_heads"] = 5
    with pytest.raises(
        RuntimeError, match="`params\\[0\\]` of shape \\(6, 4\\) cannot be stepped: `num_heads` must divide"
    ):
        optimizer.step()
    assert torch.equal(before, param)
    optimizer.param_groups[0]["num_heads"] = 3
    optimizer.step()


# State


def test_a_state_dict_goes_on_and_is_verified():
    w, grads = drawn((6, 4), count=6)
    options = {**EXACT, "normuon": True, "split_sizes": (4, 2)}
    params = [torch.nn.Parameter(w.clone()) for _ in range(2)]
    first, second = surefoot.Muon([params[0]], **options), surefoot.Muon([params[1]])
    for grad in grads[:3]:
        params[0].grad = grad
        first.step()
    with torch.no_grad():
        params[1].copy_(params[0])
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["normuon"]
    for grad in grads[3:]:
        for param, optimizer in zip(params, (first, second), strict=True):
            param.grad = grad
            optimizer.step()
    assert torch.equal(*params)
    saved = first.state_dict()
    kept = saved["state"][0]["second_momentum_buffer"]
    for change, message in (
        (kept[:3], "state `second_momentum_buffer` has shape \\(3, 1\\), must be \\(6, 1\\)"),
        (None, "missing: `.*`: state `second_momentum_buffer`"),
    ):
        saved["state"][0] = {**saved["state"][0], "second_momentum_buffer": change}
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(saved)
    saved["state"][0]["second_momentum_buffer"] = kept
    saved["param_groups"][0]["split_sizes"] = (5, 5)
    before = second.state_dict()
    with pytest.raises(ValueError, match="must add up to the rows"):
        second.load_state_dict(saved)
    assert second.state_dict()["param_groups"] == before["param_groups"]


def test_a_state_dict_of_torch_loads_and_options_of_ours_stay():
    params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    theirs, ours = torch.optim.Muon([params[0]], lr=0.5), surefoot.Muon([params[1]], num_heads=2)
    params[0].grad = torch.eye(4)
    theirs.step()
    report = ours.load_state_dict(theirs.state_dict())
    assert report.kept == ["param_groups[0]: option `num_heads` stays 2, the state dict does not know it"]
    assert ours.param_groups[0]["lr"] == 0.5
    assert torch.equal(ours.state[params[1]]["momentum_buffer"], theirs.state[params[0]]["momentum_buffer"])


def test_state_of_another_shape_is_refused_by_the_step():
    param = matrix()
    optimizer = surefoot.Muon([param], normuon=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["second_momentum_buffer"] = torch.ones(6)
    with pytest.raises(RuntimeError, match="state `second_momentum_buffer` of `params\\[0\\]`.* must have \\(6, 1\\)"):
        optimizer.step()
