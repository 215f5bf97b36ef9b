"""What every flow layer must satisfy. A new layer joins with one line in CASES.

The checks are plain functions, so that the last tests can run them on layers broken on purpose.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import InverseConv1d, InverseConv2d, InverseConv3d
from inverse_flow.flows import (
    HINT,
    IRIM,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    CheckerboardCoupling,
    Compose,
    Conv1x1,
    EmergingConv,
    ExponentialConv,
    Flow,
    FlowLayer,
    HaarSqueeze,
    Householder,
    Hyperbolic,
    LeakyReLU,
    Logit,
    PeriodicConv,
    Permute,
    ResNet,
    Reverse,
    SmoothLeakyReLU,
    SmoothTanh,
    SplineActivation,
    SplineCoupling,
    Split,
    Squeeze,
    WaveletSqueeze,
    Woodbury,
)
from inverse_flow.models import InverseFlow

FOUR_ORDERS = ("top_left", "top_right", "bottom_left", "bottom_right")
CONTEXT_CHANNELS = 2


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    uses_context: bool = False
    unit_interval: bool = False

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A layer with nothing left at its initial value, so that no term of a formula is hidden by a zero."""
        torch.manual_seed(0)
        layer = self.make().to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return layer.eval()

    def images(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        draw = torch.rand if self.unit_interval else torch.randn
        return draw(batch, *self.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)

    def context(self, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor | None:
        if not self.uses_context:
            return None
        return torch.randn(batch, CONTEXT_CHANNELS, generator=torch.Generator().manual_seed(2), dtype=dtype)


def volume_flow() -> Flow:
    """A scale of Glow and a scale of HINT, on volumes."""
    glow = Compose(ActNorm(8), AffineCoupling(8, 0, dimensions=3))
    hint = Compose(Householder(4, 1), HINT(4, 0, least_channels=3, dimensions=3))
    return Flow([HaarSqueeze(), glow, Split(8, dimensions=3), hint], (1, 2, 2, 2))


def small_flow() -> Flow:
    return Flow([Squeeze(), ActNorm(4), Split(4, context_channels=CONTEXT_CHANNELS), Conv1x1(2)], (1, 4, 2))


# Daubechies' wavelet of two vanishing moments.
DB2 = [(1 + 3**0.5) / 32**0.5, (3 + 3**0.5) / 32**0.5, (3 - 3**0.5) / 32**0.5, (1 - 3**0.5) / 32**0.5]

with_context = {"context_channels": CONTEXT_CHANNELS}

CASES = {
    "inverse_conv": Case(partial(InverseConv2d, 2), (2, 3, 5)),
    "inverse_conv_plu": Case(partial(InverseConv2d, 3, (2, 3), corner="plu"), (3, 4, 3)),
    "inverse_conv_four_orders": Case(partial(InverseConv2d, 4, groups=4, order=FOUR_ORDERS), (4, 3, 3)),
    "inverse_conv_bounded": Case(partial(InverseConv2d, 3, corner="plu", max_row_sum=0.1), (3, 3, 2)),
    "inverse_conv_signal": Case(partial(InverseConv1d, 2, order="right"), (2, 5)),
    "inverse_conv_volume": Case(partial(InverseConv3d, 2, 2, corner="plu", order="back_top_right"), (2, 2, 2, 3)),
    "inverse_conv_dilated": Case(partial(InverseConv2d, 2, 2, dilation=2), (2, 3, 4)),
    "actnorm": Case(partial(ActNorm, 3), (3, 3, 5)),
    "actnorm_one_pixel": Case(partial(ActNorm, 1), (1, 1, 1)),
    "conv1x1": Case(partial(Conv1x1, 5), (5, 3, 1)),
    "conv1x1_one_channel": Case(partial(Conv1x1, 1), (1, 2, 3)),
    "additive_coupling": Case(partial(AdditiveCoupling, 4, 6), (4, 3, 2)),
    "affine_coupling": Case(partial(AffineCoupling, 4, 6), (4, 3, 2)),
    "affine_coupling_exp_clamp": Case(partial(AffineCoupling, 3, 6, scale="exp_clamp"), (3, 2, 2)),
    "affine_coupling_sigmoid": Case(partial(AffineCoupling, 3, 6, scale="sigmoid"), (3, 2, 2)),
    "affine_coupling_softplus": Case(partial(AffineCoupling, 3, 6, scale="softplus"), (3, 2, 2)),
    "affine_coupling_exp": Case(partial(AffineCoupling, 3, 6, scale="exp"), (3, 2, 2)),
    "affine_coupling_odd": Case(partial(AffineCoupling, 5, 6), (5, 1, 3)),
    "affine_coupling_context": Case(partial(AffineCoupling, 3, 6, **with_context), (3, 2, 3), uses_context=True),
    "squeeze": Case(Squeeze, (3, 4, 2)),
    "squeeze_3": Case(partial(Squeeze, 3), (1, 3, 6)),
    "squeeze_patch": Case(partial(Squeeze, pattern="patch"), (2, 4, 6)),
    "squeeze_column": Case(partial(Squeeze, pattern="column"), (2, 4, 2)),
    "logit": Case(partial(Logit, 0.05), (2, 3, 2), unit_interval=True),
    "permute": Case(partial(Permute, (2, 0, 1)), (3, 2, 3)),
    "split_standard": Case(partial(Split, 3, prior="standard"), (3, 3, 2)),
    "split_conditional": Case(partial(Split, 5), (5, 3, 2)),
    "split_hidden_context": Case(partial(Split, 4, hidden=3, **with_context), (4, 2, 2), uses_context=True),
    "checkerboard_affine": Case(partial(CheckerboardCoupling, 2, 6), (2, 3, 4)),
    "checkerboard_additive": Case(partial(CheckerboardCoupling, 1, 6, kind="additive", parity=1), (1, 3, 2)),
    "checkerboard_sigmoid": Case(partial(CheckerboardCoupling, 1, 6, scale="sigmoid"), (1, 3, 2)),
    "checkerboard_context": Case(partial(CheckerboardCoupling, 1, 6, **with_context), (1, 3, 2), uses_context=True),
    "affine_coupling_kept": Case(partial(AffineCoupling, 4, 6, kept=1), (4, 2, 3)),
    "additive_coupling_kept": Case(partial(AdditiveCoupling, 4, 6, kept=3), (4, 2, 3)),
    "spline": Case(partial(SplineActivation, 2, bound=1.5), (2, 3, 4)),
    "linear_spline": Case(partial(SplineActivation, 2, kind="linear", bins=3, bound=1.5), (2, 3, 4)),
    "spline_coupling": Case(partial(SplineCoupling, 4, 6, bins=3, bound=1.5), (4, 3, 2)),
    "spline_coupling_context": Case(partial(SplineCoupling, 3, 6, **with_context), (3, 2, 3), uses_context=True),
    "householder": Case(partial(Householder, 5), (5, 3, 1)),
    "householder_few": Case(partial(Householder, 4, 2), (4, 2, 3)),
    "householder_one_channel": Case(partial(Householder, 1), (1, 2, 3)),
    "haar": Case(HaarSqueeze, (3, 4, 2)),
    "haar_by_channel": Case(partial(HaarSqueeze, "channel"), (3, 2, 4)),
    "wavelet": Case(partial(WaveletSqueeze, DB2), (2, 4, 6)),
    "wavelet_by_channel": Case(partial(WaveletSqueeze, DB2, "channel"), (3, 2, 4)),
    "hint": Case(partial(HINT, 5, 0), (5, 2, 3)),
    "hint_shallow": Case(partial(HINT, 4, 3, least_channels=3), (4, 2, 2)),
    "hint_additive": Case(partial(HINT, 4, coupling=partial(AdditiveCoupling, hidden=0)), (4, 2, 2)),
    "hint_context": Case(partial(HINT, 3, 0, **with_context), (3, 2, 2), uses_context=True),
    "irim": Case(partial(IRIM, 4, 5), (4, 2, 3)),
    "irim_context": Case(partial(IRIM, 3, 5, reflections=2, **with_context), (3, 2, 2), uses_context=True),
    "hyperbolic": Case(partial(Hyperbolic, 6), (6, 3, 2)),
    "hyperbolic_hidden": Case(partial(Hyperbolic, 2, 5, step_size=0.3, kernel_size=5), (2, 3, 2)),
    "residual_coupling": Case(
        lambda: AffineCoupling(3, conditioner=ResNet(2, 3, 2, blocks=1, **with_context)), (3, 2, 3), uses_context=True
    ),
    "actnorm_volume": Case(partial(ActNorm, 2), (2, 2, 3, 2)),
    "conv1x1_volume": Case(partial(Conv1x1, 3), (3, 2, 1, 3)),
    "additive_coupling_volume": Case(partial(AdditiveCoupling, 3, 0, dimensions=3), (3, 2, 3, 1)),
    "affine_coupling_volume": Case(
        partial(AffineCoupling, 2, 2, dimensions=3, **with_context), (2, 2, 1, 2), uses_context=True
    ),
    "squeeze_volume": Case(Squeeze, (1, 4, 2, 2)),
    "permute_volume": Case(partial(Permute, (2, 0, 1)), (3, 2, 1, 2)),
    "split_volume": Case(partial(Split, 3, dimensions=3), (3, 2, 1, 2)),
    "householder_volume": Case(partial(Householder, 3), (3, 2, 1, 3)),
    "haar_volume": Case(HaarSqueeze, (2, 2, 4, 2)),
    "haar_volume_by_channel": Case(partial(HaarSqueeze, "channel"), (2, 2, 2, 2)),
    "wavelet_volume": Case(partial(WaveletSqueeze, DB2), (1, 2, 4, 2)),
    "squeeze_volume_patch": Case(partial(Squeeze, pattern="patch"), (1, 4, 2, 2)),
    "squeeze_volume_column": Case(partial(Squeeze, pattern="column"), (1, 4, 2, 2)),
    "irim_volume": Case(partial(IRIM, 3, 2, dimensions=3), (3, 2, 1, 2)),
    "hint_volume": Case(partial(HINT, 4, 0, dimensions=3), (4, 2, 1, 2)),
    "hyperbolic_volume": Case(partial(Hyperbolic, 2, dimensions=3), (2, 2, 3, 2)),
    "residual_coupling_volume": Case(
        lambda: AdditiveCoupling(2, conditioner=ResNet(1, 2, 1, blocks=1, dimensions=3)), (2, 2, 1, 2)
    ),
    "volume_flow": Case(volume_flow, (1, 2, 2, 2)),
    "checkerboard_volume": Case(partial(CheckerboardCoupling, 1, 2, dimensions=3), (1, 2, 1, 3)),
    "spline_volume": Case(partial(SplineActivation, 2, bins=3), (2, 2, 1, 3)),
    "actnorm_vector": Case(partial(ActNorm, 3), (3,)),
    "conv1x1_vector": Case(partial(Conv1x1, 4), (4,)),
    "householder_vector": Case(partial(Householder, 3), (3,)),
    "permute_vector": Case(partial(Permute, (2, 0, 1)), (3,)),
    "additive_coupling_vector": Case(partial(AdditiveCoupling, 3, 4, dimensions=0), (3,)),
    "affine_coupling_vector": Case(
        partial(AffineCoupling, 3, 4, dimensions=0, **with_context), (3,), uses_context=True
    ),
    "spline_vector": Case(partial(SplineActivation, 2, bins=3), (2,)),
    "spline_coupling_vector": Case(partial(SplineCoupling, 4, 6, bins=3, dimensions=0), (4,)),
    "spline_coupling_kept": Case(partial(SplineCoupling, 3, 4, bins=3, kept=1, dimensions=0), (3,)),
    "irim_vector": Case(partial(IRIM, 3, 4, dimensions=0), (3,)),
    "split_vector": Case(partial(Split, 3, dimensions=0), (3,)),
    "hint_vector": Case(partial(HINT, 5, 3, dimensions=0), (5,)),
    "residual_coupling_vector": Case(
        lambda: AffineCoupling(3, conditioner=ResNet(2, 3, 2, blocks=1, dimensions=0)), (3,)
    ),
    "actnorm_signal": Case(partial(ActNorm, 2), (2, 5)),
    "conv1x1_signal": Case(partial(Conv1x1, 3), (3, 4)),
    "affine_coupling_signal": Case(
        partial(AffineCoupling, 4, 3, dimensions=1, **with_context), (4, 3), uses_context=True
    ),
    "squeeze_signal": Case(Squeeze, (2, 4)),
    "haar_signal": Case(HaarSqueeze, (2, 4)),
    "checkerboard_signal": Case(partial(CheckerboardCoupling, 2, 3, dimensions=1), (2, 5)),
    "split_signal": Case(partial(Split, 3, dimensions=1), (3, 4)),
    "hyperbolic_signal": Case(partial(Hyperbolic, 4, dimensions=1), (4, 5)),
    "emerging": Case(partial(EmergingConv, 3), (3, 3, 4)),
    "emerging_volume": Case(partial(EmergingConv, 2, (1, 2, 2), corner="unit_triangular", dimensions=3), (2, 2, 3, 2)),
    "periodic": Case(partial(PeriodicConv, 3), (3, 4, 3)),
    "periodic_even": Case(partial(PeriodicConv, 2, (2, 4)), (2, 3, 4)),
    "periodic_signal": Case(partial(PeriodicConv, 2, dimensions=1), (2, 5)),
    "periodic_volume": Case(partial(PeriodicConv, 1, 2, dimensions=3), (1, 2, 3, 3)),
    "exponential": Case(partial(ExponentialConv, 3), (3, 3, 4)),
    "exponential_small_norm": Case(partial(ExponentialConv, 2, (1, 5), norm=0.3), (2, 2, 3)),
    "exponential_signal": Case(partial(ExponentialConv, 2, dimensions=1), (2, 5)),
    "exponential_volume": Case(partial(ExponentialConv, 1, dimensions=3), (1, 2, 3, 2)),
    "woodbury": Case(partial(Woodbury, 3, (3, 2), 2), (3, 3, 2)),
    "woodbury_signal": Case(partial(Woodbury, 2, (5,)), (2, 5)),
    "leaky_relu": Case(partial(LeakyReLU, 3), (3, 2, 3)),
    "leaky_relu_vector": Case(partial(LeakyReLU, 3), (3,)),
    "smooth_leaky_relu": Case(SmoothLeakyReLU, (2, 3, 2)),
    "smooth_tanh": Case(partial(SmoothTanh, 0.2), (2, 3, 2)),
    "reverse": Case(lambda: Reverse(Squeeze()), (4, 2, 3)),
    "reverse_affine": Case(lambda: Reverse(AffineCoupling(4, 6)), (4, 2, 3)),
    "compose": Case(lambda: Compose(Squeeze(), ActNorm(4), Conv1x1(4), AffineCoupling(4, 6)), (1, 4, 2)),
    "flow": Case(small_flow, (1, 4, 2), uses_context=True),
    "inverse_flow": Case(partial(InverseFlow, (1, 4, 4), levels=2, steps=1, hidden=3), (1, 4, 4)),
}


# Some layers give several tensors: they are compared, and differentiated, as one vector per example.


def flat(value: Any) -> Tensor:
    return torch.cat([part.flatten(1) for part in value], dim=1) if isinstance(value, tuple) else value.flatten(1)


def unflat(vector: Tensor, like: Any) -> Any:
    if not isinstance(like, tuple):
        return vector.reshape(-1, *like.shape[1:])
    parts = vector.split([part[0].numel() for part in like], dim=1)
    return tuple(part.reshape(-1, *shaped.shape[1:]) for part, shaped in zip(parts, like, strict=True))


def jacobian_logdet(function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """log|det| of the autograd Jacobian of each example by itself, (B,)."""
    jacobians = [torch.autograd.functional.jacobian(lambda v: function(v[None])[0], vector) for vector in vectors]
    return torch.stack([torch.linalg.slogdet(jacobian).logabsdet for jacobian in jacobians])


# The checks.


def check_round_trips(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    layer, x, context = case.layer(dtype), case.images(dtype=dtype), case.context(dtype=dtype)
    z, forward_logdet = layer(x, context)
    back, inverse_logdet = layer.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_logdet, -forward_logdet, rtol=tolerance, atol=10 * tolerance)

    other = unflat(flat(x).flip(1), z)
    data, _ = layer.inverse(other, context)
    again, _ = layer(data, context)
    torch.testing.assert_close(flat(again), flat(other), rtol=tolerance, atol=tolerance)


def check_logdet_is_that_of_the_jacobian(case: Case) -> None:
    layer, x, context = case.layer(), case.images(), case.context()
    one = None if context is None else context[:1]
    x[1:] *= 0.7
    context = None if context is None else one.expand(len(x), -1)

    z, logdet = layer(x, context)
    expected = jacobian_logdet(lambda v: flat(layer(unflat(v, x), one)[0]), flat(x))
    torch.testing.assert_close(logdet, expected, rtol=1e-9, atol=1e-9)

    _, logdet = layer.inverse(z, context)
    expected = jacobian_logdet(lambda v: flat(layer.inverse(unflat(v, z), one)[0]), flat(z))
    torch.testing.assert_close(logdet, expected, rtol=1e-9, atol=1e-9)


def check_types(case: Case, dtype: torch.dtype, *, autocast: bool) -> None:
    layer = case.layer(torch.float32 if autocast else dtype)
    x, context = case.images(batch=3, dtype=dtype), case.context(batch=3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z, forward_logdet = layer(x, context)
        back, inverse_logdet = layer.inverse(z, context)
    assert flat(z).dtype == back.dtype == dtype
    assert flat(z).device == back.device == x.device
    for logdet in (forward_logdet, inverse_logdet):
        assert logdet.shape == (3,)
        assert logdet.dtype == torch.promote_types(dtype, torch.float32)
        assert logdet.device == x.device


def check_gradients(case: Case) -> None:
    layer, x, context = case.layer(), case.images(), case.context()
    z, _ = layer(x, context)
    names, values = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())

    def forward(vector: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        state = dict(zip(names, parameters, strict=True))
        result, logdet = torch.func.functional_call(layer, state, (unflat(vector, x), context))
        return flat(result), logdet

    torch.autograd.gradcheck(forward, (flat(x).requires_grad_(), *values), fast_mode=True)

    def inverse(vector: Tensor) -> tuple[Tensor, Tensor]:
        result, logdet = layer.inverse(unflat(vector, z), context)
        return flat(result), logdet

    torch.autograd.gradcheck(inverse, (flat(z).detach().requires_grad_(),), fast_mode=True)


def check_empty_batch(case: Case) -> None:
    layer, x, context = case.layer(), case.images(batch=0), case.context(batch=0)
    z, logdet = layer(x, context)
    back, inverse_logdet = layer.inverse(z, context)
    assert back.shape == x.shape
    assert logdet.shape == inverse_logdet.shape == (0,)


def check_context(case: Case) -> None:
    layer, x = case.layer(), case.images()
    context = torch.zeros(2, CONTEXT_CHANNELS, dtype=x.dtype)
    assert layer.uses_context == case.uses_context
    if isinstance(layer, Flow) and not case.uses_context:
        with pytest.raises(ValueError, match="no layer of this flow uses a context"):
            layer(x, context)
        return
    z = flat(layer(x, context)[0])
    torch.testing.assert_close(flat(layer(x, context=context)[0]), z, rtol=0, atol=0)
    changed = flat(layer(x, context + 1)[0])
    assert torch.equal(changed, z) != case.uses_context
    back, _ = layer.inverse(layer(x, context + 1)[0], context=context + 1)
    torch.testing.assert_close(back, x)


def check_rebuilding(case: Case) -> None:
    """The gradients of a flow of this layer are the same whether it stores activations or rebuilds them."""
    layer, x, context = case.layer(), case.images().requires_grad_(), case.context()
    context = None if context is None else context.requires_grad_()
    leaves = [x, *([] if context is None else [context]), *layer.parameters()]
    found = []
    for memory_efficient in (True, False):
        if isinstance(layer, Flow):
            layer.memory_efficient = memory_efficient
            result, logdet = layer(x, context)
        else:
            result, logdet = Flow([layer], case.shape, memory_efficient=memory_efficient)(x, context)
        values = flat((*result, logdet[:, None]))
        weights = torch.linspace(0.5, 1.5, values.numel(), dtype=x.dtype).view(values.shape)
        found.append(torch.autograd.grad((weights * values).sum(), leaves, allow_unused=True))
    for rebuilt, stored in zip(*found, strict=True):
        zeros = x.new_zeros(()) if stored is None else torch.zeros_like(stored)
        torch.testing.assert_close(zeros if rebuilt is None else rebuilt, zeros if stored is None else stored)


def check_rebuilding_under_autocast(case: Case) -> None:
    """Rebuilding finds gradients as exact as those of stored activations: in its backward pass autocast is off."""

    def gradients(dtype: torch.dtype, *, memory_efficient: bool) -> list[Tensor]:
        layer = case.layer(torch.float32).to(dtype)
        x, context = case.images(6).to(dtype).requires_grad_(), case.context(6)
        flow = layer if isinstance(layer, Flow) else Flow([layer], case.shape)
        flow.memory_efficient = memory_efficient
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            result, logdet = flow(x, None if context is None else context.to(dtype))
        values = flat((*result, logdet[:, None]))
        weights = torch.linspace(0.5, 1.5, values.numel(), dtype=dtype).view(values.shape)
        leaves = [x, *layer.parameters()]
        found = torch.autograd.grad((weights * values).sum(), leaves, allow_unused=True, materialize_grads=True)
        return [grad.double() for grad in found]

    exact = gradients(torch.float64, memory_efficient=False)
    stored, rebuilt = (gradients(torch.float32, memory_efficient=rebuilt) for rebuilt in (False, True))
    for of_stored, of_rebuilt, true in zip(stored, rebuilt, exact, strict=True):
        allowed = 3 * (of_stored - true).abs().max() + 2e-5 * true.abs().max()
        assert (of_rebuilt - true).abs().max() <= allowed


def check_copies(case: Case) -> None:
    layer, x, context = case.layer(), case.images(), case.context()
    expected = flat(layer(x, context)[0])
    torch.manual_seed(5)
    loaded = case.make().double().eval()
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(flat(twin(x, context)[0]), expected)


def check_non_contiguous(case: Case) -> None:
    layer, x, context = case.layer(), case.images(), case.context()
    expected, expected_logdet = layer(x, context)
    padded = torch.full((len(x), *(size + 1 for size in case.shape)), float("nan"), dtype=x.dtype)
    strided = padded[(slice(None), *(slice(-1) for _ in case.shape))].copy_(x)
    for other in (strided, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        z, logdet = layer(other, context)
        torch.testing.assert_close(flat(z), flat(expected))
        torch.testing.assert_close(logdet, expected_logdet)


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_round_trips(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    check_round_trips(case, dtype, tolerance)


@cases
def test_logdet_is_that_of_the_jacobian(case: Case) -> None:
    check_logdet_is_that_of_the_jacobian(case)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_types(case: Case, dtype: torch.dtype) -> None:
    check_types(case, dtype, autocast=False)


@cases
def test_types_under_autocast(case: Case) -> None:
    check_types(case, torch.float32, autocast=True)


@cases
def test_gradients(case: Case) -> None:
    check_gradients(case)


@cases
def test_empty_batch(case: Case) -> None:
    check_empty_batch(case)


@cases
def test_context(case: Case) -> None:
    check_context(case)


@cases
def test_rebuilding(case: Case) -> None:
    check_rebuilding(case)


@cases
def test_rebuilding_under_autocast(case: Case) -> None:
    check_rebuilding_under_autocast(case)


@cases
def test_without_values(case: Case) -> None:
    """On the meta device a layer says what shapes it gives."""
    layer = case.layer(torch.float32)
    expected, _ = layer(case.images(3, torch.float32), case.context(3, torch.float32))
    layer = layer.to("meta")
    context = None if not case.uses_context else torch.empty(3, CONTEXT_CHANNELS, device="meta")
    z, logdet = layer(torch.empty(3, *case.shape, device="meta"), context)
    back, inverse_logdet = layer.inverse(z, context)
    assert flat(z).is_meta
    assert flat(z).shape == flat(expected).shape
    assert back.shape == (3, *case.shape)
    assert logdet.shape == inverse_logdet.shape == (3,)


@cases
def test_copies(case: Case) -> None:
    check_copies(case)


@cases
def test_other_parameters_for_one_call(case: Case) -> None:
    """``functional_call`` runs the layer on them, and leaves it as it was."""
    layer, x, context = case.layer(), case.images(), case.context()
    before, expected = list(layer.parameters()), layer(x, context)
    others = {name: parameter.detach() + 0.1 for name, parameter in layer.named_parameters()}
    found = torch.func.functional_call(layer, others, (x, context))
    twin = case.layer()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(others[name])
    torch.testing.assert_close(found, twin(x, context))
    assert all(one is other for one, other in zip(layer.parameters(), before, strict=True))
    torch.testing.assert_close(layer(x, context), expected)


@cases
def test_non_contiguous(case: Case) -> None:
    check_non_contiguous(case)


@cases
def test_what_is_no_batch_of_real_numbers_is_refused(case: Case) -> None:
    layer, x, context = case.layer(), case.images(), case.context()
    z, _ = layer(x, context)
    for spoil in (lambda x: None, lambda x: 3, lambda x: x.tolist(), Tensor.to_sparse, Tensor.long, lambda x: x + 1j):
        with pytest.raises((TypeError, ValueError), match=r"expects|takes|must be"):
            layer(spoil(x), context)
        with pytest.raises((TypeError, ValueError), match=r"expects|takes|must be"):
            layer.inverse(spoil(z) if isinstance(z, Tensor) else tuple(map(spoil, z)), context)
    if case.uses_context:
        for spoil in (lambda c: 3, lambda c: c.tolist(), Tensor.to_sparse, lambda c: c + 1j, Tensor.sum):
            for run, value in ((layer, x), (layer.inverse, z)):
                with pytest.raises((TypeError, ValueError), match="the context must"):
                    run(value, spoil(context))


# The checks themselves: each goes red on a layer with the fault it is there to find.


class Scale(FlowLayer):
    """z = x · exp(a): right, but for the fault that a subclass plants."""

    uses_context = False

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def logdet(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (self.log_scale.to(dtype) * x[0:1].numel()).expand(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x * self.log_scale.exp()).to(x.dtype), self.logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (z * (-self.log_scale).exp()).to(z.dtype), -self.logdet(z)


class WrongSignInInverse(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z)[0], self.logdet(z)


class NotItsInverse(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z)[0] + 1e-3, -self.logdet(z)


class WrongLogdetBothWays(Scale):
    def logdet(self, x: Tensor) -> Tensor:
        return super().logdet(x) * 0.5


class SummedLogdet(Scale):
    def logdet(self, x: Tensor) -> Tensor:
        return super().logdet(x).sum()


class LogdetInTheInputsDtype(Scale):
    def logdet(self, x: Tensor) -> Tensor:
        return super().logdet(x).to(x.dtype)


class ResultInFloat64(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.double() * self.log_scale.exp(), self.logdet(x)


class NoGradientToItsParameter(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.detach().exp(), self.logdet(x)


class NoEmptyBatch(Scale):
    def logdet(self, x: Tensor) -> Tensor:
        return (self.log_scale * x[0].numel()).expand(x.shape[0])


class WrongClosedForm(Scale):
    """Forgets the log-determinant in the gradient of its parameter."""

    def backward_from_output(self, z: Tensor, grad_z: Tensor, grad_logdet: Tensor, context: Any) -> tuple[Any, Any]:
        self.log_scale.grad = (z * grad_z).sum()
        return self.inverse(z)[0], grad_z * self.log_scale.exp()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z)


class DropsTheContext(Scale):
    """Sees the context in one direction only."""

    uses_context = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x)
        return (z if context is None else z + context[:, :1, None, None]), logdet


class StateOutsideItsStateDict(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_state = torch.rand(())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.hidden_state, self.logdet(x)


class ReadsMemoryInOrder(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x)
        return torch.as_strided(z, z.shape, z.new_empty(z.shape).stride()), logdet


@pytest.mark.parametrize(
    ("layer", "check"),
    [
        (WrongSignInInverse, partial(check_round_trips, dtype=torch.float64, tolerance=1e-12)),
        (WrongSignInInverse, check_logdet_is_that_of_the_jacobian),
        (NotItsInverse, partial(check_round_trips, dtype=torch.float32, tolerance=2e-5)),
        (WrongLogdetBothWays, check_logdet_is_that_of_the_jacobian),
        (SummedLogdet, partial(check_types, dtype=torch.float32, autocast=False)),
        (LogdetInTheInputsDtype, partial(check_types, dtype=torch.bfloat16, autocast=False)),
        (ResultInFloat64, partial(check_types, dtype=torch.float32, autocast=True)),
        (NoGradientToItsParameter, check_gradients),
        (NoEmptyBatch, check_empty_batch),
        (WrongClosedForm, check_rebuilding),
        (WrongClosedForm, check_rebuilding_under_autocast),
        (DropsTheContext, check_context),
        (StateOutsideItsStateDict, check_copies),
        (ReadsMemoryInOrder, check_non_contiguous),
    ],
)
def test_checks_can_fail(layer: type[Scale], check: Callable[[Case], None]) -> None:
    check_name = getattr(check, "func", check).__name__
    arguments = getattr(check, "keywords", {})
    globals()[check_name](Case(Scale, (2, 3, 2)), **arguments)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(Case(layer, (2, 3, 2), uses_context=layer is DropsTheContext))
