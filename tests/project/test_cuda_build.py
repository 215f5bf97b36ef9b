"""The CUDA sources compile for every architecture, and no kernel spills: nvcc is needed, a GPU is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ("80", "90", "120")
REGISTERS_OF_A_MULTIPROCESSOR = 65536
# ptxas hands registers out to whole warps, this many at a time.
REGISTER_GRANULE = 256

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH: the CUDA sources cannot be compiled")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one architecture."""

    name: str
    arch: str
    stack_bytes: int
    spill_bytes: int
    registers: int


def register_report(source: Path, output: Path) -> list[Kernel]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    assert NVCC is not None
    command = [NVCC, "-c", str(source), "-o", str(output), "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", *codes]
    # Of a spill there shall be a report, not an error.
    environment = {name: value for name, value in os.environ.items() if name != "NVCC_APPEND_FLAGS"}
    done = subprocess.run([*command, "-Xcompiler", "-fPIC"], capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    kernels = [
        Kernel(
            found["name"],
            found["arch"],
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
            int(found["registers"]),
        )
        for found in entry.finditer(text)
    ]
    assert len(kernels) == text.count("Compiling entry function")
    return kernels


def threads_of(kernel: Kernel) -> int:
    """The most threads that the plans give this kernel: the constants of their headers."""
    headers = [*SOURCES.rglob("plan.h"), SOURCES / "common" / "fold.h", SOURCES / "gradient" / "combine.cuh"]
    text = "".join(path.read_text() for path in headers)
    constants = dict(re.findall(r"constexpr int32_t (\w+) = (\d+);", text))
    for name, constant in {
        "solve_tensor_kernel": "kTensorThreads",
        "weight_gradient_kernel": "kGradientThreads",
        "weight_gradient_tensor_kernel": "kGradientTensorThreads",
        "combine_gradients_kernel": "kCombineThreads",
    }.items():
        if name in kernel.name:
            return int(constants[constant])
    if found := re.search(r"lanes_kernel.*Li(\d+)ELi\d+E", kernel.name):  # the channels of a group, then the taps
        return int(constants["kLanesThreads" if int(found[1]) <= 8 else "kManyLanesThreads"])
    return int(constants["kMaxThreads"])


def check(kernel: Kernel, threads: int) -> None:
    assert kernel.stack_bytes == 0 and kernel.spill_bytes == 0, f"spills: {kernel}"  # noqa: PT018
    of_a_warp = -(-kernel.registers * 32 // REGISTER_GRANULE) * REGISTER_GRANULE
    assert of_a_warp * threads // 32 <= REGISTERS_OF_A_MULTIPROCESSOR, f"too many registers: {kernel}"


@pytest.mark.slow  # minutes, for what a build with the options of .ci/run does too: it refuses a spill
@pytest.mark.parametrize("name", sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.cu")))
def test_no_kernel_spills(name: str, tmp_path: Path) -> None:
    kernels = register_report(SOURCES / name, tmp_path / "object.o")
    for kernel in kernels:
        check(kernel, threads_of(kernel))
    # Every architecture, and every kernel that a file is there for.
    expected = {
        "device.cu": 0,
        "block/launch.cu": 3 * 4 + 2 * 2,  # of four image types; and the fold's, of two state types
        "tensor/launch.cu": 2 * 3 + 2,
        "gradient/launch.cu": 8,
    }.get(name, 8 + 12 + 2)  # rows as lanes: channels per group, for windows of 2, 3 and 5 taps
    assert {arch: sum(kernel.arch == arch for kernel in kernels) for arch in ARCHS} == dict.fromkeys(ARCHS, expected)


def test_a_spilling_kernel_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(
        """
        __global__ void spills(float* data, int n) {
          float values[64];
          for (int i = 0; i < 64; ++i) values[i] = data[i];
          for (int i = 0; i < n; ++i) values[(i * n) % 64] += values[i % 64];
          data[n] = values[n % 64];
        }"""
    )
    assert NVCC is not None
    strict = re.search(r'NVCC_APPEND_FLAGS="(.*)"', (SOURCES.parents[1] / ".ci" / "run").read_text())
    assert strict is not None
    code = f"-gencode=arch=compute_{ARCHS[0]},code=sm_{ARCHS[0]}"
    command = [NVCC, "-c", str(source), "-o", str(tmp_path / "spills.o"), code, *strict[1].split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ptxas error   : Local memory used" in done.stderr
    for kernel in register_report(source, tmp_path / "spills.o"):
        with pytest.raises(AssertionError, match="spills"):
            check(kernel, 32)
        with pytest.raises(AssertionError, match="too many registers"):
            check(Kernel(kernel.name, kernel.arch, 0, 0, 97), 672)
