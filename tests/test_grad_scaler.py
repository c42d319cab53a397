"""Training under torch's GradScaler, on the CPU: inf steps are skipped whole, everything else is as torch does it."""

import pytest
import torch

import surefoot
from helpers import (
    ALGORITHMS,
    assert_as_torch,
    assert_same,
    make,
    make_params,
    name_of,
    pair,
    params_of,
    set_grads,
    snapshot,
    train,
)

SCALED = [cls for cls in ALGORITHMS if cls not in (surefoot.SparseAdam, surefoot.LBFGS)]
"""GradScaler takes neither closures nor, on the CPU, gradients that are sparse."""
each_algorithm = pytest.mark.parametrize("cls", SCALED, ids=name_of)


def scaled_step(optimizer, scaler, seed, *, spoil=None, clip=None):
    """Step once with scaled gradients, of which one element may be spoilt."""
    set_grads(optimizer, seed)
    params = params_of(optimizer)
    scaler.scale(torch.tensor(1.0))  # makes the scale
    for param in params:
        param.grad *= scaler.get_scale()
    if spoil is not None:
        params[-1].grad.view(-1)[0] = spoil
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, clip)
    scaler.step(optimizer)
    scaler.update()


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


@each_algorithm
@pytest.mark.parametrize("spoil", [float("inf"), float("nan")])
@pytest.mark.parametrize("warm", [0, 2], ids=["first step", "later step"])
def test_a_skipped_step_changes_nothing(cls, spoil, warm):
    optimizer, scaler = train(make(cls), steps=warm), make_scaler()
    before = snapshot(optimizer)
    scaled_step(optimizer, scaler, seed=9, spoil=spoil)
    assert_same(snapshot(optimizer), before)
    assert scaler.get_scale() == 2.0**9


@each_algorithm
def test_scaled_training_is_training(cls):
    optimizer, scaler = make(cls), make_scaler()
    for seed, spoil in enumerate([None, float("inf"), None, None]):
        scaled_step(optimizer, scaler, seed, spoil=spoil)
    plain = make(cls)
    for seed in (0, 2, 3):
        train(plain, seed, steps=1)
    assert_same(snapshot(optimizer), snapshot(plain))


@each_algorithm
def test_unscale_then_clip_as_torch(cls):
    ours, theirs = pair(cls)
    for optimizer in ours, theirs:
        scaler = make_scaler()
        for seed, spoil in enumerate([None, float("nan"), None]):
            scaled_step(optimizer, scaler, seed, spoil=spoil, clip=0.1)
    assert_as_torch(ours, theirs)


@pytest.mark.parametrize(
    ("cls", "options", "clip"),
    [
        pytest.param(cls, options, clip, id=f"{cls.__name__}-{clip}")
        for cls, options in [(surefoot.SGD, {"momentum": 0.9}), (surefoot.AdamW, {}), (surefoot.NAdam, {})]
        for clip in (None, 0.1)
    ],
)
def test_fused_steps_unscale_and_skip_themselves(cls, options, clip):
    fused, eager = cls(make_params(), fused=True, **options), make(cls, **options)
    assert fused._step_supports_amp_scaling
    assert not eager._step_supports_amp_scaling
    for optimizer in fused, eager:
        scaler, before = make_scaler(), snapshot(optimizer)
        scaled_step(optimizer, scaler, seed=9, spoil=float("inf"), clip=clip)
        assert_same(snapshot(optimizer), before)
        for seed in range(2):
            scaled_step(optimizer, scaler, seed, clip=clip)
    torch.testing.assert_close(snapshot(fused)["values"], snapshot(eager)["values"])


def test_nothing_is_left_behind():
    optimizer, scaler = surefoot.AdamW(make_params(), fused=True), make_scaler()
    scaled_step(optimizer, scaler, seed=0)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_a_closure_is_refused_as_torch_does():
    optimizer, scaler = make(surefoot.SGD), make_scaler()
    scaler.scale(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
