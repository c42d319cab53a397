"""LBFGS on sharded parameters makes the steps of one process, and all ranks take the same decisions."""

import pytest
from ranks import run_ranks

CASES = ("fixed", "search", "history", "tolerance", "rates", "float32")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_lbfgs", request.param, tmp_path_factory.mktemp("ranks"))


def layouts(results):
    """Yield names, options and results of the cases that are compared with one process."""
    for name, result in results.items():
        assert "trace" not in result, (name, result["trace"])
        if name.split(" / ")[-1] in CASES:
            yield name, name.split(" / ")[-1], result


def test_numbers_are_those_of_one_process(found):
    for results in found:
        for name, option, result in layouts(results):
            assert result["difference"] <= (1e-5 if option == "float32" else 1e-9), name
            plain, sharded = result["counts"]
            assert plain == sharded, name
            assert result["final"][1] == pytest.approx(result["final"][0], rel=1e-5), name


def test_all_ranks_have_the_same_bits(found):
    for name, _, result in layouts(found[0]):
        for others in found[1:]:
            assert others[name]["bits"] == result["bits"], name
            assert others[name]["counts"] == result["counts"], name


def test_ranks_whose_losses_differ_decide_alike(found):
    assert all(results["own losses"] == found[0]["own losses"] for results in found)


def test_collectives_do_not_grow_with_the_number_of_tensors(found):
    for results in found:
        few, many = (results[f"collectives / {count}"] for count in (2, 9))
        assert few == many
        evaluations, iterations = few["counts"]
        pairs = 2 * sum(range(iterations))
        assert sum(few["calls"].values()) <= 2 + evaluations + 3 * iterations + pairs


def test_state_goes_through_a_state_dict(found):
    for results in found:
        for name, result in results.items():
            assert not name.startswith("reloaded") or result["same"], name


@pytest.mark.parametrize(("case", "message"), [("state", "state `d` has shape (999,)"), ("closure", "ZeroDivision")])
def test_an_error_on_one_rank_is_one_on_all(found, case, message):
    for failing in (0, len(found) - 1):
        for rank, results in enumerate(found):
            result = results[f"refused / {case} / {failing}"]
            assert result["unchanged"]
            assert result["after"]
            assert (message if rank == failing else "was refused on another rank") in result["error"]


def test_state_of_another_layout_is_refused(found):
    for results in found:
        message = results["other layout"]["refused"]
        assert "state of LBFGS is of shards (4, 4) as (S(0))" in message
        assert "but the parameters here are shards (4, 4) as (S(1))" in message


def test_shards_may_have_any_sizes(found):
    for results in found:
        assert results["uneven"]["difference"] <= 1e-6
