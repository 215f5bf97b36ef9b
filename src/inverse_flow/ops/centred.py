r"""Convolutions with the usual padding, whose kernels have no causal form, and their inverses by GMRES.

The matrix A of such a convolution has taps on all sides of the pixel itself, so that no order makes it triangular. The
quadrants of its kernel towards two opposite corners, each with the centre tap D, do have solves of ours: D + L from one
corner, D + U from the other. Their product is the preconditioner, the symmetric Gauss–Seidel method's,

.. math:: (D + L)\, D^{-1} (D + U) = D + L + U + L D^{-1} U,

in which the taps of the other two quadrants come from the last term alone: right for a separable kernel up to a
factor, and missing for others.

With Tikhonov's term λ the system is AᵀA + λI, whose kernel is the autocorrelation of w with λ in its centre, and which
is preconditioned by the same two solves of that kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.ops import autograd
from inverse_flow.ops.causal import without_autocast
from inverse_flow.ops.krylov import Found, Map, gmres
from inverse_flow.ops.spec import make_spec


class System(NamedTuple):
    """Which linear system is solved, and how far.

    Attributes:
        groups: of channels.
        tikhonov: λ; the system is A for 0, AᵀA + λI for more.
        transposed: Aᵀ in place of A.
        preconditioned: by the two solves.
        tolerance, max_iterations, restart: of :func:`inverse_flow.ops.krylov.gmres`.
    """

    groups: int
    tikhonov: float
    preconditioned: bool
    tolerance: float
    max_iterations: int
    restart: int
    transposed: bool = False

    def adjoint(self) -> System:
        """That of the transposed system; AᵀA + λI is its own."""
        return self if self.tikhonov else self._replace(transposed=not self.transposed)


def convolve(images: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A(w) x: PyTorch's convolution with the padding called "same", in full precision."""
    exact = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False
    )
    with without_autocast(images.device.type), exact:
        return F.conv2d(images, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=groups)


def transpose(weight: Tensor, groups: int) -> Tensor:
    """The kernel of Aᵀ."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)


def apply(images: Tensor, weight: Tensor, system: System) -> Tensor:
    """The system's matrix times x."""
    if system.tikhonov:
        there = convolve(images, weight, system.groups)
        return convolve(there, transpose(weight, system.groups), system.groups) + system.tikhonov * images
    return convolve(images, transpose(weight, system.groups) if system.transposed else weight, system.groups)


def kernel(weight: Tensor, system: System) -> Tensor:
    """That of the system's matrix, away from the borders."""
    if not system.tikhonov:
        return transpose(weight, system.groups) if system.transposed else weight
    reach = weight.shape[2] - 1, weight.shape[3] - 1
    by_input = weight.unflatten(0, (system.groups, -1)).transpose(1, 2)
    found = torch.cat([F.conv2d(taps, taps, padding=reach).transpose(0, 1) for taps in by_input])
    centre = found[:, :, reach[0], reach[1]].unflatten(0, (system.groups, -1))
    centre.diagonal(dim1=1, dim2=2).add_(system.tikhonov)
    return found


def gauss_seidel(taps: Tensor, groups: int) -> Map:
    """r ↦ (D + U)⁻¹ D (D + L)⁻¹ r for a kernel, whose centre tap D must be invertible.

    Of the two pairs of opposite corners it is the one whose quadrants are larger: a blur along one diagonal has nothing
    in the others.
    """
    rows, columns = taps.shape[2] // 2, taps.shape[3] // 2
    sides = (
        {"top": slice(rows + 1), "bottom": slice(rows, None)},
        {"left": slice(columns + 1), "right": slice(columns, None)},
    )
    quadrants = {f"{v}_{h}": taps[:, :, sides[0][v], sides[1][h]].contiguous() for v in sides[0] for h in sides[1]}
    pairs = ("top_left", "bottom_right"), ("top_right", "bottom_left")
    first, second = max(pairs, key=lambda pair: sum(float(quadrants[corner].square().sum()) for corner in pair))
    centre = taps[:, :, rows, columns, None, None]
    specs = {corner: make_spec(corner, groups, "general") for corner in (first, second)}

    def precondition(images: Tensor) -> Tensor:
        half = autograd.solve(images, quadrants[first], None, specs[first])
        return autograd.solve(convolve(half, centre, groups), quadrants[second], None, specs[second])

    return precondition


def find(right: Tensor, weight: Tensor, system: System) -> Found:
    """GMRES of the system.

    Raises:
        torch.linalg.LinAlgError: it did not converge.
        ValueError: the centre tap is singular, and so no preconditioner.
    """
    try:
        with without_autocast(right.device.type):
            precondition = gauss_seidel(kernel(weight, system), system.groups) if system.preconditioned else _unchanged
            found = gmres(
                lambda images: apply(images, weight, system), right, precondition, tolerance=system.tolerance,
                max_iterations=system.max_iterations, restart=system.restart,
            )  # fmt: skip
    except RuntimeError as error:
        if "the corner tap is singular" not in str(error):
            raise
        raise ValueError(
            "the centre tap is singular, and so is the preconditioner: use tikhonov > 0 or preconditioned=False"
        ) from error
    failed = ~(found.residual <= system.tolerance)
    if failed.any():
        worst = found.residual[failed]
        which = "transposed system, of the gradient," if system.transposed else "system"
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the {which} is not solved to the tolerance {system.tolerance:.1e} for {int(failed.sum())} of "
            f"{len(right)} images, after {int(found.iterations[failed].max())} iterations; the largest relative "
            f"residual is {float(worst[worst.isnan().long().argmax()] if worst.isnan().any() else worst.max()):.1e}. "
            f"{_advice(system, bool(worst.isfinite().all()))}"
        )
    return found


def _unchanged(images: Tensor) -> Tensor:
    return images


def _advice(system: System, is_finite: bool) -> str:
    advice = ["a larger tolerance or max_iterations"] if is_finite else []
    if not system.tikhonov:
        advice.append("tikhonov > 0, which is what a singular kernel needs")
    if system.preconditioned:
        advice.append("preconditioned=False, where solves from the corners grow")
    return f"What can help: {'; '.join(advice)}."


class Solve(torch.autograd.Function):
    """``apply(right, weight, system) -> (x, iterations, residual)``; its backward is another, of the transposed system,
    so that derivatives of every order need nothing else."""

    @staticmethod
    def forward(right: Tensor, weight: Tensor, system: System) -> Found:
        return find(right, weight, system)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
        _, weight, ctx.system = inputs
        x, iterations, residual = output
        ctx.mark_non_differentiable(iterations, residual)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (x, weight), system = ctx.saved_tensors, ctx.system
        u = Solve.apply(grad, weight, system.adjoint())[0]
        if not ctx.needs_input_grad[1]:
            return u, None, None
        # ∂L/∂w = −⟨u, (∂A/∂w) x⟩ with x held fixed: it depends on `weight`, but not on `alias`.
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            alias = weight.view_as(weight)
            (grad_weight,) = torch.autograd.grad(apply(x, alias, system), alias, -u, create_graph=differentiable)
        return u, grad_weight, None
