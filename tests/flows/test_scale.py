"""The functions from a network's raw output to a scale."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import AffineCoupling, CheckerboardCoupling
from inverse_flow.flows.scale import SCALES, Scale, log_scale, sigmoid_scale, tanh_scale

RAW = torch.linspace(-6, 6, 25, dtype=torch.float64)
# exp(s), written out.
FORMULAS = {
    "tanh": torch.exp(2 * torch.tanh(RAW / 2)),
    "exp_clamp": torch.exp(4 / math.pi * torch.atan(RAW)),
    "sigmoid": 0.5 + 1.5 / (1 + 2 * torch.exp(-RAW)),
    "softplus": torch.log1p(torch.exp(RAW) * (math.e - 1)),
    "exp": torch.exp(RAW),
}
BOUNDS = {
    "tanh": (math.exp(-2), math.exp(2)),
    "exp_clamp": (math.exp(-2), math.exp(2)),
    "sigmoid": (0.5, 2.0),
}


class Raw(nn.Module):
    """A conditioner that shifts by nothing and scales by the same raw value everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat((torch.zeros_like(x), torch.full_like(x, self.value)), dim=1)


def test_every_scale_has_a_formula() -> None:
    assert set(FORMULAS) == set(SCALES)


@pytest.mark.parametrize("scale", SCALES)
def test_formula(scale: Scale) -> None:
    torch.testing.assert_close(log_scale(scale, RAW).exp(), FORMULAS[str(scale)])
    assert log_scale(scale, torch.zeros(1)).abs().item() < 1e-6


@pytest.mark.parametrize("scale", SCALES)
def test_extremes_are_finite(scale: Scale) -> None:
    raw = torch.tensor([-1e4, 1e4], requires_grad=True)
    found = log_scale(scale, raw)
    (slope,) = torch.autograd.grad(found.sum(), raw)
    assert found.isfinite().all()
    assert slope.isfinite().all()
    if scale in BOUNDS:
        torch.testing.assert_close(found.detach().exp(), torch.tensor(BOUNDS[str(scale)]), rtol=1e-3, atol=0)
    else:
        assert found[0].item() == pytest.approx(-1e4, rel=1e-3)


@pytest.mark.parametrize("scale", [*SCALES, partial(tanh_scale, limit=1.0)])
def test_couplings_use_it(scale: Scale) -> None:
    expected = log_scale(scale, torch.tensor(0.7)).item()
    x = torch.ones(1, 2, 1, 2)
    _, logdet = AffineCoupling(2, conditioner=Raw(0.7), scale=scale)(x)
    assert logdet.item() == pytest.approx(2 * expected, rel=1e-6)
    _, logdet = CheckerboardCoupling(2, conditioner=Raw(0.7), scale=scale)(x)
    assert logdet.item() == pytest.approx(2 * expected, rel=1e-6)
    z, logdet = AffineCoupling(2, 3, scale=scale)(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(logdet, torch.zeros(1))


def test_bounds_of_ones_own() -> None:
    scale = partial(sigmoid_scale, low=0.2, high=5.0)
    limits = log_scale(scale, torch.tensor([-50.0, 0.0, 50.0])).exp()
    torch.testing.assert_close(limits, torch.tensor([0.2, 1.0, 5.0]))
    with pytest.raises(ValueError, match="1 lie between them, got 1 and 2"):
        sigmoid_scale(torch.zeros(1), low=1, high=2)


def test_an_unknown_scale_is_refused() -> None:
    for make in (partial(AffineCoupling, 2, 3), partial(CheckerboardCoupling, 2, 3)):
        with pytest.raises(ValueError, match=r"one of 'tanh', .*, got 'relu'"):
            make(scale="relu")
