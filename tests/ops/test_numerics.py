"""The solve keeps to the rule of exactness on ill-conditioned weights too, in every CPU regime and dtype; the emulated
kernels of the GPU in emulation/test_numerics.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def numerics(scripts: Any) -> Any:
    return scripts.numerics


@pytest.mark.parametrize("regime", ["images as lanes", "rows as lanes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [1.0, 1e3, 1e6])
def test_taps_that_grow(numerics: Any, target: float, dtype: torch.dtype, regime: str) -> None:
    if dtype == torch.float64 and not numerics.HAS_EXTENDED:
        pytest.skip("long double has no more digits than float64 here (it has on x86), so nothing can judge float64")
    sample = numerics.make_sample("taps", target, dtype, 0)
    assert sample.growth == pytest.approx(target, rel=1e-2)
    found = numerics.measure([sample], numerics.solve_in(regime))
    assert found["kept"], found


@pytest.mark.parametrize("regime", ["images as lanes", "rows as lanes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [1e3, 1e6])
def test_a_corner_close_to_singular(numerics: Any, target: float, dtype: torch.dtype, regime: str) -> None:
    if dtype == torch.float64 and not numerics.HAS_EXTENDED:
        pytest.skip("long double has no more digits than float64 here (it has on x86), so nothing can judge float64")
    samples = [numerics.make_sample("corner", target, dtype, seed) for seed in range(3)]
    found = numerics.measure(samples, numerics.solve_in(regime))
    assert found["kept"], found
    cost = 1e-2 * target * torch.finfo(numerics.state_dtype(dtype)).eps
    assert found["plain_error"] > cost, "such a corner must cost the plain recurrence something"


def test_folding_the_corner_keeps_its_digits(numerics: Any) -> None:
    """Such a corner magnifies what rounds the sum of the taps; in the folded taps there is little left to magnify."""
    sample = numerics.make_sample("corner", 1e4, torch.float32, 0)
    found = numerics.measure([sample], numerics.solve_in("images as lanes"))
    assert found["error"] < 0.1 * found["plain_error"]


def test_growth_is_that_of_the_worst_image(numerics: Any) -> None:
    weight = numerics.weight_of_growth("taps", 1, 50.0)
    growth = numerics.growth(weight, "unit_triangular")
    matrix = numerics.dense_matrix(weight, numerics.HEIGHT, numerics.WIDTH, corner="unit_triangular")
    inverse = torch.linalg.inv(matrix)
    worst = inverse[inverse.abs().sum(1).argmax()].sign()  # an image of ±1 that the solve magnifies most
    assert (inverse @ worst).abs().max() == pytest.approx(growth)
    assert growth == pytest.approx(50.0, rel=1e-2)


def test_the_extended_recurrence_solves(numerics: Any) -> None:
    if not numerics.HAS_EXTENDED:
        pytest.skip("no 80-bit numbers")
    sample = numerics.make_sample("corner", 1e3, torch.float64, 2)
    residual = (
        numerics.dense_matrix(sample.weight, numerics.HEIGHT, numerics.WIDTH).numpy().astype(numerics.np.longdouble)
        @ sample.exact.reshape(numerics.BATCH, -1).T
        - sample.images.flatten(1).numpy().T
    )
    assert abs(residual).max() < 1e-16 * abs(sample.exact).max()


def test_a_solve_in_half_the_digits_breaks_the_rule(numerics: Any) -> None:
    sample = numerics.make_sample("taps", 1e3, torch.float32, 0)

    def rounded(images: Tensor, weight: Tensor, corner: str) -> Tensor:
        return numerics.solve_in("images as lanes")(images, weight.bfloat16().float(), corner)

    assert not numerics.measure([sample], rounded)["kept"]
    missing = numerics.measure([sample], lambda images, weight, corner: images * float("nan"))
    assert not missing["kept"]


def test_a_regime_that_is_not_chosen_is_an_error(numerics: Any) -> None:
    sample = numerics.make_sample("taps", 1.0, torch.float32, 0)
    few = sample.images[:, :, :4]
    with pytest.raises(RuntimeError, match="not with rows as lanes"):
        numerics.solve_in("rows as lanes")(few[:, :, :1], sample.weight, "unit_triangular")
