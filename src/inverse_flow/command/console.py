"""What the commands print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from inverse_flow.data.files import shortened
from inverse_flow.models import InverseFlow
from inverse_flow.training import run as runs
from inverse_flow.training.quality import Quality
from inverse_flow.training.summary import Summary

# What is printed are names of the user's: brackets and colons in them are no markup.
console = Console(markup=False, emoji=False, highlight=False)
# For what is no result: a result may be piped into a file.
notes = Console(stderr=True, markup=False, emoji=False, highlight=False)


def describe(run: runs.Run) -> None:
    """Says what is about to be trained, on what."""
    trainer = run.trainer
    model, config = trainer.model, trainer.model.config
    console.print(
        f"{run.data.name}: {len(trainer.batches.images)} training, {len(trainer.validation_images)} validation and "
        f"{len(run.data.test)} test images of shape {config.image_shape}",
        soft_wrap=True,
    )
    if run.data.left_out:
        console.print("left out, since they cannot be read:\n  " + shortened(run.data.left_out, "\n  "), soft_wrap=True)
    name = "Inverse-Flow" if isinstance(model, InverseFlow) else type(model).__name__
    names = f" ({shortened(run.data.class_names)})" if run.data.class_names else ""
    classes = f", conditional on {run.classes} classes{names}" if run.classes else ""
    processes = f", {trainer.workers.count} processes" if trainer.workers.count > 1 else ""
    console.print(
        f"{name}: L = {config.levels}, K = {config.steps}, {model.num_parameters:,} parameters{classes}{processes}",
        soft_wrap=True,
    )


def print_table(summary: Summary, title: str) -> None:
    """The closing table."""
    table = Table(title=title, show_header=False, caption=f"bits/dim: {summary.protocol}; on {summary.hardware}")
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)  # a narrow terminal may break the names, and no figure
    for name, value in summary.rows():
        table.add_row(name, value)
    console.print(table)


def print_quality(quality: Quality) -> None:
    """The quality of samples beside that of test images, by both networks' features."""
    title = f"quality of {quality.images} samples, beside as many test images"
    table = Table(title=title, caption=quality.caveat)
    table.add_column(overflow="fold")
    for name in (f"{quality.classifier}\nclassifier", "test\nimages", "random\nnetwork", "test\nimages"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in quality.rows():
        table.add_row(*row)
    console.print(table)


@contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """Nothing is printed within it, if ``silent``: one process of several speaks for all."""
    before, console.quiet = console.quiet, silent
    try:
        yield
    finally:
        console.quiet = before
