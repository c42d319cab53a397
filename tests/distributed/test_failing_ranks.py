"""One rank fails, or has nothing to step: all others learn of it, none hangs, and nothing is half changed."""

import pytest
import torch
from ranks import run_ranks

WORLD = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_failures", WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("asked", ["norm", "guard", "telemetry"])
@pytest.mark.parametrize("failing", range(WORLD))
@pytest.mark.parametrize(("kind", "message"), [("refused", "`exp_avg` of `p1`"), ("closure", "ZeroDivisionError")])
def test_an_error_on_one_rank_is_one_on_all(found, kind, message, failing, asked):
    for rank, results in enumerate(found):
        result = results[f"{kind} / {asked} / {failing}"]
        assert result["unchanged"]
        assert (message if rank == failing else "was refused on another rank") in result["error"]
        assert all(result.get("after", []))


def test_a_rank_without_gradients_takes_part(found):
    ours, theirs = (results["missing gradients"] for results in found)
    assert (ours["error"], theirs["error"]) == (None, None)
    assert (ours["unchanged"], theirs["unchanged"]) == (False, True)


@pytest.mark.parametrize("infinite", range(WORLD))
def test_infinities_that_one_rank_has_found_skip_the_step_on_all(found, infinite):
    for results in found:
        assert results[f"scaled / {infinite}"] == {"error": None, "unchanged": True, "skipped": 1}


@pytest.mark.parametrize("name", ["fully_shard", "ZeRO", "FSDP1 / told"])
def test_wrappers_train_as_one_process_does(found, name):
    for results in found:
        pairs = results[name]["pairs"]
        same = [pair for pair in pairs if pair[0].shape == pair[1].shape]
        assert len(same) == len(pairs)
        for ours, theirs in same:
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_the_group_of_zero_is_found(found):
    assert all(results["ZeRO"]["group"] for results in found)


def test_parameters_of_fsdp1_are_refused_where_a_norm_of_all_is_needed(found):
    for results in found:
        assert "flattened by FSDP1" in results["FSDP1 / not told"]["error"]
        assert "`process_group=`" in results["FSDP1 / not told"]["error"]


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS"])
def test_parameters_of_fsdp1_are_refused_by_algorithms_that_need_them_whole(found, name):
    for results in found:
        result = results[f"FSDP1 / {name}"]
        assert f"{name} needs its parameters whole, but they are flattened by FSDP1" in result["error"]
        assert result["unchanged"]
