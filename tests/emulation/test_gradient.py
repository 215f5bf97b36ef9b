"""The gradients of weight and bias: which kernel the plan chooses, tensor cores, and the sums of many blocks.

The kernels run on the emulator against the float64 oracle, with the checks and tolerances of the solve.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from .checks import check_backward
from .emulator import (
    ALL_ORDERS,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    TOP_LEFT,
    TOP_RIGHT,
    TYPES,
    UNIT_TRIANGULAR,
    Case,
    plans,
)
from .test_block import IMAGE_SIZES, KERNEL_SIZES

# A kernel each: of 3 x 3 taps, of a row of them, of more taps than a warp has, and larger than the image.
KERNELS_AND_IMAGES = [((3, 3), (5, 7)), ((1, 4), (3, 9)), ((5, 2), (9, 4)), ((3, 12), (4, 13)), ((5, 5), (2, 3))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "image"), KERNELS_AND_IMAGES)
def test_tensor_cores(kernel: tuple[int, int], image: tuple[int, int], transposed: bool) -> None:
    """Channels that fill the fragments, or do not; corners and orders that between them meet every mask and mirror."""
    for channels, order, corner in [(16, TOP_RIGHT, GENERAL), (19, BOTTOM_LEFT, UNIT_TRIANGULAR)]:
        case = Case(2, (order,), channels, *image, *kernel, corner=corner, transposed=transposed)
        done = check_backward(case)
        assert done.facts["gradient_tensor_cores"] == [1]


@pytest.mark.parametrize("window", [*((1, taps) for taps in range(1, 10)), (4, 1), (2, 4), (3, 3)])
def test_every_number_of_taps_has_its_loop(window: tuple[int, int]) -> None:
    """Rows of 11 pixels end within a step of eight, and the last step is filled up."""
    case = Case(1, (BOTTOM_RIGHT,), 16, 5, 11, *window, GENERAL, seeds=(1,))
    assert check_backward(case).facts["gradient_window"] == list(window)


@pytest.mark.parametrize("image_type", ["half", "bfloat16"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_tensor_cores_types_and_layouts(layout: str, image_type: str) -> None:
    for transposed in (False, True):
        case = Case(
            2, (TOP_LEFT, TOP_RIGHT), 17, 3, 4, 2, 3, transposed=transposed, input_layout=layout, image_type=image_type
        )
        assert check_backward(case).facts["gradient_tensor_cores"] == [1]
        case = case.but(image_type="float", output_layout="channels_last")
        assert check_backward(case).facts["gradient_tensor_cores"] == [1]


def test_double_has_no_tensor_cores() -> None:
    case = Case(2, (TOP_LEFT,), 18, 4, 5, 3, 3, image_type="double", weight_type="double")
    assert check_backward(case).facts["gradient_tensor_cores"] == [0]


def test_too_little_shared_memory_for_fragments() -> None:
    done = check_backward(Case(2, (TOP_LEFT,), 18, 4, 5, 3, 3, shared_bytes=1200))
    assert done.facts["gradient_tensor_cores"] == [0]


@pytest.mark.parametrize("channels", [3, 20])
def test_splits_and_teams(channels: int) -> None:
    """Blocks share the pixels, and teams of a block those of a tile."""
    case = Case(40, (TOP_LEFT,), channels, 8, 9, 2, 2, multiprocessors=10)
    done = check_backward(case)
    assert done.facts["gradient_splits"][0] > 1
    assert done.facts["gradient_teams"][0] > 1
    assert done.facts["launches"][0] - done.facts["solve_launches"][0] == 2


def test_many_lanes_add_up_many_splits() -> None:
    case = Case(90, (TOP_LEFT, BOTTOM_RIGHT), 1, 6, 8, 2, 3, multiprocessors=64, seeds=(1, 2))
    done = check_backward(case)
    assert done.facts["gradient_combine_lanes"][0] > 1


@pytest.mark.parametrize("kernel", [(3, 3), (5, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_block_writes_the_gradient_itself(kernel: tuple[int, int], transposed: bool) -> None:
    """No partial sums: zeros for what is not read, and for taps beyond the image, are the block's work too."""
    for channels, corner in itertools.product((3, 17), (IDENTITY, UNIT_TRIANGULAR, GENERAL)):
        case = Case(2, (BOTTOM_LEFT,), channels, 3, 3, *kernel, corner=corner, transposed=transposed)
        done = check_backward(case)
        assert done.facts["gradient_splits"] == [1]
        assert done.facts["launches"][0] - done.facts["solve_launches"][0] == 1


