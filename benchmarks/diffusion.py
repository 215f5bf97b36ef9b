"""How do flows stand beside diffusion: how good are samples for their time, and what densities come with them?

    python benchmarks/diffusion.py                                         the embedded slice
    python benchmarks/diffusion.py --preset mnist --data MNIST/raw --minutes 10 --seeds 3 --threads 1 \\
        --json diffusion.json --plot diffusion

A U-Net trained by flow matching (`unet.py`; a step of its sampler costs about as much as one sample of a flow) and the
flows of `density.py`, by the same trainer, with the same number of parameters, for the same time. That time is
counted in steps: the seconds of a step are measured first, all models in turn, and every model gets as many steps as
fill the minutes. With one thread seconds are those of the processor, so that other programs on the machine do not
count. Runs go on where they were cut, and so does the rest, seed by seed.

Samples of all models are drawn in turn, 100 at a time, and timed: of the flows, with prepared weights, at several
temperatures, of the U-Net with several numbers of evaluations of the network. Their quality is that of
docs/quality.md. Bits per dimension are exact for the flows, up to the noise of dequantization; for flow matching they
are an estimate from its differential equation, and neither exact nor a bound. With uniform noise in place of
the flows' variational noise it starts about a quarter of a bit behind for each black pixel.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from density import PRESETS, Preset, train_config
from harness import Clock, Report, Table, new_figure, parser, save_figure, spread, time_alternately
from runs import TIMED_IMAGES, Candidate, Interrupted, check_sampler, match_parameters, train, without_dequantizer
from torch import Tensor
from unet import FlowMatching, Matching

from inverse_flow.data import ImageData, load
from inverse_flow.flows import Flow, prepare_sampling
from inverse_flow.training import TrainConfig, Trainer, bits_per_dim
from inverse_flow.training.figures import to_uint8
from inverse_flow.training.files import replacing
from inverse_flow.training.method import MethodFactory
from inverse_flow.training.metrics import log_probs, standard_error
from inverse_flow.training.quality import Judge

DIFFUSION = FlowMatching.__name__
MODELS = (DIFFUSION, "InverseFlow", "Glow", "FInCFlow")
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
# In place of the preset's, for the U-Net: uniform noise, no check of an inverse that it has only about, and half the
# learning rate. It was not tuned.
DIFFUSION_TRAINING = {"learning_rate": 2e-3, "dequantization": "uniform", "max_inverse_error": None}
FRECHET = "Fréchet distance"
NETWORKS = {"classifier": "classifier's features", "random": "random features"}
COLUMNS = {
    "": "{name}", "ms / 100": "{ms:.0f}", FRECHET: "{classifier}", "random features": "{random}",
    "kernel distance": "{kernel:.3f}", "precision": "{precision:.3f}", "recall": "{recall:.3f}",
    "density": "{density:.3f}", "coverage": "{coverage:.3f}", "Vendi": "{vendi:.1f}", "near training": "{near:.3f}",
}  # fmt: skip
TRAINED = {
    "": "{name}", "bits/dim": "{bits}", "parameters": "{parameters:,}", "steps": "{steps:,}",
    "images seen": "{images_seen:,}", "ms a step": "{step_ms:.0f}",
}  # fmt: skip

Sampler = Callable[[int, torch.Generator], Tensor]
# The name of a model, and what its samples are varied by: evaluations of the network, or the temperature.
Key = tuple[str, float]


def remembered(path: Path, settings: Any, make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make(*arguments)`` gave when it was first called for ``path``, tensors and plain values.

    Raises:
        ValueError: that was with other settings.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            torch.save({"settings": settings, "made": make(*arguments)}, unfinished)
    found = torch.load(path, weights_only=True)
    if found["settings"] != settings:
        raise ValueError(f"{path} is of {found['settings']} instead of {settings}; remove it, or give another folder")
    return found["made"]


def candidates_of(
    preset: Preset, names: Sequence[str], shape: tuple[int, ...], parameters: int, coupling: str | None = None
) -> dict[str, Candidate]:
    """Of every name, with as many parameters; the flows with another coupling than the preset's, if one is given."""
    changes = {} if coupling is None else {"coupling": coupling}
    known = {name: candidate.but(**changes) for name, candidate in preset.candidates().items()}
    known[DIFFUSION] = Candidate(DIFFUSION, {"levels": 2})
    return {name: match_parameters(known[name], shape, parameters) for name in names}


