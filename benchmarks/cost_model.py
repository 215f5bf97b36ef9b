"""How long should the CUDA kernels take on an H200-class GPU? A prediction to confirm or refute; nothing is measured.

    python benchmarks/cost_model.py                          the table
    python benchmarks/cost_model.py --write docs/cost-model.md   put it between the marks of that page

The plan of each launch comes from ``inverse_flow.explain``, the constants below from data sheets and published
microbenchmarks. A launch costs

    launch + fold + prepare + sweep + store

each the larger of its latency (what follows what in one thread) and its throughput (what all blocks of a
multiprocessor need of one of its units), times the waves of blocks. docs/cost-model.md has the formulas in words.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import geometric_mean

from inverse_flow import explain
from inverse_flow.ops.explain import H200, CudaPlan, GpuProperties, GradientPlan, TensorPlan

MARKS = ("<!-- predicted: begin -->\n", "<!-- predicted: end -->\n")


@dataclass(frozen=True)
class Constants:
    """What an H200-class GPU costs. Cycles unless the name says otherwise."""

    # NVIDIA H200 data sheet: largest clock of the multiprocessors, bandwidth of the memory, float32 throughput.
    clock_ghz: float = 1.98
    memory_bytes_per_us: float = 4.8e6
    # CUDA C++ Programming Guide, compute capability 9.0: of a multiprocessor.
    shared_bytes: int = 228 * 1024
    reserved_shared_bytes: int = 1024  # of a block
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    multiply_adds: float = 128.0  # float32, a cycle
    double_multiply_adds: float = 64.0
    shared_bandwidth: float = 128.0  # bytes a cycle
    # Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499: latencies.
    shared_latency: float = 29.0
    l1_latency: float = 41.0
    l2_latency: float = 263.0
    global_latency: float = 479.0
    # The same: a dependent float32 multiply-add.
    multiply_add_latency: float = 4.0
    # CUDA C++ Programming Guide: a multiprocessor has four schedulers, each issues one instruction a cycle.
    schedulers: int = 4
    # Published figures for a shuffle are 22 to 24 cycles.
    shuffle_latency: float = 23.0
    # docs/kernels-cuda.md counts the barriers; 23 to 40 cycles each were published, for one block to eight warps.
    barrier: float = 32.0
    # Assumed: less than a shuffle, which waits for all lanes too and moves a value besides.
    warp_barrier: float = 14.0
    # A launch in a stream, a node of a graph, and a launch behind which the host waits for the GPU.
    launch_us: float = 2.0
    graph_node_us: float = 1.3
    synchronised_launch_us: float = 7.0  # assumed: the launch and a round trip to the host
    # Assumed: bytes a cycle that a multiprocessor gets from the L2 cache.
    l2_bandwidth: float = 64.0
    # Assumed: bytes that all multiprocessors together get from the L2 cache.
    l2_bytes_per_us: float = 5.5e6
    # NVIDIA H200 data sheet: 495 TFLOP/s in TF32 without sparsity, of which mma.sync is said to reach 60 %. Here in
    # multiply-adds a cycle of a multiprocessor; and how long a product takes (published: 17 to 33 cycles).
    tensor_multiply_adds: float = 568.0
    tensor_latency: float = 25.0
    # Products of tensor cores for one of float32: 3xTF32, or 1 where TF32 is allowed.
    products: int = 3
    # Assumed: bytes of L2 traffic of one value that a diagonal moves alone, out of a row.
    sector_bytes: float = 32.0
    # Assumed: a division in double precision.
    double_division: float = 150.0
    # Assumed: loads that a thread has under way at a time where the code does not wait for each.
    loads_in_flight: float = 4.0


# Registers a thread, sm_90: the table of docs/kernels-cuda.md.
SOLVE_REGISTERS = {(True, False): 90, (True, True): 66, (False, False): 84}  # (weights in shared memory, one channel)
GRADIENT_REGISTERS = {False: 156, True: 124}  # (tensor cores)
# Instructions of a thread of the block kernel, counted in the disassembly for sm_90 and float images, by whether it
# pads channels to packs of four: of the value that it prepares, besides those of each pass over the inputs, and
# stores (a pack of it); of a diagonal, of each of its values there, and of each row of taps.
BLOCK_PREPARE = {False: (160, 24), True: (177, 102)}
BLOCK_STORE = {False: 112, True: 160}
BLOCK_DIAGONAL, BLOCK_VALUE, BLOCK_TAP_ROW = 15, {False: 36, True: 38}, 9
BLOCK_TAP_OUTSIDE = {False: 46, True: 114}  # of a pass over a tap that reaches out of the tile


def block_tap_instructions(packs: int, padded: bool) -> int:
    """Of a tap of the block kernel: packs go by four at a time, and what is left over."""
    if not padded:
        return 28
    fours, rest = divmod(packs, 4)
    return 23 + (3 + 33 * fours if fours else 0) + (0, 9, 25, 25)[rest]


# Of the regime of rows as lanes, sm_90, by (channels of a group, taps of the window): registers a thread, and the
# instructions of a step, counted in the disassembly of the sweep's loop.
LANES_REGISTERS = {
    (1, 2): 60, (2, 2): 70, (3, 2): 95, (4, 2): 103, (5, 2): 95, (6, 2): 99, (7, 2): 128, (8, 2): 128,
    (1, 3): 62, (2, 3): 80, (3, 3): 103, (4, 3): 118, (5, 3): 100, (6, 3): 116, (7, 3): 128, (8, 3): 128,
    (9, 3): 143, (10, 3): 153, (11, 3): 165, (12, 3): 165,
    (1, 5): 74, (2, 5): 162,
}  # fmt: skip
LANES_INSTRUCTIONS = {
    (1, 2): 22, (2, 2): 39, (3, 2): 40, (4, 2): 46, (5, 2): 37, (6, 2): 40, (7, 2): 43, (8, 2): 46,
    (1, 3): 35, (2, 3): 68, (3, 3): 74, (4, 3): 93, (5, 3): 67, (6, 3): 75, (7, 3): 83, (8, 3): 94, (9, 3): 104,
    (10, 3): 112, (11, 3): 120, (12, 3): 129,
    (1, 5): 66, (2, 5): 148,
}  # fmt: skip
# The same for what a thread prepares and stores at a time, a pixel or WIDE_PIXELS of a row (kAccessWidth of
# csrc/cuda/plan_lanes.h), by channels of a group.
WIDE_PIXELS = 4
PREPARE_INSTRUCTIONS = {
    1: {1: 80, 2: 88, 3: 99, 4: 112, 5: 137, 6: 154, 7: 176, 8: 199, 9: 228, 10: 255, 11: 289, 12: 320},
    WIDE_PIXELS: {1: 107, 2: 140, 3: 180, 4: 222, 5: 269, 6: 327, 7: 399, 8: 474, 9: 575, 10: 667, 11: 773, 12: 883},
}
STORE_INSTRUCTIONS = {
    1: {1: 70, 2: 75, 3: 81, 4: 86, 5: 93, 6: 102, 7: 106, 8: 113, 9: 119, 10: 125, 11: 131, 12: 138},
    WIDE_PIXELS: {1: 87, 2: 101, 3: 115, 4: 129, 5: 147, 6: 161, 7: 175, 8: 189, 9: 207, 10: 221, 11: 235, 12: 249},
}
# kFoldLoads of csrc/cuda/fold.cuh (rows as lanes have four, whose blocks copy all their weights at once with either),
# inverted_by_warp of csrc/cuda/plan.h.
FOLD_LOADS = 8
MOST_CHANNELS_OF_WARP = {"unit_triangular": 12, "general": 5}
LONGEST_PHASE = 8  # kLanesLongestPhase of csrc/cuda/plan_lanes.h
TENSOR_REGISTERS = 119
STATE_BYTES = 4
# csrc/cuda/plan_tensor.h: tiles of one matrix product, tiles of pixels of a job.
OUTPUT_TILE, INPUT_TILE, PIXEL_TILE, JOB_TILES = 16, 8, 8, 4
# csrc/cuda/plan_gradient.h: instructions of a warp's step of the gradient on tensor cores, of a tap of it, and of 32
# copied values.
STEP_INSTRUCTIONS, TAP_INSTRUCTIONS, COPY_INSTRUCTIONS = 30, 14, 6
# csrc/cuda/solve_tensor.cuh: packs that a thread stages in registers, and that it loads at a time.
STAGED_PACKS, LOADED_PACKS = 2, 4


@dataclass(frozen=True)
class Case:
    """Images (batch, channels, size, size) and a kernel × kernel window."""

    batch: int
    channels: int
    size: int
    kernel: int = 3

    def __str__(self) -> str:
        return f"{self.batch} × {self.channels} × {self.size}², k={self.kernel}"


# The shapes that the kernels are judged by.
CASES = (
    Case(100, 3, 32), Case(100, 3, 64), Case(100, 4, 14), Case(100, 12, 16), Case(100, 12, 16, 5), Case(100, 12, 32),
    Case(100, 16, 7), Case(100, 24, 16), Case(100, 48, 8), Case(100, 96, 4), Case(100, 48, 32), Case(100, 96, 32),
)  # fmt: skip


@dataclass(frozen=True)
class Time:
    """Microseconds of one pass by what they are spent on; ``launches`` in a graph."""

    launches: float
    fold: float
    prepare: float
    sweep: float
    store: float
    gradient: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __add__(self, other: Time) -> Time:
        mine, theirs = asdict(self), asdict(other)
        return Time(**{name: mine[name] + theirs[name] for name in mine})


def resident_blocks(threads: int, shared_bytes: int, registers: int, constants: Constants) -> int:
    """Blocks that a multiprocessor holds at a time."""
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    limits = (
        constants.blocks,
        constants.threads // threads,
        constants.shared_bytes // (shared_bytes + constants.reserved_shared_bytes),
        constants.registers // (of_a_warp * math.ceil(threads / 32)),
    )
    return max(min(limits), 1)


def _waves(blocks: int, resident: int, gpu: GpuProperties) -> tuple[int, float]:
    """Waves of blocks, and the blocks that a multiprocessor works on at a time."""
    waves = math.ceil(blocks / (gpu.multiprocessors * resident))
    return waves, min(resident, math.ceil(blocks / gpu.multiprocessors))


def inversion_cycles(corner: str, channels: int, threads: int, barrier: float, load: float, c: Constants) -> float:
    """Inverting the corner by so many threads with such a barrier; ``load``: where the corner is loaded from."""
    if corner == "identity":
        return 0.0
    # The corner comes into shared memory, a few loads of a thread at a time.
    cycles = math.ceil(channels**2 / threads / FOLD_LOADS) * load + c.shared_latency + barrier
    if corner == "general":
        rounds = math.ceil(channels**2 / threads)
        step = 2 * barrier + 2 * c.shuffle_latency + c.double_division
        return cycles + channels * (step + (2 + rounds) * 2 * c.shared_latency)
    # Levels of two products: a thread's entries one after the other, of `size` terms at most. A warp has a quarter of
    # the multiprocessor's double-precision units.
    units = c.double_multiply_adds * min(1.0, threads / 32 / c.schedulers)
    size = 2
    while size < channels:
        rest = max(0, channels % (2 * size) - size)
        entries = (channels // (2 * size) * size + rest) * size
        rounds = math.ceil(entries / threads)
        latency = rounds * (c.shared_latency + size * 2 * c.multiply_add_latency)
        throughput = entries * size / 2 / units
        cycles += 2 * (barrier + max(latency, throughput))
        size *= 2
    return cycles


def fold_cycles(plan: CudaPlan, threads: int, blocks: int, constants: Constants) -> float:
    """Inverting the corner and folding the taps, in one block of ``blocks`` that share the entries of a group."""
    channels = plan.problem.channels // plan.problem.groups
    corner = plan.problem.corner
    barrier, global_latency = constants.barrier, constants.global_latency
    terms = {"identity": 1.0, "unit_triangular": channels / 2, "general": channels}[corner]
    entries = plan.folded_bytes // plan.problem.groups / STATE_BYTES
    rounds = math.ceil(entries / (threads * blocks))
    if plan.fold_launches or corner == "identity":
        # The entry's terms: a load of the weight, from the L1 cache, each.
        inversion = inversion_cycles(corner, channels, threads, barrier, global_latency, constants)
        latency = rounds * (global_latency + terms * constants.l1_latency / constants.loads_in_flight)
    else:
        # A copy of the weights in shared memory, a few loads of a thread at a time, and the inversion: from there, or
        # from global memory by one warp meanwhile. Then the terms from the copy.
        by_warp = threads > 32 and channels <= MOST_CHANNELS_OF_WARP[corner]
        copiers = threads - 32 if by_warp else threads
        copy = math.ceil(entries / copiers / FOLD_LOADS) * global_latency + constants.shared_latency
        if by_warp:
            own = inversion_cycles(corner, channels, 32, constants.warp_barrier, global_latency, constants)
            inversion = max(copy, own) + barrier
        else:
            own = inversion_cycles(corner, channels, threads, barrier, constants.shared_latency, constants)
            inversion = copy + barrier + own
        latency = rounds * (1 + terms / constants.loads_in_flight) * constants.shared_latency
    throughput = rounds * threads * terms / constants.double_multiply_adds
    return inversion + max(latency, throughput)


def lanes_time(plan: CudaPlan, constants: Constants) -> Time:
    """The solve of a plan with rows as lanes."""
    problem, us = plan.problem, 1e-3 / constants.clock_ghz
    channels = problem.channels // problem.groups
    kernel = channels, problem.kernel_size[0]
    resident = resident_blocks(plan.threads, plan.shared_bytes, LANES_REGISTERS[kernel], constants)
    waves, busy = _waves(plan.blocks, resident, plan.gpu)
    diagonals = plan.tiles[0] + plan.tiles[1] - 1
    # Of several tiles, those of one anti-diagonal are at work, on average; the others wait or are not there yet.
    at_work = plan.blocks / diagonals
    if diagonals > 1:
        busy = min(resident, max(1.0, at_work / plan.gpu.multiprocessors))
    lanes = plan.channel_threads
    rows = 32 // lanes
    sweeps = math.ceil(plan.images / max(1, rows // plan.tile[0])) * plan.bands  # of a warp over a band
    wide = problem.width % WIDE_PIXELS == 0 and plan.tile[1] % WIDE_PIXELS == 0
    moved_pixels = WIDE_PIXELS if wide else 1
    parts = plan.images * math.prod(plan.tile) // moved_pixels
    rounds = math.ceil(parts / plan.threads)
    # Cycles of the instructions of what all threads prepare, or store: a warp's go to one scheduler.
    a_scheduler = math.ceil(math.ceil(parts / 32) / constants.schedulers)
    prepare_instructions = a_scheduler * PREPARE_INSTRUCTIONS[moved_pixels][channels]
    store_instructions = a_scheduler * STORE_INSTRUCTIONS[moved_pixels][channels]

    fold = fold_cycles(plan, plan.threads, 1, constants)
    # Prepare: a few loads of a thread wait for global memory together; then its instructions.
    values = channels * moved_pixels
    in_flight = 4 if values <= 4 else 2 if values <= 16 else 1  # kInFlight of csrc/cuda/solve_lanes.cuh
    latency = math.ceil(rounds / in_flight) * constants.global_latency
    prepare = max(latency + prepare_instructions, busy * prepare_instructions)
    # Sweep: a step is a shuffle, or a load of what the step before stored, and the multiply-adds of the row above; or
    # its instructions. Bands meet at a barrier every few steps. All warps of the multiprocessor share its schedulers
    # and its shared memory in the steps in which their bands are at work.
    fetch = constants.shuffle_latency if lanes == 1 else constants.shared_latency
    step = max(fetch + (channels + 3) * constants.multiply_add_latency, LANES_INSTRUCTIONS[kernel])
    phase = min(LONGEST_PHASE, rows)
    margin = kernel[1] - 1 if diagonals > 1 else 0
    band_steps = math.ceil((plan.tile[1] + margin + math.ceil(plan.tile[0] / plan.bands) - 1) / phase) * phase
    barriers = plan.steps / phase * constants.barrier if plan.bands > 1 else 0.0
    outputs = math.ceil(channels / lanes)
    pitch = min(lanes * outputs, math.ceil(channels / 4) * 4)  # pitch_of_pixel of csrc/cuda/plan_lanes.h
    pixels_read = kernel[1] - 1 if lanes == 1 else kernel[1]
    step_bytes = 32 * (pixels_read * pitch + 2 * outputs) * STATE_BYTES
    of_a_warp = max(LANES_INSTRUCTIONS[kernel] / constants.schedulers, step_bytes / constants.shared_bandwidth)
    sweep = max(plan.steps * step + barriers, busy * sweeps * band_steps * of_a_warp)
    store = max(rounds * constants.shared_latency + store_instructions, busy * store_instructions)

    image_bytes = problem.batch * problem.channels * problem.height * problem.width * problem.dtype.itemsize
    moved = image_bytes / constants.memory_bytes_per_us
    launches = plan.launches - (plan.gradient.launches if plan.gradient else 0)
    chain_of_tiles: float = waves
    if diagonals > 1:
        # A tile waits for its neighbours' flags and loads its margin, each through L2, and its own flag must get there.
        # It folded and prepared before, in its wave.
        sweep += 3 * constants.l2_latency
        store += constants.l2_latency
        chain_of_tiles = diagonals * max(1.0, at_work / (plan.gpu.multiprocessors * resident))
    return Time(
        launches * constants.graph_node_us,
        fold * waves * us,
        max(prepare * waves * us, moved),
        sweep * chain_of_tiles * us,
        max(store * chain_of_tiles * us, moved),
    )


def tensor_step_cycles(
    plan: CudaPlan, tensor: TensorPlan, number: int, busy: float, constants: Constants
) -> tuple[float, float]:
    """Cycles of one diagonal on tensor cores, and the bytes of weights that it reads through L2."""
    problem = plan.problem
    rows, columns = problem.height, problem.width
    taps = [min(problem.kernel_size[0], rows), min(problem.kernel_size[1], columns)]
    length = min(number, rows - 1) - max(0, number - columns + 1) + 1
    tiles = math.ceil(plan.images * length / PIXEL_TILE)
    groups = math.ceil(tiles / JOB_TILES)
    job_tiles = math.ceil(tiles / groups)
    rounds = math.ceil(tensor.output_tiles * groups / tensor.job_warps)
    warps = min(tensor.job_warps, tensor.output_tiles * groups) * tensor.splits
    distances = sorted(a + b for a in range(taps[0]) for b in range(taps[1]))
    near = sum(1 for distance in distances if 1 == distance <= number)
    reaching = sum(1 for distance in distances if distance <= number)
    first_streamed = tensor.resident_steps / tensor.k_steps  # in taps

    fragment = OUTPUT_TILE * INPUT_TILE * STATE_BYTES
    product = (
        OUTPUT_TILE * INPUT_TILE * PIXEL_TILE / (constants.tensor_multiply_adds / 4)
    )  # a quarter has its own cores

    def phase(count: int, streamed: float) -> tuple[float, float]:
        """Of `count` taps, `streamed` of them through L2: cycles and bytes."""
        steps = count * tensor.k_steps
        if steps == 0:
            return 0.0, 0.0
        own = rounds * math.ceil(steps / tensor.splits)
        # The first loads and their split; then two products into one sum wait for each other, or the cores are busy.
        warps_a_quarter = math.ceil(warps / 4) * busy
        first = constants.l2_latency if streamed >= count else constants.shared_latency
        pipeline = own * max(
            max(constants.products - 1, 1) * constants.tensor_latency,
            warps_a_quarter * job_tiles * constants.products * product,
        )
        through_l2 = tensor.output_tiles * groups * tensor.k_steps * fragment * streamed
        shared = (
            tensor.output_tiles
            * groups
            * (
                steps * job_tiles * INPUT_TILE * PIXEL_TILE * STATE_BYTES
                + (count - streamed) * tensor.k_steps * fragment
            )
        )
        bandwidth = max(shared / constants.shared_bandwidth, through_l2 / constants.l2_bandwidth) * busy
        return first + 12.0 + max(pipeline, bandwidth), through_l2

    streamed_far = max(0.0, reaching - max(first_streamed, 1.0 + near))
    streamed_near = min(float(near), max(0.0, 1.0 + near - max(first_streamed, 1.0)))
    ahead, ahead_bytes = phase(reaching - near, streamed_far + max(0.0, 1.0 - first_streamed))
    waiting, near_bytes = phase(near, streamed_near)
    # The splits' sums: written, read side by side, and x written; by warps that do nothing else, if there are any.
    finishers = (tensor.finish_warps or plan.threads // 32) * 32
    additions = math.ceil(plan.images * length * math.ceil(problem.channels / problem.groups / plan.pack) / finishers)
    finish = constants.shared_latency * (additions * math.ceil(tensor.splits / constants.loads_in_flight) + 1)
    # Of a ring, y that does not fit the registers of those threads is waited for.
    late = 0.0 if tensor.whole_images else max(0, additions - STAGED_PACKS) * constants.global_latency
    waiting += constants.shared_latency
    if tensor.finish_warps:
        return max(ahead, finish) + max(waiting, late) + 2 * constants.barrier, ahead_bytes + near_bytes
    return ahead + finish + waiting + late + 2 * constants.barrier, ahead_bytes + near_bytes


def tensor_time(plan: CudaPlan, tensor: TensorPlan, constants: Constants) -> Time:
    """The solve of a plan on tensor cores."""
    problem, us = plan.problem, 1e-3 / constants.clock_ghz
    resident = resident_blocks(plan.threads, plan.shared_bytes, TENSOR_REGISTERS, constants)
    waves, busy = _waves(plan.blocks, resident, plan.gpu)
    steps = [tensor_step_cycles(plan, tensor, number, busy, constants) for number in range(plan.steps)]
    taps = min(problem.kernel_size[0], problem.height) * min(problem.kernel_size[1], problem.width)
    resident_bytes = tensor.output_tiles * tensor.resident_steps * OUTPUT_TILE * INPUT_TILE * STATE_BYTES

    if plan.fold_launches:
        fold = fold_cycles(plan, 640, plan.fold_blocks // problem.groups, constants)
        fold += waves * (constants.l2_latency + resident_bytes / constants.l2_bandwidth * busy)
    else:
        fold = fold_cycles(plan, plan.threads, 1, constants) * waves

    values = problem.batch * problem.channels * problem.height * problem.width
    moved = values * problem.dtype.itemsize / constants.memory_bytes_per_us
    items = plan.images * problem.height * problem.width * math.ceil(problem.channels / problem.groups / plan.pack)
    if not tensor.whole_images:
        items = plan.images * math.ceil(problem.channels / problem.groups / plan.pack)
    latency = math.ceil(items / (plan.threads * LOADED_PACKS)) * constants.global_latency
    zeros = plan.shared_bytes - resident_bytes
    prepare = max(waves * (latency + zeros / constants.shared_bandwidth) * us, moved)

    through_l2 = plan.blocks * sum(weights for _, weights in steps)
    if not tensor.whole_images:
        through_l2 += 2 * values * constants.sector_bytes
    sweep = max(waves * sum(cycles for cycles, _ in steps) * us, through_l2 / constants.l2_bytes_per_us)
    assert taps > 1
    return Time(
        (plan.launches - (plan.gradient.launches if plan.gradient else 0)) * constants.graph_node_us,
        fold * us, prepare, sweep, moved,
    )  # fmt: skip


def solve_time(plan: CudaPlan, constants: Constants) -> Time:
    """The solve of a plan, or the transposed solve of a backward pass."""
    if plan.bands:
        return lanes_time(plan, constants)
    if plan.tensor is not None:
        return tensor_time(plan, plan.tensor, constants)
    problem, us = plan.problem, 1e-3 / constants.clock_ghz
    channels = problem.channels // problem.groups
    taps = min(problem.kernel_size[0], problem.height) * min(problem.kernel_size[1], problem.width)
    packs = math.ceil(channels / plan.pack)
    registers = SOLVE_REGISTERS[plan.weights_in_shared, plan.pack == 1 and plan.weights_in_shared]
    resident = resident_blocks(plan.threads, plan.shared_bytes, registers, constants)
    diagonals = plan.tiles[0] + plan.tiles[1] - 1
    # Tiles of all diagonals together, in as many launches; blocks of one of them on average.
    blocks = math.ceil(plan.blocks / min(plan.tiles) * plan.tiles[0] * plan.tiles[1] / diagonals)
    waves, busy = _waves(blocks, resident, plan.gpu)
    rows, columns = plan.tile

    fold = fold_cycles(plan, plan.threads, 1, constants) * waves * diagonals
    if plan.fold_launches:
        fold = fold_cycles(plan, 640, plan.fold_blocks // problem.groups, constants)
        fold += (
            waves
            * diagonals
            * (plan.folded_bytes / problem.groups / constants.l2_bandwidth * busy if plan.weights_in_shared else 0.0)
        )

    # Prepare and store: packs of channels of a pixel, each with all its inputs. A warp's instructions go to one
    # scheduler.
    padded = plan.pack > 1
    parts = plan.images * packs * rows * columns
    items = math.ceil(parts / plan.threads)
    first = math.ceil(items / packs)  # those whose inputs no one has loaded before
    passes = packs if problem.corner != "identity" else 1
    loads = plan.pack / constants.loads_in_flight if passes > 1 or packs == 1 else 1.0
    latency = loads * passes * (first * constants.global_latency + (items - first) * constants.l1_latency)
    multiply_adds = plan.images * rows * columns * packs * plan.pack * (channels if problem.corner != "identity" else 1)
    weight_bytes = multiply_adds * STATE_BYTES / plan.pack  # a load of a pack serves `pack` multiply-adds of one pixel
    instructions = BLOCK_PREPARE[padded][0] + passes * BLOCK_PREPARE[padded][1]
    if diagonals > 1:
        # Taps that reach out of the tile, on average over its pixels.
        outside = (rows + columns) / (rows * columns) * taps / 2
        latency += loads * passes * items * min(outside, taps) * constants.l2_latency / constants.loads_in_flight
        instructions += math.ceil(min(outside, taps) * passes * BLOCK_TAP_OUTSIDE[padded])
    bandwidth = constants.shared_bandwidth if plan.weights_in_shared else constants.l2_bandwidth
    image_bytes = problem.batch * problem.channels * problem.height * problem.width * problem.dtype.itemsize
    moved = image_bytes / constants.memory_bytes_per_us
    a_scheduler = math.ceil(math.ceil(parts / 32) / constants.schedulers)
    issued = a_scheduler * instructions
    units = max(weight_bytes * plan.pack / bandwidth, issued)
    prepare = max(diagonals * waves * max(latency + issued, busy * units) * us, moved)
    issued = a_scheduler * BLOCK_STORE[padded]
    store = max(diagonals * waves * max(items * constants.shared_latency + issued, busy * issued) * us, moved)

    # Sweep: per diagonal, one barrier and rounds of taps × packs multiply-adds that wait for each other, or the
    # instructions of a warp; those of all warps with a pixel on the diagonal share the schedulers.
    rounds = math.ceil(min(plan.tile) / plan.diagonal_threads) * math.ceil(channels / plan.channel_threads)
    chain = (taps - 1) * packs
    load = constants.shared_latency if plan.weights_in_shared else constants.l1_latency
    waited = math.ceil(chain / 4) * load + chain * constants.multiply_add_latency + load
    tap_rows = min(problem.kernel_size[0], problem.height)
    issued = BLOCK_VALUE[padded] + tap_rows * BLOCK_TAP_ROW + (taps - 1) * block_tap_instructions(packs, padded)
    steps = plan.steps * (constants.barrier + BLOCK_DIAGONAL + rounds * max(waited, issued))
    lengths = [min(d, rows - 1) - max(0, d - columns + 1) + 1 for d in range(rows + columns - 1)]
    active = [min(plan.threads / 32 * rounds, plan.images * math.ceil(n * channels / 32)) for n in lengths]
    instructions = plan.threads / 32 * plan.steps * BLOCK_DIAGONAL + sum(active) * issued
    pixels = rows * columns * plan.images
    # A pack of weights a thread, and a pack of x for all channels of a pixel.
    shared = pixels * chain * plan.pack * STATE_BYTES
    weights = pixels * channels * chain * plan.pack * STATE_BYTES
    units = shared / constants.shared_bandwidth + weights / bandwidth
    sweep = diagonals * waves * max(steps, busy * units, busy * instructions / constants.schedulers) * us

    launches = plan.launches - (plan.gradient.launches if plan.gradient else 0)
    return Time(launches * constants.graph_node_us, fold * us, prepare, sweep, store)


def gradient_time(plan: CudaPlan, gradient: GradientPlan, constants: Constants) -> float:
    """Microseconds of the launches of the gradient, without the launches themselves."""
    problem, us = plan.problem, 1e-3 / constants.clock_ghz
    outputs, inputs = gradient.channels
    taps = math.prod(gradient.window)
    rows, columns = gradient.tile
    pixels = gradient.images * rows * columns
    registers = GRADIENT_REGISTERS[gradient.tensor_cores]
    resident = resident_blocks(gradient.threads, gradient.shared_bytes, registers, constants)
    waves, busy = _waves(gradient.blocks, resident, plan.gpu)
    tiles = math.ceil(gradient.tiles / gradient.splits)

    # A tile is copied while the one before it is used: bytes from L2, and the copies' instructions.
    margin = gradient.images * (rows + gradient.window[0] - 1) * (columns + gradient.window[1] - 1)
    values = pixels * outputs + margin * inputs
    load = busy * pixels * (outputs + inputs) * STATE_BYTES / constants.l2_bandwidth
    copies = values / 32 * COPY_INSTRUCTIONS / constants.schedulers
    copied = values * STATE_BYTES / constants.shared_bandwidth
    if gradient.tensor_cores:
        # A lane loads four words for a step and two for each tap of it.
        multiply_adds = constants.products * pixels * outputs * inputs * taps
        warp_steps = pixels / 8 * (outputs / 16) * (inputs / 8)
        words = warp_steps * (4 + 2 * taps) * 32 * STATE_BYTES / constants.shared_bandwidth
        instructions = warp_steps * (STEP_INSTRUCTIONS + TAP_INSTRUCTIONS * taps) / constants.schedulers
        sums = busy * max(multiply_adds / constants.tensor_multiply_adds, words + copied, instructions + copies)
    else:
        # A thread: a pack of left and one of right for a strip of three taps.
        side = min(4, problem.channels // problem.groups)
        items = outputs / side * inputs / side * gradient.window[0] * math.ceil(gradient.window[1] / 3)
        segments = gradient.images * rows * math.ceil(columns / 8)
        a_thread = math.ceil(segments / gradient.teams) * min(columns, 8)
        latency = a_thread * (constants.shared_latency / 2 + side * side * 3)  # a warp's own multiply-adds, one a cycle
        multiply_adds = pixels * items * side * side * 3
        words = pixels * items * 2 * side * STATE_BYTES / constants.shared_bandwidth
        sums = max(latency, busy * (multiply_adds / constants.multiply_adds + copies), busy * (words + copied))
    # Nothing hides the first tile's copies, and nothing but the last tile's sums is left at the end.
    cycles = constants.global_latency + load + (tiles - 1) * max(load, sums) + sums + tiles * constants.barrier
    time = waves * cycles * us
    if gradient.splits == 1:
        return time
    # Lanes of a warp add up the blocks' sums, eight loads of each under way at a time.
    lanes = min(32, 2 ** math.ceil(math.log2(max(gradient.splits / 8, 1))))
    loads = math.ceil(gradient.splits / lanes / 8) * constants.l2_latency + math.log2(lanes) * constants.shuffle_latency
    entries = problem.channels * (problem.channels // problem.groups * math.prod(problem.kernel_size) + 1)
    rounds = math.ceil(entries * lanes / (plan.gpu.multiprocessors * constants.threads))
    return time + max(rounds * loads * us, gradient.scratch_bytes / constants.memory_bytes_per_us)


def predict(case: Case, *, backward: bool = False, constants: Constants | None = None) -> tuple[Time, CudaPlan]:
    """The time of the solve, or of its backward pass alone, and the plan behind it."""
    constants = constants or Constants()
    shape = (case.batch, case.channels, case.size, case.size)
    plan = explain(shape, case.kernel, corner="unit_triangular", device="cuda", gpu=H200, backward=backward)
    assert isinstance(plan, CudaPlan)
    time = solve_time(plan, constants)
    if plan.gradient is None:
        return time, plan
    extra = plan.gradient.launches * constants.graph_node_us
    return time + Time(extra, 0, 0, 0, 0, gradient_time(plan, plan.gradient, constants)), plan


def ideal_convolution(case: Case, passes: int, constants: Constants) -> float:
    """Microseconds that no convolution in float32 can beat: bytes and multiply-adds at full rate, and its launches.
    One pass is the forward; three are forward, gradient of the input and gradient of the weight."""
    image = case.batch * case.channels * case.size**2
    arithmetic = image * case.channels * case.kernel**2 / (constants.multiply_adds * H200.multiprocessors)
    moved = 2 * image * torch.float32.itemsize / constants.memory_bytes_per_us
    return passes * (constants.graph_node_us + max(arithmetic * 1e-3 / constants.clock_ghz, moved))


def published_pattern(case: Case, constants: Constants) -> float:
    """Microseconds of a host loop over diagonals and channels, each launch followed by a synchronisation; a thread
    gathers all taps of one value from global memory."""
    taps = case.kernel**2 * case.channels
    kernel = taps * constants.l2_latency / constants.loads_in_flight * 1e-3 / constants.clock_ghz
    return (2 * case.size - 1) * case.channels * (constants.synchronised_launch_us + kernel)


def table(cases: Iterable[Case] = CASES, constants: Constants | None = None) -> str:
    """The predicted table, in Markdown."""
    constants = constants or Constants()
    lines = [
        "| B × C × H², kernel | plan | launches | fold | prepare | sweep | store | solve, µs | backward, µs | "
        "÷ ideal conv2d: solve, both | published pattern ÷ solve |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    ratios, both_ratios = [], []
    for case in cases:
        forward, plan = predict(case, constants=constants)
        backward, _ = predict(case, backward=True, constants=constants)
        ratios.append(forward.total / ideal_convolution(case, 1, constants))
        both_ratios.append((forward.total + backward.total) / ideal_convolution(case, 3, constants))
        where = "registers" if plan.bands else "shared" if plan.weights_in_shared else "L2"
        if plan.tensor is not None:
            steps = math.ceil(plan.folded_bytes / (plan.tensor.output_tiles * OUTPUT_TILE * INPUT_TILE * STATE_BYTES))
            where = f"tensor, {plan.tensor.resident_steps / steps:.0%} shared"
        tiles = f"{plan.tiles[0]} × {plan.tiles[1]} tiles" if plan.tiles != (1, 1) else f"{plan.images} a block"
        parts = (forward.launches, forward.fold, forward.prepare, forward.sweep, forward.store)
        ratio = published_pattern(case, constants) / forward.total
        lines.append(
            f"| {case} | {tiles}, {where} | "
            + " | ".join(f"{part:.1f}" for part in parts)
            + f" | **{forward.total:.1f}** | {backward.total:.1f} | "
            + f"{ratios[-1]:.1f}, {both_ratios[-1]:.1f} | {ratio:.0f} |"
        )
    lines += [
        "",
        f"Geometric mean of solve ÷ ideal conv2d: {geometric_mean(ratios):.1f}; of forward and backward ÷ the same of "
        f"an ideal conv2d: {geometric_mean(both_ratios):.1f}.",
    ]
    return "\n".join(lines) + "\n"


def write(page: Path) -> None:
    """Puts the table between the marks of a page."""
    text = page.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    page.write_text(text[: begin + len(MARKS[0])] + "\n" + table() + "\n" + text[end:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    arguments = parser.parse_args()
    print("PREDICTED for an NVIDIA H200; not measured\n")
    print(table())
    if arguments.write:
        write(arguments.write)
        print(f"written: {arguments.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
