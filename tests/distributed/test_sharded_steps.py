"""Steps of sharded parameters are those of plain ones: in every layout, with every option, on every rank."""

import pytest
import torch
from ranks import run_ranks

ROUNDING = 1e-6
COLLECTIVES = {"norm": 1, "guarded": 1, "foreach": 1, "eager": 1, "telemetry": 2, "all": 2, "skip": 1, "raise": 1}
COLLECTIVES |= {"groups": 1, "bfloat16": 1, "measured": 2, "cautious": 2}
"""How many a step takes for each mesh."""
DIVIDED_ROWS = {"columns": 7, "mixed": 1}
"""Matrices of a layout whose rows are divided: one each for the means of their rows."""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_step", request.param, tmp_path_factory.mktemp("ranks"))


def test_numbers_are_those_of_one_process(found):
    for results in found:
        for name, result in results.items():
            assert "error" not in result, (name, result)
            clipped = name.split(" / ")[-1] not in ("nothing", "value", "ema", "guarded")
            assert result["difference"] <= (ROUNDING if clipped else 0.0), name
            assert not result["nan"], name


def test_every_rank_takes_the_decision_of_one_process(found):
    decided = 0
    for results in found:
        for name, result in results.items():
            assert result["skipped"] == result["plain skipped"], name
            assert result["refused"] == result["plain refused"], name
            decided += result["skipped"] + len(result["refused"])
    assert decided


def test_collectives_are_counted(found):
    for results in found:
        for name, result in results.items():
            meshes = 2 if name.startswith("two meshes") else 1
            layout, *_, option = name.split(" / ")
            expected = 4 * meshes * COLLECTIVES.get(option, 0)
            expected += 4 * DIVIDED_ROWS.get(layout, 0) * (option == "cautious")
            assert sum(result["calls"].values()) == expected, (name, result["calls"])


def test_telemetry_is_that_of_one_process(found):
    measured = 0
    for results in found:
        for name, result in results.items():
            if "telemetry" in result:
                (sums, clip), (ours, our_clip) = result["telemetry"]
                torch.testing.assert_close(ours, sums, rtol=1e-5, atol=1e-9, msg=name)
                assert float(our_clip) == pytest.approx(float(clip), rel=1e-5), name
                measured += 1
    assert measured