def config_of(preset: Preset, name: str, seed: int, steps: int) -> TrainConfig:
    own: dict[str, Any] = DIFFUSION_TRAINING if name == DIFFUSION else {}
    return replace(train_config(preset, 0.0, seed, name), steps=steps, minutes=None, **own)


def method_of(name: str) -> MethodFactory | None:
    return Matching if name == DIFFUSION else None


def density_of(model: Flow, images: Tensor) -> dict[str, float]:
    """Bits per dimension."""
    torch.manual_seed(0)  # of the signs with which a trace is estimated
    bits = bits_per_dim(log_probs(model, images), model.event_shape)
    return {"bits_per_dim": float(bits.mean()), "standard_error": standard_error(bits), "test_images": len(images)}


def step_seconds(
    candidates: Mapping[str, Candidate],
    preset: Preset,
    data: ImageData,
    device: torch.device,
    budget: float,
    clock: Clock,
) -> dict[str, float]:
    """The median seconds of a training step of every model, all in turn."""

    def stepping(name: str, candidate: Candidate) -> Callable[[], None]:
        torch.manual_seed(0)
        model = candidate.build(data.train.image_shape).to(device)
        trainer = Trainer(model, data.train.images, config_of(preset, name, 0, 1), method=method_of(name))

        def step() -> None:
            trainer.method.step(trainer.batches(0).to(device), step=0, progress=0.0, rate_factor=1.0)
            trainer.follow()

        return step

    works = {name: stepping(name, candidate) for name, candidate in candidates.items()}
    found = time_alternately(works, device, budget, clock)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def samplers_of(
    name: str, model: Flow, evaluations: Sequence[int], temperatures: Sequence[float]
) -> dict[Key, Sampler]:
    """Of a trained model.

    Raises:
        ArithmeticError: prepared weights give other samples.
    """
    found: dict[Key, Sampler] = {}
    if name == DIFFUSION:
        for count in evaluations:
            sampler = copy.deepcopy(model)
            sampler.transport.evaluations = count
            found[name, count] = lambda n, latents, of=sampler: of.sample(n, generator=latents)
        return found
    flow = without_dequantizer(model)
    sampler = prepare_sampling(flow)
    check_sampler(flow, sampler)
    for temperature in temperatures:
        found[name, temperature] = lambda n, latents, at=temperature: sampler.sample(n, None, at, generator=latents)
    return found


