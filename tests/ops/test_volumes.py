"""The raw operators on volumes: every order, corner kind, shape, dtype, regime and memory layout, against a dense solve
and a plain recurrence that are made here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow import explain
from inverse_flow.ops import library as ops

from ..cases import CORNERS, DTYPES, GAIN
from ..checks import torch_threads
from ..tolerance import assert_accurate, state_dtype

TRANSPOSED = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ALL_ORDERS = tuple(range(8))
OPPOSITE = 7
# Bits of an order, and the dimension that each mirrors.
MIRRORED = {4: -3, 2: -2, 1: -1}


@dataclass(frozen=True)
class Volumes:
    """One problem: A(w) x + b = y with ``channels`` in all, and one code of an order for each group."""

    batch: int
    channels: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    orders: tuple[int, ...] = (0,)
    corner: str = "general"
    bias: bool = True

    def __str__(self) -> str:
        size, kernel = ("x".join(map(str, sizes)) for sizes in (self.size, self.kernel))
        orders = "".join(map(str, self.orders))
        return f"{self.batch}x{self.channels}x{size}-k{kernel}-{orders}-{self.corner}" + (
            "" if self.bias else "-nobias"
        )

    @property
    def codes(self) -> tuple[tuple[int, ...], int]:
        return self.orders, CORNERS.index(self.corner)

    def corner_taps(self, weight: Tensor) -> Iterator[Tensor]:
        """The corner tap of each group, to be written to."""
        members = self.channels // len(self.orders)
        for part, order in zip(weight.split(members), self.orders, strict=True):
            index = [0 if order & bit else self.kernel[d] - 1 for bit, d in MIRRORED.items()]
            yield part[:, :, index[0], index[1], index[2]]

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random (input, weight, bias). Entries of the weight that must not be read are NaN."""
        members = self.channels // len(self.orders)
        weight = torch.randn(self.channels, members, *self.kernel, dtype=torch.float64)
        weight *= GAIN / weight[0].numel() ** 0.5
        for tap in self.corner_taps(weight):
            if self.corner == "identity":
                tap.fill_(float("nan"))
            elif self.corner == "unit_triangular":
                tap.masked_fill_(torch.ones(members, members, dtype=torch.bool).triu(), float("nan"))
            else:
                rotation = torch.linalg.qr(torch.randn(members, members, dtype=torch.float64)).Q
                tap.copy_(rotation * (0.7 + 0.7 * torch.rand(members, 1, dtype=torch.float64)))
        images = torch.randn(self.batch, self.channels, *self.size, dtype=torch.float64)
        bias = torch.randn(self.channels, dtype=torch.float64).to(dtype) if self.bias else None
        return images.to(dtype), weight.to(dtype), bias

    def effective(self, weight: Tensor) -> Tensor:
        """The weight with the whole M in the corner tap; differentiable."""
        members = self.channels // len(self.orders)
        fixed = torch.zeros_like(weight)
        unread = torch.zeros_like(weight, dtype=torch.bool)
        if self.corner != "general":
            triangle = torch.ones(members, members, dtype=torch.bool).triu(-members if self.corner == "identity" else 0)
            for value, mask in zip(self.corner_taps(fixed), self.corner_taps(unread), strict=True):
                value.copy_(torch.eye(members))
                mask.copy_(triangle)
        return torch.where(unread, fixed, weight)

    def convolve(self, weight: Tensor, images: Tensor) -> Tensor:
        """A(w) x for an effective weight, by PyTorch's own convolution."""
        members = self.channels // len(self.orders)
        parts = []
        for x, w, order in zip(images.split(members, 1), weight.split(members), self.orders, strict=True):
            padding = []
            for size, bit in zip(reversed(self.kernel), (1, 2, 4), strict=True):
                padding += [0, size - 1] if order & bit else [size - 1, 0]
            parts.append(F.conv3d(F.pad(x, padding), w))
        return torch.cat(parts, 1)

    def exact(self, weight: Tensor, right: Tensor, transposed: bool) -> Tensor:
        """A dense solve in float64."""
        pixels = math.prod(right.shape[1:])
        weight = self.effective(weight.double())
        matrix = self.convolve(weight, torch.eye(pixels, dtype=torch.float64).view(-1, *right.shape[1:]))
        matrix = matrix.flatten(1).mT
        return torch.linalg.solve(matrix.mT if transposed else matrix, right.double().flatten(1).mT).mT.view_as(right)

    def plain(self, weight: Tensor, right: Tensor, transposed: bool) -> Tensor:
        """The recurrence, one pixel after the other, in the state's dtype."""
        dtype, members = state_dtype(right.dtype), self.channels // len(self.orders)
        weight = self.effective(weight.to(dtype))
        parts = []
        groups = zip(right.to(dtype).split(members, 1), weight.split(members), self.orders, strict=True)
        for images, window, order in groups:
            # Every order is the first one on mirrored volumes; the transposed solve comes from the opposite corner.
            flips = [d for bit, d in MIRRORED.items() if (order ^ (OPPOSITE if transposed else 0)) & bit]
            w = window.flip([d for bit, d in MIRRORED.items() if order & bit])
            if transposed:
                w = w.transpose(0, 1)
            inverse = torch.linalg.inv(w[:, :, -1, -1, -1])
            taps = w.clone()
            taps[:, :, -1, -1, -1] = 0
            taps = taps.flatten(1).mT
            y = images.flip(flips)
            x = F.pad(torch.zeros_like(y), [n for size in reversed(self.kernel) for n in (size - 1, 0)])
            for z, h, c in itertools.product(*map(range, self.size)):
                place = tuple(slice(i, i + size) for i, size in zip((z, h, c), self.kernel, strict=True))
                known = x[(..., *place)].flatten(1) @ taps
                x[(..., *(p.stop - 1 for p in place))] = (y[:, :, z, h, c] - known) @ inverse.mT
            parts.append(x[(..., *(slice(size - 1, None) for size in self.kernel))].flip(flips))
        return torch.cat(parts, 1)


