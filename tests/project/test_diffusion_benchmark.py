"""benchmarks/diffusion.py and unet.py: the differential equation is solved and its density estimated as they say,
samples are of what was trained on, and a run that is started again finds what it has done."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse_flow.data import load
from inverse_flow.flows import Flow
from inverse_flow.models import Glow, build, describe
from inverse_flow.training import TrainConfig, Workers
from inverse_flow.training.quality import Quality, Value

SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """v(y, t) = a y, which counts its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.calls = 0

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * y


class Sum(nn.Module):
    """v(y, t) of two networks."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return torch.stack([network(y, t) for network in self.networks]).sum(0)


def flow_matching(scripts: Any, width: int = 3) -> Any:
    """With no parameter at its initial value."""
    torch.manual_seed(0)
    model = scripts.unet.FlowMatching(SHAPE, 1, 1, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_linear_equation_is_solved(scripts: Any) -> None:
    """y(1) = eᵃ y(0), and the trace is a D."""
    layer, x = scripts.unet.Transport(Linear(0.3), 200), torch.rand(3, *SHAPE, dtype=torch.float64)
    z, logdet = layer(x)
    torch.testing.assert_close(z, (2 * x - 1) * torch.tensor(-0.3).exp(), rtol=1e-4, atol=1e-6)
    wanted = torch.full((3,), 16 * (torch.tensor(2.0).log().item() - 0.3), dtype=torch.float64)
    torch.testing.assert_close(logdet, wanted, rtol=1e-4, atol=0)
    back, other = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other, -logdet)
    torch.testing.assert_close(layer.images(z), back, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("evaluations", [1, 2, 6])
def test_the_network_is_evaluated_so_often(scripts: Any, evaluations: int) -> None:
    velocity = Linear(0.3)
    layer = scripts.unet.Transport(velocity, evaluations)
    layer.images(torch.ones(2, *SHAPE, dtype=torch.float64))
    assert velocity.calls == evaluations
    layer.evaluations = 3
    with pytest.raises(ValueError, match="1 or even, two for each step, got 3"):
        layer.images(torch.ones(2, *SHAPE))


def test_the_density_is_right_on_average(scripts: Any) -> None:
    """Beside the determinant of the Jacobian of the same map, of a network and a linear part with a trace."""
    network, linear = flow_matching(scripts).double().transport.velocity, Linear(0.2)
    layer, x = scripts.unet.Transport(Sum(network, linear), 60), torch.rand(1, *SHAPE, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda y: layer._integrate(2 * y - 1, 1.0, 0.0, layer.velocity).flatten(), x
    )
    exact = torch.linalg.slogdet(jacobian.view(16, 16)).logabsdet
    estimates = layer(x.expand(500, *SHAPE))[1]
    error = estimates.std() / 500**0.5
    assert 1e-3 < error < 0.05 * abs(exact)
    assert abs(estimates.mean() - exact) < 4 * error


def test_what_was_trained_is_what_is_sampled(scripts: Any) -> None:
    """One image alone: the loss is that of Gaussian noise before, and samples come close to the image after."""
    torch.manual_seed(0)
    model = scripts.unet.FlowMatching(SHAPE, 1, 1, 8)
    method = scripts.unet.Matching(model, TrainConfig(learning_rate=5e-3), Workers())
    images = torch.full((64, *SHAPE), 0.5)
    images[..., 2:] = 0.9

    def step() -> float:
        result = method.step(images, step=0, progress=0.0, rate_factor=1.0)
        return float(result.columns["matching"])

    assert step() == pytest.approx(1 + 0.5 * 0.8**2, abs=0.15)
    for _ in range(150):
        last = step()
    assert last < 0.5
    samples = model.sample(50, generator=torch.Generator().manual_seed(0))
    assert (samples.mean(0) - images[0]).abs().max() < 0.1
    assert samples.std(0).max() < 0.2


def test_the_model_comes_back_from_its_description(scripts: Any) -> None:
    model = flow_matching(scripts)
    twin = build(describe(model))
    twin.load_state_dict(model.state_dict())
    assert isinstance(twin, Flow)
    samples = [m.sample(2, generator=torch.Generator().manual_seed(0)) for m in (model, twin)]
    assert torch.equal(*samples)
    assert samples[0].std() > 0.1


def test_a_width_gives_the_parameters(scripts: Any) -> None:
    diffusion, shape = scripts.diffusion, (1, 28, 28)
    found = diffusion.candidates_of(scripts.density.PRESETS["mnist"], ["FlowMatching"], shape, 200_000)
    count = found["FlowMatching"].build(shape).num_parameters
    assert abs(count - 200_000) <= scripts.runs.PARAMETER_MARGIN * 200_000


def test_steps_are_timed_as_they_are_trained(scripts: Any, source: str) -> None:
    candidates = {
        "Glow": scripts.runs.Candidate("Glow", {"levels": 1, "steps": 1, "hidden": 4}),
        "FlowMatching": scripts.runs.Candidate("FlowMatching", {"levels": 1, "hidden": 2}),
    }
    preset, device = scripts.density.PRESETS["mnist"], torch.device("cpu")
    found = scripts.diffusion.step_seconds(candidates, preset, load(source), device, 0.0, time.process_time)
    assert set(found) == set(candidates)
    assert all(seconds > 0 for seconds in found.values())


def test_samplers_draw_from_the_same_latents_in_turn(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = scripts.diffusion
    monkeypatch.setattr(diffusion, "TIMED_IMAGES", 4)
    flow = Glow((1, 8, 8), 1, 1, 4)
    flow.train()(torch.rand(8, 1, 8, 8))
    samplers = diffusion.samplers_of("Glow", flow.eval(), (), (0.5, 1.0))
    samplers |= diffusion.samplers_of("FlowMatching", flow_matching(scripts), (1, 4), ())
    order: list[Any] = []

    def told(key: Any) -> Any:
        return lambda n, latents: (order.append(key), samplers[key](n, latents))[1]

    ways = {key: told(key) for key in samplers}
    drawn = diffusion.sample_in_turn(ways, 6, 0, torch.device("cpu"), time.perf_counter)
    assert order == [*samplers, *reversed(samplers)]
    assert {len(seconds) for seconds in drawn["seconds"].values()} == {2}
    for (name, setting), images in drawn["images"].items():
        assert images.shape == (6, *((1, 8, 8) if name == "Glow" else SHAPE))
        latents = torch.Generator().manual_seed(0)
        again = samplers[name, setting](4, latents)
        assert torch.equal(images[:4], (again * 256).floor().clamp(0, 255).byte())
    assert not torch.equal(drawn["images"]["FlowMatching", 1], drawn["images"]["FlowMatching", 4])


def test_what_is_remembered_is_made_once(scripts: Any, tmp_path: Path) -> None:
    made: list[int] = []

    def make(value: int) -> dict[str, Any]:
        made.append(value)
        return {"value": value, "tensor": torch.ones(2)}

    path = tmp_path / "folder" / "kept.pt"
    for _ in range(2):
        assert scripts.diffusion.remembered(path, ["a", 1], make, 7)["value"] == 7
    assert made == [7]
    with pytest.raises(ValueError, match=r"is of \['a', 1\] instead of \['a', 2\]"):
        scripts.diffusion.remembered(path, ["a", 2], make, 7)


class Judge:
    """All figures of samples are their mean, and those of test images 1."""

    count = 20
    names = ("Fréchet distance", "kernel distance", "precision", "recall", "density", "coverage", "Vendi score")

    def __init__(self, *_: Any) -> None:
        self.floor = self.figures(1.0)

    def figures(self, value: float) -> Any:
        return {network: {name: Value(value, 0.1) for name in self.names} for network in ("classifier", "random")}

    def measure(self, images: Tensor) -> Quality:
        assert images.shape == (20, 1, 28, 28)
        found, floor = self.figures(float(images.float().mean())), self.floor
        figures = {network: {"samples": found[network], "floor": floor[network]} for network in found}
        return Quality(20, "mnist", 0.99, figures, Value(0.5, 0.1))


def test_a_run_that_is_started_again_finds_what_it_has_done(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusion, candidate = scripts.diffusion, scripts.runs.Candidate
    small = {
        "FlowMatching": candidate("FlowMatching", {"levels": 1, "hidden": 2}),
        "InverseFlow": candidate("InverseFlow", {"levels": 1, "steps": 1, "hidden": 2}),
    }
    for name, value in {
        "TIMED_IMAGES": 20, "Judge": Judge, "candidates_of": lambda *_: small,
        "step_seconds": lambda candidates, *_: dict.fromkeys(candidates, 30.0),
    }.items():  # fmt: skip
        monkeypatch.setattr(diffusion, name, value)
    arguments = ["--minutes", "1", "--test-images", "4", "--threads", "1", "--out", str(tmp_path / "runs")]
    arguments += ["--evaluations", "1", "2", "--temperatures"]
    found = []
    for name in ("first.json", "second.json"):
        plot = ["--plot", str(tmp_path / "plot")] if found else []
        assert diffusion.main([*arguments, "0.8", "--json", str(tmp_path / name), *plot]) == 0
        found.append(json.loads((tmp_path / name).read_text()))
        for done in ("density_of", "sample_in_turn", "quality_row", "step_seconds"):
            monkeypatch.setattr(diffusion, done, None)  # nothing is made a second time
    assert found[0]["rows"] == found[1]["rows"]
    assert [(row["model"], row["setting"]) for row in found[0]["rows"]] == [
        ("FlowMatching", 1), ("FlowMatching", 2), ("InverseFlow", 0.8),
    ]  # fmt: skip
    assert [row["steps"] for row in found[0]["densities"]] == [2, 2]
    assert all(row["ms"] > 0 for row in found[0]["rows"])
    assert (tmp_path / "plot.png").stat().st_size > 1000
    captured = capsys.readouterr()
    assert "| FlowMatching, 2 evaluations" in captured.out
    assert "| test images" in captured.out
    assert diffusion.main([*arguments, "0.9"]) == 1
    assert "remove it, or give another folder" in capsys.readouterr().err
