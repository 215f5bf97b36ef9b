import pytest

from inverse_flow.training import TrainConfig
from inverse_flow.training.schedule import rate_factor


def test_linear_warm_up() -> None:
    config = TrainConfig(warmup_steps=4)
    assert [rate_factor(config, step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rate_factor(TrainConfig(warmup_steps=0), 0, 0.0) == 1


def test_decay_at_shares_of_the_run_and_at_steps() -> None:
    config = TrainConfig(warmup_steps=0, decay_at=(0.5, 700), decay_factor=0.1)
    assert rate_factor(config, 10, 0.49) == 1
    assert rate_factor(config, 10, 0.5) == pytest.approx(0.1)
    assert rate_factor(config, 699, 0.2) == 1
    assert rate_factor(config, 700, 0.2) == pytest.approx(0.1)
    assert rate_factor(config, 700, 1.0) == pytest.approx(0.01)
