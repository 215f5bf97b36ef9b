"""Builds inverse_flow._C, and inverse_flow._C_cuda where there is a CUDA toolkit and a CUDA build of PyTorch.

docs/installation.md describes the environment variables that are read here. Everything that can be known to fail is
checked before the first file compiles, and ends in one line that says what to do.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import setuptools

ROOT = Path(__file__).parent
PACKAGE = "inverse_flow"
BUILD_REQUIREMENTS = "torch 'setuptools>=77' 'pybind11>=2.12' ninja"
INSTALL_HINT = f"pip install {BUILD_REQUIREMENTS} && pip install --no-build-isolation ."

# The oldest libtorch whose stable ABI the extension uses: one build serves every PyTorch from here on.
OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"

# The first setuptools that reads the licence expression of pyproject.toml.
OLDEST_SETUPTOOLS = (77,)

# Compute capabilities to compile for, newest last: it also gets PTX, for GPUs that do not exist yet.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# The largest compiler process of this project takes about 0.4 GiB (GCC 12); the rest is for compilers that take more.
GIB_PER_JOB = 1


class CudaStatus(IntEnum):
    """Why the CUDA module is or is not built; csrc/module.cpp turns the number into words."""

    BUILT = 0
    TORCH_WITHOUT_CUDA = 1
    NO_TOOLKIT = 2
    SWITCHED_OFF = 3


def fail(message: str) -> NoReturn:
    sys.exit(f"{PACKAGE}: {message}")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(map(int, re.match(r"[\d.]*\d", version)[0].split(".")))


if sys.platform == "win32":
    fail("Windows is not supported, since the kernels need GCC or clang: build under WSL")
if numbers(setuptools.__version__) < OLDEST_SETUPTOOLS:
    fail(f"setuptools {setuptools.__version__} is too old, 77 or newer is needed: pip install 'setuptools>=77'")
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    fail(
        f"PyTorch cannot be imported in the environment of this build ({error}). Install it first, and build without "
        f"isolation: {INSTALL_HINT}"
    )
if numbers(torch.__version__)[:2] < OLDEST_TORCH:
    fail(
        f"PyTorch {torch.__version__} is too old, {'.'.join(map(str, OLDEST_TORCH))} or newer is needed: "
        "pip install --upgrade torch"
    )
try:
    import pybind11
except ImportError as error:
    fail(f"pybind11 cannot be imported in the environment of this build ({error}): {INSTALL_HINT}")


def cuda_switch() -> str | None:
    """FORCE_CUDA: "1" builds the CUDA module beside a CPU build of PyTorch too, "0" leaves it out."""
    switch = os.environ.get("FORCE_CUDA") or None
    if switch not in (None, "0", "1"):
        fail(f"FORCE_CUDA must be 0 or 1, got {switch!r}")
    return switch


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
        # A dry run prints the variables nvcc works with; TOP is the toolkit's folder, relative to nvcc if not absolute.
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        if top:
            return Path(nvcc).parent.joinpath(top[1].strip()).resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


def ask_nvcc(home: Path, option: str, pattern: str) -> list[str]:
    """What nvcc prints that matches ``pattern``."""
    nvcc = home / "bin" / "nvcc"
    found = re.findall(pattern, subprocess.run([nvcc, option], capture_output=True, text=True).stdout)
    if not found:
        fail(f"`{nvcc} {option}` did not answer: is {home} a working CUDA toolkit? (set CUDA_HOME to another)")
    return found


def cuda_status(switch: str | None, home: Path | None) -> CudaStatus:
    if switch == "0":
        return CudaStatus.SWITCHED_OFF
    if torch.version.cuda is None and switch is None:
        return CudaStatus.TORCH_WITHOUT_CUDA
    if home is None:
        if switch == "1":
            fail("FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME, or put nvcc on the PATH")
        return CudaStatus.NO_TOOLKIT
    [have] = ask_nvcc(home, "--version", r"release (\d+\.\d+)")
    need = torch.version.cuda
    if need is not None and numbers(have)[0] != numbers(need)[0]:
        fail(
            f"the CUDA toolkit in {home} is {have}, but this PyTorch was built for CUDA {need}: set CUDA_HOME to a "
            f"{numbers(need)[0]}.x toolkit, or build for the CPU alone with FORCE_CUDA=0"
        )
    return CudaStatus.BUILT


def default_archs(home: Path) -> str:
    """Those of the GPUs that PyTorch sees here, else DEFAULT_ARCHS; as far as the toolkit knows them: old ones lack the
    newest, new ones drop the oldest."""
    known = ask_nvcc(home, "--list-gpu-arch", r"compute_(\d+)\b")
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    here = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    archs = [f"{major}.{minor}" for major, minor in here if f"{major}{minor}" in known]
    archs = archs or [arch for arch in DEFAULT_ARCHS if arch.replace(".", "") in known]
    return ";".join(archs) + "+PTX"


def memory_gib() -> float:
    """The memory of this machine, or of the container this runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / 2**30


