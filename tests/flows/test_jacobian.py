"""Products with the Jacobian: against the dense one, against each other, and against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import (
    HINT,
    IRIM,
    ActNorm,
    AffineCoupling,
    Compose,
    Conv1x1,
    Flow,
    HaarSqueeze,
    Householder,
    Hyperbolic,
    Split,
    Squeeze,
    jvp,
    reverse,
    vjp,
)

FOUR_ORDERS = ("top_left", "top_right", "bottom_left", "bottom_right")


def whole_flow() -> Flow:
    """Every kind of layer, with a context."""
    return Flow(
        [
            Squeeze(),
            InverseConv2d(4, groups=4, order=FOUR_ORDERS),
            ActNorm(4),
            Conv1x1(4),
            AffineCoupling(4, 3, context_channels=1),
            Split(4),
            HaarSqueeze(),
            InverseConv2d(8, 2, corner="plu"),
            Householder(8, 2),
            HINT(8, 0, least_channels=4, context_channels=1),
            Hyperbolic(8),
        ],
        (1, 4, 4),
    )


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "inverse_conv": (lambda: InverseConv2d(2), (2, 3, 4)),
    "compose": (lambda: Compose(ActNorm(3), Conv1x1(3), AffineCoupling(3, 4)), (3, 2, 2)),
    "split": (lambda: Split(3), (3, 2, 2)),
    "hint_volume": (lambda: HINT(3, 0, dimensions=3), (3, 2, 1, 2)),
    "flow": (whole_flow, (1, 4, 4)),
    "reversed_flow": (lambda: reverse(whole_flow()), ()),
}


@dataclass
class Problem:
    """A point, and changes of everything there, in double precision."""

    layer: nn.Module
    x: Any
    context: Tensor
    inverse: bool
    dx: Any = field(init=False)
    dz: Any = field(init=False)
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.dx = like(self.x)
        self.dz = like(self.run(self.x))
        self.parameters = {name: torch.randn_like(value) for name, value in self.layer.named_parameters()}

    def run(self, x: Any) -> Any:
        with torch.no_grad():
            return (self.layer.inverse if self.inverse else self.layer)(x, self.context)[0]

    def jvp(self, dx: Any = None, parameters: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
        dx = self.dx if dx is None else dx
        return jvp(self.layer, self.x, dx, self.context, parameter_tangents=parameters, inverse=self.inverse)

    def vjp(self, dz: Any = None) -> tuple[Any, Any, dict[str, Tensor]]:
        return vjp(self.layer, self.x, self.dz if dz is None else dz, self.context, inverse=self.inverse)


def like(value: Any) -> Any:
    return tuple(map(torch.randn_like, value)) if isinstance(value, tuple) else torch.randn_like(value)


def flat(value: Any) -> Tensor:
    return torch.cat([part.flatten(1) for part in value], 1) if isinstance(value, tuple) else value.flatten(1)


def dot(a: Any, b: Any) -> Tensor:
    return (flat(a) * flat(b)).sum()


def add(a: Any, b: Any, factor: float) -> Any:
    if isinstance(a, tuple):
        return tuple(add(x, y, factor) for x, y in zip(a, b, strict=True))
    return a + factor * b


@pytest.fixture(params=[(name, inverse) for name in LAYERS for inverse in (False, True)], ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    name, inverse = request.param
    make, shape = LAYERS[name]
    layer = make().double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    context = torch.randn(2, 1, dtype=torch.float64)
    if name == "reversed_flow":
        x = layer.inverse(torch.randn(2, 1, 4, 4, dtype=torch.float64), context)[0]
    else:
        x = torch.randn(2, *shape, dtype=torch.float64)
    if inverse:
        x = layer(x, context)[0]
    x = tuple(part.detach() for part in x) if isinstance(x, tuple) else x.detach()
    return Problem(layer, x, context, inverse)


# The checks, as functions of what jvp and vjp gave.


def check_adjoint(problem: Problem, jv: Any, jtu: Any, parameter_products: dict[str, Tensor]) -> None:
    """⟨J ẋ + ∂f/∂θ θ̇, u⟩ = ⟨ẋ, Jᵀ u⟩ + ⟨θ̇, (∂f/∂θ)ᵀ u⟩"""
    right = dot(problem.dx, jtu)
    right = right + sum((problem.parameters[name] * value).sum() for name, value in parameter_products.items())
    left = dot(jv, problem.dz)
    assert left.abs() > 1e-3  # neither side is zero by itself
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def check_taylor(function: Callable[[float], Tensor], slope: Tensor) -> None:
    """‖f(h) − f(0)‖ falls as h, ‖f(h) − f(0) − h·slope‖ as h²: the second cannot hold where the slope is zero."""
    start = function(0.0)
    steps = [1e-3 * 0.5**i for i in range(3)]
    changes = [(function(h) - start).norm() for h in steps]
    rests = [(function(h) - start - h * slope).norm() for h in steps]
    for i in range(2):
        assert 0.9 < torch.log2(changes[i] / changes[i + 1]) < 1.1
    # Linear maps leave rounding alone.
    if rests[0] > 1e-11 * start.norm():
        for i in range(2):
            assert torch.log2(rests[i] / rests[i + 1]) > 1.8
    else:
        assert changes[0] > 1e-6 * start.norm()


def test_adjoint_identity(problem: Problem) -> None:
    _, jv = problem.jvp(parameters=problem.parameters)
    _, jtu, products = problem.vjp()
    check_adjoint(problem, jv, jtu, products)


def test_results_are_those_of_the_layer(problem: Problem) -> None:
    expected = flat(problem.run(problem.x))
    torch.testing.assert_close(flat(problem.jvp()[0]), expected)
    torch.testing.assert_close(flat(problem.vjp()[0]), expected)
    assert all(parameter.grad is None for parameter in problem.layer.parameters())


def test_taylor_in_x_and_in_the_parameters(problem: Problem) -> None:
    _, along_x = problem.jvp()
    check_taylor(lambda h: flat(problem.run(add(problem.x, problem.dx, h))), flat(along_x))

    zero = tuple(map(torch.zeros_like, problem.dx)) if isinstance(problem.dx, tuple) else torch.zeros_like(problem.dx)
    _, along_parameters = problem.jvp(zero, problem.parameters)
    values = dict(problem.layer.named_parameters())
    kept = {name: value.detach().clone() for name, value in values.items()}

    def moved(h: float) -> Tensor:
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(kept[name] + h * problem.parameters[name])
        return flat(problem.run(problem.x))

    check_taylor(moved, flat(along_parameters))


def test_against_the_dense_jacobian(problem: Problem) -> None:
    def function(vector: Tensor) -> Tensor:
        parts = vector.view(2, -1)
        if isinstance(problem.x, tuple):
            pieces = parts.split([part[0].numel() for part in problem.x], 1)
            x: Any = tuple(piece.reshape(part.shape) for piece, part in zip(pieces, problem.x, strict=True))
        else:
            x = parts.reshape(problem.x.shape)
        return flat((problem.layer.inverse if problem.inverse else problem.layer)(x, problem.context)[0]).flatten()

    jacobian = torch.autograd.functional.jacobian(function, flat(problem.x).flatten())
    torch.testing.assert_close(flat(problem.jvp()[1]).flatten(), jacobian @ flat(problem.dx).flatten())
    torch.testing.assert_close(flat(problem.vjp()[1]).flatten(), jacobian.T @ flat(problem.dz).flatten())


def test_the_log_determinant_by_products() -> None:
    """Columns J eᵢ, one product each, make up the Jacobian whose determinant the layer reports."""
    layer = AffineCoupling(2, 3).double()
    nn.init.normal_(layer.conditioner.layers[-1].weight)
    x = torch.randn(1, 2, 1, 2, dtype=torch.float64)
    columns = [jvp(layer, x, unit.view(1, 2, 1, 2))[1].flatten() for unit in torch.eye(4, dtype=torch.float64)]
    torch.testing.assert_close(torch.linalg.slogdet(torch.stack(columns)).logabsdet, layer(x)[1][0])


def test_only_the_named_parameters_move() -> None:
    layer = ActNorm(2).double().eval()
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    _, product = jvp(layer, x, torch.zeros_like(x), parameter_tangents={"bias": torch.tensor([1.0, 2.0]).double()})
    assert product.flatten().tolist() == [1, 2]


def test_a_parameter_that_is_not_read_gets_zero() -> None:
    layer, x = ActNorm(2).eval(), torch.randn(1, 2, 1, 1)
    layer.register_parameter("unread", nn.Parameter(torch.ones(3)))
    assert vjp(layer, x, x)[2]["unread"].tolist() == [0, 0, 0]


def test_errors_say_what_was_given() -> None:
    layer, x = ActNorm(2).eval(), torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"the tangent must have the shape of x, \(1, 2, 3, 3\), got \(1, 2, 3, 2\)"):
        jvp(layer, x, x[..., 1:])
    with pytest.raises(ValueError, match=r"the cotangent must have the shape of the result, \(1, 2, 3, 3\), got"):
        vjp(layer, x, (x, x))
    with pytest.raises(TypeError, match="the tangent must be a tensor, or a sequence of them, got float"):
        jvp(layer, x, 1.0)
    with pytest.raises(TypeError, match=r"the tangent must be torch\.float32 as x is, got torch\.float64"):
        jvp(layer, x, x.double())
    with pytest.raises(ValueError, match="ActNorm has no parameter 'weight'"):
        jvp(layer, x, x, parameter_tangents={"weight": x})
    with pytest.raises(ValueError, match=r"tangent of bias must have the shape of the parameter, \(2,\), got \(3,\)"):
        jvp(layer, x, x, parameter_tangents={"bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="ActNorm is not initialised"):
        jvp(Compose(ActNorm(2)), x, x)


@pytest.mark.parametrize("make", [lambda mix: Compose(mix, ActNorm(3).eval(), mix), lambda mix: IRIM(3, 4)])
def test_a_layer_in_two_places_keeps_its_parameters(make: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = make(Householder(3)).double(), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for module in layer.modules():
        if isinstance(module, ActNorm):
            module.initialized.fill_(True)
    z, before = layer(x)[0], list(layer.parameters())
    tangents = {name: torch.randn_like(parameter) for name, parameter in layer.named_parameters()}
    moved = jvp(layer, x, torch.zeros_like(x), parameter_tangents=tangents)[1]
    cotangent = torch.randn_like(z)
    pulled = vjp(layer, x, cotangent)[2]
    assert all(one is other for one, other in zip(layer.parameters(), before, strict=True))
    torch.testing.assert_close(layer(x)[0], z)
    products = sum((pulled[name] * tangent).sum() for name, tangent in tangents.items())
    torch.testing.assert_close((moved * cotangent).sum(), products)


def test_a_parameter_of_two_layers_moves_in_both() -> None:
    first, second = Householder(3).double(), Householder(3).double()
    second.vectors = first.vectors
    layer, x = Compose(first, second), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    tangent = torch.randn_like(first.vectors)
    moved = jvp(layer, x, torch.zeros_like(x), parameter_tangents={"layers.0.vectors": tangent})[1]

    def shifted(step: float) -> Tensor:
        twin = copy.deepcopy(layer)
        twin.layers[0].vectors.data.add_(step * tangent)
        assert twin.layers[0].vectors is twin.layers[1].vectors
        return twin(x)[0]

    torch.testing.assert_close(moved, (shifted(1e-6) - shifted(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-6)


def test_an_initialised_actnorm_may_be_in_training_mode() -> None:
    layer, x = ActNorm(2), torch.randn(4, 2, 3, 3)
    layer(x)
    torch.testing.assert_close(jvp(layer, x, x)[1], x * layer.log_scale.exp().view(2, 1, 1))


# The checks themselves: each goes red on a wrong product.


def test_checks_can_fail() -> None:
    layer = AffineCoupling(2, 3).double()
    nn.init.normal_(layer.conditioner.layers[-1].weight)
    problem = Problem(layer, torch.randn(2, 2, 1, 2, dtype=torch.float64), torch.zeros(2, 1), False)
    _, jv = problem.jvp(parameters=problem.parameters)
    _, jtu, products = problem.vjp()
    check_adjoint(problem, jv, jtu, products)
    zero = torch.zeros_like(jv)
    for wrong in ((jv, -jtu, products), (jv, jtu, {}), (zero, torch.zeros_like(jtu), {})):
        with pytest.raises(AssertionError):
            check_adjoint(problem, *wrong)

    slope = problem.jvp()[1]
    check_taylor(lambda h: flat(problem.run(problem.x + h * problem.dx)), flat(slope))
    with pytest.raises(AssertionError):
        check_taylor(lambda h: flat(problem.run(problem.x + h * problem.dx)), flat(zero))
    with pytest.raises(AssertionError):
        check_taylor(lambda h: flat(problem.run(problem.x + h * problem.dx)), flat(slope * 1.01))
    with pytest.raises(AssertionError):  # a map that does not move at all
        check_taylor(lambda h: flat(problem.run(problem.x)), flat(zero))
