"""SOAP: what its basis promises, what is refused, and the implementations that others use."""

import re

import pytest
import torch

import surefoot


def drawn(shape, count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]


def trained(param, grads, **options):
    optimizer = surefoot.SOAP([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return optimizer.state[param]


def parameter(shape, dtype=torch.float64):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


def test_the_first_step_makes_bases_only():
    param = parameter((4, 3))
    state = trained(param, drawn((4, 3), 1))
    assert torch.equal(param, torch.ones_like(param))
    assert not state["exp_avg"].any()
    for axis, size in ((0, 4), (1, 3)):
        basis, factor = state[f"Q_{axis}"], state[f"GG_{axis}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(size, dtype=basis.dtype))
        eigenvalues = (basis.T @ factor @ basis).diagonal()
        torch.testing.assert_close(basis @ eigenvalues.diag() @ basis.T, factor)
        assert (eigenvalues.diff() <= 1e-12).all()


@pytest.mark.parametrize("frequency", [1, 3])
def test_bases_stay_orthogonal_and_follow_their_factors(frequency):
    """Power iteration comes to the eigenvectors where factors stand still."""
    param = parameter((5, 4))
    fixed = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0], dtype=torch.float64))
    left, right = (torch.linalg.qr(each).Q for each in drawn((5, 5), 2))
    grads = drawn((5, 4), 6) + [left[:, :4] @ fixed @ right[:4, :4]] * 400
    state = trained(param, grads, precondition_frequency=frequency, lr=1e-4)
    for axis, size in ((0, 5), (1, 4)):
        basis, factor = state[f"Q_{axis}"], state[f"GG_{axis}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(size, dtype=basis.dtype))
        turned = basis.T @ factor @ basis
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-6 * turned.abs().max()


def test_it_does_not_matter_how_a_model_is_turned():
    """Gradients turned by orthogonal matrices give the turned steps, which Adam's are not."""
    left, right = (torch.linalg.qr(each).Q for each in drawn((5, 5), 2, seed=3))
    grads = drawn((5, 5), 9)
    plain, turned = parameter((5, 5)), torch.nn.Parameter(left @ torch.ones(5, 5, dtype=torch.float64) @ right)
    trained(plain, grads, precondition_frequency=3, lr=0.1)
    trained(turned, [left @ grad @ right for grad in grads], precondition_frequency=3, lr=0.1)
    torch.testing.assert_close(left @ plain.detach() @ right, turned.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(), (7,)], ids=str)
def test_without_factors_it_is_adam_from_the_second_step_on(shape):
    param, other = parameter(shape), parameter(shape)
    grads = drawn(shape, 6)
    trained(param, grads, weight_decay=0.0, lr=0.1, eps=0.0)
    adam = surefoot.Adam([other], lr=0.1, betas=(0.95, 0.95), eps=0.0, foreach=False)
    for grad in grads[1:]:
        other.grad = grad
        adam.step()
    torch.testing.assert_close(param, other)


def test_long_axes_have_no_factor_and_short_ones_may_be_merged():
    def kept(shape, **options):
        state = trained(parameter(shape), drawn(shape, 2), **options)
        return {name: tuple(value.shape) for name, value in state.items() if "Q_" in name}

    assert kept((4, 3)) == {"Q_0": (4, 4), "Q_1": (3, 3)}
    assert kept((4, 3), max_precond_dim=3) == {"Q_1": (3, 3)}
    assert kept((2, 3, 2, 2)) == {"Q_0": (2, 2), "Q_1": (3, 3), "Q_2": (2, 2), "Q_3": (2, 2)}
    assert kept((2, 3, 2, 2), merge_dims=True, max_precond_dim=6) == {"Q_0": (6, 6), "Q_1": (4, 4)}
    assert kept((1, 7, 2), merge_dims=True, max_precond_dim=6) == {"Q_1": (2, 2)}
    assert kept((5,)) == {}
    assert kept((5,), precondition_1d=True) == {"Q_0": (5, 5)}


def test_many_of_a_size_are_decomposed_as_each_alone():
    shapes = [(4, 3), (3, 4), (4, 4), (4, 3)]
    params = [parameter(shape) for shape in shapes]
    optimizer = surefoot.SOAP(params, precondition_frequency=2)
    grads = [drawn(shape, 6, seed) for seed, shape in enumerate(shapes)]
    for step in range(6):
        for param, own in zip(params, grads, strict=True):
            param.grad = own[step].clone()
        optimizer.step()
    for param, own in zip(params, grads, strict=True):
        alone = parameter(param.shape)
        trained(alone, own, precondition_frequency=2)
        torch.testing.assert_close(param, alone, rtol=1e-10, atol=1e-10)


def test_float32_is_near_float64():
    """With gradients of full rank, by which bases are determined, up to signs."""
    near, exact = parameter((6, 6), torch.float32), parameter((6, 6))
    spread = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64) ** 2)
    grads = [spread @ grad @ spread for grad in drawn((6, 6), 12)]
    trained(near, [grad.float() for grad in grads], precondition_frequency=4, lr=0.05)
    trained(exact, grads, precondition_frequency=4, lr=0.05)
    torch.testing.assert_close(near.double(), exact, rtol=1e-3, atol=1e-3)


