"""One problem for the emulated kernels: its case, its data, and a run of the driver."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .build import driver
from .planted import PLANTED

FLOAT, DOUBLE, BFLOAT16, HALF = range(4)
TYPES = {"float": FLOAT, "double": DOUBLE, "bfloat16": BFLOAT16, "half": HALF}
IDENTITY, UNIT_TRIANGULAR, GENERAL = range(3)
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = range(4)
ALL_ORDERS = (TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT)
# Places in SolvePlan of csrc/cuda/regimes.h.
ANY_REGIME, BLOCK, LANES, TENSOR = -1, 0, 1, 2


# ---- Element types ----


def round_to(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest values of the type, in float64 (ties to even)."""
    return decode(encode(values, kind), kind)


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "float":
        return values.astype(np.float32)
    if kind == "double":
        return values.astype(np.float64)
    if kind == "half":
        return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits[np.isnan(values)] = 0x7FC00000
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


STORED = {"float": np.float32, "double": np.float64, "half": np.float16, "bfloat16": np.uint16}
# Half the distance to the next number, relative.
UNIT_ROUNDOFF = {"float": 2.0**-24, "double": 2.0**-53, "half": 2.0**-11, "bfloat16": 2.0**-8}


# ---- Cases ----


@dataclass(frozen=True)
class Case:
    """One problem, and the device it pretends to run on."""

    batch: int
    orders: tuple[int, ...]
    channels: int  # a group
    height: int
    width: int
    kernel_h: int
    kernel_w: int
    corner: int = UNIT_TRIANGULAR
    transposed: bool = False
    image_type: str = "float"
    weight_type: str = "float"
    bias: bool = True
    input_layout: str = "contiguous"
    output_layout: str = "contiguous"
    threads_per_block: int = 1024
    shared_bytes: int = 99 * 1024
    multiprocessors: int = 1
    forced_regime: int = BLOCK
    allow_tf32: bool = False
    seeds: tuple[int, ...] = (1, 2)
    planted: str = ""  # the mistake of planted.py to make

    @property
    def all_channels(self) -> int:
        return self.channels * len(self.orders)

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.all_channels, self.height, self.width)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.all_channels, self.channels, self.kernel_h, self.kernel_w)

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]


def layout(case: Case, name: str) -> tuple[int, int, tuple[int, ...]]:
    """Elements of the storage, offset of the first one, and strides."""
    b, c, h, w = case.image_shape
    if name == "contiguous":
        return b * c * h * w, 0, (c * h * w, h * w, w, 1)
    if name.startswith("channels_last"):  # from its beginning or not, or a slice of more channels
        offset, pixel = int(name == "channels_last, shifted"), c + int(name == "channels_last, sliced")
        return offset + b * h * w * pixel, offset, (h * w * pixel, 1, w * pixel, pixel)
    if name == "sliced":  # every second column and row of a larger tensor, not from its beginning
        strides = (c * (2 * h + 1) * (2 * w + 1), (2 * h + 1) * (2 * w + 1), 2 * (2 * w + 1), 2)
        return b * strides[0], 2 * w + 2, strides
    if name in {"shifted", "long rows", "odd rows"}:  # contiguous but for its beginning, or the distance of its rows
        row = w + {"shifted": 0, "long rows": 4, "odd rows": 1}[name]
        offset = int(name == "shifted")
        return offset + b * c * h * row, offset, (c * h * row, h * row, row, 1)
    if name == "expanded":  # one pixel for all
        return b * c, 0, (c, 1, 0, 0)
    raise ValueError(name)


@dataclass
class Data:
    """Inputs as the kernels see them (already rounded to their types), in float64."""

    y: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    x: np.ndarray = field(default_factory=lambda: np.zeros(0))


def tap(case: Case, order: int, p: int, q: int) -> tuple[int, int]:
    """Where the weight of the pixel p rows and q columns away stands (0, 0: the corner)."""
    from_bottom, from_right = order in (BOTTOM_LEFT, BOTTOM_RIGHT), order in (TOP_RIGHT, BOTTOM_RIGHT)
    return p if from_bottom else case.kernel_h - 1 - p, q if from_right else case.kernel_w - 1 - q


def corner_mask(case: Case) -> np.ndarray:
    ones = np.ones((case.channels, case.channels), bool)
    return {IDENTITY: ~ones, UNIT_TRIANGULAR: np.tril(ones, -1), GENERAL: ones}[case.corner]


def make_data(case: Case, seed: int = 0) -> Data:
    """Random images, and weights that keep the inverse well conditioned."""
    random = np.random.default_rng(seed)
    y = random.standard_normal(case.image_shape)
    if case.input_layout == "expanded":
        y = np.broadcast_to(y[:, :, :1, :1], case.image_shape)
    scale = 0.5 / np.sqrt(case.channels * case.kernel_h * case.kernel_w)
    weight = scale * random.standard_normal(case.weight_shape)
    if case.corner == GENERAL:
        # A permuted near-identity: elimination in the given order would meet tiny pivots.
        for g, order in enumerate(case.orders):
            rows = slice(g * case.channels, (g + 1) * case.channels)
            i, j = tap(case, order, 0, 0)
            identity = np.eye(case.channels)[random.permutation(case.channels)]
            weight[rows, :, i, j] = identity * 1.5 + 0.2 * scale * random.standard_normal(identity.shape)
    elif case.corner == IDENTITY:
        for g, order in enumerate(case.orders):
            i, j = tap(case, order, 0, 0)
            weight[g * case.channels : (g + 1) * case.channels, :, i, j] = np.nan  # must never be read
    else:
        for g, order in enumerate(case.orders):
            i, j = tap(case, order, 0, 0)
            corner = weight[g * case.channels : (g + 1) * case.channels, :, i, j]
            corner[np.triu_indices(case.channels)] = np.nan  # nor this
    bias = random.standard_normal(case.all_channels) if case.bias else np.zeros(case.all_channels)
    weight_kind = case.weight_type
    with np.errstate(invalid="ignore"):
        return Data(round_to(y, case.image_type), round_to(weight, weight_kind), round_to(bias, weight_kind))


