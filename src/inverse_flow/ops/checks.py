"""Checks of tensors shared by every public entry point: each error says what was given and what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from inverse_flow.ops.spec import AXES

# Every operator's images are float32 or float64, or one of these with a float32 recurrence.
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


def _floating(name: str, value: object) -> torch.dtype:
    """The dtype of ``value``, an argument called ``name``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be one tensor, got a nested one: pass each of its tensors by itself")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}: call its to_dense() first")
    dtype = value.dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
    return dtype


def check_context(context: object) -> None:
    """Refuses what is neither None nor a dense tensor of real numbers with a row for each example.

    Raises:
        TypeError: no such tensor.
        ValueError: a tensor without rows.
    """
    if context is None:
        return
    if not isinstance(context, Tensor):
        raise TypeError(f"the context must be a tensor or None, got {type(context).__name__}")
    if context.is_nested or context.layout is not torch.strided or context.is_complex():
        raise TypeError(f"the context must be a dense tensor of real numbers, got {context.dtype}, {context.layout}")
    if context.dim() == 0:
        raise ValueError("the context must have one row per example, got a tensor without dimensions")


def shape_of_images(dimensions: int, channels: object = "C") -> str:
    """``(B, C, H, W)`` and the like, as errors put it."""
    return f"({', '.join(['B', str(channels), *AXES.get(dimensions, ())])})"


def check_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, dimensions: int = 2, *, batched: bool = True
) -> None:
    """Checks types, shapes, dtypes and devices of (input, weight, bias) without reading a value, so that nothing
    here synchronises a device or breaks graph capture. ``dimensions`` is the number of an image's axes; ``input`` may
    be one image alone unless it must be ``batched``.

    Raises:
        TypeError: an argument is not a tensor or not floating.
        ValueError: shapes or dtypes do not fit each other.
        RuntimeError: the tensors lie on different devices.
    """
    # Every attribute of a tensor costs a call, and small solves are short: each is asked for once.
    dtype, weight_dtype = _floating("input", input), _floating("weight", weight)
    shape, weight_shape, device = input.shape, weight.shape, input.device

    if len(shape) != dimensions + 2 and (batched or len(shape) != dimensions + 1):
        wanted = shape_of_images(dimensions)
        alone = "" if batched else f" or {wanted.replace('B, ', '')}"
        raise ValueError(f"input must have shape {wanted}{alone}, got {tuple(shape)}")
    channels, *sizes = shape[-dimensions - 1 :]
    if channels < 1 or any(size < 1 for size in sizes):
        raise ValueError(f"input must have at least one channel and one pixel, got shape {tuple(shape)}")
    if channels % groups:
        raise ValueError(f"the channels of input ({channels}) must be divisible by groups ({groups})")
    fits = len(weight_shape) == dimensions + 2 and weight_shape[:2] == (channels, channels // groups)
    if not fits or 0 in weight_shape:
        kernel = ", ".join(f"k{axis}" for axis in AXES[dimensions])
        raise ValueError(
            f"weight must have shape ({channels}, {channels // groups}, {kernel}) for {channels} channels in "
            f"{groups} group{'s' if groups > 1 else ''}, got {tuple(weight_shape)}"
        )
    if weight_dtype != dtype and not (dtype in HALF_DTYPES and weight_dtype == torch.float32):
        also = " or torch.float32" if dtype in HALF_DTYPES else ""
        raise ValueError(f"weight must be {dtype}{also} like input, got {weight_dtype}")
    if weight.device != device:
        raise RuntimeError(f"weight is on {weight.device} but input is on {device}: move one of them")

    if bias is None:
        return
    bias_dtype = _floating("bias", bias)
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    if bias_dtype != weight_dtype:
        raise ValueError(f"bias must be {weight_dtype} like weight, got {bias_dtype}")
    if bias.device != device:
        raise RuntimeError(f"bias is on {bias.device} but input is on {device}: move one of them")
