"""How does the time of a solve grow with the image, the kernel, the channels and the batch?

    python benchmarks/scaling.py                            on the CPU, at most six minutes
    python benchmarks/scaling.py --device cuda
    python benchmarks/scaling.py --sweep image --budget 1   one sweep, shorter
    python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot docs/images/scaling

Five sweeps, each from a base problem in which one size grows. The solve's rivals run in the same process, in turn
with it: ``F.conv2d`` of the same size; a loop over the rows with plain torch convolutions, each row solved with its own
triangular matrix; ``torch.linalg.solve_triangular`` on the dense matrix, where that fits; and on a GPU the launch
pattern of the published code, benchmarks/published_pattern. Every rival that solves is checked against the residual
before it is timed, and left out of the sizes beyond when one call exceeds ``SLOW_SECONDS``.

For the image sweeps two lines are fitted to the solve, on n = H·W pixels: t = a + b·√n and t = a + b·n. Which of them
the times follow, and the slope between neighbouring sizes, tell whether steps or work bound the time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Report, Table, Work, describe, new_figure, parser, require, save_figure, spread, time_alternately
from problems import CHECK_ROUNDINGS, Case, Operands, residual
from rivals import Solve, dense_solver, row_solver
from torch import Tensor

from inverse_flow import explain
from inverse_flow.functional import inverse_conv2d

OURS, CONV, ROWS, DENSE, PATTERN = "ours", "conv2d", "row by row", "solve_triangular", "published pattern"
CORNER = "unit_triangular"
# The dense matrix of one image may take this much memory.
DENSE_BYTES = 256 * 2**20
# A rival whose single call takes longer is dropped from the sizes beyond.
SLOW_SECONDS = 0.05
# A problem whose images are larger than this is left out.
IMAGE_BYTES = 2**30


@dataclass(frozen=True)
class Sweep:
    """A base problem, the size that grows, and its values."""

    base: Case
    field: str
    values: tuple[int, ...]
    label: str


SWEEPS = {
    "image": Sweep(Case(1, 3, 8), "size", (8, 16, 32, 64, 128, 256, 512, 1024), "image side"),
    "image, batch of 32": Sweep(Case(32, 3, 8), "size", (8, 16, 32, 64, 128, 256), "image side"),
    "kernel": Sweep(Case(32, 12, 16), "kernel", (1, 2, 3, 4, 5, 7, 9, 11), "kernel size"),
    "channels": Sweep(Case(16, 1, 8), "channels", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "channels"),
    "batch": Sweep(Case(1, 12, 16), "batch", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "batch"),
}


def solvers(case: Case, weight: Tensor, left_out: set[str]) -> dict[str, Solve]:
    """Everything that solves this case."""
    found: dict[str, Solve] = {OURS: lambda images: inverse_conv2d(images, weight, corner=CORNER)}
    if ROWS not in left_out and (case.channels * case.size) ** 2 * 4 <= DENSE_BYTES:
        found[ROWS] = row_solver(case.size, weight)
    # Making the matrix takes a few copies of it.
    if DENSE not in left_out and (case.channels * case.size**2) ** 2 * 4 <= DENSE_BYTES / 4:
        found[DENSE] = dense_solver(case.size, weight)
    if weight.is_cuda and PATTERN not in left_out:
        from published_pattern import solve as pattern

        found[PATTERN] = lambda images: pattern(images, weight)
    return found


@torch.no_grad()
def measure(case: Case, device: torch.device, budget: float, left_out: set[str]) -> list[dict[str, Any]]:
    """One row for each rival. Those that turn out too slow join ``left_out``.

    Raises:
        ArithmeticError: one does not solve.
    """
    operands = Operands.make(case, device=device)
    images, weight = operands.inputs[0], operands.weight
    allowed = CHECK_ROUNDINGS * torch.finfo(images.dtype).eps
    works: dict[str, Work] = {}
    residuals: dict[str, float] = {}
    for name, solve in solvers(case, weight, left_out).items():
        residuals |= require({name: residual(solve(images), images, weight, CORNER)}, allowed)
        works[name] = lambda solve=solve: solve(images)
    # An even kernel pads one pixel more on one side, as the solve does on one side alone.
    before, after = (case.kernel - 1) // 2, case.kernel // 2
    if case.kernel % 2:
        works[CONV] = lambda: F.conv2d(images, weight, padding=before)
    else:
        works[CONV] = lambda: F.conv2d(F.pad(images, (before, after, before, after)), weight)
    regime = explain(images.shape, case.kernel, corner=CORNER, device=device.type).regime
    rows = []
    for name, seconds in time_alternately(works, device, budget).items():
        row = {"rival": name, "case": str(case), **spread(seconds), "residual": residuals.get(name)}
        rows.append(row | {"regime": regime if name == OURS else None})
        if name not in (OURS, CONV) and rows[-1]["ms"] > 1e3 * SLOW_SECONDS:
            left_out.add(name)
    return rows


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Least squares of t = a + b·x on relative errors: (a, b, root mean square relative error)."""
    x, t = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    design = torch.stack([torch.ones_like(x), x], 1) / t[:, None]
    solution = torch.linalg.lstsq(design, torch.ones_like(t)[:, None]).solution[:, 0]
    error = (design @ solution - 1).square().mean().sqrt()
    return float(solution[0]), float(solution[1]), float(error)


