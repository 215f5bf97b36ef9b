"""How large are the gradients of an inverse convolution, beside those of a convolution and of a 1×1 convolution?

    python benchmarks/gradient_norms.py                                                the embedded slice
    python benchmarks/gradient_norms.py --data MNIST/raw --steps 2000 \
        --json benchmarks/results/gradient_norms.json --plot docs/images/gradient_norms

The gradient of a solve runs through the inverse of a large triangular matrix, so that it might vanish or explode where
that of a convolution does not: the paper's second open question. The same flow is trained three times at every learning
rate: with the solve in the training direction (InverseFlow), with the convolution there (FInCFlow), and with neither
(Glow). The batches are the same. Norms are of the gradient of the bits per dimension with respect to the weights of a
layer, before clipping, every few steps; the solve's gain is the norm of its output over that of its input.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Report, Table, new_figure, parser, save_figure
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.data import load
from inverse_flow.flows import Conv1x1
from inverse_flow.models import KINDS
from inverse_flow.training import Stop, TrainConfig, Trainer, dequantize
from inverse_flow.training.log import StepReport

# The layer of interest in each model, by what it does from data to latent.
KIND_OF_LAYER = {"InverseFlow": "inverse conv", "FInCFlow": "conv", "Glow": "1×1 conv"}
LEARNING_RATES = (1e-3, 4e-3, 1.6e-2)
# Added by torch.nn.utils.clip_grad_norm_ to the norm that it divides by.
CLIP_EPSILON = 1e-6
# Training images that the gain of the solves is measured on.
GAIN_IMAGES = 50


def watched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The inverse convolutions and the 1×1 convolutions by their paths, in the order from data to latent."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, InverseConv2d | Conv1x1)}


def gradient_norms(layers: dict[str, nn.Module], grad_norm: float, max_grad_norm: float) -> dict[str, float]:
    """‖∂L/∂w‖ of each layer as it was before clipping.

    Args:
        layers: with the clipped gradients of a step.
        grad_norm: of all gradients before clipping.
        max_grad_norm: what they were clipped to.
    """
    clipped_by = min(1.0, max_grad_norm / (grad_norm + CLIP_EPSILON))
    found = {}
    for path, layer in layers.items():
        squares = [parameter.grad.square().sum() for parameter in layer.parameters() if parameter.grad is not None]
        found[path] = float(torch.stack(squares).sum().sqrt()) / clipped_by
    return found


class Recorder:
    """An observer of a training run: keeps the norms of every ``every``-th step."""

    def __init__(self, trainer: Trainer, every: int) -> None:
        self.layers = watched_layers(trainer.model)
        self.max_grad_norm, self.every = trainer.config.max_grad_norm, every
        self.steps: list[int] = []
        self.bits_per_dim: list[float] = []
        self.total: list[float] = []
        self.norms: dict[str, list[float]] = {path: [] for path in self.layers}

    def __call__(self, report: StepReport) -> None:
        if (report.step - 1) % self.every:
            return
        self.steps.append(report.step)
        self.bits_per_dim.append(report.bits_per_dim)
        self.total.append(report.grad_norm)
        for path, norm in gradient_norms(self.layers, report.grad_norm, self.max_grad_norm).items():
            self.norms[path].append(norm)


@torch.no_grad()
def solve_gains(model: nn.Module, images: Tensor) -> dict[str, float]:
    """‖A⁻¹ x‖ / ‖x‖ of every inverse convolution that runs its solve from data to latent."""
    found: dict[str, float] = {}
    paths = {layer: path for path, layer in model.named_modules() if isinstance(layer, InverseConv2d)}

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found[paths[layer]] = float(output[0].norm() / inputs[0].norm())

    hooks = [layer.register_forward_hook(record) for layer in paths]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _kind(model: str, layer: nn.Module) -> str:
    return KIND_OF_LAYER[model if isinstance(layer, InverseConv2d) else "Glow"]


def run(kind: str, learning_rate: float, images: Tensor, settings: argparse.Namespace) -> dict[str, Any]:
    """One training run; one that ends with a loss or gradient that is not finite is reported as such."""
    config = TrainConfig(
        steps=settings.steps, batch_size=settings.batch_size, learning_rate=learning_rate, warmup_steps=50,
        max_grad_norm=settings.max_grad_norm, max_inverse_error=None, seed=settings.seed,
        validation=0, evaluate_every=settings.steps,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    model = KINDS[kind](tuple(images.shape[1:]), settings.levels, settings.depth, settings.hidden, logit_margin=1e-3)
    trainer = Trainer(model.to(settings.device), images, config)
    recorder = Recorder(trainer, settings.every)
    failure = None
    try:
        if trainer.fit(recorder) is Stop.INTERRUPTED:
            raise KeyboardInterrupt
    except (FloatingPointError, ArithmeticError) as error:
        failure = str(error)
    batch = dequantize(images[:GAIN_IMAGES], generator=torch.Generator().manual_seed(0)).to(settings.device)
    return {
        "model": kind,
        "learning_rate": learning_rate,
        "steps": recorder.steps,
        "bits_per_dim": recorder.bits_per_dim,
        "total": recorder.total,
        "norms": recorder.norms,
        "kinds": {path: _kind(kind, layer) for path, layer in recorder.layers.items()},
        "solve_gains": {} if failure else solve_gains(model.eval(), batch),
        "failure": failure,
    }


def of_kind(run: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The norms of a run by kind of layer."""
    found: dict[str, dict[str, list[float]]] = {}
    for path, values in run["norms"].items():
        found.setdefault(run["kinds"][path], {})[path] = values
    return found


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every run and kind of layer: the median norm at the beginning and the end (a tenth of the run each), the
    largest, and the largest ratio between two layers of a step (by depth), as the median over the last tenth.
    """
    rows = []
    for entry in runs:
        for kind, norms in of_kind(entry).items() if entry["steps"] else ():
            share = max(1, len(entry["steps"]) // 10)
            by_step = list(zip(*norms.values(), strict=True))
            rows.append(
                {
                    "model": entry["model"],
                    "layer": kind,
                    "learning_rate": entry["learning_rate"],
                    "first": statistics.median(value for step in by_step[:share] for value in step),
                    "last": statistics.median(value for step in by_step[-share:] for value in step),
                    "largest": max(value for step in by_step for value in step),
                    "spread_over_depth": statistics.median(
                        max(step) / max(min(step), 1e-30) for step in by_step[-share:]
                    ),
                    "bits_per_dim": statistics.median(entry["bits_per_dim"][-share:]),
                    "failure": entry["failure"],
                }
            )
    return rows


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each model and learning rate: a line per layer, darker towards the latents."""
    models = list(dict.fromkeys(entry["model"] for entry in runs))
    rates = list(dict.fromkeys(entry["learning_rate"] for entry in runs))
    figure = new_figure(3.6 * len(rates), 2.6 * len(models))
    panels = figure.subplots(len(models), len(rates), sharex=True, sharey=True, squeeze=False)
    for entry in runs:
        axes = panels[models.index(entry["model"])][rates.index(entry["learning_rate"])]
        kind = KIND_OF_LAYER[entry["model"]]
        shown = of_kind(entry)[kind]
        for position, values in enumerate(shown.values()):
            depth = (position + 1) / len(shown)
            axes.plot(entry["steps"], values, color=(0.1, 0.2, 0.5), alpha=0.2 + 0.8 * depth, linewidth=0.8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set_title(f"{entry['model']}: {kind}, rate {entry['learning_rate']:g}", fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    for row in panels:
        row[0].set_ylabel("norm of the gradient")
    save_figure(figure, path)


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, plot=True)
    made.add_argument("--data", default="embedded", help="as in benchmarks/density.py")
    made.add_argument("--learning-rates", type=float, nargs="+", default=list(LEARNING_RATES))
    made.add_argument("--steps", type=int, default=1000, help="of every run")
    made.add_argument("--every", type=int, default=10, help="steps between two records")
    made.add_argument("--batch-size", type=int, default=50)
    made.add_argument("--levels", type=int, default=2)
    made.add_argument("--depth", type=int, default=4, help="steps of the flow in a level")
    made.add_argument("--hidden", type=int, default=32)
    made.add_argument("--max-grad-norm", type=float, default=1.0, help="clipping; the norms shown are those before it")
    made.add_argument("--seed", type=int, default=0)
    settings = made.parse_args(given)
    report, data = Report("gradient_norms", settings), load(settings.data)
    report.set(data=data.name)
    runs = []
    for learning_rate in settings.learning_rates:
        for kind in KIND_OF_LAYER:
            runs.append(run(kind, learning_rate, data.train.images, settings))
            report.set(summary=summarize(runs), runs=runs)
            bits = runs[-1]["failure"] or f"{runs[-1]['bits_per_dim'][-1]:.3f} bits/dim"
            print(f"{kind}, learning rate {learning_rate:g}: {bits}", flush=True)
    print()
    norms = {"first": "{first:.1e}", "last": "{last:.1e}", "largest": "{largest:.1e}"}
    norms |= {"over depth": "{spread_over_depth:.1f}", "bits/dim": "{bits_per_dim:.3f}"}
    Table({"": "{model}", "layer": "{layer}", "rate": "{learning_rate:g}", **norms}).add(*summarize(runs))
    if settings.plot:
        plot(runs, settings.plot)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
