"""Sums over all parameters are those of one process, and every rank has the same."""

import pytest
import torch
from ranks import run_ranks


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_totals", request.param, tmp_path_factory.mktemp("ranks"))


def compared(found):
    for results in found:
        for name, result in results.items():
            if name not in ("idle", "FSDP1 not told"):
                assert "error" not in result, (name, result.get("trace"))
                yield name, result


def test_numbers_are_those_of_one_process(found):
    grown = 0
    for name, result in compared(found):
        for expected, param in result["pairs"]:
            torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-5, msg=name)
        for group, expected in zip(result["numbers"], result["expected"], strict=True):
            assert group == pytest.approx(expected, rel=1e-4), name
            grown += group["d"] > 2e-3
    assert grown


def test_every_rank_has_the_same_bits(found):
    for name, result in found[0].items():
        assert all(results[name].get("numbers") == result.get("numbers") for results in found), name
    assert found[0]["idle"]["numbers"][0]["k"] == 6


def test_parameters_of_fsdp1_are_refused_where_nobody_says_who_has_the_rest(found):
    for results in found:
        assert (
            "Prodigy is to look at all gradients, but its parameters are flattened"
            in results["FSDP1 not told"]["error"]
        )
