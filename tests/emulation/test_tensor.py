"""The solve on tensor cores, run by the emulator, whose products round to TF32 and truncate their sums as a GPU does.

A forced regime is used wherever it can be; so even two channels go through the tensor cores here.
"""

from __future__ import annotations

import numpy as np
import pytest

from .checks import check_backward, check_solve, oracle_gradients, oracle_solve
from .emulator import (
    ALL_ORDERS,
    BLOCK,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    TENSOR,
    TOP_LEFT,
    TOP_RIGHT,
    UNIT_ROUNDOFF,
    UNIT_TRIANGULAR,
    Case,
    Run,
    make_data,
    round_to,
    run,
)

KERNEL_SIZES = [(1, 3), (3, 1), (2, 2), (3, 3), (5, 4)]
# (height, width): one row, one column, smaller than the kernel, and neither square nor even.
IMAGE_SIZES = [(1, 7), (6, 1), (3, 2), (5, 8)]
# A GPU whose shared memory holds some diagonals of RING, and not the image.
RING = Case(2, (BOTTOM_RIGHT, TOP_RIGHT), 10, 9, 11, 3, 3, shared_bytes=18000, forced_regime=TENSOR)
# A GPU whose shared memory holds the weights of some k-steps.
PARTLY_SHARED = Case(3, (TOP_LEFT, BOTTOM_LEFT), 33, 4, 5, 3, 2, GENERAL, shared_bytes=24000, forced_regime=TENSOR)


def check(case: Case, seed: int = 0) -> Run:
    done = check_solve(case.but(forced_regime=TENSOR), seed)
    assert done.facts["regime"] == [TENSOR]
    assert done.facts["shared_bytes"][0] <= case.shared_bytes
    return done


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("kernel", KERNEL_SIZES)
def test_every_kernel_image_and_corner(kernel: tuple[int, int], corner: int, transposed: bool) -> None:
    for number, (height, width) in enumerate(IMAGE_SIZES):
        case = Case(3, ALL_ORDERS, 2 + 3 * number, height, width, *kernel, corner=corner, transposed=transposed)
        case = case.but(forced_regime=TENSOR)
        done = check_solve(case, seed=number)
        only_the_corner = min(kernel[0], height) * min(kernel[1], width) == 1
        assert done.facts["regime"] == [BLOCK if only_the_corner else TENSOR]
        assert done.facts["solve_launches"] == [1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
def test_ring_of_diagonals(image_type: str, corner: int, transposed: bool) -> None:
    """Images that do not fit: still one launch, and no state in global memory."""
    case = RING.but(corner=corner, transposed=transposed, image_type=image_type)
    done = check(case)
    assert done.facts["tensor_whole_images"] == [0]
    assert done.facts["solve_launches"] == [1 + done.facts["fold_launches"][0]]


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 18000])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last"])
def test_layouts(input_layout: str, output_layout: str, shared_bytes: int) -> None:
    for image_type in ("float", "half"):
        case = RING.but(
            input_layout=input_layout, output_layout=output_layout, shared_bytes=shared_bytes, image_type=image_type
        )
        assert check(case).facts["tensor_whole_images"] == [int(shared_bytes > 18000)]


@pytest.mark.parametrize("corner", [UNIT_TRIANGULAR, GENERAL])
def test_weights_partly_in_shared_memory(corner: int) -> None:
    case = PARTLY_SHARED.but(corner=corner)
    for shared_bytes, some in ((24000, True), (13000, False)):
        done = check(case.but(shared_bytes=shared_bytes))
        assert done.facts["weights_in_shared"] == [0]
        assert (done.facts["tensor_resident_steps"][0] > 0) == some
    # A corner too large for shared memory.
    check(case.but(shared_bytes=8200, orders=(TOP_RIGHT,), height=2))


