"""What libraries of flows check of a transform, on every layer of the battery."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from ..flows.test_battery import CASES, Case, jacobian_logdet

Run: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""One direction: (result, its log-determinant) of a batch and its contexts."""

TENSOR_CASES = {name: case for name, case in CASES.items() if not name.startswith("split")}
cases = pytest.mark.parametrize("case", TENSOR_CASES.values(), ids=TENSOR_CASES)


def check_bijection(case: Case, forward: Run, inverse: Run, dtype: torch.dtype = torch.float64) -> None:
    """Both directions undo each other, the log-determinant is that of the Jacobian, an example does not depend on its
    batch, and everything has the dtype of the data."""
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-9}[dtype]
    x, context = case.images(3, dtype), case.context(3, dtype)
    z, logdet = forward(x, context)
    back, inverse_logdet = inverse(z, context)
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=tolerance, atol=10 * tolerance)
    assert logdet.shape == inverse_logdet.shape == (3,)
    assert z.dtype == back.dtype == logdet.dtype == inverse_logdet.dtype == dtype

    one = None if context is None else context[:1]
    alone, alone_logdet = forward(x[:1], one)
    torch.testing.assert_close(alone, z[:1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alone_logdet, logdet[:1], rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        expected = jacobian_logdet(lambda v: forward(v.view(1, *case.shape), one)[0].flatten(1), x[:1].flatten(1))
        torch.testing.assert_close(logdet[:1], expected, rtol=tolerance, atol=tolerance)
