"""Layers and flows in normflows."""

from __future__ import annotations

import pytest
import torch

from inverse_flow.adapters import to_normflows
from inverse_flow.flows import AffineCoupling, Compose, Flow, Permute, Reverse, Split, Squeeze
from inverse_flow.models import InverseFlow

from ..flows.test_battery import CASES, CONTEXT_CHANNELS, Case
from .bijection import TENSOR_CASES, cases, check_bijection

nf = pytest.importorskip("normflows", reason="normflows is not installed (extra [peers])")
from normflows.flows import flow_test  # noqa: E402  their own check


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bijection(case: Case, dtype: torch.dtype) -> None:
    flow = to_normflows(case.layer(dtype))
    check_bijection(case, flow.inverse, flow, dtype)


# Their check is for flows that keep the shape.
KEEPING = {
    name: case for name, case in TENSOR_CASES.items() if to_normflows(case.make()).input_shape(case.shape) == case.shape
}


@pytest.mark.parametrize("case", KEEPING.values(), ids=KEEPING)
def test_passes_their_own_check(case: Case) -> None:
    layer, x, context = case.layer(torch.float32), case.images(dtype=torch.float32), case.context(dtype=torch.float32)
    flow = to_normflows(layer)
    z, _ = flow.inverse(x, context)
    flow_test.FlowTest().checkForwardInverse(flow, z, context, atol=2e-5, rtol=2e-5)


def test_layers_in_a_row() -> None:
    layers = [Squeeze(), AffineCoupling(4, 3), Permute((3, 1, 0, 2))]
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian((4, 2, 2)), [to_normflows(layer) for layer in layers[::-1]]
    )
    flow = Flow(layers, (1, 4, 4))
    x, log_prob = model.sample(3)
    assert x.shape == (3, 1, 4, 4)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    torch.testing.assert_close(model.log_prob(x), flow.log_prob(x))
    torch.testing.assert_close(model.forward_kld(x), -flow.log_prob(x).mean())


def test_a_flow_of_several_scales_is_trained() -> None:
    flow = InverseFlow((1, 4, 4), levels=2, steps=1, hidden=3)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(16, trainable=False), [to_normflows(flow)])
    x = torch.rand(8, 1, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.forward_kld(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model.log_prob(x), flow.log_prob(x))


def test_the_context_reaches_the_layer() -> None:
    case = CASES["affine_coupling_context"]
    layer, x, context = case.layer(torch.float32), case.images(3, torch.float32), torch.randn(3, CONTEXT_CHANNELS)
    base = nf.distributions.DiagGaussian(case.shape, trainable=False)
    base.forward = lambda n, context=None: nf.distributions.DiagGaussian.forward(base, n)
    model = nf.ConditionalNormalizingFlow(base, [to_normflows(layer)])
    torch.testing.assert_close(model.inverse(x, context), layer(x, context)[0])
    torch.testing.assert_close(model(layer(x, context)[0], context), x)


def test_the_direction_is_theirs() -> None:
    layer = Compose(Squeeze())
    assert isinstance(to_normflows(layer), Reverse)
    assert to_normflows(to_normflows(layer)) is layer
    with pytest.raises(TypeError, match="put it into a Flow"):
        to_normflows(Split(2))
