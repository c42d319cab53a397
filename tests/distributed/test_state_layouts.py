"""Two processes: state that is not laid out over ranks as its parameter is never reaches a kernel."""

import pytest
import torch
from ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_state", 2, tmp_path_factory.mktemp("ranks"))


def test_both_ranks_take_the_same_way(found):
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.startswith("shard"):
            assert ours[name].keys() == theirs[name].keys(), name


def test_what_is_loaded_from_any_layout_gives_the_numbers_of_a_plain_step(found):
    for results in found:
        for name, result in results.items():
            kind, algorithm, other, live = (*name.split(), "", "")[:4]
            if kind == "load" or (kind == "state" and other == live):
                expected = results[f"{kind} {algorithm} plain plain"]["values"]
                torch.testing.assert_close(torch.tensor(result["values"]), torch.tensor(expected), equal_nan=True)


def test_weights_to_train_that_are_loaded_in_eval_mode_are_laid_out_as_their_parameter(found):
    """They come back with the same bits."""
    for results in found:
        switched = {name: result for name, result in results.items() if name.startswith("switch")}
        expected = switched["switch AdamWScheduleFree plain plain"]["values"]
        assert len(switched) == 16
        assert all(result == {"values": expected} for result in switched.values())


def test_a_step_refuses_state_of_another_layout_by_name_and_nothing_changes(found):
    for results in found:
        refused = 0
        for name, result in results.items():
            kind, _, other, live = (*name.split(), "", "")[:4]
            if kind == "state" and other != live:
                assert result["unchanged"], name
                assert "`weight`" in result["refused"], name
                assert "must be a DTensor" in result["refused"] or "must be a plain tensor" in result["refused"], name
                refused += 1
        assert refused == 3 * 12


@pytest.mark.parametrize("size", [1, 3])
def test_a_shard_of_a_wrong_size_is_refused_where_it_is(found, size):
    name = f"shard of {size} rows"
    assert "values" in found[0][name] or "refused" in found[0][name]
    assert f"has a shard of shape ({size}, 6) on this rank, the parameter's is (2, 6)" in found[1][name]["refused"]
    assert found[1][name]["unchanged"]
