"""The other direction, A(w) x + b: a plain convolution, padded on one side."""

from __future__ import annotations

import pytest
import torch

from inverse_flow import reference
from inverse_flow.functional import causal_conv2d
from inverse_flow.ops.causal import per_channel

from ..cases import CORNERS, DTYPES, FEW, FEW_MORE, ORDERS, SHAPES, Case
from ..tolerance import assert_accurate, state_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SHAPES[::3], *FEW, *FEW_MORE], ids=str)
def test_value(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    input, weight, bias = case.tensors(dtype, device)
    actual = case.causal_conv(input, weight, bias, **case.arguments)
    matrix = reference.dense_matrix(weight.double(), *input.shape[2:], **case.arguments)
    offset = 0 if bias is None else per_channel(bias.double(), input)
    exact = (input.double().flatten(1) @ matrix.mT).reshape(input.shape) + offset
    state = state_dtype(dtype)
    product = (input.to(state).flatten(1) @ matrix.to(state).mT).reshape(input.shape)
    plain = (product if bias is None else product + per_channel(bias.to(state), input)).to(dtype)
    terms = (input.double().abs().flatten(1) @ matrix.abs().mT).reshape(input.shape)
    assert_accurate(actual, plain, exact, dtype, magnitude=terms)


def test_one_tap_moves_the_image() -> None:
    """By hand: a single 1 in the window shifts the image away from the corner it is named after."""
    x = torch.arange(6.0).view(1, 1, 2, 3)
    weight = torch.zeros(1, 1, 2, 2)
    weight[0, 0, 0, 1] = 1  # one row above the corner tap of top_left
    torch.testing.assert_close(causal_conv2d(x, weight)[0, 0], torch.tensor([[0.0, 0, 0], [0, 1, 2]]))
    weight = torch.zeros(1, 1, 2, 2)
    weight[0, 0, 1, 1] = 1  # one row below and one column right of the corner tap of bottom_right
    found = causal_conv2d(x, weight, order="bottom_right")[0, 0]
    torch.testing.assert_close(found, torch.tensor([[4.0, 5, 0], [0, 0, 0]]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("corner", CORNERS)
def test_is_conv2d_with_padding(order: str, corner: str) -> None:
    case = Case(2, 3, 5, 6, (2, 3), order=order, corner=corner)
    input, weight, bias = case.tensors()
    flips = [dim for dim, word in ((2, "bottom"), (3, "right")) if word in order]
    mirrored = torch.nn.functional.pad(input.flip(flips), (2, 0, 1, 0))
    taps = weight.flip(flips).masked_fill(case.unread(weight).flip(flips), 0)
    if corner != "general":
        taps[:, :, -1, -1] += torch.eye(3, dtype=taps.dtype)
    expected = torch.nn.functional.conv2d(mirrored, taps, bias).flip(flips)
    torch.testing.assert_close(causal_conv2d(input, weight, bias, **case.arguments), expected)