# ---- Runs ----


@dataclass
class Run:
    """What the driver printed, and its arrays in float64, one tuple a seed."""

    facts: dict[str, list[int]]
    raw: list[bytes]
    outputs: list[tuple[np.ndarray, ...]]


class DriverError(Exception):
    """The driver ended with an error: a sanitizer's, the emulator's or its own."""


def header(case: Case, operation: str) -> str:
    input_elements, input_offset, input_strides = layout(case, case.input_layout)
    output_elements, output_offset, output_strides = layout(case, case.output_layout)
    lines: dict[str, object] = {
        "operation": operation,
        "image_type": TYPES[case.image_type],
        "weight_type": TYPES[case.weight_type],
        "has_bias": int(case.bias and operation == "solve"),
        "orders": case.orders,
        "input_elements": input_elements,
        "input_offset": input_offset,
        "input_strides": input_strides,
        "output_elements": output_elements,
        "output_offset": output_offset,
        "output_strides": output_strides,
        "seeds": case.seeds,
        "transposed": int(case.transposed),
        "allow_tf32": int(case.allow_tf32),
        "planted": list(PLANTED).index(case.planted) + 1 if case.planted else 0,
    }
    for name in ["batch", "channels", "height", "width", "kernel_h", "kernel_w", "corner"]:
        lines[name] = getattr(case, name)
    for name in ["threads_per_block", "shared_bytes", "multiprocessors", "forced_regime"]:
        lines[name] = getattr(case, name)
    text = ""
    for key, value in lines.items():
        words = value if isinstance(value, tuple) else (value,)
        text += " ".join([key, *map(str, words)]) + "\n"
    return text + "end\n"


def place(case: Case, images: np.ndarray) -> np.ndarray:
    """The storage of a tensor of images in the input's layout; NaN where no element of it stands."""
    elements, offset, strides = layout(case, case.input_layout)
    stored = np.full(elements, np.nan)
    if case.image_type == "bfloat16":
        storage = np.full(elements, 0x7FC0, np.uint16)
    else:
        storage = stored.astype(STORED[case.image_type])
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], case.image_shape, tuple(s * storage.itemsize for s in strides)
    )
    view[...] = encode(np.asarray(images), case.image_type)
    return storage


def execute(text: str, arrays: list[np.ndarray]) -> tuple[bytes, dict[str, list[int]]]:
    # Threads as fibers live on the heap: their frames are no use-after-return, and the last ones no leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    with tempfile.TemporaryDirectory() as folder:
        case_file, result_file = Path(folder) / "case", Path(folder) / "result"
        case_file.write_bytes(text.encode() + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
        command = [str(driver()), str(case_file), str(result_file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise DriverError(f"exit status {done.returncode}\n{done.stderr}")
        facts: dict[str, list[int]] = {}
        for line in done.stdout.splitlines():
            key, *values = line.split()
            facts[key] = [int(v) for v in values]
        return result_file.read_bytes(), facts


def plans(case: Case) -> dict[str, list[int]]:
    """What the driver says of the plans for a case."""
    return execute(header(case, "plan"), [])[1]


def run(case: Case, data: Data, operation: str = "solve") -> Run:
    with np.errstate(invalid="ignore"):
        arrays = [place(case, data.y), encode(data.weight, case.weight_type)]
        if case.bias and operation == "solve":
            arrays.append(encode(data.bias, case.weight_type))
        if operation == "backward":
            arrays.append(place(case, data.x))
    raw, facts = execute(header(case, operation), arrays)
    elements, offset, strides = layout(case, case.output_layout)
    image, weight = np.dtype(STORED[case.image_type]), np.dtype(STORED[case.weight_type])
    sizes = [elements * image.itemsize]
    if operation == "backward":
        sizes += [int(np.prod(case.weight_shape)) * weight.itemsize, case.all_channels * weight.itemsize]
    assert len(raw) == sum(sizes) * len(case.seeds)
    pieces, outputs = [], []
    for s in range(len(case.seeds)):
        piece = raw[s * sum(sizes) : (s + 1) * sum(sizes)]
        pieces.append(piece)
        storage = np.frombuffer(piece[: sizes[0]], image)
        view = np.lib.stride_tricks.as_strided(
            storage[offset:], case.image_shape, tuple(step * image.itemsize for step in strides)
        )
        arrays = [decode(view, case.image_type)]
        if operation == "backward":
            d_weight = np.frombuffer(piece[sizes[0] : sizes[0] + sizes[1]], weight).reshape(case.weight_shape)
            d_bias = np.frombuffer(piece[sizes[0] + sizes[1] :], weight)
            arrays += [decode(d_weight, case.weight_type), decode(d_bias, case.weight_type)]
        outputs.append(tuple(arrays))
    return Run(facts, pieces, outputs)
