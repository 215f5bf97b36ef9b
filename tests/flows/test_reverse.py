"""Layers and whole flows turned round."""

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import (
    ActNorm,
    AffineCoupling,
    Compose,
    Flow,
    NonFiniteError,
    Reverse,
    Split,
    Squeeze,
    detect_nonfinite,
    reverse,
)


def two_scale_flow() -> Flow:
    layers = [Squeeze(), InverseConv2d(4), AffineCoupling(4, 3, context_channels=1), Split(4), ActNorm(2)]
    flow = Flow(layers, (1, 4, 4)).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def test_twice_is_the_layer_itself() -> None:
    for layer in (Squeeze(), Compose(ActNorm(2)), two_scale_flow()):
        assert isinstance(reverse(layer), Reverse)
        assert reverse(reverse(layer)) is layer


def test_a_flow_of_several_latents_becomes_a_map_from_latents_to_data() -> None:
    flow = two_scale_flow()
    turned = reverse(flow)
    x, context = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    latents, logdet = flow(x, context)
    assert [z.shape for z in latents] == [(2, 2, 2, 2), (2, 2, 2, 2)]
    for given in (latents, list(latents)):
        data, turned_logdet = turned(given, context)
        torch.testing.assert_close(data, x)
        torch.testing.assert_close(turned_logdet, -logdet)
    again, inverse_logdet = turned.inverse(x, context)
    assert all(torch.equal(a, b) for a, b in zip(again, latents, strict=True))
    assert torch.equal(inverse_logdet, logdet)


def test_parameters_are_shared() -> None:
    flow = two_scale_flow()
    assert {id(p) for p in reverse(flow).parameters()} == {id(p) for p in flow.parameters()}


def test_works_on_a_module_that_is_no_flow_layer() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return 2 * x, x.new_zeros(len(x))

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return z / 2, z.new_zeros(len(z))

    assert reverse(Double())(torch.ones(1))[0].item() == 0.5
    with pytest.raises(TypeError, match="got ReLU"):
        reverse(nn.ReLU())


def test_wrong_latents_are_named() -> None:
    with pytest.raises(ValueError, match=r"latents must be \(B, 2, 2, 2\), \(B, 2, 2, 2\), got"):
        reverse(two_scale_flow())((torch.zeros(1, 2, 2, 2, dtype=torch.float64),))


def test_a_nan_in_a_latent_is_found() -> None:
    flow = two_scale_flow()
    latents, _ = flow(torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"input of Flow\.inverse"):
        reverse(flow)((latents[0], latents[1] * float("nan")), torch.zeros(1, 1, dtype=torch.float64))