def test_small_images_share_a_tile() -> None:
    for channels, less in ((2, 6000), (16, 24000)):
        case = Case(5, (TOP_RIGHT,), channels, 3, 5, 3, 2)
        done = check_backward(case)
        assert done.facts["gradient_images"][0] == 5
        done = check_backward(case.but(shared_bytes=less))
        assert 1 < done.facts["gradient_images"][0] < 5


def test_many_channels_in_blocks_and_windows() -> None:
    """More channels than a block owns, and fewer taps than it could, to have a block for every multiprocessor."""
    case = Case(1, (TOP_LEFT,), 50, 3, 4, 3, 3, multiprocessors=40, seeds=(1,))
    done = check_backward(case)
    block = done.facts["gradient_channels"]
    assert block[0] < 50
    assert block[1] < 50
    done = check_backward(case.but(channels=18, multiprocessors=400))
    assert np.prod(done.facts["gradient_window"]) < 9


SHAPES_OF_THE_PAPER = [
    (3, 32), (3, 64), (4, 14), (12, 16), (12, 32), (16, 7), (24, 16), (48, 8), (96, 4), (48, 32), (96, 32), (1, 28)
]  # fmt: skip


@pytest.mark.parametrize("batch", [16, 100])
@pytest.mark.parametrize("kernel", [3, 5])
def test_partial_sums_are_a_tenth_of_the_images_at_most(kernel: int, batch: int) -> None:
    for channels, side in SHAPES_OF_THE_PAPER:
        case = Case(batch, (TOP_LEFT,), channels, side, side, kernel, kernel, multiprocessors=132)
        facts = plans(case)
        partials = facts["gradient_splits"][0] * channels * (channels * kernel**2 + 1)
        images = batch * channels * side**2
        assert facts["gradient_splits"] == [1] or partials <= images / 10, (channels, side)
        assert facts["gradient_tensor_cores"] == [int(channels >= 16)]


# ---- Without tensor cores ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("kernel", KERNEL_SIZES)
def test_gradients_of_every_kernel_image_and_corner(kernel: tuple[int, int], corner: int, transposed: bool) -> None:
    for number, (height, width) in enumerate(IMAGE_SIZES):
        case = Case(3, ALL_ORDERS, 5 - number, height, width, *kernel, corner=corner, transposed=transposed)
        check_backward(case, seed=number)


@pytest.mark.parametrize("image_type", TYPES)
@pytest.mark.parametrize("weights", ["own type", "float"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_types(image_type: str, weights: str, transposed: bool) -> None:
    if weights == "float" and image_type == "double":
        weights = "own type"
    weight_type = image_type if weights == "own type" else "float"
    case = Case(2, (TOP_RIGHT, BOTTOM_LEFT), 5, 6, 7, 3, 3, GENERAL, transposed, image_type, weight_type)
    check_backward(case)


@pytest.mark.parametrize("input_layout", ["channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_layouts(input_layout: str, transposed: bool) -> None:
    case = Case(2, (BOTTOM_LEFT, TOP_RIGHT), 3, 6, 5, 3, 3, transposed=transposed)
    check_backward(case.but(input_layout=input_layout, output_layout="channels_last"))


def test_gradient_in_blocks() -> None:
    """More channels and taps than a block holds, and tiles smaller than the image; then pixels split over blocks."""
    case = Case(3, (TOP_LEFT, BOTTOM_RIGHT), 9, 7, 9, 3, 6, threads_per_block=64, shared_bytes=3000, multiprocessors=40)
    done = check_backward(case)
    assert done.facts["gradient_channels"][0] < 9
    assert done.facts["gradient_window"][0] < 3
    assert done.facts["gradient_tile"] != [7, 9]
    done = check_backward(Case(2, (BOTTOM_LEFT,), 2, 17, 33, 5, 5, multiprocessors=2))
    assert done.facts["gradient_splits"][0] > 1
    assert done.facts["gradient_teams"][0] > 1
