"""Operations whose text is the same in every language that engines print."""

COMMON: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "add_scaled": "{0} + {1} * {2}",
    "addcmul": "{0} + {3} * {1} * {2}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "fill": "{1}",
    "copy": "{0}",
}
