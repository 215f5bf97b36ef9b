"""The subcommands of ``inverse-flow``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

import inverse_flow
from inverse_flow.command.main import TRAIN_EXTRA, format_info, missing_extra
from inverse_flow.command.options import model_options, options_of, run_options, train_config
from inverse_flow.data.load import SOURCES
from inverse_flow.models import InverseFlow
from inverse_flow.parts import fit_parts
from inverse_flow.training import Checkpoint, Stop, checkpoint, figures
from inverse_flow.training import run as runs
from inverse_flow.training.log import StepReport, TensorBoardLog
from inverse_flow.training.progress import TrainingProgress
from inverse_flow.training.samples import NPZ, SampleGrids, draw, save_npz
from inverse_flow.training.summary import Summary, summarize
from inverse_flow.training.workers import Workers, connect

# Conventional exit status of a program ended by Ctrl-C.
INTERRUPTED_STATUS = 130

# The options that a resumed run may change; all the others come from its checkpoint.
CHANGEABLE = ("minutes", "steps", "source")

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
  torchrun --nproc-per-node 2 -m inverse_flow train --data MNIST/raw --out mnist --no-flip
""",
    "sample": """\b
Examples:
  inverse-flow sample demo
  inverse-flow sample demo --count 16 --temperature 0.7 --seed 3 --out cool.png
  inverse-flow sample demo --count 1000 --out samples.npz
""",
    "evaluate": """\b
Examples:
  inverse-flow evaluate demo
  inverse-flow evaluate demo --importance-samples 100 --json > figures.json
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
@click.option(
    "--out", "folder", type=click.Path(file_okay=False, path_type=Path), default="run", show_default=True,
    help="Folder of the run: checkpoint.pt, log.csv, summary.json, samples.png, curve.png.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@click.option("--fresh", is_flag=True, help="Start again, replacing the checkpoint in --out.")
@run_options
@click.option("--tensorboard", is_flag=True, help="Write the log for TensorBoard too.")
@click.option("--sample-every", type=click.IntRange(1), help="Steps between two pictures of samples, in samples/.")
@click.option("--part-per-process", is_flag=True, help="Under torchrun: each process trains one of the --parts.")
@common_options
def train(
    folder: Path,
    resume: bool,
    fresh: bool,
    part_per_process: bool,
    tensorboard: bool,
    sample_every: int | None,
    device: str,
    threads: int | None,
    **options: Any,
) -> None:
    """Train a flow, measure it on the held-out images and draw samples.

    Ctrl-C ends the training after the current step and keeps the checkpoint. The defaults are the demo: a small model
    on 1,000 images of Fashion-MNIST. Under torchrun, all its processes train one model.
    """
    use_threads(threads)
    exists = (folder / checkpoint.FILE).is_file()
    if resume and fresh:
        raise click.UsageError("--resume goes on and --fresh starts again: give one of them")
    if exists and not (resume or fresh):
        raise click.UsageError(f"{folder / checkpoint.FILE} exists: --resume goes on from it, --fresh replaces it")
    with plain_errors(), connect(device) as (processes, own_device), quiet(not processes.first):
        # Processes that each train a part do not share the batches.
        workers = Workers() if part_per_process else processes
        if part_per_process:
            unlimited_time(options)
        if resume:
            content = checkpoint.load(folder)
            changes = resume_changes(content, options)
            run = runs.resume(content, folder, own_device, workers=workers, **changes)
            console.print(f"resumed at step {run.trainer.step}, {run.trainer.seconds:.0f} s into the run")
        else:
            places = {name: options[name] for name in ("kind", "conditional", "size", "crop")}
            training, model = train_config(options), model_options(options)
            run = runs.start(options["source"], folder, training, model, own_device, workers=workers, **places)
        describe(run)
        if part_per_process:
            fit_parts(run.trainer)
            if not processes.first:
                return
        with TrainingProgress(run.trainer.config, console) as progress, ExitStack() as open_logs:
            watching: list[Callable[[StepReport], None]] = [progress]
            if workers.first:
                watching += observers(run, tensorboard, sample_every, open_logs)
            stop = run.trainer.fit(*watching)
    if stop is Stop.INTERRUPTED:
        if workers.first:
            console.print(f"\nInterrupted at step {run.trainer.step}; the checkpoint is kept. To go on:")
            console.print(f"  inverse-flow train --out {folder} --resume", highlight=False, soft_wrap=True)
        sys.exit(INTERRUPTED_STATUS)
    if not workers.first:
        return
    summary = runs.finish(run, console.print)
    print_table(summary, f"after {run.trainer.step} steps in {run.trainer.seconds:.0f} s")
    names = (runs.SAMPLES_FILE, runs.CURVE_FILE, runs.SUMMARY_FILE, checkpoint.FILE)
    console.print(f"in {folder}: {', '.join(names)}", highlight=False, soft_wrap=True)


@cli.command(epilog=EXAMPLES["sample"], short_help="Draw samples from a trained flow.")
@click.argument("source", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="samples.png", show_default=True,
              help="Picture, or npz file with samples, log-densities and labels, to write.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Number of samples.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True,
              help="Scales the latents: below 1, likelier and less varied samples.")  # fmt: skip
@click.option("--label", type=click.IntRange(0), help="Class of all the samples.  [default: the classes in turn]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the latents.")
@common_options
def sample(
    source: Path,
    out: Path,
    count: int,
    temperature: float,
    label: int | None,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Draw samples from the model of RUN, a run's folder or its checkpoint."""
    use_threads(threads)
    with plain_errors():
        content = checkpoint.load(source)
        model, classes = checkpoint.model_of(content).to(device), runs.source_of(content).classes
        drawn = draw(model, count, seed, classes=classes, label=label, temperature=temperature)
        if out.suffix == NPZ:
            save_npz(out, drawn)
        else:
            title = "samples" if temperature == 1 else f"samples, temperature {temperature:g}"
            figures.save_samples(out, figures.to_uint8(drawn.images), title=title)
    console.print(f"{count} samples in {out}", highlight=False, soft_wrap=True)


