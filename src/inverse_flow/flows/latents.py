"""What the latents of a trained flow serve for: images between two images, and a check of its inverse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inverse_flow.ops.spec import check_integer


@torch.no_grad()
def interpolate(flow: nn.Module, a: Tensor, b: Tensor, steps: int = 8, context: Tensor | None = None) -> Tensor:
    """Images on the way from ``a`` to ``b``: x_t = f⁻¹((1 − t)·f(a) + t·f(b), context), t = 0 … 1.

    Kingma & Dhariwal, "Glow", 2018, section 6. The ends are ``a`` and ``b`` up to rounding.

    Args:
        flow: a flow.
        a: (B, C, H, W), where the rows begin.
        b: where they end, of the same shape.
        steps: the number of images in a row, the ends included, at least 2.
        context: one row for each pair.

    Returns:
        (steps, B, C, H, W), without gradient.

    Raises:
        ValueError: fewer than 2 steps, or ``a`` and ``b`` of different shapes.
    """
    check_integer("steps", steps, least=2)  # its two ends
    if a.shape != b.shape:
        raise ValueError(f"the ends of an interpolation must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    weights = torch.linspace(0, 1, steps, device=a.device, dtype=a.dtype)
    first, second = flow(a, context)[0], flow(b, context)[0]

    def between(z: Tensor, other: Tensor) -> Tensor:
        t = weights.to(z.dtype).view(-1, *(1,) * z.dim())
        return ((1 - t) * z + t * other).flatten(0, 1)

    latents = tuple(between(z, other) for z, other in zip(first, second, strict=True))
    repeated = None if context is None else context.repeat(steps, *(1,) * (context.dim() - 1))
    x: Tensor = flow.inverse(latents, repeated)[0]  # type: ignore[operator]
    return x.unflatten(0, (steps, a.shape[0]))


@torch.no_grad()
def reconstruction_error(flow: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """(B,) errors max |x − f⁻¹(f(x))|, of every example by itself: how well the inverse undoes the flow.

    A few units in the last place of ``x`` for a healthy flow. More means that a layer is ill-conditioned;
    :func:`inverse_flow.reversible.reconstruction_errors` goes through the layers.
    """
    latents, _ = flow(x, context)
    again: Tensor = flow.inverse(latents, context)[0]  # type: ignore[operator]
    return (again - x).abs().flatten(1).amax(1)
