from __future__ import annotations

import pytest
import torch

from inverse_flow.data import TOY_DENSITIES, draw_toy


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_points_in_the_plane_the_same_for_a_seed(name: str) -> None:
    before = torch.get_rng_state()
    points = draw_toy(name, 2000, seed=3)
    assert torch.equal(before, torch.get_rng_state()), "the program's random numbers were used"
    assert points.shape == (2000, 2)
    assert points.dtype == torch.float32
    assert torch.equal(draw_toy(name, 2000, seed=3), points)
    assert not torch.equal(draw_toy(name, 2000, seed=4), points)
    assert draw_toy(name, 0).shape == (0, 2)
    # About the origin, and neither a point nor all over the place: a flow can start without scaling.
    assert points.mean(0).abs().max() < 0.2
    assert 0.5 < points.std(0).min() <= points.std(0).max() < 2


def test_the_banana_is_a_bent_gaussian() -> None:
    u, v = draw_toy("banana", 20000).unbind(1)
    ridge = v - u.square() / 2 + 0.5
    assert abs(ridge.std() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack((u, ridge)))[0, 1]) < 0.02


def test_the_moons_are_half_circles() -> None:
    x, y = draw_toy("two_moons", 4000).div(1.5).unbind(1)
    upper = ((x + 0.5).square() + (y + 0.25).square()).sqrt() - 1
    lower = ((x - 0.5).square() + (y - 0.25).square()).sqrt() - 1
    assert torch.minimum(upper.abs(), lower.abs()).max() < 0.35


def test_every_gaussian_and_every_square_has_its_share() -> None:
    points = draw_toy("eight_gaussians", 8000)
    which = torch.atan2(points[:, 1], points[:, 0]).div(torch.pi / 4).round().long() % 8
    assert (torch.bincount(which, minlength=8) - 1000).abs().max() < 120
    squares = draw_toy("checkerboard", 8000).add(2).floor().long()
    assert ((squares.sum(1) % 2) == 0).all()
    assert (torch.bincount(4 * squares[:, 0] + squares[:, 1], minlength=16) > 850).sum() == 8


def test_rings_and_spirals() -> None:
    radius = draw_toy("rings", 4000).norm(dim=1) / 0.6
    assert (radius - radius.round()).abs().quantile(0.95) < 0.25
    assert set(radius.round().long().unique().tolist()) == {1, 2, 3, 4}
    arms = draw_toy("two_spirals", 4000)
    turned = torch.remainder(torch.atan2(arms[:, 1], arms[:, 0]) - 4 * arms.norm(dim=1) + torch.pi / 2, torch.pi)
    off = (turned - torch.pi / 2).abs()
    assert off[arms.norm(dim=1) > 0.8].quantile(0.9) < 0.7


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        draw_toy("banana", -1)
    with pytest.raises(ValueError, match=r"one of banana, two_moons, .* got 'moons'"):
        draw_toy("moons", 10)
