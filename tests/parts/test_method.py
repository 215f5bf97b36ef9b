from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow.flows import NonFiniteError
from inverse_flow.models import InverseFlow
from inverse_flow.parts import ByParts, PartsConfig, run_frozen
from inverse_flow.parts.cache import FrozenOutputs
from inverse_flow.training import Batches, TrainConfig, Trainer, Workers, checkpoint
from inverse_flow.training.log import read_log

from ..training.toy import Fault, images, losses, run

# 16 images to train on: 4 steps an epoch, 12 steps before the finish and 6 in it.
CONFIG = TrainConfig(
    steps=18, batch_size=4, learning_rate=3e-3, warmup_steps=3, flip=True, validation=5, evaluate_every=4
)
SCHEDULES: dict[str, PartsConfig] = {
    "sequential": PartsConfig("blocks", 2, "sequential"),
    "sequential, kept": PartsConfig("blocks", 2, "sequential", cache_epochs=1),
    "batch": PartsConfig("across", 2, "alternate", learning_rates=(1e-3, 5e-3)),
    "epoch": PartsConfig("across", 3, "alternate", turn="epoch"),
    "simultaneous": PartsConfig("blocks", 2, "simultaneous"),
}


def config(parts: PartsConfig, **changes: Any) -> TrainConfig:
    return replace(CONFIG, parts=parts, **changes)


def model() -> InverseFlow:
    torch.manual_seed(1)
    return InverseFlow((1, 4, 4), levels=2, steps=2, hidden=4)


def method(parts: PartsConfig, flow: InverseFlow | None = None) -> ByParts:
    settings = config(parts)
    return ByParts(flow or model(), settings, Workers(), Batches(images(), settings))


def batch() -> Tensor:
    return torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def weights(by_parts: ByParts) -> list[list[Tensor]]:
    return [[p.detach().clone() for _, p in part.named_parameters()] for part in by_parts.parts]


def changed(by_parts: ByParts, before: list[list[Tensor]]) -> list[bool]:
    return [not all(map(torch.equal, old, new)) for old, new in zip(before, weights(by_parts), strict=True)]


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("parts", SCHEDULES.values(), ids=SCHEDULES)
def test_the_bits_per_dimension_fall(parts: PartsConfig) -> None:
    trainer = Trainer(model(), images(), config(parts, steps=120, learning_rate=1e-2, evaluate_every=60))
    bits = [report.bits_per_dim for report in run(trainer)]
    assert sum(bits[-10:]) / 10 < sum(bits[:10]) / 10 - 1


@cache
def uncut(parts: PartsConfig) -> tuple[Trainer, list[Any]]:
    """A run that is not cut, once for all that are compared with it."""
    trainer = Trainer(model(), images(), config(parts))
    return trainer, losses(run(trainer))


