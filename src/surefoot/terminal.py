"""What a terminal can show: characters that its encoding lacks, and those that it would take for commands."""

import sys
from io import TextIOWrapper


def can_encode(encoding: str | None, text: str) -> bool:
    """Return whether every character of a text is in an encoding; None stands for one that is not known."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def printable(text: str) -> str:
    """Return a text in which control characters, such as those that colour a terminal, are spelt out."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


def spell_out_the_rest() -> None:
    """Let standard output and error spell out what their encoding lacks, rather than raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