def right_side(input: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    input = input.to(dtype)
    return input if bias is None else input - bias.to(dtype).view(-1, 1, 1, 1)


def check_value(case: Volumes, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    found = ops.solve(input, weight, bias, *case.codes, transposed)
    plain = case.plain(weight, right_side(input, bias, state_dtype(input.dtype)), transposed).to(input.dtype)
    exact = case.exact(weight, right_side(input, bias, torch.float64), transposed)
    assert_accurate(found, plain, exact, input.dtype)
    return found


def check_gradients(case: Volumes, input: Tensor, weight: Tensor, transposed: bool = False) -> None:
    output = ops.solve(input, weight, None, *case.codes, transposed)
    grad = torch.randn_like(input)
    found = ops.solve_backward(grad, output, weight, *case.codes, transposed)

    def gradients(solve: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of input, weight and bias, and the sizes of the terms of that of the weight."""
        x, u = solve(weight, input.to(dtype), transposed), solve(weight, grad.to(dtype), not transposed)
        w = weight.detach().to(dtype).requires_grad_()
        left, right = (x, u) if transposed else (u, x)
        of = [torch.autograd.grad(case.convolve(case.effective(w), b), w, a)[0].to(dtype)
              for a, b in ((left, right), (left.abs(), right.abs()))]  # fmt: skip
        return u, -of[0], -u.sum((0, 2, 3, 4)), of[1]

    plain, exact = gradients(case.plain, state_dtype(input.dtype)), gradients(case.exact, torch.float64)
    sizes = (None, exact[3], exact[0].abs().sum((0, 2, 3, 4)))
    types = (input.dtype, weight.dtype, weight.dtype)
    for name, a, p, e, size, dtype in zip(("input", "weight", "bias"), found, plain, exact, sizes, types, strict=False):
        assert_accurate(a, p.to(dtype), e, input.dtype, f"grad_{name}", size)


CASES = [
    # Every order and corner kind, in both regimes.
    *(Volumes(2, 3, (3, 4, 5), orders=(order,), corner=corner) for order in ALL_ORDERS for corner in CORNERS),
    *(Volumes(10, 2, (4, 3, 4), (2, 3, 2), (order,), corner) for order in ALL_ORDERS for corner in CORNERS),
    # Groups, and orders of their own.
    Volumes(2, 4, (3, 4, 5), orders=(5, 2)),
    Volumes(9, 8, (2, 3, 4), orders=ALL_ORDERS, corner="identity"),
    Volumes(11, 6, (3, 3, 3), (2, 2, 2), (6, 1, 6), "unit_triangular"),
    # Kernels; also larger than the volume.
    *(
        Volumes(b, 2, (3, 5, 4), kernel, (3,))
        for b in (2, 9)
        for kernel in [(1, 1, 1), (1, 3, 3), (3, 1, 1), (1, 1, 4), (1, 4, 1), (5, 2, 3), (2, 7, 1), (4, 2, 6)]
    ),
    # One plane, row, column or pixel; odd sides.
    *(
        Volumes(b, 2, size, (3, 2, 3), (4,), "unit_triangular")
        for b in (1, 9)
        for size in [(1, 1, 1), (1, 5, 4), (6, 1, 1), (1, 1, 6), (1, 6, 1), (2, 9, 1), (7, 1, 9), (3, 11, 2)]
    ),
    # Several bands of rows, full and not; lanes at many planes at once; one plane, of which bands are joined.
    *(Volumes(b, 1, (4, 19, 5), orders=(7,)) for b in (1, 3)),
    *(Volumes(1, 2, (3, 35, 3), (2, 3, 2), (order,)) for order in (0, 6)),
    Volumes(2, 1, (6, 33, 1), (3, 3, 1), (5,)),
    Volumes(1, 1, (7, 34, 2), (5, 3, 2)),
    Volumes(1, 1, (1, 18, 30)),
    Volumes(1, 1, (2, 18, 9), (2, 21, 2), (2,)),
    # Channels on both sides of a register block.
    *(Volumes(b, c, (2, 3, 3), corner=corner) for b in (2, 9) for c in (1, 6, 7, 13) for corner in CORNERS[1:]),
    *(Volumes(1, c, (2, 20, 3), (2, 2, 2), corner=corner) for c in (5, 8) for corner in CORNERS[1:]),
    # Slabs of rows whose ring turns often.
    Volumes(17, 12, (3, 5, 8), (2, 3, 3), bias=False),
    # No images.
    Volumes(0, 2, (3, 4, 5)),
]  # fmt: skip
FEW = [
    Volumes(2, 3, (3, 4, 5), (2, 3, 2), (5,), "unit_triangular"),
    Volumes(9, 4, (3, 3, 4), orders=(6, 3), bias=False),
    Volumes(1, 2, (4, 35, 3), (3, 2, 3), (1,)),
    Volumes(18, 7, (3, 4, 3), (2, 2, 2), (4,), "identity"),
    Volumes(1, 1, (1, 18, 30), orders=(7,)),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "sliced": lambda x: F.pad(x, [1] * 10, value=float("nan"))[(slice(1, -1),) * 5],
    "stepped": lambda x: torch.stack([x, x * float("nan")], -1).flatten(-2)[..., ::2],
    "planes_last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "columns_first": lambda x: x.mT.contiguous().mT,
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@TRANSPOSED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Volumes, transposed: bool) -> None:
    check_value(case, *case.tensors(torch.float32), transposed)


@DTYPE
@pytest.mark.parametrize("case", [*CASES[::7], *FEW], ids=str)
def test_value_of_every_dtype(case: Volumes, dtype: torch.dtype) -> None:
    check_value(case, *case.tensors(dtype))


@TRANSPOSED
@pytest.mark.parametrize("case", [*CASES[::3], *FEW], ids=str)
def test_gradients(case: Volumes, transposed: bool) -> None:
    input, weight, _ = case.tensors(torch.float32)
    check_gradients(case, input, weight, transposed)


@DTYPE
@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradients_of_every_dtype(case: Volumes, dtype: torch.dtype) -> None:
    input, weight, _ = case.tensors(dtype)
    check_gradients(case, input, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_layouts(case: Volumes, layout: str) -> None:
    input, weight, bias = case.tensors(torch.float32)
    found = check_value(case, LAYOUTS[layout](input), weight, bias)
    assert found.stride() == torch.empty_like(LAYOUTS[layout](input)).stride()
    grad = torch.randn_like(input)
    expected = ops.solve_backward(grad, found, weight, *case.codes, False)
    laid_out = ops.solve_backward(LAYOUTS[layout](grad), LAYOUTS[layout](found), weight, *case.codes, False)
    # The sum of a bias' gradient is cut up by what lies side by side in memory.
    for a, b in zip(laid_out, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", [*FEW, Volumes(1, 1, (4, 35, 4)), Volumes(3, 8, (3, 20, 3), (2, 2, 2), (2,))], ids=str)
def test_threads(case: Volumes, threads: int) -> None:
    with torch_threads(threads):
        input, weight, bias = case.tensors(torch.float32)
        check_value(case, input, weight, bias)
        check_gradients(case, input, weight)


@pytest.mark.parametrize("batch", [2, 9])
def test_one_plane_is_an_image(batch: int) -> None:
    case = Volumes(batch, 4, (1, 5, 20), (1, 3, 3), (3, 2), "unit_triangular")
    input, weight, bias = case.tensors(torch.float32)
    volume = ops.solve(input, weight, bias, *case.codes, False)
    image = ops.solve(input[:, :, 0], weight[:, :, 0], bias, *case.codes, False)
    torch.testing.assert_close(volume[:, :, 0], image, rtol=0, atol=0)


def test_the_plan_says_how_planes_are_swept() -> None:
    plan = explain((100, 2, 4, 5, 6), 3, threads=1)
    assert (plan.regime, plan.steps) == ("images as lanes", 4 * 5 * 6)
    plan = explain((1, 4, 8, 64, 30), 3, threads=2)
    # A lane passes two zeros between planes; the band ends when the last lane does.
    assert (plan.regime, plan.steps) == ("rows as lanes", 8 * (30 + 2) - 2 + plan.lanes - 1)
    assert (plan.workers, plan.joined) == (2, False)
    # What would be a single band is cut for two threads, unless it is as low as bands can be.
    cut = explain((1, 4, 8, plan.lanes, 30), 3, threads=2)
    assert cut.workers == plan.lanes // cut.lanes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 4, 3, 3)}, r"weight must be \(4, 4, kH, kW\), got \(4, 4, 2, 2, 2\)"),
        ({"weight": torch.zeros(4, 4, 2, 2)}, r"weight must be \(4, 4, kD, kH, kW\), got \(4, 4, 2, 2\)"),
        ({"weight": torch.zeros(4, 4, 0, 2, 2)}, r"weight must be \(4, 4, kD, kH, kW\), got \(4, 4, 0, 2, 2\)"),
        ({"input": torch.zeros(2, 4, 0, 3, 3)}, r"at least one pixel, got \(2, 4, 0, 3, 3\)"),
        ({"input": torch.zeros(2, 4, 1, 1, 3, 3)}, "got 6 dimensions"),
        ({"orders": [8]}, "an order must be 0 to 7, got 8"),
        ({"orders": [-1]}, "an order must be 0 to 7, got -1"),
    ],
)
def test_direct_calls_are_checked(change: dict[str, object], message: str) -> None:
    arguments = {
        "input": torch.zeros(2, 4, 3, 3, 3), "weight": torch.zeros(4, 4, 2, 2, 2), "bias": None, "orders": [7],
        "corner": 0, "transposed": False,
    }  # fmt: skip
    ops.solve(**arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.solve(**(arguments | change))
