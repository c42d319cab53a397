"""Names of parameters that have changed since a checkpoint was saved."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

Rename = Mapping[str, str] | Callable[[str], str] | None


class Renaming:
    """From saved names to present ones.

    Args:
        rename: a function from names to names; or a dict of names, or of modules such as `{"encoder": "backbone"}`,
            of which the longest that fits counts.

    Raises:
        TypeError: it is neither.
    """

    def __init__(self, rename: Rename) -> None:
        if not (rename is None or callable(rename) or isinstance(rename, Mapping)):
            raise TypeError(
                f"`rename` must be a function or a dict from saved names to present ones, but is {rename!r}"
            )
        self._rename = rename
        self._used: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the present name of what was saved under `name`."""
        if callable(self._rename):
            return self._answer(name, self._rename(name))
        fitting = [key for key in self._rename or () if name == key or name.startswith(f"{key}.")]
        if not fitting or not self._rename:
            return name
        key = max(fitting, key=len)
        self._used.add(key)
        return self._rename[key] + name[len(key) :]

    def _answer(self, name: str, answer: object) -> str:
        if not isinstance(answer, str):
            raise TypeError(f"`rename` must answer a name, but answered {answer!r} for `{name}`")
        return answer

    def problems(self) -> list[str]:
        """Name the entries of the dict that fitted nothing."""
        keys = [] if callable(self._rename) or self._rename is None else list(self._rename)
        return [f"rename: nothing saved is called `{key}`" for key in keys if key not in self._used]


def renamed(names: Sequence[str], renaming: Renaming, prefix: str = "") -> list[str]:
    """Return present names of saved ones.

    Args:
        names: saved names.
        renaming: from saved names to present ones.
        prefix: the key of a model among several, which stands before its names in a renaming.

    Raises:
        ValueError: two become the same, or one loses its model's key.
    """
    found = [renaming(prefix + name) for name in names]
    for name, count in Counter(found).items():
        if count > 1:
            raise ValueError(f"rename: {count} parameters would be called `{name}`")
        if not name.startswith(prefix):
            raise ValueError(f"rename: `{name}` must begin with `{prefix}`, the key of its model")
    return [name.removeprefix(prefix) for name in found]


def hint(missing: Mapping[str, object], unexpected: Mapping[str, object]) -> str:
    """Say which renaming would help, judging by a common prefix, or by shapes that occur once on each side.

    Args:
        missing: what is here and was not saved: shapes by name.
        unexpected: what was saved and is not here.
    """
    for prefix in ("module.", "_orig_mod."):
        if missing and {f"{prefix}{name}" for name in missing} == set(unexpected):
            return f"pass rename=lambda name: name.removeprefix({prefix!r})"
        if missing and set(missing) == {f"{prefix}{name}" for name in unexpected}:
            return f"pass rename=lambda name: {prefix!r} + name"
    here, there = _alone(missing), _alone(unexpected)
    pairs = {there[shape]: here[shape] for shape in there if shape in here}
    return f"if they were renamed, pass rename={pairs}" if pairs else ""


def _alone(shapes: Mapping[str, object]) -> dict[object, str]:
    """Return names by shape, of shapes that one name has."""
    values = list(shapes.values())
    return {shape: name for name, shape in shapes.items() if values.count(shape) == 1}
