import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from inverse_flow.training.files import check_folder, locked, replacing, write_text

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    write_text(path, "before")
    with replacing(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "before"
        assert unfinished.suffix == path.suffix
    assert path.read_text() == "half"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("some"), KeyboardInterrupt()])
def test_an_error_leaves_the_file_as_it_was(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "some.txt"
    write_text(path, "before")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_systems_errors_name_the_file_and_not_the_unfinished_one(tmp_path: Path) -> None:
    path = tmp_path / "none" / "some.txt"
    with pytest.raises(FileNotFoundError) as caught, replacing(path) as unfinished:
        unfinished.write_text("text")
    assert caught.value.filename == str(path)


def test_one_run_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        with pytest.raises(OSError, match=r"another run is using this folder: .*run"), locked(folder):
            pass
        with pytest.raises(OSError, match="another run"):
            check_folder(folder)
    with locked(folder, shared=True):
        check_folder(folder)  # several processes of one run may look at once


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from inverse_flow.training.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    with locked(tmp_path):
        pass


def test_what_could_not_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        check_folder(tmp_path / "file" / "run")
    with pytest.raises(FileExistsError):
        check_folder(tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    check_folder(tmp_path / "run", 10**6)
    message = r"2\.0 MB are needed for two checkpoints, one being written, and 1\.0 are free"
    with pytest.raises(OSError, match=message) as caught:
        check_folder(tmp_path / "run", 2 * 10**6)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_only_others_may_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        check_folder(tmp_path / "run")
