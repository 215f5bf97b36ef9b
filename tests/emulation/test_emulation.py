"""The CUDA kernels, run on the CPU by the emulator, against a dense float64 solve.

Every run is repeated with another order of threads and blocks, and must come out bit for bit the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse_flow import explain
from inverse_flow.ops.explain import CudaPlan, GpuProperties
from inverse_flow.ops.spec import CORNERS, ORDERS

from .emulator import (
    ANY_REGIME,
    BLOCK,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    IDENTITY,
    LANES,
    STORED,
    TENSOR,
    TOP_LEFT,
    TOP_RIGHT,
    TYPES,
    UNIT_ROUNDOFF,
    UNIT_TRIANGULAR,
    Case,
    Data,
    DriverError,
    Run,
    build,
    build_spoilt,
    compiler,
    corner_mask,
    decode,
    encode,
    execute,
    make_data,
    oracle_gradients,
    oracle_solve,
    run,
    tap,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler (g++, or CXX)")

ALL_ORDERS = (TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT)


def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "emulation"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def worker(request: pytest.FixtureRequest) -> str:
    """The name of the pytest-xdist worker, or "master" without one."""
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Path:
    return build(shared_folder(tmp_path_factory, worker))


def assert_close(actual: np.ndarray, expected: np.ndarray, kind: str, state_error: float) -> None:
    """One rounding to the stored type, and an error of the recurrence relative to the largest value."""
    size = np.abs(expected).max(initial=1.0)
    allowed = UNIT_ROUNDOFF[kind] * np.abs(expected) * 1.01 + state_error * size
    if kind == "half":
        allowed = allowed + 2.0**-24  # subnormal numbers
    worst = np.max(np.abs(actual - expected) - allowed, initial=-1.0)
    assert worst <= 0, f"off by {worst:.3g} more than allowed, values up to {size:.3g}"  # a NaN fails too


def state_error(case: Case) -> float:
    return 2e-14 if case.image_type == "double" else 3e-6


def check_solve(driver: Path, folder: Path, case: Case, seed: int = 0) -> Run:
    data = make_data(case, seed)
    done = run(driver, folder, case, data)
    assert all(piece == done.raw[0] for piece in done.raw), "the result depends on the order of the threads"
    expected = oracle_solve(case, data.y - data.bias.reshape(1, -1, 1, 1), np.nan_to_num(data.weight), case.transposed)
    assert_close(done.outputs[0][0], expected, case.image_type, state_error(case))
    return done


def check_backward(driver: Path, folder: Path, case: Case, seed: int = 0) -> Run:
    data = make_data(case, seed)
    weight = np.nan_to_num(data.weight)
    x = oracle_solve(case, make_data(case, seed + 1).y, weight, case.transposed)
    if case.input_layout == "expanded":
        x = np.broadcast_to(x[:, :, :1, :1], x.shape)
    data.x = decode(encode(x, case.image_type), case.image_type)
    done = run(driver, folder, case, data, "backward")
    assert all(piece == done.raw[0] for piece in done.raw), "the result depends on the order of the threads"
    for actual, expected, kind in zip(
        done.outputs[0],
        oracle_gradients(case, data.y, data.x, weight),
        (case.image_type, case.weight_type, case.weight_type),
        strict=True,
    ):
        assert_close(actual, expected, kind, state_error(case))
    unread = np.zeros(case.weight_shape, bool)
    for g, order in enumerate(case.orders):
        i, j = tap(case, order, 0, 0)
        unread[g * case.channels : (g + 1) * case.channels, :, i, j] = ~corner_mask(case)
    assert (done.outputs[0][1][unread] == 0).all()
    return done


# ---- The solve ----

KERNEL_SIZES = [(1, 1), (1, 3), (3, 1), (2, 2), (3, 3), (5, 4), (2, 5)]
# (height, width): one pixel, one row, one column, smaller than the kernel, and neither square nor even.
IMAGE_SIZES = [(1, 1), (1, 7), (6, 1), (3, 2), (5, 8)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("kernel", KERNEL_SIZES)
def test_every_kernel_image_and_corner(
    driver: Path, tmp_path: Path, kernel: tuple[int, int], corner: int, transposed: bool
) -> None:
    for number, (height, width) in enumerate(IMAGE_SIZES):
        case = Case(3, ALL_ORDERS, 1 + number, height, width, *kernel, corner=corner, transposed=transposed)
        done = check_solve(driver, tmp_path, case, seed=number)
        assert done.facts["solve_launches"] == [1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("image_type", TYPES)
def test_tiles(driver: Path, tmp_path: Path, image_type: str, corner: int, transposed: bool) -> None:
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
    done = check_solve(driver, tmp_path, case.but(shared_bytes=budget))
    assert done.facts["weights_in_shared"] == [1]
    assert 2 < done.facts["tile"][0] < 9
    tiles_h, tiles_w = done.facts["tiles"]
    assert done.facts["solve_launches"] == [tiles_h + tiles_w - 1]
    # Tiles smaller than the kernel, weights left in global memory, and their fold a launch of its own.
    done = check_solve(driver, tmp_path, case.but(shared_bytes=120))
    assert done.facts["weights_in_shared"] == [0]
    assert done.facts["tile"][0] <= 2


@pytest.mark.parametrize("image_type", TYPES)
@pytest.mark.parametrize("weights", ["own type", "float"])
@pytest.mark.parametrize("transposed", [False, True])
def test_types(driver: Path, tmp_path: Path, image_type: str, weights: str, transposed: bool) -> None:
    if weights == "float" and image_type == "double":
        weights = "own type"
    weight_type = image_type if weights == "own type" else "float"
    case = Case(2, (TOP_RIGHT, BOTTOM_LEFT), 5, 6, 7, 3, 3, GENERAL, transposed, image_type, weight_type)
    check_solve(driver, tmp_path, case)


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("output_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 400])
@pytest.mark.parametrize("image_type", ["float", "half"])
def test_layouts(
    driver: Path, tmp_path: Path, input_layout: str, output_layout: str, shared_bytes: int, image_type: str
) -> None:
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
    done = check_solve(driver, tmp_path, case)
    assert (done.facts["tiles"] == [1, 1]) == (shared_bytes > 400)


def test_several_images_in_a_block(driver: Path, tmp_path: Path) -> None:
    case = Case(11, (TOP_LEFT, BOTTOM_RIGHT), 3, 4, 5, 3, 3, multiprocessors=4)
    done = check_solve(driver, tmp_path, case)
    images = done.facts["images"][0]
    assert images > 1
    assert 11 % images != 0


@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("transposed", [False, True])
def test_fold_before_the_solve(driver: Path, tmp_path: Path, corner: int, transposed: bool) -> None:
    """More channels than a block folds for itself: a launch before the solve, none for an identity corner."""
    case = Case(2, (TOP_LEFT, BOTTOM_LEFT), 18, 3, 4, 2, 3, corner=corner, transposed=transposed)
    done = check_solve(driver, tmp_path, case)
    assert done.facts["weights_in_shared"] == [1]
    assert done.facts["solve_launches"] == [1 if corner == IDENTITY else 2]
    # A corner too large for shared memory is inverted in global memory, by a launch of its own.
    done = check_solve(driver, tmp_path, case.but(shared_bytes=2048))
    assert done.facts["weights_in_shared"] == [0]
    assert done.facts["solve_launches"][0] == sum(done.facts["tiles"]) - 1 + (1 if corner == IDENTITY else 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [UNIT_TRIANGULAR, GENERAL])
def test_a_corner_is_inverted_by_a_warp_or_by_the_block(
    driver: Path, tmp_path: Path, corner: int, transposed: bool
) -> None:
    """By one warp up to 12 channels, or 5 of a general corner, if the block has others; weights of every type."""
    for channels in (2, 5, 6, 12, 13, 16):
        for image_type in TYPES if channels in {5, 12} else ("float",):
            case = Case(2, (TOP_RIGHT, BOTTOM_LEFT), channels, 13, 15, 2, 3, corner, transposed, image_type, image_type)
            done = check_solve(driver, tmp_path, case)
            assert done.facts["fold_in_block"] == [1]
            assert done.facts["threads"][0] > 32
        alone = check_solve(driver, tmp_path, case.but(threads_per_block=32))
        assert alone.facts["threads"] == [32]


@pytest.mark.parametrize("transposed", [False, True])
def test_more_channels_and_pixels_than_threads(driver: Path, tmp_path: Path, transposed: bool) -> None:
    case = Case(2, (TOP_RIGHT,), 40, 3, 3, 3, 2, GENERAL, transposed, threads_per_block=32)
    done = check_solve(driver, tmp_path, case)
    assert done.facts["channel_threads"] == [32]
    case = Case(2, (TOP_RIGHT,), 6, 9, 10, 3, 3, GENERAL, transposed, threads_per_block=32)
    done = check_solve(driver, tmp_path, case)
    assert done.facts["diagonal_threads"] == [5]
    assert done.facts["tiles"] == [1, 1]


def test_large_kernel(driver: Path, tmp_path: Path) -> None:
    for transposed in (False, True):
        check_solve(driver, tmp_path, Case(2, (TOP_LEFT, BOTTOM_RIGHT), 2, 13, 12, 11, 11, transposed=transposed))
        # 4 x 4 tiles, each of which reads up to nine others.
        case = Case(1, (BOTTOM_LEFT,), 2, 13, 12, 11, 11, transposed=transposed, shared_bytes=16 * 16 + 32)
        assert max(check_solve(driver, tmp_path, case).facts["tile"]) <= 4


def test_depthwise_with_many_groups(driver: Path, tmp_path: Path) -> None:
    """A pattern of orders that repeats is one launch; one that does not is cut into launches of 256 groups."""
    repeating = Case(1, ALL_ORDERS * 80, 1, 2, 2, 2, 2, seeds=(1,))
    assert check_solve(driver, tmp_path, repeating).facts["solve_launches"] == [1]
    orders = tuple(int(o) for o in np.random.default_rng(5).integers(0, 4, 300))
    assert check_solve(driver, tmp_path, repeating.but(orders=orders)).facts["solve_launches"] == [2]
    assert check_backward(driver, tmp_path, repeating.but(orders=orders)).facts["solve_launches"] == [2]


def test_no_bias_and_singular_corner(driver: Path, tmp_path: Path) -> None:
    case = Case(2, (TOP_RIGHT,), 3, 4, 4, 3, 3, GENERAL, bias=False)
    check_solve(driver, tmp_path, case)
    data = make_data(case)
    i, j = tap(case, TOP_RIGHT, 0, 0)
    data.weight[2, :, i, j] = 2 * data.weight[1, :, i, j]
    assert np.isnan(run(driver, tmp_path, case, data).outputs[0][0]).all()


# ---- The gradients ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("corner", [IDENTITY, UNIT_TRIANGULAR, GENERAL])
@pytest.mark.parametrize("kernel", KERNEL_SIZES)
def test_gradients_of_every_kernel_image_and_corner(
    driver: Path, tmp_path: Path, kernel: tuple[int, int], corner: int, transposed: bool
) -> None:
    for number, (height, width) in enumerate(IMAGE_SIZES):
        case = Case(3, ALL_ORDERS, 5 - number, height, width, *kernel, corner=corner, transposed=transposed)
        check_backward(driver, tmp_path, case, seed=number)


@pytest.mark.parametrize("image_type", TYPES)
@pytest.mark.parametrize("weights", ["own type", "float"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_types(driver: Path, tmp_path: Path, image_type: str, weights: str, transposed: bool) -> None:
    if weights == "float" and image_type == "double":
        weights = "own type"
    weight_type = image_type if weights == "own type" else "float"
    case = Case(2, (TOP_RIGHT, BOTTOM_LEFT), 5, 6, 7, 3, 3, GENERAL, transposed, image_type, weight_type)
    check_backward(driver, tmp_path, case)


@pytest.mark.parametrize("input_layout", ["channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_layouts(driver: Path, tmp_path: Path, input_layout: str, transposed: bool) -> None:
    case = Case(2, (BOTTOM_LEFT, TOP_RIGHT), 3, 6, 5, 3, 3, transposed=transposed)
    check_backward(driver, tmp_path, case.but(input_layout=input_layout, output_layout="channels_last"))


def test_gradient_in_blocks(driver: Path, tmp_path: Path) -> None:
    """More channels and taps than a block holds, and tiles smaller than the image; then pixels split over blocks."""
    case = Case(3, (TOP_LEFT, BOTTOM_RIGHT), 9, 7, 9, 3, 6, threads_per_block=64, shared_bytes=3000, multiprocessors=40)
    done = check_backward(driver, tmp_path, case)
    assert done.facts["gradient_block"][0] < 9
    assert done.facts["gradient_window"][0] < 3
    assert done.facts["gradient_tile"] != [7, 9]
    done = check_backward(driver, tmp_path, Case(2, (BOTTOM_LEFT,), 2, 17, 33, 5, 5, multiprocessors=2))
    assert done.facts["gradient_splits"][0] > 1
    assert done.facts["gradient_teams"][0] > 1


# ---- What the kernels stand on ----


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_conversions(driver: Path, tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(3)
    values = np.concatenate(
        [
            random.standard_normal(2000) * 10.0 ** random.integers(-9, 9, 2000),
            random.integers(0, 4096, 2000) * 2.0 ** random.integers(-30, 6, 2000),  # many of them halfway
            [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 3.39e38],
        ]
    ).astype(np.float32)
    text = f"operation convert_{kind}\ncount {values.size}\nend\n"
    raw, _ = execute(driver, tmp_path, text, [values])
    every = np.arange(65536, dtype=np.uint16).view(STORED[kind])
    rounded = np.frombuffer(raw[65536 * 4 :], STORED[kind])
    with np.errstate(over="ignore", invalid="ignore"):  # numpy's complaints about NaN and infinity
        np.testing.assert_array_equal(np.frombuffer(raw[: 65536 * 4], np.float32), decode(every, kind))
        np.testing.assert_array_equal(decode(rounded, kind), decode(encode(values, kind), kind))


PAPER_SHAPES = [
    (1, 28), (3, 32), (4, 14), (12, 16), (12, 32), (16, 7), (24, 8), (24, 16), (48, 4), (48, 8), (96, 4), (48, 16)
]  # fmt: skip


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("kernel", [3, 5])
def test_one_launch_for_the_shapes_of_the_paper(driver: Path, tmp_path: Path, shared_kib: int, kernel: int) -> None:
    for channels, side in PAPER_SHAPES:
        case = Case(
            100, (TOP_LEFT,), channels, side, side, kernel, kernel, shared_bytes=shared_kib * 1024, multiprocessors=132,
            forced_regime=-1,
        )  # fmt: skip
        facts = run(driver, tmp_path, case, make_data(case), "plan").facts
        assert facts["tiles"] == [1, 1], (channels, side)
        assert facts["shared_bytes"][0] <= shared_kib * 1024
        assert facts["fold_in_block"] == [int(channels <= 16)]
        assert facts["threads"][0] % 32 == 0
        assert facts["gradient_shared_bytes"][0] <= shared_kib * 1024


# One of each path of the launches: whole images with and without a fold of their own, several images in a block, tiles,
# weights in global memory, a corner inverted there, orders of no period, tiles of rows as lanes; tensor cores, with
# whole images and a ring.
EXPLAINED = [
    Case(3, (TOP_LEFT,), 5, 6, 7, 3, 3, multiprocessors=2),
    Case(9, (TOP_LEFT, BOTTOM_RIGHT), 2, 4, 5, 2, 3, corner=GENERAL, multiprocessors=2),
    Case(2, (TOP_LEFT,), 18, 3, 4, 2, 3),
    Case(2, (BOTTOM_RIGHT, TOP_RIGHT), 3, 11, 9, 3, 4, shared_bytes=1500),
    Case(2, (TOP_LEFT, BOTTOM_LEFT), 18, 3, 4, 2, 3, corner=GENERAL, shared_bytes=2048),
    Case(2, (TOP_LEFT,), 4, 6, 5, 3, 3, image_type="half", shared_bytes=400),
    Case(1, tuple(int(o) for o in np.random.default_rng(5).integers(0, 4, 300)), 1, 2, 2, 2, 2),
    Case(2, (TOP_LEFT, BOTTOM_RIGHT), 2, 35, 20, 3, 3, image_type="half", shared_bytes=5000, threads_per_block=64),
    Case(9, (TOP_LEFT, BOTTOM_RIGHT), 10, 4, 5, 2, 3, corner=GENERAL, multiprocessors=3),
    Case(2, (TOP_RIGHT,), 18, 7, 9, 3, 3, image_type="half", shared_bytes=20000),
]


@pytest.mark.parametrize("case", EXPLAINED, ids=range(len(EXPLAINED)))
@pytest.mark.parametrize("operation", ["solve", "backward"])
def test_explain_tells_what_is_launched(driver: Path, tmp_path: Path, case: Case, operation: str) -> None:
    case = case.but(forced_regime=ANY_REGIME)
    backward = operation == "backward"
    facts = (check_backward if backward else check_solve)(driver, tmp_path, case.but(seeds=(1,))).facts
    plan = explain(
        case.image_shape,
        case.weight_shape,
        groups=len(case.orders),
        order=[list(ORDERS)[order] for order in case.orders],
        corner=list(CORNERS)[case.corner],
        dtype={"float": torch.float32, "half": torch.float16}[case.image_type],
        device="cuda",
        gpu=GpuProperties("the emulator", case.multiprocessors, case.shared_bytes, case.threads_per_block),
        backward=backward,
    )
    assert isinstance(plan, CudaPlan)
    assert facts["tile"] == list(plan.tile)
    assert facts["tiles"] == list(plan.tiles)
    for name in ("images", "threads", "channel_threads", "diagonal_threads", "pack", "shared_bytes"):
        assert facts[name] == [getattr(plan, name)], name
    assert facts["weights_in_shared"] == [plan.weights_in_shared]
    assert facts["fold_in_block"] == [plan.fold_launches == 0]
    assert facts["launches"] == [plan.launches]
    assert facts["regime"] == [TENSOR if plan.tensor is not None else LANES if plan.bands else BLOCK]
    if plan.tensor is not None:
        for name, value in dataclasses.asdict(plan.tensor).items():
            assert facts[f"tensor_{name}"] == [value], name
    if not backward:
        return
    gradient = plan.gradient
    assert gradient is not None
    assert facts["solve_launches"] == [plan.launches - gradient.launches]
    assert facts["gradient_block"] == list(gradient.channels)
    assert facts["gradient_window"] == list(gradient.window)
    assert facts["gradient_tile"] == list(gradient.tile)
    for name in ("threads", "splits", "shared_bytes", "images", "teams", "tensor_cores"):
        assert facts[f"gradient_{name}"] == [getattr(gradient, name)], name


def test_plans_stay_within_the_device(driver: Path, tmp_path: Path) -> None:
    """Shared memory and threads over a grid of problems; every pixel and channel of the plan has a thread."""
    for channels, size, kernel, image_type in itertools.product(
        (1, 2, 13, 64, 200, 700), ((1, 1), (1, 5000), (300, 7), (256, 256)), (1, 3, 11), ("float", "double")
    ):
        case = Case(5, (TOP_LEFT,), channels, *size, kernel, kernel, image_type=image_type, weight_type=image_type)
        facts = run(driver, tmp_path, case, Data(*[np.zeros(0)] * 3), "plan").facts
        assert facts["shared_bytes"][0] <= case.shared_bytes
        threads = facts["channel_threads"][0] * facts["diagonal_threads"][0] * facts["images"][0]
        assert 0 < threads <= facts["threads"][0] <= 640
        for axis in range(2):
            tile, tiles = facts["tile"][axis], facts["tiles"][axis]
            assert tile * (tiles - 1) < size[axis] <= tile * tiles
        assert facts["gradient_shared_bytes"][0] <= case.shared_bytes
        assert facts["gradient_threads"][0] <= 256


# ---- The emulator has teeth: each of these mistakes, planted in a copy of the kernels, must show ----


PLANTED = {
    "missing barrier": (
        "solve.cuh",
        "__syncthreads();  // the next diagonal reads what this one wrote",
        "if (!PLANTED(1)) __syncthreads();",
    ),
    "index one past the end": (
        "solve.cuh",
        "const int last_row = diagonal < tile.rows ? diagonal : tile.rows - 1;",
        "const int last_row = diagonal < tile.rows ? diagonal : tile.rows - (PLANTED(2) ? 0 : 1);",
    ),
    "read of unwritten memory": (  # the padding of the last pack of channels stays as it was found
        "solve.cuh",
        "for (int u = 0; u < kPack; ++u) packed.value[u] = z[u];",
        """const int found = (image * plan.tile_h + row) * plan.row_stride + column;
    for (int u = 0; u < kPack; ++u) {
      const bool is_left = PLANTED(3) && first_output + u >= channels;
      packed.value[u] = is_left ? x[(found * plan.channel_packs + pack) * kPack + u] : z[u];
    }""",
    ),
    "missing barrier of the gradient": (
        "gradient_tile.cuh",
        "__syncthreads();  // the tile is complete, and the one before was used",
        "if (!PLANTED(4)) __syncthreads();",
    ),
    "missing barrier of the fold": (
        "fold.cuh",
        "team.sync();  // the pivot row and column are copied, and every warp has its pivot",
        "if (!PLANTED(5)) team.sync();",
    ),
    "missing barrier between the levels of the fold": (
        "fold.cuh",
        "team.sync();  // L21 X11 is there",
        "if (!PLANTED(7)) team.sync();",
    ),
    "missing barrier behind the last tile of the gradient": (
        "gradient_tile.cuh",
        "__syncthreads();  // the last tile was used",
        "if (!PLANTED(8)) __syncthreads();",
    ),
    "small part left out of a split product": (
        "mma.cuh",
        "multiply_tf32(sum, a.big, b.small);",
        "if (!PLANTED(9)) multiply_tf32(sum, a.big, b.small);",
    ),
    "missing barrier where teams meet": (
        "gradient_tile.cuh",
        "__syncthreads();  // the later half's sums are there",
        "if (!PLANTED(10)) __syncthreads();",
    ),
    "barrier that some threads skip": (
        "solve.cuh",
        "__syncthreads();  // z is complete",
        "if (!PLANTED(6) || threadIdx.x != 3) __syncthreads();",
    ),
}
PLANTED |= {
    "tensor cores: missing barrier": (
        "solve_tensor.cuh",
        "__syncthreads();  // x of the diagonal before is there, and the sums may be overwritten",
        "if (!PLANTED(11)) __syncthreads();",
    ),
    "tensor cores: missing barrier before the sums": (
        "solve_tensor.cuh",
        "__syncthreads();  // the sums are complete, y has been read, and y of the next diagonal is there",
        "if (!PLANTED(12)) __syncthreads();",
    ),
    "tensor cores: the small part of x is dropped": (
        "solve_tensor.cuh",
        "multiply_tf32(sums.small[i], weights.big, x[i].small);",
        "if (!PLANTED(13)) multiply_tf32(sums.small[i], weights.big, x[i].small);",
    ),
    "tensor cores: the small part of the weights is dropped": (
        "solve_tensor.cuh",
        "multiply_tf32(sums.small[i], weights.small, x[i].big);",
        "if (!PLANTED(14)) multiply_tf32(sums.small[i], weights.small, x[i].big);",
    ),
    "tensor cores: weights that nobody waited for": (
        "solve_tensor.cuh",
        "wait_for_copies();",
        "if (!PLANTED(15)) wait_for_copies();",
    ),
    "tensor cores: a ring of one diagonal too few": (
        "solve_tensor.cuh",
        "if (slot < 0) slot += plan.slots;",
        "if (slot < 0) slot += plan.slots - (PLANTED(16) ? 1 : 0);",
    ),
    "tensor cores: an operand that is not rounded": (
        "mma.cuh",
        "big[i] = round_to_tf32(values[i]);",
        "big[i] = PLANTED(17) ? float_bits(values[i]) : round_to_tf32(values[i]);",
    ),
}
PLANTED |= {
    "tiles of the gradient that nobody waited for": (
        "gradient_tile.cuh",
        "wait_for_copies();",
        "if (!PLANTED(18)) wait_for_copies();",
    ),
    "the tile that is used is overwritten": (
        "gradient_tile.cuh",
        "shared + (both - used));",
        "shared + (PLANTED(19) ? used : both - used));",
    ),
    "no barrier behind the warp that inverts the corner": (
        "fold.cuh",
        "__syncthreads();  // the copy is complete, and so is the inverse",
        "if (!PLANTED(20)) __syncthreads();",
    ),
    "the corner is not waited for": (
        "fold.cuh",
        "team.sync();  // the corner is there",
        "if (!PLANTED(21)) team.sync();",
    ),
}
# What the mistakes need no more than, to build faster.
SPOILT_UNITS = ("solve_float", "solve_double", "gradient", "fold")
PLANTED_CASE = Case(2, (TOP_LEFT, BOTTOM_RIGHT), 3, 5, 6, 3, 3, GENERAL, seeds=(1, 2, 3))
# Many channels: on tensor cores, and inverted by blocks. Two tiles, and several teams.
PLANTED_WIDE_CASE = Case(2, (TOP_LEFT,), 16, 5, 34, 1, 2, UNIT_TRIANGULAR, seeds=(1, 2, 3))
# Corners that one warp inverts, while others copy the weights.
PLANTED_WARP_CASES = [
    Case(1, (TOP_LEFT,), 5, 13, 15, 2, 2, GENERAL, seeds=(1, 2, 3)),
    Case(1, (TOP_LEFT,), 11, 13, 15, 2, 2, UNIT_TRIANGULAR, seeds=(1, 2, 3)),
]


@pytest.fixture(scope="session")
def spoilt_driver(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Path:
    return build_spoilt(shared_folder(tmp_path_factory, worker) / "spoilt", PLANTED, SPOILT_UNITS)


def test_without_a_planted_mistake_the_checks_pass(spoilt_driver: Path, tmp_path: Path) -> None:
    for case in (PLANTED_CASE, *PLANTED_WARP_CASES):
        check_solve(spoilt_driver, tmp_path, case)
    check_backward(spoilt_driver, tmp_path, PLANTED_CASE)
    done = check_backward(spoilt_driver, tmp_path, PLANTED_WIDE_CASE)
    assert done.facts["gradient_tensor_cores"] == [1]
    assert done.facts["gradient_teams"][0] > 1


def test_a_missing_barrier_shows(spoilt_driver: Path, tmp_path: Path) -> None:
    case = PLANTED_CASE.but(planted=1)
    assert len(set(run(spoilt_driver, tmp_path, case, make_data(case)).raw)) > 1
    with pytest.raises(AssertionError, match="depends on the order of the threads"):
        check_solve(spoilt_driver, tmp_path, case)


def test_an_index_one_past_the_end_shows(spoilt_driver: Path, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="heap-buffer-overflow"):
        check_solve(spoilt_driver, tmp_path, PLANTED_CASE.but(planted=2))


def test_a_read_of_unwritten_memory_shows(spoilt_driver: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="off by nan"):
        check_solve(spoilt_driver, tmp_path, PLANTED_CASE.but(planted=3))


def test_a_missing_barrier_of_the_fold_shows(spoilt_driver: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_solve(spoilt_driver, tmp_path, PLANTED_CASE.but(planted=5))


def test_a_missing_barrier_of_the_gradient_shows(spoilt_driver: Path, tmp_path: Path) -> None:
    for case in (PLANTED_CASE, PLANTED_WIDE_CASE):
        with pytest.raises(AssertionError):
            check_backward(spoilt_driver, tmp_path, case.but(planted=4))


def test_a_missing_barrier_between_the_levels_of_the_fold_shows(spoilt_driver: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_solve(spoilt_driver, tmp_path, PLANTED_WIDE_CASE.but(planted=7))


@pytest.mark.parametrize(("number", "planted"), [(0, 5), (1, 7), (0, 20), (1, 20), (1, 21)])
def test_a_missing_barrier_of_the_warp_that_folds_shows(
    spoilt_driver: Path, tmp_path: Path, number: int, planted: int
) -> None:
    with pytest.raises(AssertionError):
        check_solve(spoilt_driver, tmp_path, PLANTED_WARP_CASES[number].but(planted=planted))


@pytest.mark.parametrize("case", [PLANTED_CASE.but(batch=40), PLANTED_WIDE_CASE])
@pytest.mark.parametrize("planted", [18, 19])
def test_mistakes_with_copies_under_way_show(spoilt_driver: Path, tmp_path: Path, case: Case, planted: int) -> None:
    """Of both kernels, over several tiles: the emulator's copies arrive at once or at the wait."""
    with pytest.raises(AssertionError):
        check_backward(spoilt_driver, tmp_path, case.but(planted=planted))


@pytest.mark.parametrize("planted", [8, 9, 10])
def test_mistakes_on_tensor_cores_show(spoilt_driver: Path, tmp_path: Path, planted: int) -> None:
    """The last tile overwritten too early, a product that is no more exact than TF32, and sums of teams that are not
    there."""
    case = PLANTED_WIDE_CASE.but(width=17)  # one tile, so it is in the buffer where teams meet
    with pytest.raises(AssertionError):
        check_backward(spoilt_driver, tmp_path, case.but(planted=planted))


def test_threads_that_miss_a_barrier_are_an_error(spoilt_driver: Path, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="do not meet at the same barrier"):
        check_solve(spoilt_driver, tmp_path, PLANTED_CASE.but(planted=6))
