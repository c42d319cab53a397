"""`optimizer.to`: state moves, scalars stay on the CPU unless steps are captured, and a step notices."""

import pytest
import torch
from torch import nn

import surefoot
from helpers import ALGORITHMS, make, make_params, name_of, params_of, snapshot, train

META = torch.device("meta")


def devices(optimizer):
    """Return the devices of all tensors of the state, by name."""
    found = {}
    for entry in optimizer.state.values():
        for name, value in entry.items():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    found.setdefault(name, set()).add(tensor.device.type)
    return found


@pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
def test_state_moves_and_scalars_stay(cls):
    optimizer = train(make(cls))
    scalars = {"step", *(scalar.name for scalar in cls.scalars)}
    kept = [param.device.type for param in params_of(optimizer)]
    before = devices(optimizer)
    assert optimizer.to("meta") is optimizer
    expected = {name: {"cpu"} if name in scalars else {"meta"} for name in before}
    assert devices(optimizer) == expected
    assert [param.device.type for param in params_of(optimizer)] == kept


def test_scalars_of_captured_groups_move():
    params = make_params()
    optimizer = train(make(surefoot.AdamW, [{"params": params[:1]}, {"params": params[1:]}]))
    optimizer.param_groups[1]["capturable"] = True
    optimizer.to(META)
    assert [optimizer.state[param]["step"].device.type for param in params] == ["cpu", "meta"]


def test_a_step_with_state_elsewhere_is_refused_and_says_what_to_do():
    optimizer = train(make(surefoot.AdamW))
    optimizer.to("meta")
    with pytest.raises(
        RuntimeError, match=r"on meta; after replacing or moving a parameter, move its state with `optimizer.to"
    ):
        train(optimizer, steps=1)


@pytest.mark.parametrize("engine", [{}, {"foreach": False}])
def test_a_step_after_moving_uses_the_state_that_is_there(engine):
    """Kept plans hold addresses of the state that was."""
    runs = []
    for move in (False, True):
        params = make_params()
        optimizer = train(surefoot.AdamW(params, **engine))
        if move:
            state = {param: dict(entry) for param, entry in optimizer.state.items()}
            optimizer.to("meta")
            for param, entry in state.items():  # as if it came back: other tensors with the same values
                optimizer.state[param].update({name: value.clone() for name, value in entry.items()})
            optimizer.to()
        runs.append(snapshot(train(optimizer, first=3)))
    assert all(torch.equal(a, b) for a, b in zip(*(run["values"] for run in runs), strict=True))


def test_moving_to_where_it_is_changes_nothing():
    optimizer = train(make(surefoot.AdamW))
    before = {id(value) for entry in optimizer.state.values() for value in entry.values()}
    optimizer.to("cpu").to()
    assert {id(value) for entry in optimizer.state.values() for value in entry.values()} == before


def test_an_optimizer_without_state_can_move():
    optimizer = make(surefoot.AdamW)
    assert optimizer.to("meta").state == {}
    assert not optimizer.state


def test_a_move_that_fails_leaves_all_state_where_it_was():
    optimizer = train(make(surefoot.AdamW))
    with pytest.raises((RuntimeError, ImportError, NotImplementedError)):
        optimizer.to("privateuseone")
    assert devices(optimizer) == {"step": {"cpu"}, "exp_avg": {"cpu"}, "exp_avg_sq": {"cpu"}}
    train(optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capturable", [False, True])
def test_offloading_and_back_does_not_change_training(tmp_path, capturable):
    runs = []
    for offload in (False, True):
        params = [nn.Parameter(param.detach().cuda()) for param in make_params()]
        optimizer = surefoot.AdamW(params, capturable=capturable)
        cuda_train(optimizer, 0)
        if offload:
            optimizer.to("cpu")
            assert {name: kind for entry in [devices(optimizer)] for name, kind in entry.items()}["exp_avg"] == {"cpu"}
            optimizer.to()
            assert devices(optimizer)["exp_avg"] == {"cuda"}
            assert devices(optimizer)["step"] == ({"cuda"} if capturable else {"cpu"})
        cuda_train(optimizer, 3)
        surefoot.load(surefoot.save(tmp_path, optimizer=optimizer), optimizer=optimizer)
        cuda_train(optimizer, 6)
        runs.append([param.detach().cpu() for param in params])
    assert all(map(torch.equal, *runs))


def cuda_train(optimizer, first):
    for seed in range(first, first + 3):
        generator = torch.Generator().manual_seed(seed)
        for param in params_of(optimizer):
            param.grad = torch.randn(param.shape, generator=generator).cuda()
        optimizer.step()
