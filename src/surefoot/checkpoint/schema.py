"""What a manifest must look like: checked when a file is opened, so that nobody else has to doubt it.

Plain data inside is checked where it is decoded.
"""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def _is(*kinds: type | None) -> Check:
    return lambda value: type(value) in [type(None) if kind is None else kind for kind in kinds]


def _list_of(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _object(**checks: Check) -> Check:
    return lambda value: (
        type(value) is dict and all(name in value and fine(value[name]) for name, fine in checks.items())
    )


def _pair(first: Check) -> Check:
    return lambda value: type(value) is list and len(value) == 2 and first(value[0])  # noqa: PLR2004 (a pair)


def _anything(_: Any) -> bool:
    return True


_TEXTS: Check = _list_of(_is(str))
_NUMBERS: Check = _list_of(_is(int))
_PARAMETER = _object(
    number=_is(int),
    name=_is(str, None),
    shape=lambda value: value is None or _NUMBERS(value),
    dtype=_is(str, None),
)
_OPTIMIZER = _object(
    parameters=_list_of(_PARAMETER),
    groups=_list_of(_object(options=_is(dict), params=_NUMBERS)),
    state=_list_of(_pair(_anything)),
)


def _is_optimizer(part: Any) -> bool:
    """Whether an optimizer's part is well formed, and describes every parameter of its groups."""
    if not _OPTIMIZER(part):
        return False
    return [one["number"] for one in part["parameters"]] == [n for group in part["groups"] for n in group["params"]]


KINDS: Mapping[str, Check] = {
    "model": _object(state=_list_of(_pair(_is(str))), metadata=_anything, parameters=_TEXTS, tied=_is(dict)),
    "optimizer": _is_optimizer,
    "stateful": _object(state=_anything),
    "generator": _object(state=_anything, device=_is(str)),
    "rng": _object(state=_anything),
    "plain": _object(state=_anything),
}
"""What each kind of part must have, beside the name of its class."""
_TOP: Mapping[str, Check] = {
    "sequence": _is(int),
    "step": _is(int, None),
    "saved_at": _is(str),
    "versions": _is(dict),
    "parts": _is(dict),
}


def _is_file_name(value: Any) -> bool:
    """Whether a text is the name of a file and leads to no other folder."""
    return type(value) is str and not value.startswith(".") and bool(value) and not set(value) & {"/", "\\", "\0"}


def _tuple_of(*checks: Check) -> Check:
    return lambda value: (
        type(value) is list
        and len(value) == len(checks)
        and all(fine(one) for fine, one in zip(checks, value, strict=True))
    )


def _table_of(check: Check) -> Check:
    return lambda value: type(value) is dict and all(map(check, value.values()))


def _is_shape(value: Any) -> bool:
    return _NUMBERS(value) and all(size >= 0 for size in value)


_SHARDS = _object(
    folder=_is_file_name,
    files=_list_of(_tuple_of(_is_file_name, _is(int), _is(str))),
    tensors=_table_of(_tuple_of(_is(str), _is_shape)),
)
_CHUNKS = _table_of(_tuple_of(_is(str), _is_shape))
"""What a checkpoint of sharded tensors, and a file of shards, have beside `_TOP`."""


def check(manifest: Mapping[str, Any]) -> None:
    """Raise TypeError unless a manifest of the present version is well formed."""
    for name, fine in _TOP.items():
        if not fine(manifest[name]):
            raise TypeError(f"`{name}` is {manifest[name]!r:.99}")
    for name, fine in (("shards", _SHARDS), ("chunks", _CHUNKS)):
        if name in manifest and not fine(manifest[name]):
            raise TypeError(f"`{name}` is {manifest[name]!r:.99}")
    for label, part in manifest["parts"].items():
        kind = part.get("kind") if isinstance(part, dict) else None
        if (
            not isinstance(kind, str)
            or kind not in KINDS
            or not KINDS[kind](part)
            or not _is(str, None)(part.get("class"))
        ):
            raise TypeError(f"the part `{label}` is malformed")
