"""Contiguous images give contiguous images, latents and gradients, in both directions of every layer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from .test_battery import CASES, Case


def parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contiguous_in_contiguous_out(case: Case) -> None:
    layer, context = case.layer(), case.context(3)
    z, _ = layer(case.images(3), context)
    assert all(part.is_contiguous() for part in parts(z))
    assert layer.inverse(z, context)[0].is_contiguous()
