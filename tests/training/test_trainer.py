import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow import stability_report
from inverse_flow.flows import Flow, FlowLayer, NonFiniteError
from inverse_flow.flows.base import zero_logdet
from inverse_flow.models import Glow, InverseFlow
from inverse_flow.parts import PartsConfig
from inverse_flow.stability import gains
from inverse_flow.training import (
    Batches,
    InverseError,
    StepReport,
    StepResult,
    Stop,
    TrainConfig,
    Trainer,
    Workers,
    checkpoint,
)
from inverse_flow.training import trainer as trainer_module
from inverse_flow.training.gains import naming_largest_gain
from inverse_flow.training.log import read_log

from .toy import Fault, images, losses, run

CONFIG = TrainConfig(
    steps=12, batch_size=4, learning_rate=3e-3, warmup_steps=5, flip=True, validation=5, evaluate_every=4
)


def model(context_channels: int = 0, last: nn.Module | None = None) -> InverseFlow:
    """The same at every call; with another ``last`` layer of its step."""
    torch.manual_seed(1)
    made = InverseFlow((1, 4, 4), levels=1, steps=1, hidden=4, context_channels=context_channels)
    if last is not None:
        made.layers[1].layers[2] = last
    return made


def test_the_bits_per_dimension_fall() -> None:
    trainer = Trainer(model(), images(), replace(CONFIG, steps=150, learning_rate=1e-2))
    bits = [report.bits_per_dim for report in run(trainer)]
    assert sum(bits[-10:]) / 10 < sum(bits[:10]) / 10 - 1
    assert trainer.stop is Stop.STEPS


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 12])
def test_a_run_cut_anywhere_and_resumed_is_the_uncut_run(tmp_path: Path, cut: int) -> None:
    uncut = Trainer(model(), images(), CONFIG)
    expected = losses(run(uncut))

    cut_run = Trainer(model(), images(), CONFIG, tmp_path)
    first = losses(run(cut_run, interrupt_at=cut))
    assert cut_run.stop is Stop.INTERRUPTED
    torch.manual_seed(99)
    resumed = Trainer.resume(checkpoint.load(tmp_path), images(), tmp_path)
    second = losses(run(resumed))

    assert first + second == expected
    for name, value in uncut.result().state_dict().items():
        assert torch.equal(resumed.result().state_dict()[name], value), name
    assert losses(read_log(tmp_path / "log.csv")) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamax", "decay_at": (0.5, 10), "decay_factor": 0.3},
        {"precision": "bf16"},
        {"dequantization": "variational"},
        {"bit_depth": 3, "average_decay": 0.0, "max_inverse_error": None},
    ],
    ids=["adamax and decay", "bf16", "variational", "bit depth"],
)
def test_a_resumed_run_is_the_uncut_run_whatever_the_settings(tmp_path: Path, changes: dict[str, object]) -> None:
    config = replace(CONFIG, **changes)
    expected = run(Trainer(model(), images(), config))
    first = run(Trainer(model(), images(), config, tmp_path), interrupt_at=7)
    second = run(Trainer.resume(checkpoint.load(tmp_path), images()))
    assert losses(first + second) == losses(expected)
    assert [r.learning_rate for r in first + second] == [r.learning_rate for r in expected]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    expected = losses(run(Trainer(model(), images(), CONFIG)))

    def kill_at_step_6(report: StepReport) -> None:
        if report.step == 6:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Trainer(model(), images(), CONFIG, tmp_path).fit(kill_at_step_6)
    resumed = Trainer.resume(checkpoint.load(tmp_path), images(), tmp_path)
    assert resumed.step == 4
    assert losses(run(resumed)) == expected[4:]
    assert losses(read_log(tmp_path / "log.csv")) == expected


def test_the_resume_test_can_fail(tmp_path: Path) -> None:
    """Without the optimizer's state the losses differ: the comparison above is sharp enough to see it."""
    expected = losses(run(Trainer(model(), images(), CONFIG)))
    run(Trainer(model(), images(), replace(CONFIG, steps=6), tmp_path))
    content = checkpoint.load(tmp_path)
    content.progress.method["optimizer"]["state"].clear()
    assert losses(run(Trainer.resume(content, images(), steps=CONFIG.steps))) != expected[6:]


