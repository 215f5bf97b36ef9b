"""What a trained model is worth: the figures of the closing table."""

from __future__ import annotations

import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inverse_flow.data import ImageData
from inverse_flow.flows.latents import reconstruction_error
from inverse_flow.models import ImageFlow
from inverse_flow.ops.spec import check_integer
from inverse_flow.training.batches import EVALUATION, generator
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.dequantization import dequantize
from inverse_flow.training.labels import context_of
from inverse_flow.training.metrics import (
    IndependentPixels,
    bits_per_dim,
    bound_of,
    evaluate,
    log_probs,
    standard_error,
    unwatched,
)

# Of more training images so many are measured, which tell the mean as well as the test images tell theirs.
TRAIN_IMAGES = 10_000
TIMED_IMAGES = 100
TIMED_REPEATS = 5


@dataclass(frozen=True)
class Summary:
    """The closing figures of a run.

    Attributes:
        train_bits_per_dim, test_bits_per_dim: of the model, on the unmirrored images, with one draw of noise each.
        train_images: on how many of the training images, evenly spaced, the first is measured; the second is on all.
        test_standard_error: of ``test_bits_per_dim``, from the spread over the images; NaN for a single image.
        importance_samples: k, the draws of noise per image in the importance-weighted bound; 0 if it was not asked for.
        importance_weighted_test_bits_per_dim: that bound; None without it.
        baseline_train_bits_per_dim, baseline_test_bits_per_dim: of independent pixels, fitted to the training images.
        seconds_per_100_samples, seconds_per_100_densities: median of several calls.
        reconstruction_error: max |x − inverse(forward(x))| over 100 test images x in [0, 1).
        parameters: learnable numbers of the model.
        peak_memory_bytes: the most memory that computing 100 densities and 100 samples took: allocated by PyTorch on a
            GPU; of the whole process, from its beginning, on a CPU.
        bit_depth: bits of a colour value.
        protocol: what the bits per dimension are, in a few words.
        hardware: what the times were measured on.
    """

    train_bits_per_dim: float
    train_images: int
    test_bits_per_dim: float
    test_standard_error: float
    importance_samples: int
    importance_weighted_test_bits_per_dim: float | None
    baseline_train_bits_per_dim: float
    baseline_test_bits_per_dim: float
    seconds_per_100_samples: float
    seconds_per_100_densities: float
    reconstruction_error: float
    parameters: int
    peak_memory_bytes: int
    bit_depth: int
    protocol: str
    hardware: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        bound = self.importance_weighted_test_bits_per_dim
        weighted = [] if bound is None else [(f"bits/dim, test, {self.importance_samples} draws", f"{bound:.3f}")]
        error = f" ± {self.test_standard_error:.3f}" if math.isfinite(self.test_standard_error) else ""
        return [
            ("bits/dim, train", f"{self.train_bits_per_dim:.3f}"),
            ("bits/dim, test", f"{self.test_bits_per_dim:.3f}{error}"),
            *weighted,
            ("bits/dim of independent pixels, train", f"{self.baseline_train_bits_per_dim:.3f}"),
            ("bits/dim of independent pixels, test", f"{self.baseline_test_bits_per_dim:.3f}"),
            ("time for 100 samples", f"{1000 * self.seconds_per_100_samples:.1f} ms"),
            ("time for 100 densities", f"{1000 * self.seconds_per_100_densities:.1f} ms"),
            ("max|x − inverse(forward(x))|", f"{self.reconstruction_error:.1e}"),
            ("parameters", f"{self.parameters:,}"),
            ("peak memory", f"{self.peak_memory_bytes / 2**20:.0f} MiB"),
        ]


