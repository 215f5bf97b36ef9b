"""Complete flows, each described by one frozen config that a checkpoint can carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from inverse_flow.conv import InverseConv2d
from inverse_flow.flows import ActNorm, AdditiveCoupling, AffineCoupling, Compose, Conv1x1, Flow, Logit, Split, Squeeze
from inverse_flow.flows.base import first_half
from inverse_flow.flows.split import SplitPrior

__all__ = ["FlowConfig", "InverseFlow", "InverseFlowConfig", "build", "describe"]

Orders: TypeAlias = Literal["four", "alternating"]

ALL_ORDERS = ("top_left", "bottom_right", "top_right", "bottom_left")
SQUEEZE_FACTOR = 2


@dataclass(frozen=True)
class InverseFlowConfig:
    """Everything that defines an :class:`InverseFlow`.

    Attributes:
        image_shape: (C, H, W) of one image; H and W divisible by 2^levels.
        levels: scales L; each begins with a squeeze, and each but the last ends with a split.
        steps: steps K in a level.
        hidden: width of the coupling networks.
        kernel_size: of the inverse convolutions, an int or a pair.
        corner: corner kind of the inverse convolutions.
        orders: ``"four"``: four groups of channels, one for each order, in every inverse convolution. That is the
            layer of the paper's experiments, and the number of channels after a squeeze is always divisible by 4.
            ``"alternating"``: one group that mixes all the channels, its order changing from step to step.
        coupling: ``"affine"`` or ``"additive"``.
        split_prior: ``"conditional"`` or ``"standard"``, see :class:`~inverse_flow.flows.Split`.
        logit_margin: begin with a :class:`~inverse_flow.flows.Logit` of this margin, for images in [0, 1]; None for no
            such layer.
        context_channels: channels of the context given to the coupling and prior networks; 0 for none.
    """

    image_shape: tuple[int, int, int]
    levels: int = 2
    steps: int = 4
    hidden: int = 64
    kernel_size: int | tuple[int, int] = 3
    corner: str = "unit_triangular"
    orders: Orders = "four"
    coupling: Literal["affine", "additive"] = "affine"
    split_prior: SplitPrior = "conditional"
    logit_margin: float | None = None
    context_channels: int = 0

    def __post_init__(self) -> None:
        # A config read back from JSON has lists; equal models must have equal configs.
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        if not isinstance(self.kernel_size, int):
            object.__setattr__(self, "kernel_size", tuple(self.kernel_size))
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {self.image_shape}")
        for name, least in {"levels": 1, "steps": 1, "hidden": 1, "context_channels": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.orders not in ("four", "alternating"):
            raise ValueError(f'orders must be "four" or "alternating", got {self.orders!r}')
        if self.coupling not in ("affine", "additive"):
            raise ValueError(f'coupling must be "affine" or "additive", got {self.coupling!r}')
        _, height, width = self.image_shape
        divisor = SQUEEZE_FACTOR**self.levels
        if height % divisor or width % divisor:
            raise ValueError(
                f"{self.levels} levels need height and width divisible by {divisor}, got {height} × {width}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InverseFlowConfig:
        return cls(**values)


FlowConfig: TypeAlias = InverseFlowConfig


class InverseFlow(Flow):
    """The paper's flow: L levels of squeeze → K × (inverse conv → ActNorm → 1×1 conv → coupling) → split.

    The inverse convolution runs its solve from data to latent, and a plain convolution when sampling: sampling is
    the cheap direction. Nagar & Varma, AISTATS 2025 (arXiv 2410.14634), section 4. Images are given as floats, for
    instance dequantized to [0, 1).

    Args:
        image_shape, levels, steps, hidden, **options: as in :class:`InverseFlowConfig`.

    Raises:
        ValueError: options that do not fit together, naming them.
        TypeError: an option that does not exist.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], levels: int = 2, steps: int = 4, hidden: int = 64, **options: Any
    ) -> None:
        config = InverseFlowConfig(image_shape, levels, steps, hidden, **options)
        super().__init__(_layers(config), config.image_shape)
        self.config = config

    @classmethod
    def from_config(cls, config: InverseFlowConfig) -> InverseFlow:
        return cls(**config.to_dict())

    @property
    def num_parameters(self) -> int:
        """Learnable numbers, as stored. The entries that a triangular matrix leaves unread are counted too."""
        return sum(parameter.numel() for parameter in self.parameters())


def describe(model: InverseFlow) -> dict[str, Any]:
    """What :func:`build` needs to make an untrained copy of ``model``, in plain values."""
    return {"kind": type(model).__name__, "config": model.config.to_dict()}


def build(description: Mapping[str, Any]) -> InverseFlow:
    """The model that :func:`describe` described."""
    kinds = {"InverseFlow": (InverseFlow, InverseFlowConfig)}
    if description["kind"] not in kinds:
        raise ValueError(f"unknown kind of model {description['kind']!r}; known: {', '.join(kinds)}")
    model, config = kinds[description["kind"]]
    return model.from_config(config.from_dict(description["config"]))


def _layers(config: InverseFlowConfig) -> list[nn.Module]:
    layers: list[nn.Module] = [] if config.logit_margin is None else [Logit(config.logit_margin)]
    channels = config.image_shape[0]
    for level in range(config.levels):
        layers.append(Squeeze(SQUEEZE_FACTOR))
        channels *= SQUEEZE_FACTOR**2
        layers += [_step(config, channels, index) for index in range(config.steps)]
        if level < config.levels - 1:
            layers.append(Split(channels, prior=config.split_prior, context_channels=config.context_channels))
            channels = first_half(channels)
    return layers


def _step(config: InverseFlowConfig, channels: int, index: int) -> Compose:
    coupling = AffineCoupling if config.coupling == "affine" else AdditiveCoupling
    return Compose(
        _inverse_conv(config, channels, index),
        ActNorm(channels),
        Conv1x1(channels),
        coupling(channels, config.hidden, context_channels=config.context_channels),
    )


def _inverse_conv(config: InverseFlowConfig, channels: int, index: int) -> InverseConv2d:
    four = config.orders == "four"
    # No bias: the ActNorm that follows has one.
    return InverseConv2d(
        channels,
        config.kernel_size,
        groups=len(ALL_ORDERS) if four else 1,
        order=ALL_ORDERS if four else ALL_ORDERS[index % len(ALL_ORDERS)],
        corner=config.corner,
        bias=False,
    )