@pytest.mark.alike
@pytest.mark.parametrize("parts", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("cut", [1, 7, 10, 14])
def test_a_run_cut_anywhere_and_resumed_is_the_uncut_run(tmp_path: Path, cut: int, parts: PartsConfig) -> None:
    """Cut in the first round, in the second and at its second drawing of kept outputs, and in the finish."""
    whole, expected = uncut(parts)
    first = losses(run(Trainer(model(), images(), config(parts), tmp_path), interrupt_at=cut))
    torch.manual_seed(99)
    resumed = Trainer.resume(checkpoint.load(tmp_path), images(), tmp_path)
    assert isinstance(resumed.method, ByParts)
    assert first + losses(run(resumed)) == expected
    for name, value in whole.result().state_dict().items():
        assert torch.equal(resumed.result().state_dict()[name], value), name
    assert losses(read_log(tmp_path / "log.csv")) == expected


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The losses of a run, and the folder of the same run, cut after its first step with new kept outputs."""
    settings = config(PartsConfig("blocks", 2, "sequential", cache_epochs=2), warmup_steps=10)
    folder = tmp_path_factory.mktemp("cut")
    run(Trainer(model(), images(), settings, folder), interrupt_at=7)
    return losses(run(Trainer(model(), images(), settings))), folder


@pytest.mark.parametrize("forgotten", ["optimizer", "steps", "round"])
def test_the_resume_test_can_fail(cut_run: tuple[list[Any], Path], forgotten: str) -> None:
    """Whatever of the state is forgotten, the losses differ: the comparison above is sharp enough to see it."""
    expected, folder = cut_run
    content = checkpoint.load(folder)
    kept = content.progress.method
    assert kept["steps"] == [6, 1]
    assert kept["round"] == [1, 1]
    kept[forgotten] = {"optimizer": {**kept["optimizer"], "state": {}}, "steps": [0, 0], "round": [1, 0]}[forgotten]
    assert losses(run(Trainer.resume(content, images()))) != expected[7:]


# ---------------------------------------------------------------------------------------------------- one step


def test_a_turn_changes_its_part_alone_and_its_buffers() -> None:
    by_parts = method(SCHEDULES["batch"])
    for step in range(4):
        before = weights(by_parts)
        result = by_parts.step(batch(), step=step, progress=0.0, rate_factor=1.0)
        assert changed(by_parts, before) == [step % 2 == 0, step % 2 == 1]
        assert result.columns == {"part": step % 2 + 1}
    assert by_parts.steps == [2, 2]


def test_the_finish_changes_all_parts() -> None:
    by_parts = method(SCHEDULES["batch"])
    before = weights(by_parts)
    result = by_parts.step(batch(), step=0, progress=0.9, rate_factor=1.0)
    assert changed(by_parts, before) == [True, True]
    assert result.columns == {"part": 0}


def test_a_step_of_a_part_by_hand() -> None:
    """Adam's first step moves a weight by its part's learning rate against the gradient of the truncated objective."""
    parts = PartsConfig("blocks", 2, "alternate", learning_rates=(1e-3, 5e-3))
    by_parts, twin = method(parts), method(parts)
    by_parts.steps = [100, 100]  # the warm-up is over
    for k, rate in enumerate(parts.learning_rates):
        # Both have seen the same steps so far; the twin computes the gradient with a graph through all the parts.
        twin.model.load_state_dict(by_parts.model.state_dict())
        twin.model.train()
        own = [p for _, p in twin.parts[k].named_parameters()]
        for p in twin.model.parameters():
            p.requires_grad_(any(p is mine for mine in own))
        result = by_parts.step(batch(), step=k, progress=0.0, rate_factor=1.0)
        carried = run_frozen(twin.parts[:k], batch())
        out = twin.parts[k](carried)
        log_prob = twin.model.base.log_prob((*out.latents, out.x)) + out.logdet
        bits = 8 - log_prob.mean() / (16 * torch.log(torch.tensor(2.0)))
        gradients = torch.autograd.grad(bits, own, materialize_grads=True)
        assert result.log_prob == pytest.approx(log_prob.mean().item(), rel=1e-6)
        assert result.bits_per_dim == pytest.approx(bits.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
        for p, (_, moved), gradient in zip(own, by_parts.parts[k].named_parameters(), gradients, strict=True):
            clear = gradient.abs() > 1e-5  # far above Adam's epsilon
            torch.testing.assert_close((moved - p)[clear], -rate * gradient.sign()[clear], rtol=1e-2, atol=1e-8)


def test_simultaneous_parts_take_the_steps_that_they_would_take_alone() -> None:
    """The output that goes on is that of the weights before the step: no part waits for another's update."""
    together = method(SCHEDULES["simultaneous"])
    together.step(batch(), step=0, progress=0.0, rate_factor=1.0)
    alone = method(SCHEDULES["simultaneous"])
    alone.model.train()
    inputs = [run_frozen(alone.parts[:k], batch()) for k in range(2)]
    for k in (1, 0):
        alone.train_part(k, inputs[k], step=0, rate_factor=1.0)
    for name, value in together.model.state_dict().items():
        assert torch.equal(alone.model.state_dict()[name], value), name


def test_no_graph_is_kept_for_the_parts_before() -> None:
    """The bytes saved for the backward pass of part 2 are those of part 2 run on a tensor of its own."""
    by_parts = method(SCHEDULES["batch"])
    by_parts.step(batch(), step=0, progress=0.0, rate_factor=1.0)
    by_parts.step(batch(), step=1, progress=0.0, rate_factor=1.0)  # all ActNorms are initialised

    def saved(step: int, progress: float) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            by_parts.step(batch(), step=step, progress=progress, rate_factor=1.0)
        return count

    first, second, whole = saved(2, 0.0), saved(3, 0.0), saved(4, 1.0)
    assert 0.9 * whole < first + second < 1.1 * whole


def test_a_part_warms_up_when_its_first_turn_comes() -> None:
    by_parts = method(SCHEDULES["sequential"])
    rates = []
    for step, progress in enumerate([0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55]):
        by_parts.step(batch(), step=step, progress=progress, rate_factor=1.0)
        rates.append(by_parts.optimizer.param_groups[0]["lr"])
    full = CONFIG.learning_rate
    assert rates == pytest.approx([full / 3, full * 2 / 3, full, full] * 2)
    by_parts.step(batch(), step=8, progress=0.56, rate_factor=0.1)
    assert by_parts.optimizer.param_groups[0]["lr"] == pytest.approx(full / 10)  # the schedule of the run has the say


def test_every_part_has_its_learning_rate_in_the_finish_too() -> None:
    by_parts = method(SCHEDULES["batch"])
    by_parts.step(batch(), step=0, progress=0.9, rate_factor=0.5)
    assert [group["lr"] for group in by_parts.optimizer.param_groups] == pytest.approx([0.5e-3, 2.5e-3])


# ---------------------------------------------------------------------------------------------- kept outputs


def test_kept_outputs_are_those_of_the_images_with_one_draw_of_noise() -> None:
    by_parts = method(SCHEDULES["sequential, kept"])
    flow, batches = by_parts.model, by_parts.batches
    assert batches is not None
    plain = replace(by_parts.config, flip=False)
    kept = FrozenOutputs(by_parts.parts[:1], batches, plain, draw=3)
    # The inverse gives back the images, each with its noise of less than one level.
    flow.eval()
    with torch.no_grad():
        out = by_parts.parts[1](kept.carried)
        x, _ = flow.inverse((*out.latents, out.x))
    noise = 256 * x - batches.images
    assert -1e-3 < noise.min() < 0.1
    assert 0.9 < noise.max() < 1 + 1e-3
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)  # uniform on [0, 1)
    rows = torch.tensor([4, 0])
    assert torch.equal(kept(rows).x, kept.carried.x[rows])
    assert torch.equal(kept(rows).latents[0], kept.carried.latents[0][rows])
    assert torch.equal(kept(rows).logdet, kept.carried.logdet[rows])
    assert kept.bytes == len(batches.images) * (16 + 1) * 4


