"""The subcommands of ``inverse-flow``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

import inverse_flow
from inverse_flow.cli import format_info
from inverse_flow.data import load
from inverse_flow.data.load import SOURCES
from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.models import InverseFlow
from inverse_flow.training import Stop, TrainConfig, checkpoint, figures
from inverse_flow.training import run as runs
from inverse_flow.training.progress import TrainingProgress
from inverse_flow.training.report import Summary, summarize

# Conventional exit status of a program ended by Ctrl-C.
INTERRUPTED_STATUS = 130

# The options that a resumed run may change; all the others come from its checkpoint.
CHANGEABLE = ("minutes", "steps")

# \b keeps click from reflowing the lines that follow it.
EXAMPLES = {
    "cli": """\b
A first run, about four minutes on two cores:
  inverse-flow train --out demo
  inverse-flow sample demo --out more.png --temperature 0.8
  inverse-flow evaluate demo
""",
    "train": """\b
Examples:
  inverse-flow train --out demo
  inverse-flow train --out demo --resume --minutes 10
  inverse-flow train --data MNIST/raw --out mnist --no-flip --validation 5000 --depth 16 \\
      --learning-rate 1e-3 --minutes 600
  inverse-flow train --data cifar-10-python.tar.gz --out cifar --depth 16 --hidden 256 \\
      --no-logit --learning-rate 1e-3 --minutes 600 --device cuda
""",
    "sample": """\b
Examples:
  inverse-flow sample demo
  inverse-flow sample demo --count 16 --temperature 0.7 --seed 3 --out cool.png
""",
    "evaluate": """\b
Examples:
  inverse-flow evaluate demo
  inverse-flow evaluate demo --json > figures.json
""",
}

console = Console()


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES["cli"])
@click.version_option(inverse_flow.__version__, prog_name="inverse-flow")
def cli() -> None:
    """Train, sample and evaluate normalizing flows built on the inverse of a convolution."""


def usable_device(context: click.Context, parameter: click.Parameter, name: str) -> str:
    """Refuses a device that PyTorch does not know or this machine does not have."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"PyTorch cannot compute on {name!r} here: {reason}") from error
    return name


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every subcommand that computes."""
    for option in (
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            callback=usable_device,
            help="Where to compute: cpu, cuda, cuda:1, …",
        ),
        click.option("--threads", type=click.IntRange(1), help="CPU threads to use.  [default: PyTorch's choice]"),
    ):
        command = option(command)
    return command


@cli.command(epilog=EXAMPLES["train"], short_help="Train a flow, measure it, draw samples.")
@click.option("--data", "source", default="embedded", show_default=True, help=f"Images to train on: {SOURCES}.")
@click.option(
    "--out", "folder", type=click.Path(file_okay=False, path_type=Path), default="run", show_default=True,
    help="Folder of the run: checkpoint.pt, log.csv, summary.json, samples.png, curve.png.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@click.option("--fresh", is_flag=True, help="Start again, replacing the checkpoint in --out.")
@click.option("--minutes", type=click.FloatRange(0), default=3.5, show_default=True, help="End after this long …")
@click.option("--steps", type=click.IntRange(0), default=100_000, show_default=True, help="… or after this many steps.")
@click.option("--levels", type=click.IntRange(1), default=2, show_default=True, help="Scales of the flow, L.")
@click.option("--depth", type=click.IntRange(1), default=4, show_default=True, help="Flow steps in a level, K.")
@click.option("--hidden", type=click.IntRange(1), default=64, show_default=True, help="Width of the coupling networks.")
@click.option(
    "--kernel-size", type=click.IntRange(1), default=3, show_default=True, help="Of the inverse convolutions."
)
@click.option(
    "--orders", type=click.Choice(["four", "alternating"]), default="four", show_default=True,
    help="four: a group of channels for each order in every layer; alternating: one order a layer.",
)  # fmt: skip
@click.option(
    "--coupling",
    type=click.Choice(["affine", "additive"]),
    default="affine",
    show_default=True,
    help="Kind of coupling.",
)
@click.option(
    "--logit/--no-logit", default=True, show_default=True, help="Begin with a logit, which spreads out dark and bright."
)
@click.option("--batch-size", type=click.IntRange(1), default=50, show_default=True, help="Images in a step.")
@click.option(
    "--learning-rate",
    type=float,
    default=1e-2,
    show_default=True,
    help="Of Adam, after the warm-up; less for more depth.",
)
@click.option(
    "--flip/--no-flip", default=True, show_default=True, help="Mirror training images at random (not for digits)."
)
@click.option(
    "--bits", "bit_depth", type=click.IntRange(1, 8), default=8, show_default=True, help="Bits of a colour value."
)
@click.option(
    "--validation", type=click.IntRange(0), default=100, show_default=True,
    help="Training images set aside to choose the best weights.",
)  # fmt: skip
@click.option(
    "--evaluate-every", type=click.IntRange(1), default=50, show_default=True, help="Steps between checkpoints."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, data order and noise.")
@common_options
def train(
    source: str,
    folder: Path,
    resume: bool,
    fresh: bool,
    device: str,
    threads: int | None,
    **options: Any,
) -> None:
    """Train an Inverse-Flow, measure it on the held-out images and draw samples.

    Ctrl-C ends the training after the current step and keeps the checkpoint. The defaults are the demo: a small model
    on 1,000 images of Fashion-MNIST.
    """
    use_threads(threads)
    exists = (folder / checkpoint.FILE).is_file()
    if resume and fresh:
        raise click.UsageError("--resume goes on and --fresh starts again: give one of them")
    if exists and not (resume or fresh):
        raise click.UsageError(f"{folder / checkpoint.FILE} exists: --resume goes on from it, --fresh replaces it")
    with plain_errors():
        if resume:
            content = checkpoint.load(folder)
            changes = resume_changes(content, {**options, "source": source})
            run = runs.resume(content, folder, device, **changes)
            console.print(f"resumed at step {run.trainer.step}, {run.trainer.seconds:.0f} s into the run")
        else:
            run = runs.start(source, folder, train_config(options), model_options(options), device)
        describe(run)
        with TrainingProgress(run.trainer.config, console) as progress:
            stop = run.trainer.fit(progress)
    if stop is Stop.INTERRUPTED:
        console.print(f"\nInterrupted at step {run.trainer.step}; the checkpoint is kept. To go on:")
        console.print(f"  inverse-flow train --out {folder} --resume", highlight=False, soft_wrap=True)
        sys.exit(INTERRUPTED_STATUS)
    summary = runs.finish(run, console.print)
    print_table(summary, f"after {run.trainer.step} steps in {run.trainer.seconds:.0f} s")
    names = (runs.SAMPLES_FILE, runs.CURVE_FILE, runs.SUMMARY_FILE, checkpoint.FILE)
    console.print(f"in {folder}: {', '.join(names)}", highlight=False, soft_wrap=True)


@cli.command(epilog=EXAMPLES["sample"], short_help="Draw samples from a trained flow.")
@click.argument("source", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="samples.png", show_default=True,
              help="Picture to write.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Number of samples.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True,
              help="Scales the latents: below 1, likelier and less varied samples.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the latents.")
@common_options
def sample(
    source: Path, out: Path, count: int, temperature: float, seed: int, device: str, threads: int | None
) -> None:
    """Draw samples from the model of RUN, a run's folder or its checkpoint."""
    use_threads(threads)
    with plain_errors():
        model = checkpoint.model_of(checkpoint.load(source)).to(device)
        samples = model.sample(count, temperature=temperature, generator=runs.sample_generator(model, seed))
        title = "samples" if temperature == 1 else f"samples, temperature {temperature:g}"
        figures.save_samples(out, figures.to_uint8(samples), title=title)
    console.print(f"{count} samples in {out}", highlight=False, soft_wrap=True)


