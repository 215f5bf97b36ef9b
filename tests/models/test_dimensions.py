"""Models of signals and volumes: they train, invert, and their log-determinant is that of the Jacobian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inverse_flow import InverseConv1d, InverseConv3d
from inverse_flow.flows import prepare_sampling
from inverse_flow.models import KINDS, ImageFlow, build, describe

SIGNALS, VOLUMES = (2, 32), (1, 8, 8, 8)
KIND = pytest.mark.parametrize("kind", KINDS)


def model(kind: str, shape: tuple[int, ...], **options: object) -> ImageFlow:
    options = {"levels": 2, "steps": 1, "hidden": 4} | options
    return KINDS[kind](shape, **options)


def data(shape: tuple[int, ...], batch: int = 8) -> Tensor:
    """Smooth, so that there is something to learn."""
    x = torch.randn(batch, *shape)
    for axis in range(2, x.dim()):
        x = x.cumsum(axis) / math.sqrt(shape[axis - 1])
    return x


@KIND
@pytest.mark.parametrize("shape", [SIGNALS, VOLUMES], ids=["signals", "volumes"])
def test_a_model_trains(kind: str, shape: tuple[int, ...]) -> None:
    flow = model(kind, shape)
    optimiser = torch.optim.Adam(flow.parameters(), 3e-3)
    x = data(shape)
    losses = []
    for _ in range(8):
        loss = -flow.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    latents, log_det = flow.eval()(x)
    again, minus_log_det = flow.inverse(latents)
    torch.testing.assert_close(again, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(minus_log_det, -log_det, rtol=1e-4, atol=1e-3)
    assert flow.sample(3).shape == (3, *shape)
    with torch.no_grad():
        prepared = prepare_sampling(flow).inverse(latents)[0]
    torch.testing.assert_close(prepared, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inverse_conv", ["emerging", "periodic", "exponential", "woodbury"])
@pytest.mark.parametrize("shape", [(2, 8), (1, 4, 4, 4)], ids=["signals", "volumes"])
def test_other_convolutions_of_signals_and_volumes(inverse_conv: str, shape: tuple[int, ...]) -> None:
    flow = model("Glow", shape, inverse_conv=inverse_conv).double()
    x = data(shape).double()
    latents, log_det = flow(x)
    again, minus_log_det = flow.inverse(latents)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(minus_log_det, -log_det)


@KIND
@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 4, 2)], ids=["signals", "volumes"])
def test_the_log_determinant_is_that_of_the_jacobian(kind: str, shape: tuple[int, ...]) -> None:
    flow = model(kind, shape, levels=1).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow.eval()
    x = torch.randn(1, *shape, dtype=torch.float64)

    def latents(x: Tensor) -> Tensor:
        return torch.cat([z.flatten() for z in flow(x[None])[0]])

    jacobian = torch.autograd.functional.jacobian(latents, x[0]).reshape(x.numel(), x.numel())
    torch.testing.assert_close(flow(x)[1][0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize(("shape", "layer", "orders"), [(SIGNALS, InverseConv1d, 2), (VOLUMES, InverseConv3d, 8)])
def test_the_inverse_convolution_is_of_the_dimension(
    shape: tuple[int, ...], layer: type[torch.nn.Module], orders: int
) -> None:
    flow = model("InverseFlow", shape, kernel_size=(3,) * (len(shape) - 1))
    found = [module for module in flow.modules() if isinstance(module, layer)]
    assert len(found) == 2
    assert all(len(set(module.order)) == module.groups == orders for module in found)
    alternating = model("InverseFlow", shape, orders="alternating", steps=orders, levels=1)
    assert len({module.order for module in alternating.modules() if isinstance(module, layer)}) == orders
    assert build(describe(flow)).config == flow.config


def test_memory_efficient_training_gives_the_same_gradients() -> None:
    flow, x = model("InverseFlow", SIGNALS), data(SIGNALS)
    flow.log_prob(x)  # initialises
    found = []
    for memory_efficient in (False, True):
        flow.memory_efficient = memory_efficient
        found.append(torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
