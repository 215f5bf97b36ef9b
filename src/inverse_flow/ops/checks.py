"""Checks of tensors shared by every public entry point: each error says what was given and what is right."""

from __future__ import annotations

import torch
from torch import Tensor

# Every operator's images are float32 or float64, or one of these with a float32 recurrence.
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


def _floating(name: str, value: object) -> torch.dtype:
    """The dtype of ``value``, an argument called ``name``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be one tensor, got a nested one: pass each of its tensors by itself")
    dtype = value.dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
    return dtype


def check_arguments(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Checks types, shapes, dtypes and devices of (input, weight, bias) without reading a value, so that nothing
    here synchronises a device or breaks graph capture.

    Raises:
        TypeError: an argument is not a tensor or not floating.
        ValueError: shapes or dtypes do not fit each other.
        RuntimeError: the tensors lie on different devices.
    """
    # Every attribute of a tensor costs a call, and small solves are short: each is asked for once.
    dtype, weight_dtype = _floating("input", input), _floating("weight", weight)
    shape, weight_shape, device = input.shape, weight.shape, input.device

    if len(shape) != 4:
        raise ValueError(f"input must have shape (B, C, H, W), got {tuple(shape)}")
    _, channels, height, width = shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"input must have at least one channel and one pixel, got shape {tuple(shape)}")
    if channels % groups:
        raise ValueError(f"the channels of input ({channels}) must be divisible by groups ({groups})")
    if len(weight_shape) != 4 or weight_shape[:2] != (channels, channels // groups) or 0 in weight_shape:
        raise ValueError(
            f"weight must have shape ({channels}, {channels // groups}, kH, kW) for {channels} channels in "
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
