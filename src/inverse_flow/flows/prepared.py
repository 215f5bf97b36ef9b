"""A trained flow for sampling: what depends on its weights alone is computed once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from inverse_flow.conv import InverseConv1d, InverseConv2d, InverseConv3d, InverseConvNd
from inverse_flow.flows.actnorm import ActNorm
from inverse_flow.flows.base import FlowLayer, check_images, count_pixels, expand_logdet, logdet_dtype
from inverse_flow.flows.compose import Compose, Flow, Reverse
from inverse_flow.flows.conditioner import arrange_for
from inverse_flow.flows.conv1x1 import Conv1x1, mix_channels
from inverse_flow.flows.householder import Householder
from inverse_flow.flows.permute import Permute
from inverse_flow.ops.causal import convolve_mixed, per_channel
from inverse_flow.reversible.layer import is_changed

# Layers that are z_p = W x_p + b at every pixel p: a run of them is one such layer. Joining them pays where one of them
# mixes the channels.
MIXING = (Conv1x1, Householder)
PIXEL_LINEAR = (ActNorm, Permute, *MIXING)


def prepare_sampling(flow: Flow) -> Flow:
    """A frozen copy of a trained flow in which all that depends on the weights alone is computed already.

    Runs of layers that are linear at every pixel (ActNorm, 1×1 convolutions, permutations) become one 1×1 convolution
    each, formed in float64 and rounded once. Where an inverse convolution comes before one, the two are a single plain
    convolution on the way back; other inverse convolutions keep their complete weight. So sampling is the conditioner
    networks and one plain convolution per step, with neither factorisations nor masks. On a CPU the networks' weights
    are laid out channels last, which makes them faster. Density and latents come out as before, up to rounding, and so
    does the direction from data to latent.

    The copy shares nothing with ``flow``: training on leaves it as it is, and after that another one is needed. It is
    in evaluation mode, and no gradient reaches its weights.

    Args:
        flow: any flow. Layers that are not known here are copied, and so are those with hooks, and those of a subclass
            that overrides a method of a known one. A subclass of :class:`Flow` that does is copied as a whole.

    Returns:
        A :class:`Flow` with the same latents, base and event shape.

    Raises:
        TypeError: it is no :class:`Flow`.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"only a Flow is prepared, got {type(flow).__name__}: prepare the flow within it")
    prepared: Flow = copy.deepcopy(flow, _computed_tensors(flow)).eval()
    if not is_changed(flow, Flow):
        prepared = Flow(_prepare_layers(prepared.layers), flow.event_shape, base=prepared.base).eval()
    prepared.requires_grad_(False)
    arrange_for(next(itertools.chain(prepared.parameters(), prepared.buffers())).device, prepared)
    return prepared


class _PixelLinear(FlowLayer):
    """z_p = W x_p + b at every pixel p, and its inverse x_p = W⁻¹ z_p + b′, all four fixed."""

    uses_context = False
    weight: Tensor
    bias: Tensor
    inverse_weight: Tensor
    inverse_bias: Tensor
    logdet: Tensor

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        chain = Compose(*layers)
        like = next(chain.parameters())
        channels = next(layer.channels for layer in layers if isinstance(layer, MIXING))
        exact = copy.deepcopy(chain).double()
        # What a layer does to one pixel says what it does to all: b is the image of 0, column i of W that of eᵢ less b.
        pixels = torch.eye(channels + 1, channels, dtype=torch.float64, device=like.device).roll(1, 0)[..., None, None]
        with torch.no_grad():
            (forward, logdet), (inverse, _) = exact(pixels), exact.inverse(pixels)
            for name, images in {"": forward[..., 0, 0], "inverse_": inverse[..., 0, 0]}.items():
                self.register_buffer(f"{name}weight", (images[1:] - images[0]).T.to(like.dtype).contiguous())
                self.register_buffer(f"{name}bias", images[0].to(like.dtype))
            self.register_buffer("logdet", logdet[0].to(logdet_dtype(like.dtype)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, len(self.bias))
        return mix_channels(x, self.weight, self.bias), expand_logdet(self.logdet * count_pixels(x), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, len(self.bias))
        return mix_channels(z, self.inverse_weight, self.inverse_bias), expand_logdet(-self.logdet * count_pixels(z), z)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}"


