"""Checkpoints: written whole or not at all, and read without running anything that they hold."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inverse_flow import models
from inverse_flow.models import ImageFlow
from inverse_flow.training import dequantizer
from inverse_flow.training.config import TrainConfig

FILE = "checkpoint.pt"
FORMAT = 2


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes beside ``path`` and renames, so that an interruption leaves the former checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: the file, or the folder of its run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of this library, or of another version's format.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of format {FORMAT}")
    return content


def build(content: Mapping[str, Any]) -> ImageFlow:
    """The model of a checkpoint as it was before its training, with the layer of variational dequantization.

    Raises:
        ValueError: it is none that the trainer could have made.
    """
    model = models.build(content["model_description"])
    if not isinstance(model, ImageFlow):
        raise ValueError(f"the trainer trains flows on images, not {type(model).__name__}")
    dequantizer.attach(model, TrainConfig.from_dict(content["train_config"]))
    return model


def model_of(content: Mapping[str, Any]) -> ImageFlow:
    """The model of a checkpoint with its best weights, in evaluation mode."""
    model = build(content)
    best = content["best"]
    model.load_state_dict(content["averaged"] if best is None else best["weights"])
    return model.eval()
