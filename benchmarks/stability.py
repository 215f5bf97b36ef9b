"""When does an inverse convolution blow up in training, and what stops it?

    python benchmarks/stability.py --json benchmarks/results/stability.json --plot docs/images/stability
    python benchmarks/stability.py --cost 50                    what a limit costs beside a step of the demo's model

Two models are trained by maximum likelihood in a plain loop with Adam, as one writes it oneself: one inverse
convolution and one ActNorm on smooth images (those of the data, enlarged), and an InverseFlow on the images as they
are. Each at several learning rates, and in four ways:

- free: nothing limits anything;
- clipped: the gradient's norm is clipped, after a linear warm-up of the learning rate, as the trainer does it;
- limited: the gain is limited after every step (``inverse_flow.limit_gain_``), and nothing else;
- row sums: the layers are built with ``max_row_sum``, and nothing else.

Recorded are the loss, the largest gain ‖A⁻¹‖∞ of the inverse convolutions, and the largest norm of the gradient of
one's taps. A run counts as blown up when its loss is above 20 bits per dimension, or no number, after it has been
below 10.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import RATIOS, Report, Table, compare, new_figure, parser, save_figure, time_alternately
from torch import Tensor, nn

from inverse_flow import InverseConv2d, limit_gain_
from inverse_flow.data import load
from inverse_flow.flows import ActNorm, Flow
from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.models import InverseFlow
from inverse_flow.stability import gains
from inverse_flow.training import EndToEnd, TrainConfig, Workers, bits_per_dim

WAYS = ("free", "clipped", "limited", "row sums")
MODELS = ("one layer", "InverseFlow")
LEARNING_RATES = (5e-3, 2e-2, 5e-2)
LIMIT, ROW_SUM, CLIP, WARMUP = 100.0, 0.9, 1.0, 50
# Bits per dimension that no density on 8-bit images has; and which every run comes below in a few steps.
BLOWN_UP, LEARNING = 20.0, 10.0
COLOURS = {"free": "#c0392b", "clipped": "#7f8c8d", "limited": "#1f4e79", "row sums": "#2e8b57"}


def build(name: str, shape: tuple[int, ...], settings: argparse.Namespace) -> Flow:
    """The untrained model for images of a shape."""
    if name == "one layer":
        return Flow([InverseConv2d(shape[0], corner="identity"), ActNorm(shape[0])], shape)
    return InverseFlow(shape, settings.levels, settings.depth, settings.hidden, logit_margin=None)


def images_for(name: str, images: Tensor, side: int) -> Tensor:
    """Those of the data, or for one layer in grey and enlarged until neighbouring pixels are nearly equal."""
    if name != "one layer":
        return images.float()
    grey = images.float().mean(1, keepdim=True)
    return F.interpolate(grey, size=(side, side), mode="bicubic", align_corners=False).round().clamp(0, 255)


def run(name: str, way: str, rate: float, seed: int, images: Tensor, settings: argparse.Namespace) -> dict[str, Any]:
    """One training run, up to its last step or until it blows up."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    shape = tuple(images.shape[1:])
    flow = build(name, shape, settings)
    layers = [layer for layer in flow.modules() if isinstance(layer, InverseConv2d)]
    for layer in layers if way == "row sums" else ():
        layer.max_row_sum = ROW_SUM
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    entry: dict[str, Any] = {"model": name, "way": way, "learning_rate": rate, "seed": seed, "blown_up": None}
    entry |= {"steps": [], "bits_per_dim": [], "gain": [], "gradient": [], "lowest": math.inf, "limited": 0}
    started = time.perf_counter()
    for step in range(settings.steps):
        batch = images[torch.randint(0, len(images), (settings.batch_size,), generator=draw)]
        batch = (batch + torch.rand(batch.shape, generator=draw)) / 256
        loss = bits_per_dim(flow.log_prob(batch).mean(), shape)
        bits = float(loss.detach())
        if entry["lowest"] < LEARNING and not bits < BLOWN_UP:
            entry["blown_up"] = step
            break
        entry["lowest"] = min(entry["lowest"], bits)
        optimizer.zero_grad()
        loss.backward()
        if step % settings.every == 0:
            norms = [float(layer.weight.grad.norm()) for layer in layers if layer.weight.grad is not None]
            found = {
                "steps": step,
                "bits_per_dim": bits,
                "gradient": max(norms),
                "gain": max(gains(flow, shape).values()),
            }
            for key, value in found.items():
                entry[key].append(value)
        if way == "clipped":
            nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        if way == "limited":
            entry["limited"] += bool(limit_gain_(flow, shape, LIMIT))
    return entry | {"seconds": time.perf_counter() - started}


