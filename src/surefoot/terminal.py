"""What a terminal can show: characters that its encoding lacks, and those that it would take for commands."""

import codecs
import sys
from io import TextIOWrapper

_FIRST_BRAILLE = 0x2800
_LAST_BRAILLE = 0x28FF
_UPPER_DOTS = 0x01 | 0x02 | 0x08 | 0x10
_PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.-=+*%#", strict=True)),
    **dict(zip("│└─●µ", "|+-*u", strict=True)),
    "±": "+-",
}
_HANDLER = "surefoot.plain"


def in_encoding(text: str, encoding: str | None) -> str:
    """Return a text as an encoding can write it: what it lacks becomes similar ASCII, or is spelt out.

    Args:
        text: the text.
        encoding: its name; None, or one that Python does not know, counts as ASCII.
    """
    try:
        return text.encode(encoding or "ascii", _HANDLER).decode(encoding or "ascii")
    except LookupError:
        return in_encoding(text, None)


def printable(text: str) -> str:
    """Return a text in which control characters, such as those that colour a terminal, are spelt out."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


def spell_out_the_rest() -> None:
    """Let standard output and error write what their encoding lacks as `in_encoding` does, rather than raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _plain(character: str) -> str:
    if _FIRST_BRAILLE < ord(character) <= _LAST_BRAILLE:
        dots = ord(character) - _FIRST_BRAILLE
        return "." if not dots & _UPPER_DOTS else "'" if not dots & ~_UPPER_DOTS else ":"
    return _PLAIN.get(character) or ascii(character)[1:-1]


def _handle(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


codecs.register_error(_HANDLER, _handle)
