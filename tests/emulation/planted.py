"""Mistakes of the kernels that the tests must see: each is planted behind a switch of the emulator.

A mistake is a line as it stands in csrc/cuda and as it is wrong where PLANTED is true.
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    file: str
    right: str
    wrong: str


PLANTED = {
    "missing barrier": Mistake(
        "block/kernel.cuh",
        "__syncthreads();  // the next diagonal reads what this one wrote",
        "if (!PLANTED) __syncthreads();",
    ),
    "index one past the end": Mistake(
        "block/kernel.cuh",
        "const int last_row = diagonal < tile.rows ? diagonal : tile.rows - 1;",
        "const int last_row = diagonal < tile.rows ? diagonal : tile.rows - (PLANTED ? 0 : 1);",
    ),
    "read of unwritten memory": Mistake(
        "block/kernel.cuh",
        "for (int u = 0; u < kPack; ++u) packed.value[u] = z[u];",
        """const int found = (image * plan.tile_h + row) * plan.row_stride + column;
    for (int u = 0; u < kPack; ++u) {
      const bool is_left = PLANTED && first_output + u >= channels;
      packed.value[u] = is_left ? x[(found * taps.channel_packs + pack) * kPack + u] : z[u];
    }""",
    ),
    "missing barrier of the gradient": Mistake(
        "gradient/tile.cuh",
        "__syncthreads();  // the tile is complete, and the one before was used",
        "if (!PLANTED) __syncthreads();",
    ),
    "missing barrier of the fold": Mistake(
        "common/fold.cuh",
        "team.sync();  // the pivot row and column are copied, and every warp has its pivot",
        "if (!PLANTED) team.sync();",
    ),
    "missing barrier between the levels of the fold": Mistake(
        "common/fold.cuh", "team.sync();  // L21 X11 is there", "if (!PLANTED) team.sync();"
    ),
    "missing barrier behind the last tile of the gradient": Mistake(
        "gradient/tile.cuh", "__syncthreads();  // the last tile was used", "if (!PLANTED) __syncthreads();"
    ),
    "small part left out of a split product": Mistake(
        "common/mma.cuh", "multiply_tf32(sum, a.big, b.small);", "if (!PLANTED) multiply_tf32(sum, a.big, b.small);"
    ),
    "missing barrier where teams meet": Mistake(
        "gradient/tile.cuh", "__syncthreads();  // the later half's sums are there", "if (!PLANTED) __syncthreads();"
    ),
    "barrier that some threads skip": Mistake(
        "block/kernel.cuh", "__syncthreads();  // z is complete", "if (!PLANTED || threadIdx.x != 3) __syncthreads();"
    ),
    "tensor cores: missing barrier": Mistake(
        "tensor/kernel.cuh",
        "__syncthreads();  // x of the diagonal before is there, and the sums may be overwritten",
        "if (!PLANTED) __syncthreads();",
    ),
    "tensor cores: missing barrier before the sums": Mistake(
        "tensor/kernel.cuh",
        "__syncthreads();  // the sums are complete, y has been read, and y of the next diagonal is there",
        "if (!PLANTED) __syncthreads();",
    ),
    "tensor cores: the small part of x is dropped": Mistake(
        "tensor/kernel.cuh",
        "multiply_tf32(sums.small[i], weights.big, x[i].small);",
        "if (!PLANTED) multiply_tf32(sums.small[i], weights.big, x[i].small);",
    ),
    "tensor cores: the small part of the weights is dropped": Mistake(
        "tensor/kernel.cuh",
        "multiply_tf32(sums.small[i], weights.small, x[i].big);",
        "if (!PLANTED) multiply_tf32(sums.small[i], weights.small, x[i].big);",
    ),
    "tensor cores: weights that nobody waited for": Mistake(
        "tensor/kernel.cuh", "wait_for_copies();", "if (!PLANTED) wait_for_copies();"
    ),
    "tensor cores: a ring of one diagonal too few": Mistake(
        "tensor/kernel.cuh",
        "const int ring = plan.slots * plan.slot_stride;",
        "const int ring = (plan.slots - (PLANTED ? 1 : 0)) * plan.slot_stride;",
    ),
    "tensor cores: an operand that is not rounded": Mistake(
        "common/mma.cuh",
        "big[i] = round_number_to_tf32(values[i]);",
        "big[i] = PLANTED ? float_bits(values[i]) : round_number_to_tf32(values[i]);",
    ),
    "tiles of the gradient that nobody waited for": Mistake(
        "gradient/tile.cuh", "wait_for_copies();", "if (!PLANTED) wait_for_copies();"
    ),
    "the tile that is used is overwritten": Mistake(
        "gradient/tile.cuh", "shared + (both - used));", "shared + (PLANTED ? used : both - used));"
    ),
    "no barrier behind the warp that inverts the corner": Mistake(
        "common/fold.cuh",
        "if (team.is_warp) __syncthreads();  // the inverse is complete",
        "if (team.is_warp && !PLANTED) __syncthreads();",
    ),
    "the corner is not waited for": Mistake(
        "common/fold.cuh", "team.sync();  // the corner is there", "if (!PLANTED) team.sync();"
    ),
    "lanes: no barrier between phases": Mistake(
        "lanes/kernel.cuh", "if (plan.bands > 1) __syncthreads();", "if (plan.bands > 1 && !PLANTED) __syncthreads();"
    ),
    "lanes: a band starts two phases early": Mistake(
        "lanes/kernel.cuh", "int phase = -band * plan.lag;", "int phase = -band * (plan.lag - (PLANTED ? 2 : 0));"
    ),
    "lanes: the rows above are read one off": Mistake(
        "lanes/kernel.cuh",
        "over_[a - 1] = line - a * row_floats;",
        "over_[a - 1] = line - (PLANTED && a > 1 ? a - 1 : a) * row_floats;",
    ),
    "lanes: no wait for the tile to the left": Mistake(
        "lanes/kernel.cuh", "if (claimed.left > 0) wait_for", "if (claimed.left > 0 && !PLANTED) wait_for"
    ),
    "lanes: no barrier before the flag is set": Mistake(
        "lanes/kernel.cuh",
        "__syncthreads();  // the whole tile is written before one thread says so",
        "if (!PLANTED) __syncthreads();",
    ),
    "lanes: a shuffle without half of the warp": Mistake(
        "lanes/kernel.cuh", "__shfl_up_sync(kFullWarp, ", "__shfl_up_sync(PLANTED ? 0xffffu : kFullWarp, "
    ),
    "lanes: flags that are not cleared": Mistake(
        "lanes/launch.cuh",
        "const char* error = clear_memory(",
        "const char* error = PLANTED ? nullptr : clear_memory(",
    ),
    "lanes: a flag that is never set": Mistake(
        "lanes/kernel.cuh", "if (threadIdx.x == 0) store_release(", "if (threadIdx.x == 0 && !PLANTED) store_release("
    ),
    "lanes: a shuffle across images": Mistake(
        "lanes/kernel.cuh",
        "above_[a - 1][c] = reads_above_ ? pixel[c] : above_[a - 1][c];",
        "above_[a - 1][c] = reads_above_ && !(PLANTED && threadIdx.x % kWarp / kLanes > 0) ? pixel[c]"
        " : above_[a - 1][c];",
    ),
    "lanes: a shuffle from the wrong lane": Mistake(
        "lanes/kernel.cuh", "solved_[c], kLanes);", "solved_[c], PLANTED ? 2 : kLanes);"
    ),
    "lanes: lanes of a pixel that do not wait": Mistake(
        "lanes/kernel.cuh", "__syncwarp();", "if (!PLANTED) __syncwarp();"
    ),
    "lanes: rows above the image": Mistake(
        "lanes/kernel.cuh",
        "(a == 1 ? is_inside : next_is_inside) && rows_above_ >= rows_needed(a)",
        "(a == 1 ? is_inside : next_is_inside) && (PLANTED || rows_above_ >= rows_needed(a))",
    ),
    "lanes: a mirrored row that is not reversed": Mistake(
        "lanes/kernel.cuh",
        "const bool exchanges = ((turn ^ mirror) & bit) != 0;",
        "const bool exchanges = ((PLANTED ? turn : turn ^ mirror) & bit) != 0;",
    ),
    "lanes: a row that is not aligned": Mistake(
        "lanes/launch.cuh",
        "if (reinterpret_cast<uintptr_t>(data) % kBytes != 0 ||",
        "if ((!PLANTED && reinterpret_cast<uintptr_t>(data) % kBytes != 0) ||",
    ),
    "lanes: a tile that is not aligned": Mistake(
        "lanes/launch.cuh", "is_multiple(plan.tile_w)", "(PLANTED || is_multiple(plan.tile_w))"
    ),
    "lanes: a second band that starts before the one above it is far enough": Mistake(
        "lanes/kernel.cuh",
        "phase -= plan.band_warps * plan.lag;",
        "phase -= PLANTED ? plan.band_phases : plan.band_warps * plan.lag;",
    ),
    "lanes: a second band that keeps the sums of the first": Mistake(
        "lanes/kernel.cuh",
        "for (int k = 0; k < kOutputs; ++k) sums_[b][k] = 0;",
        "for (int k = 0; k < kOutputs; ++k) sums_[b][k] = PLANTED && band >= plan.band_warps ? sums_[b][k] : 0;",
    ),
    "lanes: a lane below its band": Mistake(
        "lanes/kernel.cuh",
        "skew_ < plan.rows && has_outputs",
        "(PLANTED || skew_ < plan.rows) && has_outputs",
    ),
    "lanes: channels that are not aligned": Mistake(
        "lanes/launch.cuh",
        "is_multiple(strides.column) && is_multiple(shape.channels)",
        "(PLANTED || is_multiple(strides.column)) && is_multiple(shape.channels)",
    ),
    "lanes: the next channel of a pixel": Mistake(
        "lanes/kernel.cuh",
        ".value[c % kTogether + j]",
        ".value[(PLANTED && kTogether > 1 ? c + 1 : c) % kTogether + j]",
    ),
    "lanes: the other channels of a pixel": Mistake(
        "lanes/kernel.cuh",
        "rounded + first * args.output_strides.channel",
        "rounded + (PLANTED && kTogether > 1 ? 4 - first : first) * args.output_strides.channel",
    ),
    "tensor cores: weights of shared memory past those that are there": Mistake(
        "tensor/kernel.cuh",
        "const int end = is_resident && plan.resident_steps < last ?",
        "const int end = is_resident && !PLANTED && plan.resident_steps < last ?",
    ),
    "tensor cores: a k-step reads the pixel of the one before": Mistake(
        "tensor/kernel.cuh", "source = *++next;", "source = PLANTED ? *next++ : *++next;"
    ),
    "tensor cores: the tile of outputs of another job": Mistake(
        "tensor/kernel.cuh",
        "const int columns = plan.by_output_tiles.quotient(job);",
        "const int columns = PLANTED ? job : plan.by_output_tiles.quotient(job);",
    ),
    "the copy of the weights is not waited for": Mistake(
        "common/fold.cuh", "__syncthreads();  // the copy is complete", "if (!PLANTED) __syncthreads();"
    ),
    "the last taps of a channel pair are left out": Mistake(
        "common/fold.cuh", "const Index parts = others > kTaps ?", "const Index parts = others > kTaps && !PLANTED ?"
    ),
    "the permutation of a transposed corner": Mistake(
        "common/fold.cuh",
        "return {matrix + step_of_pivot[o], pivot_of_step, pitch};",
        "return {matrix + step_of_pivot[o], PLANTED ? step_of_pivot : pivot_of_step, pitch};",
    ),
    "lanes: a band that has not looked ahead": Mistake(
        "lanes/kernel.cuh",
        "const bool is_there = column_ >= 0 && has_row &&",
        "const bool is_there = column_ >= 0 && has_row && !PLANTED &&",
    ),
    "lanes: the rows further up are those of this column": Mistake(
        "lanes/kernel.cuh", "(a == 1 ? 0 : S::kPitch)", "(a == 1 || PLANTED ? 0 : S::kPitch)"
    ),
    "gradient on tensor cores: the loop of one tap fewer": Mistake(
        "gradient/tensor.cuh",
        "if (taps < kTaps) return with_taps",
        "if (taps < kTaps + (PLANTED ? 1 : 0)) return with_taps",
    ),
    "gradient on tensor cores: a tap where the one before it stands": Mistake(
        "gradient/tensor.cuh",
        "const int tap = plan.tap_bytes[v];",
        "const int tap = plan.tap_bytes[PLANTED && v > 0 ? v - 1 : v];",
    ),
    "gradient on tensor cores: a step that is taken to stay in its row": Mistake(
        "gradient/tensor.cuh",
        "= right + positions[pixel + 4];",
        "= right + (PLANTED ? positions[pixel] + 16 : positions[pixel + 4]);",
    ),
    "gradient on tensor cores: a step that is not filled up": Mistake(
        "gradient/tensor.cuh",
        "left[output * plan.left_pitch + pixels + item - row * filled] = 0;",
        "if (!PLANTED) left[output * plan.left_pitch + pixels + item - row * filled] = 0;",
    ),
}
