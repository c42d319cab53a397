"""Cases in which the fuzzer has found faults, each the smallest of its kind; the suite runs all of them.

What `fuzz.py` prints of a new fault goes here, under a name that says what must not happen.
"""

from averages import AverageCase, Move
from cases import Case, Round
from loops import LoopCase
from sharded import Move as ShardMove
from sharded import ShardedCase
from worlds import SHAPES, Kind

ONE = (Kind(0, 0),)
EVERY = ("default", "foreach", "eager")


def after_a_step(setting: str, *moves: tuple[str, int, int, int], engine: str = "default", kinds=ONE) -> Case:
    """Return a case of a step, changes, and a step."""
    return Case(setting, engine, kinds, (Round(), Round(moves=moves)), seed=1)


def first_step(setting: str, *moves: tuple[str, int, int, int], engine: str = "default", kinds=ONE) -> Case:
    """Return a case of changes before the only step."""
    return Case(setting, engine, kinds, (Round(moves=moves),), seed=1)


def steady(setting: str, *moves: tuple[str, int, int, int]) -> Case:
    """Return a case of steps that are alike, so that plans are kept, changes, and a step of the same gradients."""
    kinds = (Kind(SHAPES.index((33000,)), 0),)
    return Case(setting, "default", kinds, (Round(), Round("in place"), Round("in place", moves)), seed=1)


def of_lists(name: str, choice: int = 0, *, average: bool = False, pairs=((0, 0, 0, 0),)) -> AverageCase:
    """Return a case of one update of averages after one of their tensors has changed."""
    return AverageCase("lists", pairs, ((Move(name, 0, average, choice),),), seed=1)


def sharded_after_a_step(rule: str, placement: int, *moves: ShardMove, engine: str = "default") -> ShardedCase:
    """Return a case of a step of a 4 x 4 parameter, changes, and a step."""
    return ShardedCase(rule, engine, ((0, placement),), ((), moves), seed=1)


