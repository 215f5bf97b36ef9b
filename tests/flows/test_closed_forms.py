"""``backward_from_output`` of each layer that has one, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import (
    HINT,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Conv1x1,
    Flow,
    HaarSqueeze,
    Householder,
    Hyperbolic,
    Permute,
    Squeeze,
    WaveletSqueeze,
)
from inverse_flow.flows.hint import OnChannels

from .test_battery import DB2

CONTEXT_CHANNELS = 2

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "haar": (HaarSqueeze, (2, 4, 2)),
    "haar_volume": (partial(HaarSqueeze, "channel"), (2, 2, 4, 2)),
    "wavelet": (partial(WaveletSqueeze, DB2), (2, 6, 4)),
    "squeeze_column": (partial(Squeeze, pattern="column"), (1, 4, 2)),
    "householder": (partial(Householder, 4, 3), (4, 2, 3)),
    "householder_volume": (partial(Householder, 3), (3, 2, 1, 3)),
    "hyperbolic": (partial(Hyperbolic, 4, 3, step_size=0.5), (4, 3, 2)),
    "hyperbolic_volume": (partial(Hyperbolic, 2, dimensions=3), (2, 2, 3, 1)),
    "affine_on_some_channels": (lambda: HINT(6, 3, context_channels=CONTEXT_CHANNELS).layers[0], (6, 3, 2)),
    "squeeze_volume": (Squeeze, (1, 2, 4, 2)),
    "actnorm_volume": (partial(ActNorm, 2), (2, 2, 3, 1)),
    "conv1x1_volume": (partial(Conv1x1, 3), (3, 2, 1, 2)),
    "affine_volume": (partial(AffineCoupling, 3, 2, dimensions=3, context_channels=CONTEXT_CHANNELS), (3, 2, 1, 2)),
    "permute_volume": (partial(Permute, [1, 2, 0]), (3, 2, 1, 2)),
}


def varied(layer: nn.Module) -> nn.Module:
    layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def check_closed_form(layer: nn.Module, x: Tensor, context: Tensor) -> None:
    """x, its gradient, and those of the parameters and of the context."""
    x.requires_grad_()
    context.requires_grad_()
    z, logdet = layer(x, context)
    grad_z, grad_logdet = torch.randn_like(z), torch.randn_like(logdet)
    leaves = [x, context, *layer.parameters()]
    outputs, grads = ((z, logdet), (grad_z, grad_logdet)) if logdet.requires_grad else ((z,), (grad_z,))
    expected = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    with torch.no_grad():
        rebuilt, grad_x = layer.backward_from_output(z.detach(), grad_z, grad_logdet, context)
    torch.testing.assert_close(rebuilt, x.detach())
    torch.testing.assert_close(grad_x, expected[0])
    for leaf, grad in zip(leaves[1:], expected[1:], strict=True):
        assert (leaf.grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("name", LAYERS)
def test_closed_form(name: str) -> None:
    make, shape = LAYERS[name]
    x, context = (torch.randn(2, *size, dtype=torch.float64) for size in (shape, (CONTEXT_CHANNELS,)))
    check_closed_form(varied(make()), x, context)


def test_check_can_fail() -> None:
    class Wrong(Hyperbolic):
        def backward_from_output(self, z: Tensor, grad_z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
            x, grad_x = super().backward_from_output(z, grad_z, z.new_zeros(len(z)))
            return x, grad_x + grad_z * self.offset

    layer = varied(Wrong(4))
    x, context = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.zeros(2, 1)
    layer.offset = 0.0
    check_closed_form(layer, x, context)
    layer.offset = 1e-3
    with pytest.raises(AssertionError):
        check_closed_form(layer, x.detach(), context)


def test_a_coupling_without_a_closed_form_takes_the_general_way() -> None:
    class Plain(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.layer = AdditiveCoupling(channels, 0)

        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.layer(x, context)

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.layer.inverse(z, context)

    assert all(type(part) is OnChannels for part in HINT(4, coupling=Plain).layers)
    assert all(hasattr(part, "backward_from_output") for part in HINT(4, 0).layers)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_of_a_flow_that_stores_nothing(dimensions: int) -> None:
    """Every new layer in one chain, stored and rebuilt."""
    options = {"context_channels": CONTEXT_CHANNELS, "dimensions": dimensions}
    bands = 2**dimensions
    layers = [
        HaarSqueeze("channel"),
        Hyperbolic(bands, dimensions=dimensions),
        ActNorm(bands),
        Householder(bands, 3),
        HINT(bands, 2, least_channels=3, **options),
        HINT(bands, coupling=lambda channels: AdditiveCoupling(channels, 2, **options)),
    ]
    flow = varied(Flow(layers, (1, *(4, 2, 2)[:dimensions])))
    x = torch.randn(2, *flow.event_shape, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, CONTEXT_CHANNELS, dtype=torch.float64, requires_grad=True)
    leaves = [x, context, *flow.parameters()]
    stored = torch.autograd.grad(flow.log_prob(x, context).sum(), leaves)
    flow.memory_efficient = True
    rebuilt = torch.autograd.grad(flow.log_prob(x, context).sum(), leaves)
    for a, b in zip(rebuilt, stored, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert all(grad.abs().max() > 0 for grad in stored[:2])
