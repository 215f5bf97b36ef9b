r"""The problems that the operators do not know, as views of those they do: signals, and dilated ones.

A signal is an image of one row. With dilation d taps lie d pixels apart, so that the pixels of each residue class
modulo d form an image of their own, and those of all classes a batch: a dilated solve is a plain one of more and
smaller images, and needs no kernel. Where the strides let that batch be seen in the memory that is there, as with one
dilated axis of one image, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.ops import autograd
from inverse_flow.ops.causal import per_channel, sum_channels
from inverse_flow.ops.checks import check_arguments
from inverse_flow.ops.spec import PerAxis, Spec, each_axis


def solve(input: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec, dilation: PerAxis = 1) -> Tensor:
    """:func:`inverse_flow.ops.autograd.solve` for signals (B, C, L), images and volumes, with dilation."""
    if type(dilation) is int and dilation == 1 and weight.dim() > 3:
        return autograd.solve(input, weight, bias, spec)
    dilation = dilation_within(dilation, input.shape[2:])
    images = input
    if bias is not None and _is_padded(input, dilation):
        # The zeros behind the last pixels must be so without the bias. What the operator would refuse, this would cast
        # and broadcast.
        check_arguments(input, weight, bias, len(spec.orders), len(dilation))
        wide = torch.promote_types(input.dtype, torch.float32)
        images, weight, bias = input.to(wide) - per_channel(bias.to(wide), input), weight.to(wide), None
    output = autograd.solve(_apart(images, dilation), _as_image(weight), bias, spec)
    return _together(output, input, dilation).to(input.dtype)


def solve_backward(
    grad_output: Tensor, output: Tensor, weight: Tensor, spec: Spec, dilation: PerAxis = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`inverse_flow.ops.autograd.solve_backward` for the same."""
    if type(dilation) is int and dilation == 1 and weight.dim() > 3:
        return autograd.solve_backward(grad_output, output, weight, spec)
    dilation = dilation_within(dilation, output.shape[2:])
    grad_input, grad_weight, _ = autograd.solve_backward(
        _apart(grad_output, dilation), _apart(output, dilation), _as_image(weight), spec
    )
    grad_input = _together(grad_input, grad_output, dilation)
    return grad_input, grad_weight.view(weight.shape), -sum_channels(grad_input, weight.dtype)


def dilation_within(dilation: PerAxis, sizes: Sequence[int]) -> tuple[int, ...]:
    """The dilation along every axis, for images of these sizes. Taps that lie further apart than the image is wide meet
    nothing but the pixel itself, as they do at its width, which takes less memory."""
    distances = each_axis("dilation", dilation, len(sizes))
    # A program with open sizes, which are no plain numbers, is not bound to some of them by this.
    return tuple(min(d, size) if type(size) is int and size else d for d, size in zip(distances, sizes, strict=True))


def _as_image(tensor: Tensor) -> Tensor:
    """(B, C, L) as (B, C, 1, L); images and volumes as they are."""
    return tensor.unsqueeze(-2) if tensor.dim() == 3 else tensor


def _is_padded(images: Tensor, dilation: Sequence[int]) -> bool:
    return any(size % d for size, d in zip(images.shape[2:], dilation, strict=True))


def _apart(images: Tensor, dilation: Sequence[int]) -> Tensor:
    """Every residue class of pixels as an image of the batch: (B · d_H · d_W, C, ⌈H / d_H⌉, ⌈W / d_W⌉).

    Where the sizes are no multiples of the dilation, zeros follow. They change no other pixel, whatever the order:
    those that come first solve to zeros, and those that come last are read by none.
    """
    if max(dilation) == 1:
        return _as_image(images)
    if _is_padded(images, dilation):
        margins = [-size % d for size, d in zip(images.shape[2:], dilation, strict=True)]
        images = F.pad(images, [size for margin in reversed(margins) for size in (0, margin)])
    n = len(dilation)
    for axis, d in enumerate(dilation):
        place = 2 + 2 * axis
        images = images.unflatten(place, (images.shape[place] // d, d))
    # From (B, C, H / d_H, d_H, W / d_W, d_W).
    residues, pixels = range(3, 3 + 2 * n, 2), range(2, 2 + 2 * n, 2)
    return _as_image(images.permute(0, *residues, 1, *pixels).flatten(0, n))


def _together(images: Tensor, like: Tensor, dilation: Sequence[int]) -> Tensor:
    """What :func:`_apart` made of a tensor ``like`` this, put together again, channels last where ``like`` is."""
    n = len(dilation)
    if n == 1:
        images = images.squeeze(-2)
    if max(dilation) == 1:
        return images
    images = images.unflatten(0, (like.shape[0], *dilation))
    # Each axis of ``like`` as the axes of what is there now, (B, d_H, d_W, C, H / d_H, W / d_W).
    parts = [(0,), (n + 1,), *((n + 2 + axis, 1 + axis) for axis in range(n))]
    channels_last = like.stride(1) < like.stride(-1)
    in_memory = [0, *range(2, n + 2), 1] if channels_last else list(range(n + 2))
    images = images.permute([part for axis in in_memory for part in parts[axis]])
    for place, axis in enumerate(in_memory):
        images = images.flatten(place, place + len(parts[axis]) - 1).narrow(place, 0, like.shape[axis])
    return images.contiguous().permute([in_memory.index(axis) for axis in range(n + 2)])
