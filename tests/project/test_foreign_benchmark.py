"""benchmarks/foreign.py: what it counts does not grow with depth when stacks are rebuilt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

for library in ("nflows", "FrEIA"):
    pytest.importorskip(library, reason=f"{library} is not installed (extra [peers])")


@pytest.mark.parametrize("library", ["nflows", "FrEIA"])
def test_only_the_stored_path_grows_with_depth(scripts: Any, library: str) -> None:
    foreign, x, kept = scripts.foreign, torch.randn(16, 6), {}
    for depth in (2, 4):
        models = foreign.ways(library, 6, 8, depth)
        assert foreign.gradient_difference(models, x)[foreign.OURS] < 1e-4
        kept[depth] = {name: foreign.kept(model, x) for name, model in models.items()}
    assert kept[2][foreign.OURS] == kept[4][foreign.OURS] < kept[2][foreign.STORED]
    assert kept[4][foreign.STORED] > 1.5 * kept[2][foreign.STORED]
