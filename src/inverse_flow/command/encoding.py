"""Output that goes to a terminal or a file of any encoding."""

from __future__ import annotations

import codecs
import io
import sys

# What stands for the signs that the commands print, where an encoding does not have them.
PLAIN = {"±": "+-", "×": "x", "−": "-", "–": "-", "…": "...", "·": "*"}
HANDLER = "inverse_flow.plain"


def plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler for :func:`codecs.register_error`: like "replace", but the signs of ``PLAIN`` stay readable."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def print_anywhere() -> None:
    """Lets no character that the encoding of standard output or error does not have end the program."""
    codecs.register_error(HANDLER, plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
