import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow.flows import SplineActivation, SplineCoupling
from inverse_flow.flows.spline import (
    MIN_SHARE,
    MIN_SLOPE,
    linear_spline,
    rational_quadratic_spline,
)

BOUND = 2.0
BINS = 5
SPLINES = {"rational_quadratic": (rational_quadratic_spline, 3 * BINS - 1), "linear": (linear_spline, 2 * BINS)}

splines = pytest.mark.parametrize(("spline", "numbers"), SPLINES.values(), ids=SPLINES)


def draw(numbers: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# A slow reference, one value at a time, written from the definition.


def softmax_shares(raw: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in raw]
    return [MIN_SHARE + (1 - MIN_SHARE * len(raw)) * value / sum(exponentials) for value in exponentials]


def reference_knots(raw: list[float]) -> list[float]:
    shares = softmax_shares(raw)
    return [-BOUND + 2 * BOUND * sum(shares[:k]) for k in range(len(raw) + 1)]


def reference(kind: str, x: float, raw: list[float]) -> tuple[float, float]:
    """(z, dz/dx)."""
    if not -BOUND <= x <= BOUND:
        return x, 1.0
    xs, ys = reference_knots(raw[:BINS]), reference_knots(raw[BINS : 2 * BINS])
    k = max(k for k in range(BINS) if xs[k] <= x or k == 0)
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    t = (x - xs[k]) / w
    if kind == "linear":
        return ys[k] + t * h, h / w
    inner = [MIN_SLOPE + math.log1p(math.exp(r + math.log(math.expm1(1 - MIN_SLOPE)))) for r in raw[2 * BINS :]]
    d0, d1 = [1.0, *inner, 1.0][k : k + 2]
    # The quotient of two quadratic Bernstein polynomials with the weights w₀ = w₂ = 1 and w₁ = (d₀ + d₁) / (2·h/w).
    middle = (d0 + d1) / (2 * h / w)
    corner = (ys[k] * d1 + ys[k + 1] * d0) / (d0 + d1)
    b0, b1, b2 = (1 - t) ** 2, 2 * t * (1 - t), t**2
    top, bottom = ys[k] * b0 + middle * corner * b1 + ys[k + 1] * b2, b0 + middle * b1 + b2
    db0, db1, db2 = -2 * (1 - t), 2 - 4 * t, 2 * t
    dtop, dbottom = ys[k] * db0 + middle * corner * db1 + ys[k + 1] * db2, db0 + middle * db1 + db2
    return top / bottom, (dtop * bottom - top * dbottom) / bottom**2 / w


@pytest.mark.parametrize("kind", SPLINES)
def test_agrees_with_a_slow_reference(kind: str) -> None:
    spline, numbers = SPLINES[kind]
    raw = draw(numbers)
    x = torch.linspace(-BOUND - 1, BOUND + 1, 97, dtype=torch.float64)
    z, log_slope = spline(x, raw, BOUND)
    expected = [reference(kind, value, raw.tolist()) for value in x.tolist()]
    torch.testing.assert_close(z, torch.tensor([value for value, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(log_slope.exp(), torch.tensor([slope for _, slope in expected], dtype=torch.float64))


def check_monotone(spline: Callable[..., tuple[Tensor, Tensor]], numbers: int) -> None:
    x = torch.linspace(-BOUND - 0.5, BOUND + 0.5, 4001, dtype=torch.float64)
    for spread in (1.0, 5.0, 20.0):
        z, log_slope = spline(x, draw(numbers, spread), BOUND)
        assert (z.diff() > 0).all()
        assert log_slope.isfinite().all()


@splines
def test_is_monotone_however_wild_the_numbers(spline: Callable, numbers: int) -> None:
    check_monotone(spline, numbers)


def test_the_check_of_monotony_can_fail() -> None:
    def bumpy(x: Tensor, raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        return x + 0.01 * torch.sin(300 * x), torch.zeros_like(x)

    with pytest.raises(AssertionError):
        check_monotone(bumpy, 1)


@splines
def test_zeros_are_the_identity(spline: Callable, numbers: int) -> None:
    x = torch.linspace(-3, 3, 61)
    z, log_slope = spline(x, torch.zeros(numbers), BOUND)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_slope, torch.zeros(61), rtol=0, atol=1e-6)


@splines
@pytest.mark.parametrize("inverse", [False, True])
def test_the_tails_are_exactly_the_identity_and_gradients_stay_finite(
    spline: Callable, numbers: int, inverse: bool
) -> None:
    raw = draw(numbers).requires_grad_()
    x = torch.tensor([-1e30, -5.0, -BOUND - 1e-9, BOUND + 1e-9, 1e300], dtype=torch.float64, requires_grad=True)
    z, log_slope = spline(x, raw, BOUND, inverse=inverse)
    assert torch.equal(z, x)
    assert torch.equal(log_slope, torch.zeros_like(x))
    (z.sum() + log_slope.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(raw.grad, torch.zeros_like(raw))


@splines
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_at_the_knots_and_ends_are_finite(spline: Callable, numbers: int, inverse: bool) -> None:
    raw = torch.zeros(numbers, requires_grad=True)
    knots = torch.linspace(-BOUND, BOUND, BINS + 1).requires_grad_()
    z, log_slope = spline(knots, raw, BOUND, inverse=inverse)
    torch.testing.assert_close(z, knots)
    (z.sum() + log_slope.sum()).backward()
    assert knots.grad.isfinite().all()
    assert raw.grad.isfinite().all()


@splines
def test_not_a_number_stays_that(spline: Callable, numbers: int) -> None:
    x = torch.tensor([float("nan"), 0.5, float("inf")])
    z, _ = spline(x, torch.zeros(numbers), BOUND)
    assert z.isnan().tolist() == [True, False, False]
    assert z[2].isinf()


def test_the_slope_is_continuous_at_the_ends() -> None:
    raw = draw(SPLINES["rational_quadratic"][1])
    x = torch.tensor([-BOUND, -BOUND + 1e-9, BOUND - 1e-9, BOUND], dtype=torch.float64)
    _, log_slope = rational_quadratic_spline(x, raw, BOUND)
    torch.testing.assert_close(log_slope, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-5)


@splines
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_the_inverse_loses_no_digits(spline: Callable, numbers: int, dtype: torch.dtype, tolerance: float) -> None:
    """The error of x is that of z, stretched by the slope of the inverse."""
    x = torch.linspace(-BOUND, BOUND, 2001, dtype=dtype)
    for spread in (0.5, 4.0):
        raw = draw(numbers, spread).to(dtype)
        z, log_slope = spline(x, raw, BOUND)
        again, inverse_log_slope = spline(z, raw, BOUND, inverse=True)
        assert (((again - x).abs() / (1 + (-log_slope).exp())) < tolerance).all()
        if spread < 1:
            # At a knot of a linear spline the two directions may round to different sides.
            agree = (inverse_log_slope + log_slope).abs() < 100 * tolerance
            assert agree.sum() >= len(x) - BINS


def test_the_inverse_does_not_cancel_in_a_steep_bend() -> None:
    """Slopes of 0.001 and 1000 at the ends of a bin: b of the quadratic formula changes its sign within it."""
    raw = torch.zeros(3 * 4 - 1, dtype=torch.float32)
    raw[8:] = torch.tensor([-20.0, 1000.0, -20.0])
    x = torch.linspace(-BOUND, BOUND, 1001)
    z, log_slope = rational_quadratic_spline(x, raw, BOUND)
    again, _ = rational_quadratic_spline(z, raw, BOUND, inverse=True)
    assert (((again - x).abs() / (1 + (-log_slope).exp())) < 2e-6).all()


@splines
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_value_and_log_slope(spline: Callable, numbers: int, inverse: bool) -> None:
    x = torch.tensor([-2.5, -1.7, -0.3, 0.2, 1.1, 1.9, 2.2], dtype=torch.float64, requires_grad=True)
    raw = draw(numbers, 0.7).requires_grad_()
    torch.autograd.gradcheck(lambda x, raw: spline(x, raw, BOUND, inverse=inverse), (x, raw))


@pytest.mark.parametrize("make", [SplineActivation, lambda channels: SplineCoupling(channels, 4)])
def test_layers_start_as_the_identity(make: Callable) -> None:
    x = 3 * torch.randn(2, 4, 3, 3)
    z, logdet = make(4)(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(logdet, torch.zeros(2), rtol=0, atol=1e-4)


def test_every_channel_has_a_spline_of_its_own() -> None:
    layer = SplineActivation(2)
    with torch.no_grad():
        layer.raw[1] = torch.randn(layer.raw.shape[1])
    x = torch.linspace(-3, 3, 10).view(1, 1, 2, 5).expand(-1, 2, -1, -1)
    z, _ = layer(x)
    torch.testing.assert_close(z[:, 0], x[:, 0])
    assert not torch.allclose(z[:, 1], x[:, 1], atol=1e-2)


def test_layers_on_volumes() -> None:
    x = torch.randn(2, 4, 2, 3, 2, dtype=torch.float64)
    for layer in (SplineActivation(4), SplineCoupling(4, 3, dimensions=3)):
        layer.double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        z, logdet = layer(x)
        back, inverse_logdet = layer.inverse(z)
        assert not torch.allclose(z, x)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(inverse_logdet, -logdet)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplineActivation(2, kind="cubic"), "got 'cubic'"),
        (lambda: SplineActivation(2, bins=1), "2 to 999 bins, got 1"),
        (lambda: SplineActivation(2, bound=0.0), "above 0, got 0.0"),
        (lambda: SplineCoupling(2, bins=1000), "2 to 999 bins, got 1000"),
        (lambda: SplineCoupling(1), "channels must be at least 2, got 1"),
        (lambda: SplineActivation(2)(torch.zeros(1, 3, 2, 2)), "built for 2 channels"),
    ],
)
def test_errors_say_what_was_given(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [rational_quadratic_spline, linear_spline])
def test_steep_splines_invert_without_nan(kind: Any) -> None:
    """Rounding carries some roots of steep bins a little out of them, where a slope can be negative."""
    raw, x = 20 * torch.randn(50_000, 23 if kind is rational_quadratic_spline else 16), 8 * torch.rand(50_000, 1) - 4
    z, _ = kind(x, raw, 4.0)
    z.requires_grad_()
    back, log_slope = kind(z, raw, 4.0, inverse=True)
    assert torch.isfinite(log_slope).all()
    assert (back.abs() <= 4).all()
    (grad,) = torch.autograd.grad(back.sum() + log_slope.sum(), z)
    assert torch.isfinite(grad).all()
