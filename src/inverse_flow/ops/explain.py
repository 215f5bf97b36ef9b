"""What a solve would do with a problem, without doing it: :func:`explain`.

Nothing is estimated here. The compiled module runs the very functions that the kernels are launched by,
``make_plan`` of csrc/cpu/plan.h and ``plan_solve`` of csrc/cuda/regimes.h; the latter for any GPU, on any machine. The
plans name their facts there, and nobody names them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from inverse_flow import _C
from inverse_flow.ops.checks import FLOAT_DTYPES, shape_of_images
from inverse_flow.ops.library import switches_allow_tf32
from inverse_flow.ops.spec import AXES, ORDERS, OrderNames, PerAxis, check_integer, each_axis, make_spec

__all__ = ["H200", "Facts", "GpuProperties", "Plan", "Problem", "explain"]

KIB = 1024


@dataclass(frozen=True)
class GpuProperties:
    """The limits of a GPU that its plans depend on.

    Attributes:
        name: what the GPU is called.
        multiprocessors: its streaming multiprocessors.
        shared_bytes: the most shared memory that a block may ask for.
        threads_per_block: the most threads of a block.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    threads_per_block: int = 1024

    def __post_init__(self) -> None:
        for name in ("multiprocessors", "shared_bytes", "threads_per_block"):
            check_integer(name, getattr(self, name), 1)
        if self.threads_per_block % 32:
            raise ValueError(f"threads_per_block must be a multiple of 32, got {self.threads_per_block}")

    def __str__(self) -> str:
        shared = f"{_bytes(self.shared_bytes)} of shared memory per block"
        return f"{self.name}: {self.multiprocessors} multiprocessors, {shared}"

    @classmethod
    def of(cls, device: torch.device | str = "cuda") -> GpuProperties:
        """Those of a GPU of this machine."""
        # PyTorch's own description of this class lacks the entry. Blocks of every CUDA GPU have up to 1024 threads.
        found: Any = torch.cuda.get_device_properties(device)
        return cls(found.name, found.multi_processor_count, found.shared_memory_per_block_optin)


# NVIDIA H200 data sheet (132 multiprocessors); CUDA C++ Programming Guide, technical specifications for compute
# capability 9.0 (227 KiB of shared memory per block).
H200 = GpuProperties("NVIDIA H200", 132, 227 * KIB)


