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
        preconditioned: by the two solves.
        tolerance, max_iterations, restart: of :func:`inverse_flow.ops.krylov.gmres`.
        transposed: Aᵀ in place of A.
        given: what stands on the right, for errors.
    """

    groups: int
    tikhonov: float
    preconditioned: bool
    tolerance: float
    max_iterations: int
    restart: int
    transposed: bool = False
    given: str = "input"

    def adjoint(self) -> System:
        """That of the transposed system, which AᵀA + λI is itself."""
        return self._replace(transposed=not (self.transposed or self.tikhonov), given="the gradient")


class Convolution(torch.autograd.Function):
    """``apply(images, weight, padding, groups) -> images``: ``F.conv2d`` in full precision, with all its derivatives.

    That a GPU must not round to TF32 is said with the call, and not by a flag, which all threads share and which is
    another one by the time of the backward pass. A convolution is linear in both arguments, so its derivatives of every
    order are convolutions.
    """

    @staticmethod
    def forward(images: Tensor, weight: Tensor, padding: tuple[int, int], groups: int) -> Tensor:
        cudnn = torch.backends.cudnn
        deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        with without_autocast(images.device.type):
            result: Tensor = torch._convolution(
                images, weight, None, (1, 1), padding, (1, 1), False, (0, 0), groups,
                benchmark=cudnn.benchmark, deterministic=deterministic, cudnn_enabled=cudnn.enabled, allow_tf32=False,
            )  # fmt: skip
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, weight, ctx.padding, ctx.groups = inputs
        ctx.save_for_backward(images, weight)
        ctx.save_for_forward(images, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (images, weight), padding, groups = ctx.saved_tensors, ctx.padding, ctx.groups
        grad_images = grad_weight = None
        if ctx.needs_input_grad[0]:
            rest = weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1]
            grad_images = Convolution.apply(grad, transpose(weight, groups), rest, groups)
        if ctx.needs_input_grad[1]:
            grad_weight = correlate(images, grad, padding, groups)
        return grad_images, grad_weight, None, None

    @staticmethod
    def jvp(ctx: Any, images_tangent: Tensor | None, weight_tangent: Tensor | None, *_: None) -> Tensor:
        (images, weight), options = ctx.saved_tensors, (ctx.padding, ctx.groups)
        moved = torch.zeros_like(images) if images_tangent is None else images_tangent
        tangent: Tensor = Convolution.apply(moved, weight, *options)
        return tangent if weight_tangent is None else tangent + Convolution.apply(images, weight_tangent, *options)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], images: Tensor, weight: Tensor, padding: tuple[int, int], groups: int
    ) -> tuple[Tensor, int]:
        size, (images_dim, weight_dim, *_) = info.batch_size, in_dims
        if weight_dim is None:
            images = images.movedim(images_dim, 0)
            return Convolution.apply(images.flatten(0, 1), weight, padding, groups).unflatten(0, images.shape[:2]), 0
        output = Convolution.apply(
            autograd.into_channels(images, images_dim, size, 1), autograd.into_channels(weight, weight_dim, size, 0),
            padding, size * groups,
        )  # fmt: skip
        return output.unflatten(1, (size, -1)), 1


def convolve(images: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A(w) x: the convolution with the padding called "same"."""
    result: Tensor = Convolution.apply(images, weight, _centre(weight), groups)
    return result


