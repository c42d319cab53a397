"""How the values of a parameter, a gradient or a slot are kept in memory.

Today every format is a plain dtype.  A format is made here; each kernel engine has one table that says how it loads and
stores it, and what is not in that table the engine does not support.
"""

from surefoot.storage.formats import Format, format_of

__all__ = ["Format", "format_of"]
