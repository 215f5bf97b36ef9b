import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from inverse_flow import InverseConv2d
from inverse_flow.flows import (
    ActNorm,
    AffineCoupling,
    Compose,
    Conv1x1,
    Flow,
    Householder,
    Permute,
    Reverse,
    Split,
    Squeeze,
    prepare_sampling,
)
from inverse_flow.flows.prepared import _PixelLinear

ORDERS = ("top_left", "top_right", "bottom_left", "bottom_right")


def trained(flow: Flow) -> Flow:
    """``flow`` with nothing left at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow.eval()


def two_scales(context_channels: int = 0) -> Flow:
    return trained(
        Flow(
            [
                Squeeze(),
                Compose(
                    InverseConv2d(4, groups=4, order=ORDERS),
                    ActNorm(4),
                    Conv1x1(4),
                    AffineCoupling(4, 6, context_channels=context_channels),
                ),
                Reverse(InverseConv2d(4, corner="plu")),
                Split(4, context_channels=context_channels),
                Squeeze(),
                Permute(range(7, -1, -1)),
                ActNorm(8),
                Householder(8),
                Conv1x1(8),
                InverseConv2d(8, 2, corner="identity"),
            ],
            (1, 4, 4),
        )
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_a_prepared_flow_is_the_same_flow(dtype: torch.dtype, tolerance: float) -> None:
    flow = two_scales(context_channels=2).to(dtype)
    prepared = prepare_sampling(flow)
    x, context = torch.randn(3, 1, 4, 4, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    close = {"rtol": tolerance, "atol": tolerance}
    (latents, logdet), (expected_latents, expected_logdet) = prepared(x, context), flow(x, context)
    for latent, expected in zip(latents, expected_latents, strict=True):
        torch.testing.assert_close(latent, expected, **close)
    torch.testing.assert_close(logdet, expected_logdet, rtol=tolerance, atol=20 * tolerance)
    for value, expected in zip(prepared.inverse(latents, context), flow.inverse(latents, context), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=20 * tolerance)
    generator = torch.Generator().manual_seed(0)
    samples = prepared.sample(3, context, 0.7, generator=generator)
    expected = flow.sample(3, context, 0.7, generator=generator.manual_seed(0))
    torch.testing.assert_close(samples, expected, **close)


def test_runs_of_pixel_linear_layers_become_one() -> None:
    prepared = prepare_sampling(two_scales())
    kinds = [type(layer).__name__ for layer in prepared.layers]
    assert kinds == ["Squeeze", "Compose", "Reverse", "Split", "Squeeze", "_PixelLinear", "_FixedInverseConv"]
    kinds = [type(layer).__name__ for layer in prepared.layers[1].layers]
    assert kinds == ["_FixedStep", "AffineCoupling"]
    # A run without a layer that mixes channels stays as it is: a 1×1 convolution would be more work.
    kept = prepare_sampling(Flow([ActNorm(2), Permute((1, 0))], (2, 2, 2)))
    assert [type(layer) for layer in kept.layers] == [ActNorm, Permute]


@pytest.mark.parametrize("kernel_size", [1, 2, (3, 2), 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 5)])
@pytest.mark.parametrize("order", [ORDERS, "bottom_left"])
@pytest.mark.parametrize("corner", ["identity", "unit_triangular", "plu"])
def test_an_inverse_convolution_and_a_1x1_convolution_are_one_convolution_back(
    kernel_size: int | tuple[int, int], size: tuple[int, int], order: str | tuple[str, ...], corner: str
) -> None:
    groups = 1 if isinstance(order, str) else 4
    conv = InverseConv2d(8, kernel_size, groups=groups, order=order, corner=corner)
    flow = trained(Flow([conv, ActNorm(8), Conv1x1(8)], (8, *size))).double()
    prepared = prepare_sampling(flow)
    assert [type(layer).__name__ for layer in prepared.layers] == ["_FixedStep"]
    z = torch.randn(2, 8, *size, dtype=torch.float64)
    for value, expected in zip(prepared.inverse((z,)), flow.inverse((z,)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for value, expected in zip(prepared(z)[0] + prepared(z)[1:], flow(z)[0] + flow(z)[1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_a_prepared_flow_shares_nothing_and_has_no_gradient() -> None:
    flow = two_scales()
    prepared = prepare_sampling(flow)
    x = torch.randn(2, 1, 4, 4)
    before = prepared.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1.0)
    assert torch.equal(prepared.log_prob(x), before)
    assert not before.requires_grad
    assert not prepared.training


def test_sampling_factorises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = two_scales()
    prepared = prepare_sampling(flow)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a factorisation while sampling")

    monkeypatch.setattr(torch.linalg, "solve_triangular", refuse)
    assert prepared.sample(2).isfinite().all()
    with pytest.raises(AssertionError, match="factorisation"):
        flow.sample(2)


def test_pixel_linear_layers_of_volumes() -> None:
    layers = [ActNorm(3), Conv1x1(3)]
    with torch.no_grad():
        layers[0].log_scale.copy_(torch.tensor([0.3, -0.2, 0.1]))
        layers[0].bias.copy_(torch.tensor([1.0, 2.0, -1.0]))
    joined, chain = _PixelLinear([layer.eval() for layer in layers]), Compose(*layers).eval()
    x = torch.randn(2, 3, 2, 3, 4)
    for direction in ("forward", "inverse"):
        for value, expected in zip(getattr(joined, direction)(x), getattr(chain, direction)(x), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


class Doubled(InverseConv2d):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x, context)
        return 2 * z, logdet + math.log(2) * x[0].numel()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z / 2, context)
        return x, logdet - math.log(2) * z[0].numel()


class Bent(ActNorm):
    """Of every value by itself, but not linear."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x)
        return torch.sinh(z), logdet + torch.cosh(z).log().flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.asinh(z)
        x, logdet = super().inverse(y)
        return x, logdet - torch.cosh(y).log().flatten(1).sum(1)


class Slanted(ActNorm):
    """Overrides a helper alone: its bias is another one in every column."""

    def _per_channel(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        bias, log_scale = super()._per_channel(x, dtype)
        return bias + torch.arange(x.shape[-1], dtype=dtype), log_scale


class Mirrored(Compose):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x.flip(-1), context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(z, context)
        return x.flip(-1), logdet


class Tempered(Flow):
    def inverse(self, latents: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = super().inverse(latents, context)
        return x + 1, logdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        return super().forward(x - 1, context)


def hooked() -> nn.Module:
    layer = ActNorm(4)
    layer.register_forward_hook(lambda module, arguments, result: (-result[0], result[1]))
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(4, 2),
        lambda: Bent(4),
        lambda: Slanted(4),
        lambda: Mirrored(ActNorm(4), Conv1x1(4)),
        lambda: prune.l1_unstructured(InverseConv2d(4, 2), "weight", 0.3),
        lambda: parametrizations.weight_norm(InverseConv2d(4, 2)),
        hooked,
    ],
)
@pytest.mark.parametrize("kind", [Flow, Tempered])
def test_nothing_is_assumed_of_what_overrides_a_method(make: Callable[[], nn.Module], kind: type[Flow]) -> None:
    flow = trained(kind([make(), Conv1x1(4), AffineCoupling(4, 6)], (4, 3, 3))).double()
    prepared = prepare_sampling(flow)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(prepared.log_prob(x), flow.log_prob(x))
    torch.testing.assert_close(prepared.inverse((x,))[0], flow.inverse((x,))[0])
