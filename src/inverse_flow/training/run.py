"""A whole run: data, training, and the files it leaves in its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inverse_flow.data import ImageData
from inverse_flow.data.load import is_image_folder
from inverse_flow.models import KINDS
from inverse_flow.training import checkpoint, figures
from inverse_flow.training import log as logs
from inverse_flow.training.checkpoint import Checkpoint, DataSource
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.files import check_folder, replacing, to_json, write_text
from inverse_flow.training.labels import classes_of, context_of
from inverse_flow.training.method import MethodFactory
from inverse_flow.training.metrics import unwatched
from inverse_flow.training.samples import PICTURED, draw
from inverse_flow.training.summary import Summary, check_test_images, summarize
from inverse_flow.training.trainer import ALONE, Trainer, draw_validation
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
        return self.trainer.data.classes if self.trainer.data else 0


def start(
    source: str,
    folder: Path,
    train_config: TrainConfig,
    model_options: Mapping[str, Any],
    device: str = "cpu",
    *,
    kind: str = "InverseFlow",
    conditional: bool = False,
    method: MethodFactory | None = None,
    workers: Workers = ALONE,
    **data_options: Any,
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
        method: how a batch becomes an update, see :class:`Trainer`.
        workers: the processes that train together.
        data_options: other arguments of :func:`inverse_flow.data.load`.

    Raises:
        ValueError: options that do not fit together, naming them; conditional without labels.
        OSError: the folder cannot be written to, or another run uses it.
    """
    if workers.first:
        check_folder(folder)
    where = DataSource(checkpoint.absolute(source), data_options)
    data = where.load()
    if conditional:
        where = replace(where, classes=classes_of(data), class_names=tuple(getattr(data, "class_names", ())))
    model_type = KINDS[kind]
    model_config = model_type.config_type(
        image_shape=data.train.image_shape, **{"context_channels": where.classes, **model_options}
    )
    torch.manual_seed(train_config.seed)
    model = model_type.from_config(model_config).to(device)
    images, context, validation = _images(data, where, train_config)
    if validation is None:
        validation = draw_validation(data.train.labels, train_config)
    trainer = Trainer(
        model, images, train_config, folder,
        context=context, method=method, workers=workers, data=where, validation=validation,
    )  # fmt: skip
    return _checked(Run(trainer, data, folder))


def resume(
    content: Checkpoint,
    folder: Path,
    device: str = "cpu",
    *,
    source: str | None = None,
    method: MethodFactory | None = None,
    workers: Workers = ALONE,
    **changes: Any,
) -> Run:
    """The run of a checkpoint, in ``folder``.

    Args:
        content: the checkpoint.
        folder: of the run.
        device: to train on.
        source: where its data lie now; None for where they lay.
        method: the one that the run began with, if :func:`start` was given one.
        workers: the processes that train together.
        changes: values of its :class:`TrainConfig` to replace.

    Raises:
        ValueError: other images than the run began with; no data source, neither here nor in the checkpoint.
        OSError: the folder cannot be written to, or another run uses it.
    """
    if workers.first:
        check_folder(folder)
    where, data = _found(content, source)
    images, context, validation = _images(data, where, content.training)
    if content.validation is None:
        content = replace(content, validation=validation)
    trainer = Trainer.resume(
        content, images, folder, context=context, method=method, device=device, workers=workers, data=where, **changes
    )
    return _checked(Run(trainer, data, folder))


def source_of(content: Checkpoint, source: str | None = None) -> DataSource:
    """Where a checkpoint's data come from, or come from now; nowhere if its trainer was given images alone.

    Raises:
        ValueError: its trainer was given contexts too, of which nothing is known.
    """
    channels = content.model.description["config"].get("context_channels", 0)
    if content.data is None and channels:
        raise ValueError(f"this checkpoint does not say what the {channels} channels of its context are: use Python")
    where = content.data or DataSource(None)
    if source is None:
        return where
    kept = where.options if is_image_folder(source) else {}
    return replace(where, source=checkpoint.absolute(source), options=kept)


def data_of(content: Checkpoint, source: str | None = None) -> ImageData:
    """The data that the run of a checkpoint was trained on, or those of another source.

    A folder of images is read as the run's was, all else as it is.

    Raises:
        ValueError: without a ``source``: what lies where the run's data lay are other images.
        FileNotFoundError: nothing lies there.
    """
    where, data = _found(content, source)
    if source is None:
        images, context, _ = _images(data, where, content.training)
        checkpoint.check_images(content, images, context)
    return data


def _found(content: Checkpoint, source: str | None) -> tuple[DataSource, ImageData]:
    """Where the data of a checkpoint's run lie, and they."""
    where = source_of(content, source)
    try:
        return where, where.load()
    except FileNotFoundError as error:
        if source is not None:
            raise
        raise FileNotFoundError(
            f"the images of this run are not in {where.source} any more: say with --data where they are now"
        ) from error


def _images(data: ImageData, where: DataSource, config: TrainConfig) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The images of a run and their contexts; and which of them are validation images that the data bring along.

    None for the last if there are none, or if the configuration says how many to draw.
    """
    own = data.validation if config.validation is None else None
    sets = [data.train] if own is None else [data.train, own]
    contexts = [context_of(part, where.classes) for part in sets]
    context = torch.cat([found for found in contexts if found is not None]) if where.classes else None
    images = torch.cat([part.images for part in sets])
    return images, context, None if own is None else torch.arange(len(images)) >= len(data.train)


def _checked(run: Run) -> Run:
    """Refuses now what would stop the run at its end: test images that cannot be measured, a disk that is too full."""
    trainer = run.trainer
    check_test_images(trainer.model, run.data, run.classes)
    if trainer.workers.first:
        check_folder(run.folder, 2 * trainer.checkpoint_bytes)
    return run


def finish(run: Run, watch: Callable[[str, int, int], None] = unwatched) -> Summary:
    """Measures the trained model and writes ``summary.json``, ``samples.png`` and ``curve.png``; ``watch`` as for
    :func:`~inverse_flow.training.summary.summarize`."""
    model, config = run.trainer.result(), run.trainer.config
    summary = summarize(model, run.data, config, classes=run.classes, watch=watch)
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
    write_text(run.folder / SUMMARY_FILE, to_json(content) + "\n")
    samples = figures.to_uint8(draw(model, PICTURED, config.seed, classes=run.classes).images)
    with replacing(run.folder / SAMPLES_FILE) as path:
        figures.save_samples(path, samples, run.data.test.images[:PICTURED])
    reports = logs.read_log(run.folder / logs.FILE)
    with replacing(run.folder / CURVE_FILE) as path:
        figures.save_curve(path, reports, summary.baseline_test_bits_per_dim)
    return summary
