"""The emulated kernels keep to the rule of exactness on ill-conditioned weights: at most twice the error of the plain
recurrence in float32, plus one rounding to the images' dtype."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from inverse_flow.reference import inverse_conv2d as plain_recurrence

from .checks import oracle_solve
from .emulator import (
    BLOCK,
    GENERAL,
    LANES,
    TENSOR,
    TOP_LEFT,
    UNIT_ROUNDOFF,
    UNIT_TRIANGULAR,
    Case,
    Data,
    Run,
    encode,
    make_data,
    round_to,
    run,
)

CORNERS = {UNIT_TRIANGULAR: "unit_triangular", GENERAL: "general"}
# Whole images in a block; tiles; tiles with the weights in global memory; a warp on the rows of an image; tensor cores.
# Each with its shared memory.
REGIMES = {
    "images in a block": (BLOCK, 99 * 1024),
    "tiles": (BLOCK, 1500),
    "weights in global memory": (BLOCK, 120),
    "rows as lanes": (LANES, 99 * 1024),
    "tensor cores": (TENSOR, 99 * 1024),
}


def growth(case: Case, weight: np.ndarray) -> float:
    """‖A(w)⁻¹‖∞: the row sums of the inverse, which is what solving the unit images gives."""
    count = case.channels * case.height * case.width
    units = np.eye(count).reshape(count, case.channels, case.height, case.width)
    columns = oracle_solve(case.but(batch=count), units, weight, False).reshape(count, count)
    return float(np.abs(columns).sum(0).max())


@functools.cache
def weight_of_growth(case: Case, target: float) -> np.ndarray:
    """Taps along a random direction, or a corner tap with ever smaller singular values, until A⁻¹ has grown so."""
    random = np.random.default_rng(3)
    taps = random.standard_normal(case.weight_shape) / np.sqrt(case.channels * case.kernel_h * case.kernel_w)
    left, right = (np.linalg.qr(random.standard_normal((3, 3)))[0] for _ in range(2))

    def at(strength: float) -> np.ndarray:
        if case.corner == UNIT_TRIANGULAR:
            return taps * strength
        corner = left @ np.diag((1 + strength) ** -np.arange(3.0) / 2) @ right
        weight = 0.25 * np.einsum("oc,cikl->oikl", corner, taps)
        weight[:, :, -1, -1] = corner
        return weight

    low, high = 0.0, 1.0
    while growth(case, at(high)) < target:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if growth(case, at(middle)) < target else (low, middle)
    return round_to(at(high), "float")


def plain_error(case: Case, data: Data) -> float:
    """The largest error of the plain recurrence for multiples of y. Each rounds in its own way: of one, ill-conditioned
    weights make a draw of luck, and another one on every processor.
    """
    weight = torch.tensor(data.weight, dtype=torch.float32)
    errors = []
    for scale in range(1, 24, 2):
        y = torch.tensor(scale * data.y, dtype=torch.float32)
        plain = plain_recurrence(y, weight, corner=CORNERS[case.corner]).double().numpy()
        exact = oracle_solve(case, y.double().numpy(), data.weight, False)
        errors.append(np.abs(round_to(plain / scale, case.image_type) - exact / scale).max())
    return float(max(errors))


def assert_exact(case: Case, data: Data) -> Run:
    """The rule of tests/tolerance.py."""
    exact = oracle_solve(case, data.y, data.weight, False)
    assert np.isfinite(encode(exact, case.image_type).astype(np.float64)).all()
    rounding = 0.0 if case.image_type == "float" else 2 * UNIT_ROUNDOFF[case.image_type] * np.abs(exact).max()
    allowed = 2 * plain_error(case, data) + rounding
    done = run(case, data)
    assert done.facts["regime"] == [case.forced_regime]
    error = np.abs(done.outputs[0][0] - exact).max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"
    return done


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("target", [1e2, 1e6])
@pytest.mark.parametrize("regime", REGIMES)
def test_ill_conditioned_weights(regime: str, target: float, corner: int, image_type: str) -> None:
    case = Case(4, (TOP_LEFT,), 3, 11, 9, 3, 3, corner, bias=False, seeds=(1,))
    weight = weight_of_growth(case, target)
    number, shared_bytes = REGIMES[regime]
    case = case.but(image_type=image_type, forced_regime=number, shared_bytes=shared_bytes)
    y = np.random.default_rng(4).standard_normal(case.image_shape)
    y = round_to(y / np.sqrt(np.abs(oracle_solve(case, y, weight, False)).max()), image_type)
    done = assert_exact(case, Data(y, weight, np.zeros(3)))
    assert (done.facts["tiles"] == [1, 1]) == (shared_bytes == 99 * 1024)
    assert done.facts["weights_in_shared"] == [shared_bytes > 120]


@pytest.mark.parametrize("channels", [24, 64])
def test_wide_layers_on_tensor_cores(channels: int) -> None:
    """Sums of hundreds of products, which the tensor cores truncate at every step."""
    case = Case(2, (TOP_LEFT,), channels, 5, 6, 3, 3, GENERAL, bias=False, seeds=(1,), forced_regime=TENSOR)
    assert_exact(case.but(shared_bytes=227 * 1024), make_data(case))
