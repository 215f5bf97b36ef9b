"""The gradients of weight and bias: which kernel the plan chooses, tensor cores, and the sums of many blocks.

The kernels run on the emulator against the float64 oracle, with the checks and tolerances of test_emulation.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from .emulator import (
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    TOP_LEFT,
    TOP_RIGHT,
    UNIT_TRIANGULAR,
    Case,
    Data,
    compiler,
    run,
)
from .test_emulation import check_backward, driver, worker  # noqa: F401

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler (g++, or CXX)")

# A kernel each: of 3 x 3 taps, of a row of them, of more taps than a warp has, and larger than the image.
KERNELS_AND_IMAGES = [((3, 3), (5, 7)), ((1, 4), (3, 9)), ((5, 2), (9, 4)), ((3, 12), (4, 13)), ((5, 5), (2, 3))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "image"), KERNELS_AND_IMAGES)
def test_tensor_cores(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    kernel: tuple[int, int],
    image: tuple[int, int],
    transposed: bool,
) -> None:
    """Channels that fill the fragments, or do not; corners and orders that between them meet every mask and mirror."""
    for channels, order, corner in [(16, TOP_RIGHT, GENERAL), (19, BOTTOM_LEFT, UNIT_TRIANGULAR)]:
        case = Case(2, (order,), channels, *image, *kernel, corner=corner, transposed=transposed)
        done = check_backward(driver, tmp_path, case)
        assert done.facts["gradient_tensor_cores"] == [1]


@pytest.mark.parametrize("image_type", ["half", "bfloat16"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_tensor_cores_types_and_layouts(driver: Path, tmp_path: Path, layout: str, image_type: str) -> None:  # noqa: F811
    for transposed in (False, True):
        case = Case(
            2, (TOP_LEFT, TOP_RIGHT), 17, 3, 4, 2, 3, transposed=transposed, input_layout=layout, image_type=image_type
        )
        assert check_backward(driver, tmp_path, case).facts["gradient_tensor_cores"] == [1]
        case = case.but(image_type="float", output_layout="channels_last")
        assert check_backward(driver, tmp_path, case).facts["gradient_tensor_cores"] == [1]


def test_double_has_no_tensor_cores(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    case = Case(2, (TOP_LEFT,), 18, 4, 5, 3, 3, image_type="double", weight_type="double")
    assert check_backward(driver, tmp_path, case).facts["gradient_tensor_cores"] == [0]


def test_too_little_shared_memory_for_fragments(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    done = check_backward(driver, tmp_path, Case(2, (TOP_LEFT,), 18, 4, 5, 3, 3, shared_bytes=1200))
    assert done.facts["gradient_tensor_cores"] == [0]


@pytest.mark.parametrize("channels", [3, 20])
def test_splits_and_teams(driver: Path, tmp_path: Path, channels: int) -> None:  # noqa: F811
    """Blocks share the pixels, and teams of a block those of a tile."""
    case = Case(40, (TOP_LEFT,), channels, 8, 9, 2, 2, multiprocessors=10)
    done = check_backward(driver, tmp_path, case)
    assert done.facts["gradient_splits"][0] > 1
    assert done.facts["gradient_teams"][0] > 1
    assert done.facts["launches"][0] - done.facts["solve_launches"][0] == 2


def test_many_lanes_add_up_many_splits(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    case = Case(90, (TOP_LEFT, BOTTOM_RIGHT), 1, 6, 8, 2, 3, multiprocessors=64, seeds=(1, 2))
    done = check_backward(driver, tmp_path, case)
    assert done.facts["gradient_combine_lanes"][0] > 1


@pytest.mark.parametrize("kernel", [(3, 3), (5, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_block_writes_the_gradient_itself(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    kernel: tuple[int, int],
    transposed: bool,
) -> None:
    """No partial sums: zeros for what is not read, and for taps beyond the image, are the block's work too."""
    for channels, corner in itertools.product((3, 17), (IDENTITY, UNIT_TRIANGULAR, GENERAL)):
        case = Case(2, (BOTTOM_LEFT,), channels, 3, 3, *kernel, corner=corner, transposed=transposed)
        done = check_backward(driver, tmp_path, case)
        assert done.facts["gradient_splits"] == [1]
        assert done.facts["launches"][0] - done.facts["solve_launches"][0] == 1


def test_small_images_share_a_tile(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    for channels, less in ((2, 6000), (16, 24000)):
        case = Case(5, (TOP_RIGHT,), channels, 3, 5, 3, 2)
        done = check_backward(driver, tmp_path, case)
        assert done.facts["gradient_images"][0] == 5
        done = check_backward(driver, tmp_path, case.but(shared_bytes=less))
        assert 1 < done.facts["gradient_images"][0] < 5


def test_many_channels_in_blocks_and_windows(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    """More channels than a block owns, and fewer taps than it could, to have a block for every multiprocessor."""
    case = Case(1, (TOP_LEFT,), 50, 3, 4, 3, 3, multiprocessors=40, seeds=(1,))
    done = check_backward(driver, tmp_path, case)
    block = done.facts["gradient_channels"]
    assert block[0] < 50
    assert block[1] < 50
    done = check_backward(driver, tmp_path, case.but(channels=18, multiprocessors=400))
    assert np.prod(done.facts["gradient_window"]) < 9


SHAPES_OF_THE_PAPER = [
    (3, 32), (3, 64), (4, 14), (12, 16), (12, 32), (16, 7), (24, 16), (48, 8), (96, 4), (48, 32), (96, 32), (1, 28)
]  # fmt: skip


@pytest.mark.parametrize("batch", [16, 100])
@pytest.mark.parametrize("kernel", [3, 5])
def test_partial_sums_are_a_tenth_of_the_images_at_most(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    kernel: int,
    batch: int,
) -> None:
    for channels, side in SHAPES_OF_THE_PAPER:
        case = Case(batch, (TOP_LEFT,), channels, side, side, kernel, kernel, multiprocessors=132)
        facts = run(driver, tmp_path, case, Data(*[np.zeros(0)] * 3), "plan").facts
        partials = facts["gradient_splits"][0] * channels * (channels * kernel**2 + 1)
        images = batch * channels * side**2
        assert facts["gradient_splits"] == [1] or partials <= images / 10, (channels, side)
        assert facts["gradient_tensor_cores"] == [int(channels >= 16)]
