"""Which warnings fail a test: all, but for those of PyTorch's that no test can help."""

from __future__ import annotations

import warnings

import pytest
import torch

from ..conftest import NEXT_TORCH


def warn(category: type[Warning], module: str) -> None:
    warnings.warn_explicit("old", category, "file.py", 1, module=module)


@pytest.mark.parametrize("module", ["torch", "torch.nn.modules"])
@pytest.mark.skipif(torch.__version__ >= NEXT_TORCH, reason="the warnings of a newer PyTorch are shown")
def test_pytorch_may_use_what_it_has_deprecated(module: str) -> None:
    for category in (DeprecationWarning, FutureWarning):
        warn(category, module)
    with pytest.raises(UserWarning):
        warn(UserWarning, module)


@pytest.mark.parametrize("module", ["inverse_flow.conv", "torchlike"])
def test_others_may_not(module: str) -> None:
    for category in (DeprecationWarning, FutureWarning) if torch.__version__ < NEXT_TORCH else (UserWarning,):
        with pytest.raises(category):
            warn(category, module)
