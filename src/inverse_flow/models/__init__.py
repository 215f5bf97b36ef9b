"""Complete flows, each described by one frozen config that a checkpoint can carry. See docs/models.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from inverse_flow.models.classifier import InverseConvClassifier
from inverse_flow.models.conditional import (
    ConditionalConfig,
    ConditionalFlow,
    LabelConfig,
    LabelContext,
    SummaryConfig,
    SummaryNet,
)
from inverse_flow.models.config import (
    FInCFlowConfig,
    FlowConfig,
    GlowConfig,
    HintConfig,
    InverseFlowConfig,
    RealNVPConfig,
)
from inverse_flow.models.flows import KINDS, FInCFlow, Glow, Hint, ImageFlow, InverseFlow, RealNVP
from inverse_flow.models.loop import LoopNetwork

__all__ = [
    "KINDS",
    "ConditionalConfig",
    "ConditionalFlow",
    "FInCFlow",
    "FInCFlowConfig",
    "FlowConfig",
    "Glow",
    "GlowConfig",
    "Hint",
    "HintConfig",
    "ImageFlow",
    "InverseConvClassifier",
    "InverseFlow",
    "InverseFlowConfig",
    "LabelConfig",
    "LabelContext",
    "LoopNetwork",
    "Model",
    "RealNVP",
    "RealNVPConfig",
    "SummaryConfig",
    "SummaryNet",
    "build",
    "describe",
    "load",
]


Model: TypeAlias = ImageFlow | ConditionalFlow
"""What can be described, saved and built again."""


def describe(model: Model) -> dict[str, Any]:
    """What :func:`build` needs to make an untrained copy of ``model``, in plain values."""
    return {"kind": type(model).__name__, "config": model.config.to_dict()}


def build(description: Mapping[str, Any]) -> Model:
    """The model that :func:`describe` described.

    Raises:
        ValueError: a kind of model that does not exist; as its config.
    """
    kind = description["kind"]
    if kind == ConditionalFlow.__name__:
        return ConditionalFlow.from_config(ConditionalConfig.from_dict(description["config"]))
    if kind not in KINDS:
        raise ValueError(f"unknown kind of model {kind!r}; known: {', '.join([*KINDS, ConditionalFlow.__name__])}")
    return KINDS[kind].from_config(KINDS[kind].config_type.from_dict(description["config"]))


def load(path: str | Path, device: torch.device | str = "cpu") -> ImageFlow:
    """The trained flow of a run: the weights with the best validation, in evaluation mode.

    Args:
        path: the run's folder, or its checkpoint.
        device: where the flow is to be.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged, or no checkpoint that this version reads.
    """
    # Only here: what trains stands above the models, which are used without it.
    from inverse_flow.training import checkpoint

    return checkpoint.model_of(checkpoint.load(path)).to(device)
