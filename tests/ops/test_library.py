"""The registered operators: schemas, fake kernels, torch.compile, and the checks that guard direct calls."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow import InverseConv2d
from inverse_flow.ops import library as ops

from ..cases import FEW, FEW_MORE, LAYOUTS, Case

SOLVE = torch.ops.inverse_flow.solve
SOLVE_BACKWARD = torch.ops.inverse_flow.solve_backward


@pytest.mark.parametrize(
    ("case", "transposed", "dtype", "layout"),
    [
        (FEW[0], False, torch.float32, "contiguous"),
        (FEW[0], True, torch.bfloat16, "channels_last"),
        (FEW[1], True, torch.float64, "channels_last"),
        (FEW[1], False, torch.float32, "batch_last"),
    ],
    ids=str,
)
def test_opcheck(case: Case, transposed: bool, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    input, weight, bias = case.tensors(dtype, device)
    weight = weight.masked_fill(weight.isnan(), 0)  # opcheck compares arguments before and after with ==
    images = LAYOUTS[layout](input)
    codes = (list(case.order_codes), case.corner_code, transposed)
    torch.library.opcheck(SOLVE, (images, weight, bias, *codes))
    torch.library.opcheck(SOLVE, (images, weight, None, *codes))
    torch.library.opcheck(SOLVE_BACKWARD, (torch.randn_like(images), images, weight, *codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_with_float32_weights(dtype: torch.dtype) -> None:
    input, weight, bias = Case(9, 3, 4, 5).tensors(dtype, weight_dtype=torch.float32)
    torch.library.opcheck(SOLVE, (input, weight, bias, [0], 2, False))
    torch.library.opcheck(SOLVE_BACKWARD, (input, input, weight, [0], 2, False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_lie_like_real_ones(layout: str) -> None:
    case = FEW[0]
    input, weight, bias = case.tensors(torch.float32)
    images, grad = LAYOUTS[layout](input), LAYOUTS["channels_last"](torch.randn_like(input))
    codes = (case.order_codes, case.corner_code, False)
    real = [ops.solve(images, weight, bias, *codes), *ops.solve_backward(grad, images, weight, *codes)]
    meta = [t.to("meta") for t in (weight, bias)]
    far = torch.empty_strided(images.shape, images.stride(), device="meta")
    fake = [
        ops.solve(far, *meta, *codes),
        *ops.solve_backward(grad.to("meta"), far, meta[0], *codes),
    ]
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def compiled_against_eager(function: Any, tensors: list[Tensor], **options: Any) -> None:
    compiled = torch.compile(function, fullgraph=True, **options)
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in tensors]
        expected = function(*leaves)
        expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
        found = compiled(*leaves)
        grads = torch.autograd.grad(found.square().sum(), leaves)
        torch.testing.assert_close((found, *grads), (expected, *expected_grads))


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# torch.compile instantiates every autograd.Function it meets, which PyTorch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
class TestCompile:
    """torch.compile takes the operator whole: forward and backward, no graph break."""

    @pytest.mark.parametrize("case", [*FEW, *FEW_MORE], ids=str)
    def test_aot_eager(self, case: Case) -> None:
        tensors = [t for t in case.tensors(torch.float32) if t is not None]
        tensors[1] = tensors[1].masked_fill(tensors[1].isnan(), 0)

        def function(*t: Tensor) -> Tensor:
            return torch.sin(case.inverse_conv(*t, **case.arguments)) * 2

        compiled_against_eager(function, tensors, backend="aot_eager")

    @pytest.mark.parametrize(
        "case",
        [
            Case(1, 3, 4, 5),
            Case(1, 3, None, 5, (3,)),
            # The compiler takes half a minute to reason about its sizes.
            pytest.param(Case(1, 3, 4, 5, dilation=(2, 3)), marks=pytest.mark.thorough),
        ],
        ids=str,
    )
    def test_dynamic_shapes_and_layouts(self, case: Case) -> None:
        solve = partial(case.inverse_conv, **case.arguments)
        function = torch.compile(solve, fullgraph=True, dynamic=True, backend="aot_eager")
        weight = case.tensors(torch.float32)[1]
        for batch, *sizes in [(2, 4, 5), (9, 6, 3)]:  # of dilated ones, with and without a margin
            for layout in ("contiguous", "channels_last"):
                images = LAYOUTS[layout](torch.randn(batch, 3, *sizes[: case.dimensions]))
                found, expected = function(images, weight), solve(images, weight)
                torch.testing.assert_close(found, expected)
                assert found.stride() == expected.stride()

    @pytest.mark.parametrize("corner", ["identity", "unit_triangular", "plu"])
    def test_a_layer(self, corner: str) -> None:
        layer = InverseConv2d(4, groups=2, order=("top_right", "bottom_left"), corner=corner)
        x = torch.randn(3, 4, 5, 6)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x)[0].square().sum().backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad)

    def test_export(self) -> None:
        layer = InverseConv2d(3)
        x = torch.randn(2, 3, 4, 5)
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x))


IMAGES, WEIGHT = torch.zeros(2, 4, 3, 3), torch.zeros(4, 4, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(4, 3, 3)}, r"images must be \(B, C, H, W\), volumes \(B, C, D, H, W\), got 3"),
        ({"input": torch.zeros(2, 4, 3, 3, dtype=torch.int32)}, "images must be float32"),
        ({"input": torch.zeros(2, 4, 0, 3)}, "at least one pixel"),
        ({"weight": torch.zeros(4, 4, 2)}, "weight must be"),
        ({"weight": torch.zeros(4, 3, 2, 2)}, r"weight must be \(4, 4, kH, kW\), got \(4, 3, 2, 2\)"),
        ({"weight": WEIGHT.double()}, "the weight must have the images' dtype"),
        ({"bias": torch.zeros(3)}, r"bias must be \(4,\)"),
        ({"bias": torch.zeros(4).double()}, "bias"),
        ({"orders": []}, "groups"),
        ({"orders": [0, 0, 0]}, "4 channels do not divide into 3 groups"),
        ({"orders": [4]}, "an order must be 0 to 3, got 4"),
        ({"orders": [-1]}, "an order must be 0 to 3, got -1"),
        ({"corner": 3}, "corner must be 0, 1 or 2, got 3"),
    ],
)
def test_direct_calls_are_checked(change: dict[str, Any], message: str) -> None:
    arguments = {"input": IMAGES, "weight": WEIGHT, "bias": None, "orders": [0], "corner": 0, "transposed": False}
    SOLVE(**arguments)
    with pytest.raises(RuntimeError, match=message):
        SOLVE(**(arguments | change))


def test_direct_calls_of_the_backward_are_checked() -> None:
    SOLVE_BACKWARD(IMAGES, IMAGES, WEIGHT, [0], 0, False)
    for grad in (IMAGES[:1], IMAGES.double(), IMAGES[..., :2]):
        with pytest.raises(RuntimeError, match="inverse_flow: "):
            SOLVE_BACKWARD(grad, IMAGES, WEIGHT, [0], 0, False)
