"""Rows as lanes (csrc/cuda/lanes/kernel.cuh), run on the CPU by the emulator, against a dense float64 solve.

Every run is repeated with another order of threads and blocks and must come out the same.
"""

from __future__ import annotations

import numpy as np
import pytest

from .checks import check_backward, check_solve
from .emulator import (
    ALL_ORDERS,
    ANY_REGIME,
    BLOCK,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    LANES,
    TOP_LEFT,
    TOP_RIGHT,
    UNIT_TRIANGULAR,
    Case,
    Run,
    make_data,
    plans,
    run,
)

# Most channels per group, by the taps of the window.
MOST_CHANNELS = {2: 8, 3: 12, 5: 2}


def rows_of_band(channels: int) -> int:
    """Rows of a warp: 32 lanes, of which a pixel has 1, 2, 8 or 16."""
    return 32 if channels <= 2 else 16 if channels <= 4 else 4 if channels <= 8 else 2


def most_threads(channels: int) -> int:
    return 256 if channels <= 8 else 384


def lanes_case(*arguments: object, **options: object) -> Case:
    return Case(*arguments, **{"forced_regime": ANY_REGIME, **options})  # type: ignore[arg-type]


def check(case: Case, seed: int = 0) -> Run:
    done = check_solve(case, seed)
    assert done.facts["regime"] == [LANES]
    return done


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("taps", MOST_CHANNELS)
def test_every_kernel_and_corner(taps: int, corner: int, transposed: bool) -> None:
    for channels in range(1, MOST_CHANNELS[taps] + 1):
        # As small as the window, and neither square nor even.
        for height, width in ((taps, taps), (taps + 2, 9), (9, taps)):
            case = lanes_case(3, ALL_ORDERS, channels, height, width, taps, taps, corner, transposed)
            done = check(case, seed=channels)
            assert done.facts["solve_launches"] == [1]
            assert done.facts["bands"] == [-(-height // rows_of_band(channels))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("channels", "height", "width", "taps"),
    [
        (1, 70, 7, 3), (1, 65, 6, 5), (2, 34, 9, 2), (3, 33, 5, 3), (4, 49, 4, 2), (2, 40, 11, 5), (5, 13, 6, 3),
        (6, 9, 4, 3), (7, 10, 7, 3), (8, 32, 5, 3), (9, 9, 6, 3), (11, 7, 10, 3), (12, 24, 5, 3),
    ],
)  # fmt: skip
def test_bands(channels: int, height: int, width: int, taps: int, transposed: bool) -> None:
    """More rows than a warp has lanes for: the warps of a block hand the rows between them on."""
    rows = rows_of_band(channels)
    case = lanes_case(2, (TOP_RIGHT, BOTTOM_LEFT), channels, height, width, taps, taps, GENERAL, transposed)
    done = check(case)
    assert done.facts["bands"] == [-(-height // rows)]
    assert done.facts["tiles"] == [1, 1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("channels", "height", "width", "threads"),
    [(8, 33, 9, 256), (5, 13, 13, 64), (6, 70, 13, 64), (2, 70, 9, 32), (12, 9, 7, 64)],
)
def test_more_bands_than_warps(channels: int, height: int, width: int, threads: int, transposed: bool) -> None:
    """An image is not cut where its warps can take one band after the other, and none of them has to wait for that."""
    options = {"threads_per_block": threads, "shared_bytes": 227 * 1024}
    case = lanes_case(2, (BOTTOM_RIGHT, TOP_LEFT), channels, height, width, 3, 3, GENERAL, transposed, **options)
    done = check(case)
    assert (done.facts["tiles"], done.facts["threads"]) == ([1, 1], [threads])
    assert done.facts["bands"] == [-(-height // rows_of_band(channels))]
    assert done.facts["bands"][0] > threads // 32
    # A wider one would wait.
    facts = plans(case.but(width=62))
    assert facts["tiles"] != [1, 1]


def test_more_bands_of_tiles_than_warps() -> None:
    case = lanes_case(1, (BOTTOM_LEFT,), 9, 20, 5, 3, 3, GENERAL, threads_per_block=64, shared_bytes=8100)
    done = check(case)
    assert (done.facts["tiles"], done.facts["bands"], done.facts["threads"]) == ([2, 1], [5], [64])
    # None is so high that a warp would have to wait.
    done = check(lanes_case(1, (TOP_LEFT,), 12, 9, 33, 3, 3, IDENTITY, threads_per_block=64))
    assert (done.facts["tiles"], done.facts["bands"]) == ([3, 9], [2])
    # Two bands of 17 rows: the lower one starts 3 phases of 8 steps later, of 32 and one it would be 5.
    done = check(lanes_case(1, (TOP_RIGHT,), 1, 33, 20, 3, 3))
    assert (done.facts["bands"], done.facts["phases"]) == ([2], [-(-(20 + 16) // 8) + 3])


def test_several_images_in_a_warp_and_in_a_block() -> None:
    done = check(lanes_case(11, (TOP_LEFT, BOTTOM_RIGHT), 3, 5, 4, 3, 3, multiprocessors=4))
    assert done.facts["images_per_warp"] == [3]
    assert done.facts["images"] == [6]
    done = check(lanes_case(5, (TOP_LEFT,), 3, 18, 4, 3, 3, multiprocessors=2))
    assert (done.facts["bands"], done.facts["images"]) == ([2], [3])
    # No more threads than the device has.
    done = check(lanes_case(9, (TOP_LEFT,), 1, 10, 4, 3, 3, threads_per_block=32))
    assert (done.facts["images"], done.facts["threads"]) == ([3], [32])


# Tiles of one and of two bands.
TILED = [
    lanes_case(2, (BOTTOM_RIGHT, TOP_RIGHT), 3, 20, 37, 3, 3, shared_bytes=5800),
    lanes_case(2, (TOP_LEFT,), 3, 36, 20, 3, 3, shared_bytes=11000, threads_per_block=64),
    lanes_case(1, (BOTTOM_LEFT, TOP_LEFT), 1, 70, 20, 5, 5, shared_bytes=5600, threads_per_block=64),
    lanes_case(2, (TOP_RIGHT,), 4, 33, 20, 2, 2, shared_bytes=10000, threads_per_block=64),
    lanes_case(1, (TOP_RIGHT, TOP_LEFT), 8, 13, 20, 3, 3, shared_bytes=9500, threads_per_block=64),
    lanes_case(1, (BOTTOM_RIGHT,), 10, 7, 17, 3, 3, shared_bytes=9600, threads_per_block=64),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("case", TILED, ids=range(len(TILED)))
def test_tiles(case: Case, corner: int, transposed: bool) -> None:
    """Images that do not fit a block: their blocks wait for each other, in one launch behind the cleared flags."""
    done = check(case.but(corner=corner, transposed=transposed, seeds=(1, 2, 3)))
    assert min(done.facts["tiles"]) >= 2
    assert done.facts["solve_launches"] == [2]
    assert done.facts["bands"] == [-(-done.facts["tile"][0] // rows_of_band(case.channels))]
    assert (done.facts["bands"][0] > 1) == (case.threads_per_block == 64)


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last"])
def test_types_and_layouts(image_type: str, input_layout: str, output_layout: str) -> None:
    for case in (
        lanes_case(2, (BOTTOM_LEFT, TOP_RIGHT, TOP_LEFT), 4, 6, 5, 3, 3),
        lanes_case(1, (TOP_RIGHT, TOP_LEFT), 6, 6, 8, 3, 3),
        lanes_case(1, (BOTTOM_RIGHT, TOP_LEFT), 12, 5, 8, 3, 3),
        TILED[0],
    ):
        check(
            case.but(
                image_type=image_type, weight_type=image_type, input_layout=input_layout, output_layout=output_layout
            )
        )


# Rows that move four pixels at a time: a few of a thread and many, with one pixel to a bank and two, and tiles of them
# behind a margin. In the last the tiles begin where the rows of the image are not aligned.
WIDE = [
    lanes_case(2, ALL_ORDERS, 1, 5, 36, 3, 3),
    lanes_case(1, ALL_ORDERS, 2, 6, 8, 5, 5),
    lanes_case(3, (TOP_LEFT, TOP_RIGHT), 3, 18, 16, 3, 3),
    lanes_case(1, (TOP_LEFT, TOP_RIGHT), 4, 3, 40, 2, 2, GENERAL),
    lanes_case(1, ALL_ORDERS, 5, 6, 12, 3, 3, IDENTITY),
    lanes_case(1, (TOP_LEFT, TOP_RIGHT), 8, 4, 44, 3, 3, threads_per_block=32),
    lanes_case(1, (BOTTOM_LEFT, TOP_RIGHT), 11, 3, 12, 3, 3, GENERAL),
    lanes_case(1, (TOP_LEFT, BOTTOM_RIGHT), 1, 33, 40, 3, 3, shared_bytes=3000, threads_per_block=32),
    lanes_case(1, (TOP_LEFT, BOTTOM_RIGHT), 1, 33, 44, 3, 3, shared_bytes=3600, threads_per_block=64),
]
WIDE_LAYOUTS = ("contiguous", "long rows", "channels_last")
NARROW_LAYOUTS = ("shifted", "odd rows", "sliced", "channels_last, shifted", "channels_last, sliced")
# By four channels of a pixel, where there are as many.
CHANNELS_LAST = [
    *WIDE,
    lanes_case(1, (TOP_LEFT, BOTTOM_RIGHT), 8, 5, 7, 3, 3, GENERAL),
    lanes_case(1, (TOP_RIGHT, BOTTOM_LEFT), 12, 3, 5, 3, 3),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("case", CHANNELS_LAST, ids=range(len(CHANNELS_LAST)))
def test_the_layout_does_not_change_a_bit(case: Case, image_type: str, transposed: bool) -> None:
    """Rows and pixels that move as they are, and value by value."""
    case = case.but(image_type=image_type, transposed=transposed)
    expected = check(case).outputs[0][0]
    for name in (*WIDE_LAYOUTS, *NARROW_LAYOUTS):
        for layouts in ({"input_layout": name}, {"output_layout": name}):
            changed = case.but(**layouts, seeds=(1,))
            assert (run(changed, make_data(changed)).outputs[0][0] == expected).all(), layouts


def test_no_bias_and_singular_corner() -> None:
    case = lanes_case(2, (TOP_RIGHT,), 3, 4, 4, 3, 3, GENERAL, bias=False)
    data = make_data(case)
    check(case)
    data.weight[2, :, 2, 0] = 2 * data.weight[1, :, 2, 0]
    assert np.isnan(run(case, data).outputs[0][0]).all()


def test_a_nan_stays_in_its_image() -> None:
    """Images side by side in a warp share shuffles, not values; and a NaN reaches only what depends on it."""
    case = lanes_case(5, (TOP_LEFT,), 2, 6, 5, 3, 3)
    data = make_data(case)
    data.y[2, :, 3, 2] = np.nan
    done = run(case, data)
    assert done.facts["images_per_warp"] == [5]
    found = np.isnan(done.outputs[0][0])
    assert found[2, :, 3:, 2:].all()
    found[2, :, 3:, 2:] = False
    assert not found.any()


def test_many_groups() -> None:
    """Groups in several launches: with tiles, all of their flags are cleared once."""
    orders = tuple(int(o) for o in np.random.default_rng(5).integers(0, 4, 300))
    case = lanes_case(1, orders, 1, 2, 3, 2, 2, seeds=(1,))
    assert check(case).facts["solve_launches"] == [2]
    tiled = case.but(orders=orders[:258], height=34, width=3, threads_per_block=32, shared_bytes=580)
    done = check(tiled)
    assert done.facts["tiles"] == [2, 1]
    assert done.facts["solve_launches"] == [3]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("image_type", ["float", "half"])
@pytest.mark.parametrize(
    "case",
    [
        lanes_case(3, ALL_ORDERS, 3, 6, 7, 3, 3, GENERAL),
        TILED[0],
        lanes_case(
            2, (TOP_LEFT, TOP_RIGHT), 4, 6, 8, 3, 3, input_layout="channels_last", output_layout="channels_last"
        ),
    ],
    ids=["images", "tiles", "channels_last"],
)
def test_gradients(case: Case, image_type: str, transposed: bool) -> None:
    """The opposite solve in this regime hands x on to the gradients, unrounded."""
    done = check_backward(case.but(image_type=image_type, transposed=transposed, seeds=(1, 2)))
    assert done.facts["regime"] == [LANES]


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 13, "forced_regime": LANES},
        {"kernel_w": 2},
        {"kernel_h": 5, "kernel_w": 5},
        {"height": 2},  # the window is clipped
        {"image_type": "double", "weight_type": "double"},
        {"shared_bytes": 700},  # no tile fits
        {"forced_regime": BLOCK},
    ],
    ids=str,
)
def test_what_it_declines(changes: dict[str, object]) -> None:
    case = lanes_case(2, (TOP_LEFT,), 3, 6, 7, 3, 3)
    check(case)
    assert check_solve(case.but(**changes)).facts["regime"] == [BLOCK]
