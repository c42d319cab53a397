"""What a rule is: what an optimizer declares, and how its `update` becomes a graph of known operations.

Nothing here runs a rule on tensors; that is the engines' part.
"""

from surefoot.rule.bound import Rule, Stage
from surefoot.rule.declare import (
    EMA,
    FLOAT8,
    ROUNDING_STEP,
    STEP,
    GroupScalar,
    Reduction,
    Scalar,
    Slot,
    Sparse,
    narrow,
    one_number,
    scalar_dtype,
)
from surefoot.rule.ops import group_sum, total_sum
from surefoot.rule.spec import ALGORITHM, DIRECTED, ENGINE_OPTIONS, STORAGE_OPTIONS, AlgorithmSpec, Flags
from surefoot.rule.trace import TELEMETRY, bind, gradient_rule

__all__ = [
    "ALGORITHM",
    "DIRECTED",
    "EMA",
    "ENGINE_OPTIONS",
    "FLOAT8",
    "ROUNDING_STEP",
    "STEP",
    "STORAGE_OPTIONS",
    "TELEMETRY",
    "AlgorithmSpec",
    "Flags",
    "GroupScalar",
    "Reduction",
    "Rule",
    "Scalar",
    "Slot",
    "Sparse",
    "Stage",
    "bind",
    "gradient_rule",
    "group_sum",
    "narrow",
    "one_number",
    "scalar_dtype",
    "total_sum",
]
