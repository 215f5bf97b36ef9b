"""The one builder: from a config to the layers of a flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import nn

from inverse_flow.flows import (
    HINT,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    CheckerboardCoupling,
    Compose,
    Conv1x1,
    ConvNet,
    EmergingConv,
    ExponentialConv,
    Householder,
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
from inverse_flow.flows.base import Shape, first_half
from inverse_flow.flows.emerging import INVERSE_CONVS
from inverse_flow.flows.squeeze import Pattern
from inverse_flow.models.config import SQUEEZE_FACTOR, FlowConfig
from inverse_flow.ops.spec import ORDERS

Coupling: TypeAlias = AdditiveCoupling | AffineCoupling | SplineCoupling

COUPLINGS: dict[str, type[Coupling]] = {
    "affine": AffineCoupling,
    "additive": AdditiveCoupling,
    "spline": SplineCoupling,
}
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "spline": SplineActivation,
    "leaky_relu": LeakyReLU,
    "smooth_leaky_relu": lambda channels: SmoothLeakyReLU(),
    "smooth_tanh": lambda channels: SmoothTanh(),
}
# Of the kinds of squeeze, those that are no wavelets.
PATTERNS: dict[str, Pattern] = {"pixel": "checkerboard", "patch": "patch", "column": "column"}
# By the number of axes, an order and the opposite one behind each other: after two steps every pixel has seen all.
ALL_ORDERS = {
    axes: [order for pair in zip(orders, reversed(orders), strict=True) for order in pair][: len(orders)]
    for axes, orders in ORDERS.items()
}


def build_layers(config: FlowConfig) -> list[nn.Module]:
    """The layers of a flow with this config, untrained."""
    layers: list[nn.Module] = [] if config.logit_margin is None else [Logit(config.logit_margin)]
    shape = config.image_shape
    for level in range(config.levels):
        last = level == config.levels - 1
        if config.masks == "checkerboard":
            layers += [_step(config, shape, index, "checkerboard") for index in range(config.steps + last)]
            if last:
                break
        if config.dimensions:
            squeeze = _squeeze(config)
            layers.append(squeeze)
            shape = squeeze.output_shape(shape)
        layers += [_step(config, shape, index, "channel") for index in range(config.steps)]
        if not last:
            split = _split(config, shape[0])
            layers.append(split)
            shape = split.output_shape(shape)
    return layers


def _step(config: FlowConfig, shape: Shape, index: int, mask: Literal["channel", "checkerboard"]) -> Compose:
    channels = shape[0]
    layers: list[nn.Module] = [_convolution(config, shape, index)] if config.inverse_conv != "none" else []
    if config.activation != "none":
        layers.append(ACTIVATIONS[config.activation](channels))
    layers.append(ActNorm(channels))
    if mask == "checkerboard":
        layers.append(_checkerboard_coupling(config, channels, parity=index % 2))
    else:
        layers += [_mixing(config, channels), _channel_coupling(config, channels)]
    return Compose(*layers)


def _convolution(config: FlowConfig, shape: Shape, index: int) -> nn.Module:
    """What a step begins with. No bias: the ActNorm that follows has one."""
    channels, kernel_size, dimensions = shape[0], config.kernel_size, config.dimensions
    causal: dict[str, Any] = {"corner": config.corner, "bias": False, "max_row_sum": config.max_row_sum}
    if config.inverse_conv == "emerging":
        return EmergingConv(channels, kernel_size, dimensions=dimensions, **causal)
    if config.inverse_conv == "periodic":
        return PeriodicConv(channels, kernel_size, dimensions=dimensions)
    if config.inverse_conv == "exponential":
        return ExponentialConv(channels, kernel_size, dimensions=dimensions)
    if config.inverse_conv == "woodbury":
        return Woodbury(channels, shape[1:])
    each_order, orders = config.orders == "four", ALL_ORDERS[dimensions]
    conv = INVERSE_CONVS[dimensions](
        channels,
        kernel_size,
        groups=len(orders) if each_order else 1,
        order=orders if each_order else orders[index % len(orders)],
        **causal,
    )
    return conv if config.inverse_conv == "training" else Reverse(conv)


def _squeeze(config: FlowConfig) -> Squeeze | WaveletSqueeze:
    pattern = PATTERNS.get(config.squeeze)
    return Squeeze(SQUEEZE_FACTOR, pattern) if pattern else WaveletSqueeze(config.squeeze)


def _split(config: FlowConfig, channels: int) -> Split:
    return Split(
        channels,
        prior=config.split_prior,
        context_channels=config.context_channels,
        dimensions=config.dimensions,
    )


def _mixing(config: FlowConfig, channels: int) -> nn.Module:
    if config.conv1x1 == "permutation":
        # Reversed, so that every coupling but the first changes what the one before it kept.
        return Permute(range(channels - 1, -1, -1))
    return Householder(channels) if config.conv1x1 == "householder" else Conv1x1(channels)


def _channel_coupling(config: FlowConfig, channels: int) -> nn.Module:
    if config.coupling == "hint":
        return HINT(channels, coupling=partial(_coupling, config, AffineCoupling))
    return _coupling(config, COUPLINGS[config.coupling], channels)


def _coupling(config: FlowConfig, kind: type[Coupling], channels: int) -> nn.Module:
    kept = first_half(channels)
    conditioner = _conditioner(config, kept, kind.parameters_per_value * (channels - kept))
    if kind is AffineCoupling:
        return AffineCoupling(channels, conditioner=conditioner, scale=config.scale)
    return kind(channels, conditioner=conditioner)


def _checkerboard_coupling(config: FlowConfig, channels: int, parity: int) -> nn.Module:
    assert config.coupling in ("affine", "additive")
    numbers = CheckerboardCoupling.parameters_per_value(config.coupling)
    conditioner = _conditioner(config, channels, numbers * channels)
    return CheckerboardCoupling(
        channels, kind=config.coupling, parity=parity, conditioner=conditioner, scale=config.scale
    )


def _conditioner(config: FlowConfig, in_channels: int, out_channels: int) -> nn.Module:
    context = {"context_channels": config.context_channels, "dimensions": config.dimensions}
    if config.conditioner == "resnet":
        return ResNet(in_channels, config.hidden, out_channels, blocks=config.blocks, **context)
    return ConvNet(in_channels, config.hidden, out_channels, **context)
