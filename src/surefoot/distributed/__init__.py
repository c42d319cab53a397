"""What a step needs from other ranks: numbers of parameters, put together in one collective per process group."""

from surefoot.distributed.divided import dividing_group, refuse_flattened
from surefoot.distributed.exchange import Exchange, make_exchange

__all__ = ["Exchange", "dividing_group", "make_exchange", "refuse_flattened"]
