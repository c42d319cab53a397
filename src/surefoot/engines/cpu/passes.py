"""Passes that suit a graph to processors, on which a division takes many times as long as a multiplication."""

from torch import fx

from surefoot.rule.ops import BY_NAME

_DIVISOR = {BY_NAME["div"]: 1, BY_NAME["addcdiv"]: 2}
_BY_RECIPROCAL = {BY_NAME["div"]: BY_NAME["mul"], BY_NAME["addcdiv"]: BY_NAME["addcmul"]}


def suited(graph: fx.Graph) -> fx.Graph:
    """Give a copy of a rule's graph with fewer divisions.

    A coefficient that only ever divides is marked with `meta["reciprocal"]`: the kernel is to take its reciprocal.  It
    does so in float64, so that the product comes as near as a quotient by the rounded coefficient.  A tensor that
    divides several times is inverted once.
    """
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in list(copied.nodes):
        users = [user for user in node.users if _divides(node, user)]
        if "coefficient" in node.meta and users and len(users) == len(node.users):
            node.meta["reciprocal"] = True
            _multiply(node, users, node)
        elif "coefficient" not in node.meta and len(users) > 1:
            with copied.inserting_after(node):
                inverse = copied.call_function(BY_NAME["reciprocal"], (node,))
            _multiply(node, users, inverse)
    copied.lint()
    return copied


def _divides(node: fx.Node, user: fx.Node) -> bool:
    """Whether a value is the divisor in an operation, and nothing else there."""
    place = _DIVISOR.get(user.target)  # type: ignore[arg-type]
    return place is not None and [index for index, arg in enumerate(user.args) if arg is node] == [place]


def _multiply(node: fx.Node, users: list[fx.Node], inverse: fx.Node) -> None:
    """Let operations multiply by an inverse where they divided by `node`."""
    for user in users:
        user.update_arg(_DIVISOR[user.target], inverse)  # type: ignore[index]
        user.target = _BY_RECIPROCAL[user.target]  # type: ignore[index]