def limit_jobs() -> None:
    """Compilers side by side can use up the memory: unless MAX_JOBS says how many, allow what fits."""
    jobs = os.environ.get("MAX_JOBS")
    if not jobs:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["MAX_JOBS"] = str(max(1, min(cores, int(memory_gib() / GIB_PER_JOB))))
    elif not jobs.isdigit() or int(jobs) < 1:
        fail(f"MAX_JOBS must be a whole number of at least 1, got {jobs!r}")


def find_ninja() -> bool:
    """Puts ninja on the PATH. pip installs it beside Python, where an environment that is not activated hides it."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    return shutil.which("ninja") is not None


def find_compiler() -> None:
    """Sets CXX, which PyTorch compiles with and setuptools links with; each alone would assume one of its own."""
    chosen = os.environ.get("CXX")
    if chosen:
        if shutil.which(shlex.split(chosen)[0]) is None:
            fail(f"CXX={chosen}, but there is no such program: set CXX to GCC's or clang's C++ compiler, or unset it")
        return
    names = ("c++", "g++", "clang++")
    found = next(filter(shutil.which, names), None)
    if found is None:
        fail(f"no C++ compiler on the PATH ({', '.join(names)}): install one (Debian: apt-get install g++), or set CXX")
    os.environ["CXX"] = found


def sources(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).glob(pattern))


def extensions(status: CudaStatus, home: Path | None) -> list[setuptools.Extension]:
    include_dirs = [str(ROOT / "csrc"), pybind11.get_include()]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("INVERSE_FLOW_CUDA_STATUS", str(int(status)))]
    # -Wno-psabi: vectors wider than the baseline's are passed between inlined functions only.
    cxx = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    modules = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C",
            sources("csrc", "*.cpp", "cpu/*.cpp"),
            include_dirs=include_dirs[:],
            define_macros=macros,
            extra_compile_args={"cxx": cxx},
        )
    ]
    if status is not CudaStatus.BUILT:
        return modules

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(home)
    # find_toolkit is the one that decides. A CPU build of PyTorch has not looked for a toolkit, and has no CUDA version
    # to compare it with.
    cpp_extension.CUDA_HOME = str(home)
    if torch.version.cuda is None:
        cpp_extension._check_cuda_version = lambda *_: None
    module = cpp_extension.CUDAExtension(
        f"{PACKAGE}._C_cuda",
        sources("csrc/cuda", "*.cpp", "**/*.cu"),
        include_dirs=include_dirs[:],
        define_macros=macros,
        extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": ["-O3", "-lineinfo", "--expt-relaxed-constexpr"]},
    )
    if torch.version.cuda is None:
        # A CPU build of PyTorch has no CUDA libraries to link with. A CUDA build loads its own through libtorch, which
        # must stay linked although no symbol of it is used.
        module.libraries = [name for name in module.libraries if name not in ("c10_cuda", "torch_cuda")]
        module.extra_link_args = ["-Wl,--no-as-needed", "-ltorch"]
    return [*modules, module]


switch = cuda_switch()
wanted = switch == "1" or (switch is None and torch.version.cuda is not None)
toolkit = find_toolkit() if wanted else None
status = cuda_status(switch, toolkit)
find_compiler()
limit_jobs()
have_ninja = find_ninja()
print(f"{PACKAGE}: CUDA module: {status.name.lower().replace('_', ' ')}", file=sys.stderr)
if not have_ninja:
    print(f"{PACKAGE}: ninja is missing, so files compile one after the other: pip install ninja", file=sys.stderr)

setuptools.setup(
    ext_modules=extensions(status, toolkit),
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=have_ninja)},
)
