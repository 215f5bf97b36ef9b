"""An unrolled loop: a network that solves an inverse problem by learned steps along its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from inverse_flow.flows import IRIM, ActNorm, AdditiveCoupling
from inverse_flow.flows.base import check_floating
from inverse_flow.ops.causal import without_autocast
from inverse_flow.ops.spec import check_integer
from inverse_flow.reversible.chain import Link
from inverse_flow.reversible.rebuild import Rebuilding, run

Operator: TypeAlias = Callable[[Tensor], Tensor]
"""A differentiable map, as a rule a linear one, from the unknown (B, K, …) to the data, whose first axis is the batch.
"""


class DataGradient(nn.Module):
    """t(η, d) = (Aᵀ(A η − d), 0), the gradient of ½‖A η − d‖² in η, normalised and filled up with zeros.

    Args:
        operator: A. Aᵀ is its vector-Jacobian product at η, by autograd.
        norm: what normalises the gradient.
        channels: of t.
    """

    def __init__(self, operator: Operator, norm: ActNorm, channels: int) -> None:
        super().__init__()
        self.operator, self.norm, self.channels = operator, norm, channels

    def forward(self, eta: Tensor, data: Tensor) -> Tensor:
        with without_autocast(eta.device.type):
            return self._gradient(eta, data)

    def _gradient(self, eta: Tensor, data: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            predicted, pull_back = torch.func.vjp(self.operator, eta)  # type: ignore[misc]
            return self._filled_up(pull_back(predicted - data)[0])
        differentiable = torch.is_grad_enabled()
        # In inference mode too autograd has to find Aᵀ, which it does not do for tensors of that mode.
        with torch.inference_mode(False), torch.enable_grad():
            eta, data = (value.clone() if value.is_inference() else value for value in (eta, data))
            eta = eta if eta.requires_grad and differentiable else eta.detach().requires_grad_()
            predicted = self.operator(eta)
            if not predicted.requires_grad:
                raise ValueError("the operator makes of eta what autograd cannot follow, so that it has no gradient")
            # Autograd follows how r = A η − d depends on η, and so does Aᵀ where A is not linear.
            (gradient,) = torch.autograd.grad(predicted, eta, predicted - data, create_graph=differentiable)
        return self._filled_up(gradient)

    def _filled_up(self, gradient: Tensor) -> Tensor:
        gradient, _ = self.norm(gradient)
        rest = gradient.new_zeros(len(gradient), self.channels - gradient.shape[1], *gradient.shape[2:])
        return torch.cat((gradient, rest), dim=1)


class LoopNetwork(nn.Module):
    """(η, s) after a number of steps s ← s + (∇, 0), (η, s) ← IRIM(η, s), with ∇ the normalised gradient Aᵀ(A η − d).

    η is the estimate of what is sought, d are the data, s is a memory, which may start at zero. Both halves of a step
    are invertible, the first one since η is still there to take the gradient of again. So nothing within the loop needs
    to be kept: training takes the memory of one step, whatever their number. Putzky & Welling, "Invert to Learn to
    Invert", NeurIPS 2019 (i-RIM); the NetworkLoop of Orozco et al., "InvertibleNetworks.jl", 2023.

    Args:
        channels: of η.
        state_channels: of s, at least as many.
        hidden: width of the networks in the :class:`~inverse_flow.flows.IRIM` layers.
        steps: how many; each has parameters of its own.
        dimensions: 0 for vectors (B, C), 1 for signals (B, C, L), 2 for images, 3 for volumes.
        memory_efficient: rebuild the steps in the backward pass; False stores them.

    Raises:
        ValueError: options that do not fit; η, s or d of another shape; a function as the operator whose result needs
            gradients of its own, which the rebuilding would not find; an operator without a gradient.
        TypeError: η, s or d that are not floating, or of two dtypes; an operator that is none, or that gives another
            dtype than that of d.
    """

    def __init__(
        self,
        channels: int,
        state_channels: int,
        hidden: int = 32,
        steps: int = 8,
        *,
        dimensions: int = 2,
        memory_efficient: bool = True,
    ) -> None:
        super().__init__()
        check_integer("channels", channels)
        check_integer("state_channels", state_channels, least=channels)
        check_integer("hidden", hidden, least=0)
        check_integer("steps", steps)
        self.channels, self.state_channels = channels, state_channels
        self.memory_efficient = memory_efficient
        self.norms = nn.ModuleList(ActNorm(channels) for _ in range(steps))
        self.layers = nn.ModuleList(
            IRIM(channels + state_channels, hidden, dimensions=dimensions) for _ in range(steps)
        )

    def forward(self, eta: Tensor, state: Tensor, data: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """(η, s) after the last step.

        Args:
            eta: (B, channels, …).
            state: (B, state_channels, …), of the same sizes.
            data: d, of the shape of ``operator(eta)``.
            operator: A, any differentiable map. One with parameters that are to be trained, or the tensors of which
                need gradients, is a module. If it is not linear, Aᵀ is that of its Jacobian at η: a link function Ψ
                before a linear A is ``lambda x: A(Ψ(x))``. Autocast is off within it, as half precision would leave
                few digits of A η − d.
        """
        return self._run(eta, state, data, operator, inverse=False)

    def inverse(self, eta: Tensor, state: Tensor, data: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """(η, s) before the first step, from those after the last one."""
        return self._run(eta, state, data, operator, inverse=True)

    def _run(
        self, eta: Tensor, state: Tensor, data: Tensor, operator: Operator, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        self._check(eta, state, data, operator)
        links = self._links(operator)
        if inverse:
            links = [link.turned for link in reversed(links)]
        rebuilding = Rebuilding() if self.memory_efficient else None
        (both,), _ = run(links, (torch.cat((eta, state), dim=1),), data, rebuilding)
        return both[:, : self.channels], both[:, self.channels :]

    def _links(self, operator: Operator) -> list[Link]:
        """The gradient of each step is an additive coupling of η with s, whose context is d."""
        both = self.channels + self.state_channels
        links = []
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            gradient = DataGradient(operator, norm, self.state_channels)  # type: ignore[arg-type]
            coupling = AdditiveCoupling(both, kept=self.channels, conditioner=gradient)
            links += [Link(f"norms.{i}", coupling, False), Link(f"layers.{i}", layer, False)]
        return links

    def _check(self, eta: Tensor, state: Tensor, data: Tensor, operator: Operator) -> None:
        if not callable(operator):
            raise TypeError(f"the operator is a function of eta, got {type(operator).__name__}")
        for value in (eta, state, data):
            check_floating(self, value)
        if eta.dim() < 2:
            raise ValueError(f"eta must be (B, {self.channels}, …), got {tuple(eta.shape)}")
        for name, value, channels in (("eta", eta, self.channels), ("state", state, self.state_channels)):
            if value.dtype != eta.dtype:
                raise TypeError(f"{name} must be {eta.dtype} as eta is, got {value.dtype}")
            expected = (len(eta), channels, *eta.shape[2:])
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} must be {expected}, got {tuple(value.shape)}")
        with without_autocast(eta.device.type):
            predicted = operator(eta.detach())
        if not isinstance(predicted, Tensor):
            raise TypeError(f"the operator makes a tensor of eta, got {type(predicted).__name__}")
        if predicted.shape != data.shape:
            raise ValueError(
                f"the operator makes {tuple(predicted.shape)} of eta {tuple(eta.shape)}, and the data are "
                f"{tuple(data.shape)}"
            )
        if predicted.dtype != data.dtype:
            raise TypeError(f"the operator makes {predicted.dtype} of eta, and the data are {data.dtype}")
        if predicted.requires_grad and not isinstance(operator, nn.Module):
            raise ValueError(
                f"the operator is a {type(operator).__name__} with tensors that need gradients: make it an nn.Module "
                "that has them as parameters, so that they are found when the steps are rebuilt"
            )
