"""``explain`` says what the kernels do: plans of both backends, their text, and errors for bad input. That the plan
for a GPU is the one that is launched is held against the emulator in emulation/test_plans.py."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import pytest
import torch

import inverse_flow
from inverse_flow import explain
from inverse_flow.ops.explain import H200, KIB, Facts, GpuProperties, Plan

# Of the narrowest line, and of the widest ones of the instruction sets.
LANES = (8, 16, 32)


def cpu(*arguments: Any, **options: Any) -> Plan:
    return explain(*arguments, **options)


def cuda(*arguments: Any, **options: Any) -> Plan:
    return explain(*arguments, device="cuda", **{"gpu": H200} | options)


def test_a_large_batch_has_images_as_lanes() -> None:
    plan = cpu((100, 12, 32, 16), 3, threads=2, corner="unit_triangular")
    assert plan.regime == "images as lanes"
    assert plan.isa == inverse_flow.build_info()["cpu_isa"]
    assert plan.lanes in LANES
    assert plan.steps == 32 * 16
    # Threads share the batch in pieces of the narrowest line, so that neither has a vector more than it must.
    apart = 0 if plan.rest is None else plan.rest.batch
    assert plan.units == -(-(100 - apart) // LANES[0])
    assert plan.workers == plan.threads == 2


def test_a_large_image_has_rows_as_lanes() -> None:
    plan = cpu((1, 3, 256, 100), 3, threads=2)
    assert plan.regime == "rows as lanes"
    assert plan.units == -(-256 // plan.lanes)
    assert plan.steps == 100 + plan.lanes - 1
    assert plan.workers == 2


def test_bands_are_joined_where_no_thread_could_wait_for_itself() -> None:
    # A line of two threads starts its next band when the other one is a band and a stretch, of 16 steps, behind. How
    # many rows a band has is a fact of the plan: it depends on the instruction set.
    band = cpu((1, 3, 256, 256), 3, threads=2).lanes
    least = 2 * (16 + band) - (3 - 1)  # a band lasts as long as its rows with their padding
    for width, joined in [(least, True), (least - 1, False)]:
        plan = cpu((1, 3, 256, width), 3, threads=2)
        assert (plan.lanes, plan.workers, plan.joined) == (band, 2, joined)
    # The order in which two threads claim bands would show in the sums of the gradient.
    assert not cpu((1, 3, 256, 256), 3, threads=2, backward=True).joined
    assert cpu((1, 3, 256, 256), 3, threads=1, backward=True).joined


def test_bands_of_many_channels_are_cut_for_a_thread_that_has_none() -> None:
    widest = cpu((1, 64, 64, 64), 3, threads=1).lanes
    for channels, cut in [(3, False), (64, widest > 8)]:  # eight rows are not cut
        plan = cpu((1, channels, widest, 64), 3, threads=2)
        assert (plan.workers, plan.lanes) == ((2, widest // 2) if cut else (1, widest))


def test_images_that_fill_no_vector_are_swept_by_their_rows() -> None:
    # Two threads have 48 images each, and share the rows of the last four.
    plan = cpu((100, 12, 16, 16), 3, threads=2, corner="unit_triangular")
    assert (plan.rest.batch, plan.rest.regime, plan.rest.workers) == (4, "rows as lanes", 2)
    assert cpu((96, 12, 16, 16), 3, threads=2).rest is None
    assert cpu((100, 12, 4, 4), 3, threads=2).rest is None  # rows of four would leave more lanes empty


def test_groups_are_units_of_their_own() -> None:
    assert cpu((100, 8, 8, 8), 3, groups=4, threads=1).units == 4 * cpu((100, 2, 8, 8), 3, threads=1).units
    assert cpu((1, 8, 200, 200), 3, groups=4, threads=1).units == 4 * cpu((1, 2, 200, 200), 3, threads=1).units


def test_scratch_of_the_backward_pass_holds_the_sums() -> None:
    for shape in [(64, 6, 9, 9), (1, 6, 90, 90)]:
        forward = cpu(shape, 3, threads=1)
        backward = cpu(shape, 3, threads=1, backward=True)
        assert backward.regime == forward.regime
        sums = 4 * (9 * 6 * 6 + 6)
        assert backward.scratch_bytes >= forward.scratch_bytes + sums


def test_threads_are_those_of_torch_unless_given() -> None:
    assert cpu((100, 2, 8, 8), 3).threads == torch.get_num_threads()
    assert cpu((1, 1, 2, 2), 3, threads=7).workers == 1


def test_half_precision_has_the_state_of_float32() -> None:
    single = cpu((100, 6, 8, 8), 3, dtype=torch.float32, threads=1)
    for dtype in (torch.bfloat16, torch.float16):
        half = cpu((100, 6, 8, 8), 3, dtype=dtype, threads=1)
        assert dataclasses.replace(half, problem=single.problem) == single
    assert cpu((100, 6, 8, 8), 3, dtype=torch.float64, threads=1).lanes <= single.lanes


def test_a_signal_is_an_image_of_one_row_and_residue_classes_a_batch() -> None:
    def facts(plan: Plan) -> list[tuple[str, str]]:
        return list(plan.rows())

    signal = cpu((20, 4, 100), 5, order="right")
    assert facts(signal) == facts(cpu((20, 4, 1, 100), (1, 5)))
    assert str(signal).startswith("solve of (20, 4, 100), kernel 5, 1 group, right, general corner, float32\n")
    dilated = cuda((3, 4, 30, 31), (3, 2), dilation=(2, 3))
    assert facts(dilated) == facts(cuda((18, 4, 15, 11), (3, 2)))
    assert "kernel 3 × 2 dilated by 2 × 3" in str(dilated)


def test_a_volume_is_planes_on_a_gpu() -> None:
    plane = cuda((3, 4, 30, 31), 3, corner="unit_triangular")
    for orders, runs in [("front_top_left", 1), (["front_top_left", "back_top_left"], 2)]:
        groups = 1 if isinstance(orders, str) else 2
        volume = cuda((3, 4 * groups, 9, 30, 31), 3, groups=groups, order=orders, corner="unit_triangular")
        assert (volume.planes, volume.launches, volume.convolutions) == (9, 9 * runs * plane.launches, 8 * runs)
        assert (volume.regime, volume.tile, volume.tf32) == (plane.regime, plane.tile, plane.tf32)
    assert cuda((3, 4, 9, 30, 31), (1, 3, 3)).convolutions == 0
    assert cuda((3, 4, 9, 30, 31), 3, backward=True).convolutions == 9
    assert str(volume).startswith(
        "solve of (3, 8, 9, 30, 31), kernel 3 × 3 × 3, 2 groups, front_top_left back_top_left"
    )


def test_a_volume_is_one_solve_on_a_cpu() -> None:
    assert cpu((9, 4, 5, 6, 7), 3, threads=1).steps >= 5 * 6 * 7
    assert cpu((9, 4, 5, 6, 7), 3, dilation=(1, 2, 1)).facts == cpu((18, 4, 5, 3, 7), 3).facts


def test_an_image_of_one_block_is_one_launch() -> None:
    plan = cuda((100, 8, 32, 32), 5, corner="unit_triangular")
    assert plan.regime == "images in a block, weights in shared memory"
    assert (plan.tile, plan.tiles, plan.images) == ((32, 32), (1, 1), 1)
    assert (plan.launches, plan.fold_launches, plan.steps) == (1, 0, 63)
    assert plan.blocks == 100
    assert plan.shared_bytes == 4 * (8 * 32 * 32 + 25 * 8 * 8 + 8)
    assert plan.scratch_bytes == 0
    assert plan.gradient is None


def test_a_large_image_is_a_launch_for_each_diagonal_of_tiles() -> None:
    plan = cuda((2, 5, 1024, 700), 5, corner="identity")
    assert plan.regime == "tiles, weights in shared memory"
    assert plan.tiles == (-(-1024 // plan.tile[0]), -(-700 // plan.tile[1]))
    assert plan.launches == sum(plan.tiles) - 1
    assert plan.blocks == 2 * min(plan.tiles)


def test_few_channels_have_rows_as_lanes() -> None:
    plan = cuda((100, 3, 64, 64), 3, corner="unit_triangular")
    assert plan.regime == "rows as lanes, images in a block"
    assert ("bands", "4") in plan.rows()
    assert (plan.bands, plan.launches, plan.blocks, plan.scratch_bytes) == (4, 1, 100, 0)
    assert 64 + 63 <= plan.steps <= 64 + 63 + 3 * 8 + 8
    # Whole images side by side in a warp.
    plan = cuda((10000, 1, 10, 10), 3)
    assert (plan.bands, plan.images, plan.blocks) == (1, 24, -(-10000 // 24))
    # Eight lanes a pixel: bands of four rows, as many as a block has warps for.
    plan = cuda((100, 5, 32, 32), 3)
    assert (plan.channel_threads, plan.bands, plan.tiles, plan.threads) == (8, 8, (1, 1), 256)
    assert 32 + 31 <= plan.steps <= 32 + 3 + 7 * 8 + 4
    # A ninth band is for a warp that has swept its first; a wider image would make it wait, and is cut into tiles.
    plan = cuda((100, 8, 33, 33), 3)
    assert (plan.bands, plan.tiles, plan.threads, plan.launches) == (9, (1, 1), 256, 1)
    assert 33 + 32 <= plan.steps <= 33 + 3 + 8 * 8 + 4
    assert cuda((100, 8, 61, 61), 3).tiles == (1, 1)
    assert cuda((100, 8, 64, 64), 3).tile == (32, 32)
    # Sixteen lanes a pixel: bands of two rows on up to twelve warps.
    plan = cuda((100, 12, 32, 32), 3)
    assert (plan.channel_threads, plan.bands, plan.tiles, plan.threads) == (16, 16, (1, 1), 384)
    assert 32 + 31 <= plan.steps <= 32 + 1 + 15 * 4 + 2
    # Bands of 17 rows and 16, not of 32 and one.
    plan = cuda((100, 1, 33, 33), 3)
    assert (plan.bands, plan.steps) == (2, 7 * 8 + 3 * 8)
    # What has no such kernel is solved as before.
    for shape, kernel in [((100, 5, 64, 64), 5), ((100, 3, 64, 64), 5), ((100, 3, 64, 64), (3, 2)), ((9, 3, 2, 2), 3)]:
        assert "lanes" not in cuda(shape, kernel).regime
    assert "lanes" not in cuda((100, 3, 64, 64), 3, dtype=torch.float64).regime


def test_a_large_image_of_few_channels_is_one_launch_and_cleared_flags() -> None:
    plan = cuda((2, 3, 1024, 700), 3, corner="identity")
    assert plan.regime == "rows as lanes, tiles"
    assert plan.tile == (64, 64)
    assert plan.tiles == (16, 11)
    assert plan.launches == 2
    assert plan.blocks == 2 * 16 * 11
    assert plan.scratch_bytes == 4 * (1 + 2 * 16 * 11)


def test_small_images_share_a_block() -> None:
    plan = cuda((1000, 3, 8, 8), 3)
    assert plan.images > 1
    assert plan.blocks == -(-1000 // plan.images)
    assert plan.threads % 32 == 0


def test_many_channels_fold_before_the_solve() -> None:
    assert cuda((100, 16, 8, 8), 3).launches == 1
    plan = cuda((100, 17, 8, 8), 3)
    assert (plan.launches, plan.fold_launches) == (2, 1)
    assert plan.scratch_bytes >= 4 * 9 * 17 * 17


def test_from_nine_channels_on_tensor_cores() -> None:
    assert cuda((100, 8, 16, 16), 5).tensor is None
    assert cuda((100, 9, 16, 16), 5).tensor is not None
    assert cuda((100, 12, 16, 16), 5, dtype=torch.float64).tensor is None
    assert cuda((100, 12, 16, 16), 1).tensor is None
    # With 3 x 3 taps, from 13 on.
    assert cuda((100, 12, 16, 16), 3).tensor is None
    assert cuda((100, 13, 16, 16), 3).tensor is not None
    plan = cuda((100, 24, 16, 16), 3)
    assert plan.regime == "tensor cores, whole images, weights in shared memory"
    assert plan.tensor is not None
    assert (plan.tensor.output_tiles, plan.tensor.k_steps, plan.tensor.resident_steps) == (2, 3, 27)
    assert (plan.tile, plan.tiles, plan.steps, plan.blocks) == ((16, 16), (1, 1), 31, 100)
    assert plan.threads == 32 * (plan.tensor.splits * plan.tensor.job_warps + plan.tensor.finish_warps)
    assert ("tensor.output_tiles", "2") in plan.rows()
    plan = cuda((100, 96, 4, 4), 3)
    assert plan.regime == "tensor cores, whole images, weights in shared and global memory"
    assert plan.images == 2
    plan = cuda((100, 96, 32, 32), 3)
    assert plan.regime == "tensor cores, a ring of diagonals, weights in shared and global memory"
    assert plan.launches == plan.fold_launches + 1
    # An image whose diagonals do not fit is cut into tiles.
    assert cuda((2, 64, 300, 300), 3).tensor is None


def test_the_backward_pass_on_a_gpu() -> None:
    forward, plan = cuda((100, 12, 16, 16), 3), cuda((100, 12, 16, 16), 3, backward=True)
    assert plan.gradient is not None
    assert plan.gradient.launches == 2
    assert plan.launches == forward.launches + 2
    assert not plan.gradient.tensor_cores
    assert plan.gradient.channels == (4, 12)
    assert plan.gradient.window == (1, 3)
    assert plan.gradient.blocks >= plan.gpu.multiprocessors
    assert plan.gradient.shared_bytes <= (H200.shared_bytes - KIB) // 2  # two blocks fit a multiprocessor
    # Half-precision images: u unrounded, for the gradient.
    half = cuda((100, 12, 16, 16), 3, backward=True, dtype=torch.bfloat16)
    assert half.scratch_bytes == plan.scratch_bytes + 4 * 100 * 12 * 16 * 16


def test_wide_gradients_are_for_tensor_cores() -> None:
    for dtype, channels, expected in [
        (torch.float32, 16, True),
        (torch.float32, 15, False),
        (torch.float64, 16, False),
    ]:
        plan = cuda((100, channels, 16, 16), 3, backward=True, dtype=dtype)
        assert plan.gradient is not None
        assert plan.gradient.tensor_cores == expected
        assert ("gradient.products" in str(plan)) == expected


def test_partial_sums_are_a_tenth_of_the_images_at_most() -> None:
    """Where not even one copy of the weights is that small, the blocks write the gradient themselves."""
    for channels, size in [(3, 32), (4, 14), (12, 16), (16, 7), (24, 16), (48, 8), (96, 4), (48, 32)]:
        plan = cuda((16, channels, size, size), 3, backward=True).gradient
        assert plan is not None
        assert plan.scratch_bytes <= 4 * 16 * channels * size**2 / 10
        assert plan.launches == (1 if plan.splits == 1 else 2)
        assert (plan.scratch_bytes == 0) == (plan.splits == 1)


def test_orders_without_a_period_are_cut_into_launches() -> None:
    names = ("top_left", "bottom_right", "top_right")
    repeating = tuple(names[i % 3] for i in range(300))
    assert cuda((1, 300, 4, 4), 3, groups=300, order=repeating).launches == 1
    generator = torch.Generator().manual_seed(0)
    aperiodic = tuple(names[i] for i in torch.randint(3, (300,), generator=generator).tolist())
    assert cuda((1, 300, 4, 4), 3, groups=300, order=aperiodic).launches == 2


def test_the_gpu_decides() -> None:
    small = GpuProperties("a small one", 10, 16 * KIB)
    assert cuda((100, 7, 32, 32), 5).tiles == (1, 1)
    plan = cuda((100, 7, 32, 32), 5, gpu=small)
    assert plan.gpu is small
    assert plan.shared_bytes <= small.shared_bytes
    assert plan.launches == sum(plan.tiles) - 1 > 1
    with pytest.raises(RuntimeError, match=r"5000 channels per group are more than fit .* a small one \(16384 bytes\)"):
        cuda((1, 5000, 1, 1), 1, gpu=small)


def test_without_a_gpu_the_plan_is_for_an_h200() -> None:
    plan = explain((1, 1, 4, 4), 3, device="cuda")
    if torch.cuda.is_available():
        assert plan.gpu == GpuProperties.of()
    else:
        assert plan.gpu is H200


def test_an_empty_batch_is_nothing_to_do() -> None:
    for plan in (cpu((0, 3, 4, 4), 3), cuda((0, 3, 4, 4), 3, backward=True)):
        assert plan.regime == "nothing to do"
        assert "nothing to do" in str(plan)
    assert cuda((0, 3, 4, 4), 3).launches == 0


def test_a_kernel_size_is_that_of_the_weight_too() -> None:
    assert cpu((2, 6, 5, 5), (6, 3, 2, 4), groups=2) == cpu((2, 6, 5, 5), (2, 4), groups=2)
    assert cpu((2, 6, 5, 5), (3, 3)) == cpu((2, 6, 5, 5), 3)


def test_the_text_tells_the_plan() -> None:
    text = str(cpu((100, 12, 16, 16), 3, corner="unit_triangular", threads=2))
    assert text.startswith(
        "solve of (100, 12, 16, 16), kernel 3 × 3, 1 group, top_left, unit_triangular corner, float32"
    )
    assert "images as lanes" in text
    text = str(cuda((100, 12, 16, 16), (3, 5), groups=2, order=("top_left", "bottom_right"), backward=True))
    assert text.startswith("backward pass of (100, 12, 16, 16), kernel 3 × 5, 2 groups, top_left bottom_right, general")
    for part in ("NVIDIA H200", "132 multiprocessors", "227.0 KiB", "launches", "gradient"):
        assert part in text


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cpu((1, 1, 1, 1), 1).lanes = 3


def test_a_fact_that_a_plan_lacks_is_an_error_that_names_those_it_has() -> None:
    with pytest.raises(
        AttributeError, match=r"this plan has no 'tile', it has isa, threads, regime, workers, .*joined"
    ):
        _ = cpu((1, 1, 1, 1), 1).tile
    assert not hasattr(cuda((1, 1, 1, 1), 1), "isa")


def test_a_plan_is_a_value() -> None:
    plan = cuda((100, 24, 16, 16), 3, backward=True)
    same = pickle.loads(pickle.dumps(plan))
    assert same == copy.deepcopy(plan) == plan
    assert hash(same) == hash(plan)
    assert plan != cuda((100, 24, 16, 17), 3, backward=True)


def test_every_fact_is_documented_and_printed() -> None:
    def names(facts: Facts) -> set[str]:
        return set(facts.facts).union(*(names(part) for part in facts.facts.values() if isinstance(part, Facts)))

    problems = [((100, 24, 16, 16), 3), ((100, 3, 64, 64), 3), ((2, 5, 1024, 700), 5)]
    plans = [cuda(*problem, backward=True) for problem in problems]
    for plan in (*plans, cpu((1, 3, 256, 100), 3)):
        for name in names(plan):
            assert re.search(rf"\b{name}\b", inspect.getdoc(Plan) or ""), name
        printed = [name for name, _ in plan.rows()]
        assert all(name in str(plan) for name in printed)
        assert len(printed) == len(set(printed))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((1, 2), 3), {}, ValueError, r"shape must be \(B, C, H, W\)"),
        ((torch.ones(1, 2, 3, 3), 3), {}, TypeError, r"got a tensor: pass its shape, \(1, 2, 3, 3\)$"),
        (((1, 2, 3, 3), torch.ones(2, 2, 3, 3)), {}, TypeError, r"got a tensor: pass its shape, \(2, 2, 3, 3\)$"),
        (((1, 2.0, 3, 3), 3), {}, TypeError, "C of shape must be an integer, got 2.0"),
        (((-1, 2, 3, 3), 3), {}, ValueError, "B of shape must be at least 0, got -1"),
        (((1, 2, 0, 3), 3), {}, ValueError, "H of shape must be at least 1, got 0"),
        (((1, 2, 3, 3), 0), {}, ValueError, "kernel must be at least 1, got 0"),
        (((1, 2, 3, 3), (3, 3, 3)), {}, ValueError, "an integer, one for each axis or the shape of a weight"),
        (((1, 4, 3, 3), (4, 4, 3, 3)), {"groups": 2}, ValueError, r"shape \(4, 2, kH, kW\), got \(4, 4, 3, 3\)"),
        (((1, 3, 3, 3), 3), {"groups": 2}, ValueError, r"\(3\) must be divisible by groups \(2\)"),
        (((1, 2, 3, 3), 3), {"groups": 0}, ValueError, "groups must be at least 1"),
        (((1, 2, 3, 3), 3), {"order": "left"}, ValueError, "order must be one of"),
        (((1, 2, 3, 3), 3), {"corner": "plu"}, ValueError, "corner must be one of"),
        (((1, 2, 3, 3), 3), {"dtype": torch.int32}, TypeError, r"dtype must be float32.*got torch\.int32"),
        (((1, 2, 3, 3), 3), {"device": "meta"}, ValueError, "device must be 'cpu' or 'cuda', got 'meta'"),
        (((1, 2, 3, 3), 3), {"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        (((1, 2, 3, 3), 3), {"device": "cuda", "threads": 2}, ValueError, "threads belongs to device='cpu'"),
        (((1, 2, 3, 3), 3), {"gpu": H200}, ValueError, "gpu belongs to device='cuda'"),
    ],
)
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explain(*arguments, **options)


def test_impossible_gpus() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        GpuProperties("odd", 1, KIB, 100)
    with pytest.raises(ValueError, match="shared_bytes must be at least 1, got 0"):
        GpuProperties("none", 1, 0)
