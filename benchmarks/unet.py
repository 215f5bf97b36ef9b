"""Diffusion as a peer of the flows: a small U-Net, trained by flow matching, as a model of the library's trainer.

Flow matching and not DDPM, of which it is the same model with a Gaussian path in another parametrisation: what is
trained is the velocity of an ordinary differential equation, so that one network samples with any number of
evaluations, no noise schedule is to be chosen, and there is a density beside the samples. Lipman et al., "Flow Matching
for Generative Modeling", 2023; Liu et al., "Flow Straight and Fast", 2023; the network is that of Ho et al., "Denoising
Diffusion Probabilistic Models", 2020, without attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inverse_flow.flows import Flow, FlowLayer
from inverse_flow.flows.base import per_example, sum_example
from inverse_flow.models import KINDS, FlowConfig, ImageFlow
from inverse_flow.training import TrainConfig
from inverse_flow.training.method import StepResult, make_optimizer, update
from inverse_flow.training.workers import Workers

FREQUENCIES = 16
EMBEDDED = 32
# Of the network, for a density. After two minutes of training on MNIST, the bits per dimension of ten images were 0.03
# less than with twice as many.
DENSITY_EVALUATIONS = 80
# A density is integrated over s, t = 1 − (1 − s)³: near an image the trace grows like 1 / (1 − t), and steps are short.
SLOWING = 3

Velocity = Callable[[Tensor, Tensor], Tensor]


# ---- The network ----


class Block(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + shift of the time))), with a 1×1 convolution of x if channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(1, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.shift = nn.Linear(EMBEDDED, outputs)
        self.second = nn.Sequential(nn.GroupNorm(1, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        nn.init.zeros_(self.second[-1].weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        changed = self.first(x) + self.shift(embedding)[:, :, None, None]
        return self.skip(x) + self.second(changed)


class UNet(nn.Module):
    """v(x, t): (B, C, H, W) and (B,) in [0, 1] → (B, C, H, W); H and W divisible by 2 to the number of levels.

    Args:
        channels: C.
        levels: how often the image is halved; the width doubles each time.
        blocks: in each level on the way down, as many on the way up, and at the bottom.
        width: of the first level.
    """

    frequencies: Tensor

    def __init__(self, channels: int, levels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, FREQUENCIES))
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, EMBEDDED), nn.SiLU())
        widths = [width * 2**level for level in range(levels + 1)]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip([width, *widths], widths, strict=False):
            self.down.append(_blocks(inputs, outputs, blocks))
        for inputs, outputs in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.up.append(_blocks(inputs + outputs, outputs, blocks))
        self.last = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        embedding = self.time(torch.cat((angles.cos(), angles.sin()), 1))
        h, passed = self.first(x), []
        for level, blocks in enumerate(self.down):
            if level:
                passed.append(h)
                h = F.avg_pool2d(h, 2)
            for block in blocks:
                h = block(h, embedding)
        for blocks in self.up:
            h = torch.cat((F.interpolate(h, scale_factor=2.0), passed.pop()), 1)
            for block in blocks:
                h = block(h, embedding)
        return self.last(h)


def _blocks(inputs: int, outputs: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(inputs if i == 0 else outputs, outputs) for i in range(count))


# ---- The flow ----


class Transport(FlowLayer):
    """The flow of dy/dt = v(y, t) from y(1) = 2x − 1, x an image in [0, 1), to the latent y(0), by the midpoint rule.

    log|det dz/dx| = D log 2 − ∫ tr ∂v/∂y dt. The trace is estimated by εᵀ(∂v/∂y)ε with one ε of random signs per image
    (Hutchinson; Grathwohl et al., "FFJORD", 2019), which is right on average, and the integral by the same rule, with
    steps that grow shorter towards the image: an estimate of the density, neither exact nor a bound.

    Args:
        velocity: v.
        evaluations: of v, two per step; a single one is a step of Euler's rule. May be changed at any
            time.
    """

    uses_context = False

    def __init__(self, velocity: nn.Module, evaluations: int = DENSITY_EVALUATIONS) -> None:
        super().__init__()
        self.velocity = velocity
        self.evaluations = evaluations

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, logdet = self._with_trace(2 * x - 1, 1.0, 0.0)
        return y, logdet + x[0].numel() * math.log(2)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, logdet = self._with_trace(z, 0.0, 1.0)
        return (y + 1) / 2, logdet - z[0].numel() * math.log(2)

    @torch.no_grad()
    def images(self, z: Tensor) -> Tensor:
        """What ``inverse`` gives, without the density, which costs three times as much."""
        return (self._integrate(z, 0.0, 1.0, self.velocity) + 1) / 2

    def _with_trace(self, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        signs = torch.randint(2, y.shape, device=y.device).to(y.dtype) * 2 - 1

        def both(state: Tensor, s: Tensor) -> Tensor:
            """v, and beside it the estimate of its trace, by s."""
            left = 1 - s
            with torch.enable_grad():
                y = state[:, :-1].unflatten(1, signs.shape[1:]).detach().requires_grad_()
                v = self.velocity(y, 1 - left**SLOWING)
                (product,) = torch.autograd.grad((v * signs).sum(), y)
            by_t = torch.cat((v.detach().flatten(1), sum_example(product * signs)[:, None]), 1)
            return SLOWING * left[:, None] ** (SLOWING - 1) * by_t

        state = torch.cat((y.flatten(1), y.new_zeros(len(y), 1)), 1)
        state = self._integrate(state, start, end, both)
        return state[:, :-1].unflatten(1, y.shape[1:]), state[:, -1]

    def _integrate(self, y: Tensor, start: float, end: float, velocity: Velocity) -> Tensor:
        if self.evaluations != 1 and (self.evaluations < 1 or self.evaluations % 2):
            raise ValueError(f"evaluations must be 1 or even, two for each step, got {self.evaluations}")
        steps = max(1, self.evaluations // 2)
        length = (end - start) / steps
        for step in range(steps):
            t = y.new_full((len(y),), start + step * length)
            slope = velocity(y, t)
            if self.evaluations > 1:
                slope = velocity(y + length / 2 * slope, t + length / 2)
            y = y + length * slope
        return y


@dataclass(frozen=True)
class FlowMatchingConfig(FlowConfig):
    """``levels``, ``steps`` and ``hidden`` are the network's levels, blocks and width; the others do not matter."""

    steps: int = 1


