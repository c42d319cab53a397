"""What holds for every test: threads, and the count of what was compared."""

import os
import re
from collections import Counter
from pathlib import Path

# Before torch is imported: waiting threads of one worker would take the other's core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("SUREFOOT_CACHE_DIR", str(Path(__file__).parents[1] / ".kernels"))

import pytest
import torch

# Workers of pytest-xdist share the cores; tests of threads set their own number.
torch.set_num_threads(1)
# torch warns unless told whether to check them.
torch.sparse.check_sparse_tensor_invariants.enable()

KNOWN_BUGS: dict[str, str] = {
    r"test_eager_has_the_bits.*Rprop-step_sizes=.0.009.*float64": "maximum(tensor, number) is rounded to float32",
    r"test_operations_are_those_of_torch\[(eager|foreach)-(maximum|minimum)\]": "the same",
    r"test_operations_are_those_of_torch\[eager-(fill|where)\]": "a fill with -0.0 gives 0.0",
    r"test_operations_are_those_of_torch\[foreach-where\]": "where(number, number, tensor) gives a number, no tensor",
    r"test_operations_are_those_of_torch\[foreach-add_scaled\]": "torch.add(tensor, number, alpha=number) raises",
    r"test_operations_are_those_of_torch\[cpu-lerp\]": "lerp asks weight < 0.5 where torch asks |weight| < 0.5",
    r"test_operations_are_those_of_torch\[cpu-pow\]": "x**0.5 is no sqrt: inf for -inf, 0.0 for -0.0",
    r"test_operations_on_numbers_alone\[.*-math\]": "math.sqrt and others stand in the table but cannot be traced",
    r"test_an_error_in_a_rule.*-(number_for_tensor|tensor_for_number)\]": "TypeError, or nothing, instead of RuleError",
    r"test_tensors_that_require_gradients_are_checked_in_silence": "float() of a tensor that requires gradients",
    r"test_gradients_flow_to_hyperparameters\[(NAdam-betas|Rprop-lr|ASGD-lr)\]": "cut where state carries the number",
    r"test_sparse_gradients\[cpu-SGD-maximize=True": "kept works skip to_dense: wrong values, errors, a segfault",
    r"test_gradients_may_be_sparse_in_some_steps.*\[cpu-SGD\]": "the same: wrong values, may end in a segfault",
    r"test_gradients_may_be_lazily.*\[cpu-": "kept works skip resolve_neg and resolve_conj: wrong signs, errors",
    r"test_parameters_may_be_swapped\[cpu-": "kept works hold references to parameters",
}
"""Tests that fail, by a pattern of their names, and why.  Whoever mends one takes its line away."""


def pytest_collection_modifyitems(items):
    for item in items:
        for pattern, reason in KNOWN_BUGS.items():
            if re.search(pattern, item.name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True, run="segfault" not in reason))


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
