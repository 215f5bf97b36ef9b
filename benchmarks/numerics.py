"""How exact is the solve, and what becomes of that when the weights are ill-conditioned?

    python benchmarks/numerics.py                         every dtype, CPU regime and growth
    python benchmarks/numerics.py --json benchmarks/results/numerics.json --plot docs/images/numerics

Growth is ‖A(w)⁻¹‖∞, the largest sum of the sizes of a row of the inverse, for images of the size at hand: the most that
a solve can magnify the largest value of its input, and with it a rounding error of its input. It is 1 for the identity.
Weights of a given growth are found by bisection along two families:

    taps     M is unit triangular, all taps grow: errors add up along the recurrence
    corner   M has singular values from 1 down to a small one, and the taps are M times small ones: each pixel
             magnifies errors by itself

The oracle is the dense solve in float64; for float64 images, the recurrence in 80-bit numbers. The error is
max|x − exact| / max|exact|, the worst of several images and draws of the weights. Beside it stands that of the plain
recurrence, one pixel after the other, in the dtype of the state. The rule is that of the tests: at most twice the plain
recurrence's error, plus one rounding to the images' dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report, Table, new_figure, parser, save_figure
from torch import Tensor

from inverse_flow import explain
from inverse_flow.functional import inverse_conv2d
from inverse_flow.reference import dense_matrix, inverse_conv2d_dense
from inverse_flow.reference import inverse_conv2d as plain_recurrence

FAMILIES = {"taps": "unit_triangular", "corner": "general"}
GROWTHS = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DRAWS = 5
# Images (BATCH, CHANNELS, HEIGHT, WIDTH): enough of them to be lanes, and rows enough for two bands.
BATCH, CHANNELS, HEIGHT, WIDTH, KERNEL = 16, 3, 20, 8, 3
# Each regime solves the same images; one at a time, they are too few to be lanes.
REGIMES = {"images as lanes": BATCH, "rows as lanes": 1}
# Standard deviation of the taps that the corner's family leaves alone, times the square root of the fan-in.
CORNER_GAIN = 0.25
FACTOR = 2.0
RULE = f"error <= {FACTOR} x plain error + one rounding to the images' dtype"
# The bisection ends when the growth is this close, relatively.
GROWTH_TOLERANCE = 1e-3
# The oracle of float64 images has to be more exact than float64.
HAS_EXTENDED = np.finfo(np.longdouble).eps < 1e-18

Solve = Callable[[Tensor, Tensor, str], Tensor]


def growth(weight: Tensor, corner: str) -> float:
    """‖A(w)⁻¹‖∞ for images of HEIGHT × WIDTH."""
    return float(torch.linalg.inv(dense_matrix(weight.double(), HEIGHT, WIDTH, corner=corner)).abs().sum(1).max())


@dataclass(frozen=True)
class Family:
    """Weights along one direction: ``at(0)`` is tame, and larger strengths are worse."""

    corner: str
    taps: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def draw(cls, name: str, seed: int) -> Family:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        taps = normal(CHANNELS, CHANNELS, KERNEL, KERNEL) / (CHANNELS * KERNEL**2) ** 0.5
        left, right = (torch.linalg.qr(normal(CHANNELS, CHANNELS)).Q for _ in range(2))
        return cls(FAMILIES[name], taps, left, right)

    def at(self, strength: float) -> Tensor:
        if self.corner == "unit_triangular":
            weight = self.taps * strength
            weight[:, :, -1, -1] = weight[:, :, -1, -1].tril(-1) + torch.eye(CHANNELS, dtype=torch.float64)
            return weight
        singular = torch.logspace(0, -1, CHANNELS, base=1 + strength, dtype=torch.float64)
        corner = self.left @ torch.diag(singular) @ self.right
        weight = CORNER_GAIN * torch.einsum("oc,cikl->oikl", corner, self.taps)
        weight[:, :, -1, -1] = corner
        return weight


@cache
def weight_of_growth(name: str, seed: int, target: float) -> Tensor:
    """A draw of a family at which the growth is ``target``, or as tame as the family gets."""
    family = Family.draw(name, seed)
    if growth(family.at(0.0), family.corner) >= target:
        return family.at(0.0)
    low, high = 0.0, 1.0
    while growth(family.at(high), family.corner) < target:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        found = growth(family.at(middle), family.corner)
        if abs(found - target) <= GROWTH_TOLERANCE * target:
            return family.at(middle)
        low, high = (middle, high) if found < target else (low, middle)


def extended_recurrence(images: Tensor, weight: Tensor) -> np.ndarray:
    """The top-left recurrence in 80-bit numbers; float64 arguments, all of the corner tap is read."""
    y, w = (tensor.double().numpy().astype(np.longdouble) for tensor in (images, weight))
    corner = w[:, :, -1, -1]
    inverse = np.linalg.inv(corner.astype(np.float64)).astype(np.longdouble)
    for _ in range(3):  # Newton's iteration squares the error of float64
        inverse = inverse @ (2 * np.eye(len(corner), dtype=np.longdouble) - corner @ inverse)
    x = np.zeros_like(y)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            right = y[:, :, i, j].copy()
            for p in range(min(w.shape[2], i + 1)):
                for q in range(min(w.shape[3], j + 1)):
                    if p or q:
                        right -= x[:, :, i - p, j - q] @ w[:, :, -1 - p, -1 - q].T
            pixel = right @ inverse.T
            # The inverse is only as good as 80-bit numbers times the condition of M: a residual corrects for that.
            x[:, :, i, j] = pixel + (right - pixel @ corner.T) @ inverse.T
    return x


@dataclass(frozen=True)
class Sample:
    """A problem in the numbers of its dtype, its exact solution, and the plain recurrence's."""

    images: Tensor
    weight: Tensor
    corner: str
    growth: float
    exact: Any
    plain: Tensor

    @property
    def rounding(self) -> float:
        """One rounding to the images' dtype, relative to the largest value."""
        return torch.finfo(self.images.dtype).eps

    def error(self, x: Tensor) -> float:
        """max|x − exact| / max|exact|; not finite if x is not."""
        found = x.double().numpy().astype(self.exact.dtype)
        return float(np.abs(found - self.exact).max() / np.abs(self.exact).max())

    def allowed(self) -> float:
        return FACTOR * self.error(self.plain) + self.rounding


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_sample(name: str, target: float, dtype: torch.dtype, seed: int) -> Sample:
    """A seeded draw of weights of growth ``target``, and images for them."""
    state, corner = state_dtype(dtype), FAMILIES[name]
    weight = weight_of_growth(name, seed, target).to(state)
    generator = torch.Generator().manual_seed(1000 + seed)
    images = torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    # Neither the images nor their solutions, up to the growth times larger, may leave the range of float16.
    images = (images / inverse_conv2d_dense(images, weight.double(), corner=corner).abs().max().sqrt()).to(dtype)
    if dtype == torch.float64:
        exact = extended_recurrence(images, weight)
    else:
        exact = inverse_conv2d_dense(images.double(), weight.double(), corner=corner).numpy()
    plain = plain_recurrence(images.to(state), weight, corner=corner).to(dtype)
    return Sample(images, weight, corner, growth(weight, corner), exact, plain)


