"""How good a density does each model learn in the same time, and what does each part of it bring?

    python benchmarks/density.py                                      the embedded slice, four times 5 minutes
    python benchmarks/density.py --preset mnist --data MNIST/raw      the target on MNIST, four times 60 minutes
    python benchmarks/density.py --preset mnist --data MNIST/raw --models InverseFlow
    python benchmarks/density.py --preset mnist --data MNIST/raw --minutes 10 --models InverseFlow FInCFlow Glow \\
        Emerging Periodic Exponential Woodbury SNF                    the rivals of the inverse convolution
    python benchmarks/density.py --preset cifar10-slice --data slice.npz --minutes 20 --device cuda
    python benchmarks/density.py --ablation                           every model with and without each part
    python benchmarks/density.py --ablation --models "InverseFlow" "InverseFlow, no inverse conv" --seeds 2

InverseFlow, FInCFlow, Glow and RealNVP are trained by the same trainer for the same time, with the same number of
parameters: the widths of their coupling networks are chosen so and printed. Each has a folder with its checkpoint;
after Ctrl-C, or any other end, the same command goes on where it was. Figures are of test images that nothing was
trained on or chosen by. The times of all models are taken in turn, after the last one is trained; samples are checked
before. The rivals differ from InverseFlow in the layer at the head of a step: see `rivals.py`. The columns are those of
the paper's tables:

BPD: bits per dimension of the dequantized images, with the standard error over the test images. NLL: the same in nats
per image. ST, FT: milliseconds to sample 100 images (with weights prepared once), and to compute the densities of 100.
Round trip: the largest error of a pixel on the way to the latents and back.

The variants of an ablation have the same width, levels and steps, so that they differ in the named part alone; a part
that costs time costs images, whose number is printed. A difference is to the model that the variant is named after,
with the same seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Report, Table, parser
from rivals import APPROXIMATE, RIVALS
from runs import (
    PARAMETER_MARGIN,
    TIMED_IMAGES,
    Candidate,
    Interrupted,
    images_of,
    match_parameters,
    measure_times,
    summary_of,
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
    paper: tuple[PaperRow, ...] = ()
    target: float | None = None

    def candidates(self) -> dict[str, Candidate]:
        """Every model by its name, those of ``MODELS`` first."""
        found = {name: Candidate(name, self.model | (REAL_NVP if name == "RealNVP" else {})) for name in MODELS}
        return found | {name: Candidate(rival.kind, self.model | rival.options) for name, rival in RIVALS.items()}


# A decay in steps at the end, which brings as much again as most of the time before it.
DECAY = {"decay_at": (0.6, 0.75, 0.87, 0.95), "decay_factor": 0.4}
# Two things that affine layers alone cannot do cheaply: bend densities (the spline that the paper has behind its
# inverse convolution, and splines as couplings), and fit the sharp edges of uniform noise in the many black pixels
# (variational noise has none).
MNIST_MODEL = {"levels": 2, "steps": 8, "logit_margin": 1e-4, "activation": "spline", "coupling": "spline"}
MNIST_TRAINING = {
    "batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 200, "average_decay": 0.998,
    "dequantization": "variational", **DECAY,
}  # fmt: skip
CIFAR_TRAINING = {
    "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 200, "average_decay": 0.998, "flip": True, **DECAY,
}  # fmt: skip
PRESETS = {
    "mnist": Preset(
        minutes=60,
        parameters=1_200_000,
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
        target=1.08,
    ),
    "fashion-mnist": Preset(
        60, 1_200_000, MNIST_MODEL, {**MNIST_TRAINING, "flip": True}, (1, 28, 28), target=2.95
    ),
    "cifar10": Preset(
        minutes=40,
        parameters=1_760_000,
        model={"levels": 2, "steps": 16},
        training=CIFAR_TRAINING,
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
        training={**CIFAR_TRAINING, "validation": 250, "evaluate_every": 200},
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
ABLATION_MINUTES = 3.0
# Of each model: what is changed in it, by name. The first is the model itself.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "InverseFlow": {
        "": {},
        "no inverse conv": {"inverse_conv": "none"},
        "orders alternating": {"orders": "alternating"},
        "corner identity": {"corner": "identity"},
        "corner plu": {"corner": "plu"},
        "activation spline": {"activation": "spline"},
        "activation spline, no inverse conv": {"activation": "spline", "inverse_conv": "none"},
        "kernel 5": {"kernel_size": 5},
    },
    "FInCFlow": {"": {}, "no inverse conv": {"inverse_conv": "none"}, "orders alternating": {"orders": "alternating"}},
    "Glow": {"": {}, "inverse conv": {"inverse_conv": "training"}},
    "RealNVP": {"": {}, "inverse conv": {"inverse_conv": "training"}},
}
# Three arrangements of masks are as many couplings as about seven steps of the others.
REAL_NVP_STEPS = 2


def variants(levels: int, steps: int, hidden: int, logit_margin: float | None) -> dict[str, Candidate]:
    """Every variant of the ablation by its name."""
    shared = {"levels": levels, "steps": steps, "hidden": hidden, "logit_margin": logit_margin}
    found = {}
    for kind, changes in CHANGES.items():
        options = shared | ({"steps": REAL_NVP_STEPS, "blocks": 1} if kind == "RealNVP" else {})
        for name, change in changes.items():
            found[f"{kind}, {name}" if name else kind] = Candidate(kind, options | change)
    return found


def same_model(candidates: dict[str, Candidate], image_shape: tuple[int, ...]) -> dict[str, str]:
    """For every variant the first one that is the same model under another name, such as a Glow without inverse conv:
    it need not be trained twice. Most are their own.
    """
    first: dict[str, str] = {}
    seen: list[tuple[dict[str, Any], str]] = []
    for name, candidate in candidates.items():
        config = candidate.config(image_shape).to_dict()
        if config["inverse_conv"] == "none":
            # Options of a layer that is not there.
            for option in ("orders", "corner", "kernel_size"):
                del config[option]
        first[name] = next((earlier for other, earlier in seen if other == config), name)
        seen.append((config, name))
    return first


def compare_rows(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """Mean bits per dimension of every variant; its difference to its model, seed by seed, and the spread of that."""
    found = {}
    for name, runs in rows.items():
        base = {run["seed"]: run["bits_per_dim"] for run in rows.get(name.split(",")[0], runs)}
        differences = [run["bits_per_dim"] - base[run["seed"]] for run in runs if run["seed"] in base]
        found[name] = {
            "bits_per_dim": statistics.fmean(run["bits_per_dim"] for run in runs),
            "difference": statistics.fmean(differences) if differences else None,
            "spread_over_seeds": max(differences) - min(differences) if len(differences) > 1 else None,
        }
    return found


def train_config(preset: Preset, minutes: float, seed: int, name: str = "") -> TrainConfig:
    own = {"max_inverse_error": None} if name in APPROXIMATE else {}
    return TrainConfig(
        **{"evaluate_every": CHECKPOINT_STEPS, "validation": 0, **preset.training, **own},
        steps=ENDLESS,
        minutes=minutes,
        seed=seed,
    )


COLUMNS = {
    "": "{name}", "BPD": "{bpd}", "NLL nats": "{nats:.0f}", "ST ms": "{ST_ms:.1f}", "FT ms": "{FT_ms:.1f}",
    "round trip": "{reconstruction_error:.0e}", "parameters": "{parameters:,}", "minutes": "{minutes:.1f}",
    "images seen": "{images_seen:,.0f}",
}  # fmt: skip
DIFFERENCES = {"difference": "{difference:+.3f}", "over the seeds": "{spread_over_seeds:.3f}"}


def table(
    rows: Mapping[str, list[dict[str, Any]]], compared: Mapping[str, Any], paper: Sequence[PaperRow]
) -> list[dict[str, Any]]:
    """Lines of our models, the mean of their seeds, then the published ones."""
    lines = []
    for name, runs in rows.items():
        line = {**runs[0], "name": name, **compared.get(name, {})}
        line["bpd"] = f"{statistics.fmean(run['bits_per_dim'] for run in runs):.3f} ± {runs[0]['standard_error']:.3f}"
        line["minutes"] = runs[0]["training_seconds"] / 60
        line["images_seen"] = statistics.fmean(run["images_seen"] for run in runs)
        lines.append(line)
    for entry in paper:
        line = {"name": f"paper: {entry.model}", "bpd": f"{entry.bits_per_dim:.2f}"}
        line |= {"ST_ms": entry.st, "FT_ms": entry.ft}
        if entry.parameters is not None:
            line["parameters"] = round(1e6 * entry.parameters)
        lines.append(line)
    return lines


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, budget=60.0)
    made.add_argument("--preset", choices=PRESETS, default="embedded")
    made.add_argument(
        "--data", default="embedded", help="a folder with idx files, the CIFAR-10 archive, an npz slice, or embedded"
    )
    made.add_argument("--ablation", action="store_true", help="every model with and without each part, untimed")
    made.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="these models or variants; if not given, all variants, or all models but the rivals",
    )
    made.add_argument("--minutes", type=float, help=f"of training, each; the preset's, or {ABLATION_MINUTES:g}")
    made.add_argument("--parameters", type=int, help="of each model, but in an ablation; the preset's if not given")
    made.add_argument("--levels", type=int, default=2, help="of an ablation")
    made.add_argument("--steps", type=int, default=4, help="of an ablation")
    made.add_argument("--hidden", type=int, default=48, help="of an ablation")
    made.add_argument("--seed", type=int, default=0, help="the first one")
    made.add_argument("--seeds", type=int, default=1, help="runs of each model")
    made.add_argument("--test-images", type=int, help="the most that are used; all if not given")
    made.add_argument("--out", type=Path, help="folder of the runs; runs/density-PRESET or runs/ablation-PRESET")
    arguments = made.parse_args(given)
    preset, kind = PRESETS[arguments.preset], "ablation" if arguments.ablation else "density"
    if arguments.minutes is None:
        arguments.minutes = ABLATION_MINUTES if arguments.ablation else preset.minutes
    arguments.parameters = arguments.parameters or preset.parameters
    arguments.out = arguments.out or Path("runs") / f"{kind}-{arguments.preset}"
    return arguments


def chosen(arguments: argparse.Namespace, shape: tuple[int, ...]) -> dict[str, Candidate]:
    """What is trained, by name.

    Raises:
        ValueError: the data are not those of the preset, or there is no model of a name.
    """
    preset = PRESETS[arguments.preset]
    if not arguments.ablation and preset.image_shape not in (None, shape):
        raise ValueError(f"the preset {arguments.preset} is for images of {preset.image_shape}, these are {shape}")
    known = preset.candidates()
    if arguments.ablation:
        margin = preset.model.get("logit_margin")
        known = variants(arguments.levels, arguments.steps, arguments.hidden, margin)
    if unknown := sorted(set(arguments.models or ()) - set(known)):
        raise ValueError(f"unknown: {'; '.join(unknown)}. Known: {'; '.join(known)}")
    found = {name: known[name] for name in arguments.models or (known if arguments.ablation else MODELS)}
    if arguments.ablation:
        return found
    return {name: match_parameters(candidate, shape, arguments.parameters) for name, candidate in found.items()}


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    preset, device = PRESETS[arguments.preset], arguments.device
    data = load(arguments.data)
    shape = data.train.image_shape
    try:
        candidates = chosen(arguments, shape)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report = Report("ablation" if arguments.ablation else "density", arguments)
    print(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images of {shape}")
    first = same_model(candidates, shape)
    for name, candidate in candidates.items():
        count = candidate.build(shape).num_parameters
        same = "" if first[name] == name else f", the same model as {first[name]}"
        print(f"  {name}: width {candidate.options['hidden']}, {count:,} parameters{same}")
    if not arguments.ablation:
        print(f"  (parameters ±{PARAMETER_MARGIN:.0%} wanted)")
    config = train_config(preset, arguments.minutes, arguments.seed)
    baseline = IndependentPixels.fit(data.train.images, config.bit_depth).bits_per_dim(data.test.images)
    print(f"independent pixels: {baseline:.3f} bits/dim; {arguments.minutes:g} minutes each, in {arguments.out}")
    report.set(
        data=data.name, train_images=len(data.train), independent_pixels_bits_per_dim=baseline, target=preset.target,
        training=config.to_dict(), models={name: c.config(shape).to_dict() for name, c in candidates.items()},
        same_model_as=first,
    )  # fmt: skip

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    trained = {}
    try:
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            for name in dict.fromkeys(first.values()):
                print(f"\n{name}, seed {seed}", flush=True)
                folder = arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                config = train_config(preset, arguments.minutes, seed, name)
                with report.checked(f"{name}, seed {seed}"):
                    run = train(candidates[name], arguments.data, config, folder, str(device))
                    trained[name] = run.trainer.result().eval()
                    row = {"seed": seed, **summary_of(run, trained[name], arguments.test_images)}
                    for other in candidates:
                        if first[other] == name:
                            rows[other].append(dict(row))
                    report.set(rows=rows)
                    print(f"  {row['bits_per_dim']:.4f} ± {row['standard_error']:.4f} bits/dim, test", flush=True)
    except (Interrupted, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = {name: runs for name, runs in rows.items() if runs}
    compared = {}
    if arguments.ablation:
        compared = compare_rows(rows)
        report.set(compared=compared)
    else:
        with report.checked("prepared samples"):
            times = measure_times(trained, images_of(data, TIMED_IMAGES, device), device, arguments.budget)
            for name, found in times.items():
                rows[name][0] |= found
        report.set(rows=rows, paper={"hardware": PAPER_HARDWARE, "rows": [vars(entry) for entry in preset.paper]})

    print()
    columns = COLUMNS | (DIFFERENCES if arguments.ablation else {})
    Table(columns).add(*table(rows, compared, () if arguments.ablation else preset.paper))
    if preset.paper and not arguments.ablation:
        print(f"The paper's figures are of other hardware ({PAPER_HARDWARE}) and of longer training.")
        if preset.target is not None and "InverseFlow" in rows:
            reached = rows["InverseFlow"][0]["bits_per_dim"]
            print(f"InverseFlow: {reached:.3f} bits/dim (target at most {preset.target})")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
