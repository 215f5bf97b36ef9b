"""What a trained model is worth: the figures of the closing table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from inverse_flow.data import ImageData
from inverse_flow.models import InverseFlow
from inverse_flow.training import seeding
from inverse_flow.training.baseline import IndependentPixels
from inverse_flow.training.metrics import dequantize, evaluate

TIMED_IMAGES = 100
TIMED_REPEATS = 5


@dataclass(frozen=True)
class Summary:
    """The closing figures of a run.

    Attributes:
        train_bits_per_dim, test_bits_per_dim: of the model, on the unmirrored images.
        baseline_train_bits_per_dim, baseline_test_bits_per_dim: of independent pixels, fitted to the training images.
        seconds_per_100_samples, seconds_per_100_densities: median of several calls.
        reconstruction_error: max |x − inverse(forward(x))| over 100 test images x in [0, 1).
        parameters: learnable numbers of the model.
        bit_depth: bits of a colour value.
        hardware: what the times were measured on.
    """

    train_bits_per_dim: float
    test_bits_per_dim: float
    baseline_train_bits_per_dim: float
    baseline_test_bits_per_dim: float
    seconds_per_100_samples: float
    seconds_per_100_densities: float
    reconstruction_error: float
    parameters: int
    bit_depth: int
    hardware: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        return [
            ("bits/dim, train", f"{self.train_bits_per_dim:.3f}"),
            ("bits/dim, test", f"{self.test_bits_per_dim:.3f}"),
            ("bits/dim of independent pixels, train", f"{self.baseline_train_bits_per_dim:.3f}"),
            ("bits/dim of independent pixels, test", f"{self.baseline_test_bits_per_dim:.3f}"),
            ("time for 100 samples", f"{1000 * self.seconds_per_100_samples:.1f} ms"),
            ("time for 100 densities", f"{1000 * self.seconds_per_100_densities:.1f} ms"),
            ("max|x − inverse(forward(x))|", f"{self.reconstruction_error:.1e}"),
            ("parameters", f"{self.parameters:,}"),
        ]


@torch.no_grad()
def summarize(model: InverseFlow, data: ImageData, bit_depth: int) -> Summary:
    """Measures a model in evaluation mode on all the training and test images of ``data``.

    Raises:
        ValueError: the model's images have another shape.
    """
    if data.test.image_shape != model.config.image_shape:
        given, expected = data.test.image_shape, model.config.image_shape
        raise ValueError(f"the model takes images of shape {expected}, {data.name} has {given}")
    device = next(model.parameters()).device
    baseline = IndependentPixels.fit(data.train.images, bit_depth)
    noise = seeding.generator(0, seeding.EVALUATION)
    repeats = -(-TIMED_IMAGES // len(data.test))
    hundred = data.test.images.repeat(repeats, 1, 1, 1)[:TIMED_IMAGES]
    images = dequantize(hundred, bit_depth, noise).to(device)
    latents, _ = model(images)
    back, _ = model.inverse(latents)
    return Summary(
        train_bits_per_dim=evaluate(model, data.train.images, bit_depth),
        test_bits_per_dim=evaluate(model, data.test.images, bit_depth),
        baseline_train_bits_per_dim=baseline.bits_per_dim(data.train.images),
        baseline_test_bits_per_dim=baseline.bits_per_dim(data.test.images),
        seconds_per_100_samples=_median_time(lambda: model.sample(TIMED_IMAGES), device),
        seconds_per_100_densities=_median_time(lambda: model.log_prob(images), device),
        reconstruction_error=float((back - images).abs().max()),
        parameters=model.num_parameters,
        bit_depth=bit_depth,
        hardware=hardware(device),
    )


def hardware(device: torch.device) -> str:
    """The processor, the threads in use and the PyTorch version, in a few words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _median_time(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(TIMED_REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