def test_the_time_budget_counts_the_time_before_a_resume(tmp_path: Path) -> None:
    trainer = Trainer(model(), images(), replace(CONFIG, steps=10**6, minutes=0.3 / 60), tmp_path)
    assert trainer.fit() is Stop.TIME
    assert 0.3 <= trainer.seconds < 3
    done = trainer.step
    resumed = Trainer.resume(checkpoint.load(tmp_path), images(), tmp_path)
    assert resumed.fit() is Stop.TIME
    assert resumed.step == done


def test_the_learning_rate_warms_up() -> None:
    rates = [report.learning_rate for report in run(Trainer(model(), images(), CONFIG))]
    full = CONFIG.learning_rate
    assert rates == pytest.approx([full * 0.2, full * 0.4, full * 0.6, full * 0.8] + [full] * 8)


def test_the_learning_rate_decays() -> None:
    config = replace(CONFIG, warmup_steps=0, decay_at=(0.5, 9))
    rates = [report.learning_rate for report in run(Trainer(model(), images(), config))]
    assert rates == pytest.approx([3e-3] * 6 + [3e-4] * 3 + [3e-5] * 3)


def test_a_run_that_gets_no_better_ends(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=100, patience=2, learning_rate=1e-30)  # weights that do not move
    trainer = Trainer(model(), images(), config, tmp_path)
    reports = run(trainer)
    assert trainer.stop is Stop.PATIENCE
    assert reports[-1].step == trainer.best.step + 2 * config.evaluate_every
    assert run(Trainer.resume(checkpoint.load(tmp_path), images())) == []
    learning = Trainer(model(), images(), replace(CONFIG, steps=40, patience=4, learning_rate=1e-2))
    assert run(learning)[-1].step == 40


class Constant:
    """A method that learns nothing, counts its steps and has a column of its own."""

    def __init__(self, model: Flow, config: TrainConfig, workers: Workers) -> None:
        self.calls: list[tuple[int, float, float, tuple[int, ...]]] = []

    def step(
        self, images: Tensor, context: Tensor | None = None, *, step: int, progress: float, rate_factor: float
    ) -> StepResult:
        self.calls.append((step, progress, rate_factor, tuple(images.shape)))
        return StepResult(-2.0, 3.0, 4.0, {"calls": float(len(self.calls))})

    def state(self) -> dict[str, object]:
        return {"calls": len(self.calls)}

    def load_state(self, content: Mapping[str, Any]) -> None:
        self.calls = [(-1, 0.0, 0.0, ())] * content["calls"]


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    trainer = Trainer(model(), images(), CONFIG, tmp_path, method=Constant)
    reports = run(trainer, interrupt_at=3)
    assert trainer.method.calls == [
        (0, 0.0, pytest.approx(0.2), (4, 1, 4, 4)),
        (1, pytest.approx(1 / 12), pytest.approx(0.4), (4, 1, 4, 4)),
        (2, pytest.approx(2 / 12), pytest.approx(0.6), (4, 1, 4, 4)),
    ]
    assert [(r.loss, r.bits_per_dim, r.grad_norm, r.columns) for r in reports] == [
        (2.0, 3.0, 4.0, {"calls": float(count)}) for count in (1, 2, 3)
    ]
    resumed = Trainer.resume(checkpoint.load(tmp_path), images(), tmp_path, method=Constant, steps=5)
    assert [r.columns["calls"] for r in run(resumed)] == [4.0, 5.0]
    assert [r.columns["calls"] for r in read_log(tmp_path / "log.csv")] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_every_image_keeps_its_context() -> None:
    """The context of an image is its mean: a method that sees both finds them together, in every batch."""
    seen = []

    class Compare(Constant):
        def step(self, images: Tensor, context: Tensor | None = None, **options: Any) -> StepResult:
            seen.append((images.mean(dim=(1, 2, 3)) - context[:, 0]).abs().max().item())
            return super().step(images, context, **options)

    means = images().float().mean(dim=(1, 2, 3))[:, None] / 256
    reports = run(Trainer(model(1), images(), CONFIG, context=means, method=Compare))
    assert len(seen) == 12
    assert max(seen) < 1 / 256
    assert sum(report.validation is not None for report in reports) == 3
    with pytest.raises(ValueError, match="one row per image: 16, got 3"):
        Batches(images()[:16], CONFIG, means[:3])


