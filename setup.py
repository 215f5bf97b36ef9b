"""Builds inverse_flow._C, and inverse_flow._C_cuda where there is a CUDA toolkit and a CUDA build of PyTorch.

Environment: FORCE_CUDA=1 builds the CUDA module with a CPU build of PyTorch too (compile check), FORCE_CUDA=0 leaves
it out; CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are PyTorch's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGE = "inverse_flow"
INSTALL_HINT = "pip install torch pybind11 ninja setuptools && pip install --no-build-isolation ."

# The oldest libtorch whose stable ABI the extension uses: one build serves every PyTorch from here on.
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11

# Compute capabilities to compile for, newest last (it also gets PTX, for GPUs that do not exist yet), each with the
# first toolkit that knows it.
DEFAULT_ARCHS = {"8.0": (11, 0), "8.6": (11, 1), "8.9": (11, 8), "9.0": (11, 8), "10.0": (12, 8), "12.0": (12, 8)}

# A compiler process of this project needs at most about this much memory.
GIB_PER_JOB = 2


class CudaStatus(IntEnum):
    """Why the CUDA module is or is not built; csrc/module.cpp turns the number into words."""

    BUILT = 0
    TORCH_WITHOUT_CUDA = 1
    NO_TOOLKIT = 2
    SWITCHED_OFF = 3


def fail(message: str) -> None:
    sys.exit(f"{PACKAGE}: {message}")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail(
        f"PyTorch is not importable in the environment of this build. Install it first and build with it: {INSTALL_HINT}"
    )
try:
    import pybind11
except ImportError:
    fail(f"pybind11 is missing in the environment of this build: {INSTALL_HINT}")


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder. nvcc on the PATH may be a wrapper script, so the toolkit is asked, not guessed."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            home = Path(os.environ[variable])
            if not (home / "bin" / "nvcc").exists():
                fail(f"{variable}={home} has no bin/nvcc: point it at a CUDA toolkit, or unset it")
            return home
    nvcc = shutil.which("nvcc")
    if nvcc:
        # A dry run prints the variables nvcc works with; TOP is the toolkit's folder.
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        if top:
            return Path(nvcc).parent.joinpath(top.group(1).strip()).resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


def toolkit_version(home: Path) -> tuple[int, int]:
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if not found:
        fail(f"{home}/bin/nvcc --version printed no version: is {home} a working CUDA toolkit?")
    return int(found.group(1)), int(found.group(2))


def cuda_status(home: Path | None) -> CudaStatus:
    force = os.environ.get("FORCE_CUDA")
    if force not in (None, "", "0", "1"):
        fail(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    if force == "0":
        return CudaStatus.SWITCHED_OFF
    if torch.version.cuda is None and force != "1":
        return CudaStatus.TORCH_WITHOUT_CUDA
    if home is None:
        if force == "1":
            fail("FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME, or put nvcc on the PATH")
        return CudaStatus.NO_TOOLKIT
    if torch.version.cuda is not None and toolkit_version(home)[0] != int(torch.version.cuda.split(".")[0]):
        have, need = ".".join(map(str, toolkit_version(home))), torch.version.cuda
        fail(f"the CUDA toolkit in {home} is {have}, but this PyTorch was built for CUDA {need}: set CUDA_HOME to a "
             f"{need.split('.')[0]}.x toolkit, or build for the CPU alone with FORCE_CUDA=0")
    return CudaStatus.BUILT


def cap_jobs() -> None:
    """Parallel compilers can use up the memory: unless the user set MAX_JOBS, allow what fits."""
    if not os.environ.get("MAX_JOBS") and hasattr(os, "sysconf"):
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        os.environ["MAX_JOBS"] = str(max(1, min(len(os.sched_getaffinity(0)), int(gib / GIB_PER_JOB))))


def sources(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).glob(pattern))


def extensions(status: CudaStatus, home: Path | None) -> list:
    common = {
        "include_dirs": [str(ROOT / "csrc"), pybind11.get_include()],
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("INVERSE_FLOW_CUDA_STATUS", int(status))],
    }
    # -Wno-psabi: vectors wider than the baseline's are passed between inlined functions only.
    cxx = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    modules = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C",
            sources("csrc", "*.cpp", "cpu/*.cpp"),
            extra_compile_args={"cxx": cxx},
            **common,
        )
    ]
    if status is CudaStatus.BUILT:
        if torch.version.cuda is None:
            # PyTorch's build helper looks for the toolkit only when PyTorch itself has CUDA; hand it ours, and drop
            # the libraries that a CPU build does not have: they are found when the module is loaded.
            cpp_extension.CUDA_HOME = str(home)
            cpp_extension._check_cuda_version = lambda *_: None
        version = toolkit_version(home)
        known = [arch for arch, first in DEFAULT_ARCHS.items() if version >= first]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(known) + "+PTX")
        module = cpp_extension.CUDAExtension(
            f"{PACKAGE}._C_cuda",
            sources("csrc/cuda", "*.cpp", "*.cu"),
            extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": ["-O3", "-lineinfo", "--expt-relaxed-constexpr"]},
            **common,
        )
        if torch.version.cuda is None:
            module.libraries = [name for name in module.libraries if name not in ("c10_cuda", "torch_cuda")]
        modules.append(module)
    return modules


cap_jobs()
toolkit = find_toolkit()
status = cuda_status(toolkit)
print(f"{PACKAGE}: CUDA module: {status.name.lower().replace('_', ' ')}", file=sys.stderr)
have_ninja = shutil.which("ninja") is not None
if not have_ninja:
    print(f"{PACKAGE}: ninja is missing, so files compile one after the other: pip install ninja", file=sys.stderr)
compiler = os.environ.get("CXX", "c++").split()[0]
if shutil.which(compiler) is None and shutil.which("g++") is None:
    fail(f"no C++ compiler found ({compiler}, g++): install one (Debian: apt-get install g++) or set CXX")

setup(
    ext_modules=extensions(status, toolkit),
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=have_ninja)},
)
