"""Layers and flows as transforms of torch.distributions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Independent, Normal, Transform, TransformedDistribution

from inverse_flow import InverseConv1d, InverseConv2d
from inverse_flow.adapters import to_torch_transform
from inverse_flow.flows import AffineCoupling, Compose, Flow, Permute, SmoothTanh, Split, Squeeze, Woodbury
from inverse_flow.models import ConditionalFlow, Glow, InverseFlow, LabelContext

from ..flows.test_battery import CASES, CONTEXT_CHANNELS, Case
from .bijection import cases, check_bijection


def transform_of(case: Case, layer: nn.Module, context: Tensor | None) -> Transform:
    return to_torch_transform(layer, context, event_dim=len(case.shape))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bijection(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype)

    def forward(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = transform_of(case, layer, context)
        z = transform(x)
        return z, transform.log_abs_det_jacobian(x, z)

    def inverse(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = transform_of(case, layer, context).inv
        x = transform(z)
        return x, transform.log_abs_det_jacobian(z, x)

    check_bijection(case, forward, inverse, dtype)


@cases
def test_shapes(case: Case) -> None:
    """Domain, codomain and the shapes they say, for three batch shapes."""
    x, context = case.images(6), case.context(6)
    transform = transform_of(case, case.layer(), None if context is None else context[0])
    z = transform(x)
    assert transform.bijective
    assert transform.domain.event_dim == len(case.shape)
    assert transform.domain.check(x).shape == transform.codomain.check(z).shape == (6,)
    for batch in ((), (6,), (2, 3)):
        some = x.reshape(*batch, *case.shape) if batch else x[0]
        event = z.shape[1:]
        assert transform(some).shape == transform.forward_shape(some.shape) == (*batch, *event)
        assert transform.inverse_shape(torch.Size((*batch, *event))) == some.shape
        assert transform.log_abs_det_jacobian(some, transform(some)).shape == batch


class Counted(nn.Module):
    """z = 2x, which counts how often it runs."""

    runs = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        self.runs += 1
        return 2 * x, 0.5

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, float]:
        self.runs += 1
        return z / 2, -0.5


def test_the_log_determinant_comes_with_the_result() -> None:
    layer = Counted()
    transform = to_torch_transform(layer, event_dim=1)
    x, other = torch.randn(2, 3), torch.randn(2, 3)
    z = transform(x)
    assert torch.equal(transform.log_abs_det_jacobian(x, z), torch.full((2,), 0.5))
    assert torch.equal(transform.inv.log_abs_det_jacobian(z, x), torch.full((2,), -0.5))
    assert layer.runs == 1
    back = transform.inv(z)
    assert torch.equal(transform.log_abs_det_jacobian(back, z), torch.full((2,), 0.5))
    assert layer.runs == 2
    transform.log_abs_det_jacobian(other, 2 * other)
    assert layer.runs == 3
    z, logdet = transform.call_and_ladj(x)
    assert torch.equal(z, 2 * x)
    assert torch.equal(logdet, torch.full((2,), 0.5))
    assert transform(x) is not transform(x)
    cached = transform.with_cache()
    assert cached(x) is cached(x)
    assert cached.with_cache() is cached


def test_the_log_determinant_is_that_of_the_point_asked_for() -> None:
    """Also where that point is the result of the latest call, as when one transform runs several times in a row."""
    layer = SmoothTanh()
    transform, x = to_torch_transform(layer, event_dim=1), torch.randn(4, 3, dtype=torch.float64)
    z = transform(x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, transform(z)), layer(z)[1])
    transform(x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, layer(z)[0]), layer(z)[1])
    again = transform(x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(again, layer(again)[0]), layer(again)[1])
    back = transform.inv(x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(layer.inverse(back)[0], back), -layer.inverse(back)[1])
    twice = ComposeTransform([transform, transform])
    torch.testing.assert_close(twice.log_abs_det_jacobian(x, twice(x)), Compose(layer, layer)(x)[1])


def test_a_layer_is_a_distribution() -> None:
    layer = InverseConv2d(2).double()
    base = Independent(Normal(torch.zeros(2, 4, 5).double(), 1.0), 3)
    distribution = TransformedDistribution(base, [to_torch_transform(layer).inv])
    assert distribution.event_shape == (2, 4, 5)
    x = distribution.rsample((3, 2))
    z, logdet = layer(x.flatten(0, 1))
    torch.testing.assert_close(distribution.log_prob(x), (base.log_prob(z) + logdet).view(3, 2))
    loss = -distribution.log_prob(x.detach()).mean()
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_layers_in_a_row() -> None:
    layers = [Squeeze(), InverseConv2d(4), Permute((3, 1, 0, 2)), AffineCoupling(4, 3)]
    flow = Flow(layers, (1, 4, 4)).double()
    base = Normal(torch.zeros(4, 2, 2).double(), 1.0)
    distribution = TransformedDistribution(base, [to_torch_transform(layer).inv for layer in reversed(layers)])
    x = distribution.sample((3,))
    assert x.shape == (3, 1, 4, 4)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_flow_of_several_scales_is_a_distribution(memory_efficient: bool) -> None:
    flow = InverseFlow((1, 8, 8), levels=2, steps=1, hidden=3, memory_efficient=memory_efficient).double().eval()
    base = Normal(torch.zeros(64).double(), 1.0)
    distribution = TransformedDistribution(base, [to_torch_transform(flow).inv])
    assert distribution.event_shape == (1, 8, 8)
    x = distribution.sample((5,))
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))
    ours = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
    theirs = torch.autograd.grad(distribution.log_prob(x).sum(), list(flow.parameters()))
    torch.testing.assert_close(theirs, ours)


def test_contexts_broadcast() -> None:
    case = CASES["affine_coupling_context"]
    layer, x, context = case.layer(), case.images(6), torch.randn(3, CONTEXT_CHANNELS).double()
    expected, expected_logdet = layer(x, context.repeat(2, 1))
    transform = to_torch_transform(layer, context)
    z, logdet = transform.call_and_ladj(x.view(2, 3, *case.shape))
    torch.testing.assert_close(z, expected.view(2, 3, *case.shape))
    torch.testing.assert_close(logdet, expected_logdet.view(2, 3))
    one, _ = transform.call_and_ladj(x[0])
    torch.testing.assert_close(one, layer(x[:1].expand(3, *case.shape), context)[0])
    with pytest.raises(RuntimeError, match="broadcast"):
        transform(x)


def test_maps_and_labels_as_context() -> None:
    case = CASES["affine_coupling_context"]
    layer, x = case.layer(), case.images(3)
    maps = torch.randn(3, CONTEXT_CHANNELS, *case.shape[1:]).double()
    torch.testing.assert_close(to_torch_transform(layer, maps, context_dim=3)(x), layer(x, maps)[0])
    flow = Glow((1, 4, 4), levels=1, steps=1, hidden=3, context_channels=CONTEXT_CHANNELS)
    model = ConditionalFlow(flow, LabelContext(5, CONTEXT_CHANNELS)).eval()
    labels = torch.tensor([4, 0, 2])
    base = Normal(torch.zeros(16), 1.0)
    distribution = TransformedDistribution(base.expand((3, 16)), [to_torch_transform(model, labels, context_dim=0).inv])
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(distribution.log_prob(x), model.log_prob(x, labels))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(copied: Any) -> None:
    transform = to_torch_transform(InverseConv2d(2))
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    z = transform(x)
    torch.testing.assert_close(copied(transform)(x), z)


def test_event_dim_is_found() -> None:
    layers = {
        2: (InverseConv1d(2), Woodbury(2, (4,))),
        3: (InverseConv2d(2), Compose(InverseConv2d(2)), AffineCoupling(2, 3)),
        4: (AffineCoupling(2, 3, dimensions=3), Glow((1, 4, 4, 4), 1, 1, 2)),
    }
    for event_dim, some in layers.items():
        assert {to_torch_transform(layer).domain.event_dim for layer in some} == {event_dim}
    assert to_torch_transform(Glow((1, 4, 4, 4), 1, 1, 2)).codomain.event_dim == 1


def test_errors() -> None:
    with pytest.raises(TypeError, match="layers are modules with an inverse, got ReLU"):
        to_torch_transform(nn.ReLU())
    with pytest.raises(TypeError, match="Split gives a latent of its own: put it into a Flow"):
        to_torch_transform(Split(2))
    with pytest.raises(ValueError, match=r"events of this flow are \(1, 4, 4\), of event_dim 3, got 1"):
        to_torch_transform(Glow((1, 4, 4), 1, 1, 2), event_dim=1)
    with pytest.raises(ValueError, match=r"one context has 1 dimensions here, got the shape \(\)"):
        to_torch_transform(InverseConv2d(2), torch.tensor(1.0))
    with pytest.raises(TypeError, match="contexts are tensors, got int"):
        to_torch_transform(InverseConv2d(2), 1)
    with pytest.raises(TypeError, match="examples are tensors, got list"):
        to_torch_transform(InverseConv2d(2))([1.0])
    for name, wrong in (("event_dim", True), ("event_dim", 0), ("context_dim", "1"), ("context_dim", -1)):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*, got {wrong!r}"):
            to_torch_transform(InverseConv2d(2), **{name: wrong})
    with pytest.raises(ValueError, match=r"one example has 3 dimensions here, got the shape \(2, 3\)"):
        to_torch_transform(InverseConv2d(2))(torch.randn(2, 3))
