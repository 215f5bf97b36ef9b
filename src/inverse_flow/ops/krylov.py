"""GMRES with restarts, preconditioned from the right, of a batch whose members each stop on their own residual.

Saad & Schultz, "GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear Systems", 1986.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

# A restart after which the residual is at least this part of what it was has brought nothing, nor would the next.
STALLED = 0.999


class Found(NamedTuple):
    """What GMRES returns.

    Attributes:
        x: of the shape of the right-hand side.
        iterations: products with the matrix that each member of the batch needed, (B,).
        residual: ‖b − A x‖ / ‖b‖ of each, (B,), computed from x; 0 where b is.
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor


def gmres(
    apply: Map, right: Tensor, precondition: Map, *, tolerance: float, max_iterations: int, restart: int
) -> Found:
    """Solves A x = b, as far as ``max_iterations`` go; whether they went far enough is seen in the residual.

    Args:
        apply: A, linear, of (B, ...).
        right: b, (B, ...), one right-hand side for each member of the batch.
        precondition: about A⁻¹, linear.
        tolerance: a member is solved when its residual is no larger.
        max_iterations: at most so many products with A for each member.
        restart: steps between restarts: so many vectors are kept, and one more. More than there are unknowns would be
            of no use, and are not taken.
    """
    # Of values near 1, whose squares neither vanish nor overflow: scaled by powers of two, which rounds nothing.
    largest = right.flatten(1).norm(math.inf, dim=1)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    unit = torch.where((largest > 0) & largest.isfinite(), unit, 1).view(-1, *(1,) * (right.dim() - 1))
    right = right / unit
    size = right.flatten(1).norm(dim=1)
    x, residual, norm = torch.zeros_like(right), right.clone(), size.clone()
    iterations = torch.zeros(len(right), dtype=torch.long, device=right.device)
    goal = tolerance * size
    active, spent, unknowns = (norm > goal).nonzero()[:, 0], 0, right[:1].numel()
    while len(active) and spent < max_iterations:
        length = min(restart, max_iterations - spent, unknowns)
        update, steps = _cycle(apply, precondition, residual[active], goal[active], length)
        x[active] += update
        iterations[active] += steps
        residual[active] = right[active] - apply(x[active])
        before, now = norm[active], residual[active].flatten(1).norm(dim=1)
        norm[active] = now
        # Comparisons with NaN are false: a member that overflowed is given up.
        active, spent = active[(now > goal[active]) & (now < STALLED * before)], spent + length
    return Found(x * unit, iterations, norm / size.masked_fill(size == 0, 1))


def _cycle(apply: Map, precondition: Map, residual: Tensor, goal: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What to add to x, and the steps that each member took: those between two restarts."""
    (batch, *shape), start = residual.shape, residual.flatten(1).norm(dim=1)
    basis = residual.new_zeros(batch, length + 1, residual[0].numel())
    basis[:, 0] = residual.flatten(1) / start[:, None]
    hessenberg = residual.new_zeros(batch, length + 1, length)
    # The vector that is orthogonal to the columns of the Hessenberg matrix, first entry 1: the residual that is left is
    # the part of the right-hand side along it.
    normal = residual.new_zeros(batch, length + 1)
    normal[:, 0] = 1
    steps = torch.zeros(batch, dtype=torch.long, device=residual.device)
    is_open = torch.ones(batch, dtype=torch.bool, device=residual.device)
    rounding = torch.finfo(residual.dtype).eps
    for k in range(length):
        vector = apply(precondition(basis[:, k].view(batch, *shape))).flatten(1)
        whole = vector.norm(dim=1)
        for _ in range(2):  # once leaves the basis orthogonal to half the digits only
            along = basis[:, : k + 1] @ vector[:, :, None]
            vector = vector - (basis[:, : k + 1].mT @ along)[:, :, 0]
            hessenberg[:, : k + 1, k] += along[:, :, 0]
        height = vector.norm(dim=1)
        # What is left of rounding alone is nothing: the member is solved exactly.
        height = height.masked_fill(height <= 4 * rounding * whole, 0)
        normal[:, k + 1] = -(normal[:, : k + 1] * hessenberg[:, : k + 1, k]).sum(1) / height
        left = start / normal[:, : k + 2].norm(dim=1)
        # A member that is solved goes on with zeros, whose columns of the Hessenberg matrix are those of the identity.
        hessenberg[:, k + 1, k] = torch.where(is_open, height, 1)
        steps += is_open
        is_open = is_open & (height > 0) & (left > goal)
        basis[:, k + 1] = torch.where(is_open[:, None], vector / height[:, None], 0)
        if not is_open.any():
            break
    right = residual.new_zeros(batch, k + 2, 1)
    right[:, 0, 0] = start
    # A member that overflowed is NaN, and the others go on.
    lost = ~hessenberg.isfinite().flatten(1).all(1)[:, None, None]
    weights = torch.linalg.lstsq(hessenberg.masked_fill(lost, 0)[:, : k + 2, : k + 1], right).solution
    combined = basis.masked_fill(lost, 0)[:, : k + 1].mT @ weights
    return precondition(combined.masked_fill(lost, torch.nan).view(batch, *shape)), steps
