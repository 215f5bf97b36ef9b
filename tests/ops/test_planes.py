"""Volumes plane by plane, as on a GPU, here with the CPU's solve of images: against the dense solve, and against the
kernels for volumes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inverse_flow.ops import library as ops
from inverse_flow.ops import planes
from inverse_flow.ops.spec import Spec

from ..cases import ALL_ORDERS, CORNERS, DTYPES, LAYOUTS, Case
from ..checks import check_value

BY_PLANES = torch.ops.inverse_flow
CASES = [
    *(
        Case(2, 2, 3, 2, (2, 2, 2), order=order, corner=corner, depth=3)
        for order in ALL_ORDERS[3]
        for corner in CORNERS
    ),
    Case(3, 8, 3, 4, (3, 2, 3), 8, ALL_ORDERS[3], depth=4),
    Case(1, 6, 2, 3, (4, 1, 2), 3, ("back_top_left", "back_bottom_left", "front_top_right"), depth=3),
    Case(2, 2, 3, 4, (1, 3, 3), order="back_top_right", depth=2),
    Case(2, 3, 1, 1, (5, 3, 3), depth=1),
    Case(0, 2, 3, 4, (2, 2, 2), depth=3),
]
FEW = [CASES[0], CASES[25], CASES[24]]
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])


def arguments(case: Case, transposed: bool) -> tuple[object, ...]:
    return tuple(Spec(case.order_codes, case.corner_code, transposed))


@TRANSPOSED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, transposed: bool) -> None:
    tensors = case.tensors(torch.float32)
    found = BY_PLANES.solve_by_planes(*tensors, *arguments(case, transposed))
    check_value(case, *tensors, transposed, found=found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    check_value(case, *tensors, found=BY_PLANES.solve_by_planes(*tensors, *arguments(case, False)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = 64 * torch.finfo(found.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@TRANSPOSED
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_backward_pass_is_that_of_the_kernels(case: Case, layout: str, transposed: bool) -> None:
    input, weight, _ = case.tensors()
    x, grad = LAYOUTS[layout](torch.randn_like(input)), LAYOUTS[layout](input)
    found = BY_PLANES.solve_backward_by_planes(grad, x, weight, *arguments(case, transposed))
    for a, b in zip(found, ops.solve_backward(grad, x, weight, *arguments(case, transposed)), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
def test_the_backward_pass_in_half_precision(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    case = FEW[0]
    input, weight, _ = case.tensors(dtype, weight_dtype=weight_dtype)
    x = torch.randn_like(input)
    found = BY_PLANES.solve_backward_by_planes(input, x, weight, *arguments(case, False))
    for a, b in zip(found, ops.solve_backward(input, x, weight, *arguments(case, False)), strict=True):
        assert_same(a, b)


def test_a_plane_is_solved_after_those_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One solve per plane, and in the order of each run of groups."""
    seen: list[Tensor] = []
    operator = ops.solve
    monkeypatch.setattr(ops, "solve", lambda images, *rest: seen.append(images) or operator(images, *rest))
    case = Case(1, 2, 1, 1, (2, 1, 1), 2, ("front_top_left", "back_top_left"), "identity", depth=3, bias=False)
    y, weight, _ = case.tensors()
    planes.solve(y, weight.nan_to_num(0) * 0, None, case.order_codes, case.corner_code, False, False)
    assert [float(images) for images in seen] == [*y[0, 0].flatten().tolist(), *y[0, 1].flip(0).flatten().tolist()]
