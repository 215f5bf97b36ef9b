"""The subcommands of ``inverse-flow``."""

from __future__ import annotations

import errno
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.backend_bases import FigureCanvasBase

import inverse_flow
from inverse_flow.command import INTERRUPTED_STATUS
from inverse_flow.command.console import console, describe, notes, print_quality, print_table, quiet
from inverse_flow.command.errors import plain_errors
from inverse_flow.command.info import format_info
from inverse_flow.command.run_options import (
    KIND,
    changes_of,
    model_of,
    reading_of,
    run_options,
    source_of,
    training_of,
)
from inverse_flow.data.images import class_number
from inverse_flow.data.load import SOURCES
from inverse_flow.parts import fit_parts
from inverse_flow.stability import stability_report
from inverse_flow.training import Stop, checkpoint, figures
from inverse_flow.training import log as logs
from inverse_flow.training import run as runs
from inverse_flow.training.config import MAX_SEED
from inverse_flow.training.files import to_json
from inverse_flow.training.labels import context_of
from inverse_flow.training.log import StepReport, TensorBoardLog
from inverse_flow.training.progress import MeasuringProgress, TrainingProgress
from inverse_flow.training.quality import quality_of
from inverse_flow.training.quality.measure import recognise
from inverse_flow.training.samples import NPZ, SampleGrids, draw, save_npz
from inverse_flow.training.summary import TRAIN_IMAGES, summarize
from inverse_flow.training.workers import Workers, connect

# More than any machine has; OpenMP ends a program that asks for more than the system can start.
MOST_THREADS = 1 << 10

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
  inverse-flow train --data MNIST/raw --out mnist --logit --validation 5000 --depth 16 --minutes 600
  inverse-flow train --data cifar-10-python.tar.gz --out cifar --flip --depth 16 --hidden 256 \\
      --minutes 600 --device cuda
  inverse-flow train --data photos --out photos-64 --image-size 64 --crop --conditional --flip
  torchrun --nproc-per-node 2 -m inverse_flow train --data MNIST/raw --out mnist --logit
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
  inverse-flow evaluate demo --quality
""",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES["cli"])
@click.version_option(inverse_flow.__version__, prog_name="inverse-flow")
def cli() -> None:
    """Train, sample and evaluate normalizing flows built on the inverse of a convolution."""


def usable_device(context: click.Context, parameter: click.Parameter, name: str) -> str:
    """Refuses a device that PyTorch does not know, this machine does not have, or nothing can be computed on."""
    try:
        torch.zeros(1, device=name).item()  # computes: "meta" holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"PyTorch cannot compute on {name!r} here: {reason}") from error
    return name


def use_threads(threads: int | None) -> None:
    """Limits PyTorch's threads, if the command line does."""
    if threads is not None:
        torch.set_num_threads(threads)


