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
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Case, Work, describe, print_table, quantile, time_alternately, write_json
from torch import Tensor

from inverse_flow import explain
from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.reference import dense_matrix

OURS, CONV, ROWS, DENSE, PATTERN = "ours", "conv2d", "row by row", "solve_triangular", "published pattern"
GAIN = 0.25
# The dense matrix of one image may take this much memory.
DENSE_BYTES = 256 * 2**20
# A rival whose single call takes longer is dropped from the sizes beyond.
SLOW_SECONDS = 0.05
# A problem whose images are larger than this is left out.
IMAGE_BYTES = 2**30
# Residual allowed, in roundings of float32.
CHECK_ROUNDINGS = 64


@dataclass(frozen=True)
class Sweep:
    """A base problem, the size that grows, and its values."""

    base: Case
    field: str
    values: tuple[int, ...]
    label: str

    def cases(self) -> list[Case]:
        return [replace(self.base, **{self.field: value}) for value in self.values]


SWEEPS = {
    "image": Sweep(Case(1, 3, 8), "size", (8, 16, 32, 64, 128, 256, 512, 1024), "image side"),
    "image, batch of 32": Sweep(Case(32, 3, 8), "size", (8, 16, 32, 64, 128, 256), "image side"),
    "kernel": Sweep(Case(32, 12, 16), "kernel", (1, 2, 3, 4, 5, 7, 9, 11), "kernel size"),
    "channels": Sweep(Case(16, 1, 8), "channels", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "channels"),
    "batch": Sweep(Case(1, 12, 16), "batch", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "batch"),
}