def cost(images: int, report: Report, settings: argparse.Namespace) -> None:
    """Times a training step of the demo's model, a limit that finds nothing to do, and one that damps every layer."""
    torch.manual_seed(0)
    shape = (1, 28, 28)
    flow = InverseFlow(shape, logit_margin=DEFAULT_MARGIN)
    method, batch = EndToEnd(flow, TrainConfig(), Workers()), torch.rand(images, *shape)
    layers = [layer for layer in flow.modules() if isinstance(layer, InverseConv2d)]
    weights = [layer.weight.detach().clone() for layer in layers]

    @torch.no_grad()
    def restore() -> None:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)

    def damp() -> None:
        restore()
        if len(limit_gain_(flow, shape, low)) != len(layers):
            raise ArithmeticError("a layer was not damped")

    work = {
        "step": lambda: method.step(batch, step=0, progress=0.0, rate_factor=1e-9),
        "limit": lambda: limit_gain_(flow, shape, LIMIT),
        "limit, all layers damped": damp,
    }
    work["step"]()  # initialises ActNorm
    restore()
    low = 0.99 * min(gains(flow, shape).values())
    samples = time_alternately(work, torch.device("cpu"), settings.budget)
    rows = [{"what": name, **compare(samples[name], samples["step"])} for name in work]
    report.set(cost=rows)
    Table({"": "{what}", "ms": "{ours_ms:.2f}", **RATIOS}).add(*rows)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every model, way and rate: how many seeds blew up and when, and the extremes over the seeds."""
    rows = []
    for key in dict.fromkeys((entry["model"], entry["learning_rate"], entry["way"]) for entry in runs):
        same = [entry for entry in runs if (entry["model"], entry["learning_rate"], entry["way"]) == key]
        ends = [entry["blown_up"] for entry in same if entry["blown_up"] is not None]
        last = [entry["bits_per_dim"][-max(1, len(entry["steps"]) // 10) :] for entry in same]
        rows.append(
            {
                "model": key[0], "learning_rate": key[1], "way": key[2], "seeds": len(same), "blown_up": len(ends),
                "first": min(ends, default=None),
                "lowest": min(entry["lowest"] for entry in same),
                "last": None if ends else sum(map(sum, last)) / sum(map(len, last)),
                "gain": max(max(entry["gain"]) for entry in same),
                "gradient": max(max(entry["gradient"]) for entry in same),
                "limited": sum(entry["limited"] for entry in same) if key[2] == "limited" else None,
            }
        )  # fmt: skip
    return rows


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """For each model a row of gains and one of gradients, a column per rate, a line per run."""
    models = list(dict.fromkeys(entry["model"] for entry in runs))
    rates = list(dict.fromkeys(entry["learning_rate"] for entry in runs))
    figure = new_figure(3.2 * len(rates), 3.8 * len(models))
    panels = figure.subplots(2 * len(models), len(rates), sharex="row", sharey="row", squeeze=False)
    for entry in runs:
        column, first = rates.index(entry["learning_rate"]), 2 * models.index(entry["model"])
        for row, key in ((first, "gain"), (first + 1, "gradient")):
            axes = panels[row][column]
            label = entry["way"] if entry["seed"] == runs[0]["seed"] else None
            axes.plot(entry["steps"], entry[key], color=COLOURS[entry["way"]], linewidth=0.9, alpha=0.8, label=label)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel({"gain": "largest gain", "gradient": "norm of the gradient"}[key])
        panels[first][column].set_title(f"{entry['model']}, rate {entry['learning_rate']:g}", fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    panels[0][0].legend(fontsize="x-small")
    save_figure(figure, path)


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, plot=True, device=False, threads=1, budget=60)
    made.add_argument("--cost", type=int, metavar="IMAGES", help="train nothing; time steps with batches of this size")
    made.add_argument("--data", default="embedded", help="as in benchmarks/density.py")
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    made.add_argument("--learning-rates", type=float, nargs="+", default=list(LEARNING_RATES))
    made.add_argument("--seeds", type=int, default=3, help="of the one layer; the InverseFlow has one")
    made.add_argument("--steps", type=int, default=400, help="of every run")
    made.add_argument("--every", type=int, default=10, help="steps between two records")
    made.add_argument("--batch-size", type=int, default=4)
    made.add_argument("--side", type=int, default=64, help="of the enlarged images")
    made.add_argument("--levels", type=int, default=2)
    made.add_argument("--depth", type=int, default=2, help="steps of the flow in a level")
    made.add_argument("--hidden", type=int, default=16)
    settings = made.parse_args(given)
    report = Report("stability", settings)
    if settings.cost:
        cost(settings.cost, report, settings)
        return report.finish()
    data = load(settings.data)
    report.set(data=data.name)
    runs: list[dict[str, Any]] = []
    for name in settings.models:
        images = images_for(name, data.train.images, settings.side)
        for rate in settings.learning_rates:
            for way in settings.ways:
                for seed in range(settings.seeds if name == "one layer" else 1):
                    runs.append(run(name, way, rate, seed, images, settings))
                    end = runs[-1]["blown_up"]
                    what = "ran through" if end is None else f"blew up at step {end}"
                    print(f"{name}, rate {rate:g}, {way}, seed {seed}: {what}, {runs[-1]['seconds']:.0f} s", flush=True)
                report.set(summary=summarize(runs), runs=runs, minutes=sum(entry["seconds"] for entry in runs) / 60)
    print()
    columns = {"": "{model}", "rate": "{learning_rate:g}", "way": "{way}", "blew up": "{blown_up} of {seeds}"}
    columns |= {
        "at step": "{first}",
        "lowest bits/dim": "{lowest:.2f}",
        "last": "{last:.2f}",
        "largest gain": "{gain:.3g}",
    }
    columns |= {"largest gradient": "{gradient:.2g}", "steps limited": "{limited}"}
    Table(columns).add(*summarize(runs))
    print(f"{sum(entry['seconds'] for entry in runs) / 60:.1f} minutes")
    if settings.plot:
        plot(runs, settings.plot)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
