r"""Public functions: the causal convolution A(w) and its inverse, of signals, images and volumes; and the inverse of a
convolution with any kernel, by iterations.

Nagar & Varma, *Parallel Backpropagation for Inverse of a Convolution with Application to Normalizing Flows*,
AISTATS 2025 (arXiv 2410.14634).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inverse_flow.ops import autograd, centred, native, views
from inverse_flow.ops import library as ops
from inverse_flow.ops.causal import convolve, effective_weight, per_channel
from inverse_flow.ops.checks import check_arguments
from inverse_flow.ops.spec import OrderNames, PerAxis, check_integer, check_number, make_spec

__all__ = [
    "causal_conv1d",
    "causal_conv2d",
    "causal_conv3d",
    "inverse_conv1d",
    "inverse_conv2d",
    "inverse_conv3d",
    "solve_conv2d",
]

# The relative residual at which iterations stop unless another is given.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


class Solution(NamedTuple):
    """What :func:`solve_conv2d` returns.

    Attributes:
        x: of the shape and dtype of ``input``.
        iterations: that each image took, (B,).
        residual: the relative residual of each image, (B,), at most ``tolerance``.
        tolerance: the one that was asked for.
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor
    tolerance: float


def inverse_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    r"""Solves A(w) x + b = y for signals x: the inverse of :func:`causal_conv1d` with the same arguments.

    .. math:: x_i = M^{-1}\Big(y_i - b - \sum_{p > 0} W_p\, x_{i-p}\Big), \qquad W_p = w_{\cdot,\cdot,k-1-p}

    for ``left``: the all-pole filter of many channels. With one channel it is ``scipy.signal.lfilter`` with the
    numerator 1 and the taps, last first, as the denominator.

    ``order`` is the end where the recurrence starts: ``"left"``, ``"right"`` (an anticausal filter), or a sequence of
    one name for each group. Everything else is as with :func:`inverse_conv2d`.

    Shape:
        y and x are (B, C, L), or (C, L) for one signal alone; w is (C, C / groups, k).
    """
    return _inverse(1, input, weight, bias, order, groups, dilation, corner)


def inverse_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    r"""Solves A(w) x + b = y for x: the inverse of :func:`causal_conv2d` with the same arguments.

    .. math:: x_p = M^{-1}\Big(y_p - b - \sum_{\delta \ne 0} W_\delta\, x_{p-\delta}\Big)

    with M the corner tap, the one that meets the output pixel itself (for ``top_left``
    ``weight[:, :, kH-1, kW-1]``). The state is float32 (float64 for float64 images), also for bfloat16 and float16
    images. The backward pass is one transposed solve and one weight-gradient pass. The result can be differentiated
    any number of times in reverse mode, and once more in forward mode on top (``torch.func.hessian``).

    On a GPU, layers of 9 channels per group or more, with 3 × 3 taps of 13 or more, use tensor cores, to the accuracy
    of float32; so do weight gradients of 16 or more. Products are rounded to TF32, three digits less, where both of
    PyTorch's switches allow it: ``torch.backends.cudnn.conv.fp32_precision`` is ``"tf32"`` by default, and
    ``torch.set_float32_matmul_precision("high")`` sets the other, ``torch.backends.cuda.matmul.fp32_precision``. They
    are read in the forward pass, whose derivatives do the same; by ``torch.compile`` once, when it compiles.

    Args:
        input: y, of shape (B, C, H, W), or (C, H, W) for one image alone; float32, float64, bfloat16 or float16; any
            strides.
        weight: w, of shape (C, C / groups, kH, kW); the dtype of ``input``, or float32 beside half precision.
        bias: b, of shape (C,) and of the weight's dtype.
        order: the corner of the image the recurrence starts from: ``"top_left"``, ``"top_right"``,
            ``"bottom_left"``, ``"bottom_right"``, or a sequence of one name for each group.
        groups: the number of channel groups.
        dilation: the distance of neighbouring taps, one integer or one for each axis. The pixels of each residue class
            are then an image of their own: the same solve of more and smaller images.
        corner: what is read of M: ``"general"`` (all of it), ``"unit_triangular"`` (its strictly lower part, with
            ones on the diagonal) or ``"identity"`` (nothing).

    Returns:
        x, of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError: an argument is not a tensor or not floating.
        ValueError: shapes, dtypes, ``order``, ``groups``, ``dilation`` or ``corner`` do not fit, or (on the CPU) M is
            singular. On a GPU a singular M gives NaN instead, since finding it would need a synchronisation.
        RuntimeError: the tensors lie on different devices, or on a device the library was not built for; or memory is
            short, with the bytes that were asked for.
        NotImplementedError: forward mode inside forward mode, for which PyTorch would give zeros.
    """
    return _inverse(2, input, weight, bias, order, groups, dilation, corner)


