"""Where the picture goes: a place is refused before the training, and no file is left half written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMATS = (".png", ".svg", ".pdf")


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Name a hidden file beside `path`, to be written and moved; whatever happens, none stays behind."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> Path:
    """Make sure that a picture can be written, by writing an empty file beside it.

    Args:
        path: the file that is to be written; it is not touched.

    Returns:
        The same place, absolute and without symbolic links.

    Raises:
        ValueError: if the name's ending is none of `FORMATS`, or the file could not be written.
    """
    path = path.resolve()
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"'{path}' does not end in {', '.join(FORMATS)}: name a picture, such as demo.png.")
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"'{path}' is there and is not a file: name another.")
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"'{path}' is write-protected: name another.")
        with temporary_beside(path) as temporary:
            temporary.touch()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"'{path}' cannot be written ({reason}): name a file in a folder of yours.") from None
    return path
