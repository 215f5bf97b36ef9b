"""Two flows side by side: what becomes of y does not depend on x, and the density is that of the Jacobian."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import (
    ActNorm,
    AdditiveCoupling,
    Flow,
    JointFlow,
    NonFiniteError,
    Split,
    Squeeze,
    detect_nonfinite,
)
from inverse_flow.models import Glow, Hint, InverseFlow


def vectors(**options: object) -> JointFlow:
    """The joint HINT of vectors."""
    return JointFlow(Hint((2,), 1, 2, 4), Hint((3,), 1, 2, 4), 4, **options)


def multi_scale(**options: object) -> JointFlow:
    """Of images, with another number of channels for y."""
    return JointFlow(Hint((2, 4, 8), 2, 1, 3), Hint((1, 4, 8), 2, 1, 3), 3, **options)


def signals(**options: object) -> JointFlow:
    sizes = {"levels": 2, "steps": 1, "hidden": 3}
    return JointFlow(InverseFlow((1, 8), **sizes), InverseFlow((2, 8), **sizes), 3, **options)


MAKE: dict[str, Callable[..., JointFlow]] = {"vectors": vectors, "multi_scale": multi_scale, "signals": signals}
cases = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def varied(flow: nn.Module) -> JointFlow:
    """In float64 with nothing left at its initial value."""
    with torch.no_grad():
        for parameter in flow.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow.eval()


def pair(flow: JointFlow, batch: int = 3) -> tuple[Tensor, Tensor]:
    shapes = flow.own.event_shape, flow.observed.event_shape
    x, y = (torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes)
    return x, y


def flat(latents: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([z.flatten(1) for z in latents], dim=1)


@cases
def test_round_trips(make: Callable[..., JointFlow]) -> None:
    flow = varied(make())
    x, y = pair(flow)
    latents, logdet = flow(x, y)
    (x_again, y_again), minus_logdet = flow.inverse(latents)
    torch.testing.assert_close((x_again, y_again), (x, y))
    torch.testing.assert_close(minus_logdet, -logdet)
    assert [z.shape[1:] for z in latents[0]] == list(flow.own.latent_shapes)
    assert [z.shape[1:] for z in latents[1]] == list(flow.observed.latent_shapes)


@cases
def test_the_lane_of_y_is_alone(make: Callable[..., JointFlow]) -> None:
    flow = varied(make())
    x, y = pair(flow)
    (of_x, of_y), _ = flow(x, y)
    alone, logdet = flow.forward_y(y)
    torch.testing.assert_close(alone, of_y)
    back, minus_logdet = flow.inverse_y(alone)
    torch.testing.assert_close(back, y)
    torch.testing.assert_close(minus_logdet, -logdet)
    same = flow(x + 1, y)[0][1]
    assert all(torch.equal(a, b) for a, b in zip(same, of_y, strict=True))
    (conditioned, _), _ = flow(x, y + 1)
    assert (flat(conditioned) != flat(of_x)).all(), "every latent of x depends on y"


@cases
def test_the_densities_are_those_of_the_jacobians(make: Callable[..., JointFlow]) -> None:
    flow = varied(make())
    x, y = pair(flow, 1)

    def latents(x: Tensor, y: Tensor) -> Tensor:
        of_x, of_y = flow(x, y)[0]
        return torch.cat((flat(of_x), flat(of_y)), dim=1)[0]

    jacobians = torch.autograd.functional.jacobian(latents, (x, y))
    jacobian = torch.cat([part.flatten(1) for part in jacobians], dim=1)
    z = latents(x, y)
    base = -0.5 * (z.square() + math.log(2 * math.pi))
    torch.testing.assert_close(flow.log_prob(x, y)[0], base.sum() + torch.linalg.slogdet(jacobian).logabsdet)
    size = x.numel()
    own = jacobian[:size, :size]  # ∂(latents of x)/∂x, with y held
    expected = base[:size].sum() + torch.linalg.slogdet(own).logabsdet
    torch.testing.assert_close(flow.log_prob_given(x, y)[0], expected)


@cases
def test_samples(make: Callable[..., JointFlow]) -> None:
    flow = varied(make())
    y = pair(flow)[1]
    x, same = flow.sample(5, generator=torch.Generator().manual_seed(0))
    assert (x.shape[1:], same.shape[1:]) == (flow.own.event_shape, flow.observed.event_shape)
    draws = [flow.sample_given(y, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    middle = flow.sample_given(y, temperature=0)
    assert not flat(flow(middle, y)[0][0]).abs().max() > 1e-10


@cases
def test_rebuilding_gives_the_same_gradients(make: Callable[..., JointFlow]) -> None:
    flow = varied(make())
    x, y = pair(flow)
    found = []
    for flow.memory_efficient in (False, True):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), *flow.parameters()]
        found.append(torch.autograd.grad(flow.log_prob(*leaves[:2]).sum(), leaves))
    torch.testing.assert_close(*found)


def test_learns_the_posterior_of_a_linear_gaussian() -> None:
    """x ~ N(0, 1), y = x + 0.5 ε: x given y is N(0.8 y, 0.2)."""
    flow = JointFlow(*(Flow([ActNorm(1), ActNorm(1)], (1,)) for _ in range(2)), 16)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    for _ in range(150):
        x = torch.randn(256, 1)
        loss = -flow.log_prob(x, x + 0.5 * torch.randn(256, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for value in (-1.0, 1.0):
        drawn = flow.eval().sample_given(torch.full((4000, 1), value))
        assert abs(drawn.mean() - 0.8 * value) < 0.15
        assert abs(drawn.std() - 0.2**0.5) < 0.1


def test_copies_and_state() -> None:
    flow = varied(multi_scale())
    x, y = pair(flow)
    expected = flow.log_prob(x, y)
    assert torch.equal(copy.deepcopy(flow).log_prob(x, y), expected)
    loaded = multi_scale().double().eval()
    loaded.load_state_dict(flow.state_dict())
    assert torch.equal(loaded.log_prob(x, y), expected)
    assert len(flow.state_dict()) == len(set(flow.state_dict()))
    assert {name.split(".")[0] for name in flow.state_dict()} == {"observed", "own", "couplings"}


def test_a_coupling_of_your_own() -> None:
    flow = vectors(coupling=lambda channels, of_y: AdditiveCoupling(channels, 3, kept=of_y, dimensions=0))
    assert all(isinstance(layer, AdditiveCoupling) for layer in flow.couplings.values())


def test_what_is_not_finite_is_named() -> None:
    flow = varied(vectors())
    with torch.no_grad():
        flow.own.layers[1].layers[0].bias.fill_(math.nan)
    with detect_nonfinite(), pytest.raises(NonFiniteError, match=r"layers\.1\.second") as error:
        flow(*pair(flow))
    assert flow.get_submodule(error.value.path) is flow.own.layers[1].layers[0]
    assert flow.layers[1].second is flow.own.layers[1]


def test_both_have_one_dtype() -> None:
    flow = varied(vectors())
    x, y = pair(flow)
    of_x, of_y = flow(x, y)[0]
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[x.dtype]
    for one, two in ((x.to(other), y), (x, y.to(other))):
        with pytest.raises(TypeError, match=r"x and y must have one dtype, got torch\.float\d\d and torch\.float\d\d"):
            flow(one, two)
    for one, two in ((tuple(z.to(other) for z in of_x), of_y), (of_x, tuple(z.to(other) for z in of_y))):
        with pytest.raises(TypeError, match="x and y must have one dtype"):
            flow.inverse((one, two))
    for wrong in (3, [1.0], x.sum()):
        with pytest.raises((TypeError, ValueError), match="the context must"):
            flow.log_prob(x, y, wrong)


def test_flows_that_do_not_go_side_by_side_are_refused() -> None:
    with pytest.raises(TypeError, match="two Flows, got ActNorm"):
        JointFlow(ActNorm(2), Glow((2,), 1))
    with pytest.raises(ValueError, match="as many layers, got 1 of y and 2 of x"):
        JointFlow(Glow((2,), 1, 1), Glow((2,), 1, 2))
    with pytest.raises(ValueError, match="pair of layers 0 one splits off a latent"):
        JointFlow(Flow([Split(2, dimensions=0)], (2,)), Flow([ActNorm(2)], (2,)))
    with pytest.raises(ValueError, match=r"same sizes .* got \(1, 4, 4\) beside \(1, 4, 8\)"):
        JointFlow(Flow([Squeeze()], (1, 4, 8)), Flow([Squeeze()], (1, 4, 4)))
    flow = vectors()
    with pytest.raises(ValueError, match=r"y must be \(4, 2\), got \(3, 2\)"):
        flow(torch.zeros(4, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="the latents must be"):
        flow.inverse(((torch.zeros(1, 2),), (torch.zeros(1, 2),)))


def conditional() -> tuple[Glow, Glow]:
    sizes = {"levels": 1, "steps": 1, "hidden": 4}
    return Glow((2,), **sizes), Glow((3,), **sizes, context_channels=2)


def test_a_context_goes_to_the_flow_that_uses_it() -> None:
    flow = varied(JointFlow(*conditional(), 4))
    x, y = pair(flow)
    context = torch.randn(3, 2, dtype=torch.float64)
    marginal = flow.observed.log_prob(y)
    torch.testing.assert_close(flow.log_prob_given(x, y, context), flow.log_prob(x, y, context) - marginal)
    assert not torch.allclose(flow.log_prob(x, y, context), flow.log_prob(x, y, -context))
    assert flow.sample_given(y, context).shape == x.shape
    assert flow.sample(3, context)[0].shape == x.shape
    with pytest.raises(ValueError, match="one row for each example: 3, got 2"):
        flow.log_prob(x, y, context[:2])


def test_what_does_not_belong_together_is_refused() -> None:
    flow = varied(vectors())
    x, y = pair(flow)
    with pytest.raises(ValueError, match="neither the flows nor the couplings use a context"):
        flow.log_prob(x, y, torch.ones(3, 1))
    with pytest.raises(TypeError, match="floating"):
        flow.log_prob(x.long(), y)
    (of_x, of_y), _ = flow(x, y)
    with pytest.raises(ValueError, match="as many examples, got 2 and 3"):
        flow.inverse((tuple(z[:2] for z in of_x), of_y))


def test_a_coupling_that_changes_y_is_refused() -> None:
    def halves(channels: int, of_y: int) -> nn.Module:
        return AdditiveCoupling(channels, 4, kept=1, dimensions=0)

    with pytest.raises(ValueError, match="must keep the 2 channels of y, which come first, got kept=1"):
        JointFlow(Hint((2,), 1, 2, 4), Hint((3,), 1, 2, 4), 4, coupling=halves)
