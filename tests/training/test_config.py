import json

import pytest

from inverse_flow.parts import PartsConfig
from inverse_flow.training import TrainConfig


def test_a_config_survives_json() -> None:
    config = TrainConfig(minutes=1.5, flip=True, decay_at=(0.5, 3000), validation=9, patience=3, parts=PartsConfig())
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", -1, "steps must be at least 0, got -1"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("learning_rate", 0.0, "learning_rate must be above 0, got 0"),
        ("learning_rate", float("nan"), "got nan"),
        ("minutes", -1.0, "minutes must be at least 0, got -1"),
        ("average_decay", 1.0, "average_decay must be at least 0 and below 1, got 1"),
        ("bit_depth", 9, "bit_depth must be 1 to 8, got 9"),
        ("decay_at", (0.5, 1.5), "decay_at must be shares below 1 or whole steps, got 1.5"),
        ("decay_factor", 0.0, "decay_factor must be above 0, got 0"),
        ("optimizer", "sgd", 'optimizer must be "adam" or "adamax", got \'sgd\''),
        ("precision", "fp8", 'precision must be "float32" or "bf16", got \'fp8\''),
        ("max_gain", 0.0, "max_gain must be above 0, got 0"),
        ("max_inverse_error", 0.0, "max_inverse_error must be above 0, got 0"),
    ],
)
def test_errors_say_what_was_given(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{name: value})


def test_patience_needs_validation() -> None:
    with pytest.raises(ValueError, match="validation must be above 0 for patience, got 0"):
        TrainConfig(patience=3, validation=0)
    assert TrainConfig(patience=3).patience == 3


@pytest.mark.parametrize(("count", "validation"), [(5, 0), (40, 4), (999, 99), (60_000, 100)])
def test_validation_fits_the_images(count: int, validation: int) -> None:
    assert TrainConfig().validation_images(count) == validation
    assert TrainConfig(validation=7).validation_images(count) == 7


def test_the_nearer_limit_is_the_progress() -> None:
    config = TrainConfig(steps=1000, minutes=1)
    assert config.progress(100, 30.0) == 0.5
    assert config.progress(700, 30.0) == 0.7
    assert config.progress(0, 90.0) == 1.0
    assert TrainConfig(steps=1000).progress(250, 1e9) == 0.25


def test_linear_warm_up() -> None:
    config = TrainConfig(warmup_steps=4)
    assert [config.rate_factor(step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert TrainConfig(warmup_steps=0).rate_factor(0, 0.0) == 1


def test_decay_at_shares_of_the_run_and_at_steps() -> None:
    config = TrainConfig(warmup_steps=0, decay_at=(0.5, 700), decay_factor=0.1)
    assert config.rate_factor(10, 0.49) == 1
    assert config.rate_factor(10, 0.5) == pytest.approx(0.1)
    assert config.rate_factor(699, 0.2) == 1
    assert config.rate_factor(700, 0.2) == pytest.approx(0.1)
    assert config.rate_factor(700, 1.0) == pytest.approx(0.01)
