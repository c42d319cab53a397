"""Sharded steps that need more of a tensor than a shard are those of one process, with few collectives."""

import pytest
from ranks import run_ranks

ALGORITHMS = ("Adafactor", "Muon", "Muon of heads", "Muon of stacks", "SOAP")
STEPS = 4
CLIPPED = {"norm": 1e-3, "all": 1e-3, "bfloat16": 2e-2}
ROUNDING = {
    "Adafactor": {"nothing": 1e-6, "float64": 1e-14, "bfloat16": 2e-2},
    "Muon": {"nothing": 0.0, **CLIPPED},
    "Muon of heads": {"nothing": 1e-6, **CLIPPED},
    "Muon of stacks": {"nothing": 1e-6, **CLIPPED},
    "SOAP": {"nothing": 0.0, **CLIPPED, "bfloat16": 0.0},
}
"""How far sums over ranks may move a step; without them the numbers of Muon and SOAP are the same."""
EXCHANGES = {"Adafactor": 2, "Muon": 2, "Muon of heads": 4, "Muon of stacks": 4, "SOAP": 2}
"""Collectives of a step on a mesh of one dimension, beside the one by which ranks agree on the step."""

OTHERS = ("reloaded", "collectives", "refused", "irregular", "soap", "soap relaid", "state", "transports")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_whole", request.param, tmp_path_factory.mktemp("ranks"))


def of(found, *kinds):
    """Yield names, algorithm, option and result of the cases of some kinds, of all layouts if there are none."""
    for results in found:
        for name, result in results.items():
            first, algorithm, option = (*name.split(" / "), "", "")[:3]
            others = first in (
                "reloaded",
                "collectives",
                "refused",
                "irregular",
                "state",
                "transports",
                "soap",
                "soap relaid",
            )
            if first in kinds or (not kinds and not others):
                yield name, algorithm, option, result


def test_numbers_are_those_of_one_process(found):
    for name, algorithm, option, result in of(found):
        assert "error" not in result, (name, result)
        allowed = ROUNDING[algorithm].get(option, ROUNDING[algorithm]["nothing"])
        assert result["difference"] <= allowed, name
        assert not result["nan"], name


def test_every_rank_takes_the_decision_of_one_process(found):
    skipped = 0
    for name, _, option, result in of(found):
        assert result["skipped"] == result["plain skipped"] == option.startswith("nan"), name
        skipped += result["skipped"]
    assert skipped


def test_telemetry_is_that_of_one_process(found):
    for name, _, option, result in of(found):
        if option in ("telemetry", "all"):
            (sums, _), (ours, _) = result["telemetry"]
            assert ours.flatten().tolist() == pytest.approx(sums.flatten().tolist(), rel=1e-3, abs=1e-9), name


def test_collectives_are_few_in_every_layout(found):
    for name, algorithm, option, result in of(found):
        meshes = 2 if name.startswith("two meshes") else 1
        lines = 3 if name.startswith("two meshes") else 2 if name.startswith("fsdp and tp") else 1
        # Parameters that are divided by rows and by columns have sums over both.
        own = EXCHANGES[algorithm] + (EXCHANGES[algorithm] > EXCHANGES["Muon"])
        most = meshes + own * (meshes if algorithm in ("Muon", "SOAP") else lines)
        most += meshes * (option in ("telemetry", "all"))
        assert sum(result["calls"].values()) <= STEPS * most, (name, result["calls"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_collectives_do_not_grow_with_the_number_of_tensors(found, algorithm):
    for results in found:
        few, many = (results[f"collectives / {algorithm} / {count}"]["calls"] for count in (2, 9))
        assert few == many
        assert sum(few.values()) == 1 + EXCHANGES[algorithm]


def test_state_goes_through_a_state_dict(found):
    for name, _, _, result in of(found, "reloaded"):
        assert result == {"same": True, "state": True}, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("case", "message"), [("state", "of `p1` of shape (6, 4)"), ("gradient", "`p1`"), ("closure", "ZeroDivisionError")]
)
def test_an_error_on_one_rank_is_one_on_all(found, algorithm, case, message):
    for failing in (0, len(found) - 1):
        for rank, results in enumerate(found):
            result = results[f"refused / {algorithm} / {case} / {failing}"]
            assert result["unchanged"]
            assert result["after"]
            everywhere = case == "gradient"  # who has none does not know that others have
            assert (message if everywhere or rank == failing else "was refused on another rank") in result["error"]


def test_shards_that_are_not_what_their_placements_say_are_refused(found):
    for name, _, _, result in of(found, "irregular"):
        assert "by its placements" in result["refused"] or "was refused on another rank" in result["refused"], name
    for algorithm in ALGORITHMS:
        message = found[0][f"irregular / {algorithm}"]["refused"]
        assert "`p` of shape" in message
        assert "has a shard of shape (1, 4) on this rank, by its placements" in message


def test_the_state_of_adafactor_is_where_its_rows_and_columns_are(found):
    shard, copy = "(Shard(dim={}),)", "(Replicate(),)"
    for results in found:
        rows, columns = results["state"]["rows"], results["state"]["columns"]
        assert (rows["row_var"], rows["col_var"]) == (shard.format(0), copy)
        assert (columns["row_var"], columns["col_var"]) == (copy, shard.format(1))
        for state in (rows, columns):
            assert "state `row_var` of `weight`" in state["refused"]
            assert "must be a DTensor of placements" in state["refused"]


def test_what_soap_makes_whole_follows_its_options(found):
    for name, _, _, result in of(found, "soap"):
        assert result.get("difference") == 0.0, (name, result)
        assert not result["nan"], name


def test_the_state_of_soap_is_divided_and_moves_between_layouts(found):
    for results in found:
        result = results["soap relaid"]
        assert set(result.pop("placements").values()) == {"(Shard(dim=0),)"}
        assert result == {"sharded": True, "plain": True, "file": True}


def test_ranks_without_a_group_of_their_own_exchange_the_same(found):
    for results in found:
        assert results["transports"] == {"together": True, "pairwise": True}
