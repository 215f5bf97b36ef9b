"""Small helpers on files that the loaders share."""

from __future__ import annotations

import hashlib
from pathlib import Path


def md5_of(content: bytes) -> str:
    """The md5 checksum by which the data sets are known; it tells files apart and protects nothing."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def listing(folder: Path) -> str:
    """The names in a folder, for an error that says what was found there."""
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return shown or "nothing"
