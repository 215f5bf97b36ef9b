"""Flows conditioned on a class label, or on an observed image or volume that a network sums up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.flows import Flow, Squeeze
from inverse_flow.flows.base import Shape, check_dtype, may_wait_for
from inverse_flow.flows.conditioner import check_dimensions, convolution
from inverse_flow.flows.flattened import Flattened
from inverse_flow.models.config import SQUEEZE_FACTOR, FlowConfig
from inverse_flow.models.fields import Bounds, check, from_values
from inverse_flow.models.flows import KINDS, ImageFlow
from inverse_flow.ops.bijection import Bijection
from inverse_flow.ops.checks import shape_of_images
from inverse_flow.ops.spec import SIZE_FORMS, check_sizes

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

SummaryForm: TypeAlias = Literal["vector", "map"]


@dataclass(frozen=True)
class LabelConfig:
    """Everything that defines a :class:`LabelContext`.

    Attributes:
        classes: number of labels.
        context_channels: K of the context.
        size: (L,), (H, W) or (D, H, W) of the context, or None.
    """

    classes: Annotated[int, Bounds(1)]
    context_channels: Annotated[int, Bounds(1)]
    size: tuple[Annotated[int, Bounds(1)], ...] | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.size is not None:
            check_sizes("size", self.size, SIZE_FORMS, range(1, 4))


class LabelContext(nn.Module):
    """Class labels (B,), integers from 0 on, as a context: a learned vector (B, K) or map (B, K, H, W) for every class.

    A map tells the couplings what to expect where, which convolutions by themselves do not know. It starts the same at
    every pixel.

    Args:
        classes: number of labels.
        context_channels: K.
        size: (L,), (H, W) or (D, H, W), for a map: that of a flow's first level is half the image's, and the coupling
            networks average it down for the others. None for a vector.

    Raises:
        TypeError: labels that are no integers.
        ValueError: options that do not exist; labels that are not (B,); on the CPU a label outside 0 … classes − 1.
            On a GPU that one stops the program by an assertion of PyTorch, since looking would need a
            synchronisation; in compiled and exported programs, and under a transform of ``torch.func``, PyTorch's own
            lookup refuses it.
    """

    config_type = LabelConfig

    def __init__(self, classes: int, context_channels: int, size: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.config = LabelConfig(classes, context_channels, size)
        vectors = torch.randn(classes, context_channels)
        pixels = math.prod(self.config.size or ())
        self.embedding = nn.Embedding.from_pretrained(vectors.repeat_interleave(pixels, dim=1), freeze=False)

    def forward(self, labels: Tensor) -> Tensor:
        if not isinstance(labels, Tensor):
            raise TypeError(f"class labels are a tensor of integers, got {type(labels).__name__}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"class labels are integers, got {labels.dtype}")
        if labels.dim() != 1:
            raise ValueError(f"class labels must be (B,), got shape {tuple(labels.shape)}")
        classes = self.config.classes
        seen = labels.device.type == "cpu" and may_wait_for(labels)
        if seen and bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"labels must lie in 0 … {classes - 1}, got {labels.min().item()} … {labels.max().item()}")
        context: Tensor = self.embedding(labels.long())
        return context.unflatten(1, (-1, *(self.config.size or ())))


@dataclass(frozen=True)
class SummaryConfig:
    """Everything that defines a :class:`SummaryNet`.

    Attributes:
        channels: of the observation.
        context_channels: K of the context.
        hidden: width of the network.
        form: ``"vector"`` or ``"map"``.
        dimensions: 1 for observed signals, 2 for images, 3 for volumes.
    """

    channels: Annotated[int, Bounds(1)]
    context_channels: Annotated[int, Bounds(1)]
    hidden: Annotated[int, Bounds(1)] = 32
    form: SummaryForm = "map"
    dimensions: int = 2

    def __post_init__(self) -> None:
        check(self)
        check_dimensions(self.dimensions, least=1)


class SummaryNet(nn.Module):
    """An observed image or volume as a context: squeeze → 3×3 conv → ReLU → 3×3 conv → ReLU → 3×3 conv to K channels.

    ``form="map"`` gives (B, K, H/2, W/2), the resolution of a flow's first level, which the coupling networks
    average down for the others: for observations that lie on the pixels of the image, such as a blurred one.
    ``form="vector"`` gives the mean of that map, (B, K): for observations whose place does not matter, or of another
    size than the image. The squeeze loses nothing of the observation. The idea is that of the summary networks of
    amortised inference (Radev et al., "BayesFlow", 2020) and of InvertibleNetworks.jl (Orozco et al., 2023).

    Args:
        channels: of the observation (B, C, H, W), or (B, C, D, H, W); its sizes divisible by 2.
        context_channels: K.
        hidden: width of the network.
        form: ``"map"`` or ``"vector"``.
        dimensions: 1 for signals, 2 for images, 3 for volumes.

    Raises:
        ValueError: options that do not exist; observations of another shape.
        TypeError: observations that are not floating.
    """

    config_type = SummaryConfig

    def __init__(
        self, channels: int, context_channels: int, hidden: int = 32, form: SummaryForm = "map", dimensions: int = 2
    ) -> None:
        super().__init__()
        self.config = SummaryConfig(channels, context_channels, hidden, form, dimensions)
        self.squeeze = Squeeze(SQUEEZE_FACTOR)
        self.layers = nn.Sequential(
            convolution(dimensions, channels * SQUEEZE_FACTOR**dimensions, hidden),
            nn.ReLU(),
            convolution(dimensions, hidden, hidden),
            nn.ReLU(),
            convolution(dimensions, hidden, context_channels),
        )

    def forward(self, observation: Tensor) -> Tensor:
        config = self.config
        check_dtype(self, observation)
        expected = shape_of_images(config.dimensions, config.channels)
        if observation.dim() != config.dimensions + 2 or observation.shape[1] != config.channels:
            raise ValueError(f"this network sums up observations {expected}, got {tuple(observation.shape)}")
        context: Tensor = self.layers(self.squeeze(observation)[0])
        return context if config.form == "map" else context.flatten(2).mean(2)


SUMMARIES: dict[str, Any] = {"LabelContext": LabelContext, "SummaryNet": SummaryNet}


@dataclass(frozen=True)
class ConditionalConfig:
    """Everything that defines a :class:`ConditionalFlow` of a model and a summary of this package.

    Attributes:
        kind: of the flow, a name in :data:`KINDS`.
        flow: its config.
        summary_kind: ``"LabelContext"`` or ``"SummaryNet"``.
        summary: its config.
    """

    kind: str
    flow: FlowConfig
    summary_kind: str
    summary: LabelConfig | SummaryConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of :meth:`to_dict`."""
        for name, known in {"kind": KINDS, "summary_kind": SUMMARIES}.items():
            if values[name] not in known:
                raise ValueError(f"unknown {name} {values[name]!r}; known: {', '.join(known)}")
        flow = KINDS[values["kind"]].config_type.from_dict(values["flow"])
        summary = from_values(SUMMARIES[values["summary_kind"]].config_type, values["summary"])
        return cls(values["kind"], flow, values["summary_kind"], summary)


