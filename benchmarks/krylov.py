"""Kernels without a causal form: iterations and time of GMRES with our preconditioner, the two solves from opposite
corners, beside no preconditioner, the circulant one (FFT), and a dense solve.

    python benchmarks/krylov.py                       images of 576 values, whose conditions are computed
    python benchmarks/krylov.py --side 128            larger ones, without the dense solve
    python benchmarks/krylov.py --json benchmarks/results/krylov.json

All methods solve the same system to the same relative residual. The dense solve is that of a matrix that is there
already, factored anew for each batch as the kernel of a layer that learns would have it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from harness import Report, Table, compare, parser, relative_error, require, spread, time_alternately
from torch import Tensor

from inverse_flow.ops.centred import System, apply, convolve, gauss_seidel, kernel, transpose
from inverse_flow.ops.krylov import Found, Map, gmres

MOST_ITERATIONS, RESTART = 500, 50
# A dense matrix with more rows takes too long to judge by.
MOST_UNKNOWNS = 2048
# Products with the matrix cost ten roundings or so.
ROUNDINGS = 64


class Problem(NamedTuple):
    """A kernel, and Tikhonov's λ for it."""

    name: str
    weight: Tensor
    tikhonov: float = 0.0


def about_identity(channels: int, size: int, gain: float) -> Tensor:
    """Random taps; their share beside the identity decides the condition."""
    taps = torch.randn(channels, channels, size, size, dtype=torch.float64) * gain / math.sqrt(channels) / size
    taps[range(channels), range(channels), size // 2, size // 2] += 1
    return taps


def gaussian(size: int, deviation: float) -> Tensor:
    row = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * deviation**2))
    return (row[:, None] * row / row.sum() ** 2)[None, None]


