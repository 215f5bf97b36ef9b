"""The classifier with inverse convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inverse_flow.models import InverseConvClassifier


def test_sixteen_parameters() -> None:
    model = InverseConvClassifier((1, 6, 6), hidden=5)
    assert model.num_inverse_conv_parameters == 16
    assert model.num_parameters == 16 + 36 * 5 + 5 + 5 * 10 + 10
    control = InverseConvClassifier((1, 6, 6), hidden=5, inverse_convs=False)
    assert control.num_inverse_conv_parameters == 0
    assert control.num_parameters == model.num_parameters - 16


def test_all_that_is_counted_is_read_and_learned() -> None:
    model = InverseConvClassifier((1, 6, 6), hidden=5, dropout=0.0)
    model(torch.randn(4, 1, 6, 6)).square().sum().backward()
    moving = sum(int((layer.weight.grad != 0).sum()) for layer in model.inverse_convs)
    assert moving == model.num_inverse_conv_parameters


def test_every_pixel_reaches_every_output_of_the_inverse_convs() -> None:
    model = InverseConvClassifier((1, 5, 5), hidden=5).double()
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64)

    def features(x: torch.Tensor) -> torch.Tensor:
        for layer in model.inverse_convs:
            x = F.leaky_relu(layer(x)[0], 0.1)
        return x

    jacobian = torch.autograd.functional.jacobian(features, x).view(25, 25)
    assert bool((jacobian != 0).all())


def test_it_learns() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.randn(40, 1, 4, 4) + 2 * labels.view(-1, 1, 1, 1)
    model = InverseConvClassifier((1, 4, 4), classes=2, hidden=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert model.training
    assert float((model.predict(images) == labels).float().mean()) > 0.95
    assert model.training


def test_errors() -> None:
    model = InverseConvClassifier((1, 4, 4), hidden=2)
    with pytest.raises(ValueError, match=r"takes \(B, 1, 4, 4\), got \(2, 1, 4, 5\)"):
        model(torch.rand(2, 1, 4, 5))
    with pytest.raises(TypeError, match=r"floating-point images, got torch\.uint8"):
        model(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="image_shape must be "):
        InverseConvClassifier((1, 0, 4))
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        InverseConvClassifier((1, 4, 4), 0)
    with pytest.raises(ValueError, match="dropout"):
        InverseConvClassifier((1, 4, 4), dropout=1.0)
