import pickle
from pathlib import Path

import pytest
import torch

from inverse_flow.training import checkpoint


def test_what_is_saved_is_loaded_from_file_or_folder(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run" / checkpoint.FILE, {"step": 3, "tensor": torch.ones(2)})
    for path in (tmp_path / "run", tmp_path / "run" / checkpoint.FILE):
        content = checkpoint.load(path)
        assert content["step"] == 3
        assert torch.equal(content["tensor"], torch.ones(2))


def test_a_failed_write_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / checkpoint.FILE
    checkpoint.save(path, {"step": 1})

    def half_a_write(content: object, file: object) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half_a_write)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*checkpoint.pt"):
        checkpoint.load(tmp_path)
    path = tmp_path / checkpoint.FILE
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="no checkpoint of format 2"):
        checkpoint.load(path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the pickle was run",))

    path = tmp_path / checkpoint.FILE
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        checkpoint.load(path)
