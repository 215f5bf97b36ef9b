"""The launch pattern of earlier code, as a rival for benchmarks on a GPU: see pattern.h. Built when first used."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
__all__ = ["backward", "solve"]


@cache
def _module() -> Any:
    from torch.utils.cpp_extension import load

    sources = [str(HERE / name) for name in ("binding.cpp", "pattern.cu")]
    return load("inverse_flow_published_pattern", sources, extra_cflags=["-O3"], extra_cuda_cflags=["-O3"])


def solve(images: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """A(w)⁻¹ y, or A(w)⁻ᵀ y: order top-left, unit triangular corner, one group, square kernel; float32 on a GPU."""
    if not (images.is_cuda and weight.is_cuda and images.dtype == weight.dtype == torch.float32):
        raise ValueError("the published pattern takes float32 tensors on a GPU")
    images, weight = images.contiguous(), weight.contiguous()
    output = torch.empty_like(images)
    batch, channels, height, width = images.shape
    # The launches go to the default stream.
    torch.cuda.synchronize()
    _module().solve(
        images.data_ptr(), weight.data_ptr(), output.data_ptr(), batch, channels, height, width, weight.shape[-1],
        transposed,
    )  # fmt: skip
    return output


def backward(grad: Tensor, output: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight: the transposed solve in the same pattern, and PyTorch's own weight gradient,
    which is more than the pattern had."""
    kernel = weight.shape[-1]
    grad_input = solve(grad, weight, transposed=True)
    padded = torch.nn.functional.pad(output, (kernel - 1, 0, kernel - 1, 0))
    return grad_input, -torch.nn.grad.conv2d_weight(padded, weight.shape, grad_input)
