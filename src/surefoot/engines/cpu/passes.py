"""Passes that suit a graph to processors, on which a division takes many times as long as a multiplication."""

from torch import fx

from surefoot.rule.ops import BY_NAME

_DIVISION, _MULTIPLICATION = BY_NAME["div"], BY_NAME["mul"]


def use_reciprocals(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a rule's graph in which coefficients that only ever divide tensors are reciprocals instead.

    They are marked with `meta["reciprocal"]`.  The kernel takes the reciprocal in float64, so that the product comes as
    near as a quotient by the rounded coefficient does.
    """
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if "coefficient" in node.meta and node.users and all(_divides(node, user) for user in node.users):
            node.meta["reciprocal"] = True
            for user in node.users:
                user.target = _MULTIPLICATION
    return copied


def _divides(node: fx.Node, user: fx.Node) -> bool:
    """Return whether a value is the divisor of a tensor in an operation, and nothing else there."""
    if user.target is not _DIVISION:
        return False
    divided, divisor = user.args
    return divisor is node and isinstance(divided, fx.Node) and bool(divided.meta["tensor"])
