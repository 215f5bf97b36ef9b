"""Derivatives: of any order, in both modes, under every torch.func transform."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from inverse_flow import InverseConv2d, reference
from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.ops import library as ops

from ..cases import CORNERS, ORDERS, Case
from ..checks import check_vmap, solve

SUBSETS = [subset for subset in product([False, True], repeat=3) if any(subset)]
SUBSET = pytest.mark.parametrize(
    "needed", SUBSETS, ids=lambda s: "+".join(n for n, k in zip("ywb", s, strict=True) if k)
)

# As small as a case can be that still has a tap of every kind: numerical Jacobians cost an evaluation per element.
TINY = [
    *(Case(1, 2, 2, 3, (2, 2), order=order, corner=corner) for order in ORDERS for corner in CORNERS),
    *(Case(2, 4, 2, 2, (2, 2), groups=2, order=("bottom_left", "top_right"), corner=corner) for corner in CORNERS),
    Case(9, 1, 2, 2, (2, 1), order="bottom_right"),
    Case(1, 2, 2, 1, (3, 2), corner="unit_triangular"),
    Case(1, 2, None, 4, (2,), order="right"),
    Case(1, 2, None, 5, (2,), dilation=2),
    Case(1, 1, 3, 2, (2, 2), order="bottom_left", dilation=(2, 1)),
    Case(1, 2, 1, 2, (2, 1, 2), order="back_top_left", corner="unit_triangular", depth=2),
]
FEW_TINY = [TINY[0], TINY[4], TINY[8], *TINY[12:]]


def leaves(
    case: Case, needed: tuple[bool, bool, bool], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    input, weight, bias = case.tensors(device=device)
    assert bias is not None
    return tuple(t.requires_grad_(n) for t, n in zip((input, weight, bias), needed, strict=True))  # type: ignore[return-value]


@SUBSET
@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case: Case, needed: tuple[bool, bool, bool], device: torch.device) -> None:
    assert gradcheck(lambda *t: case.inverse_conv(*t, **case.arguments), leaves(case, needed, device))


@SUBSET
@pytest.mark.parametrize("case", FEW_TINY, ids=str)
def test_gradgradcheck(case: Case, needed: tuple[bool, bool, bool], device: torch.device) -> None:
    assert gradgradcheck(lambda *t: case.inverse_conv(*t, **case.arguments), leaves(case, needed, device))


@SUBSET
@pytest.mark.parametrize("case", FEW_TINY, ids=str)
def test_gradcheck_of_the_transposed_solve(case: Case, needed: tuple[bool, bool, bool], device: torch.device) -> None:
    def transposed(*tensors: Tensor) -> Tensor:
        return solve(case, *tensors, transposed=True)

    assert gradcheck(transposed, leaves(case, needed, device))


def test_third_derivatives() -> None:
    case = Case(1, 1, 2, 2, (2, 2), bias=False)
    input, weight, _ = case.tensors()

    def second(input: Tensor, weight: Tensor) -> Tensor:
        x = inverse_conv2d(input, weight, **case.arguments)
        (first,) = torch.autograd.grad(x.pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)[0]

    assert gradcheck(second, (input.requires_grad_(), weight.requires_grad_()))


@SUBSET
@pytest.mark.parametrize("case", FEW_TINY, ids=str)
def test_forward_mode(case: Case, needed: tuple[bool, bool, bool], device: torch.device) -> None:
    function = lambda *t: case.inverse_conv(*t, **case.arguments)  # noqa: E731
    assert gradcheck(function, leaves(case, needed, device), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("case", FEW_TINY, ids=str)
def test_jvp_agrees_with_the_dense_solve_and_is_not_zero(case: Case) -> None:
    tensors = tuple(t.masked_fill(t.isnan(), 0) for t in leaves(case, (False, False, False)))
    tangents = tuple(torch.randn_like(t) for t in tensors)
    value, tangent = torch.func.jvp(lambda *t: case.inverse_conv(*t, **case.arguments), tensors, tangents)
    exact = torch.func.jvp(lambda *t: case.dense(*t, **case.arguments), tensors, tangents)
    assert tangent.any()
    torch.testing.assert_close((value, tangent), exact)


@pytest.mark.parametrize("argument", range(3))
def test_dual_numbers_of_one_argument(argument: int) -> None:
    case = Case(2, 3, 3, 4)
    tensors = list(case.tensors())
    tangent = torch.randn_like(tensors[argument])
    with forward_ad.dual_level():
        duals = list(tensors)
        duals[argument] = forward_ad.make_dual(tensors[argument], tangent)
        found = forward_ad.unpack_dual(inverse_conv2d(*duals)).tangent
        exact = forward_ad.unpack_dual(reference.inverse_conv2d_dense(*duals)).tangent
    assert found is not None
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("case", FEW_TINY, ids=str)
def test_jacobians_of_both_modes_agree_with_the_dense_solve(case: Case) -> None:
    tensors = leaves(case, (False, False, False))
    everything = (0, 1, 2)

    def fast(*t: Tensor) -> Tensor:
        return case.inverse_conv(*t, **case.arguments)

    exact = torch.func.jacrev(lambda *t: case.dense(*t, **case.arguments), everything)(*tensors)
    torch.testing.assert_close(torch.func.jacrev(fast, everything)(*tensors), exact)
    torch.testing.assert_close(torch.func.jacfwd(fast, everything)(*tensors), exact)


MODES = {"r": torch.func.jacrev, "f": torch.func.jacfwd}


def cube(function: Callable[..., Tensor], case: Case, input: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss of the weight alone whose derivatives of every order differ from zero."""
    return lambda weight: function(input, weight, **case.arguments).pow(3).sum()