def test_a_conditional_model_learns_from_its_context(tmp_path: Path) -> None:
    """Exactly resumed too: the context is part of the batch."""
    labels = torch.eye(3)[torch.arange(21) % 3]
    first = run(Trainer(model(3), images(), CONFIG, tmp_path, context=labels), interrupt_at=5)
    second = run(Trainer.resume(checkpoint.load(tmp_path), images(), context=labels))
    expected = losses(run(Trainer(model(3), images(), CONFIG, context=labels)))
    assert losses(first + second) == expected
    assert losses(run(Trainer(model(3), images(), CONFIG, context=labels.roll(1, 0)))) != expected


def test_the_best_validated_weights_are_the_result() -> None:
    trainer = Trainer(model(), images(), CONFIG)
    reports = run(trainer)
    checked = [r.validation for r in reports if r.validation is not None]
    assert len(checked) == 3
    assert trainer.best.bits_per_dim == min(checked)
    trainer.best = replace(trainer.best, weights={n: torch.zeros_like(t) for n, t in trainer.best.weights.items()})
    assert all(not t.any() for t in trainer.result().state_dict().values())


def test_the_best_weights_survive_a_resume(tmp_path: Path) -> None:
    trainer = Trainer(model(), images(), CONFIG, tmp_path)
    run(trainer, interrupt_at=5)
    content = checkpoint.load(tmp_path)
    best = replace(content.progress.best, bits_per_dim=-1000.0)  # never to be beaten
    resumed = Trainer.resume(replace(content, progress=replace(content.progress, best=best)), images())
    run(resumed)
    for name, value in resumed.result().state_dict().items():
        assert torch.equal(value, best.weights[name])


def test_the_global_random_state_survives_a_resume(tmp_path: Path) -> None:
    """For layers that draw random numbers of their own, such as dropout."""
    run(Trainer(model(), images(), CONFIG, tmp_path))
    expected = torch.rand(3)
    torch.manual_seed(99)
    Trainer.resume(checkpoint.load(tmp_path), images())
    assert torch.equal(torch.rand(3), expected)


def test_the_last_weights_of_a_finished_run_are_validated_too() -> None:
    trainer = Trainer(model(), images(), replace(CONFIG, steps=3))
    assert not any(report.validation for report in run(trainer))
    assert trainer.best.step == 3


def test_without_validation_images_the_averaged_weights_are_the_result() -> None:
    trainer = Trainer(model(), images(), replace(CONFIG, validation=0))
    assert all(report.validation is None for report in run(trainer))
    averaged = trainer.averaged_model.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in trainer.result().state_dict().items())


def test_validation_images_are_not_trained_on() -> None:
    trainer = Trainer(model(), images(), CONFIG)
    parts = (trainer.batches.images, trainer.validation_images)
    assert [len(part) for part in parts] == [16, 5]
    together = {tuple(image.flatten().tolist()) for part in parts for image in part}
    assert together == {tuple(image.flatten().tolist()) for image in images()}
    other = Trainer(model(), images(), replace(CONFIG, seed=1))
    assert not torch.equal(trainer.validation_images, other.validation_images)
    for count in (21, 40):
        with pytest.raises(ValueError, match=f"of 21 images none is left to train on: .* got {count}$"):
            Trainer(model(), images(), replace(CONFIG, validation=count))


def test_the_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *args: object) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    reports = run(Trainer(model(), images(), replace(CONFIG, max_grad_norm=0.01)))
    assert max(seen) <= 0.0101
    assert max(report.grad_norm for report in reports) > 0.02


def test_a_loss_that_is_not_finite_names_its_layer() -> None:
    message = (
        r"layers.1.layers.2: 64 of 64 values of the result of Fault.forward .*the loss of step 1 is nan; "
        r"the largest gain is 1.\d+, of layers.1.layers.0$"
    )
    with pytest.raises(NonFiniteError, match=message):
        Trainer(model(last=Fault(in_gradient=False)), images(), CONFIG).fit()


