"""The options of ``inverse-flow train``, and how they become configurations and come back from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import click

from inverse_flow.data.load import SOURCES
from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.models import KINDS
from inverse_flow.parts.config import SCHEDULES, TURNS, PartsConfig, parse_parts
from inverse_flow.training import Checkpoint, TrainConfig
from inverse_flow.training.run import source_of

# The options of the model that are fields of its configuration, under the same name.
MODEL_FIELDS = ("levels", "hidden", "kernel_size", "orders", "coupling", "inverse_conv", "activation")
# Of the training by parts.
PARTS_FIELDS = ("schedule", "turn", "finish", "learning_rates", "cache_epochs")


class PartsType(click.ParamType[str]):
    """A text such as "across:2"."""

    name = "CUT:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_parts(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


DATA = (
    click.option("--data", "source", default="embedded", show_default=True, help=f"Images to train on: {SOURCES}."),
    click.option("--image-size", "size", type=click.IntRange(1), help="Resize the images of a folder to squares."),
    click.option("--crop/--no-crop", default=False, help="Cut squares out of them before."),
    click.option("--conditional/--no-conditional", default=False, help="Condition the model on the class labels."),
)

MODEL = (
    click.option("--model", "kind", type=click.Choice(list(KINDS)), default="InverseFlow", show_default=True,
                 help="Kind of flow."),
    click.option("--levels", type=click.IntRange(1), default=2, show_default=True, help="Scales of the flow, L."),
    click.option("--depth", type=click.IntRange(1), default=4, show_default=True, help="Flow steps in a level, K."),
    click.option("--hidden", type=click.IntRange(1), default=64, show_default=True,
                 help="Width of the coupling networks."),
    click.option("--kernel-size", type=click.IntRange(1), default=3, show_default=True,
                 help="Of the inverse convolutions."),
    click.option("--orders", type=click.Choice(["four", "alternating"]),
                 help="four: a group of channels for each order in every layer; alternating: one order a layer.  "
                 "[default: the model's; four for InverseFlow]"),
    click.option("--coupling", type=click.Choice(["affine", "additive", "spline", "hint"]),
                 help="Kind of coupling.  [default: the model's; affine for InverseFlow]"),
    click.option("--inverse-conv", type=click.Choice(["training", "sampling", "none"]),
                 help="Direction in which the inverse convolutions solve.  [default: the model's]"),
    click.option("--activation", type=click.Choice(["none", "spline"]),
                 help="Behind the inverse convolutions.  [default: the model's]"),
    click.option("--logit/--no-logit", default=True, show_default=True,
                 help="Begin with a logit, which spreads out dark and bright."),
    click.option("--memory-efficient/--no-memory-efficient", default=False, show_default=True,
                 help="Rebuild activations in the backward pass instead of storing them."),
)  # fmt: skip

TRAINING = (
    click.option("--minutes", type=click.FloatRange(0), default=3.5, show_default=True, help="End after this long …"),
    click.option("--steps", type=click.IntRange(0), default=100_000, show_default=True,
                 help="… or after this many steps."),
    click.option("--patience", type=click.IntRange(1),
                 help="… or when this many evaluations have brought no better validation."),
    click.option("--batch-size", type=click.IntRange(1), default=50, show_default=True,
                 help="Images in a step, over all processes."),
    click.option("--optimizer", type=click.Choice(["adam", "adamax"]), default="adam", show_default=True,
                 help="Rule that turns gradients into steps."),
    click.option("--learning-rate", type=float, default=1e-2, show_default=True,
                 help="After the warm-up; less for more depth."),
    click.option("--warmup-steps", type=click.IntRange(0), default=TrainConfig.warmup_steps, show_default=True,
                 help="Of linear growth of the learning rate."),
    click.option("--decay-at", type=float, multiple=True,
                 help="Where the learning rate falls: a share of the run below 1, or a step. May be given repeatedly."),
    click.option("--decay-factor", type=float, default=TrainConfig.decay_factor, show_default=True,
                 help="What it is multiplied by there."),
    click.option("--max-grad-norm", type=float, default=TrainConfig.max_grad_norm, show_default=True,
                 help="Norm that gradients are clipped to."),
    click.option("--average-decay", type=float, default=TrainConfig.average_decay, show_default=True,
                 help="Of the moving average of the weights; 0 for none."),
    click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True,
                 help="Of the coupling networks; solves and log-determinants are float32."),
    click.option("--flip/--no-flip", default=True, show_default=True,
                 help="Mirror training images at random (not for digits)."),
    click.option("--bits", "bit_depth", type=click.IntRange(1, 8), default=8, show_default=True,
                 help="Bits of a colour value."),
    click.option("--dequantization", type=click.Choice(["uniform", "variational"]), default="uniform",
                 show_default=True, help="Noise within a colour value: uniform, or learnt."),
    click.option("--validation", type=click.IntRange(0), default=100, show_default=True,
                 help="Training images set aside to choose the best weights."),
    click.option("--evaluate-every", type=click.IntRange(1), default=50, show_default=True,
                 help="Steps between checkpoints."),
    click.option("--max-inverse-error", type=float, default=TrainConfig.max_inverse_error, show_default=True,
                 help="Stop when a layer misses its own input by this share of it."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                 help="Of weights, data order and noise."),
)  # fmt: skip

PARTS = (
    click.option("--parts", type=PartsType(), help="Train by parts: blocks:N or across:N.  [default: end to end]"),
    click.option("--schedule", type=click.Choice(SCHEDULES), default=PartsConfig.schedule, show_default=True,
                 help="Whose turn it is."),
    click.option("--turn", type=click.Choice(TURNS), default=PartsConfig.turn, show_default=True,
                 help="Length of a turn when they alternate."),
    click.option("--finish", type=click.FloatRange(0, 1), default=PartsConfig.finish, show_default="1/3",
                 help="Share of the run at its end in which all parts are trained together."),
    click.option("--part-rate", "learning_rates", type=float, multiple=True,
                 help="Learning rate of a part; given once for each.  [default: --learning-rate]"),
    click.option("--cache-epochs", type=click.IntRange(0), default=PartsConfig.cache_epochs, show_default=True,
                 help="Epochs for which outputs of finished parts are kept."),
)  # fmt: skip


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Every option that decides what a run gives."""
    for option in reversed((*DATA, *MODEL, *TRAINING, *PARTS)):
        command = option(command)
    return command


