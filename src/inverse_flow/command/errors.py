"""Errors that the user can mend, each in one line and without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import torch

from inverse_flow.command import INTERRUPTED_STATUS
from inverse_flow.command.extra import missing_extra

# How PyTorch's allocator for the CPU, whose errors have no type of their own, begins.
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Within it, such an error ends the command with status 1 and a line; what is a fault of the program passes.

    Ctrl-C ends it with the status that is usual for that.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # nobody is left to be told
    except KeyboardInterrupt:
        click.echo("\nInterrupted.", err=True)
        raise SystemExit(INTERRUPTED_STATUS) from None
    except (ModuleNotFoundError, ValueError, FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        message = _told(error)
        if message is None:
            raise
        raise click.ClickException(message) from error


def _told(error: Exception) -> str | None:
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU_OUT_OF_MEMORY in str(error):
        return f"out of memory: a smaller --batch-size or --hidden, or --memory-efficient, needs less ({_line(error)})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    if isinstance(error, (ValueError, FloatingPointError, OSError)):
        return str(error)
    return None


def _line(error: Exception) -> str:
    """The first line that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