@pytest.mark.parametrize("modes", ["rr", "fr", "rf", "rrr", "frr", "rfr", "rrf"])
@pytest.mark.parametrize("corner", ["general", "unit_triangular"])
def test_derivatives_of_derivatives_in_mixed_modes(corner: str, modes: str) -> None:
    """``fr`` is forward mode over reverse mode, and so on."""
    case = Case(1, 2, 2, 2, (2, 2), order="bottom_left", corner=corner)
    input, weight, _ = case.tensors()
    weight = weight.nan_to_num()
    found, exact = cube(inverse_conv2d, case, input), cube(reference.inverse_conv2d_dense, case, input)
    for mode in reversed(modes):
        found, exact = MODES[mode](found), torch.func.jacrev(exact)
    torch.testing.assert_close(found(weight), exact(weight))


@pytest.mark.parametrize("modes", ["ff", "ffr", "rff", "frf"])
def test_forward_mode_twice_says_that_it_cannot(modes: str) -> None:
    """PyTorch would silently give zeros."""
    case = Case(1, 2, 2, 2, (2, 2))
    input, weight, _ = case.tensors()
    derivative = cube(inverse_conv2d, case, input)
    for mode in reversed(modes):
        derivative = MODES[mode](derivative)
    with pytest.raises(NotImplementedError, match="cannot be differentiated in forward mode twice"):
        derivative(weight)


def test_hessian() -> None:
    case = Case(1, 2, 2, 2, (2, 2))
    input, weight, _ = case.tensors()
    loss = cube(inverse_conv2d, case, input)
    torch.testing.assert_close(torch.func.hessian(loss)(weight), torch.autograd.functional.hessian(loss, weight))


@SUBSET
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 4, 3, corner="unit_triangular"),
        Case(9, 4, 3, 3, (2, 2), 2, ("bottom_left", "top_right")),
        Case(0, 2, 2, 2),
        Case(2, 2, None, 5, (2,), order="right"),
        Case(2, 2, 4, 3, (2, 2), dilation=(2, 1)),
        Case(2, 2, 3, 3, (2, 2), dilation=2),
        Case(2, 2, 3, 2, (2, 2, 1), 2, ("front_top_right", "back_top_left"), depth=2),
    ],
    ids=str,
)
def test_vmap_agrees_with_a_loop(case: Case, needed: tuple[bool, bool, bool], device: torch.device) -> None:
    check_vmap(case, needed, device)


def test_vmap_over_any_dimension_and_nested() -> None:
    case = Case(2, 3, 4, 5)
    _, weight, bias = case.tensors()
    images = torch.randn(2, 3, 4, 5, 6, 2, dtype=torch.float64)
    found = torch.func.vmap(torch.func.vmap(inverse_conv2d, (4, None, None), 1), (5, None, None), 2)(
        images, weight, bias
    )
    for i, j in product(range(6), range(2)):
        torch.testing.assert_close(found[:, i, j], inverse_conv2d(images[..., i, j], weight, bias))


@pytest.mark.parametrize("corner", CORNERS)
def test_per_sample_gradients(corner: str) -> None:
    """vmap over grad, with the weight shared: one weight gradient for each sample."""
    case = Case(5, 4, 3, 4, (2, 3), groups=2, order=("bottom_left", "top_right"), corner=corner)
    input, weight, bias = case.tensors()

    def loss(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return inverse_conv2d(image[None], weight, bias, **case.arguments).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None))(input, weight, bias)
    for i in range(case.batch):
        single = [t.clone().requires_grad_() for t in (input[i], weight, bias)]
        expected = torch.autograd.grad(loss(*single), single)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b)


