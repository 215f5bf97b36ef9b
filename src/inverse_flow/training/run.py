"""A whole run: data, training, and the files it leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inverse_flow.data import ImageData, load
from inverse_flow.models import InverseFlow, InverseFlowConfig
from inverse_flow.training import figures, seeding
from inverse_flow.training import log as logs
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.engine import Trainer
from inverse_flow.training.report import Summary, summarize

SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.png"
CURVE_FILE = "curve.png"
PICTURED = figures.SAMPLE_COLUMNS**2


@dataclass(frozen=True)
class Run:
    """A trainer with its data; made by :func:`start` or :func:`resume`."""

    trainer: Trainer
    data: ImageData
    folder: Path


def start(
    source: str,
    folder: Path,
    train_config: TrainConfig,
    model_options: Mapping[str, Any],
    device: str = "cpu",
) -> Run:
    """A new run with an untrained model, whose weights the seed decides.

    Args:
        source: of the data, see :func:`inverse_flow.data.load`.
        folder: of the run.
        train_config: how to train.
        model_options: fields of :class:`InverseFlowConfig`, without the image shape.
        device: to train on.
    """
    data = load(source)
    model_config = InverseFlowConfig(image_shape=data.train.image_shape, **model_options)
    torch.manual_seed(train_config.seed)
    model = InverseFlow.from_config(model_config).to(device)
    return Run(Trainer(model, data.train.images, train_config, folder, {"source": source}), data, folder)


def resume(content: Mapping[str, Any], folder: Path, device: str = "cpu", **changes: Any) -> Run:
    """The run of a checkpoint's content, in ``folder``; ``changes`` replaces values of its :class:`TrainConfig`."""
    data = load(content["extra"]["source"])
    return Run(Trainer.resume(content, data.train.images, folder, device=device, **changes), data, folder)


def finish(run: Run, say: Callable[[str], None] = lambda message: None) -> Summary:
    """Measures the trained model and writes ``summary.json``, ``samples.png`` and ``curve.png``."""
    model, config = run.trainer.result(), run.trainer.config
    say("measuring the trained model …")
    summary = summarize(model, run.data, config.bit_depth)
    content = {
        **summary.to_dict(),
        "data": run.data.name,
        "steps": run.trainer.step,
        "training_seconds": run.trainer.seconds,
        "stopped_because": run.trainer.stop.value if run.trainer.stop else None,
        "model": model.config.to_dict(),
        "training": config.to_dict(),
    }
    (run.folder / SUMMARY_FILE).write_text(json.dumps(content, indent=2) + "\n")
    samples = figures.to_uint8(model.sample(PICTURED, generator=sample_generator(model, config.seed)))
    figures.save_samples(run.folder / SAMPLES_FILE, samples, run.data.test.images[:PICTURED])
    reports = logs.read_log(run.folder / logs.FILE)
    figures.save_curve(run.folder / CURVE_FILE, reports, summary.baseline_test_bits_per_dim)
    return summary


def sample_generator(model: InverseFlow, seed: int) -> torch.Generator:
    """A generator on the model's device, for samples that the seed decides."""
    device = next(model.parameters()).device
    return torch.Generator(device).manual_seed(seeding.generator(seed, seeding.SAMPLES).initial_seed())
