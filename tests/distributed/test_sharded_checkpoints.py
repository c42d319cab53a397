"""Checkpoints of sharded training: the same bits from any layout to any other, or refused on all ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from typer.testing import CliRunner

import surefoot
from surefoot.checkpoint import Checkpoint, CheckpointError
from surefoot.cli import app


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def folder(request, tmp_path_factory):
    """Where the ranks have run, and how many they were."""
    place = tmp_path_factory.mktemp("ranks")
    return place, request.param, run_ranks("cases_checkpoints", request.param, place, timeout=120 * request.param)


@pytest.fixture
def found(folder):
    """What became of each case, by rank."""
    return folder[2]


def of_kind(found, kind):
    cases = [(name, result) for results in found for name, result in results.items() if name.split(" / ")[0] == kind]
    assert cases
    for name, result in cases:
        assert "trace" not in result, (name, result)
    return cases


def assert_same(ours, theirs, name):
    assert ours.keys() == theirs.keys(), name
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), (name, key)


def test_any_layout_is_loaded_into_any_other_bit_for_bit(found):
    now, after = found[0]["expected"]
    for name, result in of_kind(found, "saved"):
        assert_same(result["state"], now, name)
    for name, result in of_kind(found, "loaded"):
        assert_same(result["state"], now, name)
        assert_same(result["next"], after, name)
        assert result["in place"], name
        assert result["like"], name
        assert result["step"] == 7


def test_every_rank_writes_its_shards_once(folder):
    place, world, _ = folder
    for layout, copies in (("rows", 1), ("copies", 1), ("two dimensions", 1)):
        checkpoint = Checkpoint(place / "checkpoints" / layout / "step-00000007.safetensors")
        assert len(checkpoint.files) == world
        for name, shards in checkpoint.shards.items():
            assert sum(shard.place.elements for shard in shards) == copies * checkpoint.places[name].elements


@pytest.mark.parametrize("kind", ["plain data", "disk", "disk in background"])
def test_a_rank_that_cannot_save_fails_the_save_on_all_and_leaves_nothing(folder, kind):
    _, world, found = folder
    messages = {"plain data": "TypeError: extra['f'] is a builtin", "disk": "No space left on device"}
    message = messages.get(kind, "No space left on device")
    for failing in range(world):
        for rank, results in enumerate(found):
            result = results[f"failing / {kind} / {failing}"]
            assert "trace" not in result, result
            assert message in result["error"]
            if rank != failing:
                assert f"rank {failing}" in result["error"]
            assert result["names"] == ["step-00000001.shards", "step-00000001"]
            assert result["after"] == [*result["names"], "step-00000003.shards", "step-00000003"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("flipped", "is corrupted: bytes of"),
        ("cut", "is truncated"),
        ("another", "was written by another save"),
        ("missing", "belong beside their checkpoint"),
    ],
)
def test_damaged_shards_are_found_and_the_checkpoint_before_is_taken(found, kind, reason):
    for _, result in [one for one in of_kind(found, "damaged") if one[0].endswith(kind)]:
        assert (result["step"], result["same"]) == (1, True)
        ((name, why),) = result["skipped"]
        assert name == "step-00000002.safetensors"
        assert reason in why
        assert reason in result["refused"]


def test_what_does_not_fit_on_one_rank_is_refused_on_all(folder):
    _, world, found = folder
    for failing in range(world):
        for results in found:
            result = results[f"misfit / {failing}"]
            assert "`more` of shape (1,) is in the model, but was not saved" in result["error"]
            assert result["unchanged"]


def test_saves_in_the_background_are_of_the_moment_of_the_call(found):
    names = ["step-00000000.shards", "step-00000000", "step-00000001.shards", "step-00000001"]
    for _, result in of_kind(found, "in background"):
        assert result == {"same": True, "names": names}


def test_shards_go_with_their_checkpoint(found):
    for _, result in of_kind(found, "rotated"):
        assert result["names"] == ["step-00000002.shards", "step-00000002", "step-00000003.shards", "step-00000003"]


def test_every_rank_goes_on_with_its_own_random_numbers(found):
    drawn = [result["drawn"].tolist() for _, result in of_kind(found, "generators")]
    assert len({tuple(one) for one in drawn}) == len(drawn)
    assert [result["again"].tolist() for _, result in of_kind(found, "generators")] == drawn


@pytest.mark.parametrize("kind", ["fsdp", "torch"])
def test_training_goes_on(found, kind):
    for _, result in of_kind(found, kind):
        assert result["same"]
        assert result.get("epoch", 3) == 3


def test_state_that_each_rank_has_for_itself_is_refused(found):
    for _, result in of_kind(found, "own state"):
        assert "`optimizer.p0.mine` is a plain tensor beside sharded parameters, and on rank 1" in result["error"]
        assert result["files"] == []


def test_sharded_tensors_that_only_one_process_may_know_of_are_refused(found):
    for _, result in of_kind(found, "only extra"):
        assert "`extra.t` is sharded, but no parameter of a model or optimizer is" in result["error"]


def test_one_process_loads_what_ranks_have_saved(folder):
    place, _, found = folder
    now, _ = found[0]["expected"]
    params = {name: torch.nn.Parameter(torch.zeros_like(now[name])) for name in now if name in ("p0", "p1")}
    model = torch.nn.ParameterDict(params)
    loaded = surefoot.load(place / "checkpoints" / "rows", model=model, strict=False)
    assert all(torch.equal(model[name], now[name]) for name in params)
    assert loaded.extra == {"layout": "rows"}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_another_number_of_ranks_loads_what_ranks_have_saved(folder, tmp_path, ranks):
    place, _, found = folder
    (tmp_path / "saved by others").symlink_to(place / "checkpoints")
    now, after = found[0]["expected"]
    for results in run_ranks("cases_resharding", ranks, tmp_path):
        for name, result in of_kind([results], "loaded"):
            assert_same(result["state"], now, name)
            assert_same(result["next"], after, name)


def command(*arguments, status=0):
    result = CliRunner().invoke(app, ["ckpt", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def test_commands_read_both_kinds(folder, tmp_path):
    place, _, found = folder
    rows, plain = (place / "checkpoints" / layout for layout in ("rows", "plain"))
    facts = json.loads(command("inspect", rows, "--json"))
    theirs = json.loads(command("inspect", plain, "--json"))
    assert facts["tensors"].keys() == theirs["tensors"].keys()
    for name, one in facts["tensors"].items():
        other = theirs["tensors"][name]
        assert (one["shape"], one["dtype"], one["bytes"]) == (other["shape"], other["dtype"], other["bytes"])
        assert one["norm"] == pytest.approx(other["norm"]), name
    assert "exp_avg" in command("inspect", rows)
    assert "whole" in command("verify", rows)
    differences = json.loads(command("diff", rows, plain, "--json", status=1))
    assert [one["name"] for one in differences] == ["parts.extra.state.layout"]
    command("convert", rows, tmp_path / "one.safetensors")
    assert [one["name"] for one in json.loads(command("diff", rows, tmp_path / "one.safetensors", "--json"))] == []
    command("convert", rows, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    assert all(torch.equal(state[name], found[0]["expected"][0][name]) for name in state)
    (damaged,) = (place / "checkpoints" / "damaged flipped").glob("step-00000002.safetensors")
    assert "bytes of" in command("verify", damaged, status=1)


@pytest.mark.parametrize(
    "change",
    [
        {"folder": "../elsewhere"},
        {"folder": ".hidden"},
        {"files": [["/etc/passwd", 1, "00000000"]]},
        {"tensors": {"model.p0": ["float32", [-4, 6]]}},
        {"tensors": {"model.p0": ["float32", [4, 5]]}},
        {"tensors": {"model.p0": ["float32", [1 << 70, 0]]}},
        {"tensors": {"model.p0": ["no dtype", [4, 6]]}},
        {"tensors": 3},
    ],
)
def test_a_forged_manifest_is_refused(folder, tmp_path, monkeypatch, change):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "checkpoint")
    from checkpoint_helpers import forge  # noqa: PLC0415

    shutil.copytree(folder[0] / "checkpoints" / "rows", tmp_path / "rows")
    path = tmp_path / "rows" / "step-00000007.safetensors"
    forge(path, lambda _, manifest: manifest["shards"].update(change))
    with pytest.raises(CheckpointError, match="malformed|incomplete|impossible"):
        Checkpoint(path)
