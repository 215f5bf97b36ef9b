"""Every layer is captured whole by ``torch.compile`` and ``torch.export``, strict or not, for any batch and any sizes,
and trained afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .test_battery import CASES, Case, flat

# One of each kind: the others differ in their options alone.
NAMES = (
    "inverse_conv_plu", "inverse_conv_four_orders", "actnorm", "conv1x1", "additive_coupling",
    "affine_coupling_context", "squeeze", "logit", "permute", "split_hidden_context", "checkerboard_context",
    "linear_spline", "spline_coupling", "householder", "haar_by_channel", "hint_shallow", "hyperbolic",
    "residual_coupling", "compose", "haar_volume", "emerging", "periodic", "exponential", "leaky_relu", "smooth_tanh",
    "wavelet", "squeeze_patch", "irim", "woodbury",
)  # fmt: skip
ONE_SIZE = ("woodbury",)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler about its own code
AUTO = torch.export.Dim.AUTO


class BothWays(nn.Module):
    """A layer's two directions in one graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        z, logdet = self.layer(x, context)
        back, inverse_logdet = self.layer.inverse(z, context)
        return flat(z), logdet, back, inverse_logdet


def arguments(case: Case, batch: int, factor: int) -> tuple[Tensor, ...]:
    """Images ``factor`` times as high and as wide as those of the case, where its layer takes images of any size."""
    channels, *sizes = case.shape
    if case in [CASES[name] for name in ONE_SIZE]:
        factor = 1
    larger = replace(case, shape=(channels, *(factor * size for size in sizes)))
    context = case.context(batch, torch.float32)
    return (larger.images(batch, torch.float32), *(() if context is None else (context,)))


def gradients(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """Of a sum that weighs every value differently, in the module's parameters and its first input."""
    x = inputs[0].clone().requires_grad_()
    values = torch.cat([value.flatten() for value in module(x, *inputs[1:])])
    weights = torch.linspace(0.5, 1.5, len(values))
    wanted = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad((weights * values).sum(), list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def check(captured: Any, module: nn.Module, case: Case, *, grad: bool = True) -> None:
    """What was captured gives the module's values, for another batch and other sizes too, and its gradients."""
    for batch, factor in ((3, 2), (5, 3)):
        inputs = arguments(case, batch, factor)
        torch.testing.assert_close(captured(*inputs), module(*inputs))
    if grad:
        # Sums in another order.
        torch.testing.assert_close(gradients(captured, inputs), gradients(module, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.alike
@pytest.mark.parametrize("how", ["compiled", "exported", "exported strictly"])
@pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=NAMES)
def test_captured_for_any_sizes_and_trained_afterwards(case: Case, how: str) -> None:
    torch.compiler.reset()
    module = BothWays(case.layer(torch.float32))
    if how == "compiled":
        check(torch.compile(module, fullgraph=True, dynamic=True, backend="eager"), module, case, grad=False)
        return
    inputs, strict = arguments(case, 3, 2), how == "exported strictly"
    sizes = [{0: AUTO, **dict.fromkeys(range(2, x.dim()), AUTO)} for x in inputs]
    program = torch.export.export(module, inputs, dynamic_shapes=tuple(sizes), strict=strict)
    check(program.module(), module, case)
    check(program.run_decompositions().module(), module, case, grad=not strict)
