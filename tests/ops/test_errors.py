"""Every wrong argument is named, with what was given and what would be right."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from inverse_flow import InverseConv2d, functional, reference
from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.ops import native

Y, W, B = torch.randn(2, 4, 3, 3), torch.randn(4, 4, 2, 2) + 2 * torch.eye(4)[..., None, None], torch.zeros(4)
INPUTS = {"input": Y, "weight": W, "bias": B}
FUNCTIONS = [
    inverse_conv2d,
    causal_conv2d,
    reference.inverse_conv2d,
    reference.inverse_conv2d_dense,
    # Which pads the images, and takes the bias off them, before the operator sees them.
    partial(inverse_conv2d, dilation=2),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"input": Y.int()}, TypeError, r"input must be float32, .*, got torch.int32"),
        ({"input": Y.to(torch.complex64)}, TypeError, r"got torch.complex64"),
        ({"input": Y.to_sparse()}, TypeError, "input must be a dense tensor, got one of layout torch.sparse_coo"),
        ({"weight": W.to_sparse()}, TypeError, "weight must be a dense tensor"),
        ({"weight": W.bool()}, TypeError, r"weight must be float32, .*, got torch.bool"),
        ({"bias": B.long()}, TypeError, r"bias must be float32, .*, got torch.int64"),
        ({"input": Y[0, 0]}, ValueError, r"input must have shape \(B, C, H, W\).*, got \(3, 3\)"),
        ({"input": Y[..., None]}, ValueError, r"input must have shape \(B, C, H, W\)"),
        ({"input": Y[..., None], "weight": W[..., None]}, ValueError, r"input must have shape \(B, C, H, W\)"),
        ({"dilation": 0}, ValueError, r"dilation must be one integer or a sequence of 2, each at least 1, got 0"),
        ({"dilation": (1, 2, 3)}, ValueError, r"dilation must be .*, got \(1, 2, 3\)"),
        ({"dilation": 1.5}, ValueError, "dilation must be .*, got 1.5"),
        ({"dilation": True}, ValueError, "dilation must be .*, got True"),
        ({"dilation": 1.0}, ValueError, "dilation must be .*, got 1.0"),
        ({"input": Y[:, :0]}, ValueError, r"at least one channel and one pixel, got shape \(2, 0, 3, 3\)"),
        ({"input": Y[:, :, :0]}, ValueError, r"at least one channel and one pixel, got shape \(2, 4, 0, 3\)"),
        ({"input": Y[..., :0]}, ValueError, r"at least one channel and one pixel, got shape \(2, 4, 3, 0\)"),
        (
            {"weight": W[:3]},
            ValueError,
            r"weight must have shape \(4, 4, kH, kW\) for 4 channels in 1 group, got \(3, ",
        ),
        ({"weight": W[:, :2]}, ValueError, r"weight must have shape \(4, 4, kH, kW\)"),
        ({"weight": W[..., :0]}, ValueError, r"weight must have shape .*, got \(4, 4, 2, 0\)"),
        ({"weight": W[0]}, ValueError, r"weight must have shape .*, got \(4, 2, 2\)"),
        ({"groups": 2}, ValueError, r"weight must have shape \(4, 2, kH, kW\) for 4 channels in 2 groups"),
        ({"groups": 3}, ValueError, r"channels of input \(4\) must be divisible by groups \(3\)"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"groups": 1.0}, TypeError, "groups must be an integer, got 1.0"),
        ({"groups": True}, TypeError, "groups must be an integer, got True"),
        ({"bias": B[:3]}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"bias": torch.tensor(1.0)}, ValueError, r"bias must have shape \(4,\), got \(\)"),
        ({"bias": B.view(1, 4)}, ValueError, r"bias must have shape \(4,\), got \(1, 4\)"),
        ({"weight": W.double()}, ValueError, "weight must be torch.float32 like input, got torch.float64"),
        ({"weight": W.half()}, ValueError, "weight must be torch.float32 like input, got torch.float16"),
        ({"input": Y.half(), "weight": W.double()}, ValueError, "weight must be torch.float16 or torch.float32"),
        ({"input": Y.half(), "weight": W.bfloat16()}, ValueError, "weight must be torch.float16 or torch.float32"),
        ({"bias": B.double()}, ValueError, "bias must be torch.float32 like weight, got torch.float64"),
        ({"input": Y.half(), "weight": W.half()}, ValueError, "bias must be torch.float16 like weight"),
        ({"order": "left_top"}, ValueError, "order must be one of top_left, top_right, .*, got 'left_top'"),
        ({"order": ["top_left", "top_right"]}, ValueError, "one name for each of the 1 groups, got 2 names"),
        ({"order": [0]}, ValueError, "order must be one of .*, got 0"),
        ({"order": {"top_left"}}, TypeError, "order must be one name or a sequence of .*, got {'top_left'}"),
        ({"order": None}, TypeError, "order must be one name or a sequence of .*, got None"),
        ({"corner": ["general"]}, ValueError, r"corner must be one of .*, got \['general'\]"),
        ({"corner": "plu"}, ValueError, "corner must be one of identity, unit_triangular, general, got 'plu'"),
        ({"input": Y.to("meta")}, RuntimeError, "weight is on cpu but input is on meta: move one of them"),
        ({"bias": B.to("meta")}, RuntimeError, "bias is on meta but input is on cpu"),
    ],
)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_arguments(
    function: Any, change: dict[str, Any], error: type[Exception], message: str, with_gradients: bool
) -> None:
    arguments = {name: value.clone().requires_grad_(with_gradients) for name, value in INPUTS.items()}
    function(**arguments)
    with pytest.raises(error, match=message):
        function(**(arguments | change))


@pytest.mark.parametrize("name", ["inverse_conv", "causal_conv"])
@pytest.mark.parametrize(
    ("dimensions", "shape", "kernel", "images"),
    [
        (1, (2, 4, 3, 3), (2, 2), r"\(B, C, L\) or \(C, L\)"),
        (1, (4,), (2,), r"\(B, C, L\) or \(C, L\)"),
        (2, (2, 4, 3, 3, 3), (2, 2, 2), r"\(B, C, H, W\) or \(C, H, W\)"),
        (3, (4, 3, 3), (2, 2, 2), r"\(B, C, D, H, W\) or \(C, D, H, W\)"),
    ],
)
def test_images_of_other_dimensions(
    name: str, dimensions: int, shape: tuple[int, ...], kernel: tuple[int, ...], images: str
) -> None:
    function = getattr(functional, f"{name}{dimensions}d")
    with pytest.raises(ValueError, match=f"input must have shape {images}, got"):
        function(torch.zeros(shape), torch.zeros(4, 4, *kernel), corner="identity")


@pytest.mark.parametrize(
    ("dimensions", "weight"), [(1, r"\(4, 4, kL\)"), (2, r"\(4, 4, kH, kW\)"), (3, r"\(4, 4, kD, kH, kW\)")]
)
def test_weights_and_orders_of_other_dimensions(dimensions: int, weight: str) -> None:
    function = getattr(functional, f"inverse_conv{dimensions}d")
    y = torch.zeros(2, 4, *(3,) * dimensions)
    with pytest.raises(ValueError, match=f"weight must have shape {weight}"):
        function(y, torch.zeros(4, 4, *(2,) * (dimensions % 3 + 1)))
    wrong = {1: "top_left", 2: "left", 3: "bottom_right"}[dimensions]
    with pytest.raises(ValueError, match=f"order must be one of .*, got '{wrong}'"):
        function(y, torch.zeros(4, 4, *(2,) * dimensions), order=wrong)


def test_arguments_under_vmap() -> None:
    solve_all = torch.vmap(inverse_conv2d, in_dims=(0, None))
    assert solve_all(Y[None], W).shape == (1, *Y.shape)
    assert solve_all(Y, W).equal(inverse_conv2d(Y, W))  # each of them alone
    with pytest.raises(ValueError, match=r"input must have shape \(B, C, H, W\) or \(C, H, W\), got \(3, 3\)"):
        solve_all(Y[:, 0], W)
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 4, kH, kW\)"):
        solve_all(Y[None], W[:3])


# torch.compile instantiates every autograd.Function it meets, which PyTorch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_arguments_when_tracing() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 4, kH, kW\)"):
        make_fx(partial(inverse_conv2d, corner="identity"), tracing_mode="fake")(Y, W[:3])
    with pytest.raises(Exception, match=r"weight must have shape \(4, 4, kH, kW\)"):
        torch.compile(inverse_conv2d, fullgraph=True, backend="eager")(Y, W[:3])


@pytest.mark.parametrize("batch", [0, 2, 9])
@pytest.mark.parametrize("transposed_too", [False, True])
def test_a_singular_corner_tap_names_the_channel(batch: int, transposed_too: bool) -> None:
    weight = torch.randn(6, 3, 2, 2)
    weight[:, :, -1, -1] = torch.eye(3).repeat(2, 1)
    weight[4, :, -1, -1] = 0  # group 1, its channel 1
    y = torch.randn(batch, 6, 3, 3, requires_grad=transposed_too)
    with pytest.raises(ValueError, match=r"the corner tap is singular: channel 4 "):
        inverse_conv2d(y, weight, groups=2)
    # The convolution itself does not mind.
    assert causal_conv2d(y, weight, groups=2).shape == y.shape


def test_corner_kinds_that_do_not_read_the_diagonal_cannot_be_singular() -> None:
    for corner in ("identity", "unit_triangular"):
        assert inverse_conv2d(Y, torch.zeros_like(W), corner=corner).equal(Y)


@pytest.mark.skipif(torch.cuda.is_available() and not native.cuda_absent_reason, reason="CUDA is built here")
def test_cuda_tensors_without_the_cuda_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the device is looked at, so a fake one will do."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y, w = torch.empty(2, 4, 3, 3, device="cuda"), torch.empty(4, 4, 2, 2, device="cuda")
        with pytest.raises(RuntimeError, match=r"input is on cuda.*kernels are not available.*install"):
            inverse_conv2d(y, w)


def test_other_devices() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y, w = torch.empty(2, 4, 3, 3, device="xpu"), torch.empty(4, 4, 2, 2, device="xpu")
        with pytest.raises(RuntimeError, match="runs on CPU and CUDA tensors, got a tensor on xpu"):
            inverse_conv2d(y, w)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"channels": 2.0}, TypeError, "channels must be an integer, got 2.0"),
        ({"channels": True}, TypeError, "channels must be an integer, got True"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be one integer or a sequence of 2, each at least 1, got 0"),
        ({"dilation": True}, ValueError, "dilation must be .*, got True"),
        ({"dilation": (2, 0)}, ValueError, r"dilation must be .*, got \(2, 0\)"),
        ({"kernel_size": (3, 0)}, ValueError, r"kernel_size .*, got \(3, 0\)"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size .*, got \(3, 3, 3\)"),
        ({"kernel_size": 2.5}, ValueError, "kernel_size .* got 2.5"),
        ({"groups": 3}, ValueError, r"channels \(4\) must be divisible by groups \(3\)"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"order": "centre"}, ValueError, "order must be one of .*, got 'centre'"),
        ({"order": ["top_left"] * 3}, ValueError, "order must be one name or one name for each of the 1 groups, got 3"),
        ({"corner": "general"}, ValueError, "corner must be identity, unit_triangular or plu, got 'general'"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, .*, got torch.int32"),
    ],
)
def test_module_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InverseConv2d(**({"channels": 4} | arguments))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_module_calls(direction: str) -> None:
    call = getattr(InverseConv2d(4), direction)
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got str"):
        call("image")
    with pytest.raises(ValueError, match=r"InverseConv2d takes batches of shape \(B, 4, H, W\), got \(4, 3, 3\)"):
        call(Y[0])
    with pytest.raises(ValueError, match=r"InverseConv2d takes batches of shape \(B, 4, H, W\), got \(2, 3, 3, 3\)"):
        call(Y[:, :3])
    with pytest.raises(ValueError, match=r"weight must be torch\.float64 like input, got torch\.float32"):
        call(Y.double())


def test_memory_that_is_short_is_named_in_bytes() -> None:
    """In a process of its own with a limited address space: working memory, and the result itself."""
    script = """
import resource, torch
from inverse_flow.functional import inverse_conv2d
# Beside the libraries, which take gigabytes of addresses with a CUDA build of PyTorch: room for the first result alone.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 9 * 2**29,) * 2)
weight = torch.zeros(1, 1, 3, 3)
weight[..., -1] = 1.0
for shape in ((9, 1, 3, 3 * 10**7), (1, 1, 1, 2 * 10**9)):
    try:
        inverse_conv2d(torch.ones(1, 1, 1, 1).expand(shape), weight)
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"out of memory: the solve needs \d{10,11} bytes of working memory", lines[0])
    assert "8000000000 bytes" in lines[1]
