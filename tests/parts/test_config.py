from typing import Any

import pytest

from inverse_flow.parts import PartsConfig, parse_parts
from inverse_flow.training import TrainConfig


def turns(config: PartsConfig, steps: int = 12, per_epoch: int = 2) -> list[tuple[int, ...] | None]:
    found = [config.turn_of(step, step // per_epoch, step / steps) for step in range(steps)]
    return [None if turn is None else tuple(turn) for turn in found]


def test_sequential_rounds_share_the_budget_before_the_finish() -> None:
    assert turns(PartsConfig(count=2, schedule="sequential")) == [(0,)] * 4 + [(1,)] * 4 + [None] * 4
    assert turns(PartsConfig(count=3, schedule="sequential", finish=0)) == [(0,)] * 4 + [(1,)] * 4 + [(2,)] * 4


def test_alternate_by_batch_and_by_epoch() -> None:
    assert turns(PartsConfig(count=3)) == [(0,), (1,), (2,)] * 2 + [(0,), (1,)] + [None] * 4
    assert turns(PartsConfig(count=2, turn="epoch")) == [(0,), (0,), (1,), (1,)] * 2 + [None] * 4


def test_simultaneous_trains_all_parts_on_every_batch() -> None:
    assert turns(PartsConfig(count=3, schedule="simultaneous", finish=0.5)) == [(0, 1, 2)] * 6 + [None] * 6


def test_a_finish_of_one_is_end_to_end_training() -> None:
    assert turns(PartsConfig(finish=1)) == [None] * 12


def test_the_last_turn_is_within_the_parts() -> None:
    """Rounding must not make a part n + 1."""
    for count in range(1, 50):
        config = PartsConfig(count=count, schedule="sequential")
        turn = config.turn_of(0, 0, (1 - config.finish) * (1 - 2**-53))
        assert turn is None or turn[0] < count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "along"}, 'cut must be "blocks" or "across", got \'along\''),
        ({"schedule": "random"}, "schedule must be .*, got 'random'"),
        ({"turn": "minute"}, 'turn must be "batch" or "epoch"'),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"finish": 1.5}, "finish must be 0 to 1, got 1.5"),
        ({"learning_rates": (1e-3,)}, "2 parts need as many learning rates, got 1"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rates must be above 0, got 0"),
        ({"schedule": "sequential", "cache_epochs": -1}, "cache_epochs must be at least 0, got -1"),
        ({"cache_epochs": 2}, "parts that are done: sequential, not alternate"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartsConfig(**options)


def test_a_training_configuration_keeps_its_parts() -> None:
    config = TrainConfig(parts=PartsConfig("blocks", 2, learning_rates=(1e-3, 2e-3)))
    values = config.to_dict()
    values["parts"]["learning_rates"] = list(values["parts"]["learning_rates"])  # as JSON has it
    assert TrainConfig.from_dict(values) == config


def test_parts_as_the_command_line_gives_them() -> None:
    assert parse_parts("across:2") == ("across", 2)
    assert parse_parts("blocks:13") == ("blocks", 13)
    for text in ("across", "across:", "across:0", "across:-1", "along:2", "2", "across:2:3"):
        with pytest.raises(ValueError, match='"blocks:n" or "across:n"'):
            parse_parts(text)
