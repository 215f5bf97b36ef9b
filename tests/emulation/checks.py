"""What every run must satisfy: the values of a dense float64 solve, whatever the order of threads and blocks.

The oracle knows nothing of the kernels: it writes the convolution of each image down as a matrix, from the definition,
and solves with it in float64.
"""

from __future__ import annotations

import numpy as np

from .emulator import (
    BOTTOM_LEFT,
    BOTTOM_RIGHT,
    GENERAL,
    TOP_RIGHT,
    UNIT_ROUNDOFF,
    Case,
    Run,
    corner_mask,
    decode,
    encode,
    make_data,
    run,
    tap,
)


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
                        yield (i, j, row * case.width + column, from_row * case.width + from_column, p == 0 and q == 0)


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


def check_solve(case: Case, seed: int = 0) -> Run:
    data = make_data(case, seed)
    done = run(case, data)
    assert all(piece == done.raw[0] for piece in done.raw), "the result depends on the order of the threads"
    expected = oracle_solve(case, data.y - data.bias.reshape(1, -1, 1, 1), np.nan_to_num(data.weight), case.transposed)
    assert_close(done.outputs[0][0], expected, case.image_type, state_error(case))
    return done


def check_backward(case: Case, seed: int = 0) -> Run:
    data = make_data(case, seed)
    weight = np.nan_to_num(data.weight)
    x = oracle_solve(case, make_data(case, seed + 1).y, weight, case.transposed)
    if case.input_layout == "expanded":
        x = np.broadcast_to(x[:, :, :1, :1], x.shape)
    data.x = decode(encode(x, case.image_type), case.image_type)
    done = run(case, data, "backward")
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