def motion(size: int, degrees: float) -> Tensor:
    """A straight movement during the exposure."""
    along = torch.linspace(-(size // 2), size // 2, 100 * size, dtype=torch.float64)
    angle = math.radians(degrees)
    rows, columns = (torch.round(along * part).long() + size // 2 for part in (-math.sin(angle), math.cos(angle)))
    taps = torch.zeros(size, size, dtype=torch.float64)
    taps.index_put_((rows, columns), torch.full_like(along, 1 / len(along)), accumulate=True)
    return taps[None, None]


def defocus(size: int) -> Tensor:
    """A disc."""
    place = torch.arange(size, dtype=torch.float64) - size // 2
    taps = (place[:, None] ** 2 + place**2 <= (size / 2) ** 2).double()
    return (taps / taps.sum())[None, None]


def problems() -> list[Problem]:
    """From well to ill conditioned; blurs that are close to singular with Tikhonov's term."""
    found = [Problem(f"random, gain {gain}", about_identity(4, 3, gain)) for gain in (0.25, 0.5, 0.75, 0.9)]
    found += [Problem(f"Gaussian {width}", gaussian(5, width)) for width in (0.5, 0.7, 0.85, 1.0)]
    blurs = {"Gaussian 1.5": gaussian(9, 1.5), "motion": motion(9, 30), "defocus": defocus(7)}
    return found + [Problem(name, taps, term) for name, taps in blurs.items() for term in (1e-2, 1e-4)]


def circulant(taps: Tensor, height: int, width: int) -> Map:
    """r ↦ C⁻¹ r, where C is the convolution with periodic borders: a product for each frequency."""
    rows, columns = taps.shape[2:]
    periodic = taps.new_zeros(*taps.shape[:2], height, width)
    for p in range(rows):
        for q in range(columns):
            periodic[:, :, (rows // 2 - p) % height, (columns // 2 - q) % width] += taps[:, :, p, q]
    inverse = torch.linalg.inv(torch.fft.rfft2(periodic).permute(2, 3, 0, 1))

    def precondition(images: Tensor) -> Tensor:
        waves = torch.fft.rfft2(images).permute(2, 3, 1, 0)
        return torch.fft.irfft2((inverse @ waves).permute(3, 2, 0, 1), s=(height, width))

    return precondition


def measure(problem: Problem, side: int, batch: int, tolerance: float, budget: float) -> dict[str, Any]:
    """Iterations and times of every method that converges, after a check of what it returns."""
    weight, (channels, *_) = problem.weight, problem.weight.shape
    side = side // math.isqrt(channels)  # as many values, whatever the channels
    system = System(1, problem.tikhonov, True, tolerance, MOST_ITERATIONS, RESTART)
    images = torch.randn(batch, channels, side, side, dtype=torch.float64)
    right = convolve(images, weight, 1)
    if problem.tikhonov:
        right = convolve(right, transpose(weight, 1), 1)

    def solve(precondition: Map) -> Found:
        settings = {"tolerance": tolerance, "max_iterations": MOST_ITERATIONS, "restart": RESTART}
        return gmres(lambda x: apply(x, weight, system), right, precondition, **settings)  # type: ignore[arg-type]

    # What each method has to make of the kernel first is in its time.
    methods: dict[str, Any] = {
        "ours": lambda: solve(gauss_seidel(kernel(weight, system), 1)),
        "circulant": lambda: solve(circulant(kernel(weight, system), side, side)),
        "none": lambda: solve(lambda x: x),
    }
    found = {name: method() for name, method in methods.items()}
    row: dict[str, Any] = {
        "kernel": problem.name, "tikhonov": problem.tikhonov, "shape": [batch, channels, side, side],
        "iterations": {name: int(result.iterations.max()) for name, result in found.items()},
        "residual": {name: float(result.residual.max()) for name, result in found.items()},
        "condition": None,
    }  # fmt: skip
    converged = [name for name, result in found.items() if (result.residual <= tolerance).all()]
    row["converged"] = converged
    unknowns = channels * side * side
    work = {name: methods[name] for name in converged}
    if unknowns <= MOST_UNKNOWNS:
        units = torch.eye(unknowns, dtype=torch.float64).view(-1, channels, side, side)
        matrix = apply(units, weight, system).flatten(1).mT.contiguous()
        row["condition"] = float(torch.linalg.cond(matrix))
        exact = torch.linalg.solve(matrix, right.flatten(1).mT).mT.view_as(right)
        errors = {name: relative_error(found[name].x, exact) for name in converged}
        row["error"] = require(errors, row["condition"] * (tolerance + ROUNDINGS * torch.finfo(torch.float64).eps))
        work["dense"] = lambda: torch.linalg.solve(matrix, right.flatten(1).mT)
    seconds = time_alternately(work, torch.device("cpu"), budget)
    row["ms"] = {name: spread(times) for name, times in seconds.items()}
    if "ours" in seconds:
        row["ratio"] = {name: compare(seconds["ours"], times) for name, times in seconds.items() if name != "ours"}
    return row


def printed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; a dash for what does not converge or was not computed."""
    cells = {"kernel": row["kernel"], "tikhonov": row["tikhonov"] or None, "condition": row["condition"]}
    for name in ("ours", "circulant", "none"):
        cells[f"{name}_iterations"] = row["iterations"][name] if name in row["converged"] else None
    cells |= {f"{name}_ms": times["ms"] for name, times in row["ms"].items()}
    return cells | {f"{name}_ratio": figures["ratio"] for name, figures in row.get("ratio", {}).items()}


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=1, budget=0.5, device=False)
    made.add_argument(
        "--side", type=int, default=32, help="of an image with one channel; with four it is half as large"
    )
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--tolerance", type=float, default=1e-8)
    made.add_argument("--problems", type=int, help="the number of problems, the first ones; all if not given")
    settings = made.parse_args(given)
    report = Report("krylov", settings)
    report.set(restart=RESTART, most_iterations=MOST_ITERATIONS)
    torch.manual_seed(0)
    columns = {"kernel": "{kernel:17}", "λ": "{tikhonov:5.0e}", "condition": "{condition:.1e}"}
    columns |= {f"{name}: iterations": f"{{{name}_iterations:d}}" for name in ("ours", "circulant", "none")}
    columns |= {"ours: ms": "{ours_ms:6.1f}"}
    columns |= {f"ours / {name}": f"{{{name}_ratio:.2f}}" for name in ("circulant", "none", "dense")}
    table = Table(columns)
    for problem in problems()[: settings.problems]:
        with report.checked(problem.name):
            row = measure(problem, settings.side, settings.batch, settings.tolerance, settings.budget)
            report.add("rows", row)
            table.add(printed(row))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
