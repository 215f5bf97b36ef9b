import pytest
import torch
from torch import Tensor

from inverse_flow.flows import Flow, FlowLayer, interpolate, reconstruction_error
from inverse_flow.models import InverseFlow


def trained(context_channels: int = 0) -> Flow:
    """A flow of two scales with nothing left at its initial value."""
    torch.manual_seed(0)
    flow = InverseFlow((1, 4, 4), levels=2, steps=1, hidden=4, context_channels=context_channels)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        flow(torch.randn(8, 1, 4, 4), torch.randn(8, 2) if context_channels else None)
    return flow.eval()


def test_interpolation_begins_and_ends_with_the_images() -> None:
    flow = trained(context_channels=2).double()
    a, b, context = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 1, 4, 4), (3, 1, 4, 4), (3, 2)))
    way = interpolate(flow, a, b, 5, context)
    assert way.shape == (5, 3, 1, 4, 4)
    torch.testing.assert_close(way[0], a)
    torch.testing.assert_close(way[-1], b)
    middle = flow(way[2], context)[0]
    for z, first, second in zip(middle, flow(a, context)[0], flow(b, context)[0], strict=True):
        torch.testing.assert_close(z, (first + second) / 2)
    assert not torch.allclose(way[2], (a + b) / 2)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        interpolate(flow, a, b, 1, context)
    with pytest.raises(ValueError, match="one shape"):
        interpolate(flow, a, b[:2], 3, context)


class Off(FlowLayer):
    """Its inverse is off by 1e-2 in the second example."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z + 1e-2 * torch.eye(len(z))[1].view(-1, 1, 1, 1), z.new_zeros(len(z))


def test_the_reconstruction_error_tells_the_example() -> None:
    x = torch.rand(3, 1, 4, 4)
    healthy = trained()
    assert reconstruction_error(healthy, x).shape == (3,)
    assert (reconstruction_error(healthy, x) < 1e-5).all()
    error = reconstruction_error(Flow([Off()], (1, 4, 4)), x)
    assert error.tolist() == pytest.approx([0, 1e-2, 0], abs=1e-6)
