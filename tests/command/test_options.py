"""Options are the fields of the configurations: their types, defaults, bounds and meaning stand there alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner

from inverse_flow.command import demo
from inverse_flow.command.commands import cli
from inverse_flow.command.options import ConfigOptions
from inverse_flow.command.run_options import MODEL, PARTS, TRAINING, model_of, reading_of, run_options, training_of
from inverse_flow.data import load
from inverse_flow.models import FlowConfig
from inverse_flow.models.fields import Bounds
from inverse_flow.parts import PartsConfig
from inverse_flow.training import TrainConfig


@dataclass(frozen=True)
class Example:
    """Something.

    Attributes:
        count: so many, up to ``share``.
        share: of the whole; None for all of it.
        rates: several.
        kind: one or the other.
        fast: in a hurry.
    """

    count: Annotated[int, Bounds(1, 8)] = 2
    share: Annotated[float, Bounds(above=0, below=1)] | None = None
    rates: tuple[float, ...] = ()
    kind: Literal["a", "b"] = "a"
    fast: bool = False


@click.command()
@ConfigOptions(Example, spelled={"share": "part_of_it"}, demo={"count": 3})
def example(**options: Any) -> None:
    given = ConfigOptions(Example, spelled={"share": "part_of_it"}).given(options)
    click.echo(repr(replace(Example(), **given)))


def call(*arguments: str) -> Any:
    return CliRunner().invoke(example, arguments, env={"COLUMNS": "200"})


def test_what_is_not_given_is_the_default_and_what_is_given_its_field() -> None:
    assert call().output.strip() == repr(Example())
    arguments = ["--count", "8", "--part-of-it", "0.5", "--rates", "1", "--rates", "2", "--kind", "b", "--fast"]
    assert call(*arguments).output.strip() == repr(Example(8, 0.5, (1.0, 2.0), "b", True))
    assert call("--no-fast", "--part-of-it", "0.1").output.strip() == repr(Example(share=0.1))


@pytest.mark.parametrize(
    "arguments", [("--count", "0"), ("--count", "9"), ("--part-of-it", "0"), ("--part-of-it", "1"), ("--kind", "c")]
)
def test_bounds_and_choices_are_those_of_the_field(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_the_help_is_the_docstring_in_the_words_of_the_command_line() -> None:
    words = " ".join(call("--help").output.split())
    assert "So many, up to --part-of-it. [default: 2; 3 in the demo] [1<=x<=8]" in words
    assert "Of the whole. [default: all of it] [0<x<1]" in words
    assert "--fast / --no-fast In a hurry. [default: no]" in words


@pytest.mark.parametrize(
    ("options", "config_type", "left_out"),
    [
        (MODEL, FlowConfig, {"image_shape", "context_channels", "logit_margin"}),
        (TRAINING, TrainConfig, {"parts"}),
        (PARTS, PartsConfig, {"cut", "count"}),
    ],
)
def test_every_field_is_an_option(options: ConfigOptions, config_type: type, left_out: set[str]) -> None:
    assert {field.name for field in fields(config_type)} - options.fields.keys() == left_out


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "info"])
def test_every_option_says_what_it_means(name: str) -> None:
    """In a sentence, and in the words of the command line: no names of Python, no marks of a docstring."""
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            text = parameter.help or ""
            meaning = text.split("  [default")[0]
            assert meaning[:1].isupper() or meaning[:1] in '…"', f"{parameter.name}: {text}"
            assert meaning.endswith((".", "…")), f"{parameter.name}: {text}"
            assert not {"`", "None", "see there", "See there"} & set(text.split()), f"{parameter.name}: {text}"
            assert "`" not in text, f"{parameter.name}: {text}"
            assert len(text) > 15, f"{parameter.name}: {text}"


def parsed(*arguments: str | Path) -> dict[str, Any]:
    """The values of the options of a run."""
    found: dict[str, Any] = {}

    @click.command()
    @run_options
    def command(**options: Any) -> None:
        found.update(options)

    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return found


def test_the_command_line_has_the_defaults_of_python() -> None:
    options = parsed("--data", "some.npz")
    assert training_of(options) == TrainConfig()
    assert model_of(options) == {}
    reading = {"size": None, "crop": False, "skip_bad_images": False, "seed": 0}
    assert reading_of(options, training_of(options)) == reading


@pytest.mark.parametrize("arguments", [(), ("--data", "embedded")])
def test_the_demo_is_one_configuration(arguments: tuple[str, ...]) -> None:
    options = parsed(*arguments)
    assert training_of(options) == demo.TRAINING
    assert model_of(options) == demo.MODEL
    changed = parsed(*arguments, "--no-flip", "--minutes", "1", "--no-logit", "--depth", "2")
    assert training_of(changed) == replace(demo.TRAINING, flip=False, minutes=1.0)
    assert model_of(changed) == {"logit_margin": None, "steps": 2}
    assert len(load("embedded").train) == 1000


def test_all_options_together_reach_their_configurations() -> None:
    options = parsed(
        "--data", "some", "--bits", "5", "--decay-at", "0.5", "--decay-at", "100", "--parts", "across:2",
        "--part-rate", "1e-2", "--part-rate", "2e-2", "--logit", "--orders", "alternating", "--seed", "7",
        "--skip-bad-images",
    )  # fmt: skip
    parts = PartsConfig("across", 2, learning_rates=(1e-2, 2e-2))
    assert training_of(options) == TrainConfig(bit_depth=5, decay_at=(0.5, 100.0), parts=parts, seed=7)
    assert model_of(options) == {"logit_margin": 1e-3, "orders": "alternating"}
    assert reading_of(options, training_of(options))["skip_bad_images"] is True
    assert reading_of(options, training_of(options))["seed"] == 7
