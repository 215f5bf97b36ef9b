"""A run's folder: files that are whole or not there, a lock, and what can be known of the disk before a run."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"
# Of a file system that has no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a file beside ``path`` to write; takes the place of ``path`` with it once it is whole.

    An error, an interruption or a full disk leaves ``path`` as it was, and nothing beside it.

    Raises:
        OSError: the file cannot be written; names ``path`` and the reason.
    """
    unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        reason = _reason(error, path.parent)
        if reason is None:
            raise
        raise OSError(reason, os.strerror(reason), str(path)) from error


def _reason(error: BaseException, folder: Path) -> int | None:
    """The system's number of what went wrong in writing; PyTorch's writer says nothing of a full disk."""
    if isinstance(error, OSError):
        return error.errno
    full = isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)
    return (errno.ENOSPC if shutil.disk_usage(folder).free < 1 << 20 else errno.EIO) if full else None


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def to_json(value: Any) -> str:
    """Plain values as JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(value), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Within it, no other run may use the folder, which is made if there is none.

    The lock goes with the process, however that ends. Those that are ``shared`` do not exclude each other.

    Raises:
        OSError: another run uses the folder, or it cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another run is using this folder", str(folder)) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            warnings.warn(f"the file system of {folder} has no locks: keep other runs out of it", stacklevel=3)
        yield


def check_folder(folder: Path, needed: int = 0) -> None:
    """Refuses, before anything is computed, a folder that a run could not write to.

    Args:
        folder: of the run; made if there is none.
        needed: bytes that the run will write there, at least.

    Raises:
        OSError: the folder cannot be made or written to, another run uses it, or the disk is too full.
    """
    with locked(folder, shared=True):
        tempfile.TemporaryFile(dir=folder).close()
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = (
            f"{needed / 1e6:.1f} MB are needed for two checkpoints, one being written, and {free / 1e6:.1f} are free"
        )
        raise OSError(errno.ENOSPC, message, str(folder))
