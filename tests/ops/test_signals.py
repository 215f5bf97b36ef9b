"""Signals, which are images of one row: the CPU has a regime of their own for them, in which the lanes of a vector hold
the outputs of a block of steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inverse_flow import build_info, explain, reference
from inverse_flow.functional import inverse_conv2d

from ..cases import CORNERS, DTYPES, LAYOUTS, OVERLAPPING, Case
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
from ..tolerance import assert_accurate
from .test_functional import TRANSPOSED, check_by_convolutions

OUTPUTS = "outputs as lanes"
# Narrower vectors are filled by fewer images, and other regimes chosen for some of the problems here.
WIDE = build_info()["cpu_isa"] == "avx512"


def signal(batch: int, channels: int, length: int, kernel: int, **others: object) -> Case:
    return Case(batch, channels, 1, length, (1, kernel), **others)  # type: ignore[arg-type]


def regime(case: Case) -> str:
    shape = (case.batch, case.channels, case.height, case.width)
    return str(explain(shape, case.kernel, groups=case.groups, order=case.order, corner=case.corner).regime)


# Lengths around those of blocks, kernels that are longer, channels around those of vectors, every order and corner.
CASES = [
    *(signal(2, 1, length, 3, order="top_right") for length in (1, 2, 7, 8, 15, 16, 17, 33, 70)),
    *(signal(1, 1, 40, kernel) for kernel in (1, 2, 9, 33)),
    *(signal(3, 2, 5, kernel, order="top_right") for kernel in (1, 6, 12)),
    *(signal(2, c, 19, 3, corner=corner) for c in (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17) for corner in CORNERS),
    *(signal(1, c, 5, 2, order="top_right", corner="unit_triangular") for c in (24, 31, 33, 65)),
    *(signal(b, 3, 21, 4, order=order) for b in (1, 4, 5, 6, 7, 8, 9, 13) for order in ("top_left", "top_right")),
    signal(2, 6, 18, 3, groups=3, order=("top_right", "top_left", "top_right")),
    signal(3, 8, 18, 2, groups=2, order=("top_left", "bottom_right"), corner="unit_triangular"),
    signal(1, 5, 18, 4, groups=5, corner="identity", bias=False),
    # Rows of a kernel that reach above the only row.
    *(Case(2, 2, 1, 11, (3, 2), order=order) for order in ("top_left", "bottom_right")),
]
FEW = [CASES[5], CASES[20], signal(3, 3, 21, 4, order="top_right"), signal(2, 16, 19, 3), CASES[-3]]


def test_few_signals_have_outputs_as_lanes() -> None:
    with torch_threads(1):
        for case in [signal(1, 1, 20000, 3), signal(1, 16, 2000, 3), signal(8, 64, 256, 9), *FEW]:
            assert not WIDE or regime(case) == OUTPUTS, case
        assert regime(signal(100, 1, 2000, 3)) == "images as lanes"


@pytest.mark.skipif(not WIDE, reason="the plan is that of AVX-512, which is not in use")
def test_a_plan_of_outputs_as_lanes() -> None:
    plan = explain((3, 1, 1, 1000), (1, 3), threads=1)
    assert plan.regime == OUTPUTS
    assert plan.block > 1
    assert plan.lanes == plan.block
    assert plan.steps == -(-1000 // plan.block)
    assert plan.units == 1
    assert explain((3, 1, 1, 1000), (1, 3), threads=2).units == 2
    assert explain((1, 3, 256, 100), (3, 3), threads=1).block == 1
    # Channels fill the vectors: a block is one step.
    assert explain((1, 64, 1, 1000), (1, 3), threads=1).lanes == 64


@TRANSPOSED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, transposed: bool) -> None:
    for dtype in DTYPES:
        check_value(case, *case.tensors(dtype), transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    check_gradients(case, *case.tensors(dtype))


@TRANSPOSED
@pytest.mark.parametrize("layout", [*LAYOUTS, *OVERLAPPING])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_layouts(case: Case, layout: str, transposed: bool) -> None:
    if layout in LAYOUTS:
        check_layout(case, LAYOUTS[layout], transposed)
        return
    input, weight, bias = case.tensors(torch.float32)
    check_value(case, OVERLAPPING[layout](input), weight, bias, transposed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pixel", [0, 5, 18])
@pytest.mark.parametrize("case", FEW[:1] + FEW[2:], ids=str)
def test_what_is_not_finite_stays_behind(case: Case, pixel: int, value: float) -> None:
    assert not WIDE or regime(case) == OUTPUTS
    check_containment(case, case.batch - 1, case.channels - 1, (0, min(pixel, case.width - 1)), value)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_it_is_an_inverse(case: Case) -> None:
    check_consistent(case)
    check_repeatable(case)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("order", ["top_left", "top_right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((1, 1, 1, 60_000), 3), ((3, 2, 1, 9_000), 33), ((3, 20, 1, 900), 5), ((2, 70, 1, 150), 2)],
    ids=["one channel", "a long kernel", "many channels", "more channels than a tile"],
)
def test_many_stretches(shape: tuple[int, ...], kernel: int, dtype: torch.dtype, order: str, threads: int) -> None:
    with torch_threads(threads):
        assert not WIDE or explain(shape, (1, kernel), dtype=dtype).regime == OUTPUTS
        check_by_convolutions(shape, (1, kernel), order, dtype, 1e-12 if dtype == torch.float64 else 2e-5)


def test_a_signal_does_not_depend_on_its_neighbours() -> None:
    """Nor, within what a thread sweeps together, on how many there are."""
    case = signal(13, 4, 50, 3)
    input, weight, bias = case.tensors(torch.float32)
    together = solve(case, input, weight, bias)
    changed = input.clone()
    changed[::2] = torch.randn_like(changed[::2])
    assert torch.equal(solve(case, changed, weight, bias)[1::2], together[1::2])


# ---- Exactness ----


def resonator(pole: float, angles: Tensor) -> Tensor:
    """(C, C, 1, 3), filters apart from each other: poles of radius ``pole`` at ± the angles."""
    taps = torch.stack([torch.full_like(angles, pole**2), -2 * pole * angles.cos(), torch.ones_like(angles)], -1)
    return torch.diag_embed(taps.mT).movedim(0, -1)[:, :, None]


def plain_errors(case: Case, y: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """The plain recurrence, of whichever of these equal problems it errs most on: scaled by numbers that round
    differently. Rounding is a matter of luck where few roundings make most of the error."""
    worst, largest = None, -1.0
    for scale in torch.arange(1, 2, 1 / 12).tolist():
        scaled = (y * scale).contiguous()
        plain = reference.inverse_conv2d(scaled, weight, **case.arguments)
        truth = reference.inverse_conv2d(scaled.double(), weight.double(), **case.arguments)
        error = (plain.double() - truth) / scale
        if error.abs().max() > largest:
            worst, largest = error, float(error.abs().max())
    assert worst is not None
    return (exact + worst).to(y.dtype)


@pytest.mark.parametrize("source", ["noise", "a known solution"])
@pytest.mark.parametrize("pole", [0.5, 0.9, 0.99, 0.999, 1.0, 1.02, 1.2, 3.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_recurrences_that_fade_and_grow(channels: int, pole: float, source: str) -> None:
    """Several steps at once sum larger products than one after the other, which cancel."""
    case = signal(4, channels, 160 if pole < 1.1 else 70, 3)
    weight = resonator(pole, torch.linspace(0.3, 2.1, channels)).float()
    y = torch.randn(case.batch, channels, 1, case.width)
    if source == "a known solution":
        matrix = reference.dense_matrix(weight.double(), 1, case.width)
        y = (y.double().flatten(1) @ matrix.mT).view_as(y).float()
    exact = reference.inverse_conv2d(y.double(), weight.double(), **case.arguments)
    assert not WIDE or regime(case) == OUTPUTS
    found = inverse_conv2d(y, weight, **case.arguments)
    assert_accurate(found, plain_errors(case, y, weight, exact), exact, torch.float32)


def test_blocks_that_would_overflow_are_single_steps() -> None:
    """1e4 to the power of the steps of a block is no float32; zeros stay zeros, and a pulse grows as far as it can."""
    weight = torch.tensor([-1e4, 1.0]).view(1, 1, 1, 2)
    y = torch.zeros(1, 1, 1, 40)
    y[..., 35] = 1
    x = inverse_conv2d(y, weight)
    torch.testing.assert_close(x[0, 0, 0], torch.tensor([0.0] * 35 + [1e4**i for i in range(5)]), rtol=1e-6, atol=0)


def test_a_singular_corner_is_an_error() -> None:
    for batch in (0, 2):
        with pytest.raises(ValueError, match="singular"):
            inverse_conv2d(torch.randn(batch, 2, 1, 9), torch.zeros(2, 2, 1, 3))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision_has_the_state_of_float32(dtype: torch.dtype) -> None:
    case = signal(2, 3, 21, 4)
    tensors = case.tensors(dtype, weight_dtype=torch.float32)
    check_value(case, *tensors)
    check_gradients(case, *tensors)
