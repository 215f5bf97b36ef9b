"""How exact is exact enough: one rule, used by every test of a value.

The dense solve in float64 is the truth. The plain recurrence (one pixel after the other, in the dtype under test)
shows what rounding alone costs on these very numbers. A result may be off by twice that, plus one rounding of the
images' dtype. Half-precision images have a float32 state, so their plain recurrence runs in float32 and is rounded
at the end.

Two corollaries. A sum that cancels, such as the gradient of a weight over all pixels, is rounded like its terms and
not like what is left of them, so the size of its terms is what one rounding is relative to. And images that are
float64 themselves are as exact as the oracle, whose own few roundings are then allowed as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Case

FACTOR = 2.0
# What the float64 oracle may itself be off by, in roundings.
ORACLE_ROUNDINGS = 32


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a recurrence on images of this dtype computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_accurate(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    io_dtype: torch.dtype,
    name: str = "result",
    magnitude: Tensor | None = None,
) -> None:
    """The rule: max|actual − exact| ≤ 2 max|plain − exact| + ε max|exact|.

    Args:
        actual: what is tested.
        plain: the same quantity by the plain recurrence; its dtype and shape are the ones wanted.
        exact: the same quantity in float64.
        io_dtype: of the images, whose one rounding is allowed.
        name: what to call it when it fails.
        magnitude: for a sum that cancels, the sum of the sizes of its terms; ``exact`` otherwise.
    """
    assert actual.dtype == plain.dtype, f"{name} is {actual.dtype}, wanted {plain.dtype}"
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    assert exact.isfinite().all(), f"the oracle of {name} is not finite: the test's numbers are at fault"
    roundings = ORACLE_ROUNDINGS if io_dtype == torch.float64 else 1
    size = (exact if magnitude is None else magnitude).abs().max()
    allowed = FACTOR * (plain.double() - exact).abs().max() + roundings * torch.finfo(io_dtype).eps * size
    error = (actual.detach().double() - exact).abs().max()
    # Written so that a NaN fails.
    assert error <= allowed, f"{name} is off by {error:.3e}, allowed {allowed:.3e} (values up to {size:.3g})"


def assert_solves(x: Tensor, plain: Tensor, matrix: Tensor, right: Tensor) -> None:
    """The residual ‖A x − y‖ / ‖y‖ is at most twice that of the plain recurrence, plus that of rounding x once.

    Args:
        x, plain: (B, C, ...), the result and the plain recurrence's.
        matrix: A in float64.
        right: y − bias in float64.
    """
    if right.numel() == 0:
        return
    eps = torch.finfo(x.dtype).eps * (ORACLE_ROUNDINGS if x.dtype == torch.float64 else 1)

    def residual(solution: Tensor) -> Tensor:
        return (solution.double().flatten(1) @ matrix.mT - right.flatten(1)).norm()

    rounding = eps * (x.double().abs().flatten(1) @ matrix.abs().mT).norm()
    allowed, found = (FACTOR * residual(plain) + rounding) / right.norm(), residual(x) / right.norm()
    assert found <= allowed, f"residual {found:.3e}, allowed {allowed:.3e}"


def plain_solve(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain recurrence as the rule wants it: in the state dtype, rounded to the images' dtype."""
    state = state_dtype(input.dtype)
    bias = None if bias is None else bias.to(state)
    return case.recurrence(input.to(state), weight.to(state), bias, **case.arguments).to(input.dtype)
