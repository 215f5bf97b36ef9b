"""The value of the solve: every order, corner kind, shape, dtype, batch and memory layout."""

from __future__ import annotations

import itertools
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow import build_info, explain, functional, reference
from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.ops import library as ops

from ..cases import (
    BATCHES,
    DIFFERENTIABLE,
    DTYPES,
    FEW,
    FEW_MORE,
    GAIN,
    LAYOUTS,
    ORDERS,
    OVERLAPPING,
    SHAPES,
    Case,
)
from ..checks import (
    check_consistent,
    check_containment,
    check_gradients,
    check_layout,
    check_repeatable,
    check_value,
    solve,
    torch_threads,
)

TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.alike
@DTYPE
@TRANSPOSED
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_value(case: Case, transposed: bool, dtype: torch.dtype, device: torch.device) -> None:
    check_value(case, *case.tensors(dtype, device), transposed)


@DTYPE
@TRANSPOSED
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "case",
    [Case(1, 3, 5, 4, order="bottom_left"), Case(1, 4, 3, 9, (2, 2), 2, ("top_right", "top_left"), "unit_triangular")],
    ids=str,
)
def test_batches(case: Case, batch: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = case.with_batch(batch)
    check_value(case, *case.tensors(dtype, device), transposed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*FEW, *FEW_MORE], ids=str)
