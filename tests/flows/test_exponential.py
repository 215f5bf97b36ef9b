import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.flows import ExponentialConv
from inverse_flow.flows.exponential import norm_bound, number_of_terms


def generator(layer: ExponentialConv, shape: tuple[int, ...]) -> Tensor:
    """M as a matrix, from the layer's taps."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    padding = [taps // 2 for taps in layer.kernel_size]
    return F.conv2d(units, layer.bounded_weight().double(), padding=padding).detach().flatten(1).T


@pytest.mark.parametrize(("spread", "norm"), [(0.01, 1.0), (3.0, 1.0), (3.0, 0.2), (3.0, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_matrix_exponential(spread: float, norm: float, dtype: torch.dtype) -> None:
    layer = ExponentialConv(2, (3, 5), norm=norm).to(dtype)
    torch.nn.init.normal_(layer.weight, std=spread)
    matrix = generator(layer, (2, 4, 5))
    x = torch.randn(3, 2, 4, 5, dtype=dtype)
    for found, sign in ((layer(x), 1), (layer.inverse(x), -1)):
        exact = torch.linalg.matrix_exp(sign * matrix)
        expected = (exact @ x.double().flatten(1).T).T.view(x.shape)
        error = (found[0].double() - expected).norm() / expected.norm()
        assert error < 8 * torch.finfo(dtype).eps * math.exp(norm)
        torch.testing.assert_close(found[1], (sign * matrix.trace()).to(dtype).expand(3))


@pytest.mark.parametrize("kernel", [1, 3, (5, 1)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 100.0])
def test_the_norm_is_bounded_and_small_weights_stay(kernel: int | tuple[int, int], spread: float) -> None:
    layer = ExponentialConv(3, kernel)
    torch.nn.init.normal_(layer.weight, std=spread)
    assert torch.linalg.matrix_norm(generator(layer, (3, 7, 6)), 2) <= 1 + 1e-6
    torch.nn.init.normal_(layer.weight, std=1e-3)
    assert torch.equal(layer.bounded_weight(), layer.weight)


def test_the_bound_is_reached_by_a_filter_that_adds_up() -> None:
    layer = ExponentialConv(1)
    torch.nn.init.constant_(layer.weight, 1.0)
    assert torch.linalg.matrix_norm(generator(layer, (1, 40, 40)), 2) > 0.98


@pytest.mark.parametrize("norm", [0.01, 0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_terms_is_the_least_that_is_enough(norm: float, dtype: torch.dtype) -> None:
    count = number_of_terms(norm, dtype)

    def rest(terms: int) -> float:
        return norm ** (terms + 1) * math.exp(2 * norm) / math.factorial(terms + 1)

    assert rest(count) <= torch.finfo(dtype).eps / 2 < rest(count - 1)


def test_zeros_are_the_identity_and_have_a_gradient() -> None:
    layer = ExponentialConv(2)
    torch.nn.init.zeros_(layer.weight)
    x = torch.randn(2, 2, 4, 4)
    z, logdet = layer(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))
    (z.sum() + logdet.sum()).backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().max() > 0


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        ExponentialConv(0)
    with pytest.raises(ValueError, match=r"must be odd, .* got \(3, 2\)"):
        ExponentialConv(2, (3, 2))
    with pytest.raises(ValueError, match="norm must be a finite number above 0, got inf"):
        ExponentialConv(2, norm=math.inf)
    with pytest.raises(ValueError, match=r"built with dimensions=1, for \(B, 2, L\), got shape \(1, 2, 3, 3\)"):
        ExponentialConv(2, dimensions=1)(torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("norm", [3.0, 10.0, 20.0])
def test_terms_of_a_large_norm_do_not_cancel(norm: float) -> None:
    layer = ExponentialConv(2, 1, norm=norm)
    with torch.no_grad():
        layer.weight.copy_(-0.97 * norm * torch.eye(2)[:, :, None, None])
    x = torch.randn(3, 2, 4, 5)
    z, logdet = layer(x)
    torch.testing.assert_close(z, math.exp(-0.97 * norm) * x, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.inverse(z)[0], x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logdet, torch.full((3,), -0.97 * norm * 2 * 20))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_bound_of_a_norm_is_above_it_and_tight(rows: int) -> None:
    matrix = torch.randn(rows, 3 * rows, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2)
    assert exact * (1 - 1e-12) <= norm_bound(matrix) <= exact * rows ** (1 / 32) * (1 + 1e-12)


def test_weights_that_are_nan_stay_so() -> None:
    layer = ExponentialConv(2)
    torch.nn.init.constant_(layer.weight, math.nan)
    assert layer(torch.ones(1, 2, 3, 3))[0].isnan().all()
