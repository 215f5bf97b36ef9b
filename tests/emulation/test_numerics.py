"""The emulated kernels keep to the rule of exactness on ill-conditioned weights: at most twice the error of the plain
recurrence in float32, plus one rounding to the images' dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from inverse_flow.reference import inverse_conv2d as plain_recurrence

from .emulator import (
    BLOCK,
    GENERAL,
    LANES,
    TOP_LEFT,
    UNIT_TRIANGULAR,
    Case,
    Data,
    compiler,
    encode,
    oracle_solve,
    round_to,
    run,
)
from .test_emulation import driver, worker  # noqa: F401  (fixtures)

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler (g++, or CXX)")

CORNERS = {UNIT_TRIANGULAR: "unit_triangular", GENERAL: "general"}
# Whole images in a block; tiles; tiles with the weights in global memory; a warp on the rows of an image. Each with its
# shared memory.
REGIMES = {
    "images in a block": (BLOCK, 99 * 1024),
    "tiles": (BLOCK, 1500),
    "weights in global memory": (BLOCK, 120),
    "rows as lanes": (LANES, 99 * 1024),
}
BASE = Case(4, (TOP_LEFT,), 3, 11, 9, 3, 3, bias=False, seeds=(1,))
EPS = {"float": 2.0**-23, "half": 2.0**-10, "bfloat16": 2.0**-7}


def growth(case: Case, weight: np.ndarray) -> float:
    """‖A(w)⁻¹‖∞: the row sums of the inverse, which is what solving the unit images gives."""
    count = case.channels * case.height * case.width
    units = np.eye(count).reshape(count, case.channels, case.height, case.width)
    columns = oracle_solve(case.but(batch=count), units, weight, False).reshape(count, count)
    return float(np.abs(columns).sum(0).max())


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


@pytest.mark.parametrize("image_type", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("target", [1e2, 1e6])
def test_ill_conditioned_weights(
    driver: Path,  # noqa: F811
    tmp_path: Path,
    target: float,
    corner: int,
    image_type: str,
) -> None:
    case = BASE.but(corner=corner, image_type=image_type)
    weight = weight_of_growth(case, target)
    y = np.random.default_rng(4).standard_normal(case.image_shape)
    y = round_to(y / np.sqrt(np.abs(oracle_solve(case, y, weight, False)).max()), image_type)
    exact = oracle_solve(case, y, weight, False)
    single = (torch.tensor(array, dtype=torch.float32) for array in (y, weight))
    plain = plain_recurrence(*single, corner=CORNERS[corner]).double().numpy()
    allowed = 2 * np.abs(round_to(plain, image_type) - exact).max() + EPS[image_type] * np.abs(exact).max()
    assert np.isfinite(encode(exact, image_type).astype(np.float64)).all()
    for regime, (number, shared_bytes) in REGIMES.items():
        problem = case.but(forced_regime=number, shared_bytes=shared_bytes)
        done = run(driver, tmp_path, problem, Data(y, weight, np.zeros(3)))
        assert done.facts["regime"] == [number]
        assert (done.facts["tiles"] == [1, 1]) == (regime in ("images in a block", "rows as lanes"))
        assert done.facts["weights_in_shared"] == [regime != "weights in global memory"]
        error = np.abs(done.outputs[0][0] - exact).max()
        assert error <= allowed, f"{regime}: off by {error:.3g}, allowed {allowed:.3g}"