def test_several_images_in_a_block() -> None:
    done = check(Case(11, (TOP_LEFT, BOTTOM_RIGHT), 13, 4, 5, 3, 3, multiprocessors=4))
    images = done.facts["images"][0]
    assert images > 1
    assert 11 % images != 0
    # Weights that do not fit: a fragment serves as many images as fill a tile of pixels.
    done = check(Case(3, (TOP_LEFT,), 33, 3, 4, 3, 3, multiprocessors=100, shared_bytes=40000))
    assert done.facts["images"] == [2]


def test_more_jobs_than_warps() -> None:
    """Several tiles of outputs and of pixels a warp, and no warps left that only finish."""
    for case in (
        Case(2, (TOP_RIGHT,), 40, 3, 4, 3, 2, GENERAL, threads_per_block=64),
        Case(1, (BOTTOM_LEFT,), 2, 36, 34, 3, 3, GENERAL, True, threads_per_block=32),
        Case(1, (BOTTOM_LEFT,), 2, 36, 34, 2, 3, threads_per_block=32, shared_bytes=16000),
    ):
        facts = check(case).facts
        jobs = facts["tensor_output_tiles"][0] * -(-min(case.height, case.width) // 32)
        assert facts["tensor_job_warps"][0] < jobs
        assert facts["tensor_finish_warps"] == [0]


def test_no_bias_and_singular_corner() -> None:
    case = Case(2, (TOP_RIGHT,), 9, 4, 4, 3, 3, GENERAL, bias=False, forced_regime=TENSOR)
    check(case)
    data = make_data(case)
    data.weight[2, :, -1, 0] = 0
    assert np.isnan(run(case, data).outputs[0][0]).all()


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_a_nan_stays_one(allow_tf32: bool) -> None:
    """The one that GPUs make: rounded as a number its bits would become those of a zero."""
    case = Case(1, (TOP_LEFT,), 9, 4, 4, 3, 3, GENERAL, forced_regime=TENSOR, allow_tf32=allow_tf32)
    data = make_data(case)
    data.y[0, 2, 1, 1] = np.uint32(0x7FFFFFFF).view(np.float32)
    x = run(case, data).outputs[0][0][0]
    assert np.isnan(x[:, 1:, 1:]).all()
    assert np.isfinite(x[:, 0]).all()


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 18000])
def test_gradients(image_type: str, shared_bytes: int) -> None:
    """The opposite solve leaves x unrounded for the gradient."""
    done = check_backward(RING.but(image_type=image_type, shared_bytes=shared_bytes))
    assert done.facts["regime"] == [TENSOR]


# ---- Exactness: the error of float32 ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("image_type", ["float", "bfloat16"])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 36000])
def test_tf32_only_where_it_is_allowed(shared_bytes: int, image_type: str, transposed: bool) -> None:
    """About 1e-3 of error in place of 1e-7, for the solve and for the gradients: so it is taken, and not by mistake."""
    case = RING.but(channels=17, transposed=transposed, image_type=image_type, shared_bytes=shared_bytes)
    case = case.but(input_layout="channels_last")
    data = make_data(case)
    weight = np.nan_to_num(data.weight)
    data.x = round_to(oracle_solve(case, data.y, weight, transposed), image_type)
    expected = oracle_gradients(case, data.y, data.x, weight)
    errors = []
    for allow_tf32 in (False, True):
        done = run(case.but(allow_tf32=allow_tf32), data, "backward")
        assert done.facts["regime"] == [TENSOR]
        assert done.facts["gradient_tensor_cores"] == [1]
        assert all(piece == done.raw[0] for piece in done.raw)
        actual = done.outputs[0]
        errors.append([np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)])
    exact, rounded = errors
    rounding = 2 * UNIT_ROUNDOFF[image_type] if image_type != "float" else 0.0
    assert exact[0] < 3e-6 + rounding
    assert exact[1] < 3e-6
    assert rounded[0] < 2e-3 + rounding
    assert 2e-5 < rounded[1] < 2e-3
    if image_type == "float":
        assert rounded[0] > 2e-5
