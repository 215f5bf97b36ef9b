"""A whole run: data, training, and the files it leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inverse_flow.data import ImageData, load
from inverse_flow.models import KINDS
from inverse_flow.training import figures
from inverse_flow.training import log as logs
from inverse_flow.training.conditioning import classes_of, context_of
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.engine import ALONE, Trainer
from inverse_flow.training.report import Summary, summarize
from inverse_flow.training.sampling import PICTURED, draw
from inverse_flow.training.workers import Workers

SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.png"
CURVE_FILE = "curve.png"


@dataclass(frozen=True)
class Run:
    """A trainer with its data; made by :func:`start` or :func:`resume`."""

    trainer: Trainer
    data: ImageData
    folder: Path

    @property
    def classes(self) -> int:
        """Of a conditional model; 0 for another."""
        return int(self.trainer.extra["classes"])


def start(
    source: str,
    folder: Path,
    train_config: TrainConfig,
    model_options: Mapping[str, Any],
    device: str = "cpu",
    *,
    kind: str = "InverseFlow",
    conditional: bool = False,
    size: int | None = None,
    crop: bool = False,
    workers: Workers = ALONE,
) -> Run:
    """A new run with an untrained model, whose weights the seed decides.

    Args:
        source: of the data, see :func:`inverse_flow.data.load`.
        folder: of the run.
        train_config: how to train.
        model_options: fields of :class:`~inverse_flow.models.FlowConfig`, without the image shape and the context.
        device: to train on.
        kind: of model, a name in :data:`inverse_flow.models.KINDS`.
        conditional: on the class labels.
        size: of the images of a folder, see :func:`inverse_flow.data.load`.
        crop: see there.
        workers: the processes that train together.

    Raises:
        ValueError: options that do not fit together, naming them; conditional without labels.
    """
    data = load(source, size=size, crop=crop)
    classes = classes_of(data) if conditional else 0
    model_type = KINDS[kind]
    model_config = model_type.config_type(
        image_shape=data.train.image_shape, **{"context_channels": classes, **model_options}
    )
    torch.manual_seed(train_config.seed)
    model = model_type.from_config(model_config).to(device)
    extra = {"source": source, "size": size, "crop": crop, "classes": classes}
    context = context_of(data.train, classes)
    trainer = Trainer(model, data.train.images, train_config, folder, extra, context=context, workers=workers)
    return Run(trainer, data, folder)


def resume(
    content: Mapping[str, Any], folder: Path, device: str = "cpu", *, workers: Workers = ALONE, **changes: Any
) -> Run:
    """The run of a checkpoint's content, in ``folder``; ``changes`` replaces values of its :class:`TrainConfig`."""
    data = data_of(content)
    context = context_of(data.train, content["extra"]["classes"])
    images = data.train.images
    trainer = Trainer.resume(content, images, folder, context=context, device=device, workers=workers, **changes)
    return Run(trainer, data, folder)


def data_of(content: Mapping[str, Any], source: str | None = None) -> ImageData:
    """The data that the run of a checkpoint was trained on, or those of another source in the same size."""
    extra = content["extra"]
    return load(source or extra["source"], size=extra["size"], crop=extra["crop"])


def finish(run: Run, say: Callable[[str], None] = lambda message: None) -> Summary:
    """Measures the trained model and writes ``summary.json``, ``samples.png`` and ``curve.png``."""
    model, config = run.trainer.result(), run.trainer.config
    say("measuring the trained model …")
    summary = summarize(model, run.data, config, classes=run.classes)
    content = {
        **summary.to_dict(),
        "data": run.data.name,
        "steps": run.trainer.step,
        "training_seconds": run.trainer.seconds,
        "stopped_because": run.trainer.stop.value if run.trainer.stop else None,
        "kind": type(model).__name__,
        "model": model.config.to_dict(),
        "training": config.to_dict(),
    }
    (run.folder / SUMMARY_FILE).write_text(json.dumps(content, indent=2) + "\n")
    samples = figures.to_uint8(draw(model, PICTURED, config.seed, classes=run.classes).images)
    figures.save_samples(run.folder / SAMPLES_FILE, samples, run.data.test.images[:PICTURED])
    reports = logs.read_log(run.folder / logs.FILE)
    figures.save_curve(run.folder / CURVE_FILE, reports, summary.baseline_test_bits_per_dim)
    return summary
