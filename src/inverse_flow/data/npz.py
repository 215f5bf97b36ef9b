"""Arrays from npz files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_npz(path: Path, wanted: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The arrays that are wanted of a file, and the names of all that it has, with nothing in the others.

    Objects of Python are not read: they could run code.

    Raises:
        ValueError: the file is damaged or no npz file.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or no npz file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] if name in wanted else np.empty(0) for name in arrays.files}
    except MemoryError:
        raise
    # A damaged header or stream raises errors of any kind, NotImplementedError and struct.error among them.
    except Exception as error:
        raise ValueError(f"{path} is damaged or no npz file: {error}") from error
