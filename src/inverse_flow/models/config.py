"""What defines a flow: one frozen dataclass, and a subclass for each published model with that model's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from inverse_flow.flows.base import first_half
from inverse_flow.flows.scale import ScaleKind
from inverse_flow.flows.split import SplitPrior
from inverse_flow.models.fields import Bounds, check, from_values

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

InverseConvKind: TypeAlias = Literal["training", "sampling", "emerging", "periodic", "exponential", "woodbury", "none"]
OrderPattern: TypeAlias = Literal["four", "alternating"]
Corner: TypeAlias = Literal["unit_triangular", "plu", "identity"]
Activation: TypeAlias = Literal["none", "spline", "leaky_relu", "smooth_leaky_relu", "smooth_tanh"]
Mixing: TypeAlias = Literal["plu", "householder", "permutation"]
CouplingKind: TypeAlias = Literal["affine", "additive", "spline", "hint"]
Masks: TypeAlias = Literal["channel", "checkerboard"]
Conditioner: TypeAlias = Literal["conv", "resnet"]
SqueezeKind: TypeAlias = Literal["pixel", "patch", "column", "haar", "db2", "db3", "db4", "sym4", "coif1"]

SQUEEZE_FACTOR = 2
# The axes of vectors, signals, images and volumes, for messages.
AXES: dict[int, tuple[str, ...]] = {0: (), 1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class FlowConfig:
    """Everything that defines a flow; the subclasses differ in their defaults alone.

    Attributes:
        image_shape: (C, H, W) of one image, (C, L) of one signal, (C, D, H, W) of one volume, or (D,) of one vector;
            every axis divisible by 2 to the number of squeezes, one in each level (with checkerboard masks in each but
            the last). A vector is channels alone, so that nothing of it is squeezed: no inverse convolution,
            and channel masks.
        levels: scales of the flow, L. Each begins with a squeeze, and each but the last ends with a split.
        steps: flow steps in a level, K.
        hidden: width of the coupling networks.
        kernel_size: of the inverse convolutions, along every axis; in Python also a tuple of one for each axis.
        corner: kind of the corner tap of the inverse and emerging convolutions, see
            :class:`~inverse_flow.InverseConv2d`.
        orders: ``"four"``: four groups of channels, one for each order, in every inverse convolution (two of signals,
            eight of volumes, which have as many orders). That is the layer of the paper's experiments, and the number
            of channels after a squeeze is always divisible by it.
            ``"alternating"``: one group that mixes all the channels, its order changing from step to step.
        max_row_sum: a bound on the folded taps of the inverse convolutions, below 1, see
            :class:`~inverse_flow.InverseConv2d`; None for none.
        coupling: kind of the couplings: ``"affine"``, ``"additive"``, ``"spline"`` (rational-quadratic), or ``"hint"``
            (recursive, affine).
        scale: how affine couplings bound their scales: ``"tanh"``, ``"exp_clamp"``, ``"sigmoid"``, ``"softplus"`` or
            ``"exp"``, see :class:`~inverse_flow.flows.AffineCoupling`.
        split_prior: density of what a split takes off: ``"conditional"`` on what stays, or ``"standard"`` normal, see
            :class:`~inverse_flow.flows.Split`.
        logit_margin: begin with a :class:`~inverse_flow.flows.Logit` of this margin, for images in [0, 1]; None for no
            such layer.
        context_channels: channels of the context given to the coupling and prior networks; 0 for none.
        inverse_conv: what a step begins with. An inverse convolution, whose solve runs from data to latent,
            ``"training"`` (Inverse-Flow), or from latent to data, ``"sampling"`` (FInC Flow), the other direction being
            a plain convolution. Or another invertible convolution, of all channels together: ``"emerging"``
            (:class:`~inverse_flow.flows.EmergingConv`), ``"periodic"`` (:class:`~inverse_flow.flows.PeriodicConv`) or
            ``"exponential"`` (:class:`~inverse_flow.flows.ExponentialConv`). ``"woodbury"``: a
            :class:`~inverse_flow.flows.Woodbury`, which has no kernel. ``"none"``: nothing.
        activation: what follows: ``"spline"``, a monotone :class:`~inverse_flow.flows.SplineActivation`, or
            ``"leaky_relu"``, ``"smooth_leaky_relu"`` or ``"smooth_tanh"``, the layers of these names; ``"none"``.
        conv1x1: what mixes the channels between two couplings: a 1×1 convolution as ``"plu"`` or as ``"householder"``
            reflections, or the ``"permutation"`` that reverses them.
        squeeze: how space becomes channels: ``"pixel"``, in the order of ``F.pixel_unshuffle``, ``"patch"`` or
            ``"column"``, see :class:`~inverse_flow.flows.Squeeze`, or by a wavelet: ``"haar"``, and ``"db2"``,
            ``"db3"``, ``"db4"``, ``"sym4"`` and ``"coif1"`` with the filters of PyWavelets, see
            :class:`~inverse_flow.flows.WaveletSqueeze`.
        masks: ``"channel"``: the couplings split the channels. ``"checkerboard"``: Real NVP's arrangement, in which a
            level is K couplings with checkerboard masks, the squeeze, and K with channel masks; the last level is
            K + 1 with checkerboard masks.
        conditioner: the coupling networks: ``"conv"`` (:class:`~inverse_flow.flows.ConvNet`) or ``"resnet"``
            (:class:`~inverse_flow.flows.ResNet`).
        blocks: residual blocks of a ``"resnet"`` conditioner.
        memory_efficient: the backward pass rebuilds activations instead of storing them, see
            :class:`~inverse_flow.flows.Flow`. It changes neither the function nor its parameters.

    Raises:
        ValueError: options that do not exist or do not fit together, naming them.
    """

    image_shape: tuple[Annotated[int, Bounds(1)], ...]
    levels: Annotated[int, Bounds(1)] = 2
    steps: Annotated[int, Bounds(1)] = 4
    hidden: Annotated[int, Bounds(1)] = 64
    kernel_size: Annotated[int, Bounds(1)] | tuple[int, ...] = 3
    corner: Corner = "unit_triangular"
    orders: OrderPattern = "four"
    max_row_sum: Annotated[float, Bounds(above=0, below=1)] | None = None
    coupling: CouplingKind = "affine"
    scale: ScaleKind = "tanh"
    split_prior: SplitPrior = "conditional"
    logit_margin: float | None = None
    context_channels: Annotated[int, Bounds(0)] = 0
    inverse_conv: InverseConvKind = "none"
    activation: Activation = "none"
    conv1x1: Mixing = "plu"
    squeeze: SqueezeKind = "pixel"
    masks: Masks = "channel"
    conditioner: Conditioner = "conv"
    blocks: Annotated[int, Bounds(1)] = 2
    memory_efficient: bool = False

    PAPER: ClassVar[dict[str, Any]] = {}
    """The sizes of the model's publication, see :meth:`paper`."""

    def __post_init__(self) -> None:
        check(self)
        if self.scale != "tanh" and self.coupling not in ("affine", "hint"):
            raise ValueError(f'a scale is a choice of "affine" and "hint" couplings, got {self.coupling!r} ones')
        if self.max_row_sum is not None and self.inverse_conv not in ("training", "sampling", "emerging"):
            raise ValueError(f"max_row_sum={self.max_row_sum} bounds inverse convolutions, and this flow has none")
        self._check_kernel()
        self._check_shape()
        self._check_checkerboard()

    def _check_kernel(self) -> None:
        """Options that the kind of convolution does not have."""
        kind = self.inverse_conv
        if self.corner != "unit_triangular" and kind in ("periodic", "exponential", "woodbury"):
            raise ValueError(f"corner={self.corner!r} is of inverse and emerging convolutions, got {kind!r} ones")
        sizes = (self.kernel_size,) if isinstance(self.kernel_size, int) else self.kernel_size
        if kind == "woodbury" and any(size != 3 for size in sizes):
            raise ValueError(f"a Woodbury transformation has no kernel, got kernel_size={self.kernel_size}")
        if kind == "exponential" and any(size % 2 == 0 for size in sizes):
            raise ValueError(f"an exponential convolution needs odd kernel sizes, got {self.kernel_size}")

    @classmethod
    def paper(cls, image_shape: tuple[int, ...], **changes: Any) -> Self:
        """The config at the sizes of the model's publication, with ``changes``.

        Raises:
            ValueError: a kind of model for which no sizes were published.
        """
        if not cls.PAPER:
            raise ValueError(f"{cls.__name__} has no published sizes; give levels, steps and hidden yourself")
        return cls(image_shape=image_shape, **{**cls.PAPER, **changes})

    @property
    def dimensions(self) -> int:
        """Spatial axes: 1 for signals, 2 for images, 3 for volumes, 0 for vectors."""
        return len(self.image_shape) - 1

    @property
    def squeezes(self) -> int:
        """How often space is squeezed into channels."""
        return self.levels if self.masks == "channel" else self.levels - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of :meth:`to_dict`; a field that is missing, since the config is older, has its default.

        Raises:
            ValueError: a field that does not exist, as in the config of a newer version.
        """
        return from_values(cls, values)

    def _check_shape(self) -> None:
        if self.dimensions not in AXES:
            raise ValueError(f"image_shape must be (D,), (C, L), (C, H, W) or (C, D, H, W), got {self.image_shape}")
        sizes = self.image_shape[1:]
        divisor = SQUEEZE_FACTOR**self.squeezes
        if any(size % divisor for size in sizes):
            axes = " and ".join(filter(None, [", ".join(AXES[len(sizes)][:-1]), AXES[len(sizes)][-1]]))
            raise ValueError(
                f"{self.levels} levels need {axes} divisible by {divisor}, got {' × '.join(map(str, sizes))}: "
                "fewer levels, or another size, would fit"
            )
        if not sizes:
            self._check_vectors()

    def _check_vectors(self) -> None:
        for name, right in (("inverse_conv", "none"), ("masks", "channel")):
            given = getattr(self, name)
            if given != right:
                raise ValueError(f'a vector has no axes besides its channels: {name} must be "{right}", got "{given}"')
        (channels,) = self.image_shape
        for _ in range(self.levels - 1):
            channels = first_half(channels)
        if channels < 2:
            raise ValueError(
                f"a coupling needs 2 values, and {self.levels} levels leave {channels} of {self.image_shape[0]} in the "
                "last: vectors need fewer levels, or to be longer"
            )

    def _check_checkerboard(self) -> None:
        if self.masks != "checkerboard":
            return
        if self.coupling not in ("affine", "additive"):
            raise ValueError(f'checkerboard masks need an "affine" or "additive" coupling, got {self.coupling!r}')
        orders = 2**self.dimensions
        if self.inverse_conv in ("training", "sampling") and self.orders == "four" and self.image_shape[0] % orders:
            raise ValueError(
                f'with checkerboard masks an inverse convolution meets unsqueezed images: orders="four" needs their '
                f'channels divisible by {orders}, got {self.image_shape[0]}; use orders="alternating"'
            )


@dataclass(frozen=True)
class InverseFlowConfig(FlowConfig):
    """Defaults of :class:`~inverse_flow.models.InverseFlow`: a step with the solve in the training direction."""

    inverse_conv: InverseConvKind = "training"

    # Nagar & Varma, AISTATS 2025 (arXiv 2410.14634), section 4: L = 2, K = 16, a spline behind the inverse convolution.
    PAPER: ClassVar[dict[str, Any]] = {"levels": 2, "steps": 16, "activation": "spline"}


@dataclass(frozen=True)
class GlowConfig(FlowConfig):
    """Defaults of :class:`~inverse_flow.models.Glow`."""

    # Kingma & Dhariwal, 2018, appendix: CIFAR-10, L = 3, K = 32, 512 channels in the coupling networks.
    PAPER: ClassVar[dict[str, Any]] = {"levels": 3, "steps": 32, "hidden": 512}


@dataclass(frozen=True)
class RealNVPConfig(FlowConfig):
    """Defaults of :class:`~inverse_flow.models.RealNVP`: masks instead of 1×1 convolutions, residual networks."""

    orders: OrderPattern = "alternating"
    conv1x1: Mixing = "permutation"
    masks: Masks = "checkerboard"
    conditioner: Conditioner = "resnet"

    # Dinh, Sohl-Dickstein & Bengio, 2016, section 4.1: CIFAR-10, one downscaling, 8 residual blocks, 64 feature maps.
    PAPER: ClassVar[dict[str, Any]] = {"levels": 2, "steps": 3, "hidden": 64, "blocks": 8}


@dataclass(frozen=True)
class FInCFlowConfig(FlowConfig):
    """Defaults of :class:`~inverse_flow.models.FInCFlow`: a step with the convolution in the training direction."""

    inverse_conv: InverseConvKind = "sampling"

    # The sizes at which Nagar & Varma, 2025, section 4, set it beside Inverse-Flow.
    PAPER: ClassVar[dict[str, Any]] = {"levels": 2, "steps": 16}


@dataclass(frozen=True)
class HintConfig(FlowConfig):
    """Defaults of :class:`~inverse_flow.models.Hint`: recursive couplings, Householder reflections, Haar wavelets."""

    coupling: CouplingKind = "hint"
    conv1x1: Mixing = "householder"
    squeeze: SqueezeKind = "haar"
