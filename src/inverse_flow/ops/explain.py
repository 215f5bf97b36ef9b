"""What a solve would do with a problem, without doing it: :func:`explain`.

Nothing is estimated here. The compiled module runs the very functions that the kernels are launched by,
``make_plan`` of csrc/cpu/plan.h and ``plan_solve`` of csrc/cuda/plan.h; the latter for any GPU, on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from inverse_flow import _C
from inverse_flow.ops.checks import FLOAT_DTYPES
from inverse_flow.ops.library import switches_allow_tf32
from inverse_flow.ops.spec import ORDERS, OrderNames, make_spec

__all__ = ["H200", "CpuPlan", "CudaPlan", "GpuProperties", "GradientPlan", "Problem", "TensorPlan", "explain"]

KIB = 1024


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class GpuProperties:
    """The limits of a GPU that its plans depend on.

    Attributes:
        name: What the GPU is called.
        multiprocessors: Its streaming multiprocessors.
        shared_bytes: The most shared memory that a block may ask for.
        threads_per_block: The most threads of a block.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    threads_per_block: int = 1024

    def __post_init__(self) -> None:
        for name in ("multiprocessors", "shared_bytes", "threads_per_block"):
            _check_integer(name, getattr(self, name), 1)
        if self.threads_per_block % 32:
            raise ValueError(f"threads_per_block must be a multiple of 32, got {self.threads_per_block}")

    @classmethod
    def of(cls, device: torch.device | str = "cuda") -> GpuProperties:
        """Those of a GPU of this machine."""
        # PyTorch's own description of this class lacks the entry. Blocks of every CUDA GPU have up to 1024 threads.
        found: Any = torch.cuda.get_device_properties(device)
        return cls(found.name, found.multi_processor_count, found.shared_memory_per_block_optin)


# NVIDIA H200 data sheet (132 multiprocessors); CUDA C++ Programming Guide, technical specifications for compute
# capability 9.0 (227 KiB of shared memory a block).
H200 = GpuProperties("NVIDIA H200", 132, 227 * KIB)


@dataclass(frozen=True)
class Problem:
    """A solve, or with ``backward`` its backward pass: the transposed solve, and the gradients of weight and bias."""

    batch: int
    channels: int
    height: int
    width: int
    kernel_size: tuple[int, int]
    groups: int
    order: tuple[str, ...]
    corner: str
    dtype: torch.dtype
    backward: bool

    def __str__(self) -> str:
        shape = f"({self.batch}, {self.channels}, {self.height}, {self.width})"
        kernel = f"kernel {self.kernel_size[0]} × {self.kernel_size[1]}"
        groups = f"{self.groups} group{'s' if self.groups > 1 else ''}"
        orders = " ".join(dict.fromkeys(self.order))
        dtype = str(self.dtype).removeprefix("torch.")
        what = "backward pass" if self.backward else "solve"
        return f"{what} of {shape}, {kernel}, {groups}, {orders}, {self.corner} corner, {dtype}"


@dataclass(frozen=True)
class CpuPlan:
    """How the CPU would do it.

    Attributes:
        problem: What is asked.
        regime: "images as lanes", "rows as lanes", or "nothing to do" for an empty batch.
        isa: The instruction set in use.
        threads: Threads that PyTorch has.
        workers: Threads that have work.
        lanes: Pixels that are solved at once: images of a batch, or rows of a band.
        units: Pieces of work: pieces of the batch times groups, or bands of all images and groups.
        steps: Steps that follow each other in a unit, each of ``lanes`` pixels.
        joined: Whether a thread that is through with a band's first row goes on with the next band's, so that its lanes
            are filled and drained once an image; with rows as lanes.
        scratch_bytes: Working memory of all threads, beside the tensors and a prepared copy of the weight.
    """

    problem: Problem
    regime: str
    isa: str
    threads: int
    workers: int = 0
    lanes: int = 0
    units: int = 0
    steps: int = 0
    joined: bool = False
    scratch_bytes: int = 0

    def __str__(self) -> str:
        head: dict[str, object] = {"device": f"CPU, {self.isa}", "regime": self.regime}
        if not self.workers:
            return _table(self.problem, head)
        return _table(
            self.problem,
            {
                **head,
                "lanes": self.lanes,
                "steps of a unit": self.steps,
                "units of work": f"{self.units} bands, joined" if self.joined else self.units,
                "threads": f"{self.workers} of {self.threads}",
                "scratch": _bytes(self.scratch_bytes),
            },
        )


