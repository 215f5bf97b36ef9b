import json
from pathlib import Path

import torch

from inverse_flow.flows.logit import DEFAULT_MARGIN
from inverse_flow.training import Stop, TrainConfig, checkpoint
from inverse_flow.training import run as runs

MODEL = {"levels": 2, "steps": 2, "hidden": 8, "logit_margin": DEFAULT_MARGIN}
CONFIG = TrainConfig(steps=40, learning_rate=1e-2, warmup_steps=10, flip=True, validation=100, evaluate_every=20)


def test_a_short_run_on_real_images_beats_independent_pixels(tmp_path: Path) -> None:
    run = runs.start("embedded", tmp_path, CONFIG, MODEL)
    assert run.trainer.fit() is Stop.STEPS
    said: list[str] = []
    summary = runs.finish(run, said.append)
    assert said
    assert summary.test_bits_per_dim < summary.baseline_test_bits_per_dim - 0.1
    written = json.loads((tmp_path / runs.SUMMARY_FILE).read_text())
    assert written["test_bits_per_dim"] == summary.test_bits_per_dim
    assert written["stopped_because"] == Stop.STEPS.value
    assert written["training"] == CONFIG.to_dict()
    assert (tmp_path / runs.SAMPLES_FILE).is_file()
    assert (tmp_path / runs.CURVE_FILE).is_file()


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    def first_weight(seed: int) -> torch.Tensor:
        config = TrainConfig(seed=seed)
        return next(runs.start("embedded", tmp_path, config, MODEL).trainer.model.parameters())

    torch.manual_seed(5)
    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_resume_finds_the_data_again(tmp_path: Path) -> None:
    runs.start("embedded", tmp_path, CONFIG, MODEL).trainer.save()
    run = runs.resume(checkpoint.load(tmp_path), tmp_path, steps=1)
    assert run.data.name == "fashion-mnist-slice"
    assert run.trainer.config.steps == 1
    assert run.trainer.fit() is Stop.STEPS
