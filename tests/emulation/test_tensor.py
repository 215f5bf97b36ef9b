"""The solve on tensor cores, run by the emulator, whose products round to TF32 and truncate their sums as a GPU does.

A forced regime is used wherever it can be; so even two channels go through the tensor cores here.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse_flow.reference import inverse_conv2d as plain_recurrence

from .emulator import (
    BLOCK,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    TENSOR,
    TOP_LEFT,
    TOP_RIGHT,
    UNIT_TRIANGULAR,
    Case,
    Data,
    DriverError,
    Run,
    compiler,
    make_data,
    oracle_gradients,
    oracle_solve,
    round_to,
    run,
)
from .test_emulation import ALL_ORDERS, check_backward, check_solve, driver, spoilt_driver, worker  # noqa: F401
from .test_numerics import BASE, CORNERS, EPS, weight_of_growth

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler (g++, or CXX)")

KERNEL_SIZES = [(1, 3), (3, 1), (2, 2), (3, 3), (5, 4)]
# (height, width): one row, one column, smaller than the kernel, and neither square nor even.
IMAGE_SIZES = [(1, 7), (6, 1), (3, 2), (5, 8)]
# A GPU whose shared memory holds some diagonals of RING, and not the image.
RING = Case(2, (BOTTOM_RIGHT, TOP_RIGHT), 10, 9, 11, 3, 3, shared_bytes=18000, forced_regime=TENSOR)


def check(driver: Path, folder: Path, case: Case, seed: int = 0) -> Run:  # noqa: F811
    done = check_solve(driver, folder, case.but(forced_regime=TENSOR), seed)
    assert done.facts["regime"] == [TENSOR]
    assert done.facts["shared_bytes"][0] <= case.shared_bytes
    return done


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("kernel", KERNEL_SIZES)
def test_every_kernel_image_and_corner(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    kernel: tuple[int, int],
    corner: int,
    transposed: bool,
) -> None:
    for number, (height, width) in enumerate(IMAGE_SIZES):
        case = Case(3, ALL_ORDERS, 2 + 3 * number, height, width, *kernel, corner=corner, transposed=transposed)
        case = case.but(forced_regime=TENSOR)
        done = check_solve(driver, tmp_path, case, seed=number)
        only_the_corner = min(kernel[0], height) * min(kernel[1], width) == 1
        assert done.facts["regime"] == [BLOCK if only_the_corner else TENSOR]
        assert done.facts["solve_launches"] == [1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
def test_ring_of_diagonals(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    image_type: str,
    corner: int,
    transposed: bool,
) -> None:
    """Images that do not fit: still one launch, and no state in global memory."""
    case = RING.but(corner=corner, transposed=transposed, image_type=image_type)
    done = check(driver, tmp_path, case)
    assert done.facts["tensor_whole_images"] == [0]
    assert done.facts["solve_launches"] == [1 + done.facts["fold_launches"][0]]


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 18000])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last"])
def test_layouts(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    input_layout: str,
    output_layout: str,
    shared_bytes: int,
) -> None:
    for image_type in ("float", "half"):
        case = RING.but(
            input_layout=input_layout, output_layout=output_layout, shared_bytes=shared_bytes, image_type=image_type
        )
        assert check(driver, tmp_path, case).facts["tensor_whole_images"] == [int(shared_bytes > 18000)]


@pytest.mark.parametrize("corner", [UNIT_TRIANGULAR, GENERAL])
def test_weights_partly_in_shared_memory(driver: Path, tmp_path: Path, corner: int) -> None:  # noqa: F811
    case = Case(3, (TOP_LEFT, BOTTOM_LEFT), 33, 4, 5, 3, 2, corner=corner)
    for shared_bytes, some in ((24000, True), (13000, False)):
        done = check(driver, tmp_path, case.but(shared_bytes=shared_bytes))
        assert done.facts["weights_in_shared"] == [0]
        assert (done.facts["tensor_resident_steps"][0] > 0) == some
    # A corner too large for shared memory.
    check(driver, tmp_path, case.but(shared_bytes=8200, orders=(TOP_RIGHT,), height=2))


def test_several_images_in_a_block(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    done = check(driver, tmp_path, Case(11, (TOP_LEFT, BOTTOM_RIGHT), 13, 4, 5, 3, 3, multiprocessors=4))
    images = done.facts["images"][0]
    assert images > 1
    assert 11 % images != 0
    # Weights that do not fit: a fragment serves as many images as fill a tile of pixels.
    done = check(driver, tmp_path, Case(3, (TOP_LEFT,), 33, 3, 4, 3, 3, multiprocessors=100, shared_bytes=40000))
    assert done.facts["images"] == [2]


def test_more_jobs_than_warps(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    """Several tiles of outputs and of pixels a warp, and no warps left that only finish."""
    for case in (
        Case(2, (TOP_RIGHT,), 40, 3, 4, 3, 2, GENERAL, threads_per_block=64),
        Case(1, (BOTTOM_LEFT,), 2, 36, 34, 3, 3, GENERAL, True, threads_per_block=32),
        Case(1, (BOTTOM_LEFT,), 2, 36, 34, 2, 3, threads_per_block=32, shared_bytes=16000),
    ):
        facts = check(driver, tmp_path, case).facts
        jobs = facts["tensor_output_tiles"][0] * -(-min(case.height, case.width) // 32)
        assert facts["tensor_job_warps"][0] < jobs
        assert facts["tensor_finish_warps"] == [0]


def test_no_bias_and_singular_corner(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    case = Case(2, (TOP_RIGHT,), 9, 4, 4, 3, 3, GENERAL, bias=False, forced_regime=TENSOR)
    check(driver, tmp_path, case)
    data = make_data(case)
    data.weight[2, :, -1, 0] = 0
    assert np.isnan(run(driver, tmp_path, case, data).outputs[0][0]).all()


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 18000])
def test_gradients(driver: Path, tmp_path: Path, image_type: str, shared_bytes: int) -> None:  # noqa: F811
    """The opposite solve leaves x unrounded for the gradient."""
    done = check_backward(driver, tmp_path, RING.but(image_type=image_type, shared_bytes=shared_bytes))
    assert done.facts["regime"] == [TENSOR]


def test_plans_stay_within_the_device(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    taken = 0
    for channels, size, kernel, kib in itertools.product(
        (9, 13, 64, 200, 700), ((1, 9), (1, 5000), (300, 7), (256, 256), (32, 32)), (2, 3, 11), (99, 227)
    ):
        case = Case(5, (TOP_LEFT,), channels, *size, kernel, kernel, shared_bytes=kib * 1024, forced_regime=-1)
        facts = run(driver, tmp_path, case, Data(*[np.zeros(0)] * 3), "plan").facts
        assert facts["shared_bytes"][0] <= case.shared_bytes
        if facts["regime"] != [TENSOR]:
            continue
        taken += 1
        warps = facts["tensor_splits"][0] * facts["tensor_job_warps"][0] + facts["tensor_finish_warps"][0]
        assert facts["threads"] == [32 * warps]
        assert 1 <= warps <= 16
        steps = min(kernel, size[0]) * min(kernel, size[1]) * facts["tensor_k_steps"][0]
        assert 0 <= facts["tensor_resident_steps"][0] <= steps
        assert facts["weights_in_shared"] == [int(facts["tensor_resident_steps"][0] == steps)]
    assert taken > 60
    for channels, kernel, image_type in ((8, 5, "float"), (16, 3, "double")):
        case = Case(5, (TOP_LEFT,), channels, 8, 8, kernel, kernel, image_type=image_type, weight_type=image_type)
        assert run(driver, tmp_path, case.but(forced_regime=-1), make_data(case), "plan").facts["regime"] == [BLOCK]


# ---- Exactness: the error of float32 ----


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("target", [1e2, 1e6])
def test_ill_conditioned_weights(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    target: float,
    corner: int,
    image_type: str,
) -> None:
    case = BASE.but(corner=corner, image_type=image_type, forced_regime=TENSOR)
    weight = weight_of_growth(case, target)
    y = np.random.default_rng(4).standard_normal(case.image_shape)
    y = round_to(y / np.sqrt(np.abs(oracle_solve(case, y, weight, False)).max()), image_type)
    assert_exact(driver, tmp_path, case, Data(y, weight, np.zeros(case.all_channels)))


@pytest.mark.parametrize("channels", [24, 64])
def test_wide_layers(driver: Path, tmp_path: Path, channels: int) -> None:  # noqa: F811
    """Sums of hundreds of products, which the tensor cores truncate at every step."""
    case = Case(2, (TOP_LEFT,), channels, 5, 6, 3, 3, GENERAL, bias=False, seeds=(1,), forced_regime=TENSOR)
    assert_exact(driver, tmp_path, case.but(shared_bytes=227 * 1024), make_data(case))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("image_type", ["float", "bfloat16"])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 36000])
def test_tf32_only_where_it_is_allowed(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    shared_bytes: int,
    image_type: str,
    transposed: bool,
) -> None:
    """About 1e-3 of error in place of 1e-7, for the solve and for the gradients: so it is taken, and not by mistake."""
    case = RING.but(channels=17, transposed=transposed, image_type=image_type, shared_bytes=shared_bytes)
    case = case.but(input_layout="channels_last")
    data = make_data(case)
    weight = np.nan_to_num(data.weight)
    data.x = round_to(oracle_solve(case, data.y, weight, transposed), image_type)
    expected = oracle_gradients(case, data.y, data.x, weight)
    errors = []
    for allow_tf32 in (False, True):
        done = run(driver, tmp_path, case.but(allow_tf32=allow_tf32), data, "backward")
        assert done.facts["regime"] == [TENSOR]
        assert done.facts["gradient_tensor_cores"] == [1]
        assert all(piece == done.raw[0] for piece in done.raw)
        actual = done.outputs[0]
        errors.append([np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)])
    exact, rounded = errors
    rounding = EPS[image_type] if image_type != "float" else 0.0
    assert exact[0] < 3e-6 + rounding
    assert exact[1] < 3e-6
    assert rounded[0] < 2e-3 + rounding
    assert 2e-5 < rounded[1] < 2e-3
    if image_type == "float":
        assert rounded[0] > 2e-5


def assert_exact(driver: Path, folder: Path, case: Case, data: Data) -> None:  # noqa: F811
    """The rule of tests/tolerance.py."""
    exact = oracle_solve(case, data.y, data.weight, False)
    single = (torch.tensor(array, dtype=torch.float32) for array in (data.y, data.weight))
    plain = plain_recurrence(*single, corner=CORNERS[case.corner]).double().numpy()
    allowed = 2 * np.abs(round_to(plain, case.image_type) - exact).max() + EPS[case.image_type] * np.abs(exact).max()
    done = run(driver, folder, case, data)
    assert done.facts["regime"] == [TENSOR]
    error = np.abs(done.outputs[0][0] - exact).max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


# ---- Mistakes planted in a copy of the kernels ----

# Folded before the solve, so that weights are copied.
SPOILT = Case(2, (TOP_LEFT, BOTTOM_RIGHT), 18, 5, 6, 3, 3, GENERAL, forced_regime=TENSOR, seeds=(1, 2, 3))


def test_without_a_planted_mistake_the_checks_pass(spoilt_driver: Path, tmp_path: Path) -> None:  # noqa: F811
    check(spoilt_driver, tmp_path, SPOILT)
    check(spoilt_driver, tmp_path, RING)


@pytest.mark.parametrize("planted", [11, 12])
def test_a_missing_barrier_shows(spoilt_driver: Path, tmp_path: Path, planted: int) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match="depends on the order of the threads"):
        check(spoilt_driver, tmp_path, SPOILT.but(planted=planted))


@pytest.mark.parametrize("planted", [13, 14])
def test_a_dropped_product_shows(spoilt_driver: Path, tmp_path: Path, planted: int) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match="off by"):
        check(spoilt_driver, tmp_path, SPOILT.but(planted=planted))


def test_a_copy_that_nobody_waited_for_shows(spoilt_driver: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match="off by nan"):
        check(spoilt_driver, tmp_path, SPOILT.but(planted=15))


def test_a_wrong_place_in_the_ring_shows(spoilt_driver: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match="off by"):
        check(spoilt_driver, tmp_path, RING.but(planted=16))


def test_an_operand_that_is_not_rounded_shows(spoilt_driver: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(DriverError, match="an operand is not in TF32"):
        check(spoilt_driver, tmp_path, SPOILT.but(planted=17))
