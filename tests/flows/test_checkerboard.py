import math

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import CheckerboardCoupling
from inverse_flow.flows.scale import MAX_LOG_SCALE


class Constant(nn.Module):
    """A conditioner that gives the same values, one per channel, everywhere, and remembers what it was given."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen = x
        return x.new_tensor(self.values).view(1, -1, *(1,) * (x.dim() - 2)).expand(x.shape[0], -1, *x.shape[2:])


@pytest.mark.parametrize("kind", ["affine", "additive"])
def test_starts_as_the_identity(kind: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    z, logdet = CheckerboardCoupling(3, 4, kind=kind)(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


@pytest.mark.parametrize(("parity", "board"), [(0, [[1, 4, 1], [4, 1, 4]]), (1, [[4, 1, 4], [1, 4, 1]])])
def test_the_pixels_of_the_mask_condition_and_stay(parity: int, board: list) -> None:
    net = Constant(3.0)
    z, _ = CheckerboardCoupling(1, kind="additive", parity=parity, conditioner=net)(torch.ones(1, 1, 2, 3))
    assert z[0, 0].tolist() == board
    assert net.seen[0, 0].tolist() == [[1 if value == 1 else 0 for value in row] for row in board]


def test_the_log_determinant_counts_the_changed_pixels() -> None:
    net = Constant(0.0, 0.0, 1e30, 1e30)
    for parity, changed in ((0, 4), (1, 5)):
        layer = CheckerboardCoupling(2, parity=parity, conditioner=net)
        x = torch.ones(1, 2, 3, 3)
        z, logdet = layer(x)
        assert logdet.item() == pytest.approx(2 * changed * MAX_LOG_SCALE)
        assert z.max().item() == pytest.approx(math.exp(MAX_LOG_SCALE))
        torch.testing.assert_close(layer.inverse(z)[0], x)


def test_on_volumes_neighbours_along_every_axis_differ() -> None:
    layer = CheckerboardCoupling(1, kind="additive", conditioner=Constant(1.0))
    changed = layer(torch.zeros(1, 1, 3, 2, 4))[0][0, 0]
    for axis in range(3):
        assert (changed.diff(dim=axis).abs() == 1).all()
    layer = CheckerboardCoupling(1, 3, dimensions=3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 1, 3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="got 'spline'"):
        CheckerboardCoupling(1, kind="spline")
    with pytest.raises(ValueError, match="0 or 1, got 2"):
        CheckerboardCoupling(1, parity=2)
    with pytest.raises(ValueError, match=r"must give \(1, 4, 3, 3\), got \(1, 2, 3, 3\)"):
        CheckerboardCoupling(2, conditioner=Constant(0.0, 0.0))(torch.zeros(1, 2, 3, 3))
