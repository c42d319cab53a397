"""Several algorithms of sharded parameters step as in one process, and ranks speak once for all of them."""

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_combined", request.param, tmp_path_factory.mktemp("ranks"))


def of(found, kind=None):
    """Yield names and results of the cases of a kind; of all layouts if none is given."""
    for results in found:
        for name, result in results.items():
            first = name.split(" / ")[0]
            if first == kind or (kind is None and first not in ("reloaded", "refused", "collectives")):
                yield name, result


def test_numbers_and_decisions_are_those_of_one_process(found):
    skipped = 0
    for name, result in of(found):
        assert "error" not in result, (name, result)
        # A norm is summed in another order, and what Muon makes orthogonal is rounded to bfloat16.
        exact = not name.endswith(("norm", "all", "groups")) and "nan" not in name
        assert result["difference"] <= (0.0 if exact else 1e-3), name
        assert not result["nan"], name
        assert result["skipped"] == result["plain skipped"] == ("nan in row" in name), name
        skipped += result["skipped"]
    assert skipped


def test_telemetry_is_that_of_one_process(found):
    for name, result in of(found):
        if name.endswith(("telemetry", "all")):
            (sums, _), (ours, _) = result["telemetry"]
            assert ours.flatten().tolist() == pytest.approx(sums.flatten().tolist(), rel=1e-3, abs=1e-9), name


def test_state_goes_through_a_state_dict(found):
    for name, result in of(found, "reloaded"):
        assert result == {"same": True, "state": True}, name


def test_one_exchange_serves_all_algorithms(found):
    for results in found:
        calls = {name: result["calls"] for name, result in results.items() if name.startswith("collectives")}
        assert {sum(counts.values()) for counts in calls.values()} == {3}, calls
        assert len({str(counts) for counts in calls.values()}) == 1, calls


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("Muon / state", "of `p1` of shape (6, 4)"),
        ("Muon / gradient", "`p1`"),
        ("Muon / closure", "ZeroDivisionError"),
        ("AdamW / state", "of `p1` of shape (6, 4)"),
        ("AdamW / closure", "ZeroDivisionError"),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(found, case, message):
    for rank, results in enumerate(found):
        result = results[f"refused / {case}"]
        assert result["unchanged"]
        assert result["after"]
        everywhere = case.endswith("gradient") or rank == len(found) - 1
        assert (message if everywhere else "was refused on another rank") in result["error"]
