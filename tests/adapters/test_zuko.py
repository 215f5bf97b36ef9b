"""Layers and flows in zuko."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from inverse_flow import InverseConv2d
from inverse_flow.adapters import to_zuko
from inverse_flow.flows import AffineCoupling, Flow, Permute, Squeeze
from inverse_flow.models import ConditionalFlow, Glow, InverseFlow, LabelContext

from ..flows.test_battery import CASES, CONTEXT_CHANNELS, Case
from .bijection import cases, check_bijection

zuko = pytest.importorskip("zuko", reason="zuko is not installed (extra [peers])")


def of_one_event(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, scale), loc.dim())


def normal(*shape: int) -> object:
    return zuko.lazy.UnconditionalDistribution(of_one_event, torch.zeros(shape), torch.ones(shape), buffer=True)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bijection(case: Case, dtype: torch.dtype) -> None:
    lazy = to_zuko(case.layer(dtype), event_dim=len(case.shape))

    def forward(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return lazy(context).call_and_ladj(x)

    def inverse(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return lazy(context).inv.call_and_ladj(z)

    check_bijection(case, forward, inverse, dtype)


def test_layers_in_a_row() -> None:
    layers = [Squeeze(), AffineCoupling(4, 3), Permute((3, 1, 0, 2))]
    theirs = zuko.flows.Flow([to_zuko(layer) for layer in layers], normal(4, 2, 2))
    flow = Flow(layers, (1, 4, 4))
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(theirs().log_prob(x), flow.log_prob(x))
    assert theirs().sample((3,)).shape == x.shape
    assert len(list(theirs.parameters())) == len(list(flow.parameters()))


def test_a_flow_of_several_scales_is_a_distribution() -> None:
    flow = InverseFlow((1, 8, 8), levels=2, steps=1, hidden=3).eval()
    theirs = zuko.flows.Flow(to_zuko(flow), normal(64))
    assert theirs().event_shape == (1, 8, 8)
    x, log_prob = theirs().rsample_and_log_prob((2, 3))
    assert x.shape == (2, 3, 1, 8, 8)
    torch.testing.assert_close(log_prob.flatten(), flow.log_prob(x.flatten(0, 1)))
    torch.testing.assert_close(theirs().log_prob(x), log_prob)


def test_the_context_reaches_the_layer() -> None:
    case = CASES["affine_coupling_context"]
    layer, x, context = case.layer(torch.float32), case.images(3, torch.float32), torch.randn(3, CONTEXT_CHANNELS)
    theirs = zuko.flows.Flow([to_zuko(layer), to_zuko(InverseConv2d(case.shape[0]))], normal(*case.shape))
    own = Flow([layer, theirs.transform.transforms[1].layer], case.shape)
    torch.testing.assert_close(theirs(context).log_prob(x), own.log_prob(x, context))
    samples = theirs(context).sample((5,))
    assert samples.shape == (5, 3, *case.shape)
    torch.testing.assert_close(theirs(context).log_prob(samples)[1], own.log_prob(samples[1], context))


def test_labels_as_context() -> None:
    flow = Glow((1, 4, 4), levels=1, steps=1, hidden=3, context_channels=CONTEXT_CHANNELS)
    model = ConditionalFlow(flow, LabelContext(5, CONTEXT_CHANNELS)).eval()
    lazy, labels, x = to_zuko(model, context_dim=0), torch.tensor([4, 0, 2]), torch.rand(3, 1, 4, 4)
    z, logdet = lazy(labels).call_and_ladj(x)
    torch.testing.assert_close(flow.base.log_prob((z,)) + logdet, model.log_prob(x, labels))


def test_copies() -> None:
    lazy, x = to_zuko(InverseConv2d(2)), torch.randn(1, 2, 3, 3)
    for twin in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        torch.testing.assert_close(twin()(x), lazy()(x))
