"""Builds and runs the emulation driver, and the dense oracle that its results are held against.

The oracle knows nothing of the kernels: it writes the convolution of each image down as a matrix, from the definition,
and solves with it in float64.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wextra",
    "-Werror",
]
# The files of csrc/cuda that hold kernels; those that take long to compile come first.
UNITS = ("lanes/float", "lanes/half", "lanes/bfloat16", "tensor/launch", "block/launch", "gradient/launch")

FLOAT, DOUBLE, BFLOAT16, HALF = range(4)
TYPES = {"float": FLOAT, "double": DOUBLE, "bfloat16": BFLOAT16, "half": HALF}
IDENTITY, UNIT_TRIANGULAR, GENERAL = range(3)
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = range(4)
# Places in SolvePlan of csrc/cuda/regimes.h.
ANY_REGIME, BLOCK, LANES, TENSOR = -1, 0, 1, 2


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone has the file; without waiting, another may."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def compile_to(target: Path, command: list[str]) -> None:
    """Runs the compiler; the target is there when it is whole."""
    unfinished = target.with_suffix(".part")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unfinished.rename(target)


def compile_objects(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    """One object a source. Test processes that need the same ones share the work: each takes what no other is at."""
    cxx = compiler()
    assert cxx is not None
    commands = {}
    for source in sources:
        command = [cxx, *flags, "-c", "-x", "c++", str(source)]
        key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
        commands[folder / f"{source.stem}-{key}.o"] = command
    missing = list(commands)
    while missing:
        for target in tuple(missing):
            with locked(target.with_suffix(".lock"), wait=False) as is_mine:
                if is_mine and not target.exists():
                    compile_to(target, commands[target])
            if target.exists():
                missing.remove(target)
        if missing:
            time.sleep(0.1)
    return list(commands)


def build(folder: Path, kernels: Path = KERNELS, units: tuple[str, ...] = UNITS) -> Path:
    """The driver with these files of the kernels, built once for all test processes that share `folder`."""
    cxx = compiler()
    assert cxx is not None
    flags = [*FLAGS, f"-I{HERE}", f"-I{kernels / 'cuda'}"]
    absent = [f"-DEMULATE_WITHOUT_{unit.replace('/', '_').upper()}" for unit in UNITS if unit not in units]
    objects = compile_objects(folder, [kernels / "cuda" / f"{unit}.cu" for unit in units], flags)
    objects += compile_objects(folder, [HERE / "driver.cpp"], [*flags, *absent])
    command = [cxx, *FLAGS, *map(str, objects)]
    program = folder / f"driver-{hashlib.sha256(' '.join(command).encode()).hexdigest()[:16]}"
    with locked(program.with_suffix(".lock")):
        if not program.exists():
            compile_to(program, command)
    return program


def build_spoilt(folder: Path, planted: dict[str, tuple[str, str, str]], units: tuple[str, ...]) -> Path:
    """The driver over a copy of the kernels that holds mistakes, each behind a switch of the case file: by name, the
    file, the line as it is, and the line as it is wrong."""
    copy = folder / "csrc"
    sources = {path: path.read_text() for path in [*KERNELS.glob("*.h"), *(KERNELS / "cuda").rglob("*.*")]}
    for name, (file, right, wrong) in planted.items():
        path = KERNELS / "cuda" / file
        assert sources[path].count(right) == 1, f"{file} no longer holds the line to spoil for {name}: {right}"
        sources[path] = sources[path].replace(right, wrong)
    with locked(folder.with_suffix(".lock")):
        for path, text in sources.items():
            target = copy / path.relative_to(KERNELS)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.write_text(text)
    return build(folder, copy, units)


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
    planted: int = 0  # the mistake to make, in a driver built with mistakes

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


# ---- The oracle ----


def tap(case: Case, order: int, p: int, q: int) -> tuple[int, int]:
    """Where the weight of the pixel p rows and q columns away stands (0, 0: the corner)."""
    from_bottom, from_right = order in (BOTTOM_LEFT, BOTTOM_RIGHT), order in (TOP_RIGHT, BOTTOM_RIGHT)
    return p if from_bottom else case.kernel_h - 1 - p, q if from_right else case.kernel_w - 1 - q


def corner_mask(case: Case) -> np.ndarray:
    ones = np.ones((case.channels, case.channels), bool)
    return {IDENTITY: ~ones, UNIT_TRIANGULAR: np.tril(ones, -1), GENERAL: ones}[case.corner]


def positions(case: Case, order: int):  # type: ignore[no-untyped-def]
    """Every (tap row, tap column, output pixel, input pixel, is the corner) of the convolution of one image."""
    down = -1 if order in (BOTTOM_LEFT, BOTTOM_RIGHT) else 1
    right = -1 if order in (TOP_RIGHT, BOTTOM_RIGHT) else 1
    for p in range(case.kernel_h):
        for q in range(case.kernel_w):
            i, j = tap(case, order, p, q)
            for row in range(case.height):
                for column in range(case.width):
                    from_row, from_column = row - down * p, column - right * q
                    if 0 <= from_row < case.height and 0 <= from_column < case.width:
                        yield (
                            i,
                            j,
                            row * case.width + column,
                            from_row * case.width + from_column,
                            p == 0 and q == 0,
                        )


def matrix(case: Case, weight: np.ndarray, order: int) -> np.ndarray:
    """The convolution of one group as a matrix over (pixel, channel)."""
    pixels, channels = case.height * case.width, case.channels
    dense = np.zeros((pixels, channels, pixels, channels))
    mask = corner_mask(case)
    for i, j, at, source, is_corner in positions(case, order):
        block = weight[:, :, i, j]
        if is_corner:
            block = np.where(mask, block, 0.0)
            if case.corner != GENERAL:
                block = block + np.eye(channels)
        dense[at, :, source, :] += block
    return dense.reshape(pixels * channels, pixels * channels)


def to_columns(case: Case, images: np.ndarray, group: int) -> np.ndarray:
    channels = images[:, group * case.channels : (group + 1) * case.channels]
    return channels.reshape(case.batch, case.channels, -1).transpose(2, 1, 0).reshape(-1, case.batch)


def from_columns(case: Case, columns: np.ndarray) -> np.ndarray:
    shaped = columns.reshape(case.height * case.width, case.channels, case.batch).transpose(2, 1, 0)
    return shaped.reshape(case.batch, case.channels, case.height, case.width)


def oracle_solve(case: Case, y: np.ndarray, weight: np.ndarray, transposed: bool) -> np.ndarray:
    result = []
    for g, order in enumerate(case.orders):
        a = matrix(case, weight[g * case.channels : (g + 1) * case.channels], order)
        result.append(from_columns(case, np.linalg.solve(a.T if transposed else a, to_columns(case, y, g))))
    return np.concatenate(result, axis=1)


def oracle_gradients(
    case: Case, gradient: np.ndarray, x: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of <gradient, x> by y, weight and bias, from dA^-1 = -A^-1 dA A^-1."""
    u = oracle_solve(case, gradient, weight, not case.transposed)
    d_weight = np.zeros_like(weight)
    mask = corner_mask(case)
    n = case.channels
    for g, order in enumerate(case.orders):
        left, right = to_columns(case, u, g), to_columns(case, x, g)
        if case.transposed:
            left, right = right, left
        d_matrix = -(left @ right.T).reshape(case.height * case.width, n, case.height * case.width, n)
        for i, j, at, source, is_corner in positions(case, order):
            block = d_matrix[at, :, source, :]
            d_weight[g * n : (g + 1) * n, :, i, j] += np.where(mask, block, 0.0) if is_corner else block
    return u, d_weight, -u.sum(axis=(0, 2, 3))


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
        "planted": case.planted,
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


def execute(program: Path, folder: Path, text: str, arrays: list[np.ndarray]) -> tuple[bytes, dict[str, list[int]]]:
    case_file, result_file = folder / "case", folder / "result"
    with case_file.open("wb") as file:
        file.write(text.encode())
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())
    # Threads as fibers live on the heap: their frames are no use-after-return, and the last ones no leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run(
        [str(program), str(case_file), str(result_file)], capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise DriverError(f"exit status {done.returncode}\n{done.stderr}")
    facts: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        key, *values = line.split()
        facts[key] = [int(v) for v in values]
    return result_file.read_bytes(), facts


def run(program: Path, folder: Path, case: Case, data: Data, operation: str = "solve") -> Run:
    arrays: list[np.ndarray] = []
    if operation != "plan":
        with np.errstate(invalid="ignore"):
            arrays = [place(case, data.y), encode(data.weight, case.weight_type)]
            if case.bias and operation == "solve":
                arrays.append(encode(data.bias, case.weight_type))
            if operation == "backward":
                arrays.append(place(case, data.x))
    raw, facts = execute(program, folder, header(case, operation), arrays)
    if operation == "plan":
        return Run(facts, [], [])
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
