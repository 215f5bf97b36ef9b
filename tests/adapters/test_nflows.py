"""nflows takes the layers as they are, and its stacks are rebuilt layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.flows import AffineCoupling, Flow, Permute, Squeeze
from inverse_flow.models import InverseFlow
from inverse_flow.reversible import ReversibleSequential, reconstruction_errors

from ..flows.test_battery import CASES, CONTEXT_CHANNELS, Case
from .bijection import cases, check_bijection

pytest.importorskip("nflows", reason="nflows is not installed (extra [peers])")
from nflows import transforms
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow as TheirFlow
from nflows.nn.nets import ResidualNet

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bijection(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype)
    composite = transforms.CompositeTransform([layer.flatten() if isinstance(layer, Flow) else layer])
    check_bijection(case, composite, composite.inverse, dtype)


def test_layers_in_a_row() -> None:
    layers = [Squeeze(), AffineCoupling(4, 3), Permute((3, 1, 0, 2))]
    theirs = TheirFlow(transforms.CompositeTransform(layers), StandardNormal((4, 2, 2)))
    x, log_prob = theirs.sample_and_log_prob(3)
    assert x.shape == (3, 1, 4, 4)
    torch.testing.assert_close(log_prob, Flow(layers, (1, 4, 4)).log_prob(x))
    torch.testing.assert_close(theirs.log_prob(x), log_prob)


def test_a_flow_of_several_scales_is_a_transform() -> None:
    flow = InverseFlow((1, 8, 8), levels=2, steps=1, hidden=3).eval()
    theirs = TheirFlow(flow.flatten(), StandardNormal((64,)))
    x = theirs.sample(3)
    torch.testing.assert_close(theirs.log_prob(x), flow.log_prob(x))


def test_the_context_reaches_the_layer() -> None:
    case = CASES["affine_coupling_context"]
    layer, context = case.layer(torch.float32), torch.randn(2, CONTEXT_CHANNELS)
    theirs = TheirFlow(layer, StandardNormal(case.shape))
    x = theirs.sample(3, context)
    assert x.shape == (2, 3, *case.shape)
    own = Flow([layer], case.shape)
    expected = own.log_prob(x[:, 0], context)
    torch.testing.assert_close(theirs.log_prob(x[:, 0], context), expected)


# Rebuilding.


def coupling(i: int, context: int | None) -> Any:
    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=8, context_features=context, num_blocks=1)

    return transforms.AffineCouplingTransform([(i + j) % 2 for j in range(6)], net)


def stack(context: int | None = None, depth: int = 3) -> Any:
    """What people build: normalisation, a linear layer, a coupling, within one another."""
    torch.manual_seed(0)
    steps = [
        transforms.CompositeTransform(
            [
                transforms.ActNorm(6),
                transforms.InverseTransform(transforms.LULinear(6)),
                transforms.RandomPermutation(6),
                coupling(i, context),
            ]
        )
        for i in range(depth)
    ]
    return transforms.CompositeTransform(steps).double()


def gradients(run: Any, module: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(), *([] if context is None else [context.clone().requires_grad_()])]
    z, logdet = run(leaves[0], *leaves[1:])
    weights = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view_as(z)
    loss = (weights * z).sum() + (logdet * torch.arange(1, len(logdet) + 1)).sum()
    return (z, logdet, *torch.autograd.grad(loss, [*leaves, *module.parameters()]))


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_the_stored_path(context: int | None, inverse: bool) -> None:
    composite = stack(context)
    x = torch.randn(4, 6, dtype=torch.float64)
    given = None if context is None else torch.randn(4, context, dtype=torch.float64)
    composite(x, given)  # ActNorm initialises itself
    chain = ReversibleSequential(composite)
    stored = gradients(composite.inverse if inverse else composite, composite, x, given)
    rebuilt = gradients(chain.inverse if inverse else chain, composite, x, given)
    for ours, theirs in zip(rebuilt, stored, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_first_batch_initialises_as_ever() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    stored, rebuilt = stack(), stack()
    rebuilt.load_state_dict(stored.state_dict())
    for ours, theirs in zip(
        gradients(ReversibleSequential(rebuilt), rebuilt, x, None), gradients(stored, stored, x, None), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Of the storages kept for the backward pass."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    known = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    return sum(storage.nbytes() for key, storage in found.items() if key not in known)


def test_memory_does_not_grow_with_depth() -> None:
    x = torch.randn(64, 6, dtype=torch.float64)
    stored, rebuilt = [], []
    for depth in (2, 8):
        composite = stack(depth=depth).eval()
        stored.append(kept_bytes(composite, x))
        rebuilt.append(kept_bytes(ReversibleSequential(composite), x))
    assert stored[1] > 3 * stored[0]
    assert rebuilt[1] == rebuilt[0] < stored[0] / 10


def test_it_is_taken_apart_unless_it_runs_otherwise() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    composite = stack(depth=2).eval()
    paths = list(reconstruction_errors(composite, x))
    assert len(paths) == 8
    assert paths[1] == "_transforms.0._transforms.1._transform"
    assert isinstance(composite.get_submodule(paths[1]), transforms.LULinear)

    class Own(transforms.CompositeTransform):  # type: ignore[misc, name-defined]
        def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, logdet = super().forward(inputs, context)
            return z + 1, logdet

        def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().inverse(inputs - 1, context)

    own = Own(list(composite._transforms)).eval()
    assert len(reconstruction_errors(own, x)) == 1
    torch.testing.assert_close(ReversibleSequential(own)(x)[0], composite(x)[0] + 1)
    composite.register_forward_hook(lambda *_: None)
    assert len(reconstruction_errors(composite, x)) == 1