def sample_in_turn(
    samplers: Mapping[Key, Sampler], count: int, seed: int, device: torch.device, clock: Clock
) -> dict[str, Any]:
    """``images`` of every sampler, uint8, from the same random numbers, and the ``seconds`` of each 100 of them."""
    images: dict[Key, list[Tensor]] = {key: [] for key in samplers}
    seconds: dict[Key, list[float]] = {key: [] for key in samplers}
    for batch in range(-(-count // TIMED_IMAGES)):
        for key in samplers if batch % 2 == 0 else reversed(samplers):
            latents = torch.Generator(device).manual_seed(seed * count + batch)
            started = clock()
            drawn = samplers[key](TIMED_IMAGES, latents).cpu()
            seconds[key].append(clock() - started)
            images[key].append(to_uint8(drawn))
    return {"images": {key: torch.cat(parts)[:count] for key, parts in images.items()}, "seconds": seconds}


def quality_row(judge: Judge, images: Tensor) -> dict[str, Any]:
    """Of the samples alone: the floor is the same for all."""
    told = judge.measure(images).to_dict()
    figures = {network: each["samples"] for network, each in told["figures"].items()}
    return {"figures": figures, "nearest_training_share": told["nearest_training_share"]}


# ---- What is shown ----


def over_seeds(values: Sequence[float], form: str) -> str:
    """The mean, and the standard deviation where there are several."""
    found = format(statistics.fmean(values), form)
    return f"{found} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else found


def setting_name(model: str, setting: float) -> str:
    return f"{model}, {setting:g} evaluations" if model == DIFFUSION else f"{model}, T = {setting:g}"


def frechet_of(row: Mapping[str, Any], network: str = "classifier") -> float:
    return row["figures"][network][FRECHET]["value"]


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[Key, list[Mapping[str, Any]]]:
    """The rows of all seeds, by model and setting, in order."""
    found: dict[Key, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["setting"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (MODELS.index(item[0][0]), item[0][1])))


def line_of(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of the table of qualities: means over the seeds."""

    def mean(figure: str) -> float:
        return statistics.fmean(row["figures"]["classifier"][figure]["value"] for row in rows)

    line: dict[str, Any] = {"name": name, "kernel": mean("kernel distance"), "vendi": mean("Vendi score")}
    line |= {figure: mean(figure) for figure in ("precision", "recall", "density", "coverage")}
    line |= {network: over_seeds([frechet_of(row, network) for row in rows], ".3g") for network in NETWORKS}
    if "ms" in rows[0]:
        line["ms"] = statistics.fmean(row["ms"] for row in rows)
        line["near"] = statistics.fmean(row["nearest_training_share"]["value"] for row in rows)
    return line


def show(content: Mapping[str, Any]) -> None:
    """Both tables."""
    print()
    densities = content["densities"]
    trained = {row["model"]: [other for other in densities if other["model"] == row["model"]] for row in densities}
    Table(TRAINED).add(
        *({**rows[0], "name": name, "bits": over_seeds([row["bits_per_dim"] for row in rows], ".3f")}
          for name, rows in trained.items())
    )  # fmt: skip
    print(f"\n{content['images']:,} samples each, ± over the seeds")
    lines = [line_of(setting_name(*key), rows) for key, rows in grouped(content["rows"]).items()]
    Table(COLUMNS).add(line_of("test images", [{"figures": content["floor"]}]), *lines)


def draw_plot(content: Mapping[str, Any], path: Path) -> None:
    """The Fréchet distance against the time of 100 samples, by both networks' features, and its floor."""
    figure, groups = new_figure(9, 4.2), grouped(content["rows"])
    for axes, (network, title) in zip(figure.subplots(1, 2), NETWORKS.items(), strict=True):
        for model in MODELS:
            found = [(setting, of) for (name, setting), of in groups.items() if name == model]
            if not found:
                continue
            ms = [statistics.fmean(row["ms"] for row in of) for _, of in found]
            values = [[frechet_of(row, network) for row in of] for _, of in found]
            means = [statistics.fmean(each) for each in values]
            ends = [[m - min(v) for m, v in zip(means, values, strict=True)],
                    [max(v) - m for m, v in zip(means, values, strict=True)]]  # fmt: skip
            label = "flow matching, evaluations" if model == DIFFUSION else f"{model}, temperatures"
            axes.errorbar(ms, means, yerr=ends, marker="o", markersize=4, linewidth=1, label=label)
            for (setting, _), x, y in zip(found, ms, means, strict=True):
                if model in (DIFFUSION, "InverseFlow"):
                    axes.annotate(f"{setting:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.axhline(content["floor"][network][FRECHET]["value"], color="black", linestyle="--", label="test images")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("milliseconds for 100 samples")
        axes.set_title(title, fontsize=10)
    figure.axes[0].set_ylabel(FRECHET)
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)


# ---- The run ----


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, budget=30.0, plot=True)
    made.add_argument("--preset", choices=[name for name in PRESETS if "cifar10" not in name], default="embedded")
    made.add_argument("--data", default="embedded", help="a folder with idx files, or embedded")
    made.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="some of them")
    made.add_argument("--minutes", type=float, help="of training, each; the preset's if not given")
    made.add_argument("--parameters", type=int, help="of each model; the preset's if not given")
    made.add_argument("--coupling", help="of the flows; the preset's if not given")
    made.add_argument("--seeds", type=int, default=1, help="runs of each model, from seed 0 on")
    made.add_argument("--samples", type=int, default=10_000, help="of each model and setting")
    made.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS, help="of the U-Net, for a sample")
    made.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="of the flows' samples")
    made.add_argument("--test-images", type=int, default=1000, help="for bits per dimension, the first ones")
    made.add_argument("--out", type=Path, help="folder of the runs; runs/diffusion-PRESET")
    arguments = made.parse_args(given)
    preset = PRESETS[arguments.preset]
    arguments.minutes = preset.minutes if arguments.minutes is None else arguments.minutes
    arguments.parameters = arguments.parameters or preset.parameters
    arguments.out = arguments.out or Path("runs") / f"diffusion-{arguments.preset}"
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    preset, device, out = PRESETS[arguments.preset], arguments.device, arguments.out
    of_processor = device.type == "cpu" and arguments.threads == 1
    clock: Clock = time.process_time if of_processor else time.perf_counter
    report, data = Report("diffusion", arguments), load(arguments.data)
    try:
        judge, shape = Judge(data, arguments.samples), data.train.image_shape
        candidates = candidates_of(preset, arguments.models, shape, arguments.parameters, arguments.coupling)
        models = {name: candidate.config(shape).to_dict() for name, candidate in candidates.items()}
        stepping = (candidates, preset, data, device, arguments.budget, clock)
        seconds = remembered(out / "steps.pt", models, step_seconds, *stepping)
        steps = {name: max(1, round(60 * arguments.minutes / seconds[name])) for name in candidates}
        report.set(
            data=data.name, clock=clock.__name__, step_seconds=seconds, images=judge.count, models=models,
            training={name: config_of(preset, name, 0, steps[name]).to_dict() for name in candidates},
            floor={net: {name: value._asdict() for name, value in of.items()} for net, of in judge.floor.items()},
        )  # fmt: skip
        print(f"{data.name}: {arguments.minutes:g} minutes of training each, in {out}")
        for seed in range(arguments.seeds):
            samplers: dict[Key, Sampler] = {}
            for name, candidate in candidates.items():
                print(f"{name}, seed {seed}: {steps[name]:,} steps", flush=True)
                folder, config = out / f"{name}-{seed}", config_of(preset, name, seed, steps[name])
                with report.checked(f"{name}, seed {seed}"):
                    run = train(candidate, arguments.data, config, folder, str(device), method_of(name))
                    model, tested = run.trainer.result().eval(), data.test.images[: arguments.test_images]
                    row = remembered(folder / "density.pt", len(tested), density_of, model, tested)
                    row |= {"images_seen": steps[name] * config.batch_size, "steps": steps[name]}
                    row |= {"parameters": run.trainer.model.num_parameters, "step_ms": 1e3 * seconds[name]}
                    report.add("densities", {"model": name, "seed": seed, **row})
                    samplers |= samplers_of(name, model, arguments.evaluations, arguments.temperatures)
            of = (samplers, judge.count, seed, device, clock)
            drawn = remembered(out / f"samples-{seed}.pt", [judge.count, list(samplers)], sample_in_turn, *of)
            for name, setting in samplers:
                images, times = (drawn[what][name, setting] for what in ("images", "seconds"))
                path = out / f"quality-{seed}" / f"{name}-{setting:g}.pt"
                row = remembered(path, judge.count, quality_row, judge, images)
                row = {"model": name, "setting": setting, "seed": seed, **spread(times), **row}
                report.add("rows", row)
                print(f"  {setting_name(name, setting)}: {row['ms']:.0f} ms, {frechet_of(row):.2f}", flush=True)
    except (Interrupted, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    show(report.content)
    if arguments.plot:
        draw_plot(report.content, arguments.plot)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
