import json

import pytest

from inverse_flow.training import TrainConfig


def test_a_config_survives_json() -> None:
    config = TrainConfig(minutes=1.5, flip=True)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", -1, "steps must be at least 0, got -1"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("learning_rate", 0.0, "learning_rate must be a finite number above 0, got 0"),
        ("learning_rate", float("nan"), "got nan"),
        ("minutes", -1.0, "minutes must be at least 0, got -1"),
        ("average_decay", 1.0, "average_decay must be at least 0 and below 1, got 1"),
        ("bit_depth", 9, "bit_depth must be 1 to 8, got 9"),
    ],
)
def test_errors_say_what_was_given(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{name: value})