def check_output(path: Path) -> None:
    """Refuses a file that could not be written, before anything is computed for it.

    Raises:
        ValueError: a kind of picture that there is not.
        OSError: a folder that is not there, or cannot be written to.
    """
    kinds = [NPZ, *(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes())]
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path} must be an npz file or a picture, one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path.parent))
    tempfile.TemporaryFile(dir=path.parent).close()


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
        click.option(
            "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads to use.  [default: PyTorch's choice]"
        ),
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

    Ctrl-C ends the training after the current step and keeps the checkpoint. Without --data this is the demo: a small
    model on 1,000 images of Fashion-MNIST, with some defaults of its own. Under torchrun, all its processes train one
    model.
    """
    use_threads(threads)
    exists = (folder / checkpoint.FILE).is_file()
    if resume and fresh:
        raise click.UsageError("--resume goes on and --fresh starts again: give one of them")
    if exists and not (resume or fresh):
        raise click.UsageError(f"{folder / checkpoint.FILE} exists: --resume goes on from it, --fresh replaces it")
    if part_per_process and options["minutes"] is not None:
        raise click.UsageError("--part-per-process is limited by --steps, not by --minutes")
    with plain_errors(), connect(device) as (processes, own_device), quiet(not processes.first):
        # Processes that each train a part do not share the batches.
        workers = Workers() if part_per_process else processes
        # Parts in several processes cannot agree on the time.
        changes: dict[str, Any] = {"minutes": None} if part_per_process else {}
        if resume:
            content = checkpoint.load(folder)
            changes = {**changes_of(options, content), **changes}
            run = runs.resume(content, folder, own_device, source=options["source"], workers=workers, **changes)
            console.print(f"resumed at step {run.trainer.step}, {run.trainer.seconds:.0f} s into the run")
        else:
            training = replace(training_of(options), **changes)
            run = runs.start(
                source_of(options), folder, training, model_of(options), own_device, kind=options["kind"] or KIND,
                conditional=bool(options["conditional"]), workers=workers, **reading_of(options, training),
            )  # fmt: skip
        if part_per_process and run.trainer.config.parts is None:
            raise click.UsageError("--part-per-process trains the parts of --parts")
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
            # The checkpoint knows the rest.
            elsewhere = [] if device == "cpu" else ["--device", device]
            again = ["inverse-flow", "train", "--out", str(folder), "--resume", *elsewhere]
            console.print(f"  {shlex.join(again)}", soft_wrap=True)
        sys.exit(INTERRUPTED_STATUS)
    if not workers.first:
        return
    console.print("measuring the trained model …")
    with MeasuringProgress(console) as measuring:
        summary = runs.finish(run, measuring)
    print_table(summary, f"after {run.trainer.step} steps in {run.trainer.seconds:.0f} s: {stop.value}")
    names = (runs.SAMPLES_FILE, runs.CURVE_FILE, runs.SUMMARY_FILE, logs.FILE, checkpoint.FILE)
    console.print(f"in {folder}: {', '.join(names)}", soft_wrap=True)


@cli.command(epilog=EXAMPLES["sample"], short_help="Draw samples from a trained flow.")
@click.argument("source", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="samples.png", show_default=True,
              help="Picture, or npz file with samples, log-densities and labels, to write.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Number of samples.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True,
              help="Scales the latents: below 1, likelier and less varied samples.")  # fmt: skip
@click.option("--label", help="Class of all the samples, by its name or number.  [default: the classes in turn]")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True,
              help="Seed of the latents that are drawn.")  # fmt: skip
@common_options
def sample(
    source: Path,
    out: Path,
    count: int,
    temperature: float,
    label: str | None,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Draw samples from the model of RUN, a run's folder or its checkpoint."""
    use_threads(threads)
    with plain_errors():
        check_output(out)
        content = checkpoint.load(source)
        data = runs.source_of(content)
        number = None if label is None else class_number(label, data.classes, data.class_names)
        model = checkpoint.model_of(content).to(device)
        drawn = draw(model, count, seed, classes=data.classes, label=number, temperature=temperature)
        if out.suffix.lower() == NPZ:
            save_npz(out, drawn, data.class_names)
        else:
            title = "samples" if temperature == 1 else f"samples, temperature {temperature:g}"
            figures.save_samples(out, figures.to_uint8(drawn.images), title=title)
    console.print(f"{count} {'sample' if count == 1 else 'samples'} in {out}", soft_wrap=True)


@cli.command(epilog=EXAMPLES["evaluate"], short_help="Measure a trained flow beside the baseline.")
@click.argument("source", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option("--data", "data_source", help=f"{SOURCES}.  [default: the data that RUN was trained on]")
@click.option("--train-images", type=click.IntRange(1), default=TRAIN_IMAGES, show_default=True,
              help="Training images to measure on, evenly spaced, if there are more.")  # fmt: skip
@click.option("--importance-samples", type=click.IntRange(0), default=0, show_default=True,
              help="Draws of noise for the importance-weighted bound, each of which takes as long as the test images; "
                   "0 for none.")  # fmt: skip
@click.option("--quality", "with_quality", is_flag=True,
              help="Judge samples of MNIST or Fashion-MNIST too, as many as there are test images.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@common_options
def evaluate(
    source: Path,
    data_source: str | None,
    train_images: int,
    importance_samples: int,
    with_quality: bool,
    as_json: bool,
    device: str,
    threads: int | None,
) -> None:
    """Measure the model of RUN, a run's folder or its checkpoint: bits per dimension beside the baseline, and times.

    How far it has come is written to the standard error, in lines where that is no terminal.
    """
    use_threads(threads)
    with plain_errors():
        content = checkpoint.load(source)
        model = checkpoint.model_of(content).to(device)
        data = runs.data_of(content, data_source)
        classes = runs.source_of(content).classes
        if with_quality:
            recognise(data)  # what it refuses, it refuses before the long work
        with MeasuringProgress(notes) as measuring:
            summary = summarize(
                model, data, content.training, classes=classes, importance_samples=importance_samples,
                train_images=train_images, watch=measuring,
            )  # fmt: skip
            quality = (
                quality_of(model, data, classes=classes, watch=partial(measuring, "samples")) if with_quality else None
            )
        context = context_of(data.test, classes)
        report = stability_report(model, model.event_shape, None if context is None else context[:1].to(device))
    if as_json:
        told = {**summary.to_dict(), "stability": report.to_list(), "data": data.name}
        click.echo(to_json(told | ({"quality": quality.to_dict()} if quality else {})))
    else:
        print_table(summary, f"{source} on {data.name}")
        if quality:
            print_quality(quality)
        console.print(str(report), soft_wrap=True)


@cli.command(short_help="Print versions and what this build can do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def info(as_json: bool) -> None:
    """Print versions, the CPU instruction set in use, the CUDA architectures, and why CUDA is absent."""
    click.echo(to_json(inverse_flow.build_info()) if as_json else format_info())


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