class FlowMatching(ImageFlow):
    """A :class:`Transport` by a :class:`UNet`, and nothing else."""

    config_type = FlowMatchingConfig

    def __init__(
        self, image_shape: tuple[int, ...], levels: int = 2, steps: int = 1, hidden: int = 16, **options: Any
    ) -> None:
        config = FlowMatchingConfig(image_shape, levels, steps, hidden, **options)
        Flow.__init__(self, [Transport(UNet(image_shape[0], levels, steps, hidden))], config.image_shape)
        self.config = config

    @property
    def transport(self) -> Transport:
        """The only layer."""
        return self.layers[0]  # type: ignore[return-value]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        (z,) = self.sample_latents(n, context, temperature, generator)
        return self.transport.images(z)


KINDS[FlowMatching.__name__] = FlowMatching


# ---- Training ----


class Matching:
    """A :class:`~inverse_flow.training.method.Method`: the mean of ‖v(y_t, t) − (y − z)‖² / D, y_t = t y + (1 − t) z,
    with y = 2x − 1 a batch, z Gaussian noise and t uniform, one in each of as many parts of [0, 1] as there are images.
    """

    def __init__(self, model: FlowMatching, config: TrainConfig, workers: Workers) -> None:
        self.model = model
        self.config = config
        self.optimizer = make_optimizer(model.parameters(), config)

    def step(
        self, images: Tensor, context: Tensor | None = None, *, step: int, progress: float, rate_factor: float
    ) -> StepResult:
        y, z = 2 * images - 1, torch.randn_like(images)
        t = (torch.arange(len(y)) + torch.rand(len(y))).to(y) / len(y)
        at = per_example(t, y)
        loss = F.mse_loss(self.model.transport.velocity(at * y + (1 - at) * z, t), y - z)
        named = self.model.named_parameters()
        norm = update(self.optimizer, loss, named, self.config, step=step, rate_factor=rate_factor)
        return StepResult(math.nan, math.nan, norm, {"matching": loss.item()})

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state(self, content: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(content["optimizer"])
