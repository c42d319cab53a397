"""What holds for every test: threads, and the count of what was compared."""

import gc
import importlib.metadata
import importlib.util
import os
import re
import signal
import zlib
from collections import Counter
from pathlib import Path

# Until tests are collected, which makes objects by the hundred thousand and drops few.
gc.disable()
# Before torch is imported: waiting threads of one worker would take the other's core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("SUREFOOT_CACHE_DIR", str(Path(__file__).parents[1] / ".kernels"))

import pytest
import torch

# Workers of pytest-xdist share the cores; tests of threads set their own number.
torch.set_num_threads(1)
# What a shell starts in the background ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# torch warns unless told whether to check them.
torch.sparse.check_sparse_tensor_invariants.enable()


@pytest.fixture(autouse=True, scope="session")
def _torchs_products():
    """Let Muon multiply as torch's does on every processor, or its bits could not be compared there."""
    from surefoot.optimizers import orthogonal  # noqa: PLC0415 (GPU tests may lack what it imports)

    orthogonal.multiplies_bfloat16 = lambda: True


KNOWN_BUGS: dict[str, str] = {}
"""Tests that fail, by a pattern of their names, and why.  Whoever mends one takes its line away."""
if torch.__version__.startswith("2.9."):
    KNOWN_BUGS |= {
        r"test_added_group_is_stepped\[Adagrad\]": "torch's own Adagrad makes state in its constructor only",
        r"_between_steps_counts\[.*-Adagrad-(cleared|removed_entry|added|exchanged|other)": "the same",
        r"_are_those_of_torch\[.*(sf=3\), Shard.*[013]|sf=3\), Replicate.*[23]|sf=2\)\)-shape[234])\]": (
            "torch cuts strided shards otherwise there, where sizes do not divide"
        ),
        r"test_collectives_do_not_grow_with_the_number_of_tensors\[2\]": "torch gathers more by itself there",
        r"test_mistakes_with_swalr_are_named\[options0-anneal_strategy": "torch's own message says `must by`",
    }
if importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.9."):
    KNOWN_BUGS[r"test_float32\[MARS-90\]"] = "two registers of MARS with all of its flags do not find room (8 bytes)"


def pytest_ignore_collect(collection_path, config):
    """Under `-m gpu` leave out what needs more than pytest and PyTorch, such as the other tests' packages."""
    others = collection_path.suffix == ".py" and collection_path.name != "test_gpu_device.py"
    return True if config.option.markexpr == "gpu" and others else None


@pytest.hookimpl(trylast=True)  # after pytest's own, which parametrizes
def pytest_generate_tests(metafunc):
    """Mark what waits for its turn; make no tests of what is `long` where that is not asked for, which is the half."""
    in_turn = [(marker.args[0], marker.kwargs.get("every")) for marker in metafunc.definition.iter_markers("in_turn")]
    for call in metafunc._calls if in_turn else ():
        if not all(_is_its_turn(metafunc.definition, call.params, *each) for each in in_turn):
            call.marks.append(pytest.mark.long.mark)
    if metafunc.config.option.markexpr == "not long":
        short = [call for call in metafunc._calls if not any(mark.name == "long" for mark in call.marks)]
        metafunc._calls = short or metafunc._calls[:1]  # without any it would be made without arguments


def pytest_collection_modifyitems(items):
    for item in items:
        for pattern, reason in KNOWN_BUGS.items():
            if re.search(pattern, item.name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True, run="segfault" not in reason))


def pytest_collection_finish():
    """Let whoever searches the objects of the process, as for names or for garbage, find those of tests only."""
    gc.freeze()
    gc.enable()


def _is_its_turn(definition, params, name, every):
    """Return whether an argument has the one value, or one of those, with which a set of the others is tried.

    If it has no more values than any other, every value of each argument meets every value of each other.  Tests of the
    same arguments differ in which meet.
    """
    own, count, others = 0, 1, zlib.crc32(definition.name.encode())
    for marker in definition.iter_markers("parametrize"):
        names, values = marker.args
        names = (names,) if isinstance(names, str) else names
        positions = POSITIONS.get(id(values)) or POSITIONS.setdefault(id(values), _positions(values, len(names)))
        position = positions[tuple(id(params[each]) for each in names)]
        if names[0] == name:
            own, count = position, len(values)
        else:
            others += position
    return (own - others) % (every or count) == 0


POSITIONS = {}
"""Of each list of values that tests are parametrized with the position of each."""


def _positions(values, width):
    """Return positions by the identities of each set of values, which pytest hands on as they are."""
    named = type(pytest.param())
    sets = (each.values if isinstance(each, named) else each if width > 1 else (each,) for each in values)
    return {tuple(map(id, each)): position for position, each in enumerate(sets)}


def pytest_terminal_summary(terminalreporter):
    """Say how many configurations were compared: an algorithm, its hyperparameters, a dtype, a kind of data."""
    counts = Counter(
        value
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call"
        for name, value in report.user_properties
        if name == "compared"
    )
    if counts:
        terminalreporter.section("configurations compared and equal")
    for what, count in sorted(counts.items()):
        terminalreporter.write_line(f"{count:5d}  {what}")
