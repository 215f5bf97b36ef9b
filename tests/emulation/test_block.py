"""The solve with a block an image or a tile (csrc/cuda, regime kBlock), run by the emulator, against a dense one.

Every run is repeated with another order of threads and blocks, and must come out bit for bit the same.
"""

from __future__ import annotations

import numpy as np
import pytest

from .checks import check_backward, check_solve
from .emulator import (
    ALL_ORDERS,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    STORED,
    TOP_LEFT,
    TOP_RIGHT,
    TYPES,
    UNIT_TRIANGULAR,
    Case,
    decode,
    encode,
    execute,
    make_data,
    run,
    tap,
)

KERNEL_SIZES = [(1, 1), (1, 3), (3, 1), (2, 2), (3, 3), (5, 4), (2, 5)]
# (height, width): one pixel, one row, one column, smaller than the kernel, and neither square nor even.
IMAGE_SIZES = [(1, 1), (1, 7), (6, 1), (3, 2), (5, 8)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("kernel", KERNEL_SIZES)
def test_every_kernel_image_and_corner(kernel: tuple[int, int], corner: int, transposed: bool) -> None:
    for number, (height, width) in enumerate(IMAGE_SIZES):
        case = Case(3, ALL_ORDERS, 1 + number, height, width, *kernel, corner=corner, transposed=transposed)
        done = check_solve(case, seed=number)
        assert done.facts["solve_launches"] == [1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("image_type", TYPES)
def test_tiles(image_type: str, corner: int, transposed: bool) -> None:
    """Images that do not fit: a launch per tile diagonal, reading the earlier tiles unrounded."""
    weight_type = "double" if image_type == "double" else "float"
    case = Case(
        2,
        (BOTTOM_RIGHT, TOP_RIGHT),
        3,
        11,
        9,
        3,
        4,
        corner=corner,
        transposed=transposed,
        image_type=image_type,
        weight_type=weight_type,
    )
    budget = 3000 if image_type == "double" else 1500
    done = check_solve(case.but(shared_bytes=budget))
    assert done.facts["weights_in_shared"] == [1]
    assert 2 < done.facts["tile"][0] < 9
    tiles_h, tiles_w = done.facts["tiles"]
    assert done.facts["solve_launches"] == [tiles_h + tiles_w - 1]
    # Tiles smaller than the kernel, weights left in global memory, and their fold a launch of its own.
    done = check_solve(case.but(shared_bytes=120))
    assert done.facts["weights_in_shared"] == [0]
    assert done.facts["tile"][0] <= 2


@pytest.mark.parametrize("image_type", TYPES)
@pytest.mark.parametrize("weights", ["own type", "float"])
@pytest.mark.parametrize("transposed", [False, True])
def test_types(image_type: str, weights: str, transposed: bool) -> None:
    if weights == "float" and image_type == "double":
        weights = "own type"
    weight_type = image_type if weights == "own type" else "float"
    case = Case(2, (TOP_RIGHT, BOTTOM_LEFT), 5, 6, 7, 3, 3, GENERAL, transposed, image_type, weight_type)
    check_solve(case)


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 400])
@pytest.mark.parametrize("image_type", ["float", "half"])
def test_layouts(input_layout: str, output_layout: str, shared_bytes: int, image_type: str) -> None:
    case = Case(
        2,
        (BOTTOM_LEFT, TOP_RIGHT, TOP_LEFT),
        4,
        6,
        5,
        3,
        3,
        image_type=image_type,
        input_layout=input_layout,
        output_layout=output_layout,
        shared_bytes=shared_bytes,
    )
    done = check_solve(case)
    assert (done.facts["tiles"] == [1, 1]) == (shared_bytes > 400)


def test_several_images_in_a_block() -> None:
    case = Case(11, (TOP_LEFT, BOTTOM_RIGHT), 3, 4, 5, 3, 3, multiprocessors=4)
    done = check_solve(case)
    images = done.facts["images"][0]
    assert images > 1
    assert 11 % images != 0


