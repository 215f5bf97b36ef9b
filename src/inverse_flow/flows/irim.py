"""Additive coupling in a basis of its own."""

from __future__ import annotations

from torch import nn

from inverse_flow.flows.compose import Compose
from inverse_flow.flows.coupling import AdditiveCoupling
from inverse_flow.flows.householder import Householder
from inverse_flow.reversible.chain import Link


class IRIM(Compose):
    """f(x) = Qᵀ C(Q x), C an additive coupling and Q a learned orthogonal 1×1 convolution; log-determinant 0.

    In place of mixing the channels between two couplings, each coupling has the basis in which it is one, and what it
    gives stands in the basis of its input: a channel keeps its meaning through any number of layers. Putzky & Welling,
    "Invert to Learn to Invert", NeurIPS 2019, section 3 (i-RIM); the CouplingLayerIRIM of Orozco et al.,
    "InvertibleNetworks.jl", 2023. The ``layers`` are Q, which runs once more backwards, and C.

    Args:
        channels: C ≥ 2 of the images.
        hidden: width of the coupling's :class:`~inverse_flow.flows.ConvNet`.
        reflections: of Q, see :class:`~inverse_flow.flows.Householder`.
        context_channels, dimensions, conditioner: as for :class:`~inverse_flow.flows.AdditiveCoupling`.

    Raises:
        ValueError: fewer than 2 channels or one reflection.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        *,
        reflections: int | None = None,
        context_channels: int = 0,
        dimensions: int = 2,
        conditioner: nn.Module | None = None,
    ) -> None:
        coupling = AdditiveCoupling(
            channels, hidden, context_channels=context_channels, dimensions=dimensions, conditioner=conditioner
        )
        super().__init__(Householder(channels, reflections), coupling)

    def links(self, inverse: bool) -> list[Link]:
        # Q stands among the modules once: what replaces parameters for one call, as torch.func.functional_call does,
        # does not put back those of a module that it meets twice.
        basis, coupling = super().links(inverse=False)
        return [basis, coupling.turned if inverse else coupling, basis.turned]
