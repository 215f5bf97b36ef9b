"""Checkpoints: what they hold, and the one place that knows how that is written and read.

A file is written whole or not at all, read without running anything that it holds, and checked against its checksums.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from inverse_flow import models
from inverse_flow.data import ImageData
from inverse_flow.data import load as load_data
from inverse_flow.data.load import EMBEDDED
from inverse_flow.models import ImageFlow
from inverse_flow.training import dequantization
from inverse_flow.training.config import TrainConfig
from inverse_flow.training.files import replacing

FILE = "checkpoint.pt"
FORMAT = 3

Weights: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelState:
    """A model.

    Attributes:
        description: what :func:`inverse_flow.models.build` makes the untrained model of.
        weights: its ``state_dict`` after the last step.
        averaged: that of its moving average.
    """

    description: Mapping[str, Any]
    weights: Weights
    averaged: Weights


@dataclass(frozen=True)
class DataSource:
    """Where the images of a run come from.

    Attributes:
        source: as :func:`inverse_flow.data.load` takes it; a path is absolute. None if it is not known.
        options: its other arguments.
        classes: of a model that is conditional on the labels; 0 for another.
        class_names: of label 0, 1, …; empty where the classes have none.
    """

    source: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 0
    class_names: tuple[str, ...] = ()

    def load(self) -> ImageData:
        """The images, as :func:`inverse_flow.data.load` finds them now.

        Raises:
            ValueError: the source is not known; as :func:`inverse_flow.data.load`.
        """
        if self.source is None:
            raise ValueError("this checkpoint does not say where its images come from: name them with --data")
        return load_data(self.source, **self.options)


@dataclass(frozen=True)
class Fingerprint:
    """What tells images with their contexts from others: their shape, (N, C, H, W), and a hash of all bytes."""

    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, images: Tensor, context: Tensor | None = None) -> Fingerprint:
        """That of images in the order in which they are given; about a second for a gigabyte."""
        found = blake2b(digest_size=16)
        for tensor in (images, context):
            if tensor is not None:
                found.update(tensor.detach().cpu().contiguous().numpy().data)
        return cls(tuple(images.shape), found.hexdigest())


@dataclass(frozen=True)
class Best:
    """The weights with the best validation so far: their bits per dimension there, and their step."""

    bits_per_dim: float
    step: int
    weights: Weights


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        seconds: time in training since the run began.
        method: state of the training method, such as that of its optimizers.
        random: of PyTorch's generator on the CPU, for layers that draw random numbers themselves.
        best: None before the first validation.
    """

    step: int
    seconds: float
    method: Mapping[str, Any]
    random: Tensor
    best: Best | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on.

    Attributes:
        model: description and weights.
        training: the settings.
        progress: how far the run has come.
        images: what it was trained on, validation images included; None in files of format 2.
        validation: (N,), bool: which of them are kept for validation; None in older files.
        data: where these came from; None for images that the trainer was given without a source.
        extra: plain values that the trainer was given to keep.
    """

    model: ModelState
    training: TrainConfig
    progress: Progress
    images: Fingerprint | None = None
    validation: Tensor | None = None
    data: DataSource | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def absolute(source: str | Path) -> str:
    """A data source that means the same from every directory."""
    if source in (EMBEDDED, ""):  # the empty text is no path, though it would become one
        return str(source)
    return os.path.abspath(source)  # noqa: PTH100  (keeps links as they are)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes beside ``path`` and renames, so that an interruption or a full disk leaves the former checkpoint.

    Raises:
        OSError: it cannot be written; names the file and the reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        torch.save(_to_plain(checkpoint), unfinished)


def load(path: str | Path) -> Checkpoint:
    """The checkpoint in a file, on the CPU.

    Args:
        path: the file, or the folder of its run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, no checkpoint of this library, or of a format that this version does not read.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: give the folder of a run that has one, or the file")
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            # PyTorch would take an entry with the mark of a folder for one, and leave its tensor unread.
            marked = [entry.filename for entry in archive.infolist() if entry.external_attr]
            changed = archive.testzip() or (marked[0] if marked else None)
            if changed is not None:
                raise zipfile.BadZipFile(f"{changed} in it is not what was written")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what readers make of damaged bytes has no bounds
            raise ValueError(
                f"{path} is damaged or no checkpoint: {(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in READERS:
        raise ValueError(
            f"{path} is no checkpoint of a format that is read here ({' and '.join(map(str, READERS))}), but of {found}"
        )
    try:
        return READERS[found](content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of format {found}: {error} does not belong there") from error


def build(checkpoint: Checkpoint) -> ImageFlow:
    """The model of a checkpoint as it was before its training, with the layer of variational dequantization.

    Raises:
        ValueError: it is none that the trainer could have made.
    """
    model = models.build(checkpoint.model.description)
    if not isinstance(model, ImageFlow):
        raise ValueError(f"the trainer trains flows on images, not {type(model).__name__}")
    dequantization.attach(model, checkpoint.training)
    return model


def model_of(checkpoint: Checkpoint) -> ImageFlow:
    """The model of a checkpoint with its best weights, in evaluation mode."""
    model, best = build(checkpoint), checkpoint.progress.best
    model.load_state_dict(checkpoint.model.averaged if best is None else best.weights)
    return model.eval()


def check_images(checkpoint: Checkpoint, images: Tensor, context: Tensor | None = None) -> Fingerprint:
    """Refuses images or contexts other than those that a run began with; returns their fingerprint.

    Raises:
        ValueError: saying how they differ.

    Warns:
        UserWarning: the checkpoint is of a format that does not know.
    """
    found, expected = Fingerprint.of(images, context), checkpoint.images
    if expected is None:
        warnings.warn(
            "this checkpoint was written before there were fingerprints of the images: nothing tells whether these are "
            "the ones that the run began with",
            stacklevel=3,
        )
        return found
    if found == expected:
        return found
    if found.shape != expected.shape:
        how = f"shape {_join(found.shape)} instead of {_join(expected.shape)}"
    else:
        how = f"as many of the same shape, {_join(found.shape)}, but with other pixels, labels or order"
    raise ValueError(f"these are not the images that the run began with: {how}")


def _to_plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Nothing but tensors and plain values, so that reading needs to trust nobody."""
    best, images, data = checkpoint.progress.best, checkpoint.images, checkpoint.data
    return {
        "format": FORMAT,
        "model": vars(checkpoint.model),
        "training": checkpoint.training.to_dict(),
        "progress": {**vars(checkpoint.progress), "best": best and vars(best)},
        "images": images and vars(images),
        "validation": checkpoint.validation,
        "data": data and {**vars(data), "options": dict(data.options)},
        "extra": dict(checkpoint.extra),
    }


def _from_format_3(content: Mapping[str, Any]) -> Checkpoint:
    best, images, data = content["progress"]["best"], content["images"], content["data"]
    return Checkpoint(
        ModelState(**content["model"]),
        TrainConfig.from_dict(content["training"]),
        Progress(**{**content["progress"], "best": best and Best(**best)}),
        images and Fingerprint(**images),
        content.get("validation"),
        data and DataSource(**data),
        content["extra"],
    )


def _from_format_2(content: Mapping[str, Any]) -> Checkpoint:
    """Before there was a fingerprint of the images; what is known of the data stood among the extra values."""
    extra, best = dict(content["extra"]), content["best"]
    data = None
    if "source" in extra:
        source, classes = extra.pop("source"), extra.pop("classes", 0)
        data = DataSource(source, {name: extra.pop(name) for name in ("size", "crop") if name in extra}, classes)
    return Checkpoint(
        ModelState(content["model_description"], content["model"], content["averaged"]),
        TrainConfig.from_dict(content["train_config"]),
        Progress(content["step"], content["seconds"], content["method"], content["rng"], best and Best(**best)),
        data=data,
        extra=extra,
    )


READERS = {2: _from_format_2, 3: _from_format_3}


def _join(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