@cli.command(epilog=EXAMPLES["evaluate"], short_help="Measure a trained flow beside the baseline.")
@click.argument("source", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--data", "data_source", help=f"{SOURCES}.  [default: the data that RUN was trained on]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@common_options
def evaluate(source: Path, data_source: str | None, as_json: bool, device: str, threads: int | None) -> None:
    """Measure the model of RUN, a run's folder or its checkpoint: bits per dimension beside the baseline, and times."""
    use_threads(threads)
    with plain_errors():
        content = checkpoint.load(source)
        model: InverseFlow = checkpoint.model_of(content).to(device)
        data = load(data_source or content["extra"]["source"])
        summary = summarize(model, data, content["train_config"]["bit_depth"])
    if as_json:
        click.echo(json.dumps({**summary.to_dict(), "data": data.name}, indent=2))
    else:
        print_table(summary, f"{source} on {data.name}")


@cli.command(short_help="Print versions and what this build can do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def info(as_json: bool) -> None:
    """Print versions, the CPU instruction set in use, the CUDA architectures, and why CUDA is absent."""
    click.echo(json.dumps(inverse_flow.build_info(), indent=2) if as_json else format_info())


def model_options(options: dict[str, Any]) -> dict[str, Any]:
    """The command line's options that describe the model."""
    names = ("levels", "hidden", "kernel_size", "orders", "coupling")
    logit_margin = DEFAULT_MARGIN if options["logit"] else None
    chosen = {name: options[name] for name in names}
    return {"steps": options["depth"], "logit_margin": logit_margin, **chosen}


def train_config(options: dict[str, Any]) -> TrainConfig:
    """The command line's options that describe the training."""
    names = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in options.items() if name in names})


def options_of(content: dict[str, Any]) -> dict[str, Any]:
    """The command line's options as a checkpoint holds them."""
    config = content["model_description"]["config"]
    model = {name: config[name] for name in ("levels", "hidden", "kernel_size", "orders", "coupling")}
    model |= {"depth": config["steps"], "logit": config["logit_margin"] is not None}
    return {**content["train_config"], **model, "source": content["extra"]["source"]}


def resume_changes(content: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What the command line changes in a resumed run; a change that would make it another run is refused."""
    context = click.get_current_context()
    before = options_of(content)
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    changed = [name for name in given if options[name] != before[name]]
    fixed = [name for name in changed if name not in CHANGEABLE]
    if fixed:
        flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        kept = ", ".join(f"{flags[name]} is {before[name]}" for name in fixed)
        raise click.UsageError(f"a resumed run keeps the settings of its checkpoint: {kept}")
    return {name: options[name] for name in changed}


def describe(run: runs.Run) -> None:
    """Says what is about to be trained, on what."""
    trainer = run.trainer
    config = trainer.model.config
    console.print(
        f"{run.data.name}: {len(trainer.batches.images)} training, {len(trainer.validation_images)} validation and "
        f"{len(run.data.test)} test images of shape {config.image_shape}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(
        f"Inverse-Flow: {config.levels} levels of {config.steps} steps, {trainer.model.num_parameters:,} parameters",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def print_table(summary: Summary, title: str) -> None:
    """The closing table."""
    table = Table(title=title, show_header=False, caption=f"on {summary.hardware}")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in summary.rows():
        table.add_row(name, value)
    console.print(table)


def use_threads(threads: int | None) -> None:
    """Limits PyTorch's threads, if the command line does."""
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that the user can mend are told in a line, without a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
