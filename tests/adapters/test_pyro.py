"""Layers and flows in pyro."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.adapters import to_pyro
from inverse_flow.flows import AffineCoupling, Flow, Permute, Squeeze
from inverse_flow.models import InverseFlow

from ..flows.test_battery import CASES, CONTEXT_CHANNELS, Case
from .bijection import cases, check_bijection

pyro = pytest.importorskip("pyro", reason="pyro is not installed (extra [peers])")
from pyro import distributions as dist  # noqa: E402


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bijection(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype)

    def forward(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = to_pyro(layer, context, event_dim=len(case.shape))
        z = transform.inv(x)
        return z, transform.inv.log_abs_det_jacobian(x, z)

    def inverse(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = to_pyro(layer, context, event_dim=len(case.shape))
        assert transform.codomain.event_dim == len(case.shape)
        assert transform.domain.event_dim == z.dim() - 1
        x = transform(z)
        return x, transform.log_abs_det_jacobian(z, x)

    check_bijection(case, forward, inverse, dtype)


def test_layers_in_a_row() -> None:
    layers = [Squeeze(), AffineCoupling(4, 3), Permute((3, 1, 0, 2))]
    base = dist.Normal(torch.zeros(4, 2, 2), 1.0).to_event(3)
    distribution = dist.TransformedDistribution(base, [to_pyro(layer) for layer in reversed(layers)])
    assert distribution.event_shape == (1, 4, 4)
    x = distribution.sample((2, 3))
    assert x.shape == (2, 3, 1, 4, 4)
    expected = Flow(layers, (1, 4, 4)).log_prob(x.flatten(0, 1)).view(2, 3)
    torch.testing.assert_close(distribution.log_prob(x), expected)


def test_a_flow_of_several_scales_is_learned() -> None:
    """As pyro's users do it: the transform registers itself, and inference finds its parameters."""
    pyro.clear_param_store()
    flow = InverseFlow((1, 4, 4), levels=2, steps=1, hidden=3)
    transform = to_pyro(flow)
    assert isinstance(transform, dist.TransformModule)
    data = torch.rand(8, 1, 4, 4)

    def model(x: Tensor) -> None:
        pyro.module("flow", transform)
        density = dist.TransformedDistribution(dist.Normal(torch.zeros(16), 1.0).to_event(1), [transform])
        with pyro.plate("data", len(x)):
            pyro.sample("x", density, obs=x)

    optimizer = pyro.optim.Adam({"lr": 1e-2})
    inference = pyro.infer.SVI(model, lambda x: None, optimizer, pyro.infer.Trace_ELBO())
    losses = [inference.step(data) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert losses[-1] > inference.evaluate_loss(data)
    assert inference.evaluate_loss(data) == pytest.approx(-flow.log_prob(data).sum().item(), rel=1e-5)
    pyro.clear_param_store()


def test_the_context_reaches_the_layer() -> None:
    case = CASES["affine_coupling_context"]
    layer, x, context = case.layer(torch.float32), case.images(3, torch.float32), torch.randn(3, CONTEXT_CHANNELS)
    base = dist.Normal(torch.zeros(3, *case.shape), 1.0).to_event(3)
    distribution = dist.TransformedDistribution(base, [to_pyro(layer, context)])
    torch.testing.assert_close(distribution.log_prob(x), Flow([layer], case.shape).log_prob(x, context))
    assert distribution.sample().shape == x.shape


def test_copies_and_names() -> None:
    transform, z = to_pyro(InverseConv2d(2)), torch.randn(1, 2, 3, 3, requires_grad=True)
    x = transform(z)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        torch.testing.assert_close(twin(z), x)
    assert isinstance(transform, nn.Module)
    assert [name for name, _ in transform.named_parameters()] == ["layer.layer.weight", "layer.layer.bias"]
    assert len({transform, transform}) == 1
