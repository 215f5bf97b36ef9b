"""What the benchmarks that train share: widths for an equal number of parameters, runs that can be cut and gone on
with, and the figures of a trained model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Work
from torch import Tensor

from inverse_flow.data import ImageData
from inverse_flow.flows import Flow, prepare_sampling
from inverse_flow.flows.sampling import reconstruction_error
from inverse_flow.models import KINDS, FlowConfig, ImageFlow
from inverse_flow.training import Stop, TrainConfig, bits_per_dim, checkpoint, dequantize
from inverse_flow.training.dequantization import VariationalDequantization
from inverse_flow.training.log import StepReport
from inverse_flow.training.metrics import log_probs, standard_error
from inverse_flow.training.run import Run, resume, start

# The paper's batch: times are those of so many images.
TIMED_IMAGES = 100
# A width is a whole number, so that numbers of parameters can be equal only about.
PARAMETER_MARGIN = 0.05
# Wider networks than this are no answer to a wish for so many parameters.
MAX_WIDTH = 4096
# Largest difference allowed between two ways to compute the same images, as a share of their largest magnitude.
# Prepared weights are joined in float64 and rounded once, so each of some dozens of layers differs by some units in the
# last place.
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

    def with_width(self, hidden: int) -> Candidate:
        return Candidate(self.kind, {**self.options, "hidden": hidden})


def match_parameters(candidate: Candidate, image_shape: tuple[int, ...], parameters: int) -> Candidate:
    """The candidate with the width of the coupling networks whose number of parameters is closest to ``parameters``.

    Raises:
        ValueError: the closest one is further off than ``PARAMETER_MARGIN``.
    """

    def count(hidden: int) -> int:
        return candidate.with_width(hidden).build(image_shape).num_parameters

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
    return candidate.with_width(best)


def train(
    candidate: Candidate, source: str, image_shape: tuple[int, ...], config: TrainConfig, folder: Path, device: str
) -> Run:
    """A finished run in ``folder``: a new one, or the rest of one whose checkpoint lies there.

    Raises:
        ValueError: the checkpoint there is of other settings.
        Interrupted: Ctrl-C; the next call goes on.
    """
    path = folder / checkpoint.FILE
    if path.is_file():
        content = checkpoint.load(path)
        _check_settings(content, candidate, source, image_shape, config, folder)
        run = resume(content, folder, device)
    else:
        run = start(source, folder, config, candidate.options, device, kind=candidate.kind)
    if run.trainer.fit(_Reporter()) is Stop.INTERRUPTED:
        raise Interrupted(f"interrupted after {run.trainer.seconds:.0f} s of {folder}; the same command goes on")
    return run


class _Reporter:
    """A line a minute."""

    def __init__(self) -> None:
        self.minute = 0.0

    def __call__(self, report: StepReport) -> None:
        if report.seconds // MINUTE > self.minute:
            self.minute = report.seconds // MINUTE
            print(
                f"  {self.minute:.0f} min: step {report.step}, {report.bits_per_dim:.3f} bits/dim, "
                f"{report.images_per_second:.0f} images/s",
                flush=True,
            )


def _check_settings(
    content: checkpoint.Checkpoint, candidate: Candidate, source: str, image_shape: tuple[int, ...],
    config: TrainConfig, folder: Path,
) -> None:  # fmt: skip
    description = content.model.description
    found = {
        "data": content.data and content.data.source,
        "kind": description["kind"],
        **KINDS[description["kind"]].config_type.from_dict(description["config"]).to_dict(),
        **content.training.to_dict(),
    }
    wanted = {
        "data": checkpoint.absolute(source), "kind": candidate.kind, **candidate.config(image_shape).to_dict(),
        **config.to_dict(),
    }  # fmt: skip
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differences = ", ".join(f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{folder} holds a run with {differences}; remove it, or give another folder")


def images_of(data: ImageData, count: int, device: torch.device) -> Tensor:
    """The first ``count`` test images, dequantized, round and round if there are fewer."""
    rows = torch.arange(count) % len(data.test)
    return dequantize(data.test.images[rows], generator=torch.Generator().manual_seed(0)).to(device)


def bits_of(model: Flow, data: ImageData, config: TrainConfig, test_images: int | None = None) -> dict[str, float]:
    """Bits per dimension on the test images, their standard error, and nats an image."""
    found = log_probs(model, data.test.images[:test_images], config.bit_depth)
    bits = bits_per_dim(found, model.event_shape, config.bit_depth)
    mean, dimensions = float(bits.mean()), math.prod(model.event_shape)
    return {
        "bits_per_dim": mean,
        "standard_error": standard_error(bits),
        "nats": mean * dimensions * math.log(2),
        "test_images": len(bits),
    }


@torch.no_grad()
def check_sampler(model: Flow, sampler: Flow, count: int = 4, tolerance: float = SAMPLE_TOLERANCE) -> float:
    """The largest difference between the samples of both from the same latents, as a share of their magnitude.

    Raises:
        ArithmeticError: it is above ``tolerance``, or not a number.
    """
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(count, *shape, generator=generator).to(like) for shape in model.latent_shapes]
    return relative_difference(sampler.inverse(latents)[0], model.inverse(latents)[0], tolerance)


def relative_difference(found: Tensor, wanted: Tensor, tolerance: float = SAMPLE_TOLERANCE) -> float:
    """max|found − wanted| / max|wanted|.

    Raises:
        ArithmeticError: it is above ``tolerance``, or not a number.
    """
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise ArithmeticError(f"images differ by {error:.1e} of their largest magnitude; {tolerance:.0e} is allowed")
    return error


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


def summary_of(run: Run, model: Flow, test_images: int | None = None) -> dict[str, Any]:
    """Everything but the times."""
    device = next(model.parameters()).device
    trainer = run.trainer
    return {
        **bits_of(model, run.data, trainer.config, test_images),
        "parameters": trainer.model.num_parameters,
        "steps": trainer.step,
        "images_seen": trainer.step * trainer.batches.batch_size,
        "training_seconds": trainer.seconds,
        "reconstruction_error": float(reconstruction_error(model, images_of(run.data, TIMED_IMAGES, device)).max()),
    }