@dataclass(frozen=True)
class GradientPlan:
    """The launches behind a transposed solve on a GPU: the sums of weight and bias, and one that adds up the blocks'
    where several share the pixels.

    Attributes:
        tensor_cores: Whether tensor cores multiply.
        channels: Output and input channels whose pairs a block accumulates.
        window: Rows and columns of taps that a block accumulates.
        images: Images, whole ones if several, whose pixels are in shared memory at a time.
        tile: Rows and columns of those pixels.
        tiles: Such tiles in the whole batch.
        teams: Parts of a block that share the pixels of a tile.
        splits: Blocks that share the pixels of a window; one alone needs no launch to add up, and no scratch.
        threads: Threads of a block.
        blocks: Blocks of the launch.
        shared_bytes: Shared memory of a block.
        launches: Launches in all.
        scratch_bytes: Memory for the blocks' sums.
    """

    tensor_cores: bool
    channels: tuple[int, int]
    window: tuple[int, int]
    images: int
    tile: tuple[int, int]
    tiles: int
    teams: int
    splits: int
    threads: int
    blocks: int
    shared_bytes: int
    launches: int
    scratch_bytes: int


@dataclass(frozen=True)
class TensorPlan:
    """How the tensor cores solve one anti-diagonal, a matrix product of 16 × 8 × 8 tiles.

    Attributes:
        output_tiles: Tiles of 16 output channels.
        k_steps: Steps of 8 input channels, a tap.
        resident_steps: Of all taps, the steps whose weights are in shared memory; the others are read through L2.
        splits: Warps that share the steps of one job: a tile of outputs and up to four tiles of pixels.
        job_warps: Jobs that a block does at a time.
        finish_warps: Further warps, which add up the sums, load and store meanwhile; 0 where all warps do that.
        whole_images: Whether whole images are in shared memory; else a ring of the last diagonals.
    """

    output_tiles: int
    k_steps: int
    resident_steps: int
    splits: int
    job_warps: int
    finish_warps: int
    whole_images: bool


@dataclass(frozen=True)
class CudaPlan:
    """How a GPU would do it.

    Attributes:
        problem: What is asked.
        gpu: The limits that the plan was made for.
        regime: "images in a block" (whole images), "tiles" (an image is cut up), "tensor cores" (whole images, or a
            ring of their diagonals), or "nothing to do" for an empty batch; behind a comma, where the folded weights
            are. For few channels a group "rows as lanes", whole images or tiles again: the weights are in registers.
        tile: Rows and columns that a block keeps in shared memory.
        tiles: Tiles of an image, downwards and to the right.
        images: Whole images of a block.
        pack: Channels that are read and written together.
        channel_threads: Threads of a pixel; 0 on tensor cores.
        diagonal_threads: Pixels of an anti-diagonal that are solved at once; 0 on tensor cores.
        bands: With rows as lanes, the bands of rows of a tile, each swept by a warp; else 0.
        threads: Threads of a block.
        blocks: Blocks of the largest launch of the solve.
        shared_bytes: Shared memory of a block of the solve.
        weights_in_shared: Whether the folded weights are in shared memory; else they are read through the L2 cache.
        folded_bytes: Size of the folded weights of all groups.
        fold_launches: Launches, for each chunk of groups, that fold the corner before the solve; 0 if every block does
            it for itself.
        fold_blocks: Blocks of those launches.
        steps: Steps that follow each other in a block: the anti-diagonals of a tile; with rows as lanes a few more,
            since a band starts some steps late.
        launches: Launches in all, those of the gradient included.
        scratch_bytes: Memory beside inputs, outputs and gradients.
        gradient: Of a backward pass, what comes behind the transposed solve.
        tensor: On tensor cores, how they share the work.
        tf32: Whether tensor cores multiply once, in TF32, as PyTorch's switches allow it now; else three times, which
            is as exact as float32.
    """

    problem: Problem
    gpu: GpuProperties
    regime: str
    tile: tuple[int, int] = (0, 0)
    tiles: tuple[int, int] = (0, 0)
    images: int = 0
    pack: int = 0
    channel_threads: int = 0
    diagonal_threads: int = 0
    bands: int = 0
    threads: int = 0
    blocks: int = 0
    shared_bytes: int = 0
    weights_in_shared: bool = False
    folded_bytes: int = 0
    fold_launches: int = 0
    fold_blocks: int = 0
    steps: int = 0
    launches: int = 0
    scratch_bytes: int = 0
    gradient: GradientPlan | None = field(default=None)
    tensor: TensorPlan | None = field(default=None)
    tf32: bool = False

    def __str__(self) -> str:
        rows: dict[str, object] = {
            "device": f"{self.gpu.name}: {self.gpu.multiprocessors} multiprocessors, "
            f"{_bytes(self.gpu.shared_bytes)} of shared memory a block",
            "regime": self.regime,
        }
        if not self.launches:
            return _table(self.problem, rows)
        rows |= {
            "tile": f"{self.tile[0]} × {self.tile[1]} pixels, {self.tiles[0]} × {self.tiles[1]} of them an image",
            "images of a block": self.images,
            **({"bands of a tile": self.bands} if self.bands else {}),
            "steps of a tile": self.steps,
            "threads of a block": self.threads,
            "blocks": self.blocks,
            "shared memory": _bytes(self.shared_bytes),
            "corner folded": "before the solve" if self.fold_launches else "by each block",
            "launches": self.launches,
            "scratch": _bytes(self.scratch_bytes),
        }
        rounding = "TF32" if self.tf32 else "3xTF32"
        if self.tensor is not None:
            rows["matrix products"] = (
                f"{rounding}, {self.tensor.output_tiles} tiles of outputs, {self.tensor.splits} warps a job, "
                f"{self.tensor.job_warps} jobs at a time"
            )
        if self.gradient is not None:
            part = self.gradient
            rows["gradient"] = (
                f"{f'tensor cores, {rounding}, ' if part.tensor_cores else ''}"
                f"{part.blocks} blocks of {part.threads} threads, "
                f"{part.channels[0]} × {part.channels[1]} channels, {part.window[0]} × {part.window[1]} taps, "
                f"{_bytes(part.shared_bytes)} of shared memory"
            )
        return _table(self.problem, rows)


