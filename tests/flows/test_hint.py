from functools import partial

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import HINT, AdditiveCoupling, AffineCoupling, ResNet
from inverse_flow.flows.base import first_half


def varied(layer: nn.Module) -> nn.Module:
    """With nothing left at its initial value, in float64."""
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def pixel_jacobian(layer: nn.Module, channels: int) -> Tensor:
    """∂z/∂x of an image of one pixel."""
    x = torch.randn(channels, dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda v: layer(v.view(1, -1, 1, 1))[0].flatten(), x)


@pytest.mark.parametrize("channels", [2, 3, 4, 6, 7])
def test_the_jacobian_is_a_dense_lower_triangle(channels: int) -> None:
    jacobian = pixel_jacobian(varied(HINT(channels, 0)), channels)
    assert jacobian.triu(1).abs().max() == 0
    lower = torch.ones(channels, channels).tril().bool()
    assert (jacobian[lower] != 0).all()
    if channels > 2:  # a coupling by itself leaves holes in it
        alone = pixel_jacobian(varied(AffineCoupling(channels, 0)), channels)
        assert (alone[lower] == 0).any()


def test_is_the_recursion_of_the_paper() -> None:
    """f(x) = (f₁(x₁), C(f₂(x₂) | x₁)), C reading the input x₁ and not its image."""
    layer = varied(HINT(4, 5))
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    x1, x2 = x.chunk(2, dim=1)
    f2, coupling, f1 = (part.layer for part in layer.layers)
    first, first_logdet = f1(x1)
    second, second_logdet = f2(x2)
    together, coupling_logdet = coupling(torch.cat((x1, second), dim=1))
    z, logdet = layer(x)
    torch.testing.assert_close(z, torch.cat((first, together[:, 2:]), dim=1))
    torch.testing.assert_close(logdet, first_logdet + second_logdet + coupling_logdet)


@pytest.mark.parametrize(("least_channels", "couplings"), [(2, 7), (3, 3), (4, 3), (5, 1), (8, 1)])
def test_depth(least_channels: int, couplings: int) -> None:
    layer = HINT(8, 0, least_channels=least_channels)
    assert sum(isinstance(part, AffineCoupling) for part in layer.modules()) == couplings


def test_starts_as_the_identity() -> None:
    x = torch.randn(2, 5, 3, 3)
    z, logdet = HINT(5, 4)(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


def test_a_coupling_of_your_own() -> None:
    def coupling(channels: int) -> AffineCoupling:
        kept = first_half(channels)
        return AffineCoupling(channels, conditioner=ResNet(kept, 3, 2 * (channels - kept), blocks=1))

    layer = varied(HINT(5, coupling=coupling))
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)
    additive = varied(HINT(5, coupling=partial(AdditiveCoupling, hidden=3)))
    assert torch.equal(additive(x)[1], torch.zeros(2, dtype=torch.float64))


def test_the_context_reaches_every_coupling() -> None:
    layer = HINT(4, 0, context_channels=2)
    context = torch.randn(1, 2, requires_grad=True)
    for part in layer.layers:
        coupling = part.layer
        nn.init.normal_(coupling.conditioner.layers[-1].weight)
        (grad,) = torch.autograd.grad(layer(torch.randn(1, 4, 2, 2), context)[0].sum(), context)
        assert grad.abs().min() > 0
        nn.init.zeros_(coupling.conditioner.layers[-1].weight)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="channels must be at least 2, got 1"):
        HINT(1)
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"between 2 and 4, the channels, got {wrong}"):
            HINT(4, least_channels=wrong)
    with pytest.raises(ValueError, match=r"built for 4 channels, got images of shape \(1, 5, 2, 2\)"):
        HINT(4)(torch.zeros(1, 5, 2, 2))