class Drift(FlowLayer):
    """A shift whose inverse forgets it once the weight has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + 100 * self.weight, zero_logdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, zero_logdet(z)


def test_a_layer_that_stops_inverting_itself_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(InverseError, match=r"layers.1.layers.2: Drift misses its own input by"):
        Trainer(model(last=Drift()), images(), CONFIG, tmp_path).fit()
    assert len(read_log(tmp_path / "log.csv")) == CONFIG.evaluate_every - 1
    assert Trainer(model(last=Drift()), images(), replace(CONFIG, max_inverse_error=None)).fit() is Stop.STEPS


def test_a_gradient_that_is_not_finite_names_its_parameter() -> None:
    with pytest.raises(FloatingPointError, match=r"not finite: layers.1.layers.2.weight; the largest gain is"):
        Trainer(model(last=Fault(in_gradient=True)), images(), CONFIG).fit()


@torch.no_grad()
def amplify(flow: InverseFlow, factor: float) -> InverseFlow:
    """Multiplies the taps of the flow's inverse convolution, so that its gain is large."""
    flow.layers[1].layers[0].weight.mul_(factor)
    return flow


def test_an_inverse_convolution_that_explodes_is_named_with_its_gain() -> None:
    with pytest.raises(FloatingPointError, match=r"the largest gain is \S+e\+\d+, of layers.1.layers.0"):
        Trainer(amplify(model(), 1e32), images(), CONFIG).fit()
    # A model without one dies without.
    broken = Flow([*Glow((1, 4, 4), 1, 1, 4).layers, Fault(in_gradient=False)], (1, 4, 4))
    with pytest.raises(NonFiniteError) as caught, naming_largest_gain(broken):
        raise NonFiniteError("layers.3", "NaN")
    assert str(caught.value) == "layers.3: NaN"


