"""What a rule is: what an optimizer declares, and how its `update` becomes a graph of known operations.

Nothing here runs a rule on tensors; that is the engines' part.
"""

from surefoot.rule.declare import STEP, Scalar, Slot, Sparse, narrow, scalar_dtype
from surefoot.rule.trace import Flags, Rule, bind

__all__ = ["STEP", "Flags", "Rule", "Scalar", "Slot", "Sparse", "bind", "narrow", "scalar_dtype"]
