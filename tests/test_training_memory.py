"""What training takes of memory, against optimizers that have stepped."""

from collections import defaultdict

import pytest
import torch
from torch import nn

import surefoot
from surefoot import memory, optimizers
from surefoot.benchmark import LARGE_SHAPE_LISTS

SHAPES = ((96, 128), (100, 77), (128, 64), (64,), (3, 4), (5000,), (), (0, 3))
TAKEN = {"Muon": SHAPES[:3]}


def stepped(algorithm, dtype, **options):
    """Return an optimizer that has made a step by torch's operations, for which nothing is compiled."""
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in TAKEN.get(algorithm.__name__, SHAPES)]
    if "foreach" in algorithm.spec.constructor:
        options["foreach"] = False
    optimizer = algorithm(params, **options)
    for param in params:
        param.grad = torch.ones_like(param)
        if algorithm is surefoot.SparseAdam:
            param.grad = param.grad.to_sparse(1) if param.dim() and param.numel() else None
    optimizer.step()
    return optimizer


def bytes_of(optimizer):
    """Return the bytes of everything that an optimizer holds and steps, by its keys."""
    found = defaultdict(int)
    for param in optimizer.param_groups[0]["params"]:
        if param in optimizer.state:
            found["weights"] += param.nbytes
            found["gradients"] += param.nbytes
        for name, value in optimizer.state[param].items() if param in optimizer.state else ():
            found[name] += value.nbytes if isinstance(value, torch.Tensor) else 0
    return {name: nbytes for name, nbytes in found.items() if nbytes}


@pytest.mark.in_turn("storage", every=2)
@pytest.mark.parametrize("storage", memory.COMMON, ids=str)
@pytest.mark.parametrize("name", [name for name in optimizers.__all__ if name != "LBFGS"])
def test_it_is_what_a_step_makes(name, storage):
    algorithm = getattr(surefoot, name)
    if storage not in memory.common_storages(algorithm):
        pytest.skip("no option of this algorithm")
    averages = {"ema": 0.9} if "ema" in algorithm.supported_step_options() else {}
    options = storage.options | averages
    optimizer = stepped(algorithm, storage.dtype, **options)
    shapes = [param.shape for param in optimizer.state]
    weights = memory.converted(memory.weights_of_shapes(shapes), storage.dtype)
    found = memory.measure(weights, (algorithm, options))
    summed = defaultdict(int)
    for item in found.items:
        summed[item.name] += item.nbytes
    assert {name: nbytes for name, nbytes in summed.items() if nbytes} == bytes_of(optimizer)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("Muon", {"normuon": True, "state_dtype": torch.bfloat16}, (100, 77)),
        ("Muon", {"normuon": True, "flatten": True}, (6, 3, 2, 2)),
        ("Muon", {"normuon": True, "flatten": False, "split_sizes": (4, 2)}, (5, 6, 7)),
        ("SOAP", {"merge_dims": True, "max_precond_dim": 12}, (6, 3, 2, 2)),
        ("SOAP", {"precondition_1d": True}, (9,)),
    ],
)
def test_state_that_options_shape(name, options, shape):
    algorithm, param = getattr(surefoot, name), nn.Parameter(torch.ones(shape))
    optimizer = algorithm([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    found = memory.measure(memory.weights_of_shapes([shape]), (algorithm, options))
    summed = {item.name: item.nbytes for item in found.items if item.kind not in ("weights", "gradients")}
    assert summed == {name: value.nbytes for name, value in optimizer.state[param].items()}


def test_bytes_of_a_large_model():
    llama = LARGE_SHAPE_LISTS["llama-7b"]
    assert llama.elements == 6_738_415_616  # "6.7B" in the paper
    weights = memory.weights_of_shapes(llama.shapes)
    each = {}
    for storage in memory.COMMON:
        found = memory.measure(memory.converted(weights, storage.dtype), (surefoot.AdamW, storage.options))
        each[str(storage)] = round(found.nbytes / found.elements, 2)
    assert each == {
        "float32": 16.0,
        "bfloat16 (32 bits), state float32": 14.0,
        "float32, state float8": 10.06,
        "bfloat16": 8.0,
        "bfloat16 (stochastic)": 8.0,
        "bfloat16 (24 bits), state float8": 7.06,
        "bfloat16 (stochastic), state float8": 6.06,
    }


def test_what_is_not_trained_is_a_weight_only():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    found = {one.name: one for one in memory.measure(memory.weights_of(model), (surefoot.SGD, {})).parameters}
    assert (found["0.weight"].nbytes, found["0.weight"].optimizer) == (2 * 4 * 12, "SGD")
    assert (found["0.bias"].nbytes, found["0.bias"].optimizer) == (4 * 3, None)
    assert (found["1.num_batches_tracked"].nbytes, found["1.running_mean"].nbytes) == (8, 12)


def test_tied_weights_count_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert memory.measure(memory.weights_of(model), (surefoot.SGD, {})).elements == 4


def test_the_rest_is_for_the_next_optimizer():
    weights = memory.weights_of_shapes([(8, 8), (8,)])
    found = memory.measure(weights, (surefoot.Muon, {}), (surefoot.AdamW, {}))
    assert found.by_optimizer() == {"Muon": 1, "AdamW": 1}
    assert found.by_kind() == {"weights": 288, "gradients": 288, "state": 256 + 2 * 32 + 4}
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        memory.measure(weights, (surefoot.Muon, {}))