def solve_in(regime: str) -> Solve:
    """The solve of this library, on as many images at a time as make the CPU choose the regime."""
    batch = REGIMES[regime]

    def solve(images: Tensor, weight: Tensor, corner: str) -> Tensor:
        shape = (batch, *images.shape[1:])
        chosen = explain(shape, tuple(weight.shape), corner=corner, dtype=images.dtype).regime
        if chosen != regime:
            raise RuntimeError(f"images of shape {shape} are solved with {chosen}, not with {regime}")
        return torch.cat([inverse_conv2d(part, weight, corner=corner) for part in images.split(batch)])

    return solve


def measure(samples: Sequence[Sample], solve: Solve) -> dict[str, Any]:
    """The worst errors of several draws, and whether each draw keeps to the rule."""
    errors, plain, ratios, kept = [], [], [], True
    for sample in samples:
        error = sample.error(solve(sample.images, sample.weight, sample.corner))
        plain_error = sample.error(sample.plain)
        errors.append(error)
        plain.append(plain_error)
        # Where both are one rounding to the images' dtype, or none at all, a ratio would say nothing.
        if max(error, plain_error) > sample.rounding / 2:
            ratios.append(error / plain_error if plain_error > 0 else float("inf"))
        kept = kept and error <= sample.allowed()
    return {
        "error": max(errors),
        "plain_error": max(plain),
        "worst_ratio": max(ratios, default=None),
        "kept": kept,
        "growth": float(np.median([sample.growth for sample in samples])),
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error over growth."""
    figure = new_figure(10, 4.5)
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    colours = {str(dtype).removeprefix("torch."): f"C{i}" for i, dtype in enumerate(DTYPES)}
    markers = dict(zip(REGIMES, "ox", strict=True))
    for axes, family in zip(panels, FAMILIES, strict=True):
        for dtype, regime in dict.fromkeys((row["dtype"], row["regime"]) for row in rows):
            # The identity makes no error, which a logarithm cannot show.
            key = (family, dtype, regime)
            members = [r for r in rows if (r["family"], r["dtype"], r["regime"]) == key and r["plain_error"] > 0]
            at = [row["growth"] for row in members]
            axes.plot(at, [row["error"] for row in members], markers[regime], color=colours[dtype], fillstyle="none")
            axes.plot(at, [row["plain_error"] for row in members], ":", color=colours[dtype], linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="growth ‖A⁻¹‖∞")
        axes.set_title({"taps": "taps grow", "corner": "corner tap close to singular"}[family])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("max|x − exact| / max|exact|")
    for dtype, colour in colours.items():
        panels[1].plot([], [], color=colour, label=dtype)
    for regime, marker in markers.items():
        panels[1].plot([], [], marker, color="grey", fillstyle="none", label=regime)
    panels[1].plot([], [], ":", color="grey", label="plain recurrence")
    figure.legend(loc="outside right center")
    save_figure(figure, path)


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=1, device=False, plot=True)
    made.add_argument("--growths", type=float, nargs="+", default=list(GROWTHS))
    made.add_argument("--draws", type=int, default=DRAWS, help="draws of the weights for each growth")
    arguments = made.parse_args(given)
    report = Report("numerics", arguments)
    report.set(images=[BATCH, CHANNELS, HEIGHT, WIDTH], kernel=KERNEL, rule=RULE)
    dtypes = [dtype for dtype in DTYPES if HAS_EXTENDED or dtype != torch.float64]
    if not HAS_EXTENDED:
        print("this machine has no 80-bit numbers, so float64 is left out", file=sys.stderr)
    figures = {"growth": "{growth:.3g}", "error": "{error:.1e}", "plain": "{plain_error:.1e}"}
    figures |= {"worst ratio": "{worst_ratio:.2f}", "kept": "{kept}"}
    table = Table({"weights": "{family:6}", "dtype": "{dtype:8}", "regime": "{regime:15}", **figures})
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        for dtype in dtypes:
            for target in arguments.growths:
                samples = [make_sample(family, target, dtype, seed) for seed in range(arguments.draws)]
                name = {"family": family, "dtype": str(dtype).removeprefix("torch."), "target_growth": target}
                for regime in REGIMES:
                    rows.append({**name, "regime": regime, **measure(samples, solve_in(regime))})
                    report.add("rows", rows[-1])
                    table.add(rows[-1])
    broken = [row for row in rows if not row["kept"]]
    ratios = [row["worst_ratio"] for row in rows if row["worst_ratio"] is not None]
    worst = max(ratios, default=0.0)
    print(f"\nworst ratio to the plain recurrence: {worst:.2f}; the rule is broken in {len(broken)} rows")
    if arguments.plot:
        plot(rows, arguments.plot)
    return report.finish() or int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
