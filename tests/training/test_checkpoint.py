import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inverse_flow.models import InverseFlow
from inverse_flow.training import Checkpoint, DataSource, TrainConfig, Trainer, checkpoint
from inverse_flow.training.batches import VALIDATION, generator


def images() -> torch.Tensor:
    return torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def trained(folder: Path | None = None, config: TrainConfig | None = None) -> Trainer:
    """A run of two steps with a validation, so that everything in its checkpoint is something."""
    torch.manual_seed(1)
    model = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4)
    config = config or TrainConfig(steps=2, validation=2)
    data = DataSource("/some/folder", {"size": 4, "crop": True}, 0, ("ankle", "boot"))
    trainer = Trainer(model, images(), config, folder, {"note": "mine"}, data=data)
    trainer.fit()
    return trainer


def assert_equal(found: object, expected: object) -> None:
    """Two nests of tensors and plain values."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif hasattr(expected, "__dict__"):
        assert type(found) is type(expected)
        assert_equal(vars(found), vars(expected))
    else:
        assert found == expected


def test_what_is_saved_is_loaded_from_file_or_folder(tmp_path: Path) -> None:
    expected = trained(tmp_path / "run").state()
    assert expected.progress.best is not None
    for path in (tmp_path / "run", tmp_path / "run" / checkpoint.FILE, str(tmp_path / "run")):
        assert_equal(checkpoint.load(path), expected)


def test_a_checkpoint_is_frozen() -> None:
    state = trained().state()
    for part, name in ((state, "extra"), (state.progress, "step"), (state.model, "weights"), (state.data, "source")):
        with pytest.raises(AttributeError):
            setattr(part, name, None)


def as_format_2(state: Checkpoint) -> dict[str, object]:
    """The content of a file as the version before wrote it."""
    return {
        "format": 2,
        "model_description": state.model.description,
        "train_config": state.training.to_dict(),
        "extra": {"source": "small.npz", "size": None, "crop": False, "classes": 0, "note": "mine"},
        "model": state.model.weights,
        "averaged": state.model.averaged,
        "method": state.progress.method,
        "step": state.progress.step,
        "seconds": state.progress.seconds,
        "best": vars(state.progress.best),
        "rng": state.progress.random,
    }


def test_files_of_the_format_before_are_read_and_gone_on_with(tmp_path: Path) -> None:
    state = trained().state()
    torch.save(as_format_2(state), tmp_path / checkpoint.FILE)
    data = DataSource("small.npz", {"size": None, "crop": False})
    found = checkpoint.load(tmp_path)
    assert_equal(found, replace(state, images=None, validation=None, data=data))
    with pytest.warns(UserWarning, match="nothing tells whether these are the ones"):
        resumed = Trainer.resume(found, images(), tmp_path, steps=3)
    # The images that were kept for validation then, and not those that would be drawn now.
    order = torch.randperm(9, generator=generator(0, VALIDATION))
    assert resumed.validation.nonzero().flatten().tolist() == sorted(order[7:].tolist())
    resumed.fit()
    assert resumed.step == 3
    assert checkpoint.load(tmp_path).images == resumed.fingerprint  # known from now on
    assert torch.equal(checkpoint.load(tmp_path).validation, resumed.validation)


def test_a_failed_write_leaves_the_former_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path)
    save = torch.save

    def half_a_write(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half_a_write)
    trainer.step = 99
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint.pt") as caught:
        trainer.save()
    assert caught.value.errno == 28
    monkeypatch.setattr(torch, "save", save)
    assert checkpoint.load(tmp_path).progress.step == 2
    assert not list(tmp_path.glob("*unfinished*"))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*checkpoint.pt"):
        checkpoint.load(tmp_path)
    path = tmp_path / checkpoint.FILE
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        checkpoint.load(path)
    for content in ({"format": 99}, {"format": 1}, {"some": "weights"}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"no checkpoint of a format that is read here \(2 and 3\), but of"):
            checkpoint.load(path)
    torch.save({"format": 3, "model": {}}, path)
    with pytest.raises(ValueError, match="no checkpoint of format 3"):
        checkpoint.load(path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the pickle was run",))

    path = tmp_path / checkpoint.FILE
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        checkpoint.load(path)
    torch.save({"format": 3, "model": Bomb()}, path)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        checkpoint.load(path)


def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
            checkpoint.load(path)


def test_a_changed_byte_anywhere_is_seen_or_makes_no_difference(tmp_path: Path) -> None:
    """Checksums cover what is read; what lies between, such as padding, may change."""
    expected = trained(tmp_path).state()
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory, sizes = archive.start_dir, [entry.file_size for entry in archive.infolist()]
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(len(whole), (60,), generator=generator)
    in_the_directory = torch.randint(directory, len(whole), (60,), generator=generator)
    refused = 0
    for place in [*anywhere.tolist(), *in_the_directory.tolist()]:
        changed = bytearray(whole)
        changed[place] ^= 0x55
        path.write_bytes(changed)
        found = load_or_none(path)
        if found is None:
            refused += 1
        else:
            assert_equal(found, expected)
    assert refused > 60 * sum(sizes) / len(whole)


def load_or_none(path: Path) -> Checkpoint | None:
    """None for a file that is said to be damaged."""
    try:
        return checkpoint.load(path)
    except ValueError as error:
        if "is damaged" not in str(error):
            raise
        return None