@torch.no_grad()
def summarize(
    model: ImageFlow,
    data: ImageData,
    config: TrainConfig,
    *,
    classes: int = 0,
    importance_samples: int = 0,
    train_images: int = TRAIN_IMAGES,
    watch: Callable[[str, int, int], None] = unwatched,
) -> Summary:
    """Measures a model in evaluation mode on the test images of ``data``, and on as many of the training images as it
    is asked to.

    Args:
        model: to measure.
        data: of the kind that it was trained on.
        config: of its training; says the bit depth and the dequantization.
        classes: of a conditional model; 0 for another.
        importance_samples: draws of noise for the importance-weighted bound on the test images; 0 for none.
        train_images: of the training images at most so many, evenly spaced; the baseline is always fitted to all.
        watch: told what is being measured, on how many images that is done, and on how many it will be.

    Raises:
        TypeError: numbers that are no integers.
        ValueError: the model's images have another shape, or its classes are others.
    """
    check_integer("importance_samples", importance_samples, least=0)
    check_integer("train_images", train_images)
    check_test_images(model, data, classes)
    bit_depth = config.bit_depth
    device = next(model.parameters()).device
    train_context, test_context = context_of(data.train, classes), context_of(data.test, classes)
    baseline = IndependentPixels.fit(data.train.images, bit_depth)
    count = min(train_images, len(data.train))
    measured = torch.arange(count) * len(data.train) // count
    train_bits = evaluate(
        model,
        data.train.images[measured],
        bit_depth,
        context=None if train_context is None else train_context[measured],
        watch=partial(watch, "training images"),
    )
    draws = [
        log_probs(
            model,
            data.test.images,
            bit_depth,
            context=test_context,
            draw=draw,
            watch=partial(watch, f"test images, draw {draw + 1} of {max(1, importance_samples)}"),
        )
        for draw in range(max(1, importance_samples))
    ]
    found = draws[0]
    bits = bits_per_dim(found, model.event_shape, bit_depth)
    weighted: float | None = None
    if importance_samples:
        weighted = float(bits_per_dim(bound_of(draws).mean(), model.event_shape, bit_depth))
    rows = torch.arange(TIMED_IMAGES) % len(data.test)
    images = dequantize(data.test.images[rows], bit_depth, generator(0, EVALUATION)).to(device)
    context = None if test_context is None else test_context[rows].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return Summary(
        train_bits_per_dim=train_bits,
        train_images=len(measured),
        test_bits_per_dim=float(bits_per_dim(found.mean(), model.event_shape, bit_depth)),
        test_standard_error=standard_error(bits),
        importance_samples=importance_samples,
        importance_weighted_test_bits_per_dim=weighted,
        baseline_train_bits_per_dim=baseline.bits_per_dim(data.train.images),
        baseline_test_bits_per_dim=baseline.bits_per_dim(data.test.images),
        seconds_per_100_samples=_median_time(lambda: model.sample(TIMED_IMAGES, context), device),
        seconds_per_100_densities=_median_time(lambda: model.log_prob(images, context), device),
        reconstruction_error=float(reconstruction_error(model, images, context).max()),
        parameters=model.num_parameters,
        peak_memory_bytes=_peak_memory(device),
        bit_depth=bit_depth,
        protocol=protocol(config, len(data.test), len(measured), conditional=classes > 0),
        hardware=hardware(device),
    )


def check_test_images(model: ImageFlow, data: ImageData, classes: int = 0) -> None:
    """Refuses test images on which :func:`summarize` could not measure the model.

    Raises:
        ValueError: there are none, they have another shape than the model's, or labels that it does not know.
    """
    if not len(data.test):
        raise ValueError(f"{data.name} has no test images to measure the model on")
    if data.test.image_shape != model.config.image_shape:
        given, expected = data.test.image_shape, model.config.image_shape
        raise ValueError(f"the model takes images of shape {expected}, the test images of {data.name} have {given}")
    context_of(data.test, classes)


def protocol(config: TrainConfig, test_images: int, train_images: int, *, conditional: bool = False) -> str:
    """What bits per dimension are here, in a few words."""
    given = "log p(x̃ | label)" if conditional else "log p(x̃)"
    return (
        f"n − {given} / (D ln 2) at n = {config.bit_depth} bits, {config.dequantization} dequantization, "
        f"one draw of noise per image, {test_images} test and {train_images} training images, averaged weights"
    )


def hardware(device: torch.device) -> str:
    """The processor, the threads in use and the PyTorch version, in a few words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'' if threads == 1 else 's'}, torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _median_time(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(TIMED_REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