def test_products_are_in_full_precision_whatever_is_allowed():
    before = torch.get_float32_matmul_precision()
    expected, grads = parameter((40, 40), torch.float32), drawn((40, 40), 4, dtype=torch.float32)
    trained(expected, grads)
    allowed = parameter((40, 40), torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            trained(allowed, grads)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(allowed, expected)


def test_16_bit_parameters_have_state_in_float32():
    param = parameter((4, 3), torch.bfloat16)
    state = trained(param, drawn((4, 3), 3, dtype=torch.bfloat16), lr=0.1)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not torch.equal(param, torch.ones_like(param))


def test_a_model_that_becomes_double_goes_on():
    param, grads = parameter((4, 3), torch.float32), drawn((4, 3), 6, dtype=torch.float32)
    optimizer = surefoot.SOAP([param], precondition_frequency=2)
    for grad in grads[:3]:
        param.grad = grad
        optimizer.step()
    param.data = param.data.double()
    for grad in grads[3:]:
        param.grad = grad.double()
        optimizer.step()
    assert {value.dtype for value in optimizer.state[param].values()} == {torch.float32}
    expected = parameter((4, 3), torch.float32)
    trained(expected, grads, precondition_frequency=2)
    torch.testing.assert_close(param, expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_there_twice_takes_two_steps():
    param, others = parameter((3, 3)), [parameter((3, 3)) for _ in range(3)]
    optimizer, alone = surefoot.SOAP([param, others[0], param]), parameter((3, 3))
    for grad in drawn((3, 3), 4):
        param.grad = others[0].grad = grad
        optimizer.step()
    trained(alone, [grad for grad in drawn((3, 3), 4) for _ in range(2)])
    torch.testing.assert_close(param, alone)
    trained(others[1], drawn((3, 3), 4))
    torch.testing.assert_close(others[0], others[1])


def test_what_is_not_a_number_stays_in_its_parameter():
    params = [parameter((3, 3)) for _ in range(2)]
    optimizer = surefoot.SOAP(params, precondition_frequency=2)
    for step in range(4):
        for param, grad in zip(params, drawn((3, 3), 2, seed=step), strict=True):
            param.grad = grad
        if not step:
            params[0].grad[1, 1] = torch.nan
        optimizer.step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


def test_options_around_a_step_equal_the_calls_they_replace():
    """With gradients of full rank: other bases hang on the last bits of what was clipped."""
    options, ends = {"precondition_frequency": 2, "lr": 0.1}, []
    for asked in (True, False):
        param = parameter((5, 5))
        more = {"max_grad_norm": 0.5, "max_grad_value": 0.1, "maximize": True} if asked else {}
        optimizer = surefoot.SOAP([param], **options, **more)
        for grad in drawn((5, 5), 7):
            param.grad = grad.clone()
            if not asked:
                torch.nn.utils.clip_grad_norm_([param], 0.5)
                torch.nn.utils.clip_grad_value_([param], 0.1)
                param.grad.neg_()
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)  # the norm is divided by itself and a bit


# State


def test_a_state_dict_goes_on_and_is_verified():
    params, grads = [parameter((4, 3)) for _ in range(2)], drawn((4, 3), 8)
    first, second = (surefoot.SOAP([param], precondition_frequency=3) for param in params)
    for grad in grads[:4]:
        params[0].grad = grad
        first.step()
    with torch.no_grad():
        params[1].copy_(params[0])
    second.load_state_dict(first.state_dict())
    for grad in grads[4:]:
        for param, optimizer in zip(params, (first, second), strict=True):
            param.grad = grad
            optimizer.step()
    assert torch.equal(*params)
    saved = first.state_dict()
    for change, message in (
        (torch.ones(3, 3), "state `GG_0` has shape \\(3, 3\\), must be \\(4, 4\\)"),
        (None, "missing: .*: state `GG_0`"),
    ):
        broken = {"state": {0: {**saved["state"][0], "GG_0": change}}, "param_groups": saved["param_groups"]}
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(broken)


def test_factors_that_are_missing_after_the_first_step_are_refused():
    """A basis of zeros would hold the parameter where it is, in silence."""
    param = parameter((4, 3))
    optimizer = surefoot.SOAP([("weight", param)], max_precond_dim=3)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    before, steps = param.detach().clone(), optimizer.state[param]["step"].clone()
    optimizer.param_groups[0]["max_precond_dim"] = 4
    with pytest.raises(
        RuntimeError, match="^state `GG_0` of `weight` of shape \\(4, 3\\) is missing, which only its first"
    ):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == steps
    optimizer.param_groups[0]["max_precond_dim"] = 2
    with pytest.raises(RuntimeError, match="state `GG_1` .* must have none"):
        optimizer.step()
    del optimizer.state[param]
    optimizer.step()
    optimizer.step()
    assert not torch.equal(param, before)


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shampoo_beta": 1.0}, ValueError, "`shampoo_beta` must be a number in"),
        ({"precondition_frequency": 0}, ValueError, "`precondition_frequency` must be a number in [1"),
        ({"precondition_frequency": 1.5}, TypeError, "`precondition_frequency` must be a whole number"),
        ({"max_precond_dim": -1}, ValueError, "`max_precond_dim` must be a number in [0"),
        (
            {"capturable": True},
            ValueError,
            "SOAP takes no `capturable=True`: whether a step renews its bases",
        ),
        ({"cautious": True}, ValueError, "SOAP takes no `cautious`: it has a custom step"),
        ({"state_dtype": "float8"}, ValueError, "SOAP has a custom step, which takes no `state_dtype='float8'`"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        surefoot.SOAP([{"params": [parameter((2, 2))], **options}])


@pytest.mark.parametrize("option", ["foreach", "fused", "differentiable", "data_format"])
def test_options_that_it_does_not_have_are_named(option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        surefoot.SOAP([parameter((2, 2))], **{option: True})


def test_a_tensor_of_many_axes_is_refused_unless_they_are_merged():
    shape = (2,) * 7
    with pytest.raises(ValueError, match="at most 6 axes, but got one of size .*; pass merge_dims=True"):
        surefoot.SOAP([parameter(shape)])
    surefoot.SOAP([parameter(shape)], merge_dims=True, max_precond_dim=16)
