"""Random problems: whatever the shape, groups, orders, kernel and strides, the solve is the inverse."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..cases import CORNERS, DTYPES, LAYOUTS, ORDERS, Case
from ..checks import check_consistent, check_gradients, check_value

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=80, database=None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 4))
    orders = st.sampled_from(ORDERS)
    return Case(
        batch=draw(st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 40]))),
        channels=groups * draw(st.integers(1, 9)),
        height=draw(st.integers(1, 9)),
        width=draw(st.integers(1, 11)),
        kernel=(draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        groups=groups,
        order=draw(st.one_of(orders, st.lists(orders, min_size=groups, max_size=groups).map(tuple))),
        corner=draw(st.sampled_from(CORNERS)),
        bias=draw(st.booleans()),
    )


SEEDS = st.integers(0, 2**31)


@EXAMPLES
@given(cases(), SEEDS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from(sorted(LAYOUTS)))
def test_value(case: Case, seed: int, dtype: torch.dtype, transposed: bool, layout: str) -> None:
    torch.manual_seed(seed)
    input, weight, bias = case.tensors(dtype)
    check_value(case, LAYOUTS[layout](input), weight, bias, transposed)


@EXAMPLES
@given(cases(), SEEDS)
def test_adjoint_and_round_trips(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    check_consistent(case)


@settings(EXAMPLES, max_examples=25)
@given(cases(), SEEDS, st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)))
def test_gradients(case: Case, seed: int, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(seed)
    input, weight, bias = case.tensors(dtype)
    check_gradients(case, LAYOUTS[layout](input), weight, bias)
