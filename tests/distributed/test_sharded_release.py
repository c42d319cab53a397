"""Gradients of sharded parameters, released while backward runs: the numbers of the plain step; what is refused."""

import pytest
import torch
from ranks import run_ranks

REFUSED = {
    "Muon": "RuntimeError: Muon needs to know more of a tensor than a shard",
    "LAMB": "RuntimeError: LAMB needs to know more of a tensor than a shard",
    "each clipped": "RuntimeError: `max_param_grad_norm` looks at the whole gradient of a parameter",
    "left out": "RuntimeError: `nonfinite_params` looks at the whole gradient of a parameter",
    "DDP": "TypeError: DistributedDataParallel reduces gradients over ranks after they have come",
    "FSDP1": "TypeError: FullyShardedDataParallel reduces gradients over ranks after they have come",
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request, tmp_path_factory):
    """What became of each case, by rank."""
    return run_ranks("cases_release", request.param, tmp_path_factory.mktemp("ranks"))


def test_released_is_plain(found):
    for results in found:
        for name, result in results.items():
            if name not in {*REFUSED, "clipped"}:
                assert "error" not in result, (name, result)
                assert result == [(0, True)] * 3, name


def test_what_cannot_be_served_is_refused(found):
    for results in found:
        for name, message in REFUSED.items():
            assert results[name]["error"].startswith(message), name


def test_the_norm_is_of_all_ranks(found):
    for results in found:
        for ours, theirs in zip(*results["clipped"], strict=True):
            torch.testing.assert_close(ours, theirs)
        assert results["clipped"][0][0].min() > 0.05  # which clips