CASES = {
    # Kinds that do not fit: memory beyond the end, or numbers of another kind
    "real state of a parameter that became complex": after_a_step("nadam", ("data complex or real", 0, 0, 0)),
    "complex state of a real parameter": after_a_step("radam", ("state complex or real", 0, 0, 0)),
    "real gradient of a parameter that became complex": first_step("adamw float16", ("data complex or real", 0, 0, 0)),
    "complex gradient of a real parameter": first_step("rmsprop", ("gradient complex or real", 0, 0, 0)),
    "complex model with state of real numbers": after_a_step("sgd momentum", ("module cast", 0, 4, 0)),
    "integers as a parameter": first_step("clipped", ("data of integers", 0, 0, 0)),
    "integers as a gradient": first_step("sgd", ("gradient of integers", 0, 0, 0)),
    "booleans as a gradient that is read": first_step("averaged", ("gradient of integers", 0, 2, 0)),
    "bytes as state": after_a_step("asgd", ("state of integers", 0, 0, 3)),
    "int8 as state with a gradient of a subclass": after_a_step(
        "sgd bfloat16", ("state of integers", 0, 0, 0), ("gradient of subclass", 0, 0, 0)
    ),
    "complex factors of Adafactor": after_a_step("adafactor", ("state complex or real", 0, 0, 0)),
    "integers in Muon after another has been stepped": after_a_step(
        "muon", ("state of integers", 1, 0, 1), kinds=(Kind(0, 0), Kind(0, 0))
    ),
    "real state of a complex parameter in rows": first_step("sparse adagrad", ("data complex or real", 0, 0, 0)),
    # Memory that is gone
    "gradient without memory": after_a_step("adamax", ("gradient storage resized", 0, 1, 0)),
    "gradient without memory at its old address": steady("adam", ("gradient storage resized", 0, 2, 0)),
    "parameter without memory at its old address": steady("adam", ("storage resized", 0, 2, 0)),
    "parameter without memory at its old address, after nothing": steady("sgd momentum", ("storage resized", 0, 2, 0)),
    "state without memory at its old address": steady("adam", ("state storage resized", 0, 0, 2)),
    "parameter without memory, by the eager engine": after_a_step("adam", ("storage resized", 0, 1, 0), engine="eager"),
    "parameter without memory, by the foreach engine": after_a_step(
        "adam", ("storage resized", 0, 1, 0), engine="foreach"
    ),
    "gradient without memory, by the eager engine": first_step(
        "nadam", ("gradient storage resized", 0, 0, 0), engine="eager"
    ),
    "parameter of Adafactor without memory": first_step("adafactor", ("storage resized", 0, 0, 0)),
    "gradient of Muon without memory": first_step("muon", ("gradient storage resized", 0, 0, 0)),
    "state of Muon without memory": after_a_step("muon", ("state storage resized", 0, 0, 3)),
    "state without memory in another layout": after_a_step(
        "clamped", ("data negated lazily", 0, 0, 0), ("state storage resized", 0, 0, 5)
    ),
    "step count without memory": after_a_step("adam", ("scalar storage resized", 0, 0, 0)),
    "step count with half of its memory": after_a_step("adam groups", ("scalar storage resized", 0, 1, 0)),
    "step count without memory, between steps": Case(
        "adam groups", "default", ONE, (Round(), Round(), Round(moves=(("scalar storage resized", 0, 0, 0),))), seed=1
    ),
    "count of rows without memory": after_a_step("sparse adagrad", ("scalar storage resized", 0, 0, 0)),
    "sparse values without memory": after_a_step("sparse adam", ("gradient storage resized", 0, 0, 0)),
    "sparse parameter without memory": first_step("sparse sgd", ("storage resized", 0, 0, 0), engine="eager"),
    # Rows outside of a table
    "negative row of a sparse gradient": first_step("sgd", ("gradient with rows outside", 0, 1, 0)),
    "negative row of a vector": first_step("sgd", ("gradient with rows outside", 0, 1, 0), kinds=(Kind(1, 0),)),
    "negative row of Adagrad": first_step("adagrad", ("gradient with rows outside", 0, 1, 0)),
    "row behind the last, unnamed": first_step("sgd bfloat16", ("gradient with rows outside", 0, 0, 0)),
    # Memory that several share
    "parameter that is expanded": first_step("sgd bfloat16", ("data expanded", 0, 1, 0)),
    "parameter that is expanded, of Adam": first_step("adam groups", ("strided anew", 0, 1, 0)),
    "parameter that is expanded, between steps": after_a_step("radam", ("data expanded", 0, 0, 0)),
    "state that is expanded": after_a_step("sgd groups", ("state expanded", 0, 0, 0)),
    "expanded state written in part, of Adafactor": after_a_step("adafactor", ("state expanded", 0, 1, 0)),
    "state that is its parameter": after_a_step("adam complex", ("state is the parameter", 0, 0, 0)),
    "slots that are one tensor": after_a_step("adamax", ("state shared by slots", 0, 0, 1)),
    "slots that overlap": after_a_step("adam groups", ("state overlapping", 0, 0, 0)),
    "parameters that overlap": first_step("sparse sgd", ("data overlapping", 0, 0, 4), kinds=(Kind(0, 0), Kind(0, 0))),
    "scale of LBFGS without memory": Case(
        "lbfgs",
        "default",
        (Kind(0, 0), Kind(0, 0), Kind(0, 0)),
        (Round(), Round(), Round(moves=(("state storage resized", 3, 6, 107),))),
        seed=1,
    ),
    "parameter of Adafactor twice in a group": Case(
        "adafactor", "foreach", (Kind(0, 0),), (Round(moves=(("parameter twice in a group", 1, 2, 69),)),), seed=1
    ),
    "expanded state of a subclass": Case(
        "adamax",
        "foreach",
        (Kind(0, 0),),
        (Round(), Round(moves=(("state expanded", 7, 2, 18), ("state of subclass", 5, 10, 117)))),
        seed=1,
    ),
    "state that is its parameter, which is negated": Case(
        "sparse adam",
        "default",
        (Kind(0, 0),),
        (Round(moves=(("data negated lazily", 6, 9, 28),)), Round(moves=(("state is the parameter", 6, 10, 14),))),
        seed=1,
    ),
    "parameter twice in a group in its first step, with momentum": Case(
        "sgd groups", "eager", (Kind(0, 0),), (Round(moves=(("parameter twice in a group", 1, 0, 4),)),), seed=1
    ),
    "state in the dtype of the gradient": Case(
        "rprop", "eager", (Kind(0, 0),), (Round(moves=(("data of another dtype", 7, 10, 60),)), Round()), seed=0
    ),
    "parameter twice in a group": first_step("nadam", ("parameter twice in a group", 0, 0, 0)),
    # What is not a tensor in memory
    "parameter that is a zero tensor": first_step("rprop", ("data without memory", 0, 0, 0)),
    "parameter that is a zero tensor, between steps": after_a_step("adadelta", ("data without memory", 0, 0, 0)),
    "zero tensor after another has been stepped": first_step(
        "adagrad", ("data without memory", 1, 0, 0), kinds=(Kind(0, 0), Kind(0, 0))
    ),
    "state that is a zero tensor": after_a_step("nadam", ("state zero or negated", 0, 0, 0)),
    "state that is sparse": after_a_step(
        "clamped", ("state sparse", 1, 0, 0), kinds=(Kind(0, 0), Kind(0, 0), Kind(0, 0))
    ),
    "state that is a list": first_step("adagrad", ("state no tensor", 0, 0, 0)),
    "state that is a number": first_step("adagrad", ("state no tensor", 0, 0, 2)),
    "parameter of inference": first_step("adam complex", ("data of inference", 0, 0, 0)),
    "parameter that is conjugated": first_step("adam complex", ("data negated lazily", 0, 1, 0)),
    "step count that is complex": after_a_step("adamw bfloat16", ("scalar replaced", 0, 0, 6)),
    "step count that is complex, of Adafactor": after_a_step("adafactor", ("scalar replaced", 0, 0, 6)),
    "step count on no device": first_step("adagrad", ("scalar replaced", 0, 0, 10)),
    "step count of two": after_a_step("measured", ("scalar replaced", 0, 0, 3)),
    "step count that is text": after_a_step("clipped", ("scalar replaced", 0, 0, 11)),
    "parameter on meta that is clipped": first_step("clipped", ("moved to meta", 0, 1, 0)),
    "parameter on meta that is guarded": first_step("averaged", ("moved to meta", 0, 1, 0)),
    "gradient of a subclass where memory is not a plain line": after_a_step(
        "adamax", ("gradient of subclass", 0, 0, 0), kinds=(Kind(8, 4),)
    ),
    "gradient of a subclass, measured for a custom step": Case(
        "combined clipped",
        "default",
        (Kind(8, 4),),
        (Round(), Round(moves=(("gradient of subclass", 7, 2, 48),))),
        seed=1,
    ),
    "gradient of a subclass after another has been stepped": after_a_step(
        "clamped", ("gradient of subclass", 1, 0, 0), kinds=(Kind(0, 0), Kind(2, 3))
    ),
    "parameter that is negated, by the foreach engine": first_step(
        "adagrad", ("data negated lazily", 0, 0, 0), engine="foreach"
    ),
    "state that is negated, by the foreach engine": after_a_step(
        "averaged", ("state zero or negated", 0, 0, 1), engine="foreach"
    ),
    "negated parameter of Adafactor after another": first_step(
        "adafactor", ("data negated lazily", 0, 0, 0), kinds=(Kind(4, 0), Kind(4, 0))
    ),
    "parameter of inference, by the foreach engine": first_step(
        "adam complex", ("data of inference", 0, 0, 0), engine="foreach"
    ),
    "slot that is None where the step count has no memory": after_a_step(
        "adam", ("state no tensor", 0, 0, 4), ("scalar storage resized", 0, 0, 0)
    ),
    "parameter twice in a group, by the foreach engine": after_a_step(
        "averaged", ("parameter twice in a group", 0, 0, 0), engine="foreach"
    ),
    # LBFGS
    "parameter of LBFGS without memory": first_step("lbfgs", ("storage resized", 0, 1, 0)),
    "state of LBFGS without memory": after_a_step("lbfgs", ("state storage resized", 0, 0, 3)),
    "gradients of LBFGS kept without memory": after_a_step("lbfgs", ("state storage resized", 0, 2, 1)),
    "complex state of LBFGS": after_a_step("lbfgs", ("state complex or real", 0, 0, 0)),
    "integers of LBFGS": first_step("lbfgs", ("data of integers", 0, 0, 0)),
    "expanded parameter of LBFGS": first_step("lbfgs", ("data expanded", 0, 0, 0)),
    "negated parameter of LBFGS": first_step("lbfgs", ("data negated lazily", 0, 0, 0)),
    # Averages
    "value of a zero tensor": of_lists("without memory"),
    "average without memory": of_lists("storage resized", 0, average=True),
    "value without memory": of_lists("storage resized", 2),
    "complex value": of_lists("complex or real"),
    "complex average": of_lists("complex or real", average=True),
    "value of another shape": of_lists("of another shape", 0),
    "value that is smaller": of_lists("of another shape", 2),
    "average that is smaller": of_lists("of another shape", 2, average=True),
    "value that is negated": of_lists("negated lazily"),
    "average that is expanded": of_lists("expanded", average=True, pairs=((0, 0, 0, 0), (0, 0, 0, 0))),
    "sparse average after another": AverageCase(
        "lists", ((0, 0, 0, 0), (0, 0, 0, 0)), ((Move("sparse", 1, average=True),),), seed=1
    ),
    "value on meta": AverageCase("lists", ((0, 0, 0, 0), (0, 0, 0, 0)), ((Move("on meta", 1),),), seed=1),
    "average on meta after another": AverageCase(
        "lists", ((1, 5, 1, 0), (0, 0, 0, 0)), ((Move("on meta", 0, average=True),),), seed=1
    ),
    "complex value of an average of integers": of_lists("complex or real", pairs=((0, 5, 0, 0),)),
    "value of another shape for an average of integers": of_lists("of another shape", 4, pairs=((0, 5, 0, 0),)),
    "average that is a zero tensor after another": AverageCase(
        "lists", ((0, 0, 0, 0), (0, 0, 0, 0)), ((Move("without memory", 1, average=True),),), seed=1
    ),
    "average of a model without memory": AverageCase(
        "model", ((0, 0, 0, 0),), ((), (), (Move("storage resized", 0, average=True, choice=2),)), seed=1
    ),
    "value of a model without memory": AverageCase(
        "model", ((0, 0, 0, 0),), ((), (), (Move("storage resized", 0, average=False, choice=2),)), seed=1
    ),
    # Shards
    "plain state of a sharded parameter": sharded_after_a_step(
        "sgd momentum", 0, ShardMove("state laid out otherwise", 0, 0, 3)
    ),
    "plain state loaded into a sharded parameter": sharded_after_a_step(
        "adagrad", 0, ShardMove("state dict of plain loaded", 0, 0, 2)
    ),
    "plain state of a replicated parameter": sharded_after_a_step(
        "rprop", 2, ShardMove("state plain of shard", 0, 0, 0)
    ),
    "replicated state of a sharded parameter": sharded_after_a_step(
        "sgd momentum", 0, ShardMove("state laid out otherwise", 0, 0, 2)
    ),
    "replicated state of a plain parameter": sharded_after_a_step(
        "rprop", 3, ShardMove("state laid out otherwise", 0, 0, 2), engine="foreach"
    ),
    "state sharded along another dimension": sharded_after_a_step(
        "rprop", 0, ShardMove("state laid out otherwise", 0, 0, 1)
    ),
    "state of which a shard is smaller": sharded_after_a_step(
        "adam", 0, ShardMove("state laid out otherwise", 0, 0, 20)
    ),
    "gradient of which a shard is larger": sharded_after_a_step(
        "sgd momentum", 2, ShardMove("gradient laid out otherwise", 0, 0, 18), engine="foreach"
    ),
    "parameter of which the shard became smaller": sharded_after_a_step(
        "adagrad", 1, ShardMove("parameter laid out otherwise", 0, 1, 21)
    ),
    "gradient of which a shard is smaller, by the eager engine": ShardedCase(
        "sgd momentum",
        "eager",
        ((0, 0), (0, 3), (0, 1)),
        ((ShardMove("gradient laid out otherwise", 0, 0, 20),),),
        seed=1,
    ),
    "gradient of which a shard is smaller, by the foreach engine": ShardedCase(
        "sgd momentum",
        "foreach",
        ((0, 1), (0, 3), (0, 0)),
        ((ShardMove("gradient laid out otherwise", 2, 0, 20),),),
        seed=1,
    ),
    "lbfgs of a parameter that went to meta": Case(
        "lbfgs", "default", (Kind(0, 0),), (Round(moves=(("moved to meta", 4, 9, 51),)),)
    ),
    "lbfgs state on meta": Case(
        "lbfgs", "default", (Kind(0, 0),), (Round(), Round(moves=(("state on meta", 6, 8, 48),))), seed=1
    ),
    "lbfgs state with a number of several elements": Case(
        "lbfgs", "default", (Kind(0, 0),), (Round(), Round(moves=(("load altered", 0, 2, 30),))), seed=1
    ),
    "matrices of muon that are negated lazily": Case(
        "muon", "default", (Kind(2, 0), Kind(2, 0)), (Round(moves=(("data negated lazily", 5, 6, 54),)),), seed=1
    ),
    "lbfgs state of integers": Case(
        "lbfgs", "default", (Kind(0, 0),), (Round(), Round(moves=(("state of integers", 0, 0, 72),)), Round()), seed=1
    ),
    "muon of a matrix that became a vector": Case(
        "muon", "default", (Kind(0, 0),), (Round(grads="some", moves=(("data of another shape", 0, 0, 1),)), Round())
    ),
    "parameters that overlap, one of them with state of a subclass": Case(
        "averaged",
        "foreach",
        (Kind(0, 0), Kind(0, 0)),
        (Round(), Round(moves=(("state of subclass", 1, 5, 42), ("data overlapping", 0, 8, 110)))),
    ),
    "adafactor with state that is negated lazily": Case(
        "adafactor", "foreach", (Kind(0, 0),), (Round(), Round(moves=(("state zero or negated", 3, 7, 109),)))
    ),
    "count of adafactor that became an array": Case(
        "adafactor", "foreach", (Kind(0, 0),), (Round(), Round(moves=(("scalar replaced", 4, 5, 19),)))
    ),
    "lbfgs state that is not a number": Case(
        "lbfgs", "default", (Kind(0, 0),), (Round(), Round(moves=(("state no tensor", 0, 3, 118),))), seed=1
    ),
    "count of a sparse parameter that became complex": Case(
        "sparse adam", "default", (Kind(0, 0),), (Round(), Round(moves=(("scalar replaced", 7, 2, 54),)))
    ),
    "state in another order than torch's, resized": Case(
        "sgd complex",
        "foreach",
        (Kind(0, 0), Kind(0, 0), Kind(2, 3), Kind(0, 0)),
        (Round(), Round(moves=(("state storage resized", 6, 4, 72),))),
        seed=1,
    ),
    "gradient of a parameter that was sharded anew, which torch cannot redistribute": ShardedCase(
        "sgd momentum", "foreach", ((0, 1),), ((ShardMove("parameter laid out otherwise", 0, 0, 10),), ()), seed=850
    ),
    "shard of state without memory": sharded_after_a_step("adam", 0, ShardMove("state of one shard resized", 0, 0, 1)),
    # What only looked like faults: numbers that nobody has written, and what torch cannot do
    "state in larger memory than it needs, of which nobody has written the rest": Case(
        "clamped",
        "default",
        (Kind(0, 0),),
        (
            Round(),
            Round(moves=(("state storage resized", 3, 3, 117),)),
            Round(moves=(("state storage resized", 1, 8, 59),)),
        ),
    ),
    "neighbours in a storage that was resized": Case(
        "rprop",
        "foreach",
        (Kind(11, 0), Kind(0, 0)),
        (Round(moves=(("data overlapping", 3, 9, 117),)), Round(moves=(("storage resized", 6, 9, 33),))),
    ),
    "guarded parameter in a storage that was resized": Case(
        "sgd", "foreach", (Kind(0, 1),), (Round(), Round(moves=(("storage resized", 2, 10, 51),)))
    ),
    "sums of rows that do not begin a storage": Case(
        "sparse adagrad", "foreach", (Kind(5, 0),), (Round(moves=(("state in another layout", 0, 3, 85),)),), seed=932
    ),
    "state dict of a twin that has state of a removed parameter": Case(
        "adagrad",
        "default",
        (Kind(0, 0), Kind(0, 0)),
        (Round(moves=(("parameter removed", 4, 9, 116),)), Round(moves=(("load of twin", 2, 6, 0),))),
    ),
    "gradient that is state of another bucket, where counts differ": LoopCase(
        "adam amsgrad",
        "foreach",
        (Kind(10, 0), Kind(0, 0), Kind(10, 0), Kind(11, 0)),
        (Round(), Round(grads="some"), Round(), Round(moves=(("gradient is state", 4, 10, 58),))),
        seed=35,
    ),
}
