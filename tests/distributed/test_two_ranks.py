"""Two processes: state that is not laid out over ranks as its parameter is never reaches a kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of each case, by rank."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "MALLOC_PERTURB_": "165"}
    processes = [
        subprocess.Popen(  # noqa: S603 (our own script)
            [sys.executable, SCRIPT, str(rank), store], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors.decode()
    return [json.loads(output) for output, _ in results]


def test_both_ranks_take_the_same_way(found):
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.startswith("shard"):
            assert ours[name].keys() == theirs[name].keys(), name


def test_what_is_loaded_from_any_layout_gives_the_numbers_of_a_plain_step(found):
    for results in found:
        for name, result in results.items():
            kind, algorithm, other, live = (*name.split(), "", "")[:4]
            if kind == "load" or (kind == "state" and other == live):
                expected = results[f"{kind} {algorithm} plain plain"]["values"]
                torch.testing.assert_close(torch.tensor(result["values"]), torch.tensor(expected), equal_nan=True)


def test_a_step_refuses_state_of_another_layout_by_name_and_nothing_changes(found):
    for results in found:
        refused = 0
        for name, result in results.items():
            kind, _, other, live = (*name.split(), "", "")[:4]
            if kind == "state" and other != live:
                assert result["unchanged"], name
                assert "`weight`" in result["refused"], name
                assert "must be a DTensor" in result["refused"] or "must be a plain tensor" in result["refused"], name
                refused += 1
        assert refused == 3 * 12


@pytest.mark.parametrize("size", [1, 3])
def test_a_shard_of_a_wrong_size_is_refused_where_it_is(found, size):
    name = f"shard of {size} rows"
    assert "values" in found[0][name] or "refused" in found[0][name]
    assert f"has a shard of shape ({size}, 6) on this rank, the parameter's is (2, 6)" in found[1][name]["refused"]
    assert found[1][name]["unchanged"]
