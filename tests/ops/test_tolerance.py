"""The tolerance policy accepts what is right and refuses what is not."""

import pytest
import torch
from torch import Tensor

from inverse_flow import reference

from ..cases import DTYPES, Case
from ..tolerance import ORACLE_ROUNDINGS, assert_accurate, assert_solves, plain_solve

CASE = Case(4, 3, 6, 5)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES} | {
    torch.float64: ORACLE_ROUNDINGS * torch.finfo(torch.float64).eps
}


def quantities(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(plain, exact, matrix, right) of one problem."""
    input, weight, bias = CASE.tensors(dtype)
    plain = plain_solve(CASE, input, weight, bias)
    exact = reference.inverse_conv2d_dense(input, weight, bias, **CASE.arguments)
    matrix = reference.dense_matrix(weight.double(), CASE.height, CASE.width, **CASE.arguments)
    return plain, exact, matrix, input.double() - bias.double().view(-1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_the_plain_recurrence_and_the_rounded_oracle(dtype: torch.dtype) -> None:
    plain, exact, matrix, right = quantities(dtype)
    for actual in (plain, exact.to(dtype)):
        assert_accurate(actual, plain, exact, dtype)
        assert_solves(actual, plain, matrix, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_one_element_a_few_bounds_off(dtype: torch.dtype) -> None:
    plain, exact, _, _ = quantities(dtype)
    bound = 2 * (plain.double() - exact).abs().max() + EPS[dtype] * exact.abs().max()
    wrong = exact.clone()
    wrong[1, 2, 3, 4] += 3 * bound
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(wrong.to(dtype), plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_a_residual_of_random_noise(dtype: torch.dtype) -> None:
    plain, exact, matrix, right = quantities(dtype)
    wrong = exact + 20 * EPS[dtype] * exact.abs().max() * torch.randn_like(exact)
    with pytest.raises(AssertionError, match="residual"):
        assert_solves(wrong.to(dtype), plain, matrix, right)


def test_refuses_float32_that_was_rounded_to_bfloat16_on_the_way() -> None:
    plain, exact, _, _ = quantities(torch.float32)
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(exact.to(torch.bfloat16).float(), plain, exact, torch.float32)


def test_refuses_float64_that_was_rounded_to_float32_on_the_way() -> None:
    plain, exact, matrix, right = quantities(torch.float64)
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(exact.float().double(), plain, exact, torch.float64)
    with pytest.raises(AssertionError, match="residual"):
        assert_solves(exact.float().double(), plain, matrix, right)


def test_a_sum_that_cancels_is_rounded_like_its_terms() -> None:
    exact = torch.tensor([1e-3], dtype=torch.float64)
    actual = (exact + 1e-7).float()
    assert_accurate(actual, exact.float(), exact, torch.float32, magnitude=torch.tensor([1.0]))
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(actual, exact.float(), exact, torch.float32)


def test_refuses_nan() -> None:
    plain, exact, matrix, right = quantities(torch.float32)
    wrong = plain.clone()
    wrong[0, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="is off by nan"):
        assert_accurate(wrong, plain, exact, torch.float32)
    with pytest.raises(AssertionError, match="residual nan"):
        assert_solves(wrong, plain, matrix, right)


def test_refuses_another_dtype_or_shape() -> None:
    plain, exact, _, _ = quantities(torch.float32)
    with pytest.raises(AssertionError, match=r"torch.float64, wanted torch.float32"):
        assert_accurate(plain.double(), plain, exact, torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(plain[:2], plain, exact, torch.float32)


def test_refuses_an_oracle_that_is_not_finite() -> None:
    plain, exact, _, _ = quantities(torch.float32)
    with pytest.raises(AssertionError, match="the test's numbers are at fault"):
        assert_accurate(plain, plain, exact / 0, torch.float32)