def explain(
    shape: Sequence[int],
    kernel: int | Sequence[int],
    *,
    groups: int = 1,
    order: OrderNames = "top_left",
    corner: str = "general",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    gpu: GpuProperties | None = None,
    backward: bool = False,
) -> CpuPlan | CudaPlan:
    """Tells how :func:`inverse_flow.functional.inverse_conv2d` would solve a problem. Nothing is allocated or run.

    ```python
    print(inverse_flow.explain((100, 12, 32, 32), 3, corner="unit_triangular", device="cuda"))
    ```

    Args:
        shape: (B, C, H, W) of the images.
        kernel: Kernel size, an integer or a pair, or the shape (C, C / groups, kH, kW) of the weight.
        groups: As for the solve.
        order: As for the solve.
        corner: As for the solve: "general", "unit_triangular" or "identity".
        dtype: Of the images.
        device: "cpu" or "cuda". No GPU is needed for "cuda".
        threads: CPU threads; by default those of PyTorch.
        gpu: Limits of the GPU; by default those of this machine's GPU, or of an NVIDIA H200 where there is none.
        backward: Explain the backward pass: the transposed solve, and the gradients of weight and bias.

    Returns:
        A plan to print or to read.

    Raises:
        TypeError: A size is not an integer, or the dtype is not one the solve takes.
        ValueError: A size, ``order``, ``corner`` or ``device`` is not possible, or an argument belongs to the other
            device.
        RuntimeError: A pixel has more channels in a group than fit the GPU's shared memory.
    """
    orders, corner_code, *_ = make_spec(order, groups, corner)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    batch, channels, height, width = _check_shape(shape)
    if channels % groups:
        raise ValueError(f"the channels of shape ({channels}) must be divisible by groups ({groups})")
    kernel_size = _kernel_size(kernel, channels, groups)
    names = list(ORDERS)
    problem = Problem(
        batch, channels, height, width, kernel_size, groups, tuple(names[code] for code in orders), corner, dtype,
        backward,
    )  # fmt: skip
    sizes = (batch, groups, channels // groups, height, width, *kernel_size)
    dtype_name = str(dtype).removeprefix("torch.")

    place = torch.device(device)
    if place.type == "cpu":
        if gpu is not None:
            raise ValueError("gpu belongs to device='cuda', got device='cpu'")
        return _explain_cpu(problem, sizes, corner_code, dtype_name, threads)
    if place.type != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if threads is not None:
        raise ValueError("threads belongs to device='cpu', got device='cuda'")
    if gpu is None:
        gpu = GpuProperties.of(place) if torch.cuda.is_available() else H200
    return _explain_cuda(problem, sizes, orders, corner_code, dtype_name, gpu)


def _explain_cpu(problem: Problem, sizes: tuple[int, ...], corner: int, dtype: str, threads: int | None) -> CpuPlan:
    if threads is None:
        threads = torch.get_num_threads()
    _check_integer("threads", threads, 1)
    plan = _C.plan_cpu(sizes, corner, dtype, threads, problem.backward)
    if not plan["workers"]:
        return CpuPlan(problem, "nothing to do", plan["isa"], threads)
    return CpuPlan(
        problem,
        "rows as lanes" if plan["rows"] else "images as lanes",
        plan["isa"],
        threads,
        plan["workers"],
        plan["lanes"],
        plan["units"],
        plan["steps"],
        plan["joined"],
        plan["workers"] * plan["thread_bytes"] + plan["halo_bytes"] + plan["sum_bytes"],
    )


def _explain_cuda(
    problem: Problem,
    sizes: tuple[int, ...],
    orders: tuple[int, ...],
    corner: int,
    dtype: str,
    gpu: GpuProperties,
    forced_regime: int = -1,
) -> CudaPlan:
    """The plan of csrc/cuda. Tests ask for a SolveRegime of csrc/cuda/device_limits.h; -1 is the plan's choice."""
    limits = (gpu.threads_per_block, gpu.shared_bytes, gpu.multiprocessors, forced_regime)
    plan: dict[str, Any] = _C.plan_cuda(sizes, orders, corner, dtype, problem.backward, *limits)
    if not plan.pop("fits"):
        raise RuntimeError(
            f"{sizes[2]} channels a group are more than fit the shared memory of {gpu.name} ({gpu.shared_bytes} bytes)"
        )
    if not plan:
        return CudaPlan(problem, gpu, "nothing to do")
    regime = _regime(plan.pop("regime"), plan)
    found = plan.pop("gradient", None)
    gradient = None if found is None else GradientPlan(**found)
    if gradient is not None:
        plan["launches"] += gradient.launches
        plan["scratch_bytes"] += gradient.scratch_bytes
    part = plan.pop("tensor", None)
    tensor = None if part is None else TensorPlan(**part)
    return CudaPlan(problem, gpu, regime, **plan, gradient=gradient, tensor=tensor, tf32=switches_allow_tf32())


# SolveRegime of csrc/cuda/device_limits.h.
LANES, TENSOR = 1, 2


def _regime(code: int, plan: dict[str, Any]) -> str:
    """The SolveRegime in words, and where the folded weights are."""
    where = "shared memory" if plan["weights_in_shared"] else "global memory"
    if code == TENSOR:
        if plan["tensor"]["resident_steps"] and not plan["weights_in_shared"]:
            where = "shared and global memory"
        pixels = "whole images" if plan["tensor"]["whole_images"] else "a ring of diagonals"
        return f"tensor cores, {pixels}, weights in {where}"
    pixels = "images in a block" if plan["tiles"] == (1, 1) else "tiles"
    return f"rows as lanes, {pixels}" if code == LANES else f"{pixels}, weights in {where}"


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    if len(shape) != 4:
        raise ValueError(f"shape must be (B, C, H, W), got {tuple(shape)}")
    for name, size, least in zip(("B", "C", "H", "W"), shape, (0, 1, 1, 1), strict=True):
        _check_integer(f"{name} of shape", size, least)
    batch, channels, height, width = shape
    return batch, channels, height, width


def _kernel_size(kernel: int | Sequence[int], channels: int, groups: int) -> tuple[int, int]:
    sizes = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    if len(sizes) not in (2, 4):
        raise ValueError(f"kernel must be an integer, a pair or the shape of a weight, got {kernel!r}")
    for size in sizes:
        _check_integer("kernel", size, 1)
    if len(sizes) == 4 and sizes[:2] != (channels, channels // groups):
        raise ValueError(
            f"the weight of {channels} channels in {groups} group{'s' if groups > 1 else ''} has shape "
            f"({channels}, {channels // groups}, kH, kW), got {sizes}"
        )
    return sizes[-2], sizes[-1]


def _bytes(count: int) -> str:
    return (
        f"{count} bytes" if count < KIB else f"{count / KIB:.1f} KiB" if count < KIB**2 else f"{count / KIB**2:.1f} MiB"
    )


def _table(problem: Problem, rows: dict[str, object]) -> str:
    width = max(map(len, rows))
    return "\n".join([str(problem), *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
