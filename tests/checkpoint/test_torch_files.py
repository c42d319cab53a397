"""To torch and back: files of torch.save become checkpoints, checkpoints become files that torch opens safely."""

import pytest
import torch
from checkpoint_helpers import make, state_of, train
from torch import nn

import surefoot
from helpers import (
    ALGORITHMS,
    assert_same,
    make_params,
    name_of,
    snapshot,
    twin,
)
from helpers import (
    make as make_optimizer,
)
from helpers import (
    train as train_steps,
)
from surefoot.checkpoint import Checkpoint, CheckpointError, manifest_of
from surefoot.checkpoint.convert import from_torch, to_torch
from surefoot.checkpoint.writer import write


def converted(source, target):
    contents, step, taken = from_torch(source)
    write(target, contents.tensors, manifest_of(contents, step, 0))
    return {one.key: one.label for one in taken}


def test_a_training_script_of_torch_goes_on_from_a_converted_checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    train(model, optimizer)
    scheduler.step()
    scaler = torch.amp.GradScaler("cpu")
    whole = {
        "model_state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": 3,
        "global_step": 500,
        "history": [(1, 0.5)],
    }
    torch.save(whole, tmp_path / "a.pt")
    labels = converted(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert labels == {
        "model_state_dict": "model",
        "optimizer": "optimizer",
        "lr_scheduler": "scheduler",
        "scaler": "scaler",
        "epoch": "extra['epoch']",
        "global_step": "extra['global_step']",
        "history": "extra['history']",
    }
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ours = surefoot.AdamW(other.parameters(), foreach=False)
    again = surefoot.lr_scheduler.MultiStepLR(ours, [2, 2, 5])
    found = surefoot.load(
        tmp_path / "a.safetensors", model=other, optimizer=ours, scheduler=again, scaler=torch.amp.GradScaler("cpu")
    )
    assert (found.step, found.extra) == (500, {"epoch": 3, "global_step": 500, "history": [(1, 0.5)]})
    assert_same(state_of(other), state_of(model))
    assert_same(ours.state_dict()["state"], optimizer.state_dict()["state"])
    assert again.milestones == scheduler.milestones
    torch.manual_seed(1)
    train(model, optimizer, 3)
    torch.manual_seed(1)
    train(other, ours, 3)
    assert_same(state_of(other), state_of(model))


@pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
def test_every_optimizer_crosses_over_to_torch_and_back(tmp_path, cls):
    """torch -> file of torch -> ours -> checkpoint -> file of torch -> torch, against torch alone."""
    theirs = make_optimizer(twin(cls), make_params())
    train_steps(theirs)
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    assert converted(tmp_path / "a.pt", tmp_path / "a.safetensors") == {"optimizer": "optimizer"}
    ours = make_optimizer(cls, make_params(seed=1))
    surefoot.load(tmp_path / "a.safetensors", optimizer=ours)
    path = surefoot.save(tmp_path / "b.safetensors", optimizer=ours)
    to_torch(Checkpoint(path), tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]
    back = make_optimizer(twin(cls), make_params())
    back.load_state_dict(found)
    assert_same(snapshot(back)["state"], snapshot(theirs)["state"])


@pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
def test_torch_saves_and_safely_loads_the_state_dict_of_every_optimizer(tmp_path, cls):
    optimizer = train_steps(make_optimizer(cls))
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    other = make_optimizer(cls)
    other.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert_same(other.state_dict(), optimizer.state_dict())


def test_a_checkpoint_becomes_a_file_that_torch_opens_safely(tmp_path):
    model, optimizer = make()
    scheduler = surefoot.lr_scheduler.MultiStepLR(optimizer, [1, 1])
    extra = {"array": torch.ones(2).numpy(), "number": torch.ones(2).numpy()[0], "set": {1}, "nested": ({"a": (1,)},)}
    path = surefoot.save(
        tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, extra=extra, sampler=torch.Generator()
    )
    to_torch(Checkpoint(path), tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert_same([found["model"], found["optimizer"], found["scheduler"]], state_of(model, optimizer, scheduler))
    assert found["step"] == 0
    assert_same(found["extra"], {"array": torch.ones(2), "number": 1.0, "set": {1}, "nested": ({"a": (1,)},)})
    assert torch.equal(found["rng"]["torch"], torch.get_rng_state())
    other, again = make(1)
    other.load_state_dict(found["model"])
    again.load_state_dict(found["optimizer"])
    assert_same(state_of(other, again), state_of(model, optimizer))


def test_tied_weights_stay_one_tensor_in_torchs_file(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(50, 50, bias=False), "b": nn.Linear(50, 50, bias=False)})
    model["b"].weight = model["a"].weight
    to_torch(Checkpoint(surefoot.save(tmp_path, model=model, rng=False)), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2 * 50 * 50 * 4
    found = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()


def test_a_damaged_checkpoint_is_not_converted(tmp_path):
    path = surefoot.save(tmp_path / "a.safetensors", extra=torch.ones(3))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupted"):
        to_torch(Checkpoint(path), tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ({"a": torch.ones(2)}, {"model": "model"}),
        ({}, {}),
        ({"weights": {"a": torch.ones(2)}}, {"weights": "extra['weights']"}),
        ({"model": {"a": 3}}, {"model": "extra['model']"}),
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 2}, {"state_dict": "model", "epoch": "extra['epoch']"}),
        ({"extra": {"a": 1}}, {"extra": "extra"}),
    ],
)
def test_what_becomes_of_other_files(tmp_path, content, labels):
    torch.save(content, tmp_path / "a.pt")
    assert converted(tmp_path / "a.pt", tmp_path / "a.safetensors") == labels


def test_several_optimizers_of_a_trainer(tmp_path):
    states = [surefoot.SGD([nn.Parameter(torch.ones(i))]).state_dict() for i in (1, 2)]
    torch.save(
        {"optimizer_states": states, "lr_schedulers": [{"last_epoch": 1}], "other": states[0]}, tmp_path / "a.pt"
    )
    converted(tmp_path / "a.pt", tmp_path / "a.safetensors")
    parts = Checkpoint(tmp_path / "a.safetensors").manifest["parts"]
    assert set(parts) == {"optimizer.0", "optimizer.1", "scheduler", "optimizer.other"}


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_could_run_code_are_refused(tmp_path, capsys):
    torch.save({"model": {}, "args": Code()}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match="a.pt is damaged, or holds more than tensors and plain data, which only running code could"
    ):
        from_torch(tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds a list, not a dict of state dicts"):
        from_torch(tmp_path / "b.pt")
    assert capsys.readouterr().out == ""


def test_files_that_are_none_of_torch_are_refused(tmp_path):
    for data in (b"", b"PK\3\4 but no archive", b"nothing"):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(ValueError, match="a.pt is (not a whole file of torch.save|damaged, or holds more)"):
            from_torch(tmp_path / "a.pt")
