"""Rows as lanes (csrc/cuda/lanes/kernel.cuh), run on the CPU by the emulator, against a dense float64 solve.

As in test_emulation.py, every run is repeated with another order of threads and blocks and must come out the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .emulator import (
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
    DriverError,
    Run,
    build_spoilt,
    compiler,
    make_data,
    run,
)
from .test_emulation import (
    ALL_ORDERS,
    SPOILT_UNITS,
    check_backward,
    check_solve,
    driver,  # noqa: F401  (fixture)
    shared_folder,
    worker,  # noqa: F401  (fixture)
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler (g++, or CXX)")

# Most channels a group, by the taps of the window.
MOST_CHANNELS = {2: 8, 3: 12, 5: 2}


def rows_of_band(channels: int) -> int:
    """Rows of a warp: 32 lanes, of which a pixel has 1, 2, 8 or 16."""
    return 32 if channels <= 2 else 16 if channels <= 4 else 4 if channels <= 8 else 2


def most_threads(channels: int) -> int:
    return 256 if channels <= 8 else 384


def lanes_case(*arguments: object, **options: object) -> Case:
    return Case(*arguments, **{"forced_regime": ANY_REGIME, **options})  # type: ignore[arg-type]


def check(driver: Path, folder: Path, case: Case, seed: int = 0) -> Run:  # noqa: F811
    done = check_solve(driver, folder, case, seed)
    assert done.facts["regime"] == [LANES]
    return done


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("taps", MOST_CHANNELS)
def test_every_kernel_and_corner(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    taps: int,
    corner: int,
    transposed: bool,
) -> None:
    for channels in range(1, MOST_CHANNELS[taps] + 1):
        # As small as the window, and neither square nor even.
        for height, width in ((taps, taps), (taps + 2, 9), (9, taps)):
            case = lanes_case(3, ALL_ORDERS, channels, height, width, taps, taps, corner, transposed)
            done = check(driver, tmp_path, case, seed=channels)
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
def test_bands(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    channels: int,
    height: int,
    width: int,
    taps: int,
    transposed: bool,
) -> None:
    """More rows than a warp has lanes for: the warps of a block hand the rows between them on."""
    rows = rows_of_band(channels)
    case = lanes_case(2, (TOP_RIGHT, BOTTOM_LEFT), channels, height, width, taps, taps, GENERAL, transposed)
    done = check(driver, tmp_path, case)
    assert done.facts["bands"] == [-(-height // rows)]
    assert done.facts["tiles"] == [1, 1]


def test_more_bands_than_warps(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    """An image is not cut where its warps can take one band after the other, and none of them has to wait for that."""
    for channels, height, width, threads in (
        (8, 33, 9, 256),
        (5, 13, 13, 64),
        (6, 70, 13, 64),
        (2, 70, 9, 32),
        (12, 9, 7, 64),
    ):
        options = {"threads_per_block": threads, "shared_bytes": 227 * 1024}
        for transposed in (False, True):
            case = lanes_case(
                2, (BOTTOM_RIGHT, TOP_LEFT), channels, height, width, 3, 3, GENERAL, transposed, **options
            )
            done = check(driver, tmp_path, case)
            assert (done.facts["tiles"], done.facts["threads"]) == ([1, 1], [threads])
            assert done.facts["bands"] == [-(-height // rows_of_band(channels))]
            assert done.facts["bands"][0] > threads // 32
        # A wider one would wait.
        facts = run(driver, tmp_path, case.but(width=62), make_data(case), "plan").facts
        assert facts["tiles"] != [1, 1]
    # So are tiles.
    case = lanes_case(1, (BOTTOM_LEFT,), 9, 20, 5, 3, 3, GENERAL, threads_per_block=64, shared_bytes=8100)
    done = check(driver, tmp_path, case)
    assert (done.facts["tiles"], done.facts["bands"], done.facts["threads"]) == ([2, 1], [5], [64])
    # But none so high that a warp would have to wait.
    done = check(driver, tmp_path, lanes_case(1, (TOP_LEFT,), 12, 9, 33, 3, 3, IDENTITY, threads_per_block=64))
    assert (done.facts["tiles"], done.facts["bands"]) == ([3, 9], [2])
    # Two bands of 17 rows: the lower one starts 3 phases of 8 steps later, of 32 and one it would be 5.
    done = check(driver, tmp_path, lanes_case(1, (TOP_RIGHT,), 1, 33, 20, 3, 3))
    assert (done.facts["bands"], done.facts["phases"]) == ([2], [-(-(20 + 16) // 8) + 3])


def test_several_images_in_a_warp_and_in_a_block(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    done = check(driver, tmp_path, lanes_case(11, (TOP_LEFT, BOTTOM_RIGHT), 3, 5, 4, 3, 3, multiprocessors=4))
    assert done.facts["images_per_warp"] == [3]
    assert done.facts["images"] == [6]
    done = check(driver, tmp_path, lanes_case(5, (TOP_LEFT,), 3, 18, 4, 3, 3, multiprocessors=2))
    assert (done.facts["bands"], done.facts["images"]) == ([2], [3])
    # No more threads than the device has.
    done = check(driver, tmp_path, lanes_case(9, (TOP_LEFT,), 1, 10, 4, 3, 3, threads_per_block=32))
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
def test_tiles(driver: Path, tmp_path: Path, case: Case, corner: int, transposed: bool) -> None:  # noqa: F811
    """Images that do not fit a block: their blocks wait for each other, in one launch behind the cleared flags."""
    done = check(driver, tmp_path, case.but(corner=corner, transposed=transposed, seeds=(1, 2, 3)))
    assert min(done.facts["tiles"]) >= 2
    assert done.facts["solve_launches"] == [2]
    assert done.facts["bands"] == [-(-done.facts["tile"][0] // rows_of_band(case.channels))]
    assert (done.facts["bands"][0] > 1) == (case.threads_per_block == 64)


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last"])
def test_types_and_layouts(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    image_type: str,
    input_layout: str,
    output_layout: str,
) -> None:
    for case in (
        lanes_case(2, (BOTTOM_LEFT, TOP_RIGHT, TOP_LEFT), 4, 6, 5, 3, 3),
        lanes_case(1, (TOP_RIGHT, TOP_LEFT), 6, 6, 8, 3, 3),
        lanes_case(1, (BOTTOM_RIGHT, TOP_LEFT), 12, 5, 8, 3, 3),
        TILED[0],
    ):
        check(
            driver,
            tmp_path,
            case.but(
                image_type=image_type, weight_type=image_type, input_layout=input_layout, output_layout=output_layout
            ),
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
def test_the_layout_does_not_change_a_bit(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    case: Case,
    image_type: str,
    transposed: bool,
) -> None:
    """Rows and pixels that move as they are, and value by value."""
    case = case.but(image_type=image_type, transposed=transposed)
    expected = check(driver, tmp_path, case).outputs[0][0]
    for name in (*WIDE_LAYOUTS, *NARROW_LAYOUTS):
        for layouts in ({"input_layout": name}, {"output_layout": name}):
            changed = case.but(**layouts, seeds=(1,))
            assert (run(driver, tmp_path, changed, make_data(changed)).outputs[0][0] == expected).all(), layouts


def test_no_bias_and_singular_corner(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    case = lanes_case(2, (TOP_RIGHT,), 3, 4, 4, 3, 3, GENERAL, bias=False)
    data = make_data(case)
    check(driver, tmp_path, case)
    data.weight[2, :, 2, 0] = 2 * data.weight[1, :, 2, 0]
    assert np.isnan(run(driver, tmp_path, case, data).outputs[0][0]).all()


def test_a_nan_stays_in_its_image(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    """Images side by side in a warp share shuffles, not values; and a NaN reaches only what depends on it."""
    case = lanes_case(5, (TOP_LEFT,), 2, 6, 5, 3, 3)
    data = make_data(case)
    data.y[2, :, 3, 2] = np.nan
    done = run(driver, tmp_path, case, data)
    assert done.facts["images_per_warp"] == [5]
    found = np.isnan(done.outputs[0][0])
    assert found[2, :, 3:, 2:].all()
    found[2, :, 3:, 2:] = False
    assert not found.any()


def test_many_groups(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    """Groups in several launches: with tiles, all of their flags are cleared once."""
    orders = tuple(int(o) for o in np.random.default_rng(5).integers(0, 4, 300))
    case = lanes_case(1, orders, 1, 2, 3, 2, 2, seeds=(1,))
    assert check(driver, tmp_path, case).facts["solve_launches"] == [2]
    tiled = case.but(orders=orders[:258], height=34, width=3, threads_per_block=32, shared_bytes=580)
    done = check(driver, tmp_path, tiled)
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
def test_gradients(driver: Path, tmp_path: Path, case: Case, image_type: str, transposed: bool) -> None:  # noqa: F811
    """The opposite solve in this regime hands x on to the gradients, unrounded."""
    done = check_backward(driver, tmp_path, case.but(image_type=image_type, transposed=transposed, seeds=(1, 2)))
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
def test_what_it_declines(driver: Path, tmp_path: Path, changes: dict[str, object]) -> None:  # noqa: F811
    case = lanes_case(2, (TOP_LEFT,), 3, 6, 7, 3, 3)
    check(driver, tmp_path, case)
    assert check_solve(driver, tmp_path, case.but(**changes)).facts["regime"] == [BLOCK]


def test_plans_stay_within_the_device(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    for taps, most in MOST_CHANNELS.items():
        for channels in range(1, most + 1):
            for height, width in ((taps, taps), (5, 3000), (900, 7), (64, 64), (2048, 2048)):
                # The last has room for little more than the weights.
                for shared_bytes, threads in ((99 * 1024, 1024), (227 * 1024, 1024), (12000, 64)):
                    case = lanes_case(
                        3, (TOP_LEFT,), channels, height, width, taps, taps, shared_bytes=shared_bytes,
                        threads_per_block=threads,
                    )  # fmt: skip
                    facts = run(driver, tmp_path, case, make_data(case.but(height=1, width=1)), "plan").facts
                    assert facts["regime"] == [LANES]
                    assert facts["shared_bytes"][0] <= shared_bytes
                    assert facts["threads"][0] % 32 == 0
                    assert facts["threads"][0] <= min(threads, most_threads(channels))
                    rows = rows_of_band(channels)
                    tile, tiles = facts["tile"], facts["tiles"]
                    assert facts["bands"] == [-(-tile[0] // rows)]
                    assert min(facts["bands"][0] * 32, threads, most_threads(channels)) <= facts["threads"][0]
                    for size, side, count in zip((height, width), tile, tiles, strict=True):
                        assert side * (count - 1) < size <= side * count
                    if tiles != [1, 1]:
                        assert min(tile) >= taps - 1
                        assert facts["images"] == [1]


# ---- Mistakes, planted in a copy of the kernels ----

PLANTED = {
    "no barrier between phases": (
        "lanes/kernel.cuh",
        "if (plan.bands > 1) __syncthreads();",
        "if (plan.bands > 1 && !PLANTED(1)) __syncthreads();",
    ),
    "a band starts two phases early": (
        "lanes/kernel.cuh",
        "int phase = -band * plan.lag;",
        "int phase = -band * (plan.lag - (PLANTED(2) ? 2 : 0));",
    ),
    "the rows above are read one off": (
        "lanes/kernel.cuh",
        "over[a - 1] = line - a * row_floats;",
        "over[a - 1] = line - (PLANTED(3) && a > 1 ? a - 1 : a) * row_floats;",
    ),
    "no wait for the tile to the left": (
        "lanes/kernel.cuh",
        "if (claimed.left > 0) {",
        "if (claimed.left > 0 && !PLANTED(4)) {",
    ),
    "no barrier before the flag is set": (
        "lanes/kernel.cuh",
        "__syncthreads();  // the whole tile is written before one thread says so",
        "if (!PLANTED(5)) __syncthreads();",
    ),
    "a shuffle without half of the warp": (
        "lanes/kernel.cuh",
        "__shfl_up_sync(kFullWarp, ",
        "__shfl_up_sync(PLANTED(6) ? 0xffffu : kFullWarp, ",
    ),
    "flags that are not cleared": (
        "lanes/launch.cuh",
        "const char* error = clear_memory(",
        "const char* error = PLANTED(7) ? nullptr : clear_memory(",
    ),
    "a flag that is never set": (
        "lanes/kernel.cuh",
        "if (threadIdx.x == 0) store_release(",
        "if (threadIdx.x == 0 && !PLANTED(8)) store_release(",
    ),
    "a shuffle across images": (
        "lanes/kernel.cuh",
        "above[a - 1][c] = reads_above ? pixel[c] : above[a - 1][c];",
        "above[a - 1][c] = reads_above && !(PLANTED(9) && slot > 0) ? pixel[c] : above[a - 1][c];",
    ),
    "a shuffle from the wrong lane": (
        "lanes/kernel.cuh",
        "solved[c], kLanes);",
        "solved[c], PLANTED(10) ? 2 : kLanes);",
    ),
    "lanes of a pixel that do not wait": (
        "lanes/kernel.cuh",
        "__syncwarp();",
        "if (!PLANTED(11)) __syncwarp();",
    ),
    "rows above the image": (
        "lanes/kernel.cuh",
        "rows_above >= (kLanes == 1 ? kTaps - 1 : a)",
        "(PLANTED(12) || rows_above >= (kLanes == 1 ? kTaps - 1 : a))",
    ),
    "a mirrored row that is not reversed": (
        "lanes/kernel.cuh",
        "const bool exchanges = ((turn ^ mirror) & bit) != 0;",
        "const bool exchanges = ((PLANTED(13) ? turn : turn ^ mirror) & bit) != 0;",
    ),
    "a row that is not aligned": (
        "lanes/launch.cuh",
        "if (reinterpret_cast<uintptr_t>(data) % kBytes != 0 ||",
        "if ((!PLANTED(14) && reinterpret_cast<uintptr_t>(data) % kBytes != 0) ||",
    ),
    "a tile that is not aligned": (
        "lanes/launch.cuh",
        "is_multiple(plan.tile_w)",
        "(PLANTED(15) || is_multiple(plan.tile_w))",
    ),
    "a second band that starts before the one above it is far enough": (
        "lanes/kernel.cuh",
        "phase -= plan.band_warps * plan.lag;",
        "phase -= PLANTED(16) ? plan.band_phases : plan.band_warps * plan.lag;",
    ),
    "a second band that keeps the sums of the first": (
        "lanes/kernel.cuh",
        "for (int k = 0; k < kOutputs; ++k) sums[b][k] = 0;",
        "for (int k = 0; k < kOutputs; ++k) sums[b][k] = PLANTED(17) && band >= plan.band_warps ? sums[b][k] : 0;",
    ),
    "a lane below its band": (
        "lanes/kernel.cuh",
        "image < claimed.tile.images && skew < plan.rows &&",
        "image < claimed.tile.images && (PLANTED(18) || skew < plan.rows) &&",
    ),
    "channels that are not aligned": (
        "lanes/launch.cuh",
        "is_multiple(strides.column) && is_multiple(shape.channels)",
        "(PLANTED(19) || is_multiple(strides.column)) && is_multiple(shape.channels)",
    ),
    "the next channel of a pixel": (
        "lanes/kernel.cuh",
        ".value[c % kTogether + j]",
        ".value[(PLANTED(20) && kTogether > 1 ? c + 1 : c) % kTogether + j]",
    ),
    "the other channels of a pixel": (
        "lanes/kernel.cuh",
        "rounded + first * args.output_strides.channel",
        "rounded + (PLANTED(21) && kTogether > 1 ? 4 - first : first) * args.output_strides.channel",
    ),
}
IMAGES_OF_A_WARP = lanes_case(4, (TOP_LEFT, BOTTOM_RIGHT), 2, 5, 6, 3, 3, GENERAL, seeds=(1, 2, 3))
# Eight lanes a pixel, two bands, and rows that move four pixels at a time.
PIXEL_LANES = lanes_case(2, (TOP_RIGHT, BOTTOM_LEFT), 6, 7, 8, 3, 3, GENERAL, seeds=(1, 2, 3))
BANDS = lanes_case(2, (TOP_LEFT, BOTTOM_RIGHT), 3, 35, 12, 3, 3, GENERAL, seeds=(1, 2, 3))
# Four bands of two warps, and two of 17 rows.
SECOND_BANDS = lanes_case(1, (TOP_LEFT,), 5, 16, 5, 3, 3, GENERAL, threads_per_block=64, seeds=(1, 2, 3))
# Two of one warp, a lane a row: right of the image its recurrence goes on, and with these weights hardly fades.
ONE_WARP = lanes_case(
    1, (TOP_LEFT,), 1, 33, 8, 3, 3, IDENTITY, threads_per_block=32, shared_bytes=227 * 1024, seeds=(1,)
)
UNEVEN_BANDS = lanes_case(1, (TOP_LEFT,), 1, 33, 9, 3, 3, GENERAL, seeds=(1, 2, 3))
# Sixteen lanes a pixel, of which four have no channels.
IDLE_LANES = lanes_case(2, (TOP_RIGHT, BOTTOM_LEFT), 9, 5, 8, 3, 3, GENERAL, seeds=(1, 2, 3))
# As channels_last has them; the distances of rows and images are multiples of four whatever that of pixels is.
PIXELS = lanes_case(
    4, (TOP_RIGHT,), 8, 7, 8, 3, 3, GENERAL, input_layout="channels_last", output_layout="channels_last", seeds=(1, 2)
)
# Smaller tiles than TILED has, and more of them.
WAITING = lanes_case(1, (TOP_LEFT,), 1, 65, 40, 3, 3, GENERAL, threads_per_block=32, shared_bytes=3000, seeds=(1, 2, 3))


@pytest.fixture(scope="module")
def spoilt_driver(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Path:  # noqa: F811
    return build_spoilt(
        shared_folder(tmp_path_factory, worker) / "spoilt-lanes", PLANTED, ("lanes/float", *SPOILT_UNITS)
    )


@pytest.mark.parametrize(
    "case",
    [
        IMAGES_OF_A_WARP,
        BANDS,
        WAITING,
        PIXEL_LANES,
        PIXEL_LANES.but(input_layout="shifted"),
        WIDE[-1],
        SECOND_BANDS,
        ONE_WARP,
        PIXELS,
        PIXELS.but(input_layout="channels_last, sliced"),
        UNEVEN_BANDS,
        IDLE_LANES,
    ],
    ids=[
        "images of a warp",
        "bands",
        "waiting",
        "pixel lanes",
        "shifted",
        "not aligned",
        "second bands",
        "one warp",
        "pixels",
        "sliced pixels",
        "uneven bands",
        "idle lanes",
    ],
)
def test_without_a_planted_mistake_the_checks_pass(spoilt_driver: Path, tmp_path: Path, case: Case) -> None:
    check(spoilt_driver, tmp_path, case)


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("no barrier between phases", BANDS, "depends on the order|off by"),
        ("a band starts two phases early", BANDS, "depends on the order|off by"),
        ("the rows above are read one off", BANDS, "off by"),
        ("the rows above are read one off", WAITING, "off by"),
        ("no wait for the tile to the left", WAITING, "depends on the order|off by"),
        ("no barrier before the flag is set", WAITING, "depends on the order|off by"),
        ("a shuffle without half of the warp", IMAGES_OF_A_WARP, "only whole warps may shuffle"),
        ("flags that are not cleared", WAITING, "."),
        ("a flag that is never set", WAITING, "waits for a flag that nobody sets"),
        ("a shuffle across images", IMAGES_OF_A_WARP, "off by"),
        ("a shuffle from the wrong lane", IMAGES_OF_A_WARP, "off by"),
        ("lanes of a pixel that do not wait", PIXEL_LANES, "depends on the order|off by"),
        ("lanes of a pixel that do not wait", BANDS, "depends on the order|off by"),
        ("rows above the image", PIXEL_LANES, "off by|depends on the order|AddressSanitizer"),
        ("a mirrored row that is not reversed", PIXEL_LANES, "off by"),
        ("a row that is not aligned", PIXEL_LANES.but(input_layout="shifted"), "misaligned"),
        ("a tile that is not aligned", WIDE[-1], "."),
        (
            "a second band that starts before the one above it is far enough",
            SECOND_BANDS,
            "depends on the order|off by",
        ),
        ("a second band that keeps the sums of the first", ONE_WARP, "off by"),
        ("channels that are not aligned", PIXELS.but(input_layout="channels_last, sliced"), "misaligned"),
        ("the next channel of a pixel", PIXELS, "off by"),
        ("the other channels of a pixel", PIXELS, "off by"),
        ("lanes of a pixel that do not wait", IDLE_LANES, "depends on the order|off by"),
        ("a lane below its band", UNEVEN_BANDS, "depends on the order|off by"),
    ],
)
def test_a_planted_mistake_shows(spoilt_driver: Path, tmp_path: Path, name: str, case: Case, message: str) -> None:
    number = list(PLANTED).index(name) + 1
    with pytest.raises((AssertionError, DriverError), match=message):
        check_solve(spoilt_driver, tmp_path, case.but(planted=number))
