"""Small helpers on files that the loaders share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Names that file managers, notebooks and archives leave beside the user's own files.
LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini")
SHOWN = 10


def md5_of(content: bytes) -> str:
    """The md5 checksum by which the data sets are known; it tells files apart and protects nothing."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def is_hidden(path: Path) -> bool:
    """Whether a file manager would not show it: ``._1.png``, ``.ipynb_checkpoints``, ``__MACOSX``, …"""
    return path.name.startswith(".") or path.name.casefold() in {name.casefold() for name in LITTER}


def listing(folder: Path) -> str:
    """The names in a folder, for an error that says what was found there."""
    return shortened(sorted(path.name for path in folder.iterdir())) or "nothing"


def shortened(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])


def walk(folder: Path, report: Callable[[Path, str], None]) -> Iterator[Path]:
    """The files in a folder and below it that are not hidden, in the order of their names. Links are followed.

    What cannot be followed is reported with the reason: links to nowhere, links back to a folder on the way to them,
    folders that cannot be read.
    """
    return _walk(folder, (folder.resolve(),), report)


def _walk(folder: Path, above: tuple[Path, ...], report: Callable[[Path, str], None]) -> Iterator[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry))
    except OSError as error:
        report(folder, error.strerror or str(error))
        return
    for entry in entries:
        if entry.is_dir():
            real = entry.resolve()
            if real in above:
                report(entry, "is a link to a folder that it lies in")
            else:
                yield from _walk(entry, (*above, real), report)
        elif entry.is_file():
            yield entry
        elif entry.is_symlink():
            report(entry, "is a link to nothing")
