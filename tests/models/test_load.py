from pathlib import Path

import pytest
import torch

from inverse_flow import models
from inverse_flow.training import TrainConfig, Trainer, checkpoint


def test_the_flow_of_a_run_is_loaded_from_its_folder_or_its_checkpoint(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    model = models.InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4)
    trainer = Trainer(model, images, TrainConfig(steps=2, validation=2), tmp_path / "run")
    trainer.fit()
    x = torch.rand(3, 1, 4, 4)
    expected = checkpoint.model_of(trainer.state()).log_prob(x)
    for path in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / checkpoint.FILE):
        flow = models.load(path)
        assert not flow.training
        assert torch.equal(flow.log_prob(x), expected)
    assert next(models.load(tmp_path / "run", device="meta").parameters()).is_meta


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        models.load(tmp_path)
