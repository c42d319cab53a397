"""Loading lays state out over ranks as its parameter is, from whatever layout; a failing rank fails on all."""

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_layouts", request.param, tmp_path_factory.mktemp("ranks"))


def test_state_comes_over_bit_for_bit_and_the_next_step_is_the_plain_one(found):
    for results in found:
        for name, result in results.items():
            if name.startswith(("SGD", "AdamW")):
                assert result == {"placed": True, "same": True, "shared": False, "stepped": True}, name


def test_state_of_another_shape_than_its_parameter_comes_over(found):
    for results in found:
        for name, result in results.items():
            if name.startswith("Adafactor"):
                assert result == {"same": True, "kinds": True}, name


def test_a_rank_that_refuses_state_refuses_it_on_all(found):
    for rank, results in enumerate(found):
        for name, result in results.items():
            if name.startswith("refused"):
                assert "error" not in result, (name, result)
                _, _, failing, strict = name.split(" / ")
                own = "momentum_buffer` has shape (1,)" if strict == "True" else "has a shard of shape (9, 6) on this"
                assert result["unchanged"], name
                assert (own if rank == int(failing) else "refused on another rank") in result["message"], name