def make_operands(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeded images, and a well-conditioned weight with a unit triangular corner tap."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.channels, case.channels, case.kernel, case.kernel, generator=generator)
    weight *= GAIN / weight[0].numel() ** 0.5
    weight[:, :, -1, -1] = weight[:, :, -1, -1].tril(-1) + torch.eye(case.channels)
    images = torch.randn(case.batch, case.channels, case.size, case.size, generator=generator)
    return images.to(device), weight.to(device)


def row_solver(case: Case, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows from the top: what the rows above contribute is a convolution, and a row by itself a triangular matrix."""
    above = weight[:, :, :-1]
    row_matrix = dense_matrix(weight[:, :, -1:], 1, case.size, corner="unit_triangular")

    def solve(images: Tensor) -> Tensor:
        output = torch.zeros_like(images)
        reach = case.kernel - 1
        for i in range(case.size):
            right = images[:, :, i]
            if reach and i:
                first = max(i - reach, 0)
                taps = above[:, :, reach - (i - first) :]
                right = right - F.conv2d(F.pad(output[:, :, first:i], (reach, 0, 0, 0)), taps)[:, :, 0]
            # Lower triangular in (channel, column) only once the columns come first.
            flat = right.transpose(1, 2).flatten(1)
            solved = torch.linalg.solve_triangular(row_by_column, flat.mT, upper=False, unitriangular=True).mT
            output[:, :, i] = solved.unflatten(1, (case.size, -1)).transpose(1, 2)
        return output

    row_by_column = by_pixel(row_matrix, case.channels, case.size)
    return solve


def by_pixel(matrix: Tensor, channels: int, pixels: int) -> Tensor:
    """Rows and columns in the order (pixel, channel), in which a top-left convolution is lower triangular."""
    return matrix.view(channels, pixels, channels, pixels).permute(1, 0, 3, 2).reshape(channels * pixels, -1)


def dense_solver(case: Case, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The whole matrix, once, and a triangular solve."""
    matrix = dense_matrix(weight, case.size, case.size, corner="unit_triangular")
    matrix = by_pixel(matrix, case.channels, case.size**2)

    def solve(images: Tensor) -> Tensor:
        flat = images.flatten(2).transpose(1, 2).flatten(1)
        solved = torch.linalg.solve_triangular(matrix, flat.mT, upper=False, unitriangular=True).mT
        return solved.unflatten(1, (-1, case.channels)).transpose(1, 2).reshape(images.shape)

    return solve


def solvers(case: Case, weight: Tensor, left_out: set[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Everything that solves this case."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda images: inverse_conv2d(images, weight, corner="unit_triangular")
    }
    if ROWS not in left_out and (case.channels * case.size) ** 2 * 4 <= DENSE_BYTES:
        found[ROWS] = row_solver(case, weight)
    # Making the matrix takes a few copies of it.
    if DENSE not in left_out and (case.channels * case.size**2) ** 2 * 4 <= DENSE_BYTES / 4:
        found[DENSE] = dense_solver(case, weight)
    if weight.is_cuda and PATTERN not in left_out:
        from published_pattern import solve as pattern

        found[PATTERN] = lambda images: pattern(images, weight)
    return found


def check(name: str, solve: Callable[[Tensor], Tensor], images: Tensor, weight: Tensor) -> float:
    """The residual ‖A x − y‖ / ‖y‖ in float64 arithmetic.

    Raises:
        ArithmeticError: it is too large, or not a number.
    """
    again = causal_conv2d(solve(images).double(), weight.double(), corner="unit_triangular")
    residual = float((again - images.double()).norm() / images.double().norm())
    allowed = CHECK_ROUNDINGS * torch.finfo(images.dtype).eps
    if not residual <= allowed:
        raise ArithmeticError(f"{name}: residual {residual:.1e}, allowed {allowed:.1e}")
    return residual


@torch.no_grad()
def measure(case: Case, device: torch.device, budget: float, left_out: set[str]) -> list[dict[str, Any]]:
    """One row a rival. Those that turn out too slow join ``left_out``."""
    images, weight = make_operands(case, device)
    works: dict[str, Work] = {}
    residuals: dict[str, float] = {}
    for name, solve in solvers(case, weight, left_out).items():
        residuals[name] = check(name, solve, images, weight)
        works[name] = lambda solve=solve: solve(images)
    # An even kernel pads one pixel more on one side, as the solve does on one side alone.
    before, after = (case.kernel - 1) // 2, case.kernel // 2
    padding = (before, after, before, after)
    if case.kernel % 2:
        works[CONV] = lambda: F.conv2d(images, weight, padding=before)
    else:
        works[CONV] = lambda: F.conv2d(F.pad(images, padding), weight)
    samples = time_alternately(works, device, budget)
    rows = []
    plan = explain(images.shape, case.kernel, corner="unit_triangular", device=device.type)
    for name, seconds in samples.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "rival": name,
                "case": str(case),
                "ms": median * 1e3,
                "p20_ms": quantile(seconds, 0.2) * 1e3,
                "p80_ms": quantile(seconds, 0.8) * 1e3,
                "fastest_ms": min(seconds) * 1e3,
                "rounds": len(seconds),
                "residual": residuals.get(name),
                "regime": plan.regime if name == OURS else None,
            }
        )
        if name not in (OURS, CONV) and median > SLOW_SECONDS:
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
    """Time over size, a panel a sweep, as ``path``.png and ``path``.svg."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(4.2 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colours = {name: f"C{i}" for i, name in enumerate((OURS, CONV, ROWS, DENSE, PATTERN))}
    for axes, name in zip(panels, names, strict=True):
        sweep, members = SWEEPS[name], [row for row in rows if row["sweep"] == name]
        for rival in dict.fromkeys(row["rival"] for row in members):
            own = [row for row in members if row["rival"] == rival]
            at = [row["value"] for row in own]
            axes.plot(at, [row["ms"] for row in own], marker="o", markersize=3, color=colours[rival])
            axes.fill_between(
                at, [row["p20_ms"] for row in own], [row["p80_ms"] for row in own], color=colours[rival], alpha=0.2
            )
        if name in fits:
            line = fits[name]["root_n"]
            at = [row["value"] for row in members if row["rival"] == OURS]
            guide = [max(line["offset_ms"] + line["slope_ms"] * side, 1e-6) for side in at]
            axes.plot(at, guide, "k:", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(sweep.label)
        fixed = {"B": "batch", "C": "channels", "H": "size", "k": "kernel"}
        axes.set_title(", ".join(f"{k}={getattr(sweep.base, f)}" for k, f in fixed.items() if f != sweep.field))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    present = {row["rival"] for row in rows}
    for rival, colour in colours.items():
        if rival in present:
            panels[-1].plot([], [], color=colour, label=rival)
    panels[-1].plot([], [], "k:", label="a + b·√n")
    figure.legend(loc="outside right center")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        print(f"written: {path.with_suffix(suffix)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to measure with")
    parser.add_argument("--sweep", choices=SWEEPS, nargs="+", default=list(SWEEPS))
    parser.add_argument("--largest", type=int, help="leave out larger values of the size that grows")
    parser.add_argument("--budget", type=float, default=2.5, help="seconds of timing for each size")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw the times into this file, as .png and .svg")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    title = describe(arguments.device)
    print(title)

    rows: list[dict[str, Any]] = []
    fits: dict[str, Any] = {}
    for name in arguments.sweep:
        sweep = SWEEPS[name]
        left_out: set[str] = set()
        for case, value in zip(sweep.cases(), sweep.values, strict=True):
            too_large = case.batch * case.channels * case.size**2 * 4 > IMAGE_BYTES
            if too_large or (arguments.largest and value > arguments.largest):
                continue
            try:
                found = measure(case, arguments.device, arguments.budget, left_out)
            except ArithmeticError as error:
                print(f"WRONG  {case}: {error}", file=sys.stderr)
                return 1
            rows += [{"sweep": name, "value": value, **row} for row in found]
        members = [row for row in rows if row["sweep"] == name]
        rivals = list(dict.fromkeys(row["rival"] for row in members))
        cells = []
        for value in dict.fromkeys(row["value"] for row in members):
            times = {row["rival"]: row["ms"] for row in members if row["value"] == value}
            figures = [f"{times[rival]:.4g}" if rival in times else "" for rival in rivals]
            cells.append([str(value), *figures, f"{times[OURS] / times[CONV]:.3f}"])
        print(f"\n{name}: {sweep.base} with {sweep.label} growing, ms")
        print_table([sweep.label, *rivals, "ours / conv2d"], cells)
        if sweep.field == "size" and len(cells) > 2:
            fits[name] = image_fits(members)
            root, linear = fits[name]["root_n"], fits[name]["n"]
            print(
                f"fit a + b·√n: a {root['offset_ms']:.3g} ms, b {root['slope_ms']:.3g} ms, off by "
                f"{100 * root['relative_error']:.0f} %; a + b·n: off by {100 * linear['relative_error']:.0f} %"
            )
            print("slopes of log t over log n:", ", ".join(f"{slope:.2f}" for slope in fits[name]["log_slopes"]))
    if arguments.plot:
        plot(rows, fits, title, arguments.plot)
    if arguments.json:
        settings = {"threads": arguments.threads, "budget_seconds": arguments.budget, "corner": "unit_triangular"}
        write_json(arguments.json, "scaling", arguments.device, settings, {"rows": rows, "fits": fits})
    return 0


if __name__ == "__main__":
    sys.exit(main())
