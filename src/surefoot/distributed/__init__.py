"""What a step needs from other ranks, in few collectives: numbers of parameters, sums of tensors, whole matrices."""

from surefoot.distributed.divided import dividing_group, refuse_divided_by_module, refuse_flattened
from surefoot.distributed.exchange import Exchange, make_exchange
from surefoot.distributed.matrices import MatrixExchange, irregular_shard
from surefoot.distributed.partials import PartialSum, sum_over_shards
from surefoot.distributed.totals import Totals, make_totals

__all__ = [
    "Exchange",
    "MatrixExchange",
    "PartialSum",
    "Totals",
    "dividing_group",
    "irregular_shard",
    "make_exchange",
    "make_totals",
    "refuse_divided_by_module",
    "refuse_flattened",
    "sum_over_shards",
]