def image_fits(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The two lines, and the slope of log t over log n between neighbouring sizes: ½ where steps bound the time, 1
    where work does."""
    points = [(row["value"] ** 2, row["ms"]) for row in rows if row["rival"] == OURS]
    by_steps, by_work = fit([(math.sqrt(n), t) for n, t in points]), fit(points)
    slopes = [math.log(t2 / t1) / math.log(n2 / n1) for (n1, t1), (n2, t2) in pairwise(points)]
    names = ("offset_ms", "slope_ms", "relative_error")
    crossing = next((math.isqrt(n) for (n, _), slope in zip(points, slopes, strict=False) if slope > 0.75), None)
    return {
        "root_n": dict(zip(names, by_steps, strict=True)),
        "n": dict(zip(names, by_work, strict=True)),
        "log_slopes": slopes,
        "work_takes_over_at_side": crossing,
    }


def plot(rows: Sequence[dict[str, Any]], fits: dict[str, Any], title: str, path: Path) -> None:
    """Time over size, a panel for each sweep."""
    names = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = new_figure(4.2 * len(names), 4.2)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colours = {name: f"C{i}" for i, name in enumerate((OURS, CONV, ROWS, DENSE, PATTERN))}
    for axes, name in zip(panels, names, strict=True):
        sweep, members = SWEEPS[name], [row for row in rows if row["sweep"] == name]
        for rival in dict.fromkeys(row["rival"] for row in members):
            own = [row for row in members if row["rival"] == rival]
            at, low, middle, high = ([row[key] for row in own] for key in ("value", "p20_ms", "ms", "p80_ms"))
            axes.plot(at, middle, marker="o", markersize=3, color=colours[rival])
            axes.fill_between(at, low, high, color=colours[rival], alpha=0.2)
        if name in fits:
            line, sides = fits[name]["root_n"], sorted({row["value"] for row in members})
            guide = [max(line["offset_ms"] + line["slope_ms"] * side, 1e-6) for side in sides]
            axes.plot(sides, guide, "k:", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=sweep.label)
        axes.set_xscale("log", base=2)
        fixed = {"B": "batch", "C": "channels", "H": "size", "k": "kernel"}
        axes.set_title(", ".join(f"{k}={getattr(sweep.base, f)}" for k, f in fixed.items() if f != sweep.field))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    for rival in dict.fromkeys(row["rival"] for row in rows):
        panels[-1].plot([], [], color=colours[rival], label=rival)
    panels[-1].plot([], [], "k:", label="a + b·√n")
    figure.legend(loc="outside right center")
    figure.suptitle(title)
    save_figure(figure, path)


def run_sweep(name: str, report: Report, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All sizes of a sweep, smallest first."""
    sweep, left_out, rows = SWEEPS[name], set[str](), []
    print(f"\n{name}: {sweep.base} with {sweep.label} growing, ms")
    rivals = (OURS, CONV, ROWS, DENSE, *([PATTERN] if arguments.device.type == "cuda" else []))
    table = Table(
        {
            sweep.label: "{value:<10}",
            **{rival: f"{{{rival}:10.4g}}" for rival in rivals},
            "ours / conv2d": "{ratio:.3f}",
        }
    )
    for value in sweep.values:
        case = replace(sweep.base, **{sweep.field: value})
        too_large = case.batch * case.channels * case.size**2 * 4 > IMAGE_BYTES
        if too_large or (arguments.largest and value > arguments.largest):
            continue
        with report.checked(case):
            found = measure(case, arguments.device, arguments.budget, left_out)
            for row in found:
                rows.append({"sweep": name, "value": value, **row})
                report.add("rows", rows[-1])
            taken = {row["rival"]: row["ms"] for row in found}
            table.add({"value": value, "ratio": taken[OURS] / taken[CONV], **taken})
    return rows


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=2, budget=2.5, plot=True)
    made.add_argument("--sweep", choices=SWEEPS, nargs="+", default=list(SWEEPS))
    made.add_argument("--largest", type=int, help="leave out larger values of the size that grows")
    arguments = made.parse_args(given)
    report = Report("scaling", arguments)
    rows: list[dict[str, Any]] = []
    fits: dict[str, Any] = {}
    for name in arguments.sweep:
        members = run_sweep(name, report, arguments)
        rows += members
        if SWEEPS[name].field == "size" and len({row["value"] for row in members}) > 2:
            fits[name] = image_fits(members)
            report.set(fits=fits)
            root, linear = fits[name]["root_n"], fits[name]["n"]
            print(
                f"fit a + b·√n: a {root['offset_ms']:.3g} ms, b {root['slope_ms']:.3g} ms, off by "
                f"{100 * root['relative_error']:.0f} %; a + b·n: off by {100 * linear['relative_error']:.0f} %"
            )
            print("slopes of log t over log n:", ", ".join(f"{slope:.2f}" for slope in fits[name]["log_slopes"]))
    if arguments.plot and rows:
        plot(rows, fits, describe(arguments.device), arguments.plot)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