def correlate(images: Tensor, grads: Tensor, padding: tuple[int, int], groups: int) -> Tensor:
    """The gradient of a convolution's weight, Σ over the batch and the pixels of ``images`` times ``grads``: itself a
    convolution, in which the channels are the batch and the batch is the channels."""
    if not len(images):  # no convolution takes images without channels
        sizes = (a + 2 * p - b + 1 for a, b, p in zip(images.shape[2:], grads.shape[2:], padding, strict=True))
        return images.new_zeros(grads.shape[1], images.shape[1] // groups, *sizes)
    swapped = images.unflatten(1, (groups, -1)).permute(2, 1, 0, 3, 4).flatten(1, 2)
    result: Tensor = Convolution.apply(swapped, grads.transpose(0, 1), padding, groups)
    return result.transpose(0, 1)


def transpose(weight: Tensor, groups: int) -> Tensor:
    """The kernel of Aᵀ."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)


def _centre(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2


def apply(images: Tensor, weight: Tensor, system: System) -> Tensor:
    """The system's matrix S times x."""
    if system.tikhonov:
        there = convolve(images, weight, system.groups)
        return convolve(there, transpose(weight, system.groups), system.groups) + system.tikhonov * images
    return convolve(images, transpose(weight, system.groups) if system.transposed else weight, system.groups)


def apply_change(images: Tensor, weight: Tensor, change: Tensor, system: System) -> Tensor:
    """Ṡ x for a change ẇ of the weight; with Tikhonov's term (AᵀȦ + ȦᵀA) x."""
    if not system.tikhonov:
        return apply(images, change, system)

    def through(first: Tensor, second: Tensor) -> Tensor:
        return convolve(convolve(images, first, system.groups), transpose(second, system.groups), system.groups)

    return through(change, weight) + through(weight, change)


def weight_gradient(images: Tensor, by: Tensor, weight: Tensor, system: System) -> Tensor:
    """∂⟨u, S x⟩/∂w; with Tikhonov's term that of ⟨A u, A x⟩."""
    options = _centre(weight), system.groups
    if system.tikhonov:
        image_there, by_there = (convolve(one, weight, system.groups) for one in (images, by))
        return correlate(images, by_there, *options) + correlate(by, image_there, *options)
    return correlate(by, images, *options) if system.transposed else correlate(images, by, *options)


def kernel(weight: Tensor, system: System) -> Tensor:
    """That of the system's matrix, away from the borders."""
    if not system.tikhonov:
        return transpose(weight, system.groups) if system.transposed else weight
    reach = weight.shape[2] - 1, weight.shape[3] - 1
    by_output = weight.unflatten(0, (system.groups, -1)).transpose(0, 1).flatten(1, 2)
    found = correlate(by_output, by_output, reach, system.groups)
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
        ValueError: values that are not finite; the centre tap is singular, and so no preconditioner.
        torch.linalg.LinAlgError: it did not converge.
    """
    for name, values in {"weight": weight, system.given: right}.items():
        bad = values[~values.isfinite()]
        if len(bad):
            raise ValueError(f"{name} must be finite, got {float(bad[0])} among its values")
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
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the system with {system.given} on the right is not solved to the tolerance {system.tolerance:.1e} for "
            f"{int(failed.sum())} of {len(right)} images, after {int(found.iterations[failed].max())} iterations; the "
            f"largest relative residual is "
            f"{float(worst[worst.isnan().long().argmax()] if worst.isnan().any() else worst.max()):.1e}. "
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
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (x, weight), system = ctx.saved_tensors, ctx.system
        u = Solve.apply(grad, weight, system.adjoint())[0]
        return u, -weight_gradient(x, u, weight, system) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(
        ctx: Any, right_tangent: Tensor | None, weight_tangent: Tensor | None, _: None
    ) -> tuple[Tensor, None, None]:
        """ẋ = S⁻¹(ẏ − Ṡ x)"""
        (x, weight), system = ctx.saved_tensors, ctx.system
        right = torch.zeros_like(x) if right_tangent is None else right_tangent
        if weight_tangent is not None:
            right = right - apply_change(x, weight, weight_tangent, system)
        return Solve.apply(right, weight, system._replace(given="the tangent"))[0], None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], right: Tensor, weight: Tensor, system: System
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        right_dim, weight_dim, _ = in_dims
        right = right.expand(info.batch_size, *right.shape) if right_dim is None else right.movedim(right_dim, 0)
        found: Any
        if weight_dim is None:
            found = Solve.apply(right.flatten(0, 1), weight, system)
            return tuple(values.unflatten(0, right.shape[:2]) for values in found), (0, 0, 0)
        # Systems of their own, since images stop by themselves.
        found = [Solve.apply(*one, system) for one in zip(right, weight.movedim(weight_dim, 0), strict=True)]
        return tuple(map(torch.stack, zip(*found, strict=True))), (0, 0, 0)
