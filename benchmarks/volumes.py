"""What does a solve of volumes cost against ``F.conv3d`` on the same tensors?

    python benchmarks/volumes.py                            every shape, one thread and two
    python benchmarks/volumes.py --shapes 1x8x32 --mode forward --threads 1
    python benchmarks/volumes.py --json benchmarks/results/volumes.json

For every shape and kind of corner the solve and its gradients are checked first; then the operators are timed in turn
in this one process. The ratio is our time over the convolution's: below 1 the solve is the faster of the two. The
convolution pads to its input's size, so both read and write the same tensors; both have a bias.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import RATIOS, Report, Table, compare, geometric_mean, parser, relative_error, require, time_alternately
from problems import CHECK_ROUNDINGS, CORNERS, GAIN, MODES, Operands

from inverse_flow import explain
from inverse_flow.functional import causal_conv3d, inverse_conv3d

# Of the ratios to the convolution, in both modes.
TARGETS = {"mean": 0.7, "worst": 1.2}


@dataclass(frozen=True)
class Volumes:
    """(batch, channels, size, size, size) and a kernel × kernel × kernel window."""

    batch: int
    channels: int
    size: int
    kernel: int = 3

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.size}³, k={self.kernel}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *[self.size] * 3)

    @classmethod
    def parse(cls, text: str) -> Volumes:
        """BxCxD or BxCxDxK, for argparse."""
        try:
            numbers = [int(part) for part in text.split("x")]
        except ValueError:
            numbers = []
        if len(numbers) not in (3, 4) or min(numbers) < 1 or (len(numbers) == 4 and numbers[-1] % 2 == 0):
            raise argparse.ArgumentTypeError(f"a shape is BxCxD or BxCxDxK with an odd kernel, got {text!r}")
        return cls(*numbers)

    def operands(self) -> Operands:
        """Seeded random ones; the corner tap is close to the identity."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        weight = normal(self.channels, self.channels, *[self.kernel] * 3)
        weight *= GAIN / weight[0].numel() ** 0.5
        weight[:, :, -1, -1, -1] += torch.eye(self.channels)
        return Operands([normal(*self.shape)], weight, normal(self.channels), normal(*self.shape))


CASES = [Volumes(*sizes) for sizes in [(1, 4, 32), (1, 8, 32), (4, 8, 16), (16, 8, 16), (1, 16, 64), (32, 2, 32)]]


def check(operands: Operands, corner: str) -> dict[str, float]:
    """Relative errors of the solve and of its gradients, against the float64 convolution and its derivatives.

    Raises:
        ArithmeticError: one of them is too large, or not a number.
    """
    y, weight, bias = next(operands.differentiable())
    x = inverse_conv3d(y, weight, bias, corner=corner)
    u, grad_weight, grad_bias = torch.autograd.grad(x, (y, weight, bias), operands.grad)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    again = causal_conv3d(x64, weight64, bias.detach().double(), corner=corner)
    adjoint, conv_grad_weight = torch.autograd.grad(again, (x64, weight64), u.double())
    errors = {
        "residual": relative_error(again, y),
        "grad_input": relative_error(adjoint, operands.grad),
        "grad_weight": relative_error(grad_weight, -conv_grad_weight),
        "grad_bias": relative_error(grad_bias, -u.double().sum((0, 2, 3, 4))),
    }
    return require(errors, CHECK_ROUNDINGS * torch.finfo(y.dtype).eps)


def measure(
    case: Volumes, mode: str, operands: Operands, corners: Sequence[str], budget: float
) -> list[dict[str, Any]]:
    """A row for each corner."""
    works = {corner: operands.work(mode, inverse_conv3d, corner=corner) for corner in corners}
    works["conv3d"] = operands.work(mode, F.conv3d, padding=case.kernel // 2)
    samples = time_alternately(works, torch.device("cpu"), budget)
    plan = explain(case.shape, case.kernel, backward=mode != "forward")
    place = {"shape": str(case), "mode": mode, "threads": torch.get_num_threads(), "regime": plan.regime}
    return [{**place, "corner": corner, **compare(samples[corner], samples["conv3d"])} for corner in corners]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and worst ratio of each mode, corner and number of threads, with the targets."""
    found = []
    names = ("threads", "corner", "mode")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        members = [row for row in rows if tuple(row[name] for name in names) == key]
        entry = dict(zip(names, key, strict=True)) | {
            "shapes": len(members),
            "mean": geometric_mean([row["ratio"] for row in members]),
            "worst": max(row["ratio"] for row in members),
            "fastest": geometric_mean([row["ratio_fastest"] for row in members]),
        }
        entry["targets"] = ", ".join(
            f"{name} ≤ {aim} {'kept' if entry[name] <= aim else 'MISSED'}" for name, aim in TARGETS.items()
        )
        found.append(entry)
    return found


def compare_shapes(report: Report, arguments: argparse.Namespace) -> None:
    columns = {
        "B x C x D³, kernel, mode": "{shape:20} {mode:16}",
        "corner": "{corner:15}",
        "threads": "{threads}",
        "regime": "{regime:15}",
        "ours ms": "{ours_ms:.3f}",
        "conv3d ms": "{rival_ms:.3f}",
        **RATIOS,
    }
    table, rows = Table(columns), []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for case in arguments.shapes:
            operands, correct = case.operands(), []
            for corner in arguments.corner:
                with report.checked(f"{case}, {corner}, {threads} threads"):
                    report.add("checks", {"shape": str(case), "corner": corner, **check(operands, corner)})
                    correct.append(corner)
            for mode in arguments.mode if correct else ():
                for row in measure(case, mode, operands, correct, arguments.budget):
                    rows.append(row)
                    report.add("rows", row)
                    table.add(row)
    summary = summarise(rows)
    report.set(summary=summary)
    print()
    columns = {"mode, corner": "{mode}, {shapes} shapes, {corner}", "threads": "{threads}"}
    columns |= {name: f"{{{name}:.3f}}" for name in ("mean", "worst", "fastest")}
    Table(columns | {"targets": "{targets}"}).add(*summary)


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=(1, 2), budget=1.5, device=False)
    made.add_argument("--shapes", type=Volumes.parse, nargs="+", default=CASES, metavar="BxCxDxK")
    made.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    made.add_argument("--corner", choices=CORNERS, nargs="+", default=["general"])
    arguments = made.parse_args(given)
    report = Report("volumes", arguments)
    compare_shapes(report, arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
