"""The compiled module: what it says of itself, and the same answers from every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inverse_flow
from inverse_flow.ops import native

TESTS = Path(__file__).parent
# What runs under every instruction set: each kernel and each conversion between dtypes.
VALUES = (
    "((test_value or test_batches) and (float32 or float16)) or test_layouts_of_other_dtypes or test_pivoting or "
    "test_gradients_of_every_batch or half_precision"
)
ISAS = inverse_flow.build_info()["cpu_isas"]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=600, check=False)


def test_build_info() -> None:
    info = inverse_flow.build_info()
    assert info["inverse_flow"] == inverse_flow.__version__
    assert info["torch"] == torch.__version__
    assert info["torch_built_with"]
    assert info["compiler"]
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cpu_isas"][0] == "portable"
    assert info["threads"] == torch.get_num_threads()
    assert bool(info["cuda_absent"]) == (not info["cuda_archs"]) or native._C_cuda is None
    if not torch.cuda.is_available():
        assert info["cuda_absent"]


def test_build_info_is_not_shared() -> None:
    inverse_flow.build_info()["cpu_isa"] = "spoiled"
    assert inverse_flow.build_info()["cpu_isa"] != "spoiled"


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != inverse_flow.build_info()["cpu_isa"]])
def test_every_other_instruction_set_passes_the_tests_of_values(isa: str, request: pytest.FixtureRequest) -> None:
    """In a process of its own, since the choice is made once; there all memory from malloc is filled with 3.4e38."""
    asked = run_python(
        "-c", "import inverse_flow; print(inverse_flow.build_info()['cpu_isa'])", INVERSE_FLOW_CPU_ISA=isa
    )
    if f"this processor has no {isa}" in asked.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert asked.stdout.strip() == isa, asked.stderr
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", VALUES]
    options += ["--thorough"] if request.config.getoption("--thorough") else []
    options += ["--thorough"] if request.config.getoption("--thorough") else []
    environment = {"INVERSE_FLOW_CPU_ISA": isa, "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"}
    environment["ATEN_CPU_CAPABILITY"] = isa.replace("portable", "default")  # PyTorch's own kernels, by its names
    done = run_python("-m", "pytest", *options, str(TESTS / "test_functional.py"), **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_an_unknown_instruction_set() -> None:
    code = "import torch, inverse_flow; inverse_flow.InverseConv2d(2)(torch.zeros(1, 2, 3, 3))"
    done = run_python("-c", code, INVERSE_FLOW_CPU_ISA="mmx")
    assert done.returncode != 0
    assert f"INVERSE_FLOW_CPU_ISA must be one of {', '.join(ISAS)}, got mmx" in done.stderr


def test_an_empty_choice_is_no_choice() -> None:
    done = run_python("-c", "import inverse_flow; print(inverse_flow.build_info()['cpu_isa'])", INVERSE_FLOW_CPU_ISA="")
    assert done.stdout.strip() in ISAS, done.stderr
