"""Whole flows that rebuild instead of storing: every level, both directions, a summary network before them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import (
    ActNorm,
    AffineCoupling,
    Compose,
    Conv1x1,
    Flow,
    Logit,
    NonFiniteError,
    Reverse,
    Split,
    Squeeze,
    detect_nonfinite,
)
from inverse_flow.reversible import ReconstructionError, ReversibleSequential, reconstruction_errors

CONTEXT_CHANNELS = 2


def three_level_flow() -> Flow:
    """Parameters all over the place, in float64."""
    torch.manual_seed(0)
    context = {"context_channels": CONTEXT_CHANNELS}
    layers: list[nn.Module] = [
        Logit(0.05),
        Squeeze(),
        Compose(InverseConv2d(4), ActNorm(4), Conv1x1(4), AffineCoupling(4, 3, **context)),
        Split(4, **context),
        Squeeze(),
        ReversibleSequential(Reverse(InverseConv2d(8)), ActNorm(8)),
        Split(8, prior="standard"),
        AffineCoupling(4, 3, **context),
    ]
    flow = Flow(layers, (1, 8, 4)).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def pair() -> tuple[Flow, Flow]:
    """The same flow, storing and rebuilding."""
    flow = three_level_flow()
    twin = copy.deepcopy(flow)
    twin.memory_efficient = True
    return flow, twin


def assert_same_gradients(flow: nn.Module, twin: nn.Module) -> None:
    for (name, wanted), found in zip(flow.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_density_with_a_summary_network() -> None:
    torch.manual_seed(1)
    x, observed = torch.rand(3, 1, 8, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    summary = nn.Linear(5, CONTEXT_CHANNELS).double()
    summaries = [summary, copy.deepcopy(summary)]
    flows = pair()
    for flow, network in zip(flows, summaries, strict=True):
        images = x.clone().requires_grad_()
        flow.log_prob(images, network(observed)).sum().backward()
        flow.images_grad = images.grad
    assert_same_gradients(*flows)
    assert_same_gradients(*summaries)
    torch.testing.assert_close(flows[1].images_grad, flows[0].images_grad)


def test_training_through_sampling() -> None:
    flows = pair()
    context = torch.randn(3, CONTEXT_CHANNELS, dtype=torch.float64)
    context_grads = []
    for flow in flows:
        given = context.clone().requires_grad_()
        generator = torch.Generator().manual_seed(4)
        flow.base.double()
        x, log_prob = flow.sample_and_log_prob(3, given, generator=generator)
        (log_prob.sum() + x.square().sum()).backward()
        context_grads.append(given.grad)
    assert_same_gradients(*flows)
    torch.testing.assert_close(*context_grads)


def test_gradients_of_latents() -> None:
    flows = pair()
    context = torch.randn(2, CONTEXT_CHANNELS, dtype=torch.float64)
    latents = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in flows[0].latent_shapes]
    found = []
    for flow in flows:
        x, logdet = flow.inverse(latents, context)
        found.append(torch.autograd.grad(x.square().sum() + logdet.sum(), latents))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("used", ["first latent", "last latent", "logdet"])
def test_a_loss_that_uses_one_result_alone(used: str) -> None:
    flows = pair()
    x, context = torch.rand(2, 1, 8, 4, dtype=torch.float64), torch.randn(2, CONTEXT_CHANNELS, dtype=torch.float64)
    leaves = []
    for flow in flows:
        images = x.clone().requires_grad_()
        latents, logdet = flow(images, context)
        chosen: Tensor = {"first latent": latents[0], "last latent": latents[-1], "logdet": logdet}[used]
        (chosen**2).sum().backward()
        leaves.append(images.grad)
    torch.testing.assert_close(leaves[1], leaves[0])
    for wanted, found in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        missing = torch.zeros_like(wanted)
        mine = missing if found.grad is None else found.grad
        torch.testing.assert_close(mine, missing if wanted.grad is None else wanted.grad)


def test_options_of_a_flow() -> None:
    x = torch.rand(2, 1, 4, 4)
    layers = [Squeeze(), ActNorm(4), Conv1x1(4), AffineCoupling(4, 3)]
    flow = Flow(layers, (1, 4, 4), memory_efficient=True, anchors=2, tolerance=1e-30)
    with pytest.raises(ReconstructionError, match=r"above the tolerance of 1\.0e-30"):
        flow.log_prob(x).sum().backward()
    with pytest.raises(ValueError, match="anchors must be"):
        Flow(layers, (1, 4, 4), anchors=-1)


def test_the_first_layer_with_a_nan_is_named_as_ever() -> None:
    flow, twin = pair()
    x, context = torch.rand(2, 1, 8, 4, dtype=torch.float64), torch.randn(2, CONTEXT_CHANNELS, dtype=torch.float64)
    paths = []
    for model in (flow, twin):
        with torch.no_grad():
            model.layers[2].layers[3].conditioner.layers[0].bias.fill_(float("nan"))
        with detect_nonfinite(), pytest.raises(NonFiniteError) as caught:
            model.log_prob(x, context)
        paths.append(caught.value.path)
    assert paths == ["layers.2.layers.3"] * 2


def test_reconstruction_errors_of_a_flow() -> None:
    flow = three_level_flow()
    x, context = torch.rand(2, 1, 8, 4, dtype=torch.float64), torch.randn(2, CONTEXT_CHANNELS, dtype=torch.float64)
    errors = reconstruction_errors(flow, x, context)
    assert list(errors)[:3] == ["layers.0", "layers.1", "layers.2.layers.0"]
    assert "layers.5.layers.0.layer" in errors
    assert 0 < max(errors.values()) < 1e-12
