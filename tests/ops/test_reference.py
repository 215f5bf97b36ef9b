"""The oracles against something simpler still: matrices written out by hand, and each other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck

from inverse_flow import reference

from ..cases import ALL_ORDERS, CORNERS, FEW, FEW_MORE, SHAPES, Case, corner_tap


def test_the_matrix_of_a_small_image_by_hand() -> None:
    """Two columns and two rows, one channel, a 2 × 2 window whose corner tap is d."""
    a, b, c, d = 2.0, 3.0, 5.0, 7.0
    weight = torch.tensor([[[[a, b], [c, d]]]])
    expected = {
        "top_left": [[d, 0, 0, 0], [c, d, 0, 0], [b, 0, d, 0], [a, b, c, d]],
    }
    found = reference.dense_matrix(weight, 2, 2)
    assert found.tolist() == expected["top_left"]
    # The other orders mirror the image, and have their corner tap at the mirrored place of the window.
    assert reference.dense_matrix(weight, 1, 2, order="top_right").tolist() == [[c, d], [0, c]]
    assert reference.dense_matrix(weight, 2, 1, order="bottom_left").tolist() == [[b, d], [0, b]]
    assert reference.dense_matrix(weight, 2, 2, order="bottom_right").tolist() == [
        [a, b, c, d],
        [0, a, 0, c],
        [0, 0, a, b],
        [0, 0, 0, a],
    ]


SIZES = {1: ((5,), (3,)), 2: ((3, 4), (2, 3)), 3: ((2, 3, 2), (2, 2, 1))}


@pytest.mark.parametrize("order", [order for orders in ALL_ORDERS.values() for order in orders])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("corner", CORNERS)
def test_every_entry_of_the_matrix(order: str, corner: str, dilation: int) -> None:
    """Entry by entry from the definition: an output pixel reads the pixels that lie where their tap lies beside the
    corner tap."""
    dimensions = order.count("_") + 1
    sizes, kernel = SIZES[dimensions]
    orders = (order, ALL_ORDERS[dimensions][1])
    depth, height, width = [None] * (3 - dimensions) + list(sizes)
    case = Case(1, 4, height, width, kernel, 2, orders, corner, depth=depth, dilation=dilation)
    _, weight, _ = case.tensors()
    matrix = reference.dense_matrix(weight, *sizes, **case.arguments).view(4, *sizes, 4, *sizes)
    expected = torch.zeros_like(matrix)
    for o, c in product(range(4), range(2)):
        corner_place = corner_tap(case.orders[o // 2], kernel)
        for tap, pixel in product(product(*map(range, kernel)), product(*map(range, sizes))):
            source = tuple(i + (q - m) * dilation for i, q, m in zip(pixel, tap, corner_place, strict=True))
            if all(0 <= i < size for i, size in zip(source, sizes, strict=True)):
                value = weight[(o, c, *tap)]
                if tap == corner_place and corner != "general" and (corner == "identity" or c >= o % 2):
                    value = torch.tensor(float(c == o % 2))
                expected[(o, *pixel, o // 2 * 2 + c, *source)] = value
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", [*SHAPES[::2], *FEW, *FEW_MORE], ids=str)
def test_the_two_references_agree(case: Case) -> None:
    input, weight, bias = case.tensors()
    dense = case.dense(input, weight, bias, **case.arguments)
    plain = case.recurrence(input, weight, bias, **case.arguments)
    torch.testing.assert_close(plain, dense)


@pytest.mark.parametrize("kind", ["recurrence", "dense"])
@pytest.mark.parametrize(
    "case",
    [
        *(Case(1, 2, 2, 3, (2, 2), order=o, corner=c) for o, c in zip(ALL_ORDERS[2], CORNERS * 2)),  # noqa: B905
        Case(1, 2, None, 4, (2,), order="right", dilation=2),
        Case(1, 1, 2, 2, (2, 1, 2), order="back_bottom_left", depth=2),
    ],
    ids=str,
)
def test_both_are_differentiable(case: Case, kind: str) -> None:
    tensors = [t.requires_grad_() for t in case.tensors()]
    assert gradcheck(lambda *t: getattr(case, kind)(*t, **case.arguments), tensors)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, corner: str) -> None:
    case = Case(2, 4, 3, 3, groups=2, order=("top_left", "bottom_right"), corner=corner)
    input, weight, bias = case.tensors(dtype)
    assert case.dense(input, weight, bias, **case.arguments).dtype == torch.float64
    found = case.recurrence(input, weight, bias, **case.arguments)
    # Half precision is that of float32, rounded once.
    wide = case.recurrence(input.float(), weight.float(), bias.float(), **case.arguments)
    assert torch.equal(found, wide.to(dtype))


def test_the_log_determinant_is_that_of_the_corner_taps() -> None:
    """log|det A| = H W Σ log|det M| over the groups, the mathematics all log-determinants rest on."""
    case = Case(1, 4, 3, 5, (3, 2), groups=2, order=("bottom_left", "top_right"))
    _, weight, _ = case.tensors()
    corners = 0.0
    for group, order in enumerate(case.orders):
        i, j = corner_tap(order, case.kernel)
        corners += torch.linalg.slogdet(weight[2 * group : 2 * group + 2, :, i, j]).logabsdet
    found = torch.linalg.slogdet(reference.dense_matrix(weight, 3, 5, **case.arguments)).logabsdet
    torch.testing.assert_close(found, 15 * corners)
