"""Every check of checks.py fails on a library that is broken in the way the check is there for.

The faults wrap the two operators; among them are those of the released implementation of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from inverse_flow import InverseConv2d
from inverse_flow.functional import inverse_conv2d
from inverse_flow.ops import autograd
from inverse_flow.ops import library as ops

from ..cases import LAYOUTS, Case
from ..checks import (
    check_consistent,
    check_containment,
    check_gradients,
    check_layout,
    check_log_det,
    check_repeatable,
    check_value,
    check_vmap,
)

Operator = Callable[..., Any]
solve, solve_backward = ops.solve, ops.solve_backward
CASE = Case(9, 4, 4, 5, groups=2, order=("bottom_right", "top_left"), corner="unit_triangular")


def edited(**changes: Callable[[Any], Any]) -> Operator:
    """The solve with some of its arguments changed."""
    names = ("input", "weight", "bias", "orders", "corner", "transposed", "allow_tf32")

    def broken(*arguments: Any) -> Tensor:
        return solve(*(changes[n](a) if n in changes else a for n, a in zip(names, arguments, strict=False)))

    return broken


def after(change: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """The solve with its output changed: ``change(output, input)``."""
    return lambda input, *rest: change(solve(input, *rest), input)


def drop_farthest_tap(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:2, :, -1, -1] = 0  # group 0 recurs from the bottom right
    return weight


def leave_last_image(output: Tensor, _: Tensor) -> Tensor:
    output[-1] = float("nan")
    return output


def overwrite_input(output: Tensor, input: Tensor) -> Tensor:
    input.mul_(2)
    return output


def first_image_everywhere(output: Tensor, _: Tensor) -> Tensor:
    return output[:1].expand_as(output).contiguous()


FAULTS: dict[str, Operator] = {
    "taps are added": edited(weight=lambda w: -w),
    "one tap is missing": edited(weight=drop_farthest_tap),
    "one channel of a tap is missing": edited(weight=lambda w: w.index_fill(1, torch.tensor([1]), 0)),
    "the order is ignored": edited(orders=lambda orders: (0,) * len(orders)),
    "the corner is taken for the identity": edited(corner=lambda _: 0),
    "transposed is ignored": edited(transposed=lambda _: False),
    "the bias is ignored": edited(bias=lambda _: None),
    "the bias is added": edited(bias=lambda b: None if b is None else -b),
    "the last image is not written": after(leave_last_image),
    "all images are the first": after(first_image_everywhere),
    "the state is bfloat16": after(lambda x, _: x.to(torch.bfloat16).to(x.dtype)),
    "the state is float16 in the corner": edited(weight=lambda w: w.half().to(w.dtype)),
    "the input is overwritten": after(overwrite_input),
    "the layout is lost": after(lambda x, _: x.clone(memory_format=torch.contiguous_format)),
    "images leak into each other": after(lambda x, y: x + 0 * y.sum()),
    "runs differ": after(lambda x, _: x * (1 + 1e-7 * torch.rand(()))),
    "half of what it should be": after(lambda x, _: x / 2),
}

BACKWARD_FAULTS: dict[str, Operator] = {
    # The released code: A⁻¹ g for A⁻ᵀ g, the layer's input for its output, zeros for few channels.
    "the solve is not transposed": lambda g, x, w, o, c, t, *_: solve_backward(g, x, w, o, c, not t),
    "the weight gradient takes the input for the output": lambda g, x, w, o, c, t, *_: solve_backward(
        g, solve(x, w, None, o, c, t), w, o, c, t
    ),
    "the weight gradient is zero": lambda *a: (solve_backward(*a)[0], torch.zeros_like(a[2]), solve_backward(*a)[2]),
    "the weight gradient has the wrong sign": lambda *a: tuple(
        -r if i == 1 else r for i, r in enumerate(solve_backward(*a))
    ),
    "the bias gradient has the wrong sign": lambda *a: tuple(
        -r if i == 2 else r for i, r in enumerate(solve_backward(*a))
    ),
    "what is not read gets a gradient": lambda g, x, w, o, c, t, *_: (
        *solve_backward(g, x, w, o, c, t)[:1],
        solve_backward(g, x, w, o, 2, t)[1],
        solve_backward(g, x, w, o, c, t)[2],
    ),
    "the last image is left out": lambda g, x, w, o, c, t, *_: (
        solve_backward(g, x, w, o, c, t)[0],
        *solve_backward(g[:-1], x[:-1], w, o, c, t)[1:],
    ),
    "runs differ": lambda *a: tuple(r + 1e-6 * torch.rand(()) for r in solve_backward(*a)),
}


def value(transposed: bool = False) -> None:
    check_value(CASE, *CASE.tensors(torch.float32), transposed)


def gradients() -> None:
    check_gradients(CASE, *CASE.tensors(torch.float32))


CHECKS: dict[str, Callable[[], None]] = {
    "value": value,
    "transposed value": lambda: value(True),
    "gradients": gradients,
    "consistent": lambda: check_consistent(CASE),
    "layout": lambda: check_layout(CASE, LAYOUTS["channels_last"]),
    "containment": lambda: check_containment(CASE, 3, 2, (1, 2), float("nan")),
    "repeatable": lambda: check_repeatable(CASE),
    "vmap": lambda: check_vmap(Case(2, 3, 3, 4, order="bottom_left"), (True, True, True)),
    "log-det": lambda: check_log_det(
        InverseConv2d(2, 2, corner="plu", dtype=torch.float64), torch.randn(2, 2, 2, 3, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_passes_on_the_library(check: str) -> None:
    CHECKS[check]()


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        ("taps are added", ["value", "transposed value", "gradients", "consistent"]),
        ("one tap is missing", ["value", "transposed value", "consistent"]),
        ("one channel of a tap is missing", ["value", "transposed value", "consistent"]),
        ("the order is ignored", ["value", "transposed value", "consistent"]),
        ("the corner is taken for the identity", ["value", "transposed value", "consistent"]),
        ("transposed is ignored", ["transposed value", "consistent"]),
        ("the bias is ignored", ["value", "consistent"]),
        ("the bias is added", ["value", "consistent"]),
        ("the last image is not written", ["value", "transposed value", "consistent"]),
        ("all images are the first", ["value", "consistent"]),
        ("the state is bfloat16", ["value", "transposed value", "consistent"]),
        ("the state is float16 in the corner", ["value", "consistent"]),
        ("the input is overwritten", ["value"]),
        ("the layout is lost", ["layout"]),
        ("images leak into each other", ["containment"]),
        ("runs differ", ["repeatable"]),
        ("half of what it should be", ["value", "log-det", "consistent"]),
    ],
)
def test_a_broken_solve_is_caught(fault: str, checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "solve", FAULTS[fault])
    for check in checks:
        with pytest.raises(AssertionError):
            CHECKS[check]()


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_broken_backward_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "solve_backward", BACKWARD_FAULTS[fault])
    check = CHECKS["repeatable" if fault == "runs differ" else "gradients"]
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("wrong", [lambda d: -d, lambda d: d / 2, lambda d: d.mean()[None]])
def test_a_wrong_log_det_is_caught(direction: str, wrong: Callable[[Tensor], Tensor]) -> None:
    layer = InverseConv2d(2, 2, corner="plu", dtype=torch.float64)
    with torch.no_grad():
        layer.log_scale.normal_()
    right = getattr(layer, direction)

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        images, log_det = right(x)
        return images, wrong(log_det)

    setattr(layer, direction, broken)
    with pytest.raises(AssertionError):
        check_log_det(layer, torch.randn(2, 2, 2, 3, dtype=torch.float64))


def test_a_broken_vmap_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = autograd.into_channels
    monkeypatch.setattr(
        autograd, "into_channels", lambda t, dim, *rest: fold(t if dim is None else t.flip(dim), dim, *rest)
    )
    with pytest.raises(AssertionError):
        check_vmap(Case(2, 3, 3, 4), (True, False, True))
    monkeypatch.undo()
    check_vmap(Case(2, 3, 3, 4), (True, False, True))


def test_gradcheck_catches_a_weight_gradient_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    y, weight, _ = Case(1, 2, 2, 2, (2, 2)).tensors()

    def check() -> bool:
        return torch.autograd.gradcheck(lambda w: inverse_conv2d(y, w), weight.requires_grad_())

    assert check()
    monkeypatch.setattr(ops, "solve_backward", BACKWARD_FAULTS["the weight gradient is zero"])
    with pytest.raises(GradcheckError):
        check()
