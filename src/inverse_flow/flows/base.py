"""What every flow layer promises, and the few helpers that keep the promise in one way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from inverse_flow.ops.bijection import Bijection
from inverse_flow.ops.causal import per_channel, sum_channels
from inverse_flow.ops.checks import FLOAT_DTYPES, shape_of_images
from inverse_flow.reversible.layer import Shape, input_shape, output_shape

__all__ = [
    "FlowLayer",
    "Shape",
    "check_dtype",
    "check_floating",
    "check_images",
    "count_pixels",
    "expand_logdet",
    "first_half",
    "input_shape",
    "logdet_dtype",
    "may_wait_for",
    "output_shape",
    "per_channel",
    "per_example",
    "sum_channels",
    "sum_example",
    "zero_logdet",
]


class FlowLayer(Bijection, ABC):
    """A differentiable bijection z = f(x) of one example onto another, with its log-determinant.

    ``forward(x, context=None) -> (z, log|det dz/dx|)`` and ``inverse(z, context=None) -> (x, log|det dx/dz|)``.
    The log-determinant has shape (B,) even when it is zero, the dtype of the input but at least float32 (under
    autocast too), the input's device, and the sign of the direction that was called. Results have the dtype of the
    input. ``context`` is whatever the model is conditioned on; a layer that has no use for it ignores it.

    What else a layer is, it says by these members, of which this class has the defaults (a module that does not derive
    from it may have them or leave them out):

    - ``output_shape(shape)`` and ``input_shape(shape)``: the shape of z for one x of ``shape``, and of x for one z. The
      same shape unless overridden.
    - ``splits_off_latent``, False: whether ``forward`` gives a pair (x, latent) in place of z, and ``inverse`` takes
      one. With it ``output_shape`` and ``input_shape`` speak of x, and ``latent_shape(shape)`` of the latent.
    - ``uses_context``, True: whether the layer may use the context. A flow of layers none of which does refuses one.
    - ``links(inverse)``: only of a container: its layers as (path, layer, inverse), in the order in which they run.
    - ``backward_from_output(z, grad_z, grad_logdet, context=None) -> (x, grad_x)``: only where there is one: the closed
      form of the backward pass, from z = f(x) and the gradients of both results of ``forward`` to x and its gradient.
      With it :mod:`inverse_flow.reversible` does not run ``forward`` again. It is called without a graph. The layer's
      parameters, and a context whose gradient is wanted, are leaves meanwhile, and their gradients are added to their
      ``.grad``: :func:`~inverse_flow.reversible.backpropagate` does so. Inner modules, which ``forward`` runs, it has
      to run as often, on the same input.

    The last two are shortcuts: a subclass that replaces ``forward`` or ``inverse`` does not inherit them.

    Deriving from this class is a convenience: any module with these two methods can stand in a flow, as
    ``inverse_flow.InverseConv2d`` does.
    """

    splits_off_latent = False

    @property
    def uses_context(self) -> bool:
        """Whether the layer may use the context."""
        return True

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Any, Tensor]:
        """Data to latent: (z, log|det dz/dx|)."""

    @abstractmethod
    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: (x, log|det dx/dz|)."""

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of z for one x of ``shape``."""
        return shape

    def input_shape(self, shape: Shape) -> Shape:
        """Shape of x for one z of ``shape``."""
        return shape


def logdet_dtype(dtype: torch.dtype) -> torch.dtype:
    """A log-determinant adds thousands of terms, so it is never kept in half precision."""
    return torch.promote_types(dtype, torch.float32)


def zero_logdet(x: Tensor) -> Tensor:
    """(B,) zeros for the batch ``x``."""
    return x.new_zeros(x.shape[0], dtype=logdet_dtype(x.dtype))


def expand_logdet(logdet: Tensor, x: Tensor) -> Tensor:
    """One log-determinant, the same for every example of ``x``, as (B,)."""
    return logdet.to(logdet_dtype(x.dtype)).expand(x.shape[0])


def sum_example(values: Tensor) -> Tensor:
    """(B, ...) to (B,): the sum over everything but the batch."""
    return values.flatten(1).sum(1)


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """(B,) in a shape that broadcasts against ``x`` of shape (B, ...)."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def may_wait_for(x: Tensor) -> bool:
    """Whether a value may be looked at here: not while a graph is captured, and not under a transform or without
    values.
    """
    return not (
        torch.compiler.is_compiling()
        or x.is_meta
        or isinstance(x, FakeTensor)
        or torch._C._are_functorch_transforms_active()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def check_floating(layer: nn.Module, x: Tensor) -> None:
    """Refuses what is not a dense tensor of float32, float64, bfloat16 or float16."""
    name = type(layer).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} expects a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} expects one tensor, got a nested one: pass each of its tensors by itself")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} expects a dense tensor, got one of layout {x.layout}: call its to_dense() first")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} expects floating-point images, got {x.dtype}; dequantize or convert them first")


def check_dtype(network: nn.Module, x: Tensor) -> None:
    """Refuses what is not a tensor of a network's own dtype, unless autocast chooses one for both."""
    check_floating(network, x)
    if torch.compiler.is_compiling():
        return  # nothing of this is to be traced; the convolution refuses it too
    dtype = next(network.parameters()).dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{type(network).__name__} is in {dtype}, got {x.dtype}: convert one of them")


def check_images(
    layer: nn.Module,
    x: Tensor,
    channels: int | None = None,
    *,
    spatial: bool = False,
    dimensions: int | None = None,
) -> None:
    """Refuses what is not a batch of floating vectors (B, C), signals (B, C, L), images (B, C, H, W) or volumes
    (B, C, D, H, W), with the expected number of channels; ``spatial`` refuses vectors too, and ``dimensions`` all but
    those with this number of axes.

    A layer without spatial weights takes all of them. One with a network leaves the choice to the network, whose
    convolutions have a number of dimensions.
    """
    check_floating(layer, x)
    name = type(layer).__name__
    if not (3 if spatial else 2) <= x.dim() <= 5:
        vectors = "" if spatial else "vectors (B, C), "
        raise ValueError(
            f"{name} expects {vectors}signals (B, C, L), images (B, C, H, W) or volumes (B, C, D, H, W), "
            f"got shape {tuple(x.shape)}"
        )
    if dimensions is not None and x.dim() != dimensions + 2:
        expected = shape_of_images(dimensions, channels)
        raise ValueError(f"{name} was built with dimensions={dimensions}, for {expected}, got shape {tuple(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name} was built for {channels} channels, got images of shape {tuple(x.shape)}")


def count_pixels(x: Tensor) -> int:
    """H·W of a batch of images, L of signals, D·H·W of volumes, 1 of vectors."""
    return math.prod(x.shape[2:])


def first_half(channels: int) -> int:
    """Channels in the first half; it gets the odd one."""
    return (channels + 1) // 2
