"""Dequantization: noise that makes whole colour values continuous, uniform or drawn where the model wants it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow.flows import AffineCoupling, Compose, Flow, FlowLayer, Logit, Permute, Squeeze
from inverse_flow.flows.base import Shape, check_images, logdet_dtype, sum_example
from inverse_flow.ops.spec import check_integer
from inverse_flow.training.config import MAX_BIT_DEPTH, TrainConfig

# Share of a cell that no noise falls into, at each of its ends, so that the logit of the noise is finite.
MARGIN = 1e-4
# A float32 number up to 256 can tell this from 1: noise above it would be rounded into the next cell.
BELOW_ONE = 1 - 2**-15
# A pair of couplings changes every value once, and leaves the channels in their order.
COUPLINGS = 4
HIDDEN = 32


def quantize(images: Tensor, bit_depth: int = MAX_BIT_DEPTH) -> Tensor:
    """The upper ``bit_depth`` bits of uint8 images, as integers 0 … 2ⁿ − 1 in uint8."""
    check_integer("bit_depth", bit_depth)
    if bit_depth > MAX_BIT_DEPTH:
        raise ValueError(f"bit_depth must be at most {MAX_BIT_DEPTH}, got {bit_depth}")
    return images >> (MAX_BIT_DEPTH - bit_depth)


def dequantize(images: Tensor, bit_depth: int = MAX_BIT_DEPTH, generator: torch.Generator | None = None) -> Tensor:
    """x̃ = (q + u) / 2ⁿ in [0, 1), with q the n upper bits of uint8 images and u uniform on [0, 1), in float32.

    Source: Uria, Murray & Larochelle, "RNADE", 2013; Theis, van den Oord & Bethge, 2016, section 3.1.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"dequantize expects uint8 images, got {images.dtype}")
    noise = torch.rand(images.shape, generator=generator).to(images.device)
    below_one = 1 - 2**-24  # the largest float32 below 1: 255 + u may round up to 256
    return ((quantize(images, bit_depth) + noise) / 2**bit_depth).clamp(max=below_one)


class VariationalDequantization(FlowLayer):
    """x̃ = (q + u)/2ⁿ → (q + g(u; q))/2ⁿ with q whole and u in [0, 1): moves the noise of each pixel within its cell.

    g(·; q) = σ ∘ h(·; q) ∘ logit, with h a flow of affine couplings whose networks see the whole image q. With u
    uniform, v = g(u; q) has the density q(v | q) = |∂g/∂u|⁻¹; so with this layer in front of a flow p,

        log p(x̃) + log|det ∂g/∂u| = log p((q + v)/2ⁿ) − log q(v | q),

    which is the integrand of the variational bound (Ho et al., "Flow++", 2019, section 3.1). So the layer is all that
    there is to it: the bound is trained, evaluated and importance-weighted as that of uniform noise, which is what the
    layer gives at first. The base is logistic noise; the original has Gaussian noise there.

    ``inverse`` undoes it; samples keep their cells. What the layer never gives (the outermost 10⁻⁴ of a cell, that a
    sample may have) is mapped to the end of the cell.

    Args:
        image_shape: (C, H, W), H and W even.
        bit_depth: n.
        couplings: of h.
        hidden: width of their networks.
    """

    def __init__(self, image_shape: Shape, bit_depth: int, *, couplings: int = COUPLINGS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.levels = 2**bit_depth
        self.channels = image_shape[0]
        self.squeeze = Squeeze(2)
        channels = self.squeeze.output_shape(tuple(image_shape))[0]
        self.logit = Logit(MARGIN)
        layers = [
            layer
            for _ in range(couplings)
            for layer in (
                AffineCoupling(channels, hidden, context_channels=channels),
                Permute(range(channels - 1, -1, -1)),
            )
        ]
        self.h = Compose(self.squeeze, *layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, x, self.channels)
        cells, noise = self._cells(x)
        z, logdet = self.logit(noise)
        moved, change = self.h(z, self._image(cells))
        moved, _ = self.squeeze.inverse(moved)
        v = torch.sigmoid(moved).clamp(max=BELOW_ONE)
        logdet = logdet + change + sum_example(F.logsigmoid(moved) + F.logsigmoid(-moved))
        return ((cells + v) / self.levels).to(x.dtype), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_images(self, z, self.channels)
        cells, v = self._cells(z)
        tiny = torch.finfo(v.dtype).tiny
        moved = torch.log(v.clamp(min=tiny)) - torch.log1p(-v)
        logdet = -sum_example(F.logsigmoid(moved) + F.logsigmoid(-moved))
        latent, change = self.h.inverse(self.squeeze(moved)[0], self._image(cells))
        noise, last = self.logit.inverse(latent)
        noise = noise.clamp(0, BELOW_ONE)
        return ((cells + noise) / self.levels).to(z.dtype), logdet + change + last

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def _cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The whole numbers q, and where in its cell each value lies."""
        scaled = x.to(logdet_dtype(x.dtype)) * self.levels
        cells = scaled.floor().clamp(0, self.levels - 1)
        return cells, (scaled - cells).clamp(0, BELOW_ONE)

    def _image(self, cells: Tensor) -> Tensor:
        """The image as the couplings' networks see it."""
        return self.squeeze(cells / self.levels - 0.5)[0]


def attach(flow: Flow, config: TrainConfig) -> None:
    """Puts the layer in front of a flow's others, if the configuration asks for it and it is not there yet.

    Raises:
        ValueError: the images have an odd height or width.
    """
    if config.dequantization == "uniform" or isinstance(flow.layers[0], VariationalDequantization):
        return
    layer = VariationalDequantization(flow.event_shape, config.bit_depth)
    flow.layers.insert(0, layer.to(next(flow.parameters()).device))
