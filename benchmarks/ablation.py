"""What does each part of the model bring? Every model with and without it, trained for the same time.

    python benchmarks/ablation.py                                             the embedded slice
    python benchmarks/ablation.py --data MNIST/raw --minutes 20 --seeds 2
    python benchmarks/ablation.py --only "InverseFlow" "InverseFlow, no inverse conv"

All variants have the same width, levels and steps, so that they differ in the named part alone; their numbers of
parameters are printed, and so is how many images each saw, since a part that costs time costs images. A difference is
to the model that the variant is named after, with the same seed. Runs are kept and gone on with like those of
benchmarks/density.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import describe, print_table, write_json
from density import PRESETS, train_config
from runs import Candidate, Interrupted, summary_of, train

from inverse_flow.data import load

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
    """Every variant by its name."""
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


def compare_rows(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean bits per dimension of every variant; its difference to its model, seed by seed, and the spread of that."""
    found = {}
    for name, runs in rows.items():
        base = rows.get(name.split(",")[0], runs)
        differences = [run["bits_per_dim"] - other["bits_per_dim"] for run, other in zip(runs, base, strict=False)]
        found[name] = {
            "bits_per_dim": statistics.fmean(run["bits_per_dim"] for run in runs),
            "difference": statistics.fmean(differences),
            "spread_over_seeds": max(differences) - min(differences) if len(differences) > 1 else math.nan,
        }
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="as in benchmarks/density.py")
    parser.add_argument("--preset", choices=PRESETS, default="embedded", help="the training of benchmarks/density.py")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants; all if not given")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, each variant and seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--test-images", type=int, help="at most so many; all if not given")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder of the runs; runs/ablation-PRESET if not given")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path("runs") / f"ablation-{arguments.preset}"
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    preset, device = PRESETS[arguments.preset], arguments.device
    data = load(arguments.data)
    shape = data.train.image_shape
    margin = preset.model.get("logit_margin")
    candidates = variants(arguments.levels, arguments.steps, arguments.hidden, margin)
    names = arguments.only or list(candidates)
    if unknown := sorted(set(names) - set(candidates)):
        print(f"unknown variants: {'; '.join(unknown)}. Known: {'; '.join(candidates)}", file=sys.stderr)
        return 2
    candidates = {name: candidates[name] for name in names}
    first = same_model(candidates, shape)
    distinct = [name for name in names if first[name] == name]
    print(f"{describe(device)}; {torch.get_num_threads()} threads; {data.name}")
    print(
        f"{len(distinct)} different models, {arguments.seeds} seed(s), {arguments.minutes:g} minutes of training each"
    )

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for seed in range(arguments.seeds):
            config = train_config(preset, arguments.minutes, seed)
            for name in distinct:
                print(f"\n{name}, seed {seed}", flush=True)
                folder = arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                run = train(candidates[name], arguments.data, shape, config, folder, str(device))
                rows[name].append(summary_of(run, run.trainer.result().eval(), arguments.test_images))
                print(f"  {rows[name][-1]['bits_per_dim']:.4f} bits/dim, test", flush=True)
    except (Interrupted, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for name in names:
        rows[name] = rows[first[name]]

    compared = compare_rows(rows)
    cells = []
    for name, entry in compared.items():
        runs = rows[name]
        cells.append(
            [
                name,
                f"{entry['bits_per_dim']:.3f} ± {runs[0]['standard_error']:.3f}",
                f"{entry['difference']:+.3f}",
                "–" if math.isnan(entry["spread_over_seeds"]) else f"{entry['spread_over_seeds']:.3f}",
                f"{runs[0]['parameters']:,}",
                f"{statistics.fmean(run['images_seen'] for run in runs):,.0f}",
            ]
        )
    print()
    print_table(["", "BPD", "difference", "over the seeds", "parameters", "images seen"], cells)
    if arguments.json:
        settings = {
            "preset": arguments.preset, "minutes": arguments.minutes, "seeds": arguments.seeds,
            "threads": arguments.threads,
            "training": train_config(preset, arguments.minutes, 0).to_dict(),
            "models": {name: candidate.config(shape).to_dict() for name, candidate in candidates.items()},
        }  # fmt: skip
        results = {"data": data.name, "same_model_as": first, "rows": rows, "compared": compared}
        write_json(arguments.json, "ablation", device, settings, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
