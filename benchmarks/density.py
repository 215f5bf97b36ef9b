"""How good a density does each model learn in the same time? The columns of the paper's tables.

    python benchmarks/density.py                                      the embedded slice, four times 5 minutes
    python benchmarks/density.py --preset mnist --data MNIST/raw      the target on MNIST, four times 40 minutes
    python benchmarks/density.py --preset mnist --data MNIST/raw --models InverseFlow
    python benchmarks/density.py --preset cifar10-slice --data slice.npz --minutes 20 --device cuda

InverseFlow, FInCFlow, Glow and RealNVP are trained by the same trainer for the same time, with the same number of
parameters: the widths of their coupling networks are chosen so and printed. Each has a folder with its checkpoint;
after Ctrl-C, or any other end, the same command goes on where it was. Figures are of test images that nothing was
trained on or chosen by. The times of all models are taken in turn, after the last one is trained; samples are checked
before.

BPD: bits per dimension of the dequantized images, with the standard error over the test images. NLL: the same in nats
an image. ST, FT: milliseconds to sample 100 images (with weights prepared once), and to compute the densities of 100.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import describe, print_table, quantile, time_alternately, write_json
from runs import (
    PARAMETER_MARGIN,
    TIMED_IMAGES,
    Candidate,
    Interrupted,
    images_of,
    match_parameters,
    summary_of,
    timed_works,
    train,
)

from inverse_flow.data import load
from inverse_flow.training import IndependentPixels, TrainConfig

MODELS = ("InverseFlow", "FInCFlow", "Glow", "RealNVP")
PAPER_HARDWARE = "RTX 2080 Ti, batch 100, L=2, K=16; Nagar & Varma, 2025"
# No limit but the time.
ENDLESS = 10**9
# Real NVP's couplings before the squeeze split pixels, for which there is an affine coupling alone. Three of them,
# three channel couplings and four more are the arrangement of its publication; its networks are deeper and fewer.
REAL_NVP = {"steps": 3, "blocks": 2, "coupling": "affine"}


@dataclass(frozen=True)
class PaperRow:
    """A published figure: bits per dimension, milliseconds for 100 images, millions of parameters."""

    model: str
    bits_per_dim: float
    st: float | None = None
    ft: float | None = None
    parameters: float | None = None


@dataclass(frozen=True)
class Preset:
    """An experiment.

    Attributes:
        minutes: of training, each model.
        parameters: of each model, within ``PARAMETER_MARGIN``.
        model: fields of every model's config.
        training: fields of the training's config.
        image_shape: of the data that it is meant for; None for any.
        paper: what was published for the same data.
        target: of InverseFlow, in bits per dimension.
    """

    minutes: float
    parameters: int
    model: dict[str, Any]
    training: dict[str, Any]
    image_shape: tuple[int, int, int] | None = None
    paper: tuple[PaperRow, ...] = field(default=())
    target: float | None = None

    def candidates(self, names: list[str]) -> dict[str, Candidate]:
        return {name: Candidate(name, self.model | (REAL_NVP if name == "RealNVP" else {})) for name in names}


# A decay in steps at the end, which brings as much again as most of the time before it.
DECAY = {"decay_at": (0.6, 0.75, 0.87, 0.95), "decay_factor": 0.4}
# Two things that affine layers alone cannot do cheaply: bend the marginal densities (the spline, which the paper has
# behind its inverse convolution), and fit the sharp edges of uniform noise in the many black pixels (variational noise
# has none).
MNIST_MODEL = {"levels": 2, "steps": 8, "logit_margin": 1e-4, "activation": "spline"}
MNIST_TRAINING = {
    "batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 200, "average_decay": 0.998,
    "dequantization": "variational", **DECAY,
}  # fmt: skip
PRESETS = {
    "mnist": Preset(
        minutes=40,
        parameters=200_000,
        model=MNIST_MODEL,
        training=MNIST_TRAINING,
        image_shape=(1, 28, 28),
        paper=(
            PaperRow("Inverse-Flow", 1.31, 52, None, 1.6),
            PaperRow("FInC Flow", 1.15, 90),
            PaperRow("MintNet", 0.98, 320),
            PaperRow("Emerging", 1.09, 814),
            PaperRow("SNF", 1.28, 99),
        ),
        target=1.20,
    ),
    "fashion-mnist": Preset(40, 200_000, MNIST_MODEL, {**MNIST_TRAINING, "flip": True}, (1, 28, 28)),
    "cifar10": Preset(
        minutes=40,
        parameters=1_760_000,
        model={"levels": 2, "steps": 16},
        training={"batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 200, "average_decay": 0.998, "flip": True,
                  **DECAY},
        image_shape=(3, 32, 32),
        paper=(
            PaperRow("Inverse-Flow", 3.57, 91.6, 722, 1.76),
            PaperRow("FInC Flow", 3.59, 194.8, 548),
            PaperRow("MaCow", 3.40, 790.8, 1080),
            PaperRow("Woodbury", 3.48, 7654, 119),
            PaperRow("MintNet", 3.51, 25000, 2458),
        ),
    ),
    # Figures on a slice are not comparable to those on the complete set, so there is nothing beside them.
    "cifar10-slice": Preset(
        minutes=20,
        parameters=500_000,
        model={"levels": 2, "steps": 8},
        training={"batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 200, "average_decay": 0.998, "flip": True,
                  "validation": 250, "evaluate_every": 200, **DECAY},
        image_shape=(3, 32, 32),
    ),
    "embedded": Preset(
        minutes=5,
        parameters=100_000,
        model={"levels": 2, "steps": 4, "logit_margin": 1e-3},
        training={"batch_size": 50, "learning_rate": 4e-3, "warmup_steps": 50, "average_decay": 0.99, "flip": True,
                  "validation": 100, "evaluate_every": 50, **DECAY},
        image_shape=(1, 28, 28),
    ),
}  # fmt: skip
# With as many training images as these presets have, and the time they get, weights are not chosen by validation.
CHECKPOINT_STEPS = 500


def train_config(preset: Preset, minutes: float, seed: int) -> TrainConfig:
    return TrainConfig(
        **{"evaluate_every": CHECKPOINT_STEPS, **preset.training}, steps=ENDLESS, minutes=minutes, seed=seed
    )


def measure_times(
    trained: dict[str, Any], images: torch.Tensor, device: torch.device, budget: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of the two times of every model, all in turn: median, and quantiles."""
    works = {
        f"{name} {kind}": work for name, model in trained.items() for kind, work in timed_works(model, images).items()
    }
    found: dict[str, dict[str, float]] = {name: {} for name in trained}
    for key, seconds in time_alternately(works, device, budget).items():
        name, kind = key.split()
        milliseconds = [1e3 * value for value in seconds]
        found[name] |= {
            f"{kind}_ms": statistics.median(milliseconds),
            f"{kind}_ms_p20": quantile(milliseconds, 0.2),
            f"{kind}_ms_p80": quantile(milliseconds, 0.8),
        }
    return found


