"""Layers in FrEIA, and FrEIA's modules as layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.adapters import from_freia, to_freia
from inverse_flow.flows import AffineCoupling, Compose, Flow, Permute, Split, Squeeze
from inverse_flow.models import InverseFlow
from inverse_flow.reversible import ReversibleSequential, reconstruction_errors

from ..flows.test_battery import CASES, CONTEXT_CHANNELS, Case
from .bijection import cases, check_bijection

pytest.importorskip("FrEIA", reason="FrEIA is not installed (extra [peers])")
from FrEIA import framework, modules


def sequence_of(case: Case, layer: nn.Module) -> Any:
    inn = framework.SequenceINN(*case.shape)
    condition = {"cond": 0, "cond_shape": (CONTEXT_CHANNELS,)} if case.uses_context else {}
    inn.append(to_freia(layer), **condition)
    return inn


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_bijection(case: Case, dtype: torch.dtype) -> None:
    inn = sequence_of(case, case.layer(dtype))

    def run(rev: bool) -> Any:
        return lambda x, context: inn(x, c=None if context is None else [context], rev=rev)

    check_bijection(case, run(False), run(True), dtype)
    x = case.images(1, dtype)
    assert inn.shapes == [case.shape, tuple(run(False)(x, case.context(1, dtype))[0].shape[1:])]


def test_layers_in_a_row() -> None:
    layers = [Squeeze(), AffineCoupling(4, 3), Permute((3, 1, 0, 2))]
    inn = framework.SequenceINN(1, 4, 4)
    for layer in layers:
        inn.append(to_freia(layer))
    x = torch.randn(2, 1, 4, 4)
    z, logdet = inn(x)
    expected, expected_logdet = Compose(*layers)(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(logdet, expected_logdet)
    assert len(list(inn.parameters())) == len(list(layers[1].parameters()))


def test_a_flow_of_several_scales() -> None:
    flow = InverseFlow((1, 8, 8), levels=2, steps=1, hidden=3).eval()
    inn = framework.SequenceINN(1, 8, 8)
    inn.append(to_freia(flow))
    assert inn.shapes[-1] == (64,)
    x = torch.rand(2, 1, 8, 8)
    z, logdet = inn(x)
    torch.testing.assert_close(flow.base.log_prob((z,)) + logdet, flow.log_prob(x))
    torch.testing.assert_close(inn(z, rev=True)[0], x)


def graph() -> Any:
    """A graph with a split, conditions, and two outputs."""
    torch.manual_seed(0)
    image = framework.InputNode(4, 2, 2, name="image")
    conditions = [framework.ConditionNode(1, name="a"), framework.ConditionNode(1, name="b")]
    coupling = CASES["split_hidden_context"].layer(torch.float32)
    affine = AffineCoupling(4, 3, context_channels=CONTEXT_CHANNELS)
    with torch.no_grad():
        for parameter in affine.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first = framework.Node(image, to_freia(affine), {}, conditions=conditions, name="affine")
    split = framework.Node(first, to_freia(coupling), {}, conditions=conditions, name="split")
    outputs = [framework.OutputNode(split.out0), framework.OutputNode(split.out1)]
    return framework.GraphINN([image, *conditions, first, split, *outputs]), affine, coupling


def test_a_graph_with_two_outputs_and_two_conditions() -> None:
    inn, affine, split = graph()
    x, conditions = torch.randn(3, 4, 2, 2), [torch.randn(3, 1), torch.randn(3, 1)]
    context = torch.cat(conditions, 1)
    z, logdet = affine(x, context)
    expected, split_logdet = split(z, context)
    outputs, given = inn(x, c=conditions)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(given, logdet + split_logdet)
    back, inverse_logdet = inn(outputs, c=conditions, rev=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -given)
    assert "affine" in str(inn.node_list[0]) + str(inn.node_list[1]) + str(inn.node_list[2]) + str(inn.node_list[3])


def test_their_numerical_jacobian_agrees() -> None:
    inn, _, _ = graph()
    inn.double()
    x, conditions = torch.randn(2, 4, 2, 2).double(), [torch.randn(2, 1).double() for _ in range(2)]
    numerical = inn.log_jacobian_numerical(x, c=conditions)
    torch.testing.assert_close(numerical.double(), inn(x, c=conditions)[1], rtol=1e-4, atol=1e-4)


def test_errors_of_nodes() -> None:
    with pytest.raises(ValueError, match=r"Squeeze has one input, got the shapes \[\(1, 2, 2\), \(1, 2, 2\)\]"):
        to_freia(Squeeze())([(1, 2, 2), (1, 2, 2)])
    module = to_freia(Squeeze())([(1, 2, 2)])
    with pytest.raises(ValueError, match=r"takes 1 tensor\(s\) and 0 condition\(s\) here, got 1 and 1"):
        module([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match=r"takes 2 tensor\(s\) and 0 condition\(s\) here, got 1 and 0"):
        to_freia(Split(2))([(2, 2, 2)])([torch.zeros(1, 1, 2, 2)], rev=True)
    with pytest.raises(TypeError, match="layers are modules with an inverse, got ReLU"):
        to_freia(nn.ReLU())


# Their modules as layers.


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def sequence(depth: int = 3, *, condition: bool = False) -> Any:
    torch.manual_seed(0)
    inn = framework.SequenceINN(6)
    given = {"cond": 0, "cond_shape": (2,)} if condition else {}
    for _ in range(depth):
        inn.append(modules.ActNorm)
        inn.append(modules.PermuteRandom, seed=1)
        inn.append(modules.AllInOneBlock, subnet_constructor=subnet, **given)
    return inn.double()


@pytest.mark.parametrize("condition", [False, True])
def test_a_sequence_is_a_layer(condition: bool) -> None:
    inn = sequence(condition=condition)
    x = torch.randn(4, 6, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64) if condition else None
    given = [context] if condition else None
    inn(x, c=given)  # ActNorm initialises itself
    layer = from_freia(inn)
    z, logdet = layer(x, context)
    expected, expected_logdet = inn(x, c=given)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(logdet, expected_logdet)
    back, inverse_logdet = layer.inverse(z, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    assert layer.uses_context == condition
    assert {id(p) for p in layer.parameters()} == {id(p) for p in inn.parameters()}


@pytest.mark.parametrize("condition", [False, True])
def test_gradients_are_those_of_the_stored_path(condition: bool) -> None:
    inn = sequence(condition=condition)
    x = torch.randn(4, 6, dtype=torch.float64)
    context = torch.randn(4, 2, dtype=torch.float64) if condition else None
    inn(x, c=[context] if condition else None)
    chain = ReversibleSequential(from_freia(inn))
    assert len(reconstruction_errors(chain, x, context)) == 9

    def gradients(run: Any) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        z, logdet = run(leaf)
        loss = (torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view_as(z) * z).sum() + (logdet * logdet).sum()
        return torch.autograd.grad(loss, [leaf, *(p for p in inn.parameters() if p.requires_grad)])

    stored = gradients(lambda leaf: inn(leaf, c=[context] if condition else None))
    torch.testing.assert_close(gradients(lambda leaf: chain(leaf, context)), stored)


def test_a_module_that_changes_the_shape() -> None:
    layer = from_freia(modules.HaarDownsampling([(1, 4, 4)]))
    flow = Flow([layer, AffineCoupling(4, 3)], (1, 4, 4))
    assert flow.latent_shapes == ((4, 2, 2),)
    x = torch.randn(2, 1, 4, 4)
    _, logdet = layer(x)
    assert logdet.shape == (2,)
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x)


def test_there_and_back() -> None:
    case = CASES["affine_coupling_context"]
    layer, x, context = case.layer(), case.images(), case.context()
    again = from_freia(to_freia(layer)([case.shape], dims_c=[(CONTEXT_CHANNELS,)]))
    torch.testing.assert_close(again(x, context), layer(x, context))


def test_what_is_no_layer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"one input and at most one context, Concat has the inputs \[\(1,\), \(1,\)\]"
    ):
        from_freia(modules.Concat([(1,), (1,)]))
    inn = framework.SequenceINN(6)
    for i in range(2):
        inn.append(modules.AllInOneBlock, cond=i, cond_shape=(2,), subnet_constructor=subnet)
    with pytest.raises(ValueError, match="several conditions"):
        from_freia(inn)
    with pytest.raises(ValueError, match="AllInOneBlock has a condition, and no context was given"):
        from_freia(inn[0])(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="a layer has one output, Split gives 2"):
        from_freia(modules.Split([(2,)]))(torch.zeros(1, 2))
