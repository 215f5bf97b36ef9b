"""The launch pattern of earlier code, as a rival for benchmarks on a GPU: see pattern.h. Built when first used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
__all__ = ["backward", "find_toolkit", "solve"]


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder, found as setup.py finds it: nvcc on the PATH may be a wrapper script, which PyTorch
    would take for the toolkit's own."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc:
        # A dry run prints the variables nvcc works with; TOP is the toolkit's folder, relative to nvcc if not absolute.
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        if top:
            return Path(nvcc).parent.joinpath(top[1].strip()).resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


@cache
def _module() -> Any:
    """
    Raises:
        RuntimeError: there is no toolkit, or it does not build this.
    """
    from torch.utils import cpp_extension

    home = find_toolkit()
    if home is None:
        raise RuntimeError("there is no CUDA toolkit: put nvcc on the PATH, or set CUDA_HOME")
    cpp_extension.CUDA_HOME = str(home)
    sources = [str(HERE / name) for name in ("binding.cpp", "pattern.cu")]
    # A folder of its own: a build that was killed leaves a lock behind, on which the next one would wait for ever.
    folder = tempfile.mkdtemp(prefix="published_pattern-")
    return cpp_extension.load(
        "inverse_flow_published_pattern", sources, extra_cflags=["-O3"], extra_cuda_cflags=["-O3"],
        build_directory=folder,
    )  # fmt: skip


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
