"""Loads the compiled modules: ``_C`` always, ``_C_cuda`` where it was built and PyTorch has CUDA."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from inverse_flow._version import __version__

try:
    from inverse_flow import _C
except ImportError as error:
    raise ImportError(
        "inverse_flow was imported without its compiled module inverse_flow._C. Build it from the source tree with "
        "`pip install --no-build-isolation .` (a C++ compiler and an installed torch are needed). "
        f"The import failed with: {error}"
    ) from error

_C_cuda: Any = None
_cuda_left_out: str = _C.build_info()["cuda_absent"]


def cuda_absent(is_built: bool) -> str:
    """Why there are no CUDA kernels: what was so when the package was built, and what to do now; empty if there are."""
    cuda = torch.version.cuda
    if is_built:
        return "" if cuda else "inverse_flow._C_cuda is built, but this PyTorch has no CUDA: install one that has"
    install = "" if cuda else "install a PyTorch with CUDA, then "
    toolkit = f"CUDA {cuda.partition('.')[0]} toolkit" if cuda else "CUDA toolkit"
    return (
        f"inverse_flow._C_cuda is missing ({_cuda_left_out or 'the build made it'}): {install}build inverse_flow again "
        f"with CUDA_HOME or the PATH leading to a {toolkit}: pip install --no-build-isolation --force-reinstall ."
    )


cuda_absent_reason = cuda_absent(importlib.util.find_spec("inverse_flow._C_cuda") is not None)
if not cuda_absent_reason:
    from inverse_flow import _C_cuda


def check_device(device: torch.device) -> None:
    """Raises a RuntimeError if there are no kernels for tensors on ``device``."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise RuntimeError(f"the inverse convolution runs on CPU and CUDA tensors, got a tensor on {device}")
    if cuda_absent_reason:
        raise RuntimeError(f"input is on {device}, but the CUDA kernels are not available: {cuda_absent_reason}")


def build_info() -> dict[str, Any]:
    """What this build is made of, for bug reports.

    Returns:
        A dict with ``inverse_flow``, ``torch`` and ``torch_built_with`` (versions), ``compiler``, ``cpu_isa`` (the
        instruction set in use: ``avx512``, ``avx2`` or ``portable``; the environment variable
        ``INVERSE_FLOW_CPU_ISA`` forces one), ``cpu_isas`` (those compiled in), ``threads``, ``cuda_archs`` (list of
        compiled CUDA architectures, empty without CUDA), ``cuda_toolkit`` and ``cuda_absent`` (why CUDA is absent
        and what to do about it, or an empty string).
    """
    info: dict[str, Any] = {"inverse_flow": __version__, "torch": torch.__version__, **_C.build_info()}
    info["threads"] = torch.get_num_threads()
    info["cuda_archs"], info["cuda_toolkit"] = [], ""
    if _C_cuda is not None:
        info.update(_C_cuda.build_info())
    info["cuda_absent"] = cuda_absent_reason
    return info
