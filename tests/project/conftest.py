"""The benchmark scripts as modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from inverse_flow.models import KINDS

FOLDER = Path(__file__).parents[2] / "benchmarks"


class Scripts:
    """Each script by its name, imported when it is first asked for."""

    folder = FOLDER

    def __getattr__(self, name: str) -> Any:
        module: ModuleType = importlib.import_module(name)
        return module


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    """They find one another as they do when they are run, and the kinds of models that they add go with them."""
    kinds = dict(KINDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that threads would only wait for one another
    names = [path.stem for path in FOLDER.iterdir() if path.suffix == ".py" or path.is_dir()]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield Scripts()
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        KINDS.clear()
        KINDS.update(kinds)
        torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A slice of 32 small images."""
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "slice.npz", x=images)
    return str(tmp_path / "slice.npz")
