import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.flows import LeakyReLU, SmoothLeakyReLU, SmoothTanh
from inverse_flow.flows.activation import LEAST_SLOPE

SMOOTH = pytest.mark.parametrize("kind", [SmoothLeakyReLU, SmoothTanh])


def values_of_every_size(dtype: torch.dtype) -> Tensor:
    sizes = torch.logspace(-8, 6, 1001, dtype=dtype)
    return torch.cat([-sizes, torch.linspace(-60, 60, 4001, dtype=dtype), sizes])[None]


def test_the_functions_are_what_they_are_called() -> None:
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64)[None]
    torch.testing.assert_close(SmoothTanh(0.2)(x)[0], x.tanh() + 0.2 * x)
    expected = 0.3 * x + 0.7 * torch.logaddexp(x, torch.zeros_like(x))
    torch.testing.assert_close(SmoothLeakyReLU(0.3)(x)[0], expected)
    layer = LeakyReLU(2).double()
    with torch.no_grad():
        layer.log_slope.copy_(torch.tensor([0.2, 3.0]).log())
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    expected = torch.stack([F.leaky_relu(images[:, c], slope) for c, slope in enumerate((0.2, 3.0))], dim=1)
    torch.testing.assert_close(layer(images)[0], expected, rtol=1e-6, atol=0)


@SMOOTH
@pytest.mark.parametrize("slope", [LEAST_SLOPE, 0.01, 0.1, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_arrives_wherever_it_begins(
    kind: type[SmoothLeakyReLU] | type[SmoothTanh], slope: float, dtype: torch.dtype
) -> None:
    layer = kind(slope)
    z = values_of_every_size(dtype)
    x, _ = layer.inverse(z)
    again, _ = layer(x)
    # The last bits of x are worth so much in z; near z = 0 the leaky one adds two terms of the size of 1/2.
    allowed = 4 * torch.finfo(dtype).eps * (z.abs() + 1)
    assert ((again - z).abs() <= allowed).all()


@SMOOTH
def test_the_bracket_holds(kind: type[SmoothLeakyReLU] | type[SmoothTanh]) -> None:
    for slope in (LEAST_SLOPE, 0.1, 0.7):
        layer = kind(slope)
        x = values_of_every_size(torch.float64)
        z, _ = layer(x)
        low, high = layer._bracket(z)
        room = 1e-12 * (1 + z.abs() / slope)
        assert (low <= x + room).all()
        assert (x <= high + room).all()


@SMOOTH
def test_a_nan_stays_one(kind: type[SmoothLeakyReLU] | type[SmoothTanh]) -> None:
    z = torch.tensor([[0.5, float("nan")]])
    x, _ = kind().inverse(z)
    assert x.isnan().tolist() == [[False, True]]


def test_a_leaky_relu_begins_as_the_identity() -> None:
    x = torch.randn(2, 3, 4, 4)
    z, logdet = LeakyReLU(3)(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


def test_errors_say_what_was_given() -> None:
    for kind in (SmoothLeakyReLU, SmoothTanh):
        for slope in (0.0, 1.0, float("nan")):
            with pytest.raises(ValueError, match=f"at least 0.001 and below 1, got {slope}"):
                kind(slope)
    with pytest.raises(ValueError, match="built for 2 channels"):
        LeakyReLU(2)(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("layer", [SmoothLeakyReLU(), SmoothTanh()], ids=["leaky_relu", "tanh"])
def test_the_inverse_has_second_derivatives(layer: SmoothLeakyReLU | SmoothTanh) -> None:
    z = torch.tensor([[-2.0, -0.3, 0.7, 5.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer.inverse, (z,))


@pytest.mark.parametrize("layer", [SmoothLeakyReLU(), SmoothTanh()], ids=["leaky_relu", "tanh"])
def test_the_largest_values_come_back(layer: SmoothLeakyReLU | SmoothTanh) -> None:
    x = torch.tensor([[-3e38, -1e30, 1e30, 3e38]])
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)
