"""The benchmarks of the kernels: rivals that solve, checks that see a wrong solve, fits and ratios."""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow import functional, reference

from ..conftest import HAS_CUDA

FOLDER = Path(__file__).parents[2] / "benchmarks"
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++")


# ---- The check before the clock ----


@pytest.mark.parametrize("corner", ["general", "unit_triangular", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_solve_passes_its_check(scripts: Any, corner: str, dtype: torch.dtype, dimensions: int) -> None:
    operands = scripts.problems.Operands.make(scripts.problems.Case(2, 3, 5, dimensions=dimensions), dtype)
    errors = scripts.problems.check(operands, corner)
    assert set(errors) == {"residual", "grad_input", "grad_weight", "grad_bias", "recurrence"}


@pytest.mark.parametrize(("wrong", "named"), [(0, "residual"), (1, "grad_input"), (2, "grad_weight"), (3, "grad_bias")])
def test_a_wrong_solve_fails_its_check(scripts: Any, monkeypatch: pytest.MonkeyPatch, wrong: int, named: str) -> None:
    right = functional.inverse_conv2d

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, corner: str) -> Tensor:
            with torch.enable_grad():
                ctx.leaves = tuple(t.detach().requires_grad_() for t in (y, weight, bias))
                ctx.output = right(*ctx.leaves, corner=corner)
            return ctx.output.detach() * (1.001 if wrong == 0 else 1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            found = list(torch.autograd.grad(ctx.output, ctx.leaves, grad))
            if wrong:
                found[wrong - 1] = 1.001 * found[wrong - 1]
            return *found, None

    def solve(y: Tensor, weight: Tensor, bias: Tensor, corner: str) -> Any:
        return Wrong.apply(y, weight, bias, corner)

    monkeypatch.setattr(functional, "inverse_conv2d", solve)
    operands = scripts.problems.Operands.make(scripts.problems.Case(2, 3, 5))
    with pytest.raises(ArithmeticError, match=named):
        scripts.problems.check(operands, "unit_triangular")


@pytest.mark.parametrize("text", ["3", "3x4x5x6x7", "3xa", "0x3", "2x3x4x2"])
def test_a_shape_that_is_none_is_refused(scripts: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        scripts.problems.Case.parse(text)


# ---- Ratios ----


def test_ratios_are_to_the_faster_layout(scripts: Any) -> None:
    samples = {
        (who, launch): [us * factor * 1e-6 * 4] * 3
        for launch, factor in (("graph", 1), ("eager", 2))
        for who, us in {
            "ours, general": 6.0,
            "ours, identity": 3.0,
            "conv2d NCHW, tf32 off": 4.0,
            "conv2d channels_last, tf32 off": 5.0,
            "conv2d NCHW, tf32 on": 3.0,
            "conv2d channels_last, tf32 on": 2.0,
        }.items()
    }
    rows = {(row["launch"], row["corner"], row["tf32"]): row for row in scripts.layer.rows_of(samples, 4)}
    assert len(rows) == len(scripts.layer.rows_of(samples, 4)) == 8
    row = rows["graph", "general", "tf32 off"]
    assert (row["ours_ms"], row["rival_ms"]) == pytest.approx((6e-3, 4e-3))
    assert row["rival"] == "conv2d NCHW, tf32 off"
    assert rows["eager", "general", "tf32 on"]["rival"] == "conv2d channels_last, tf32 on"
    assert rows["eager", "general", "tf32 on"]["ratio"] == pytest.approx(3)
    assert rows["graph", "identity", "tf32 off"]["ratio"] == pytest.approx(0.75)


def test_half_precision_is_compared_to_the_same_corner(scripts: Any) -> None:
    names = ("ours, general", "ours, identity", "float32, general", "float32, identity")
    rows = scripts.layer.rows_of({(name, "eager"): [1.0 + i] for i, name in enumerate(names)}, 1)
    assert [(row["corner"], row["rival"]) for row in rows] == [
        ("general", "float32, general"), ("identity", "float32, identity")
    ]  # fmt: skip


def test_the_summary_says_which_targets_are_kept(scripts: Any) -> None:
    arguments = scripts.layer.parse_arguments(["--device", "cuda"])
    same = {"threads": 1, "launch": "graph", "tf32": "tf32 off", "corner": "general", "set": "layers"}
    same["of_the_limit"] = 0.5
    ratios = {"forward": (0.4, 1.6), "forward+backward": (0.5, 1.0)}
    rows = [same | {"mode": mode, "ratio": r, "ratio_fastest": r} for mode, pair in ratios.items() for r in pair]
    forward, both = scripts.layer.summary_of(rows, arguments)
    assert (forward["mean"], forward["worst"]) == pytest.approx((0.8, 1.6))
    assert forward["targets"] == "mean ≤ 1.0 kept, worst ≤ 1.5 MISSED"
    assert both["targets"] == "mean ≤ 0.9 kept"


def test_no_solve_takes_less_than_the_limits_allow(scripts: Any) -> None:
    case, limits = scripts.problems.Case(2, 3, 4), {"multiply_adds": 1000.0, "bytes": 1e9}
    work = 2 * 3 * 16 * 3 * 9
    assert scripts.layer.least_seconds(case, "forward", torch.float32, limits) == pytest.approx(work / 1000)
    assert scripts.layer.least_seconds(case, "forward+backward", torch.float32, limits) == pytest.approx(
        3 * work / 1000
    )
    limits = {"multiply_adds": 1e9, "bytes": 1000.0}
    assert scripts.layer.least_seconds(case, "forward", torch.float64, limits) == pytest.approx(2 * 96 * 8 / 1000)


# ---- Rivals, and fits ----


@pytest.mark.parametrize("size", [(3, 4, 6, 3), (2, 3, 5, 2), (2, 2, 4, 1), (1, 1, 3, 5)])
def test_every_rival_solves(scripts: Any, size: tuple[int, int, int, int]) -> None:
    case = scripts.problems.Case(*size)
    operands = scripts.problems.Operands.make(case)
    images, weight = operands.inputs[0], operands.weight
    exact = reference.inverse_conv2d_dense(images, weight, corner="unit_triangular")
    solvers = scripts.scaling.solvers(case, weight, set())
    assert set(solvers) == {"ours", "row by row", "solve_triangular"}
    for name, solve in solvers.items():
        assert (solve(images).double() - exact).abs().max() < 1e-5, name
        assert scripts.problems.residual(solve(images), images, weight, "unit_triangular") < 1e-5
    assert scripts.problems.residual(1.001 * exact, images, weight, "unit_triangular") > 1e-4
    assert set(scripts.scaling.solvers(case, weight, {"row by row", "solve_triangular"})) == {"ours"}


def test_fits_find_the_line(scripts: Any) -> None:
    offset, slope, error = scripts.scaling.fit([(x, 3 + 2 * x) for x in (1.0, 4.0, 9.0)])
    assert (offset, slope, error) == pytest.approx((3, 2, 0), abs=1e-9)

    def rows(time: object) -> list[dict[str, object]]:
        return [{"rival": "ours", "value": side, "ms": time(side)} for side in (8, 16, 32, 64)]  # type: ignore[operator]

    steps = scripts.scaling.image_fits(rows(lambda side: 0.01 * side))
    assert steps["log_slopes"] == pytest.approx([0.5] * 3)
    assert steps["root_n"]["relative_error"] < 1e-9 < steps["n"]["relative_error"]
    assert steps["work_takes_over_at_side"] is None
    work = scripts.scaling.image_fits(rows(lambda side: max(0.01 * side, 1e-3 * side**2)))
    assert work["log_slopes"][-1] == pytest.approx(1)
    assert work["work_takes_over_at_side"] == 8


# ---- The published pattern ----


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The pattern's threads, one after the other on the CPU."""
    if CXX is None:
        pytest.skip("the build of the pattern needs a C++ compiler (g++)")
    folder = tmp_path_factory.mktemp("pattern")
    source = folder / "pattern.cpp"
    source.write_text(
        """
        #include "pattern.h"
        extern "C" int solve(const float* y, const float* w, float* x, int batch, int channels, int height, int width,
                             int kernel, int transposed) {
          const Pattern p{y, w, x, batch, channels, height, width, kernel, transposed != 0};
          int launches = 0;
          for_each_launch(p, [&](int diagonal, int channel, int pixels) {
            ++launches;
            // Last first: the threads of a launch must not need each other.
            for (int pixel = pixels; pixel-- > 0;)
              for (int image = batch; image-- > 0;) solve_value(p, diagonal, channel, pixel, image);
            return 0;
          });
          return launches;
        }"""
    )
    library = folder / "pattern.so"
    include = f"-I{FOLDER / 'published_pattern'}"
    done = subprocess.run(
        [CXX, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", include, str(source), "-o",
         str(library)], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 3), (3, 4, 6, 4, 2), (1, 1, 1, 1, 5)])
def test_the_published_pattern_solves(
    pattern: ctypes.CDLL, shape: tuple[int, int, int, int, int], transposed: bool
) -> None:
    batch, channels, height, width, kernel = shape
    weight = 0.2 * torch.randn(channels, channels, kernel, kernel)
    images, output = (
        torch.randn(batch, channels, height, width),
        torch.full((batch, channels, height, width), torch.nan),
    )
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (images, weight, output)]
    launches = pattern.solve(*pointers, *shape, int(transposed))
    assert launches == channels * (height + width - 1)
    matrix = reference.dense_matrix(weight.double(), height, width, corner="unit_triangular")
    matrix = matrix.mT if transposed else matrix
    exact = torch.linalg.solve(matrix, images.double().flatten(1).mT).mT.reshape(images.shape)
    assert (output.double() - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
def test_the_published_pattern_compiles(tmp_path: Path) -> None:
    source = FOLDER / "published_pattern" / "pattern.cu"
    command = [str(NVCC), "-c", str(source), "-o", str(tmp_path / "pattern.o"), "-Werror", "all-warnings"]
    done = subprocess.run([*command, "-gencode=arch=compute_90,code=sm_90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_toolkit_is_asked_and_not_guessed(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc on the PATH may be a wrapper script in a folder that holds no toolkit."""
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    wrapper.chmod(0o755)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    assert scripts.published_pattern.find_toolkit() == tmp_path / "toolkit"
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert scripts.published_pattern.find_toolkit() == Path("/elsewhere")


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU and the CUDA module")
def test_the_published_pattern_on_a_gpu(scripts: Any) -> None:
    operands = scripts.problems.Operands.make(scripts.problems.Case(3, 4, 6), device="cuda")
    assert scripts.layer.pattern_ms("forward+backward", operands) > 0