def test_half_precision_images_with_float32_weights(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    tensors = case.tensors(dtype, device, weight_dtype=torch.float32)
    check_value(case, *tensors)
    check_gradients(case, *tensors)


@DTYPE
@pytest.mark.parametrize("case", [*DIFFERENTIABLE[::2], *FEW], ids=str)
def test_gradients(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check_gradients(case, *case.tensors(dtype, device))


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_of_every_batch(batch: int, device: torch.device) -> None:
    case = Case(batch, 4, 4, 5, groups=2, order=("bottom_left", "top_right"), corner="unit_triangular")
    check_gradients(case, *case.tensors(torch.float32, device))


@pytest.mark.parametrize("case", [Case(33, 2, 3, 140), Case(33, 2, 60, 5)], ids=str)
def test_gradients_of_every_batch_of_long_rows_and_of_many(case: Case, device: torch.device) -> None:
    """With images as lanes the steps of a slab are summed a part at a time: of a row, or of all rows."""
    check_gradients(case, *case.tensors(torch.float32, device))


@pytest.mark.parametrize("case", [*FEW, *FEW_MORE], ids=str)
def test_the_public_function_is_the_solve(case: Case, device: torch.device) -> None:
    tensors = case.tensors(torch.float32, device)
    torch.testing.assert_close(case.inverse_conv(*tensors, **case.arguments), solve(case, *tensors), rtol=0, atol=0)


@pytest.mark.parametrize("case", [*FEW, *FEW_MORE], ids=str)
def test_one_image_alone(case: Case, device: torch.device) -> None:
    input, weight, bias = case.tensors(torch.float64, device)
    for function in (case.inverse_conv, case.causal_conv):
        alone = function(input[0], weight, bias, **case.arguments)
        torch.testing.assert_close(alone, function(input, weight, bias, **case.arguments)[0])


@pytest.mark.parametrize(
    "case",
    [Case(1, 3, 4, 9, dilation=(1, 3)), Case(1, 3, 4, 9, dilation=(2, 1)), Case(1, 2, None, 8, (3,), dilation=2)],
)
def test_one_dilated_axis_of_one_image_is_not_copied(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator reads the residue classes where they are, and its output is what is returned."""
    input, weight, bias = case.tensors(torch.float32)
    seen: list[int] = []

    def listen(images: Tensor, *rest: Any) -> Tensor:
        output = operator(images, *rest)
        seen.extend((images.data_ptr(), output.data_ptr()))
        return output

    operator = ops.solve
    monkeypatch.setattr(ops, "solve", listen)
    output = case.inverse_conv(input, weight, bias, **case.arguments)
    assert seen == [input.data_ptr(), output.data_ptr()]
    check_value(case, input, weight, bias, found=output)


def test_the_defaults_are_top_left_one_group_general_corner(device: torch.device) -> None:
    case = Case(3, 2, 4, 5)
    input, weight, _ = case.tensors(torch.float64, device)
    check_value(case, input, weight, None, found=inverse_conv2d(input, weight))


@pytest.mark.parametrize("case", [*SHAPES[::5], *FEW], ids=str)
def test_adjoint_and_round_trips(case: Case, device: torch.device) -> None:
    check_consistent(case, device)


@TRANSPOSED
@pytest.mark.parametrize(
    "case", [*FEW, *FEW_MORE, Case(10, 9, 3, 17), Case(2, 17, 9, 8), Case(9, 2, 4, 5, (1, 1))], ids=str
)
@pytest.mark.parametrize("layout", [*LAYOUTS, *OVERLAPPING])
def test_layouts(case: Case, layout: str, transposed: bool, device: torch.device) -> None:
    check_layout(case, (LAYOUTS | OVERLAPPING)[layout], transposed, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(10, 9, 3, 17), Case(2, 17, 9, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_dtypes(case: Case, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    input, weight, bias = case.tensors(dtype, device)
    check_value(case, LAYOUTS[layout](input), weight, bias)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (0, 3, 4, 5), (2, 3, 1, 5), (1, 1, 1, 1)])
def test_the_memory_format_is_that_of_empty_like(shape: tuple[int, ...], device: torch.device) -> None:
    weight = torch.zeros(shape[1], shape[1], 2, 2, device=device)
    for order in itertools.permutations(range(4)):
        y = torch.zeros([shape[d] for d in order], device=device).permute([order.index(d) for d in range(4)])
        for view in (y, y[:, :, :, ::2], y[::2], y.expand(shape), y[:1].expand(shape[0] and 3, -1, -1, -1)):
            assert inverse_conv2d(view, weight, corner="identity").stride() == torch.empty_like(view).stride()


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "stepped"])
def test_weight_and_bias_of_any_layout(layout: str, device: torch.device) -> None:
    case = Case(9, 3, 4, 5)
    input, weight, bias = case.tensors(torch.float32, device)
    bias = torch.stack([bias, bias])[:, :].mT[:, 0]
    assert bias.stride() == (1,) or not bias.is_contiguous()
    check_value(case, input, LAYOUTS[layout](weight), bias)
    check_gradients(case, input, LAYOUTS[layout](weight), bias)


@pytest.mark.parametrize("case", [*FEW, *FEW_MORE], ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, *OVERLAPPING])
def test_layouts_of_the_incoming_gradient(case: Case, layout: str, device: torch.device) -> None:
    input, weight, bias = case.tensors(torch.float32, device)
    check_gradients(case, input, weight, bias, (LAYOUTS | OVERLAPPING)[layout](torch.randn_like(input)))


def test_the_gradient_of_a_sum_is_an_expanded_one() -> None:
    case = Case(9, 3, 4, 5)
    input, weight, bias = case.tensors(torch.float64)
    inverse_conv2d(input.requires_grad_(), weight, bias).sum().backward()
    exact = torch.autograd.grad(reference.inverse_conv2d_dense(input, weight, bias).sum(), input)[0]
    torch.testing.assert_close(input.grad, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [*FEW, *FEW_MORE, Case(33, 2, 3, 4), Case(1, 1, 40, 12, (3, 3))], ids=str)
def test_a_bad_value_stays_in_its_image(case: Case, value: float, device: torch.device) -> None:
    for image in {0, case.batch // 2, case.batch - 1}:
        ends = [tuple(0 for _ in case.sizes), (case.sizes[0] - 1, *(0 for _ in case.sizes[1:]))]
        for pixel in [*ends, tuple(size // 2 for size in case.sizes)]:
            check_containment(case, image, case.channels // 2, pixel, value, device)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", [*FEW, *FEW_MORE, Case(100, 6, 6, 5), Case(1, 3, 70, 20)], ids=str)
def test_repeated_runs_are_bit_identical(case: Case, count: int, device: torch.device) -> None:
    with torch_threads(count):
        check_repeatable(case, device)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "case",
    [
        *FEW,
        Case(50, 6, 6, 5),
        Case(1, 1, 70, 9),
        Case(3, 2, 37, 5, order="top_right"),
        Case(1, 2, 9, 9, groups=2),
    ],
    ids=str,
)
def test_any_number_of_threads(case: Case, count: int) -> None:
    input, weight, bias = case.tensors(torch.float32)
    grad = torch.randn_like(input)

    def everything() -> list[Tensor]:
        codes = (case.order_codes, case.corner_code, False)
        x, transposed = solve(case, input, weight, bias), solve(case, input, weight, bias, True)
        return [x, transposed, *ops.solve_backward(grad, x, weight, *codes)]

    with torch_threads(count):
        found = everything()
    with torch_threads(1):
        check_value(case, input, weight, bias, found=found[0])
        check_value(case, input, weight, bias, transposed=True, found=found[1])
        for a, b in zip(found[2:], everything()[2:], strict=True):
            # Sums are added up in another order: their rounding is that of the largest, not of what is left.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_bands_that_are_cut_for_a_second_thread() -> None:
    case = Case(1, 12, 16, 41)
    input, weight, bias = case.tensors(torch.float32)
    with torch_threads(1):
        expected = solve(case, input, weight, bias)
    with torch_threads(2):
        torch.testing.assert_close(solve(case, input, weight, bias), expected)


@pytest.mark.parametrize("batch", [2, 9])
def test_pivoting(batch: int, device: torch.device) -> None:
    """Corner taps whose first pivots are zero."""
    case = Case(batch, 4, 3, 4)
    input, weight, bias = case.tensors(torch.float32, device)
    turned = torch.eye(4, device=device).flip(0)
    weight[:, :, -1, -1] = turned + 0.1 * turned.roll(1, 1)
    check_value(case, input, weight, bias)
    check_value(case, input, weight, bias, transposed=True)


@pytest.mark.parametrize("batch", [2, 9])
def test_solutions_that_grow(batch: int, device: torch.device) -> None:
    """Large taps make the solution grow by orders of magnitude; it stays as accurate as the plain recurrence's."""
    case = Case(batch, 3, 8, 9, corner="unit_triangular")
    input, weight, bias = case.tensors(torch.float32, device)
    weight = -5 * weight.abs()  # all taps pull the same way
    assert inverse_conv2d(input, weight, bias, **case.arguments).abs().max() > 1e4
    check_value(case, input, weight, bias)


@pytest.mark.parametrize("batch", [2, 9])
def test_overflow_is_infinite_or_nan_and_never_a_wrong_number(batch: int, device: torch.device) -> None:
    case = Case(batch, 2, 12, 12, corner="identity")
    input, weight, bias = case.tensors(torch.float32, device)
    weight *= 1e6
    x = inverse_conv2d(input, weight, bias, **case.arguments)
    plain = reference.inverse_conv2d(input, weight, bias, **case.arguments)
    assert not x.isfinite().all()
    both = x.isfinite() & plain.isfinite()
    torch.testing.assert_close(x[both], plain[both], rtol=1e-2, atol=0)
    # The two may overflow at slightly different pixels only.
    assert (x.isfinite() == plain.isfinite()).float().mean() > 0.95


def test_float16_results_beyond_its_range_become_infinite() -> None:
    weight = torch.full((1, 1, 1, 1), 0.01)
    x = inverse_conv2d(torch.full((9, 1, 2, 2), 1e4, dtype=torch.float16), weight)
    assert x.dtype == torch.float16
    assert x.isinf().all()


@pytest.mark.parametrize("case", [Case(9, 1, 3, 8, (1, 1), bias=False), Case(2, 1, 9, 8, (1, 1), bias=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_survives(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """All 65,536 bit patterns through the kernels' conversions: with M = I the solve is the identity."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    pixels = case.height * case.width
    padded = torch.cat([bits, bits[: -len(bits) % (case.batch * pixels)]])
    values = padded.to(device).view(dtype).view(-1, 1, case.height, case.width)
    weight = torch.ones(1, 1, 1, 1, device=device)
    for part in values.split(case.batch):
        x = inverse_conv2d(part, weight, corner="identity")
        torch.testing.assert_close(x, part, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [2, 9])
def test_rounding_to_half_precision_is_to_nearest_even(batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Scaled numbers, whose results need rounding, among them subnormal ones and those next to overflow."""
    scale = torch.tensor([1.0009765625, 3.0, 0.3333, 1024.7, 1e-7, 1e-5, 60000.0, 1 + 2.0**-9], device=device)
    y = torch.randn(batch, 8, 5, 8).to(device, dtype)
    weight = torch.diag(1 / scale).view(8, 8, 1, 1)
    inverse = torch.linalg.inv(weight.view(8, 8).double()).float().diagonal()
    expected = (y.float() * inverse.view(1, 8, 1, 1)).to(dtype)
    torch.testing.assert_close(inverse_conv2d(y, weight), expected, rtol=0, atol=0)


def test_strides_beyond_2_to_the_31() -> None:
    """Offsets need 64 bits. The memory is reserved, never touched but for the elements read."""
    step = 2**31 + 8
    shape, stride = (2, 2, 3, 4), (step, step // 2, 16, 1)
    size = 4 * (sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1)
    if not sys.platform.startswith("linux"):
        pytest.skip("reserving memory without using it is done the Linux way")
    reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    case = Case(*shape, order="bottom_right")
    input, weight, bias = case.tensors(torch.float32)
    far = torch.frombuffer(reserved, dtype=torch.float32).as_strided(shape, stride)
    far.copy_(input)
    torch.testing.assert_close(solve(case, far, weight, bias), solve(case, input, weight, bias), rtol=0, atol=0)
    x = solve(case, input, weight, bias)
    arguments = (weight, case.order_codes, case.corner_code, False)
    for found, expected in zip(
        (*ops.solve_backward(far, x, *arguments), *ops.solve_backward(x, far, *arguments)),
        (*ops.solve_backward(input, x, *arguments), *ops.solve_backward(x, input, *arguments)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def free_memory_gib() -> float:
    """What Linux says is free for new programs."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return found["MemAvailable"] / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or free_memory_gib() < 9, reason="needs 9 GiB of free memory")
def test_more_than_2_to_the_31_elements() -> None:
    case = Case(66, 1, 4099, 7944, (2, 2), corner="identity", order="bottom_right", bias=False)
    one, weight, _ = case.with_batch(1).tensors(torch.float16, weight_dtype=torch.float32)
    images = one.expand(case.batch, -1, -1, -1)
    assert images.numel() > 2**31
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN first would double the time
    x = solve(case, images, weight, None)
    few = solve(case.with_batch(9), images[:9], weight, None)
    for image in (0, 32, case.batch - 1):
        assert torch.equal(x[image], few[0])


def check_by_convolutions(
    shape: tuple[int, ...], kernel: tuple[int, int], order: str, dtype: torch.dtype, tolerance: float
) -> None:
    """For images too large for the dense oracle plain convolutions judge: A(w) x = y − b, and ∂L/∂w = −Σ u xᵀ is the
    gradient of −⟨A(w) x + b, u⟩. They run in float64."""
    channels = shape[1]
    y = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(channels, channels, *kernel, dtype=dtype) * GAIN / (channels * kernel[0] * kernel[1])
    weight.requires_grad_()
    bias = torch.randn(channels, dtype=dtype, requires_grad=True)
    g = torch.randn(shape, dtype=dtype)
    options = {"order": order, "corner": "unit_triangular"}

    x = inverse_conv2d(y, weight, bias, **options)
    u, grad_weight, grad_bias = torch.autograd.grad(x, (y, weight, bias), g)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    again = causal_conv2d(*exact, **options)
    adjoint, expected_weight, expected_bias = torch.autograd.grad(again, exact, u.double())
    for found, expected in [(again, y), (adjoint, g), (-expected_weight, grad_weight), (-expected_bias, grad_bias)]:
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=tolerance * scale)


# With images as lanes the CPU solves slabs of 192 to 400 KiB one after the other, and a row larger than that in
# stretches: a pixel takes 64 bytes a channel in float64 at least, twice that in the backward pass. One thread, since
# more would rather share the rows of few images.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        pytest.param((24, 16, 20, 30), (3, 3), id="slabs of several rows"),
        pytest.param((32, 24, 7, 100), (5, 2), id="slabs of fewer rows than the kernel has"),
        pytest.param((17, 32, 4, 240), (3, 3), id="rows in stretches"),
    ],
)
def test_images_of_many_slabs(shape: tuple[int, ...], kernel: tuple[int, int], order: str) -> None:
    with torch_threads(1):
        assert explain(shape, kernel, dtype=torch.float64).regime == "images as lanes"
        check_by_convolutions(shape, kernel, order, torch.float64, 1e-12)


# With rows as lanes a line goes on with one band of the image after the other, if the image is wide enough for the
# threads that share it. The backward pass joins bands on one thread alone.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("order", ["top_left", "bottom_right", "top_right"])
@pytest.mark.parametrize(
    ("shape", "kernel", "joined"),
    [
        pytest.param((1, 3, 40, 70), (3, 3), True, id="several bands"),
        pytest.param((1, 7, 33, 130), (3, 2), True, id="a last band of one row"),
        pytest.param((2, 13, 24, 65), (5, 5), True, id="a last band of half the rows"),
        pytest.param((1, 2, 49, 150), (12, 12), True, id="a kernel of more rows than a band"),
        pytest.param((2, 4, 18, 20), (1, 3), False, id="too narrow to join"),
        pytest.param((1, 3, 34, 2500), (2, 4), True, id="long stretches"),
    ],
)
def test_bands_of_one_line(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    joined: bool,
    threads: int,
    order: str,
    dtype: torch.dtype,
) -> None:
    with torch_threads(threads):
        plan = explain(shape, kernel, dtype=dtype)
        assert plan.regime == "rows as lanes"
        if threads == 1 and build_info()["cpu_isa"] == "avx2" and dtype == torch.float32:
            assert plan.joined == joined
        check_by_convolutions(shape, kernel, order, dtype, 1e-12 if dtype == torch.float64 else 2e-5)


def test_results_of_joined_bands_do_not_depend_on_the_threads() -> None:
    y, weight = torch.randn(1, 5, 70, 140), torch.randn(5, 5, 3, 3) * GAIN / 45
    found = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            found.append(inverse_conv2d(y, weight, corner="identity"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_taps_further_apart_than_the_image_is_wide(dimensions: int) -> None:
    """They meet nothing, and take no memory, in both directions."""
    sizes, far = (3, 4, 2)[:dimensions], 10**9
    y = torch.randn(2, 2, *sizes, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, *(3,) * dimensions, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64)
    corner = weight[(..., *(-1,) * dimensions)]
    x = getattr(functional, f"inverse_conv{dimensions}d")(y, weight, bias, dilation=far)
    expected = torch.einsum("oc,bc...->bo...", corner.inverse(), y - bias.view(-1, *(1,) * dimensions))
    torch.testing.assert_close(x, expected)
    again = getattr(functional, f"causal_conv{dimensions}d")(x, weight, bias, dilation=far)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(
        torch.autograd.grad(x.square().sum(), (y, weight), retain_graph=True),
        torch.autograd.grad(expected.square().sum(), (y, weight)),
    )
