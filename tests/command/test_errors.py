"""What the user can mend is told in one line; what is a fault of the program is not hidden."""

import errno
import pickle

import click
import pytest
import torch

from inverse_flow.command.errors import plain_errors


def too_much_memory() -> Exception:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("there is memory without end")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("levels must be 1"), "levels must be 1"),
        (FileNotFoundError("there is no checkpoint here"), "there is no checkpoint here"),
        (PermissionError(errno.EACCES, "Permission denied", "run/log.csv"), "run/log.csv: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "run"), "run: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/run"), "file/run: Not a directory"),
        (FloatingPointError("a gradient is NaN"), "a gradient is NaN"),
        (MemoryError(), "out of memory.*MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), r"out of memory.*\(CUDA out of memory. Tried\)"),
        (too_much_memory(), "out of memory.*can't allocate memory"),
        (ModuleNotFoundError("No module named 'rich'", name="rich.table"), "inverse-flow needs rich.table"),
    ],
)
def test_errors_of_the_users_are_one_line(error: Exception, message: str) -> None:
    with pytest.raises(click.ClickException, match=message) as told, plain_errors():
        raise error
    assert "\n" not in told.value.message
    assert told.value.exit_code == 1


def test_ctrl_c_has_the_status_that_is_usual(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, plain_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("an operator is wrong"),
        ModuleNotFoundError("No module named 'other'", name="other"),
        KeyError("name"),
        pickle.PicklingError(),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_faults_of_the_program_keep_their_trace(error: Exception) -> None:
    with pytest.raises(type(error)), plain_errors():
        raise error
