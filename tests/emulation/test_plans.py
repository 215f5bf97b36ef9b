"""The plans of the CUDA kernels: within the device, and what explain says of them is what is launched."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from inverse_flow import explain
from inverse_flow.ops.explain import GpuProperties
from inverse_flow.ops.spec import CORNERS, ORDERS

from .checks import check_backward, check_solve
from .emulator import (
    ANY_REGIME,
    BLOCK,
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    LANES,
    TENSOR,
    TOP_LEFT,
    TOP_RIGHT,
    Case,
    plans,
)
from .test_lanes import MOST_CHANNELS, lanes_case, most_threads, rows_of_band

PAPER_SHAPES = [
    (1, 28), (3, 32), (4, 14), (12, 16), (12, 32), (16, 7), (24, 8), (24, 16), (48, 4), (48, 8), (96, 4), (48, 16)
]  # fmt: skip


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("kernel", [3, 5])
def test_one_launch_for_the_shapes_of_the_paper(shared_kib: int, kernel: int) -> None:
    for channels, side in PAPER_SHAPES:
        case = Case(
            100, (TOP_LEFT,), channels, side, side, kernel, kernel, shared_bytes=shared_kib * 1024, multiprocessors=132,
            forced_regime=-1,
        )  # fmt: skip
        facts = plans(case)
        assert facts["tiles"] == [1, 1], (channels, side)
        assert facts["shared_bytes"][0] <= shared_kib * 1024
        assert (facts["fold_launches"] == [0]) == (channels <= 16)
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
def test_explain_tells_what_is_launched(case: Case, operation: str) -> None:
    case = case.but(forced_regime=ANY_REGIME)
    backward = operation == "backward"
    facts = (check_backward if backward else check_solve)(case.but(seeds=(1,))).facts
    plan = explain(
        case.image_shape,
        case.weight_shape,
        groups=len(case.orders),
        order=[ORDERS[2][order] for order in case.orders],
        corner=list(CORNERS)[case.corner],
        dtype={"float": torch.float32, "half": torch.float16}[case.image_type],
        device="cuda",
        gpu=GpuProperties("the emulator", case.multiprocessors, case.shared_bytes, case.threads_per_block),
        backward=backward,
    )
    # The driver prints every fact of a plan, the regime by its number, and what was launched.
    assert set(plan.facts) - {"tensor", "gradient", "scratch_bytes", "tf32"} <= set(facts)
    for prefix, part in (("", plan), ("tensor_", plan.tensor), ("gradient_", plan.gradient)):
        for name, value in () if part is None else part.facts.items():
            if prefix + name in facts and name != "regime":
                assert facts[prefix + name] == list(value if isinstance(value, tuple) else (value,)), prefix + name
    if backward:
        assert facts["solve_launches"] == [plan.launches - plan.gradient.launches]


def test_plans_stay_within_the_device() -> None:
    """Shared memory and threads over a grid of problems; every pixel and channel of the plan has a thread."""
    for channels, size, kernel, image_type in itertools.product(
        (1, 2, 13, 64, 200, 700), ((1, 1), (1, 5000), (300, 7), (256, 256)), (1, 3, 11), ("float", "double")
    ):
        case = Case(5, (TOP_LEFT,), channels, *size, kernel, kernel, image_type=image_type, weight_type=image_type)
        facts = plans(case)
        assert facts["shared_bytes"][0] <= case.shared_bytes
        threads = facts["channel_threads"][0] * facts["diagonal_threads"][0] * facts["images"][0]
        assert 0 < threads <= facts["threads"][0] <= 640
        for axis in range(2):
            tile, tiles = facts["tile"][axis], facts["tiles"][axis]
            assert tile * (tiles - 1) < size[axis] <= tile * tiles
        assert facts["gradient_shared_bytes"][0] <= case.shared_bytes
        assert facts["gradient_threads"][0] <= 256


def test_plans_of_tensor_cores_stay_within_the_device() -> None:
    taken = 0
    for channels, size, kernel, kib in itertools.product(
        (9, 13, 64, 200, 700), ((1, 9), (1, 5000), (300, 7), (256, 256), (32, 32)), (2, 3, 11), (99, 227)
    ):
        case = Case(5, (TOP_LEFT,), channels, *size, kernel, kernel, shared_bytes=kib * 1024, forced_regime=-1)
        facts = plans(case)
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
        assert plans(case.but(forced_regime=ANY_REGIME))["regime"] == [BLOCK]


def test_plans_of_rows_as_lanes_stay_within_the_device() -> None:
    for taps, most in MOST_CHANNELS.items():
        for channels in range(1, most + 1):
            for height, width in ((taps, taps), (5, 3000), (900, 7), (64, 64), (2048, 2048)):
                # The last has room for little more than the weights.
                for shared_bytes, threads in ((99 * 1024, 1024), (227 * 1024, 1024), (12000, 64)):
                    case = lanes_case(
                        3, (TOP_LEFT,), channels, height, width, taps, taps, shared_bytes=shared_bytes,
                        threads_per_block=threads,
                    )  # fmt: skip
                    facts = plans(case)
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
