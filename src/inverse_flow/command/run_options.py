"""The options of ``inverse-flow train``, and how they become configurations and come back from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from inverse_flow.command import demo
from inverse_flow.command.options import CommandT, ConfigOptions
from inverse_flow.data.load import EMBEDDED, SOURCES
from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.models import KINDS, FlowConfig
from inverse_flow.parts import PartsConfig, parse_parts
from inverse_flow.training import TrainConfig, checkpoint
from inverse_flow.training import run as runs
from inverse_flow.training.checkpoint import Checkpoint

# Arguments of ``inverse_flow.data.load`` with their defaults; the options have the same names.
READING: dict[str, Any] = {"size": None, "crop": False, "skip_bad_images": False}
# A resumed run keeps what is not among these. Its data may lie elsewhere: whether they are the same is seen then.
CHANGEABLE = ("minutes", "steps", "source")


KIND = "InverseFlow"


class PartsType(click.ParamType[str]):
    """A text such as "across:2"."""

    name = "CUT:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_parts(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


MODEL = ConfigOptions(
    FlowConfig,
    # The data decide the first two, --logit the third.
    leave_out=("image_shape", "context_channels", "logit_margin"),
    spelled={"steps": "depth"},
    alike={name: kind.config_type for name, kind in KINDS.items()},
)
TRAINING = ConfigOptions(
    TrainConfig,
    leave_out=("parts",),
    spelled={"bit_depth": "bits"},
    demo={name: value for name, value in vars(demo.TRAINING).items() if value != getattr(TrainConfig(), name)},
)
PARTS = ConfigOptions(PartsConfig, leave_out=("cut", "count"), spelled={"learning_rates": "part_rate"})

OPTIONS = (
    click.option("--data", "source", help=f"Images to train on: {SOURCES}.  [default: {EMBEDDED}, which is the demo]"),
    click.option("--image-size", "size", type=click.IntRange(1),
                 help="Resize the images of a folder to squares of this height and width."),
    click.option("--crop/--no-crop", default=None,
                 help="Cut a centred square out of each image of a folder before it is resized.  [default: no]"),
    click.option("--skip-bad-images/--no-skip-bad-images", default=None,
                 help="Leave out the images of a folder that cannot be read, instead of stopping.  [default: no]"),
    click.option("--conditional/--no-conditional", default=None,
                 help="Condition the model on the class labels.  [default: no]"),
    click.option("--model", "kind", type=click.Choice(list(KINDS)), default=None,
                 help=f"Kind of flow.  [default: {KIND}]"),
    MODEL,
    click.option("--logit/--no-logit", default=None,
                 help="Begin with a logit, which spreads out dark and bright.  [default: no; yes in the demo]"),
    TRAINING,
    click.option("--parts", type=PartsType(), help="Train by parts: blocks:N or across:N.  [default: end to end]"),
    PARTS,
)  # fmt: skip


def run_options(command: CommandT) -> CommandT:
    """Every option that decides what a run gives; a decorator."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def source_of(options: Mapping[str, Any]) -> str:
    """The data to train on."""
    return EMBEDDED if options["source"] is None else str(options["source"])


def reading_of(options: Mapping[str, Any], training: TrainConfig) -> dict[str, Any]:
    """How the data are read, as arguments of ``inverse_flow.data.load``; the run's seed holds test images out."""
    given = {name: options[name] for name in READING if options[name] is not None}
    return {**READING, **given, "seed": training.seed}


def training_of(options: Mapping[str, Any]) -> TrainConfig:
    """How to train: the defaults, or the demo's, with what was given."""
    start = demo.TRAINING if source_of(options) == EMBEDDED else TrainConfig()
    return replace(start, **TRAINING.given(options), parts=_parts_of(options))


def model_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What describes the model, the demo's values included; what was not given is left to the kind of model."""
    chosen = dict(demo.MODEL) if source_of(options) == EMBEDDED else {}
    if options["logit"] is not None:
        chosen["logit_margin"] = DEFAULT_MARGIN if options["logit"] else None
    return {**chosen, **MODEL.given(options)}


def changes_of(options: Mapping[str, Any], content: Checkpoint) -> dict[str, Any]:
    """What the options change in the settings of a checkpoint.

    Raises:
        click.UsageError: an option that would make it another run, by its name.
    """
    before = _told(content)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    changed = {name: value for name, value in given.items() if value != before[name]}
    fixed = [name for name in changed if name not in CHANGEABLE]
    if fixed:
        kept = ", ".join(f"{_flag(name)} is {before[name]}" for name in fixed)
        raise click.UsageError(f"a resumed run keeps the settings of its checkpoint: {kept}")
    return {name: value for name, value in changed.items() if name != "source"}


def _told(content: Checkpoint) -> dict[str, Any]:
    """The options that a checkpoint's run was started with."""
    model, data = checkpoint.build(content), runs.source_of(content)
    config = vars(model.config)  # with the defaults of what a checkpoint of an older version does not say
    parts = content.training.parts
    assert parts is None or isinstance(parts, PartsConfig)
    return {
        **TRAINING.told(vars(content.training)),
        **MODEL.told(config),
        "kind": type(model).__name__,
        "logit": config["logit_margin"] is not None,
        **PARTS.told(vars(parts or PartsConfig())),
        "parts": f"{parts.cut}:{parts.count}" if parts else None,
        **{name: data.options.get(name, default) for name, default in READING.items()},
        "source": data.source,
        "conditional": data.classes > 0,
    }


def _flag(name: str) -> str:
    """How an option is written."""
    named = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    return named[name]


def _parts_of(options: Mapping[str, Any]) -> PartsConfig | None:
    given = PARTS.given(options)
    if options["parts"] is None:
        if given:
            raise click.UsageError(f"only --parts have {', '.join(_flag(PARTS.names[name]) for name in given)}")
        return None
    cut, count = parse_parts(options["parts"])
    return PartsConfig(cut=cut, count=count, **given)
