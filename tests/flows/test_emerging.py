import itertools
import math

import pytest
import torch
from torch import Tensor

from inverse_flow import InverseConv2d
from inverse_flow.flows import EmergingConv, PeriodicConv, prepare_sampling
from inverse_flow.flows.compose import Flow
from inverse_flow.reference import dense_matrix


def shaken(layer: EmergingConv | PeriodicConv) -> EmergingConv | PeriodicConv:
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def matrix_of(layer: torch.nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Of a linear layer without bias: what it does to the unit vectors."""
    units = torch.eye(math.prod(shape), dtype=torch.float64)
    return layer(units.view(-1, *shape))[0].detach().flatten(1).T


@pytest.mark.parametrize("corner", ["plu", "unit_triangular", "identity"])
def test_emerging_is_the_product_of_two_triangular_matrices(corner: str) -> None:
    layer = shaken(EmergingConv(2, 3, corner=corner, bias=False))
    first, second = (module for module in layer.modules() if isinstance(module, InverseConv2d))
    assert (first.order, second.order) == ("top_left", "bottom_right")
    factors = [dense_matrix(conv.complete_weight(), 3, 4, order=conv.order) for conv in (first, second)]
    torch.testing.assert_close(matrix_of(layer, (2, 3, 4)), (factors[1] @ factors[0]).detach())


def test_emerging_sees_the_pixels_on_all_sides() -> None:
    layer = shaken(EmergingConv(1, 3))
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64, requires_grad=True)
    layer(x)[0][0, 0, 4, 4].backward()
    seen = x.grad[0, 0] != 0
    assert seen[2:7, 2:7].all()
    assert seen.sum() == 25


def test_emerging_bounds_both_solves() -> None:
    layer = shaken(EmergingConv(2, max_row_sum=0.3, corner="identity"))
    bounded = [module.complete_weight() for module in layer.modules() if isinstance(module, InverseConv2d)]
    assert len(bounded) == 2
    for weight in bounded:
        assert weight.abs().sum((1, 2, 3)).max() <= 1.3 + 1e-12


def test_emerging_samples_as_before_when_prepared() -> None:
    flow = Flow([shaken(EmergingConv(3))], (3, 4, 4))
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(prepare_sampling(flow).inverse([z])[0], flow.inverse([z])[0].detach())


@pytest.mark.parametrize(
    ("kernel", "shape"), [((3, 3), (2, 4, 5)), ((2, 4), (2, 3, 6)), ((3, 5), (1, 2, 3)), ((1, 2), (3, 1, 4))]
)
def test_periodic_is_the_circulant_matrix(kernel: tuple[int, ...], shape: tuple[int, ...]) -> None:
    layer = shaken(PeriodicConv(shape[0], kernel))
    channels, height, width = shape
    expected = torch.zeros(channels, height, width, channels, height, width, dtype=torch.float64)
    places = itertools.product(range(height), range(width), range(kernel[0]), range(kernel[1]))
    for i, j, p, q in places:
        row, column = (i + p - kernel[0] // 2) % height, (j + q - kernel[1] // 2) % width
        expected[:, i, j, :, row, column] += layer.weight[:, :, p, q].detach()
    size = channels * height * width
    expected = expected.reshape(size, size)
    torch.testing.assert_close(matrix_of(layer, shape), expected)
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[1].detach(), torch.linalg.slogdet(expected).logabsdet.expand(2))
    solved = torch.linalg.solve(expected, x.flatten(1).T).T.view(x.shape)
    torch.testing.assert_close(layer.inverse(x)[0].detach(), solved)


def test_a_singular_periodic_convolution_shows() -> None:
    layer = PeriodicConv(1, (1, 2))
    with torch.no_grad():
        layer.weight.fill_(1)  # (1, 1): the frequency of alternating pixels is lost
    _, logdet = layer(torch.ones(1, 1, 2, 4))
    assert logdet.item() < -30


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"dimensions .*, got 4"):
        EmergingConv(2, dimensions=4)
    with pytest.raises(ValueError, match=r"dimensions .*, got 0"):
        PeriodicConv(2, dimensions=0)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        PeriodicConv(0)
    with pytest.raises(ValueError, match=r"built with dimensions=1, for \(B, 2, L\), got shape \(1, 2, 3, 3\)"):
        PeriodicConv(2, dimensions=1)(torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"\(5, 5\) reaches around images of \(4, 1\) more than once"):
        PeriodicConv(2, 5).inverse(torch.zeros(1, 2, 4, 1))
