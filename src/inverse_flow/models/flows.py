"""The models: flows that carry the config they were built from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from inverse_flow.flows import Flow
from inverse_flow.models.config import (
    FInCFlowConfig,
    FlowConfig,
    GlowConfig,
    HintConfig,
    InverseFlowConfig,
    RealNVPConfig,
)
from inverse_flow.models.layers import build_layers

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class ImageFlow(Flow):
    """A flow on images, signals, volumes or vectors, built from a config; its subclasses are the published models.

    Every model has every option of :class:`FlowConfig`, so that an ablation is one argument: the models differ in
    their defaults. Images are given as floats, for instance dequantized to [0, 1).

    Args:
        image_shape, levels, steps, hidden, **options: as in :class:`FlowConfig`.

    Raises:
        ValueError: options that do not fit together, naming them.
        TypeError: an option that does not exist.
    """

    config_type: ClassVar[type[FlowConfig]] = FlowConfig

    def __init__(
        self, image_shape: tuple[int, ...], levels: int = 2, steps: int = 4, hidden: int = 64, **options: Any
    ) -> None:
        config = self.config_type(image_shape, levels, steps, hidden, **options)
        super().__init__(build_layers(config), config.image_shape, memory_efficient=config.memory_efficient)
        self.config = config

    @classmethod
    def from_config(cls, config: FlowConfig) -> Self:
        """The untrained model with this config.

        Raises:
            TypeError: the config of another kind of model.
        """
        if type(config) is not cls.config_type:
            raise TypeError(f"{cls.__name__} is built from a {cls.config_type.__name__}, got {type(config).__name__}")
        return cls(**config.to_dict())

    @property
    def num_parameters(self) -> int:
        """Learnable numbers, as stored. The entries that a triangular matrix leaves unread are counted too."""
        return sum(parameter.numel() for parameter in self.parameters())


class InverseFlow(ImageFlow):
    """The paper's flow: L levels of squeeze → K × (inverse conv → ActNorm → 1×1 conv → coupling) → split.

    The inverse convolution runs its solve from data to latent, and a plain convolution when sampling: sampling is
    the cheap direction. Nagar & Varma, AISTATS 2025 (arXiv 2410.14634), section 4.

    Args, Raises: as for :class:`ImageFlow`, with the defaults of :class:`InverseFlowConfig`.
    """

    config_type = InverseFlowConfig


class Glow(ImageFlow):
    """L levels of squeeze → K × (ActNorm → 1×1 conv → affine coupling) → split.

    Kingma & Dhariwal, "Glow: Generative Flow with Invertible 1×1 Convolutions", 2018, section 3. On volumes too. The
    options ``inverse_conv`` and ``orders`` put an inverse convolution at the head of every step.

    Args, Raises: as for :class:`ImageFlow`, with the defaults of :class:`GlowConfig`.
    """

    config_type = GlowConfig


class RealNVP(ImageFlow):
    """L − 1 levels of K checkerboard couplings → squeeze → K channel couplings → split, and K + 1 checkerboard ones.

    Dinh, Sohl-Dickstein & Bengio, "Density estimation using Real NVP", 2016, sections 3.4 to 3.6. ActNorm stands where
    the original has batch normalisation, whose two directions differ in training; and the width of the coupling
    networks stays the same in all levels.

    Args, Raises: as for :class:`ImageFlow`, with the defaults of :class:`RealNVPConfig`.
    """

    config_type = RealNVPConfig


class FInCFlow(ImageFlow):
    """The step of :class:`InverseFlow` turned round: a plain convolution in training, the solve when sampling.

    Kallappa, Nagar & Varma, "FInC Flow: Fast and Invertible k×k Convolutions for Normalizing Flows", 2023
    (arXiv 2301.09266).

    Args, Raises: as for :class:`ImageFlow`, with the defaults of :class:`FInCFlowConfig`.
    """

    config_type = FInCFlowConfig


class Hint(ImageFlow):
    """L levels of Haar squeeze → K × (ActNorm → Householder 1×1 conv → recursive coupling) → split.

    Kruse, Detommaso, Köthe & Scheichl, "HINT: Hierarchical Invertible Neural Transport for Density Estimation and
    Bayesian Inference", 2021 (arXiv 1905.10687), in the multi-scale form of InvertibleNetworks.jl (Orozco et al.,
    2023, arXiv 2312.13480). On volumes too.

    Args, Raises: as for :class:`ImageFlow`, with the defaults of :class:`HintConfig`.
    """

    config_type = HintConfig


KINDS: dict[str, type[ImageFlow]] = {kind.__name__: kind for kind in (InverseFlow, Glow, RealNVP, FInCFlow, Hint)}
"""Every kind of model by its name."""