def table(rows: dict[str, dict[str, Any]], paper: tuple[PaperRow, ...]) -> list[list[str]]:
    """Our rows, then the published ones."""

    def cell(value: float | None, digits: int = 1) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    found = [
        [
            name,
            f"{row['bits_per_dim']:.3f} ± {row['standard_error']:.3f}",
            f"{row['nats']:.0f}",
            cell(row.get("ST_ms")),
            cell(row.get("FT_ms")),
            f"{row['parameters']:,}",
            f"{row['training_seconds'] / 60:.1f}",
            f"{row['images_seen']:,}",
        ]
        for name, row in rows.items()
    ]
    for entry in paper:
        millions = "–" if entry.parameters is None else f"{entry.parameters:.2f} M"
        cells = [f"{entry.bits_per_dim:.2f}", "–", cell(entry.st), cell(entry.ft), millions, "–", "–"]
        found.append([f"paper: {entry.model}", *cells])
    return found


HEADER = ["", "BPD", "NLL nats", "ST ms", "FT ms", "parameters", "minutes", "images seen"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument(
        "--data", default="embedded", help="a folder with idx files, the CIFAR-10 archive, an npz slice, or embedded"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, help="of training, each model; that of the preset if not given")
    parser.add_argument("--parameters", type=int, help="of each model; that of the preset if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, help="at most so many; all if not given")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing, at least 15 rounds")
    parser.add_argument("--out", type=Path, help="folder of the runs; runs/density-PRESET if not given")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path("runs") / f"density-{arguments.preset}"
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    preset, device = PRESETS[arguments.preset], arguments.device
    minutes = preset.minutes if arguments.minutes is None else arguments.minutes
    parameters = arguments.parameters or preset.parameters
    data = load(arguments.data)
    shape = data.train.image_shape
    if preset.image_shape not in (None, shape):
        print(f"the preset {arguments.preset} is for images of {preset.image_shape}, {data.name} has {shape}")
        return 2
    config = train_config(preset, minutes, arguments.seed)
    print(f"{describe(device)}; {torch.get_num_threads()} threads")
    print(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images of {shape}")
    print(f"{len(arguments.models)} models, {minutes:g} minutes of training each; runs in {arguments.out}")
    candidates = {
        name: match_parameters(candidate, shape, parameters)
        for name, candidate in preset.candidates(arguments.models).items()
    }
    for name, candidate in candidates.items():
        count = candidate.build(shape).num_parameters
        print(f"  {name}: width {candidate.options['hidden']}, {count:,} parameters (±{PARAMETER_MARGIN:.0%} wanted)")
    baseline = IndependentPixels.fit(data.train.images, config.bit_depth).bits_per_dim(data.test.images)
    print(f"independent pixels: {baseline:.3f} bits/dim")

    rows: dict[str, dict[str, Any]] = {}
    trained = {}
    try:
        for name, candidate in candidates.items():
            print(f"\n{name}", flush=True)
            run = train(candidate, arguments.data, shape, config, arguments.out / name, str(device))
            trained[name] = run.trainer.result().eval()
            rows[name] = summary_of(run, trained[name], arguments.test_images)
            print(f"  {rows[name]['bits_per_dim']:.4f} ± {rows[name]['standard_error']:.4f} bits/dim, test", flush=True)
    except (Interrupted, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    times = measure_times(trained, images_of(data, TIMED_IMAGES, device), device, arguments.budget)
    for name in rows:
        rows[name] |= times[name]

    paper = preset.paper
    print()
    print_table(HEADER, table(rows, paper))
    if paper:
        print(f"The paper's figures are of other hardware ({PAPER_HARDWARE}) and of longer training.")
    if preset.target is not None and "InverseFlow" in rows:
        print(f"InverseFlow: {rows['InverseFlow']['bits_per_dim']:.3f} bits/dim (target at most {preset.target})")
    if arguments.json:
        settings = {
            "preset": arguments.preset,
            "minutes": minutes,
            "parameters": parameters,
            "threads": arguments.threads,
            "training": config.to_dict(),
            "models": {name: candidate.config(shape).to_dict() for name, candidate in candidates.items()},
        }
        results = {
            "data": data.name,
            "train_images": len(data.train),
            "independent_pixels_bits_per_dim": baseline,
            "target": preset.target,
            "rows": rows,
            "paper": {"hardware": PAPER_HARDWARE, "rows": [vars(entry) for entry in paper]},
        }
        write_json(arguments.json, "density", device, settings, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
