"""What does a call cost when there is nothing to compute?

    python benchmarks/overhead.py
    python benchmarks/overhead.py --json benchmarks/results/overhead.json

Every call gets an empty batch. What is timed is then Python, autograd, PyTorch's dispatcher, the checks, and what the
kernels do before the first image: preparing the weight. Calls are timed in turn in this one process. F.conv2d takes
part as the measure of what PyTorch's own operators cost, and a Function in Python that saves and returns what ours
does and computes nothing, as the measure of what ``autograd.grad`` costs by itself. On a GPU nothing is launched for an
empty batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Work, describe, print_table, quantile, time_alternately, write_json
from torch import Tensor

from inverse_flow import InverseConv2d
from inverse_flow.functional import inverse_conv2d
from inverse_flow.ops import library as ops
from inverse_flow.ops.spec import UNIT_TRIANGULAR

CHANNELS, SIZE, KERNEL = 3, 8, 3
# Microseconds, on the CPU.
TARGETS = {"functional, no grad": 15.0, "functional, backward": 25.0}
# What a backward pass costs above this one is ours.
BARE_BACKWARD = "bare Function, backward"


class BareFunction(torch.autograd.Function):
    """Saves, and hands back, what the solve does; computes nothing."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return input.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        _, weight, bias = ctx.saved_tensors
        return grad_output, weight, bias


def check(input: Tensor, weight: Tensor, bias: Tensor) -> None:
    """A call with an empty batch gives an empty result, and gradients of zero.

    Raises:
        ArithmeticError: it does not.
    """
    output = inverse_conv2d(input, weight, bias, corner="unit_triangular")
    gradients = torch.autograd.grad(output, (input, weight, bias), torch.empty_like(output))
    if output.shape != input.shape or any(bool(gradient.any()) for gradient in gradients):
        raise ArithmeticError("an empty batch does not give an empty result and gradients of zero")


def candidates(device: torch.device) -> dict[str, Work]:
    """The calls; a backward pass is timed by itself, over a graph that is kept."""
    layer = InverseConv2d(CHANNELS, KERNEL, device=device)
    weight, bias = layer.weight.detach().requires_grad_(), torch.zeros(CHANNELS, device=device, requires_grad=True)
    input = torch.empty(0, CHANNELS, SIZE, SIZE, device=device, requires_grad=True)
    check(input, weight, bias)
    leaves = (input, weight, bias)
    plain = tuple(tensor.detach() for tensor in leaves)
    grad = torch.empty_like(plain[0])

    def solve(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return inverse_conv2d(y, w, b, corner="unit_triangular")

    def convolve(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(y, w, b, padding=KERNEL // 2)

    def without_grad(work: Work) -> Work:
        def run() -> None:
            with torch.no_grad():
                work()

        return run

    def backward(output: Tensor, inputs: tuple[Tensor, ...]) -> Work:
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    convolved = convolve(*leaves)
    layer_output = layer(input)[0]
    return {
        "operator, no grad": without_grad(lambda: ops.solve(*plain, (0,), UNIT_TRIANGULAR, False)),
        "functional, no grad": without_grad(lambda: solve(*plain)),
        "module, no grad": without_grad(lambda: layer(plain[0])),
        "conv2d, no grad": without_grad(lambda: convolve(*plain)),
        "functional, with grad": lambda: solve(*leaves),
        "module, with grad": lambda: layer(input),
        "conv2d, with grad": lambda: convolve(*leaves),
        "operator, backward": without_grad(
            lambda: ops.solve_backward(grad, plain[0], plain[1], (0,), UNIT_TRIANGULAR, False)
        ),
        "functional, backward": backward(solve(*leaves), leaves),
        BARE_BACKWARD: backward(BareFunction.apply(*leaves), leaves),
        "module, backward": backward(layer_output, (input, *layer.parameters())),
        "conv2d, backward": backward(convolved, leaves),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    print(describe(arguments.device))
    samples = time_alternately(candidates(arguments.device), arguments.device, arguments.budget)
    rows: list[dict[str, Any]] = []
    for name, seconds in samples.items():
        micros = [1e6 * second for second in seconds]
        rows.append(
            {
                "call": name,
                "median_us": statistics.median(micros),
                "p20_us": quantile(micros, 0.2),
                "p80_us": quantile(micros, 0.8),
                "fastest_us": min(micros),
                "rounds": len(micros),
            }
        )
    names = ("median_us", "p20_us", "p80_us", "fastest_us")
    print_table(
        ["call on an empty batch, µs", "median", "p20", "p80", "fastest"],
        [[row["call"], *(f"{row[name]:.2f}" for name in names)] for row in rows],
    )
    if arguments.device.type == "cpu":
        medians = {row["call"]: row["median_us"] for row in rows}
        for name, target in TARGETS.items():
            print(f"{name}: {medians[name]:.1f} µs (target at most {target:.0f})")
        ours = medians["functional, backward"] - medians[BARE_BACKWARD]
        print(f"functional, backward, above a bare Function: {ours:.1f} µs")
    if arguments.json:
        settings = {"channels": CHANNELS, "size": SIZE, "kernel": KERNEL, "targets_us": TARGETS}
        write_json(arguments.json, "overhead", arguments.device, settings, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