def test_another_draw_has_other_noise_and_flips_and_the_same_draw_the_same() -> None:
    by_parts = method(SCHEDULES["sequential, kept"])
    assert by_parts.batches is not None
    first, again, other = (
        FrozenOutputs(by_parts.parts[:1], by_parts.batches, by_parts.config, draw).carried for draw in (0, 0, 1)
    )
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


def test_outputs_are_computed_once_in_so_many_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    make = FrozenOutputs.__init__

    def spy(self: FrozenOutputs, parts: Any, batches: Any, config: Any, draw: int) -> None:
        drawn.append(draw)
        make(self, parts, batches, config, draw)

    monkeypatch.setattr(FrozenOutputs, "__init__", spy)
    # Epochs of 4 steps; the second part has the steps from 14 to 27, in epochs 3 to 6.
    parts = PartsConfig("blocks", 2, "sequential", cache_epochs=2)
    run(Trainer(model(), images(), config(parts, steps=42)))
    assert drawn == [3, 5]


def test_kept_outputs_are_used() -> None:
    """The images of the batch make no difference in a round with kept outputs."""
    twins = [method(SCHEDULES["sequential, kept"]) for _ in range(2)]
    results = [
        twin.step(images, step=8, progress=0.5, rate_factor=1.0)
        for twin, images in zip(twins, (batch(), batch() / 2), strict=True)
    ]
    assert results[0] == results[1]
    assert twins[0].round == (1, 1)


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("step", "progress"), [(1, 0.0), (0, 0.9)], ids=["its part", "the finish"])
def test_a_loss_that_is_not_finite_names_its_layer(step: int, progress: float) -> None:
    broken = model()
    broken.layers[6].layers[3] = Fault(in_gradient=False)  # type: ignore[index]
    by_parts = method(PartsConfig("blocks", 2), broken)
    by_parts.step(batch(), step=0, progress=0.0, rate_factor=1.0)  # the first part does not see it
    message = rf"layers.6.layers.3: .* of the result of Fault.forward .*the loss of step {step + 1} is nan"
    with pytest.raises(NonFiniteError, match=message):
        by_parts.step(batch(), step=step, progress=progress, rate_factor=1.0)


def test_a_gradient_that_is_not_finite_names_its_parameter() -> None:
    broken = model()
    broken.layers[6].layers[3] = Fault(in_gradient=True)  # type: ignore[index]
    by_parts = method(PartsConfig("blocks", 2), broken)
    with pytest.raises(FloatingPointError, match=r"gradients of step 2 are not finite: layers.6.layers.3.weight$"):
        by_parts.step(batch(), step=1, progress=0.0, rate_factor=1.0)


def test_errors_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"needs TrainConfig\.parts"):
        ByParts(model(), CONFIG, Workers())
    for name in ("epoch", "sequential, kept"):
        with pytest.raises(ValueError, match="need the batches"):
            ByParts(model(), config(SCHEDULES[name]), Workers())
    with pytest.raises(ValueError, match="into 1 to 2 parts, got 3"):
        Trainer(model(), images(), config(PartsConfig("blocks", 3)))


def test_a_method_of_ones_own_can_be_by_parts() -> None:
    settings = config(SCHEDULES["batch"])
    trainer = Trainer(model(), images(), settings, method=partial(ByParts, batches=None))
    assert losses(run(trainer)) == losses(run(Trainer(model(), images(), settings)))