class Looks(FlowLayer):
    """The identity, that looks at a value, which a run without values cannot."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x if x.sum() > 0 else x + 0), zero_logdet(x)

    inverse = forward


def test_a_model_that_looks_at_values_is_trained_without_a_gain() -> None:
    looking = model()
    looking.layers.append(Looks())
    assert [report.largest_gain for report in run(Trainer(looking, images(), CONFIG))] == [None] * 12


def test_the_largest_gain_is_logged_at_evaluations(tmp_path: Path) -> None:
    trainer = Trainer(model(), images(), CONFIG, tmp_path)
    reports = run(trainer)
    assert [report.largest_gain is not None for report in reports] == [report.step % 4 == 0 for report in reports]
    assert reports[-1].largest_gain == stability_report(trainer.model, (1, 4, 4)).largest.gain
    assert [report.largest_gain for report in read_log(tmp_path / "log.csv")] == [r.largest_gain for r in reports]


@pytest.mark.parametrize("parts", [None, PartsConfig("across", 1, "simultaneous")], ids=["end to end", "by parts"])
def test_a_limit_on_the_gain_holds_after_every_step(parts: PartsConfig | None) -> None:
    config = replace(CONFIG, max_gain=1.5, learning_rate=0.1, warmup_steps=0, parts=parts)
    trainer, seen = Trainer(amplify(model(), 300), images(), config), []
    trainer.fit(lambda _: seen.append(max(gains(trainer.model, (1, 4, 4)).values())))
    assert max(seen) <= 1.5 * (1 + 1e-5)
    assert seen[0] == pytest.approx(1.5, rel=1e-5)
    free = Trainer(amplify(model(), 300), images(), replace(config, max_gain=None))
    free.fit()
    assert max(gains(free.model, (1, 4, 4)).values()) > 2


def test_a_limit_that_is_never_reached_changes_nothing() -> None:
    limited, free = (run(Trainer(model(), images(), replace(CONFIG, max_gain=most))) for most in (1e6, None))
    assert losses(limited) == losses(free)


# ------------------------------------------------------------------------- what a run must not do to its files or data


def test_a_run_goes_on_only_with_the_images_it_began_with(tmp_path: Path) -> None:
    run(Trainer(model(), images(), CONFIG, tmp_path))
    content = checkpoint.load(tmp_path)
    for other, message in (
        (torch.cat([images(), images(3)]), r"shape 24 × 1 × 4 × 4 instead of 21 × 1 × 4 × 4"),
        (255 - images(), "as many of the same shape, 21 × 1 × 4 × 4, but with other pixels, labels or order"),
        (images().flip(0), "other pixels, labels or order"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer.resume(content, other, tmp_path, steps=20)
    assert Trainer.resume(content, images().clone(), tmp_path, steps=20).step == CONFIG.steps


def test_a_run_goes_on_only_with_the_contexts_it_began_with(tmp_path: Path) -> None:
    labels = torch.eye(3)[torch.arange(21) % 3]
    run(Trainer(model(3), images(), CONFIG, tmp_path, context=labels))
    with pytest.raises(ValueError, match="other pixels, labels or order"):
        Trainer.resume(checkpoint.load(tmp_path), images(), context=labels.roll(1, 0))


def test_two_runs_in_one_folder_are_refused_at_once(tmp_path: Path) -> None:
    first, second = (Trainer(model(), images(), CONFIG, tmp_path) for _ in range(2))

    def meanwhile(report: StepReport) -> None:
        with pytest.raises(OSError, match="another run is using this folder"):
            second.fit()

    first.fit(meanwhile)
    assert second.step == 0
    assert [report.step for report in read_log(tmp_path / "log.csv")] == list(range(1, CONFIG.steps + 1))


def test_a_termination_keeps_the_checkpoint_as_ctrl_c_does(tmp_path: Path) -> None:
    trainer = Trainer(model(), images(), CONFIG, tmp_path)
    trainer.fit(lambda report: signal.raise_signal(signal.SIGTERM) if report.step == 3 else None)
    assert trainer.stop is Stop.INTERRUPTED
    assert checkpoint.load(tmp_path).progress.step == 3


def test_weights_whose_validation_is_no_number_are_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first, which no others were better than, nor later ones, and patience does not wait for them."""
    values = iter([math.nan, 4.0, math.nan, 3.0, -math.inf])
    monkeypatch.setattr(trainer_module, "evaluate", lambda *arguments, **options: next(values))
    trainer = Trainer(model(), images(), replace(CONFIG, steps=20, max_inverse_error=None))
    seen = []
    trainer.fit(
        lambda report: seen.append(trainer.best and trainer.best.bits_per_dim) if report.step % 4 == 0 else None
    )
    assert seen == [None, 4.0, 4.0, 3.0, 3.0]
    monkeypatch.setattr(trainer_module, "evaluate", lambda *arguments, **options: math.nan)
    impatient = Trainer(model(), images(), replace(CONFIG, steps=100, patience=2, max_inverse_error=None))
    assert impatient.fit() is Stop.PATIENCE
    assert impatient.step == 8


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"model": lambda: torch.nn.Linear(1, 1)},
            TypeError,
            "trains flows on images, of inverse_flow.models, not Linear",
        ),
        ({"model": lambda: model().double()}, TypeError, r"float32, got torch.float64: call model.float\(\)"),
        ({"images": lambda: images() / 256}, TypeError, "uint8, got torch.float32"),
        ({"images": lambda: images()[0]}, ValueError, r"images \(N, 1, 4, 4\), got \(1, 4, 4\)"),
        ({"images": lambda: images().expand(-1, 3, -1, -1)}, ValueError, r"got \(21, 3, 4, 4\)"),
        ({"context": lambda: torch.eye(21)}, ValueError, "context of 0 channels, got 21"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_the_trainer_is_made(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": model, "images": images, "context": lambda: None} | changed
    with pytest.raises(error, match=message):
        Trainer(given["model"](), given["images"](), CONFIG, context=given["context"]())


def test_a_method_whose_package_is_not_imported_is_asked_for() -> None:
    """As in a program that reads the checkpoint of a run by parts without the room of that name."""
    config = TrainConfig()
    object.__setattr__(config, "parts", {"cut": "across", "count": 2})
    with pytest.raises(ValueError, match=r"trained by parts: import inverse_flow\.parts"):
        Trainer(model(), images(), config)


def test_the_result_is_a_copy_that_can_be_trained_on() -> None:
    trainer = Trainer(model(), images(), replace(CONFIG, steps=1, validation=0))
    trainer.fit()
    averaged = [parameter.clone() for parameter in trainer.averaged_model.parameters()]
    flow = trainer.result()
    flow.log_prob(torch.rand(2, *flow.event_shape)).mean().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1)
    assert all(map(torch.equal, averaged, trainer.averaged_model.parameters()))