def test_functional_call() -> None:
    layer = InverseConv2d(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    parameters = {name: torch.randn_like(value) * 0.1 for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    other = InverseConv2d(3).double()
    other.load_state_dict(parameters)
    other(x)[0].square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_ensembles_of_layers() -> None:
    layers = [InverseConv2d(2, corner="plu").double() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    base = InverseConv2d(2, corner="plu").double()
    call = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))
    z, log_det = call(parameters, buffers)
    for i, layer in enumerate(layers):
        torch.testing.assert_close((z[i], log_det[i]), layer(x))


@pytest.mark.parametrize("needed", SUBSETS)
def test_only_what_is_asked_for_has_a_gradient(needed: tuple[bool, bool, bool]) -> None:
    tensors = leaves(Case(2, 3, 3, 3), needed)
    inverse_conv2d(*tensors).sum().backward()
    assert tuple(t.grad is not None for t in tensors) == needed


def test_nothing_but_the_output_and_the_weight_is_kept() -> None:
    """What makes the backward pass cheap: neither the input nor anything between is saved."""
    case = Case(3, 4, 5, 6)
    input, weight, bias = (t.requires_grad_() for t in case.tensors())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = inverse_conv2d(input, weight, bias)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_no_graph_is_built_without_gradients() -> None:
    input, weight, bias = (t.requires_grad_() for t in Case(2, 3, 3, 3).tensors())
    with torch.no_grad():
        assert not inverse_conv2d(input, weight, bias).requires_grad
    with torch.inference_mode():
        assert inverse_conv2d(input, weight, bias).is_inference()


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("batch", [2, 9])
def test_fused_gradients_are_those_of_two_separate_solves(batch: int, corner: str) -> None:
    """solve_backward against its definition: u = A⁻ᵀ g, and the convolution's own weight gradient at (x, u)."""
    case = Case(batch, 4, 4, 5, (2, 3), groups=2, order=("top_right", "bottom_right"), corner=corner)
    y, weight, _ = case.tensors()
    x, g = ops.solve(y, weight, None, case.order_codes, case.corner_code, False), torch.randn_like(y)
    codes = (case.order_codes, case.corner_code)
    u, grad_weight, grad_bias = ops.solve_backward(g, x, weight, *codes, False)
    torch.testing.assert_close(u, ops.solve(g, weight, None, *codes, True))
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(causal_conv2d(x, leaf, **case.arguments), leaf, u)
    torch.testing.assert_close(grad_weight, -expected)
    torch.testing.assert_close(grad_bias, -u.sum((0, 2, 3)))


class TestAutocast:
    """Half precision may be chosen around the operator, never inside it."""

    def test_bfloat16_images_with_float32_weights(self) -> None:
        case = Case(3, 4, 5, 4, corner="unit_triangular")
        input, weight, bias = case.tensors(torch.bfloat16, weight_dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            x = inverse_conv2d(input, weight, bias, **case.arguments)
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x, inverse_conv2d(input, weight, bias, **case.arguments), rtol=0, atol=0)

    @pytest.mark.parametrize("function", [inverse_conv2d, causal_conv2d])
    def test_float32_stays_exact(self, function: object) -> None:
        tensors = [t.requires_grad_() for t in Case(3, 4, 5, 4).tensors(torch.float32)]
        expected = function(*tensors)  # type: ignore[operator]
        expected_grads = torch.autograd.grad(expected.square().sum(), tensors)
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*tensors)  # type: ignore[operator]
            # The backward pass may run inside the region too.
            grads = torch.autograd.grad(found.square().sum(), tensors)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)

    def test_double_backward_stays_exact(self) -> None:
        input, weight, bias = (t.requires_grad_() for t in Case(2, 3, 4, 4).tensors(torch.float32))

        def second() -> tuple[Tensor, ...]:
            (first,) = torch.autograd.grad(inverse_conv2d(input, weight, bias).square().sum(), input, create_graph=True)
            return torch.autograd.grad(first.square().sum(), (input, weight, bias))

        expected = second()
        with torch.autocast("cpu", torch.bfloat16):
            found = second()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("corner", ["identity", "unit_triangular", "plu"])
    def test_a_layer_after_a_half_precision_one(self, corner: str) -> None:
        before, layer = nn.Conv2d(3, 4, 1), InverseConv2d(4, corner=corner)
        x = torch.randn(2, 3, 5, 5)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = before(x)
            assert hidden.dtype == torch.bfloat16
            z, log_det = layer(hidden)
            back, _ = layer.inverse(z)
            z.float().square().sum().backward()
        assert (z.dtype, log_det.dtype, back.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        # Two roundings of bfloat16, to z and to x again.
        torch.testing.assert_close(back, hidden, rtol=0.02, atol=0.05)
        assert before.weight.grad is not None
        assert before.weight.grad.isfinite().all()
