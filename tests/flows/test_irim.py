from __future__ import annotations

import torch
from torch import nn

from inverse_flow.flows import IRIM, Householder


def varied(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def test_is_an_additive_coupling_in_another_basis() -> None:
    """Qᵀ (x₁, x₂ + t(x₁)) in the basis of Q x."""
    layer = varied(IRIM(4, 3))
    basis, coupling = layer.layers
    matrix = basis._matrix()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    turned = torch.einsum("oc,bchw->bohw", matrix, x)
    shift = coupling.conditioner(turned[:, :2])
    turned[:, 2:] += shift
    expected = torch.einsum("oc,bohw->bchw", matrix, turned)
    torch.testing.assert_close(layer(x)[0], expected)
    assert layer(x)[1].tolist() == [0.0, 0.0]


def test_starts_as_the_identity_and_has_one_basis() -> None:
    layer, x = IRIM(5, 3), torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(layer(x)[0], x, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, Householder) for module in layer.modules()) == 1
    assert sum(name.endswith("vectors") for name, _ in layer.named_parameters()) == 1