@dataclass(frozen=True)
class Problem:
    """A solve, or with ``backward`` its backward pass: the transposed solve, and the gradients of weight and bias."""

    batch: int
    channels: int
    sizes: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    order: tuple[str, ...]
    dilation: tuple[int, ...]
    corner: str
    dtype: torch.dtype
    backward: bool

    def __str__(self) -> str:
        shape = ", ".join(map(str, (self.batch, self.channels, *self.sizes)))
        kernel = f"kernel {' × '.join(map(str, self.kernel_size))}"
        if max(self.dilation) > 1:
            kernel += f" dilated by {' × '.join(map(str, self.dilation))}"
        groups = f"{self.groups} group{'s' if self.groups > 1 else ''}"
        orders = " ".join(dict.fromkeys(self.order))
        dtype = str(self.dtype).removeprefix("torch.")
        what = "backward pass" if self.backward else "solve"
        return f"{what} of ({shape}), {kernel}, {groups}, {orders}, {self.corner} corner, {dtype}"

    def operator_sizes(self) -> tuple[int, ...]:
        """What the operator is given: (batch, groups, channels per group, depth, height, width, kernel_d, kernel_h,
        kernel_w). Signals are images of one row, and residue classes images of a batch; see
        :mod:`inverse_flow.ops.views`."""
        images = self.batch * math.prod(self.dilation)
        sizes = [-(-size // step) for size, step in zip(self.sizes, self.dilation, strict=True)]
        ones = [1] * (3 - len(sizes))
        return (images, self.groups, self.channels // self.groups, *ones, *sizes, *ones, *self.kernel_size)


@dataclass(frozen=True)
class Facts:
    """What a plan says, by name: ``plan.threads`` reads ``plan.facts["threads"]``."""

    facts: Mapping[str, Any] = field(hash=False)

    def __getattr__(self, name: str) -> Any:
        facts = vars(self).get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"this plan has no {name!r}, it has {', '.join(facts)}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.facts]

    def rows(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Name and value of every fact, as text."""
        for name, value in self.facts.items():
            if isinstance(value, Facts):
                yield from value.rows(f"{prefix}{name}.")
            elif value is not None:
                yield prefix + name, _text(name, value)


@dataclass(frozen=True)
class Plan(Facts):
    """How a CPU or a GPU would do it: facts to print, or to read by name. What a device does not know is absent.

    Attributes:
        problem: what is asked.
        gpu: the limits that the plan was made for; None on a CPU.
        regime: how the work is cut up. On a CPU "images as lanes", "rows as lanes" or, for signals, which are images of
            one row, "outputs as lanes". On a GPU "images in a block"
            (whole images), "tiles" (an image is cut up), "tensor cores" (whole images, or a ring of their diagonals),
            each with where the folded weights are; or "rows as lanes", whole images or tiles, with the weights in
            registers. "nothing to do" for an empty batch, of which there is little else to say.
        threads: on a CPU those that PyTorch has, on a GPU those of a block.
        steps: steps that follow each other in a unit of work (CPU) or in a block: pixels, columns, or anti-diagonals;
            with rows as lanes some more, since a row starts behind the one above it.
        scratch_bytes: memory beside inputs, outputs and gradients; on a CPU also beside a prepared copy of the weight.

        isa: CPU, as the next five: the instruction set in use.
        workers: threads that have work.
        lanes: pixels that are solved at once, most: images of a batch, or rows of a band; or the outputs of a block of
            steps, of all channels.
        units: pieces of work: eights of the batch times groups, or bands of all images and groups; with outputs as
            lanes the signals that are swept together.
        joined: whether a thread that is through with a band's first row goes on with the next band's.
        block: steps that are solved at once with outputs as lanes; fewer where the recurrence grows too fast for it.
        rest: the same facts of the last images of a batch, and their ``batch``, where fewer than fill a vector are
            swept apart; else None.

        tile: GPU, as all that follow: rows and columns that a block keeps in shared memory.
        tiles: tiles of an image, downwards and to the right.
        images: whole images of a block; with rows as lanes ``images_per_warp`` of them side by side.
        pack: channels that are read and written together.
        channel_threads: threads of a pixel; 0 on tensor cores.
        diagonal_threads: pixels of an anti-diagonal that are solved at once; 0 on tensor cores.
        bands: with rows as lanes the bands of rows of a tile, each swept by a warp, in ``phases``; else 0.
        blocks: blocks of the largest launch of the solve.
        shared_bytes: shared memory of a block of the solve.
        weights_in_shared: whether the folded weights are in shared memory; else they are read through the L2 cache.
        folded_bytes: size of the folded weights of all groups.
        fold_launches: launches, for each chunk of groups, that fold the corner before the solve, of ``fold_blocks``; 0
            if every block does it for itself.
        launches: launches in all, those of the gradient included.
        planes: of a volume, whose planes are solved one after the other; in ``convolutions``, PyTorch's own, each takes
            up those before it, and a backward pass has its sums. ``launches`` are those of all planes without the
            convolutions', and everything else is said of one plane.
        tf32: whether tensor cores multiply once, in TF32, as PyTorch's switches allow it now; else three times, which
            is as exact as float32. ``products`` says the same of what they multiply.
        tensor: on tensor cores, how they solve one anti-diagonal, else None: ``output_tiles`` of 16 channels;
            ``k_steps`` of 8 input channels per tap; ``resident_steps``, of all taps, whose weights are in shared
            memory; ``splits``, the warps that share a job (a tile of outputs, up to four of pixels); ``job_warps``, the
            jobs at a time; ``finish_warps``, which add up, load and store meanwhile; ``whole_images``, or a ring.
        gradient: of a backward pass, the sums of weight and bias behind the transposed solve, else None: on
            ``tensor_cores`` or not; of a block the ``channels``, outputs and inputs, whose pairs it accumulates, the
            ``window`` of taps, and the ``images`` and the ``tile`` of pixels in shared memory at a time, which
            ``teams`` share; ``tiles`` of the whole batch; ``splits``, the blocks that share the pixels of a window,
            whose sums ``combine_lanes`` threads add up. And ``threads`` to ``scratch_bytes`` as above, of its own.
    """

    problem: Problem
    gpu: GpuProperties | None = None

    def __str__(self) -> str:
        rows = [("device", "CPU" if self.gpu is None else str(self.gpu)), *self.rows()]
        width = max(len(name) for name, _ in rows)
        return "\n".join([str(self.problem), *(f"  {name:<{width}}  {value}" for name, value in rows)])


def explain(
    shape: Sequence[int],
    kernel: int | Sequence[int],
    *,
    groups: int = 1,
    order: OrderNames | None = None,
    dilation: PerAxis = 1,
    corner: str = "general",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    gpu: GpuProperties | None = None,
    backward: bool = False,
) -> Plan:
    """Tells how :func:`inverse_flow.functional.inverse_conv2d` would solve a problem. Nothing is allocated or run.

    ```python
    print(inverse_flow.explain((100, 12, 32, 32), 3, corner="unit_triangular", device="cuda"))
    ```

    Args:
        shape: (B, C, H, W) of the images, (B, C, L) of signals, or (B, C, D, H, W) of volumes.
        kernel: kernel size, an integer or one for each axis, or the shape (C, C / groups, kH, kW) of the weight.
        groups: as for the solve.
        order: as for the solve.
        dilation: as for the solve. The plan is that of the residue classes, which are images of their own.
        corner: as for the solve: "general", "unit_triangular" or "identity".
        dtype: of the images.
        device: "cpu" or "cuda". No GPU is needed for "cuda".
        threads: CPU threads; by default those of PyTorch.
        gpu: limits of the GPU; by default those of this machine's GPU, or of an NVIDIA H200 where there is none.
        backward: explain the backward pass: the transposed solve, and the gradients of weight and bias.

    Returns:
        A plan to print or to read.

    Raises:
        TypeError: ``shape`` or ``kernel`` is a tensor, a size is not an integer, or the solve does not take the dtype.
        ValueError: a size, ``order``, ``corner`` or ``device`` is not possible, or an argument belongs to the other
            device.
        RuntimeError: a pixel has more channels in a group than fit the GPU's shared memory.
    """
    batch, channels, *sizes = _check_shape(shape)
    dimensions = len(sizes)
    names = ORDERS[dimensions]
    orders, corner_code, *_ = make_spec(names[0] if order is None else order, groups, corner, dimensions)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if channels % groups:
        raise ValueError(f"the channels of shape ({channels}) must be divisible by groups ({groups})")
    problem = Problem(
        batch, channels, tuple(sizes), _kernel_size(kernel, channels, groups, dimensions), groups,
        tuple(names[code] for code in orders), each_axis("dilation", dilation, dimensions), corner, dtype, backward,
    )  # fmt: skip
    dtype_name = str(dtype).removeprefix("torch.")

    place = torch.device(device)
    if place.type == "cpu":
        if gpu is not None:
            raise ValueError("gpu belongs to device='cuda', got device='cpu'")
        return _explain_cpu(problem, corner_code, dtype_name, threads)
    if place.type != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if threads is not None:
        raise ValueError("threads belongs to device='cpu', got device='cuda'")
    if gpu is None:
        gpu = GpuProperties.of(place) if torch.cuda.is_available() else H200
    return _explain_cuda(problem, orders, corner_code, dtype_name, gpu)


def _explain_cpu(problem: Problem, corner: int, dtype: str, threads: int | None) -> Plan:
    if threads is None:
        threads = torch.get_num_threads()
    check_integer("threads", threads, 1)
    facts = _C.plan_cpu(problem.operator_sizes(), corner, dtype, threads, problem.backward)
    rest = facts.pop("rest", None)
    return Plan({**facts, "rest": None if rest is None else Facts(rest)}, problem)


def _explain_cuda(
    problem: Problem,
    orders: tuple[int, ...],
    corner: int,
    dtype: str,
    gpu: GpuProperties,
    regime: int | None = None,
) -> Plan:
    """The plan of csrc/cuda. Tests ask for a regime by its place in SolvePlan of csrc/cuda/regimes.h."""
    if len(problem.sizes) == 3:
        return _explain_planes(problem, orders, corner, dtype, gpu)
    limits = (gpu.threads_per_block, gpu.shared_bytes, gpu.multiprocessors)
    facts = _C.plan_cuda(problem.operator_sizes(), orders, corner, dtype, problem.backward, *limits, regime)
    if facts is None:
        raise RuntimeError(
            f"{problem.channels // problem.groups} channels per group are more than fit the shared memory of "
            f"{gpu.name} ({gpu.shared_bytes} bytes)"
        )
    tf32 = switches_allow_tf32()
    for part in ("tensor", "gradient"):
        found = facts.pop(part, None)
        if found is not None and found.get("tensor_cores", True):
            found["products"] = "TF32" if tf32 else "3xTF32"
        facts[part] = None if found is None else Facts(found)
    return Plan({**facts, "tf32": tf32}, problem, gpu)


def _explain_planes(problem: Problem, orders: tuple[int, ...], corner: int, dtype: str, gpu: GpuProperties) -> Plan:
    """The plan of a plane, and how many of them there are: see :mod:`inverse_flow.ops.planes`."""
    batch, _, channels, depth, *in_plane = problem.operator_sizes()
    height, width, kernel_d, *kernel = in_plane
    # Groups that go through the planes in one direction are solved together, in the state type.
    runs = [tuple(order & 3 for order in run) for _, run in groupby(orders, lambda order: order & 4)]
    state = "float64" if dtype == "float64" else "float32"
    plans = []
    for run in runs:
        plane = replace(
            problem, batch=batch, channels=channels * len(run), sizes=(height, width), kernel_size=tuple(kernel),
            groups=len(run), dilation=(1, 1), backward=False,
        )  # fmt: skip
        plans.append(_explain_cuda(plane, run, corner, state, gpu))
    convolutions = len(runs) * (depth - 1) * (kernel_d > 1) + problem.backward
    launches = depth * sum(plan.launches for plan in plans)
    facts = {**plans[0].facts, "planes": depth, "launches": launches, "convolutions": convolutions}
    return Plan(facts, problem, gpu)


def _check_no_tensor(name: str, value: object) -> None:
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be sizes, got a tensor: pass its shape, {tuple(value.shape)}")


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    _check_no_tensor("shape", shape)
    if len(shape) - 2 not in AXES:
        known = " or ".join(shape_of_images(dimensions) for dimensions in (2, 1, 3))
        raise ValueError(f"shape must be {known}, got {tuple(shape)}")
    axes = AXES[len(shape) - 2]
    for name, size, least in zip(("B", "C", *axes), shape, (0, 1, *(1 for _ in axes)), strict=True):
        check_integer(f"{name} of shape", size, least)
    return tuple(shape)


def _kernel_size(kernel: int | Sequence[int], channels: int, groups: int, dimensions: int) -> tuple[int, ...]:
    _check_no_tensor("kernel", kernel)
    sizes = (kernel,) * dimensions if isinstance(kernel, int) else tuple(kernel)
    if len(sizes) not in (dimensions, dimensions + 2):
        raise ValueError(f"kernel must be an integer, one for each axis or the shape of a weight, got {kernel!r}")
    for size in sizes:
        check_integer("kernel", size, 1)
    if len(sizes) > dimensions and sizes[:2] != (channels, channels // groups):
        raise ValueError(
            f"the weight of {channels} channels in {groups} group{'s' if groups > 1 else ''} has shape "
            f"({channels}, {channels // groups}, {', '.join(f'k{axis}' for axis in AXES[dimensions])}), got {sizes}"
        )
    return sizes[-dimensions:]


def _bytes(count: int) -> str:
    for unit, size in (("MiB", KIB**2), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " × ".join(map(str, value))
    return _bytes(value) if isinstance(value, int) and name.endswith("bytes") else str(value)
