"""atan2 of CPU kernels: as near to the exact angle as promised, and torch's values where there is no angle."""

import itertools

import pytest
import torch

import surefoot

MOST_ULPS = {torch.float32: 2.0, torch.float64: 3.0}  # of float64 beside torch's own, which is off by up to one


class Angle(surefoot.Optimizer):
    """Sets each parameter to the angle of a point, whose coordinates are the gradient and itself."""

    scalars = ()

    def __init__(self, params, **options):
        super().__init__(params, options)

    @staticmethod
    def update(param, grad, c, flags):
        return torch.atan2(grad, param)


def angles(y, x, **engine):
    param = x.clone().requires_grad_()
    param.grad = y.clone()
    Angle([param], **engine).step()
    return param.detach()


def points(dtype, count=1 << 21):
    """Return points of every direction and of every ratio of lengths."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, count, generator=generator, dtype=torch.float64)
    scale = torch.randn(2, count, generator=generator, dtype=torch.float64) * (10 if dtype is torch.float32 else 60)
    even = torch.arange(count) % 2 == 0
    y, x = (torch.where(even, values, values * torch.exp2(scale))).to(dtype)
    return y, x


@pytest.mark.parametrize("dtype", MOST_ULPS, ids=str)
def test_angles_are_exact_to_two_units_in_the_last_place(dtype):
    y, x = points(dtype)
    exact = torch.atan2(y.double(), x.double())
    info = torch.finfo(dtype)
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))) * info.eps
    assert ((angles(y, x, fused=True).double() - exact).abs() / unit).max() <= MOST_ULPS[dtype]


@pytest.mark.parametrize("engine", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("dtype", MOST_ULPS, ids=str)
def test_special_values_are_torchs(dtype, engine):
    info = torch.finfo(dtype)
    special = [0.0, 1.0, 1.5, info.tiny, info.tiny * info.eps, info.max, info.max / 3, torch.inf, torch.nan]
    signed = [sign * value for value in special for sign in (1, -1)]
    y, x = torch.tensor([*itertools.product(signed, signed)], dtype=dtype).T.contiguous()
    expected = torch.atan2(y, x)
    found = angles(y, x, **engine)
    torch.testing.assert_close(found, expected, rtol=4 * info.eps, atol=0.0, equal_nan=True)
    assert torch.equal(found.signbit()[~expected.isnan()], expected.signbit()[~expected.isnan()])
