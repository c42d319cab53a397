"""Where an algorithm that torch does not have is to differ from implementations that others use."""

import pytest
import torch

import surefoot
from conformance import normals


def gradients(count, shape=(7,)):
    normal = normals(torch.float32, seed=3)
    return [normal(*shape) for _ in range(count)]


def stepped(optimizer, param, grads):
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach().clone()


@pytest.mark.parametrize("engine", [{"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("cls", [surefoot.Lion, surefoot.Signum])
def test_elements_without_gradient_stand_still_in_8_bits(cls, engine):
    """In bitsandbytes zero is stored as a small positive number, of which the sign is 1."""
    param = torch.zeros(8192, requires_grad=True)
    grad = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    grad[::3] = 0.0
    optimizer = cls([param], lr=0.1, state_dtype="float8", **engine)
    assert (stepped(optimizer, param, [grad] * 5)[::3] == 0).all()
    assert (param[1::3] != 0).all()


def test_amsgrad_counts_with_rectification():
    """adabelief-pytorch keeps the maximum, and does not divide by it."""
    grads = [grad * 0.8**step for step, grad in enumerate(gradients(20))]
    ends = []
    for amsgrad in (False, True):
        param = torch.ones(7, requires_grad=True)
        ends.append(stepped(surefoot.AdaBelief([param], betas=(0.9, 0.9), amsgrad=amsgrad), param, grads))
    assert ((1 - ends[1]).abs() < (1 - ends[0]).abs()).any()
    assert not torch.allclose(*ends)


def test_a_parameter_that_joins_late_begins_as_any():
    """Adan's own implementation counts the steps of a group, and so corrects less bias than there is."""
    early, late, alone = (torch.ones(7, requires_grad=True) for _ in range(3))
    optimizer, other = surefoot.Adan([early, late]), surefoot.Adan([alone])
    grads = gradients(6)
    stepped(optimizer, early, grads[:3])
    early.grad = None
    assert torch.equal(stepped(optimizer, late, grads[3:]), stepped(other, alone, grads[3:]))


def test_a_warm_up_from_no_average_at_all():
    """The logarithm of beta1 = 0 is infinite, which bitsandbytes refuses; the half-life is 0."""
    param = torch.ones(7, requires_grad=True)
    optimizer = surefoot.AdEMAMix([param], betas=(0.0, 0.9, 0.99), beta3_warmup=4)
    (grad,) = gradients(1)
    stepped(optimizer, param, [grad])
    assert torch.allclose(optimizer.state[param]["exp_avg_slow"], (1 - 0.99**4) * grad)  # a quarter of the half-life


def test_the_momentum_of_a_sign_is_kept():
    """pytorch_optimizer began it anew in every step until August 2026."""
    param = torch.zeros(2, requires_grad=True)
    optimizer = surefoot.Signum([param], lr=1.0, momentum=0.9)
    stepped(optimizer, param, [torch.tensor([1.0, 1.0]), torch.tensor([-0.1, -2.0])])
    assert param.tolist() == [-2.0, 0.0]


def test_a_step_of_an_angle_is_bounded_and_knows_no_scale():
    """Where the second moment is lost, as in short formats, Adam divides by eps."""
    (grad,) = gradients(1)
    ends = []
    for scale in (1.0, 2.0**-40):
        param = torch.ones(7, requires_grad=True)
        ends.append(stepped(surefoot.AdamAtan2([param], lr=0.1), param, [grad * scale]))
    assert torch.equal(*ends)
    lost = torch.ones(7, requires_grad=True)
    optimizer = surefoot.AdamAtan2([lost], lr=0.1)
    stepped(optimizer, lost, [grad])
    optimizer.state[lost]["exp_avg_sq"].zero_()
    before = lost.detach().clone()
    stepped(optimizer, lost, [grad * 1e-30])
    assert ((before - lost).abs() <= 0.1 * 1.27 * torch.pi / 2 + 1e-6).all()


@pytest.mark.parametrize("engine", [{"fused": True}, {"foreach": False}], ids=str)
def test_no_rate_and_no_trust_stand_still(engine):
    """LARC divides one by the other, in timm too, of which the gradient becomes NaN."""
    param = torch.ones(7, requires_grad=True)
    options = {"lr": 0.0, "trust_coeff": 0.0, "trust_clip": True, "weight_decay": 0.1}
    stepped(surefoot.LARS([param], **options, **engine), param, gradients(2))
    assert (param == 1).all()


def test_the_greatest_rate_is_that_of_the_new_group():
    param = torch.ones(3, requires_grad=True)
    optimizer = surefoot.StableAdamW([{"params": [param], "decouple_lr": True}], lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.05
    assert torch.equal(stepped(optimizer, param, [torch.zeros(3)]), torch.full((3,), 0.75))
    with pytest.raises(ValueError, match="`decouple_lr=True` with `lr=0` needs `max_lr`"):
        surefoot.StableAdamW([param], lr=0.0, decouple_lr=True)


def test_the_greatest_rate_is_that_of_a_function_s_call_under_transforms_too():
    param, grad = torch.ones(3), torch.ones(3)

    def of(lr):
        hyperparameters = {"lr": lr, "decouple_lr": True, "weight_decay": 0.1}
        return surefoot.functional.update(surefoot.StableAdamW, [param], [grad], [{}], **hyperparameters)[0][0]

    expected = of(0.05)
    torch.testing.assert_close(torch.func.vmap(of)(torch.tensor([0.05]))[0], expected)
    torch.testing.assert_close(torch.func.grad(lambda lr: of(lr).sum())(torch.tensor(0.05)), torch.tensor(-3.0))
