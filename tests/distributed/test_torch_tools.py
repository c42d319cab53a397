"""State of every optimizer goes through torch's own tools and ours, and the next step is the same."""

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_torch_tools", request.param, tmp_path_factory.mktemp("ranks"))


def test_state_goes_through_whole(found):
    for results in found:
        for name, result in results.items():
            assert "trace" not in result, (name, result["trace"])
            for way, there in result.items():
                assert there["differing"] == [], (name, way)
                assert all(there["next"]), (name, way)
