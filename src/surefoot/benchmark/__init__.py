"""Timing optimizers against torch.optim and against the memory bound: cases, contenders, rounds, results.

Nothing here prints or draws; `surefoot bench` and the scripts in `benchmarks/` do.
"""

from surefoot.benchmark.cases import (
    DTYPES,
    LARGE_SHAPE_LISTS,
    SHAPE_LISTS,
    TORCH_VARIANTS,
    VARIANTS,
    Case,
    ShapeList,
    Variant,
    cases,
)
from surefoot.benchmark.contenders import (
    COMPILED,
    EAGER,
    FOR_LOOP,
    FOREACH,
    FUSED,
    MEMORY_BOUND,
    OURS,
    TORCH,
    contenders_of,
    implementations_of,
)
from surefoot.benchmark.memory_bound import memory_bound_of
from surefoot.benchmark.results import (
    Measurement,
    Quartiles,
    Result,
    circumstances,
    geometric_mean,
    read_csv,
    results,
    write_csv,
)
from surefoot.benchmark.rounds import SECONDS, check_memory, gradients, measure, wrong_contenders
from surefoot.benchmark.small import (
    SMALL_MODELS,
    SMALL_VARIANTS,
    SmallMeasurement,
    SmallModel,
    has_work,
    measure_small,
)

__all__ = [
    "COMPILED",
    "DTYPES",
    "EAGER",
    "FOREACH",
    "FOR_LOOP",
    "FUSED",
    "LARGE_SHAPE_LISTS",
    "MEMORY_BOUND",
    "OURS",
    "SECONDS",
    "SHAPE_LISTS",
    "SMALL_MODELS",
    "SMALL_VARIANTS",
    "TORCH",
    "TORCH_VARIANTS",
    "VARIANTS",
    "Case",
    "Measurement",
    "Quartiles",
    "Result",
    "ShapeList",
    "SmallMeasurement",
    "SmallModel",
    "Variant",
    "cases",
    "check_memory",
    "circumstances",
    "contenders_of",
    "geometric_mean",
    "gradients",
    "has_work",
    "implementations_of",
    "measure",
    "measure_small",
    "memory_bound_of",
    "read_csv",
    "results",
    "write_csv",
    "wrong_contenders",
]
