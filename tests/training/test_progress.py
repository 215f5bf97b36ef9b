import io

import pytest
from rich.console import Console

from inverse_flow.training import StepReport, TrainConfig
from inverse_flow.training.progress import MeasuringProgress, TrainingProgress


def report(step: int, seconds: float, validation: float | None = None) -> StepReport:
    return StepReport(step, 0, seconds, 1234.0, 4.5, 1.0, 1e-3, 321.0, validation)


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with TrainingProgress(TrainConfig(steps=100, evaluate_every=2), console) as progress:
        progress(report(1, 1.0))
        progress(report(2, 2.0, validation=4.25))
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_it_shows_loss_bits_speed_and_time_left(terminal: bool) -> None:
    text = shown(terminal)
    for part in ("loss 1234", "4.500 bits/dim", "validation 4.250", "321 images/s", "1:38 left"):
        assert part in text


def test_without_a_terminal_there_is_a_line_at_an_evaluation_and_one_in_ten_seconds_at_most() -> None:
    assert len(shown(terminal=False).splitlines()) == 1
    out = io.StringIO()
    with TrainingProgress(TrainConfig(steps=100, evaluate_every=2), Console(file=out, width=120)) as progress:
        for step in range(1, 41):  # an evaluation a second
            progress(report(step, 0.5 * step))
    assert [int(line.split()[1]) for line in out.getvalue().splitlines()] == [2, 22]


def test_the_nearer_limit_says_how_much_time_is_left() -> None:
    by_time = TrainingProgress(TrainConfig(steps=1000, minutes=1))
    by_time(report(10, 10.0))
    assert by_time.time_left(report(30, 30.0)) == "0:30"
    by_steps = TrainingProgress(TrainConfig(steps=40, minutes=10))
    by_steps(report(10, 10.0))
    assert by_steps.time_left(report(30, 30.0)) == "0:10"


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.4, "59:59"), (3599.6, "1:00:00"), (36_061, "10:01:01")],
)
def test_the_time_left_has_no_sixtieth_second_or_minute(seconds: float, left: str) -> None:
    assert TrainingProgress(TrainConfig(minutes=1000)).time_left(report(1, 60_000 - seconds)) == left


@pytest.mark.parametrize("terminal", [False, True])
def test_a_measurement_tells_how_far_it_is(terminal: bool) -> None:
    out, times = io.StringIO(), iter([0.0, 1.0, 10.0, 10.0, 12.0, 19.0, 21.0, 21.0])
    console = Console(file=out, force_terminal=terminal, width=120)
    with MeasuringProgress(console, lambda: next(times)) as progress:
        for done in range(1, 6):
            progress("test images", 1000 * done, 5000)
    if terminal:
        assert "test images" in out.getvalue()
    else:  # a line every ten seconds
        assert out.getvalue().splitlines() == ["test images: 2,000 of 5,000", "test images: 5,000 of 5,000"]