class ConditionalFlow(Bijection):
    """p(x | observation) = the flow's p(x | c) with c = summary(observation), both trained together.

    The methods are those of :class:`~inverse_flow.flows.Flow` and take the raw observation, one row per example, where
    a flow takes its context: labels for a :class:`LabelContext`, images or volumes for a :class:`SummaryNet`, or
    whatever a network of your own turns into a context. With a :class:`Glow` or :class:`Hint` this is the conditional
    Glow and the conditional HINT of InvertibleNetworks.jl (Orozco et al., 2023, arXiv 2312.13480).

    Args:
        flow: a flow whose layers use a context.
        summary: a module from observations to contexts.

    Raises:
        TypeError: a flow or a summary that is no module.
        ValueError: the flow was built for a context of other channels; no observation was given.
    """

    def __init__(self, flow: Flow, summary: nn.Module) -> None:
        super().__init__()
        for name, module in {"flow": flow, "summary": summary}.items():
            if not isinstance(module, nn.Module):
                raise TypeError(f"the {name} of a conditional flow is a module, got {type(module).__name__}")
        if isinstance(flow, ImageFlow):
            expected = flow.config.context_channels
            given = getattr(getattr(summary, "config", None), "context_channels", expected)
            if expected == 0 or given != expected:
                raise ValueError(
                    f"the flow was built with context_channels={expected}, the summary gives {given} channels: both "
                    f"must be the same number, at least 1"
                )
        self.flow = flow
        self.summary = summary

    def forward(self, x: Tensor, observation: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Data to latents: (latents, log|det ∂latents/∂x|)."""
        result: tuple[tuple[Tensor, ...], Tensor] = self.flow(x, self._context(observation))
        return result

    def inverse(self, latents: Sequence[Tensor], observation: Tensor) -> tuple[Tensor, Tensor]:
        """Latents to data: (x, log|det ∂x/∂latents|)."""
        return self.flow.inverse(latents, self._context(observation))

    def flatten(self) -> Flattened:
        """This flow as a layer from data to one vector of latents, (B, D), and back; its context is the observation."""
        return Flattened(self)

    def log_prob(self, x: Tensor, observation: Tensor) -> Tensor:
        """(B,) conditional log-densities in nats."""
        return self.flow.log_prob(x, self._context(observation))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        observation: Tensor,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` samples, one for each row of ``observation``, without gradient."""
        return self.flow.sample(n, self._context(observation), temperature, generator=generator)

    def sample_and_log_prob(
        self,
        n: int,
        observation: Tensor,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``n`` samples and their conditional log-densities, differentiable."""
        return self.flow.sample_and_log_prob(n, self._context(observation), temperature, generator=generator)

    @property
    def config(self) -> ConditionalConfig:
        """The config of both parts.

        Raises:
            TypeError: a flow or a summary that is none of this package's, and so has no config.
        """
        kinds = type(self.flow).__name__, type(self.summary).__name__
        if kinds[0] not in KINDS or kinds[1] not in SUMMARIES:
            raise TypeError(f"only models and summaries of this package have a config, not {' with '.join(kinds)}")
        return ConditionalConfig(kinds[0], self.flow.config, kinds[1], self.summary.config)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: ConditionalConfig) -> Self:
        """The untrained model with this config."""
        flow = KINDS[config.kind].from_config(config.flow)
        return cls(flow, SUMMARIES[config.summary_kind](**asdict(config.summary)))

    @property
    def event_shape(self) -> Shape:
        """Shape of one example."""
        return self.flow.event_shape

    @property
    def latent_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the latents of every scale."""
        return self.flow.latent_shapes

    @property
    def num_parameters(self) -> int:
        """Learnable numbers of flow and summary, as stored."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _context(self, observation: Tensor | None) -> Tensor:
        if observation is None:
            raise ValueError("a conditional flow needs an observation for every example, and none was given")
        context: Tensor = self.summary(observation)
        return context
