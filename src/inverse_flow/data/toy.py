"""Densities in the plane, to look at what a flow of vectors learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inverse_flow.ops.spec import check_integer

Draw = Callable[..., Tensor]


def draw_toy(name: str, count: int, *, seed: int = 0) -> Tensor:
    """``count`` points (count, 2), float32, of a density in the plane; always the same for one seed.

    - ``"banana"``: (u, v + u²/2 − 1/2) with u ~ N(0, 1) and v ~ N(0, 1/4), one bent ridge;
    - ``"two_moons"``: two half circles that reach into each other;
    - ``"eight_gaussians"``: on a circle of radius 2, of standard deviation 0.2;
    - ``"checkerboard"``: uniform on every other square of a 4×4 board from −2 to 2;
    - ``"rings"``: four circles about the origin;
    - ``"two_spirals"``: two arms that wind round each other.

    Args:
        name: one of these, :data:`TOY_DENSITIES`.
        count: of points.
        seed: of the random numbers.

    Raises:
        ValueError: a name that is none of these; a negative count.
    """
    if name not in _DRAWS:
        raise ValueError(f"a toy density is one of {', '.join(_DRAWS)}, got {name!r}")
    check_integer("count", count, least=0)
    check_integer("seed", seed, least=None)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    def choice(number: int) -> Tensor:
        return torch.randint(number, (count,), generator=generator)

    return _DRAWS[name](normal, uniform, choice)


def _banana(normal: Draw, uniform: Draw, choice: Draw) -> Tensor:
    across, along = normal(), normal()
    return torch.stack((along, across / 2 + along.square() / 2 - 0.5), dim=1)


def _two_moons(normal: Draw, uniform: Draw, choice: Draw) -> Tensor:
    angle, lower = math.pi * uniform(), choice(2)
    sign = 1 - 2 * lower
    moons = torch.stack((sign * angle.cos() + lower - 0.5, sign * (angle.sin() - 0.25)), dim=1)
    return 1.5 * moons + 0.1 * normal(2)


def _eight_gaussians(normal: Draw, uniform: Draw, choice: Draw) -> Tensor:
    return _on_circle(choice(8) * (math.pi / 4), torch.tensor(2.0)) + 0.2 * normal(2)


def _checkerboard(normal: Draw, uniform: Draw, choice: Draw) -> Tensor:
    column = choice(4)
    row = 2 * choice(2) + column % 2
    return torch.stack((column + uniform(), row + uniform()), dim=1) - 2


def _rings(normal: Draw, uniform: Draw, choice: Draw) -> Tensor:
    return _on_circle(2 * math.pi * uniform(), 0.6 * (choice(4) + 1)) + 0.06 * normal(2)


def _two_spirals(normal: Draw, uniform: Draw, choice: Draw) -> Tensor:
    angle = 3 * math.pi * uniform().sqrt()
    return _on_circle(angle + math.pi * choice(2), angle / 4) + 0.08 * normal(2)


def _on_circle(angle: Tensor, radius: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)


_DRAWS: dict[str, Callable[[Draw, Draw, Draw], Tensor]] = {
    "banana": _banana,
    "two_moons": _two_moons,
    "eight_gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "rings": _rings,
    "two_spirals": _two_spirals,
}
TOY_DENSITIES = tuple(_DRAWS)
"""The names of the densities."""
