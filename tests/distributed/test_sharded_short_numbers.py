"""Short numbers of sharded parameters are those of plain ones, bit for bit, on every rank."""

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_short", 2, tmp_path_factory.mktemp("ranks"))


def test_steps_loading_and_files_are_those_of_one_process(found):
    for results in found:
        assert results
        for name, result in results.items():
            assert "error" not in result, (name, result)
            for part in [result] if "alike" in result else result.values():
                assert part["alike"] >= 6, name
                assert not part["different"], (name, part)