@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("transposed", [False, True])
def test_fold_before_the_solve(corner: int, transposed: bool) -> None:
    """More channels than a block folds for itself: a launch before the solve, none for an identity corner."""
    case = Case(2, (TOP_LEFT, BOTTOM_LEFT), 18, 3, 4, 2, 3, corner=corner, transposed=transposed)
    done = check_solve(case)
    assert done.facts["weights_in_shared"] == [1]
    assert done.facts["solve_launches"] == [1 if corner == IDENTITY else 2]
    # A corner too large for shared memory is inverted in global memory, by a launch of its own.
    done = check_solve(case.but(shared_bytes=2048))
    assert done.facts["weights_in_shared"] == [0]
    assert done.facts["solve_launches"][0] == sum(done.facts["tiles"]) - 1 + (1 if corner == IDENTITY else 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("channels", [2, 5, 6, 12, 13, 16])
def test_a_corner_is_inverted_by_a_warp_or_by_the_block(channels: int, corner: int, transposed: bool) -> None:
    """By one warp up to 12 channels, or 5 of a general corner, if the block has others; weights of every type."""
    for image_type in TYPES if channels in {5, 12} else ("float",):
        case = Case(2, (TOP_RIGHT, BOTTOM_LEFT), channels, 13, 15, 2, 3, corner, transposed, image_type, image_type)
        done = check_solve(case)
        assert done.facts["fold_launches"] == [0]
        assert done.facts["threads"][0] > 32
    alone = check_solve(case.but(threads_per_block=32))
    assert alone.facts["threads"] == [32]


@pytest.mark.parametrize("transposed", [False, True])
def test_more_channels_and_pixels_than_threads(transposed: bool) -> None:
    case = Case(2, (TOP_RIGHT,), 40, 3, 3, 3, 2, GENERAL, transposed, threads_per_block=32)
    done = check_solve(case)
    assert done.facts["channel_threads"] == [32]
    case = Case(2, (TOP_RIGHT,), 6, 9, 10, 3, 3, GENERAL, transposed, threads_per_block=32)
    done = check_solve(case)
    assert done.facts["diagonal_threads"] == [5]
    assert done.facts["tiles"] == [1, 1]


def test_large_kernel() -> None:
    for transposed in (False, True):
        check_solve(Case(2, (TOP_LEFT, BOTTOM_RIGHT), 2, 13, 12, 11, 11, transposed=transposed))
        # 4 x 4 tiles, each of which reads up to nine others.
        case = Case(1, (BOTTOM_LEFT,), 2, 13, 12, 11, 11, transposed=transposed, shared_bytes=16 * 16 + 32)
        assert max(check_solve(case).facts["tile"]) <= 4


def test_depthwise_with_many_groups() -> None:
    """A pattern of orders that repeats is one launch; one that does not is cut into launches of 256 groups."""
    repeating = Case(1, ALL_ORDERS * 80, 1, 2, 2, 2, 2, seeds=(1,))
    assert check_solve(repeating).facts["solve_launches"] == [1]
    orders = tuple(int(o) for o in np.random.default_rng(5).integers(0, 4, 300))
    assert check_solve(repeating.but(orders=orders)).facts["solve_launches"] == [2]
    assert check_backward(repeating.but(orders=orders)).facts["solve_launches"] == [2]


def test_no_bias_and_singular_corner() -> None:
    case = Case(2, (TOP_RIGHT,), 3, 4, 4, 3, 3, GENERAL, bias=False)
    check_solve(case)
    data = make_data(case)
    i, j = tap(case, TOP_RIGHT, 0, 0)
    data.weight[2, :, i, j] = 2 * data.weight[1, :, i, j]
    assert np.isnan(run(case, data).outputs[0][0]).all()


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_conversions(kind: str) -> None:
    random = np.random.default_rng(3)
    values = np.concatenate(
        [
            random.standard_normal(2000) * 10.0 ** random.integers(-9, 9, 2000),
            random.integers(0, 4096, 2000) * 2.0 ** random.integers(-30, 6, 2000),  # many of them halfway
            [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 3.39e38],
        ]
    ).astype(np.float32)
    text = f"operation convert_{kind}\ncount {values.size}\nend\n"
    raw, _ = execute(text, [values])
    every = np.arange(65536, dtype=np.uint16).view(STORED[kind])
    rounded = np.frombuffer(raw[65536 * 4 :], STORED[kind])
    with np.errstate(over="ignore", invalid="ignore"):  # numpy's complaints about NaN and infinity
        np.testing.assert_array_equal(np.frombuffer(raw[: 65536 * 4], np.float32), decode(every, kind))
        np.testing.assert_array_equal(decode(rounded, kind), decode(encode(values, kind), kind))