@cli.command(epilog=EXAMPLES["evaluate"], short_help="Measure a trained flow beside the baseline.")
@click.argument("source", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--data", "data_source", help=f"{SOURCES}.  [default: the data that RUN was trained on]")
@click.option("--importance-samples", type=click.IntRange(0), default=10, show_default=True,
              help="Draws of noise for the importance-weighted bound; 0 for none.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@common_options
def evaluate(
    source: Path,
    data_source: str | None,
    importance_samples: int,
    as_json: bool,
    device: str,
    threads: int | None,
) -> None:
    """Measure the model of RUN, a run's folder or its checkpoint: bits per dimension beside the baseline, and times."""
    use_threads(threads)
    with plain_errors():
        content = checkpoint.load(source)
        model = checkpoint.model_of(content).to(device)
        data = runs.data_of(content, data_source)
        classes = runs.source_of(content).classes
        summary = summarize(model, data, content.training, classes=classes, importance_samples=importance_samples)
    if as_json:
        click.echo(json.dumps({**summary.to_dict(), "data": data.name}, indent=2))
    else:
        print_table(summary, f"{source} on {data.name}")


@cli.command(short_help="Print versions and what this build can do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def info(as_json: bool) -> None:
    """Print versions, the CPU instruction set in use, the CUDA architectures, and why CUDA is absent."""
    click.echo(json.dumps(inverse_flow.build_info(), indent=2) if as_json else format_info())


def resume_changes(content: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
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


def unlimited_time(options: dict[str, Any]) -> None:
    """Takes the limit of time away, which parts in several processes cannot agree on."""
    if click.get_current_context().get_parameter_source("minutes") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--part-per-process is limited by --steps, not by --minutes")
    options["minutes"] = None


def describe(run: runs.Run) -> None:
    """Says what is about to be trained, on what."""
    trainer = run.trainer
    model, config = trainer.model, trainer.model.config
    console.print(
        f"{run.data.name}: {len(trainer.batches.images)} training, {len(trainer.validation_images)} validation and "
        f"{len(run.data.test)} test images of shape {config.image_shape}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    name = "Inverse-Flow" if isinstance(model, InverseFlow) else type(model).__name__
    classes = f", conditional on {run.classes} classes" if run.classes else ""
    processes = f", {trainer.workers.count} processes" if trainer.workers.count > 1 else ""
    console.print(
        f"{name}: {config.levels} levels of {config.steps} steps, {model.num_parameters:,} parameters"
        f"{classes}{processes}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def observers(
    run: runs.Run, tensorboard: bool, sample_every: int | None, open_logs: ExitStack
) -> list[Callable[[StepReport], None]]:
    """What else is written of every step."""
    found: list[Callable[[StepReport], None]] = []
    board = None
    if tensorboard:
        board = open_logs.enter_context(closing(TensorBoardLog(run.folder, run.trainer.step)))
        found.append(board)
    if sample_every:
        found.append(SampleGrids(run.trainer, run.folder, sample_every, board))
    return found


def print_table(summary: Summary, title: str) -> None:
    """The closing table."""
    table = Table(title=title, show_header=False, caption=f"bits/dim: {summary.protocol}; on {summary.hardware}")
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
def quiet(silent: bool) -> Iterator[None]:
    """Nothing is printed within it, if ``silent``: one process of several speaks for all."""
    before, console.quiet = console.quiet, silent
    try:
        yield
    finally:
        console.quiet = before


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that the user can mend are told in a line, without a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAIN_EXTRA:
            raise
        raise click.ClickException(missing_extra(error)) from error
    except (ValueError, OSError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