class _FixedInverseConv(FlowLayer):
    """An inverse convolution whose inverse, the plain convolution, has its complete weight at hand."""

    uses_context = False
    weight: Tensor

    def __init__(self, layer: InverseConvNd) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            complete = layer.complete_weight()
        self.register_buffer("weight", complete.contiguous())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.layer(x)
        return result

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer = self.layer
        x = layer.convolve(z, self.weight, layer.bias, **{**layer.arguments, "corner": "general"})
        return x, layer.log_det(z)


class _FixedStep(FlowLayer):
    """An inverse convolution z = A(w)⁻¹(x − b), and z ↦ K z + k at every pixel behind it. Back, the two are one plain
    convolution: x = A(w) K⁻¹ (z − k) + b.

    k is taken off the image and not folded into a bias, since the padding stands for zeros of A's own input.
    """

    uses_context = False
    weight: Tensor

    def __init__(self, conv: _FixedInverseConv, linear: _PixelLinear) -> None:
        super().__init__()
        self.conv = conv
        self.linear = linear
        groups = conv.layer.groups
        inverse = linear.inverse_weight.double().unflatten(0, (groups, -1))  # rows: inputs of A, by their groups
        taps = conv.weight.double().unflatten(0, (groups, -1))
        weight = torch.einsum("goi...,gic->goc...", taps, inverse).flatten(0, 1)
        self.register_buffer("weight", weight.to(conv.weight.dtype).contiguous())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = self.conv(x)
        z, more = self.linear(z)
        return z, logdet + more

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, len(self.weight))
        layer = self.conv.layer
        compute = logdet_dtype(z.dtype)
        centred = z.to(compute) - per_channel(self.linear.bias.to(compute), z)
        bias = None if layer.bias is None else layer.bias.to(compute)
        weight = self.weight.to(compute)
        x = convolve_mixed(centred, weight, bias, layer.spec.orders, layer.dilation).to(z.dtype)
        return x, layer.log_det(z) + expand_logdet(-self.linear.logdet * count_pixels(z), z)


def _prepare_layers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    prepared: list[nn.Module] = []
    for _, group in groupby(layers, lambda layer: _is_known(layer, PIXEL_LINEAR)):
        run = list(group)
        if not any(isinstance(layer, MIXING) for layer in run):
            prepared += [_prepare(layer) for layer in run]
        elif prepared and isinstance(prepared[-1], _FixedInverseConv):
            prepared[-1] = _FixedStep(prepared[-1], _PixelLinear(run))
        else:
            prepared.append(_PixelLinear(run))
    return prepared


def _prepare(layer: Any) -> nn.Module:
    if _is_known(layer, (Compose,)):
        return Compose(*_prepare_layers(layer.layers))
    if _is_known(layer, (Reverse,)):
        (inner,) = _prepare_layers([layer.layer])
        return Reverse(inner)
    return _FixedInverseConv(layer) if _is_known(layer, (InverseConv1d, InverseConv2d, InverseConv3d)) else layer


def _computed_tensors(flow: nn.Module) -> dict[int, Any]:
    """The memo of a deep copy that has the weights which pruning and weight normalisation left in the modules: they are
    no leaves, which PyTorch refuses to copy.
    """
    tensors = [t for module in flow.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    return {id(tensor): tensor.detach().clone() for tensor in tensors}


def _is_known(layer: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the layer does what a layer of one of these classes does."""
    return any(isinstance(layer, kind) and not is_changed(layer, kind) for kind in kinds)
