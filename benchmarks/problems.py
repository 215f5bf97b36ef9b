"""The problems that the solve is timed on: shapes, tensors, the check before the clock starts, and the calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from harness import Report, Work, relative_error, require
from torch import Tensor

from inverse_flow import functional, reference

# The tap's standard deviation times the square root of the fan-in: well conditioned, and far from the identity.
GAIN = 0.25
# Relative error allowed, in units of the dtype's rounding: the sums of a step have some hundred terms, and
# half-precision images are rounded once.
CHECK_ROUNDINGS = 64
# The plain recurrence takes this many tap steps in well under a second; larger images are checked by the residual.
RECURRENCE_STEPS = 12_000
# On a GPU, inputs are rotated through this much memory: more than its cache, so that no call finds its input there.
ROTATED_BYTES = 256 * 2**20
MAX_ROTATED = 32
CORNERS = ("general", "unit_triangular", "identity")
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """Images (batch, channels, size, size) and a kernel × kernel window, or volumes with one axis more."""

    batch: int
    channels: int
    size: int
    kernel: int = 3
    dimensions: int = 2

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.size}{'²³'[self.dimensions - 2]}, k={self.kernel}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, *[self.size] * self.dimensions

    @property
    def window(self) -> tuple[int, ...]:
        return (self.kernel,) * self.dimensions

    @classmethod
    def parse(cls, text: str) -> Case:
        """CxH, BxCxH or BxCxHxK; B is 100 and K is 3 where they are left out. For argparse."""
        try:
            numbers = [int(part) for part in text.split("x")]
        except ValueError:
            numbers = []
        if not 2 <= len(numbers) <= 4 or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"a shape is CxH, BxCxH or BxCxHxK, got {text!r}")
        case = cls(100, *numbers) if len(numbers) == 2 else cls(*numbers)
        if case.kernel % 2 == 0:
            raise argparse.ArgumentTypeError(
                f"the kernel must be odd for a convolution that keeps the size, got {text!r}"
            )
        return case


@dataclass(frozen=True)
class Signal(Case):
    """Signals (batch, channels, size) and a window of ``kernel`` taps, as images of one row."""

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.size}, k={self.kernel}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, 1, self.size

    @property
    def window(self) -> tuple[int, ...]:
        return 1, self.kernel


@dataclass
class Operands:
    """The tensors of a case: ``inputs`` are rotated through, the rest is shared."""

    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor
    grad: Tensor

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Operands:
        """Seeded random ones; the corner tap is unit lower triangular, and close to the identity."""
        device, generator = torch.device(device), torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weight = normal(case.channels, case.channels, *case.window)
        weight *= GAIN / weight[0].numel() ** 0.5
        weight[(..., *[-1] * len(case.window))] += torch.eye(case.channels)
        images = normal(*case.shape).to(device, dtype)
        count = 1
        if device.type == "cuda":
            count = max(2, min(MAX_ROTATED, ROTATED_BYTES // (images.numel() * images.element_size())))
        rotated = [images.roll(i, 0) for i in range(count)]
        return cls(rotated, *(t.to(device, dtype) for t in (weight, normal(case.channels), normal(*case.shape))))

    def map(self, images: Callable[[Tensor], Tensor]) -> Operands:
        """Each tensor but the bias replaced."""
        return Operands([images(x) for x in self.inputs], images(self.weight), self.bias, images(self.grad))

    def in_float32(self) -> Operands:
        return Operands([x.float() for x in self.inputs], self.weight.float(), self.bias.float(), self.grad.float())

    def differentiable(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(input, weight, bias) that all require gradients, rotating through the inputs for ever."""
        weight, bias = self.weight.detach().requires_grad_(), self.bias.detach().requires_grad_()
        return cycle([(x.detach().requires_grad_(), weight, bias) for x in self.inputs])

    def work(self, mode: str, operator: Callable[..., Tensor], **arguments: Any) -> Work:
        """The operator once for each input: forward without autograd, or both passes with the gradients of input,
        weight and bias. Every input, since that is what a graph has to capture to rotate at all."""

        def forward() -> None:
            with torch.no_grad():
                for x in self.inputs:
                    operator(x, self.weight, self.bias, **arguments)

        rotating = self.differentiable()

        def both() -> None:
            for _ in self.inputs:
                leaves = next(rotating)
                torch.autograd.grad(operator(*leaves, **arguments), leaves, self.grad)

        return forward if mode == "forward" else both


def inverse_conv(weight: Tensor) -> Callable[..., Tensor]:
    """The solve of as many dimensions as the weight has."""
    return functional.inverse_conv2d if weight.dim() == 4 else functional.inverse_conv3d


def causal_conv(weight: Tensor) -> Callable[..., Tensor]:
    return functional.causal_conv2d if weight.dim() == 4 else functional.causal_conv3d


def residual(x: Tensor, y: Tensor, weight: Tensor, corner: str) -> float:
    """‖A x − y‖ / ‖y‖ in float64 arithmetic."""
    return relative_error(causal_conv(weight)(x.double(), weight.double(), corner=corner), y)


def check(operands: Operands, corner: str) -> dict[str, float]:
    """Relative errors of the solve and of its three gradients, against float64 arithmetic that shares no kernel with
    ours: the residual A x + b − y, the adjoint residual Aᵀ u − g, and the weight gradient of the convolution.

    Raises:
        ArithmeticError: one of them is too large, or not a number.
    """
    y, weight, bias = next(operands.differentiable())
    x = inverse_conv(weight)(y, weight, bias, corner=corner)
    u, grad_weight, grad_bias = torch.autograd.grad(x, (y, weight, bias), operands.grad)
    # The adjoint of the convolution at (x, u) holds all that the gradients of the solve are made of.
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    again = causal_conv(weight)(x64, weight64, bias.detach().double(), corner=corner)
    adjoint, conv_grad_weight = torch.autograd.grad(again, (x64, weight64), u.double())
    # Sums that cancel are rounded like their terms, so it is these that an error is relative to.
    sizes = causal_conv(weight)(x64.abs(), weight64, corner=corner)
    (weight_terms,) = torch.autograd.grad(sizes, weight64, u.double().abs())
    exact_bias, bias_terms = (sums.flatten(2).sum((0, 2)) for sums in (-u.double(), u.double().abs()))
    errors = {
        "residual": relative_error(again, y),
        "grad_input": relative_error(adjoint, operands.grad),
        "grad_weight": float((grad_weight + conv_grad_weight).norm() / weight_terms.norm().clamp_min(1e-300)),
        "grad_bias": float((grad_bias - exact_bias).norm() / bias_terms.norm()),
    }
    if y[0, 0].numel() * weight[0, 0].numel() <= RECURRENCE_STEPS:
        plain_recurrence = reference.inverse_conv2d if weight.dim() == 4 else reference.inverse_conv3d
        few, *others = (tensor.detach().double().cpu() for tensor in (y[:2], weight, bias))
        errors["recurrence"] = relative_error(x[:2].cpu(), plain_recurrence(few, *others, corner=corner))
    return require(errors, CHECK_ROUNDINGS * torch.finfo(y.dtype).eps)


def corners_that_solve(case: Case, operands: Operands, report: Report, corners: Sequence[str]) -> list[str]:
    """Those whose solve and gradients pass :func:`check`."""
    found = []
    for corner in corners:
        with report.checked(f"{case}, {corner}, {torch.get_num_threads()} threads"):
            report.add("checks", {"shape": str(case), "corner": corner, **check(operands, corner)})
            found.append(corner)
    return found
