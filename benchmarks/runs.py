"""Models to train and compare: widths for an equal number of parameters, runs that can be cut and gone on with, and
the figures of a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Work, relative_error, require, spread, time_alternately
from torch import Tensor

from inverse_flow.data import ImageData, load
from inverse_flow.flows import Flow, prepare_sampling
from inverse_flow.flows.latents import reconstruction_error
from inverse_flow.models import KINDS, FlowConfig, ImageFlow
from inverse_flow.training import Stop, TrainConfig, bits_per_dim, checkpoint, dequantize
from inverse_flow.training.dequantization import VariationalDequantization
from inverse_flow.training.log import StepReport
from inverse_flow.training.method import MethodFactory
from inverse_flow.training.metrics import log_probs, standard_error
from inverse_flow.training.run import Run, resume, start

# The paper's batch: times are those of this many images.
TIMED_IMAGES = 100
# A width is a whole number, so that numbers of parameters can be equal only about.
PARAMETER_MARGIN = 0.05
# The widest networks that are tried for a number of parameters.
MAX_WIDTH = 4096
# Relative difference allowed between two ways to compute the same images. Prepared weights are joined in float64 and
# rounded once, so each of some dozens of layers differs by some units in the last place.
SAMPLE_TOLERANCE = 1e-4
MINUTE = 60.0


class Interrupted(Exception):
    """Ctrl-C came during a run, whose checkpoint is written."""


@dataclass(frozen=True)
class Candidate:
    """A model to train: its kind, and the fields of its config but for the image shape."""

    kind: str
    options: dict[str, Any]

    def config(self, image_shape: tuple[int, ...]) -> FlowConfig:
        return KINDS[self.kind].config_type(image_shape=image_shape, **self.options)

    def build(self, image_shape: tuple[int, ...]) -> ImageFlow:
        return KINDS[self.kind].from_config(self.config(image_shape))

    def but(self, **changes: Any) -> Candidate:
        return Candidate(self.kind, self.options | changes)


def match_parameters(candidate: Candidate, image_shape: tuple[int, ...], parameters: int) -> Candidate:
    """The candidate with the width of the coupling networks whose number of parameters is closest to ``parameters``.

    Raises:
        ValueError: the closest one is further off than ``PARAMETER_MARGIN``.
    """

    def count(hidden: int) -> int:
        return candidate.but(hidden=hidden).build(image_shape).num_parameters

    low, high = 1, 2
    while count(high) < parameters and high < MAX_WIDTH:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda hidden: abs(count(hidden) - parameters))
    if abs(count(best) - parameters) > PARAMETER_MARGIN * parameters:
        raise ValueError(
            f"no width gives {candidate.kind} {parameters:,} parameters within {PARAMETER_MARGIN:.0%}: the closest, "
            f"{best}, gives {count(best):,}"
        )
    return candidate.but(hidden=best)


def train(
    candidate: Candidate,
    source: str,
    config: TrainConfig,
    folder: Path,
    device: str = "cpu",
    method: MethodFactory | None = None,
) -> Run:
    """A finished run in ``folder``: a new one, or the rest of one whose checkpoint lies there.

    ``method`` is the trainer's, maximum likelihood unless given.

    Raises:
        ValueError: the checkpoint there is of other settings.
        Interrupted: Ctrl-C; the next call goes on.
    """
    path = folder / checkpoint.FILE
    if path.is_file():
        run = resume(checkpoint.load(path), folder, device, method=method)
        _check_settings(run, candidate, source, config)
    else:
        run = start(source, folder, config, candidate.options, device, kind=candidate.kind, method=method)
    minute = 0.0

    def every_minute(report: StepReport) -> None:
        nonlocal minute
        if report.seconds // MINUTE > minute:
            minute = report.seconds // MINUTE
            figures = {"bits/dim": report.bits_per_dim, **report.columns}
            told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if not math.isnan(value))
            print(
                f"  {minute:.0f} min: step {report.step}, {told}, {report.images_per_second:.0f} images/s", flush=True
            )

    if run.trainer.fit(every_minute) is Stop.INTERRUPTED:
        raise Interrupted(f"interrupted after {run.trainer.seconds:.0f} s of {folder}; the same command goes on")
    return run


def _check_settings(run: Run, candidate: Candidate, source: str, config: TrainConfig) -> None:
    model = run.trainer.model
    wanted_model = candidate.config(run.data.train.image_shape).to_dict()
    found = {"kind": type(model).__name__, "data": run.data.name} | model.config.to_dict()
    wanted = {"kind": candidate.kind, "data": load(source).name} | wanted_model
    found |= run.trainer.config.to_dict()
    wanted |= config.to_dict()
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differences = ", ".join(f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{run.folder} holds a run with {differences}; remove it, or give another folder")


def images_of(data: ImageData, count: int, device: torch.device) -> Tensor:
    """The first ``count`` test images, dequantized, round and round if there are fewer."""
    rows = torch.arange(count) % len(data.test)
    return dequantize(data.test.images[rows], generator=torch.Generator().manual_seed(0)).to(device)


def summary_of(run: Run, model: Flow, test_images: int | None = None) -> dict[str, Any]:
    """Bits per dimension on the test images with their standard error, nats per image, and what the training took."""
    trainer, device = run.trainer, next(model.parameters()).device
    bit_depth = trainer.config.bit_depth
    found = log_probs(model, run.data.test.images[:test_images], bit_depth)
    bits = bits_per_dim(found, model.event_shape, bit_depth)
    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": standard_error(bits),
        "nats": float(bits.mean()) * math.prod(model.event_shape) * math.log(2),
        "test_images": len(bits),
        "parameters": trainer.model.num_parameters,
        "steps": trainer.step,
        "images_seen": trainer.step * trainer.batches.batch_size,
        "training_seconds": trainer.seconds,
        "reconstruction_error": float(reconstruction_error(model, images_of(run.data, TIMED_IMAGES, device)).max()),
    }


def draw_latents(flow: Flow, count: int) -> list[Tensor]:
    """Seeded ones."""
    like, generator = next(iter(flow.state_dict().values())), torch.Generator().manual_seed(0)
    return [torch.randn(count, *shape, generator=generator).to(like.device) for shape in flow.latent_shapes]


@torch.no_grad()
def check_sampler(model: Flow, sampler: Flow) -> float:
    """The relative difference between the samples of both from the same latents.

    Raises:
        ArithmeticError: it is too large, or not a number.
    """
    latents = draw_latents(model, 4)
    error = relative_error(sampler.inverse(latents)[0], model.inverse(latents)[0])
    return require({"samples": error}, SAMPLE_TOLERANCE)["samples"]


def without_dequantizer(model: Flow) -> Flow:
    """The flow as it is sampled: variational dequantization moves noise within a cell, and a sample is its cell."""
    layers = [layer for layer in model.layers if not isinstance(layer, VariationalDequantization)]
    return Flow(layers, model.event_shape, base=model.base).eval()


def timed_works(model: Flow, images: Tensor) -> dict[str, Work]:
    """The paper's two times: ``ST``, sampling as many images as there are, with weights prepared once; ``FT``, their
    densities.

    Raises:
        ArithmeticError: the prepared model gives other samples.
    """
    sampled = without_dequantizer(model)
    sampler = prepare_sampling(sampled)
    check_sampler(sampled, sampler)

    def density() -> None:
        with torch.no_grad():
            model.log_prob(images)

    return {"ST": lambda: sampler.sample(len(images)), "FT": density}


def measure_times(
    models: Mapping[str, Flow], images: Tensor, device: torch.device, budget: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of the two times of every model, all in turn: median, and quantiles."""
    works = {
        f"{name} {kind}": work for name, model in models.items() for kind, work in timed_works(model, images).items()
    }
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for key, seconds in time_alternately(works, device, budget).items():
        name, kind = key.rsplit(maxsplit=1)
        times = spread(seconds)
        found[name] |= {f"{kind}_ms": times["ms"]} | {f"{kind}_ms_{q}": times[f"{q}_ms"] for q in ("p20", "p80")}
    return found
