"""What only a GPU can show: streams, graph capture, devices. The case list itself runs through the `device` fixture."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from inverse_flow import InverseConv2d
from inverse_flow.functional import inverse_conv2d
from inverse_flow.reference import inverse_conv2d_dense

from ..cases import Case
from ..checks import check_gradients, solve
from ..conftest import HAS_CUDA
from ..tolerance import assert_accurate, state_dtype

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU and the CUDA module"),
]

# Well conditioned, one block per image and several tiles per image.
SHAPES = [(16, 8, 9, 7), (2, 3, 300, 200)]


def _problem(shape: tuple[int, ...], device: str = "cuda") -> tuple[Tensor, Tensor]:
    channels = shape[1]
    weight = torch.randn(channels, channels, 3, 3, device=device) * 0.2 / (9 * channels) ** 0.5
    return torch.randn(shape, device=device), weight


def _solve(images: Tensor, weight: Tensor) -> Tensor:
    return inverse_conv2d(images, weight, corner="unit_triangular")


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_on_the_current_stream(shape: tuple[int, ...]) -> None:
    images, weight = _problem(shape)
    want = _solve(images, weight)
    late = torch.zeros_like(images)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The images arrive late on the side stream; work on another stream would still see zeros.
        torch.cuda._sleep(50_000_000)
        late.copy_(images)
        got = _solve(late, weight)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_can_be_captured_in_a_graph(shape: tuple[int, ...]) -> None:
    images, weight = _problem(shape)
    images.requires_grad_()
    weight.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        output = _solve(images, weight)
        return (output, *torch.autograd.grad(output, (images, weight), torch.ones_like(output)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        images.copy_(torch.randn_like(images))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_repeated_runs_are_bit_identical() -> None:
    images, weight = _problem((64, 12, 16, 16))
    images.requires_grad_()
    weight.requires_grad_()
    outcomes = []
    for _ in range(20):
        output = _solve(images, weight)
        outcomes.append((output, *torch.autograd.grad(output.square().sum(), (images, weight))))
    assert all(torch.equal(a, b) for outcome in outcomes[1:] for a, b in zip(outcome, outcomes[0], strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device_not_on_the_current_one() -> None:
    images, weight = _problem((4, 3, 8, 8), "cuda:1")
    with torch.cuda.device(0):
        output = _solve(images, weight)
    assert output.device == images.device
    want = inverse_conv2d_dense(images, weight, corner="unit_triangular")
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)


# What a GPU with 227 KiB of shared memory takes other paths for: several tiles per image, weights streamed from L2,
# rings of diagonals, a corner inverted by many blocks, gradients on tensor cores in parts, tiles with margins, and
# pixels that move by four channels.
LARGE = [
    (Case(2, 3, 200, 120), torch.float64, False),
    (Case(1, 4, 300, 90, (3, 2), order="bottom_right"), torch.float32, False),
    (Case(2, 24, 64, 64, order="top_right"), torch.float32, False),
    (Case(100, 48, 32, 32), torch.float32, False),
    (Case(2, 200, 5, 4, order="bottom_left"), torch.float32, False),
    (Case(2, 3, 300, 200, corner="unit_triangular"), torch.bfloat16, False),
    *((Case(3, channels, 9, 12, corner="unit_triangular"), torch.float32, True) for channels in (4, 8, 12)),
    (Case(2, 48, 8, 8, corner="identity"), torch.float32, False),
]


@pytest.mark.parametrize(("case", "dtype", "channels_last"), LARGE, ids=str)
def test_paths_of_large_problems(case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    """Against the CPU's operators: a dense matrix would not fit."""
    images, weight, bias = case.tensors(dtype)
    assert bias is not None
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    on_gpu = (images.cuda(), weight.cuda(), bias.cuda())
    exact = solve(case, images.double(), weight.double(), bias.double())
    plain = solve(case, *(tensor.to(state_dtype(dtype)) for tensor in (images, weight, bias)))
    assert_accurate(solve(case, *on_gpu).cpu(), plain.to(dtype), exact, dtype)
    check_gradients(case, *on_gpu, dense=inverse_conv2d, recurrence=inverse_conv2d)


def test_a_singular_corner_gives_nan_without_a_synchronisation() -> None:
    images, weight = torch.randn(2, 3, 4, 4, device="cuda"), torch.zeros(3, 3, 2, 2, device="cuda")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        output = inverse_conv2d(images, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isnan().all()


def test_the_module_runs_on_a_gpu() -> None:
    layer = InverseConv2d(8, groups=4, order=("top_left", "top_right", "bottom_left", "bottom_right"), corner="plu")
    layer = layer.to("cuda")
    images = torch.randn(5, 8, 11, 6, device="cuda")
    latents, log_det = layer(images)
    back, back_log_det = layer.inverse(latents)
    torch.testing.assert_close(back, images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, -back_log_det)
    assert log_det.device == images.device
