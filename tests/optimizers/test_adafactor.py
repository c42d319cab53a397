"""Adafactor: small parameters of one shape are stepped together."""

import warnings

import pytest
import torch

import surefoot
from surefoot.optimizers import adafactor

SHAPES = ((6, 5), (6, 5), (3, 6, 5), (7,), (), (7,), (0, 3), (6, 5), (0, 3), (), (600, 500), (600, 500), (3, 6, 5))


def trained(monkeypatch, *, together, dtype, shapes=SHAPES, **options):
    if not together:
        monkeypatch.setattr(adafactor, "_kind", lambda row: None)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    params[1].data = params[1].data.t().contiguous().t()
    optimizer = surefoot.Adafactor(params, lr=0.1, **options)
    for step in range(5):
        for index, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator).to(dtype) * 10.0**index
        if step < 2:
            params[7].grad = None  # its step is another than that of its likes
        optimizer.step()
    monkeypatch.undo()
    states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
    return [tensor.detach() for tensor in (*params, *states)]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True, "eps": (1e-3, 0.1)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_together_as_one_by_one(monkeypatch, dtype, options):
    together, alone = (trained(monkeypatch, together=way, dtype=dtype, **options) for way in (True, False))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)  # means over nothing


def test_as_many_as_fit_are_put_together(monkeypatch):
    sizes = []
    step = adafactor._Batch.step
    monkeypatch.setattr(
        adafactor._Batch, "step", lambda self, rows: (sizes.append(len(self._places)), step(self, rows))
    )
    monkeypatch.setattr(adafactor, "_JOINED", 100)
    params = [torch.ones(6, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(7)]
    for param in params:
        param.grad = torch.ones_like(param)
    surefoot.Adafactor(params).step()
    assert sizes == [3, 3, 1]


def test_a_parameter_that_stands_twice_is_stepped_twice():
    shapes, results = [(4, 3), (4, 3)], []
    for library in (surefoot, torch.optim):
        params = [torch.ones(shape, requires_grad=True) for shape in shapes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = library.Adafactor([*params, params[0]], lr=0.1)
        for param in params:
            param.grad = torch.full(param.shape, 2.0)
        optimizer.step()
        results.append([param.detach() for param in params])
    assert all(map(torch.allclose, *results))
    assert not torch.equal(*results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_that_are_none_count_as_missing(dtype):
    weights = []
    for none in (True, False):
        weight = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        optimizer = surefoot.Adafactor([weight])
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            if none:
                optimizer.state[weight]["variance"] = None
        weights.append(weight.detach())
    assert torch.equal(*weights)
