"""What do the flows of nflows and FrEIA keep for their backward pass, stored as they do and rebuilt by this library?

    python benchmarks/foreign.py --json benchmarks/results/foreign.json

nflows: depth × (affine coupling with a residual network, random permutation), a CompositeTransform. FrEIA: depth × an
AllInOneBlock with a network of two hidden layers, a SequenceINN. Both on vectors, stored as they are and within a
ReversibleSequential. Bytes are those of every storage that autograd keeps, each counted once, without parameters and
buffers. Before anything is timed, gradients are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from harness import RATIOS, Report, Table, compare, parser, relative_error, require, time_alternately
from memory import GRADIENT_TOLERANCE, counting_bytes
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform, RandomPermutation
from torch import Tensor, nn

from inverse_flow.adapters import from_freia
from inverse_flow.reversible import ReversibleSequential

STORED, OURS = "stored", "rebuilt"
MIB = 2**20


def residual_net(inputs: int, outputs: int, hidden: int) -> nn.Module:
    return ResidualNet(inputs, outputs, hidden_features=hidden, num_blocks=2)


def network(inputs: int, outputs: int, hidden: int) -> nn.Module:
    middle = [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), *middle, nn.Linear(hidden, outputs))


def nflows_stack(features: int, hidden: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        mask = [(i + j) % 2 for j in range(features)]
        layers += [AffineCouplingTransform(mask, partial(residual_net, hidden=hidden)), RandomPermutation(features)]
    return CompositeTransform(layers)


def freia_stack(features: int, hidden: int, depth: int) -> nn.Module:
    inn = SequenceINN(features)
    for _ in range(depth):
        inn.append(AllInOneBlock, subnet_constructor=partial(network, hidden=hidden))
    return inn


def ways(library: str, features: int, hidden: int, depth: int) -> dict[str, nn.Module]:
    """The same stack with its activations stored and rebuilt."""
    torch.manual_seed(0)
    if library == "nflows":
        stack = nflows_stack(features, hidden, depth)
        return {STORED: stack, OURS: ReversibleSequential(stack)}
    stack = freia_stack(features, hidden, depth)
    return {STORED: stack, OURS: ReversibleSequential(from_freia(stack))}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    z, logdet = model(x)
    loss: Tensor = (0.5 * z.square().sum(1) - logdet).mean()
    return loss


def kept(model: nn.Module, x: Tensor) -> int:
    with counting_bytes([*model.parameters(), *model.buffers()]) as count:
        loss_of(model, x)
        return count()


def gradient_difference(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """The largest relative difference between the two ways.

    Raises:
        ArithmeticError: it is too large, or not a number.
    """
    parameters = [parameter for parameter in models[STORED].parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(loss_of(models[name], x), parameters) for name in (OURS, STORED))
    return require({OURS: max(map(relative_error, ours, theirs))}, GRADIENT_TOLERANCE)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def work() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model, x).backward()

    return work


def measure(library: str, depth: int, arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    models = {name: m.to(device) for name, m in ways(library, arguments.features, arguments.hidden, depth).items()}
    x = torch.randn(arguments.batch, arguments.features, generator=torch.Generator().manual_seed(1)).to(device)
    difference = gradient_difference(models, x)[OURS]
    samples = time_alternately({name: step(model, x) for name, model in models.items()}, device, arguments.budget)
    sizes = {name: kept(model, x) for name, model in models.items()}
    row = {"library": library, "depth": depth, "stored_mib": sizes[STORED] / MIB, "rebuilt_mib": sizes[OURS] / MIB}
    return {**row, "gradient_difference": difference, **compare(samples[OURS], samples[STORED])}


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=1, budget=10.0)
    made.add_argument("--depths", type=int, nargs="+", default=[4, 16], help="couplings in a stack")
    for name, default in {"batch": 512, "features": 64, "hidden": 128}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    arguments = made.parse_args(given)
    report = Report("foreign", arguments)
    columns = {
        "": "{library}",
        "depth": "{depth}",
        "stored MiB": "{stored_mib:.2f}",
        "rebuilt MiB": "{rebuilt_mib:.2f}",
    }
    table = Table(columns | {"ms": "{ours_ms:.1f}", "stored ms": "{rival_ms:.1f}"} | RATIOS)
    for library in ("nflows", "FrEIA"):
        for depth in arguments.depths:
            with report.checked(f"{library}, depth {depth}"):
                row = measure(library, depth, arguments)
                report.add("rows", row)
                table.add(row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
