"""Data that the benchmark scripts are run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A slice of 32 small images."""
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "slice.npz", x=images)
    return str(tmp_path / "slice.npz")
