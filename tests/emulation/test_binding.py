"""The CUDA binding, run with the emulator in place of the GPU, against the CPU operators.

The very csrc/cuda/binding.cpp is compiled, as operators of a library of its own for CPU tensors: workspaces, strides,
dtypes and the order of the launches are tested, the device guard and the stream are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from inverse_flow.ops import library as cpu

from ..cases import Case
from .build import CSRC, HERE, Compiler, folder_of, kernel_sources

# What makes the binding one for CUDA tensors, and what stands there instead.
SUBSTITUTIONS = {
    "STABLE_TORCH_LIBRARY_IMPL(inverse_flow, CUDA, m)": "STABLE_TORCH_LIBRARY_IMPL(inverse_flow_emulated, CPU, m)",
    "a.is_cuda() && b.is_cuda() &&": "a.is_cpu() && b.is_cpu() &&",
    "const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());": "",
    "const torch::stable::accelerator::DeviceGuard guard(output.get_device_index());": "",
}
TORCH_TARGET_VERSION = "0x020b000000000000"  # as in setup.py
# (batch, channels per group, orders, height, width, kernel_h, kernel_w)
PROBLEMS = [
    (5, 3, (0, 3), 6, 5, 3, 3),
    (2, 20, (1,), 3, 4, 2, 3),  # folded before the solve
    (1, 2, (2,), 25, 31, 3, 2),  # several tiles
    (3, 1, (0, 1, 2, 3), 4, 4, 5, 5),
    (2, 3, (1, 3), 40, 36, 3, 3),  # rows as lanes
]


@pytest.fixture(scope="session")
def emulated() -> Any:
    sources = {Path(name): (CSRC / name).read_text() for name in ("cuda/binding.cpp", "ops.cpp")}
    for old, new in SUBSTITUTIONS.items():
        assert sources[Path("cuda/binding.cpp")].count(old) == 1, old
        sources[Path("cuda/binding.cpp")] = sources[Path("cuda/binding.cpp")].replace(old, new)
    sources[Path("ops.cpp")] = sources[Path("ops.cpp")].replace("(inverse_flow,", "(inverse_flow_emulated,")
    copies = folder_of(sources)
    includes = (HERE, CSRC / "cuda", CSRC)
    kernels = Compiler(["-std=c++17", "-O1", "-fPIC"], includes)
    # The headers' version is there for the key of what is kept.
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA", f'-DHEADERS_OF="{torch.__version__}"']
    headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    binding = Compiler(["-std=c++20", "-O1", "-fPIC", *macros, *headers], includes)
    objects = kernels.objects([*kernel_sources(CSRC), HERE / "device.cpp"])
    objects += binding.objects([copies / name for name in sources])
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    torch.ops.load_library(binding.link("libbinding", objects, "-shared", *paths, "-ltorch_cpu", "-ltorch"))
    return torch.ops.inverse_flow_emulated


def tensors(problem: tuple[Any, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    batch, channels, orders, height, width, kernel_h, kernel_w = problem
    random = torch.Generator().manual_seed(7)
    groups = len(orders)
    weight = torch.randn(groups * channels, channels, kernel_h, kernel_w, generator=random, dtype=torch.float64)
    weight *= 0.4 / (channels * kernel_h * kernel_w) ** 0.5
    for g, order in enumerate(orders):
        row, column = 0 if order & 2 else kernel_h - 1, 0 if order & 1 else kernel_w - 1
        weight[g * channels : (g + 1) * channels, :, row, column] += torch.eye(channels, dtype=torch.float64)
    images = torch.randn(2, batch, groups * channels, height, width, generator=random, dtype=torch.float64)
    bias = torch.randn(groups * channels, generator=random, dtype=torch.float64)
    return images[0].to(dtype), images[1].to(dtype), weight.to(weight_dtype), bias.to(weight_dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    error = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[actual.dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=error * max(scale, 1.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_binding_agrees_with_the_cpu(
    emulated: Any,
    problem: tuple[Any, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    corner: int,
    transposed: bool,
) -> None:
    y, grad, weight, bias = tensors(problem, dtype, weight_dtype)
    orders = problem[2]
    for given in (None, bias):
        expected = cpu.solve(y, weight, given, orders, corner, transposed)
        assert_same(emulated.solve(y, weight, given, orders, corner, transposed), expected)
    channels_last = y.to(memory_format=torch.channels_last)
    x = emulated.solve(channels_last, weight, bias, orders, corner, transposed)
    assert x.stride() == channels_last.stride()
    assert_same(x.contiguous(), expected)
    strided_weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for gradient in (grad, grad[:1, :, :1, :1].expand_as(grad), grad.flip(3).to(memory_format=torch.channels_last)):
        actual = emulated.solve_backward(gradient, x, strided_weight, orders, corner, transposed)
        wanted = cpu.solve_backward(gradient, x, weight, orders, corner, transposed)
        for a, b in zip(actual, wanted, strict=True):
            assert_same(a, b)


def test_allow_tf32_reaches_both_kernels(emulated: Any) -> None:
    """The fourth digit changes where products are rounded, and only if that was asked for."""
    y, grad, weight, bias = tensors(PROBLEMS[1], torch.float32, torch.float32)
    codes = ((1,), 2, False)
    x = emulated.solve(y, weight, bias, *codes)
    exact = [x, *emulated.solve_backward(grad, x, weight, *codes)]
    found = [emulated.solve(y, weight, bias, *codes, True), *emulated.solve_backward(grad, x, weight, *codes, True)]
    for rounded, wanted in zip(found, exact, strict=True):
        error = (rounded - wanted).abs().max() / wanted.abs().max()
        assert 1e-5 < error < 3e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_volumes_go_to_the_solve_by_planes(emulated: Any, transposed: bool) -> None:
    case = Case(2, 4, 3, 2, (2, 2, 2), 2, ("back_top_right", "front_bottom_left"), "unit_triangular", depth=3)
    y, weight, bias = case.tensors(torch.float32)
    codes = (case.order_codes, case.corner_code, transposed)
    x, grad = cpu.solve(y, weight, bias, *codes), torch.randn_like(y)
    assert_same(emulated.solve(y, weight, bias, *codes), x)
    for a, b in zip(
        emulated.solve_backward(grad, x, weight, *codes), cpu.solve_backward(grad, x, weight, *codes), strict=True
    ):
        assert_same(a, b)
    empty = emulated.solve(y[:0], weight, bias, *codes)
    grads = emulated.solve_backward(empty, empty, weight, *codes)
    assert [t.shape for t in (empty, *grads)] == [y[:0].shape, y[:0].shape, weight.shape, bias.shape]


def test_empty_batch(emulated: Any) -> None:
    y, _, weight, bias = tensors(PROBLEMS[0], torch.float32, torch.float32)
    x = emulated.solve(y[:0], weight, bias, (0, 3), 1, False)
    assert x.shape == y[:0].shape
    for actual, shape in zip(
        emulated.solve_backward(x, x, weight, (0, 3), 1, False), (x.shape, weight.shape, bias.shape), strict=True
    ):
        assert actual.shape == shape
        assert (actual == 0).all()


def test_too_many_channels_for_shared_memory(emulated: Any) -> None:
    y, weight = torch.zeros(1, 2000, 2, 1), torch.zeros(2000, 2000, 1, 1)
    with pytest.raises(RuntimeError, match="2000 channels per group are more than fit this GPU's shared memory"):
        emulated.solve(y, weight, None, (0,), 0, False)


def test_bad_arguments_are_refused(emulated: Any) -> None:
    y, grad, weight, bias = tensors(PROBLEMS[0], torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="do not divide into"):
        emulated.solve(y, weight, None, (0, 0, 0, 0), 1, False)
    with pytest.raises(RuntimeError, match="bias"):
        emulated.solve(y, weight, bias.double(), (0, 0), 1, False)
    with pytest.raises(RuntimeError, match="agree in shape"):
        emulated.solve_backward(grad[:2], y, weight, (0, 0), 1, False)
