"""Volumes (B, C, D, H, W): what each layer does with them beyond the battery."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from inverse_flow.flows import (
    HINT,
    ActNorm,
    AffineCoupling,
    CheckerboardCoupling,
    Conv1x1,
    Flow,
    HaarSqueeze,
    Householder,
    Permute,
    Split,
    Squeeze,
)


@pytest.mark.parametrize("factor", [2, 3])
def test_the_order_of_a_squeeze(factor: int) -> None:
    """Channel c, offsets (d, h, w) → channel ((c·f + d)·f + h)·f + w."""
    f = factor
    x = torch.arange(2 * 2 * f * 2 * f * 3 * f).view(2, 2, f, 2 * f, 3 * f).float()
    z, _ = Squeeze(f)(x)
    assert z.shape == (2, 2 * f**3, 1, 2, 3)
    for channel in range(2):
        for d in range(f):
            for h in range(f):
                for w in range(f):
                    out = ((channel * f + d) * f + h) * f + w
                    assert torch.equal(z[:, out], x[:, channel, d::f, h::f, w::f])
    assert torch.equal(Squeeze(f).inverse(z)[0], x)


def test_actnorm_initialises_over_every_voxel() -> None:
    layer = ActNorm(2)
    x = torch.randn(3, 2, 4, 3, 2) * torch.tensor([3.0, 0.1]).view(2, 1, 1, 1) + 5
    z, logdet = layer(x)
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3, 4), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(logdet, (24 * layer.log_scale.sum()).expand(3))


@pytest.mark.parametrize("layer", [Conv1x1(3), Householder(3), ActNorm(3), Permute([2, 0, 1])])
def test_a_layer_without_spatial_weights_does_the_same_to_every_slice(layer: nn.Module) -> None:
    layer.eval()
    x = torch.randn(2, 3, 4, 2, 3)
    z, logdet = layer(x)
    slices = [layer(x[:, :, i]) for i in range(4)]
    torch.testing.assert_close(z, torch.stack([z for z, _ in slices], dim=2))
    torch.testing.assert_close(logdet, torch.stack([logdet for _, logdet in slices]).sum(0))


def volume_flow(context_channels: int = 0) -> Flow:
    options = {"dimensions": 3, "context_channels": context_channels}
    return Flow(
        [
            Squeeze(),
            ActNorm(8),
            Conv1x1(8),
            AffineCoupling(8, 4, **options),
            Split(8, **options),
            ActNorm(4),
            Householder(4),
            HINT(4, 4, **options),
        ],
        (1, 4, 2, 4),
    )


def test_a_flow_of_volumes() -> None:
    flow = volume_flow(context_channels=2)
    x, context = torch.randn(3, 1, 4, 2, 4), torch.randn(3, 2, 4, 2, 4)
    flow.log_prob(x, context).sum().backward()
    assert flow.latent_shapes == ((4, 2, 1, 2), (4, 2, 1, 2))
    assert all(parameter.grad is not None for parameter in flow.parameters())
    samples, log_prob = flow.sample_and_log_prob(3, context)
    assert samples.shape == x.shape
    torch.testing.assert_close(flow.log_prob(samples, context), log_prob, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("make", [partial(AffineCoupling, 4, 3), partial(Split, 4), partial(HINT, 4, 3)])
def test_a_network_for_images_refuses_volumes(make: partial) -> None:
    with pytest.raises(ValueError, match="built with dimensions=2"):
        make()(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(ValueError, match="built with dimensions=3"):
        make(dimensions=3)(torch.zeros(1, 4, 2, 2))


def test_what_is_neither_image_nor_volume_is_refused() -> None:
    for x in (torch.zeros(4), torch.zeros(1, 4, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"vectors \(B, C\), signals .* or volumes \(B, C, D, H, W\), got shape"):
            Conv1x1(4)(x)
    for layer in (Squeeze(), HaarSqueeze(), CheckerboardCoupling(4)):
        with pytest.raises(ValueError, match=r"expects signals .* got shape \(1, 4\)"):
            layer(torch.zeros(1, 4))
