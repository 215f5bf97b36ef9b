import math

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import AdditiveCoupling, AffineCoupling, ConvNet
from inverse_flow.flows.scale import MAX_LOG_SCALE


class Constant(nn.Module):
    """A conditioner that gives the same values, one per channel, everywhere."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x.new_tensor(self.values).view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:])


@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling])
def test_starts_as_the_identity(kind: type) -> None:
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    z, logdet = kind(4, 8)(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


def test_the_first_half_conditions_and_stays() -> None:
    x = torch.ones(1, 5, 2, 2)
    z, _ = AdditiveCoupling(5, conditioner=Constant(3.0, 3.0))(x)
    assert z[0, :, 0, 0].tolist() == [1, 1, 1, 4, 4]


@pytest.mark.parametrize("value", [-1e30, 1e30])
def test_scales_are_bounded_whatever_the_network_gives(value: float) -> None:
    layer = AffineCoupling(2, conditioner=Constant(0.0, value))
    x = torch.ones(1, 2, 1, 1)
    z, logdet = layer(x)
    assert logdet.item() == pytest.approx(math.copysign(MAX_LOG_SCALE, value))
    assert z[0, 1].item() == pytest.approx(math.exp(math.copysign(MAX_LOG_SCALE, value)))
    assert layer.inverse(z)[0][0, 1].item() == pytest.approx(1.0)


def test_a_conditioner_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"must give \(1, 4, 3, 3\), got \(1, 3, 3, 3\)"):
        AffineCoupling(4, conditioner=Constant(0.0, 0.0, 0.0))(torch.zeros(1, 4, 3, 3))


def test_one_channel_cannot_be_coupled() -> None:
    with pytest.raises(ValueError, match="channels must be at least 2, got 1"):
        AffineCoupling(1)


def test_a_context_may_be_a_vector_or_a_map() -> None:
    torch.manual_seed(0)
    net = ConvNet(2, 4, 2, context_channels=3)
    nn.init.normal_(net.layers[-1].weight)
    x, vector = torch.randn(2, 2, 3, 3), torch.randn(2, 3)
    as_map = vector[:, :, None, None].expand(-1, -1, 3, 3)
    assert torch.equal(net(x, vector), net(x, as_map))
    assert not torch.equal(net(x, vector), net(x, vector + 1))


def test_a_missing_or_misshapen_context_is_named() -> None:
    net = ConvNet(2, 4, 2, context_channels=3)
    x = torch.zeros(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"context \(B, 3\).*none was given"):
        net(x)
    with pytest.raises(ValueError, match=r"\(B, 3\) or \(B, 3, H, W\), .* got \(2, 3, 6, 6\)"):
        net(x, torch.zeros(2, 3, 6, 6))
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        net(x, torch.zeros(2, 4))


@pytest.mark.parametrize("layer", [AdditiveCoupling, AffineCoupling])
@pytest.mark.parametrize("kept", [0, 4, -1])
def test_some_channels_are_kept_and_some_change(layer: type, kept: int) -> None:
    with pytest.raises(ValueError, match=rf"kept must be at (least 1|most 3 of 4 channels), got {kept}"):
        layer(4, kept=kept)