def inverse_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "front_top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    r"""Solves A(w) x + b = y for volumes x: the inverse of :func:`causal_conv3d` with the same arguments.

    .. math:: x_p = M^{-1}\Big(y_p - b - \sum_{\delta \ne 0} W_\delta\, x_{p-\delta}\Big)

    ``order`` is the corner of the volume where the recurrence starts: ``"front_top_left"``, ``"front_top_right"``,
    ``"front_bottom_left"``, ``"front_bottom_right"``, the same with ``"back"``, or a sequence of one name for each
    group. Everything else is as with :func:`inverse_conv2d`.

    Shape:
        y and x are (B, C, D, H, W), or (C, D, H, W) for one volume alone; w is (C, C / groups, kD, kH, kW).
    """
    return _inverse(3, input, weight, bias, order, groups, dilation, corner)


def solve_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    tikhonov: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int = 500,
    restart: int = 50,
    preconditioned: bool = True,
) -> Solution:
    r"""Solves A x + b = y where A is any convolution of odd size with the usual padding, by iterations.

    .. math:: (A x)_{o,i,j} = \sum_{c,p,q} w_{o,c,p,q}\, x_{c,\,i+p-\lfloor k_H/2 \rfloor,\,j+q-\lfloor k_W/2 \rfloor}

    that is ``F.conv2d(x, w, padding="same", groups=groups)``. No order makes such a matrix triangular, so this is GMRES
    with restarts, for which the solves of two quadrants of the kernel are the preconditioner:
    (D + L) D⁻¹ (D + U), with D the centre tap, D + L the taps above and to the left of it, and D + U those below and to
    the right (or those on the other diagonal, where they are larger), one :func:`inverse_conv2d` each. Each image stops
    on its own residual. Where a kernel has a causal form, :func:`inverse_conv2d` is exact and faster by far.

    With ``tikhonov`` λ > 0, for kernels that are singular or nearly so, x is what minimises ‖A x + b − y‖² + λ‖x‖²: the
    solution of (AᵀA + λI) x = Aᵀ(y − b), which is unique for every kernel. The residual is that of this equation.

    The backward pass is the same solve of the transposed system, to the same tolerance; derivatives of every order are
    made of such solves, in forward mode too. Under ``torch.func.vmap`` samples that share a weight are one batch, and
    those with weights of their own are solved one after the other. GMRES reads values: a GPU is waited for at each
    iteration, and graphs are not captured.

    Args:
        input: y, of shape (B, C, H, W), or (C, H, W) for one image alone; float32 or float64; any strides.
        weight: w, of shape (C, C / groups, kH, kW), both sizes odd; the dtype of ``input``.
        bias: b, of shape (C,) and of the weight's dtype.
        groups: the number of channel groups.
        tikhonov: λ.
        tolerance: the relative residual ‖y − b − A x‖ / ‖y − b‖ to reach, 1e-5 for float32 and 1e-10 for float64 unless
            given.
        max_iterations: the most for each image.
        restart: iterations between restarts. Memory is that of as many copies of ``input``, but of no more than there
            are iterations, or values in an image; hard problems are slower with few.
        preconditioned: False leaves the preconditioner out, which kernels need whose centre tap is small beside the
            others: the two solves then grow without bound.

    Returns:
        x with the iterations and the residual of each image, and the tolerance.

    Raises:
        TypeError: an argument is not a tensor, or neither float32 nor float64; a number of another kind.
        ValueError: shapes, dtypes or ``groups`` do not fit; a kernel of even size; ``tikhonov`` or ``tolerance`` below
            0, ``max_iterations`` or ``restart`` below 1; values, or gradients, that are not finite; the centre tap is
            singular and the preconditioner asked for.
        RuntimeError: the tensors lie on different devices, or on the meta device, which has no values.
        torch.linalg.LinAlgError: an image did not reach the tolerance, here or in the backward pass.
        NotImplementedError: forward mode inside forward mode, as :func:`inverse_conv2d`.
    """
    for name, value in {"groups": groups, "max_iterations": max_iterations, "restart": restart}.items():
        check_integer(name, value)
    check_arguments(input, weight, bias, groups, batched=False)
    native.check_device(input.device)
    if input.is_meta:
        raise RuntimeError("GMRES reads values, of which tensors on the meta device have none")
    if input.dtype not in TOLERANCES:
        raise TypeError(f"input must be float32 or float64, got {input.dtype}")
    if not all(size % 2 for size in weight.shape[2:]):
        raise ValueError(f"a kernel must have odd sizes, so that it has a centre, got {tuple(weight.shape[2:])}")
    chosen = TOLERANCES[input.dtype] if tolerance is None else tolerance
    for name, number in {"tikhonov": tikhonov, "tolerance": chosen}.items():
        check_number(name, number)
    if not 0 <= tikhonov < math.inf:
        raise ValueError(f"tikhonov must be at least 0 and finite, got {tikhonov}")
    if not 0 <= chosen < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")
    autograd.in_forward_mode()
    images = input if input.dim() == 4 else input[None]
    if bias is not None:
        images = images - per_channel(bias, images)
    if tikhonov:
        images = centred.convolve(images, centred.transpose(weight, groups), groups)
    given = "input" if bias is None else "input − bias"
    system = centred.System(groups, float(tikhonov), preconditioned, chosen, max_iterations, restart, given=given)
    x, iterations, residual = centred.Solve.apply(images, weight, system)
    return Solution(x if input.dim() == 4 else x[0], iterations, residual, chosen)


def causal_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    r"""Computes A(w) x + b for signals: a convolution padded at one end alone, the side of the order.

    .. math:: y_{b,o,i} = b_o + \sum_{c,p} w_{o,c,k-1-p}\, x_{b,c,i-p}

    for ``left``, that is ``F.conv1d(F.pad(x, (k-1, 0)), w, b, groups=groups)``. Arguments and shapes are those of
    :func:`inverse_conv1d`; everything else is as with :func:`causal_conv2d`.
    """
    return _causal(1, input, weight, bias, order, groups, dilation, corner)


def causal_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    r"""Computes A(w) x + b: a convolution padded on the side of the order's corner alone.

    .. math:: y_{b,o,i,j} = b_o + \sum_{c,p,q} w_{o,c,k_H-1-p,k_W-1-q}\, x_{b,c,i-p,j-q}

    for ``top_left``, that is ``F.conv2d(F.pad(x, (kW-1, 0, kH-1, 0)), w, b, groups=groups)``; the other orders
    mirror the image. Runs on any device PyTorch's convolution runs on. Under autocast the dtypes given are kept.

    Args, Returns and Raises are those of :func:`inverse_conv2d`, except that M may be singular.
    """
    return _causal(2, input, weight, bias, order, groups, dilation, corner)


def causal_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: OrderNames = "front_top_left",
    groups: int = 1,
    dilation: PerAxis = 1,
    corner: str = "general",
) -> Tensor:
    r"""Computes A(w) x + b for volumes: a convolution padded on the side of the order's corner alone.

    .. math:: y_{b,o,h,i,j} = b_o
              + \sum_{c,r,p,q} w_{o,c,k_D-1-r,k_H-1-p,k_W-1-q}\, x_{b,c,h-r,i-p,j-q}

    for ``front_top_left``. Arguments and shapes are those of :func:`inverse_conv3d`; everything else is as with
    :func:`causal_conv2d`.
    """
    return _causal(3, input, weight, bias, order, groups, dilation, corner)


def _inverse(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: OrderNames,
    groups: int,
    dilation: PerAxis,
    corner: str,
) -> Tensor:
    spec = make_spec(order, groups, corner, dimensions, ops.allows_tf32(input))
    try:
        if input.dim() == dimensions + 2:
            return views.solve(input, weight, bias, spec, dilation)
        check_arguments(input, weight, bias, groups, dimensions, batched=False)
        return views.solve(input[None], weight, bias, spec, dilation)[0]
    except Exception as error:
        # The operator checks its arguments by itself. These checks say what is wrong more clearly, and cost nothing
        # where nothing is.
        check_arguments(input, weight, bias, groups, dimensions, batched=False)
        native.check_device(input.device)
        if "the corner tap is singular" in str(error):
            raise ValueError(str(error).splitlines()[0]) from error
        if str(error).startswith("out of memory"):
            raise RuntimeError(str(error).splitlines()[0]) from error
        raise


def _causal(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: OrderNames,
    groups: int,
    dilation: PerAxis,
    corner: str,
) -> Tensor:
    spec = make_spec(order, groups, corner, dimensions)
    check_arguments(input, weight, bias, groups, dimensions, batched=False)
    distances = views.dilation_within(dilation, input.shape[-dimensions:])
    batch = input if input.dim() == dimensions + 2 else input[None]
    output = convolve(batch, effective_weight(weight, spec), spec, distances)
    if bias is not None:
        output = output + per_channel(bias.to(output.dtype), output)
    return output if batch is input else output[0]