def model_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The command line's options that describe the model; what was not given is left to the model."""
    given = {name: options[name] for name in MODEL_FIELDS if options[name] is not None}
    logit_margin = DEFAULT_MARGIN if options["logit"] else None
    return {
        "steps": options["depth"],
        "logit_margin": logit_margin,
        "memory_efficient": options["memory_efficient"],
        **given,
    }


def train_config(options: Mapping[str, Any]) -> TrainConfig:
    """The command line's options that describe the training."""
    names = {field.name for field in fields(TrainConfig)} - {"parts"}
    chosen = {name: value for name, value in options.items() if name in names}
    return TrainConfig(**chosen, parts=_parts_config(options))


def options_of(content: Checkpoint) -> dict[str, Any]:
    """The command line's options as a checkpoint holds them."""
    description, data, training = content.model.description, source_of(content), content.training.to_dict()
    config = description["config"]
    parts = training.pop("parts")
    model = {name: config[name] for name in (*MODEL_FIELDS, "memory_efficient")}
    by_parts = {name: parts[name] if parts else getattr(PartsConfig, name) for name in PARTS_FIELDS}
    return {
        **training,
        "decay_at": tuple(training["decay_at"]),
        **model,
        "kind": description["kind"],
        "depth": config["steps"],
        "logit": config["logit_margin"] is not None,
        **by_parts,
        "parts": f"{parts['cut']}:{parts['count']}" if parts else None,
        "source": data.source,
        "size": data.options.get("size"),
        "crop": data.options.get("crop", False),
        "conditional": data.classes > 0,
    }


def _parts_config(options: Mapping[str, Any]) -> PartsConfig | None:
    if options["parts"] is None:
        return None
    cut, count = parse_parts(options["parts"])
    return PartsConfig(cut=cut, count=count, **{name: options[name] for name in PARTS_FIELDS})
