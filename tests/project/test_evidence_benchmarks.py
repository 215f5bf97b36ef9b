"""The helpers of the benchmarks that train and sample: what they compare is what they say, and wrong results stop
them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from inverse_flow import InverseConv2d
from inverse_flow.flows import Flow, PeriodicConv, Reverse, prepare_sampling
from inverse_flow.models import Glow, InverseConvClassifier, InverseFlow, build, describe
from inverse_flow.training import Stop, TrainConfig, Trainer, dequantization

SHAPE = (1, 8, 8)


def perturbed(flow: Flow) -> Flow:
    """In evaluation mode, with no parameter at its initial value."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


# -------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", ["InverseFlow", "FInCFlow", "Glow", "RealNVP"])
def test_widths_give_the_wanted_parameters(scripts: Any, kind: str) -> None:
    candidate = scripts.runs.Candidate(kind, {"levels": 2, "steps": 1})
    matched = scripts.runs.match_parameters(candidate, SHAPE, 20_000)
    count = matched.build(SHAPE).num_parameters
    assert abs(count - 20_000) <= scripts.runs.PARAMETER_MARGIN * 20_000
    # No other width is closer.
    for hidden in (matched.options["hidden"] - 1, matched.options["hidden"] + 1):
        assert abs(matched.but(hidden=hidden).build(SHAPE).num_parameters - 20_000) >= abs(count - 20_000)


def test_a_number_of_parameters_that_no_width_gives_is_refused(scripts: Any) -> None:
    candidate = scripts.runs.Candidate("Glow", {"levels": 2, "steps": 4})
    with pytest.raises(ValueError, match="no width gives Glow 50 parameters"):
        scripts.runs.match_parameters(candidate, SHAPE, 50)


def test_a_run_is_gone_on_with(scripts: Any, source: str, tmp_path: Path) -> None:
    candidate = scripts.runs.Candidate("InverseFlow", {"levels": 1, "steps": 1, "hidden": 4})
    config = TrainConfig(steps=6, batch_size=8, evaluate_every=2)

    def run(folder: str) -> Any:
        return scripts.runs.train(candidate, source, config, tmp_path / folder)

    uncut = run("uncut")
    step = Trainer._advance

    def interrupted(trainer: Trainer) -> Any:
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut")  # at the checkpoint of step 2
    cut = run("cut")
    assert cut.trainer.step == uncut.trainer.step == 6
    assert uncut.trainer.stop is Stop.STEPS
    weights = zip(cut.trainer.result().parameters(), uncut.trainer.result().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    # A finished run is not trained any further.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_advance", interrupted)
        assert run("cut").trainer.step == 6


def test_an_interrupted_run_says_so(scripts: Any, source: str, tmp_path: Path) -> None:
    candidate = scripts.runs.Candidate("Glow", {"levels": 1, "steps": 1, "hidden": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda *_: Stop.INTERRUPTED)
        with pytest.raises(scripts.runs.Interrupted, match="goes on"):
            scripts.runs.train(candidate, source, TrainConfig(steps=1, batch_size=8), tmp_path / "run")


def test_other_settings_are_refused(scripts: Any, source: str, tmp_path: Path) -> None:
    candidate = scripts.runs.Candidate("Glow", {"levels": 1, "steps": 1, "hidden": 4})
    config = TrainConfig(steps=1, batch_size=8)
    folder = tmp_path / "run"
    scripts.runs.train(candidate, source, config, folder)
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        scripts.runs.train(candidate, source, TrainConfig(steps=1, batch_size=8, seed=1), folder)
    with pytest.raises(ValueError, match="hidden 4 instead of 5"):
        scripts.runs.train(candidate.but(hidden=5), source, config, folder)
    other = scripts.runs.Candidate("InverseFlow", candidate.options)
    with pytest.raises(ValueError, match="kind 'Glow' instead of 'InverseFlow'"):
        scripts.runs.train(other, source, config, folder)


def test_figures_of_a_model(scripts: Any, source: str, tmp_path: Path) -> None:
    candidate = scripts.runs.Candidate("Glow", {"levels": 1, "steps": 1, "hidden": 4})
    run = scripts.runs.train(candidate, source, TrainConfig(steps=2, batch_size=8), tmp_path / "run")
    found = scripts.runs.summary_of(run, run.trainer.result())
    assert found["test_images"] == len(run.data.test) == 4
    assert found["nats"] == pytest.approx(found["bits_per_dim"] * 64 * math.log(2))
    assert 0 < found["standard_error"] < found["bits_per_dim"]
    assert (found["steps"], found["images_seen"], found["parameters"]) == (2, 16, run.trainer.model.num_parameters)
    assert scripts.runs.images_of(run.data, 10, torch.device("cpu")).shape == (10, *SHAPE)


def test_a_wrong_sampler_is_not_timed(scripts: Any) -> None:
    model = perturbed(InverseFlow(SHAPE, 2, 1, 4))
    sampler = prepare_sampling(model)
    assert scripts.runs.check_sampler(model, sampler) < 1e-5
    weight = next(buffer for name, buffer in sampler.named_buffers() if name.endswith("weight"))
    weight.mul_(1.01)
    with pytest.raises(ArithmeticError):
        scripts.runs.check_sampler(model, sampler)


def test_variational_dequantization_is_no_part_of_sampling(scripts: Any) -> None:
    model = Glow(SHAPE, 1, 1, 4, logit_margin=1e-3)
    dequantization.attach(model, TrainConfig(dequantization="variational"))
    perturbed(model)
    sampled = scripts.runs.without_dequantizer(model)
    assert len(sampled.layers) == len(model.layers) - 1
    latents = [torch.randn(3, *shape) for shape in model.latent_shapes]
    with torch.no_grad():
        cells = [(256 * flow.inverse(latents)[0]).floor() for flow in (sampled, model)]
    assert torch.equal(*cells)
    assert set(scripts.runs.timed_works(model, torch.rand(2, *SHAPE))) == {"ST", "FT"}


# --------------------------------------------------------------------------------------------------- plain solve


@pytest.mark.parametrize("corner", ["identity", "unit_triangular", "plu"])
@pytest.mark.parametrize("kernel_size", [2, (3, 2), (1, 4)])
@pytest.mark.parametrize("order", ["top_left", "top_right", "bottom_left", "bottom_right", "four"])
def test_plain_solve_is_the_solve(scripts: Any, corner: str, kernel_size: int | tuple[int, int], order: str) -> None:
    orders: Any = ("top_left", "bottom_right", "top_right", "bottom_left") if order == "four" else order
    groups = 4 if order == "four" else 2
    layer = InverseConv2d(8, kernel_size, groups=groups, order=orders, corner=corner).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
        found, _ = scripts.rivals.PlainSolve(layer)(x)
        torch.testing.assert_close(found, layer(x)[0])


# ------------------------------------------------------------------------------------------------ other convolutions


def self_normalizing(scripts: Any, *, exact: bool = False) -> Any:
    """One with a kernel as large as its images of 3 × 3, so that R can be the exact inverse."""
    layer = PeriodicConv(2).double()
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn_like(layer.weight))
        layer = scripts.rivals.SelfNormalizing(layer, penalty=0.5)
        if exact:
            unit = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
            unit[:, :, 1, 1] = torch.eye(2)
            layer.back.weight.copy_(layer.direct.inverse(unit)[0].transpose(0, 1).flip(2, 3))
    return layer


def test_self_normalizing_values_are_exact_and_gradients_are_those_with_r_for_the_inverse(scripts: Any) -> None:
    layer, x = self_normalizing(scripts, exact=True), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    z, logdet = layer(x)
    torch.testing.assert_close(layer.inverse(z)[0], x)
    torch.testing.assert_close(layer.inverse(z)[1], -logdet)
    expected_z, expected = layer.direct(x)
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(logdet, expected)
    weight = layer.direct.weight
    found, wanted = (torch.autograd.grad(value.sum(), weight)[0] for value in (logdet, expected))
    torch.testing.assert_close(found, wanted)


def test_self_normalizing_follows_its_inverse(scripts: Any) -> None:
    layer, x = self_normalizing(scripts), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    z, logdet = layer(x)
    torch.testing.assert_close(logdet, layer.direct.log_det(x))
    error = (layer.back.convolve(z.detach()) - x).square().sum()
    found, wanted = (torch.autograd.grad(v, layer.back.weight)[0] for v in (logdet.sum(), -0.5 * error))
    torch.testing.assert_close(found, wanted)
    optimizer = torch.optim.Adam(layer.back.parameters(), 3e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (-layer(torch.randn(16, 2, 3, 3, dtype=torch.float64))[1]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=0, atol=0.05)


def test_rivals_build_train_and_come_back(scripts: Any) -> None:
    for name, rival in scripts.rivals.RIVALS.items():
        model = rival.but(levels=2, steps=1, hidden=4).build(SHAPE)
        x = torch.rand(4, *SHAPE)
        model.train()(x)
        assert model.eval().log_prob(x).isfinite().all()
        error = (model.inverse(model(x)[0])[0] - x).abs().max()
        assert error < (0.5 if name == "SNF" else 1e-4)
        twin = build(describe(model))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.eval().log_prob(x), model.log_prob(x))
    with pytest.raises(ValueError, match="memory_efficient needs inverses"):
        scripts.rivals.RIVALS["SNF"].but(memory_efficient=True).build(SHAPE)
    with pytest.raises(ValueError, match="must be odd"):
        scripts.rivals.RIVALS["SNF"].but(kernel_size=2).build(SHAPE)


# ------------------------------------------------------------------------------------------------------ sampling


def test_table_of_rivals(scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--levels", "1", "--steps", "1", "--hidden", "2", "--images", "2", "--threads", "1", "--budget", "0"]
    path = tmp_path / "found.json"
    assert scripts.sampling.main(["--rivals", "InverseFlow", "Emerging", "SNF", *size, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rivals"]
    assert [row["name"] for row in rows] == ["InverseFlow", "Emerging", "SNF"]
    assert all(0 < row["ST_ms_p20"] <= row["ST_ms"] and row["FT_ms"] > 0 for row in rows)
    assert "sampling" not in json.loads(path.read_text())
    assert "Emerging" in capsys.readouterr().out


def test_finc_order_exchanges_the_directions(scripts: Any) -> None:
    layer = InverseConv2d(4)
    with torch.no_grad():
        layer.weight.add_(0.1)
    flow = Flow([layer], (4, 5, 5))
    finc = scripts.sampling.replaced(flow, Reverse)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(finc.inverse([x])[0], layer(x)[0])
    assert torch.equal(finc(x)[0][0], layer.inverse(x)[0])
    assert torch.equal(flow(x)[0][0], layer(x)[0])  # the flow itself is as it was
    assert sum(p.numel() for p in finc.parameters()) == sum(p.numel() for p in flow.parameters())


def make_ways(scripts: Any) -> Any:
    device = torch.device("cpu")
    flow, glow = (scripts.sampling.make(kind, SHAPE, device, steps=2, hidden=4) for kind in ("InverseFlow", "Glow"))
    return scripts.sampling.ways(flow, glow, 3, device, compiled=False)


def test_every_way_to_sample_is_timed_against_its_rival(scripts: Any) -> None:
    works, differences = make_ways(scripts)
    assert all(error < 1e-3 for error in differences.values())
    assert all(work().shape == (3, *SHAPE) for work in works.values())
    times, ratios = scripts.sampling.measure(works, torch.device("cpu"), 0.0)
    assert set(times) == set(works)
    pairs = {(row["ours"], row["against"]) for row in ratios}
    assert ("InverseFlow, prepared", "Glow") in pairs
    assert ("InverseFlow, prepared", "FInC order, prepared, plain-torch solve") in pairs
    for row in ratios:
        assert row["ratio"] == pytest.approx(times[row["ours"]]["ms"] / times[row["against"]]["ms"])


def test_wrong_samples_are_not_timed(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = scripts.rivals.PlainSolve
    right = solve.forward

    def wrong(self: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, logdet = right(self, x, context)
        return 1.01 * z, logdet

    monkeypatch.setattr(solve, "forward", wrong)
    with pytest.raises(ArithmeticError):
        make_ways(scripts)


# ----------------------------------------------------------------------------------------- density and ablation


def test_presets(scripts: Any) -> None:
    density = scripts.density
    for name, preset in density.PRESETS.items():
        assert preset.image_shape is not None
        candidates = preset.candidates()
        assert list(candidates) == [*density.MODELS, *scripts.rivals.RIVALS]
        for candidate in candidates.values():
            candidate.config(preset.image_shape)
        assert density.train_config(preset, 1.0, 0).minutes == 1.0
        assert density.train_config(preset, 1.0, 0, "SNF").max_inverse_error is None
        # Figures on a slice are never set beside those on the complete set.
        assert not (preset.paper and ("slice" in name or name == "embedded"))
    assert density.PRESETS["mnist"].parameters <= 1_600_000


def test_table_of_densities(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    density = scripts.density
    row = {
        "bits_per_dim": 1.5, "standard_error": 0.01, "nats": 815.0, "ST_ms": 12.0, "FT_ms": 34.5,
        "parameters": 1234, "training_seconds": 60.0, "images_seen": 5000, "reconstruction_error": 2e-6,
    }  # fmt: skip
    lines = density.table({"Glow": [row]}, {}, density.PRESETS["mnist"].paper)
    scripts.harness.Table(density.COLUMNS).add(*lines)
    printed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert printed[2] == ["Glow", "1.500 ± 0.010", "815", "12.0", "34.5", "2e-06", "1,234", "1.0", "5,000"]
    assert printed[3] == ["paper: Inverse-Flow", "1.31", "–", "52.0", "–", "–", "1,600,000", "–", "–"]


def test_rivals_are_trained_where_they_are_named(scripts: Any) -> None:
    density = scripts.density
    few = ["--preset", "embedded", "--parameters", "40000"]
    default = density.chosen(density.parse_arguments(few), (1, 28, 28))
    assert list(default) == list(density.MODELS)
    named = density.chosen(density.parse_arguments([*few, "--models", "SNF", "Periodic", "Emerging"]), (1, 28, 28))
    assert list(named) == ["SNF", "Periodic", "Emerging"]
    # SNF's config says that it is no Periodic, whose convolution it has.
    assert all(density.same_model(named, (1, 28, 28))[name] == name for name in named)


def test_times_of_two_models(scripts: Any) -> None:
    models = {"Glow": perturbed(Glow(SHAPE, 1, 1, 2)), "InverseFlow": perturbed(InverseFlow(SHAPE, 1, 1, 2))}
    times = scripts.density.measure_times(models, torch.rand(4, *SHAPE), torch.device("cpu"), 0.0)
    assert set(times) == set(models)
    for row in times.values():
        assert 0 < row["ST_ms_p20"] <= row["ST_ms"] <= row["ST_ms_p80"]
        assert 0 < row["FT_ms_p20"] <= row["FT_ms"] <= row["FT_ms_p80"]


def test_a_model_is_not_trained_twice(scripts: Any) -> None:
    candidates = scripts.density.variants(2, 1, 4, None)
    first = scripts.density.same_model(candidates, SHAPE)
    assert first["Glow"] == first["FInCFlow, no inverse conv"] == "InverseFlow, no inverse conv"
    assert first["Glow, inverse conv"] == "InverseFlow"
    assert first["FInCFlow"] == "FInCFlow"
    assert first["InverseFlow, activation spline"] == "InverseFlow, activation spline"
    for name, other in first.items():
        counts = [candidates[n].build(SHAPE).num_parameters for n in (name, other)]
        assert counts[0] == counts[1]


def test_ablation_differences_are_to_the_named_model(scripts: Any) -> None:
    rows = {
        "Glow": [{"bits_per_dim": 2.0, "seed": 4}, {"bits_per_dim": 3.0, "seed": 5}],
        "Glow, inverse conv": [{"bits_per_dim": 1.5, "seed": 4}, {"bits_per_dim": 2.7, "seed": 5}],
        "Glow, activation": [{"bits_per_dim": 2.5, "seed": 5}],  # seed 4 failed
    }
    found = scripts.density.compare_rows(rows)
    assert found["Glow, inverse conv"]["difference"] == pytest.approx(-0.4)
    assert found["Glow, inverse conv"]["spread_over_seeds"] == pytest.approx(0.2)
    assert found["Glow, activation"]["difference"] == pytest.approx(-0.5)
    assert found["Glow"]["difference"] == 0


# ---------------------------------------------------------------------------------------------------- classifier


def test_shifted_images(scripts: Any) -> None:
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    seen = set()
    for seed in range(40):
        moved = scripts.classifier.shifted(x, 1, torch.Generator().manual_seed(seed))
        assert moved.shape == x.shape
        seen.add(tuple(moved.flatten().tolist()))
    places = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    padded = torch.zeros(6, 6)
    padded[1:5, 1:5] = x
    assert seen == {tuple(padded[1 - d : 5 - d, 1 - r : 5 - r].flatten().tolist()) for d, r in places}


def test_accuracy(scripts: Any) -> None:
    model = InverseConvClassifier((1, 4, 4), classes=3, hidden=4)
    images = torch.randn(10, 1, 4, 4)
    labels = model.predict(images)
    assert scripts.classifier.accuracy(model, images, labels) == 1
    assert scripts.classifier.accuracy(model, images, (labels + 1) % 3) == 0
    assert scripts.classifier.accuracy(model, images, torch.cat((labels[:4], (labels[4:] + 1) % 3))) == 0.4


# ------------------------------------------------------------------------------------------------ gradient norms


def test_norms_are_those_before_clipping(scripts: Any) -> None:
    model = InverseFlow(SHAPE, 1, 2, 4)
    model.log_prob(torch.rand(4, *SHAPE)).mean().backward()
    layers = scripts.gradient_norms.watched_layers(model)
    assert [type(layer).__name__ for layer in layers.values()] == ["InverseConv2d", "Conv1x1"] * 2
    wanted = scripts.gradient_norms.gradient_norms(layers, 0.0, 1.0)
    first = next(iter(layers.values()))
    assert wanted["layers.1.layers.0"] == pytest.approx(float(first.weight.grad.norm()))
    for most in (0.01, 1e6):
        model.zero_grad()
        model.log_prob(torch.ones(4, *SHAPE) / 3).mean().backward()
        wanted = scripts.gradient_norms.gradient_norms(layers, 0.0, 1.0)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), most))
        assert scripts.gradient_norms.gradient_norms(layers, norm, most) == pytest.approx(wanted, rel=1e-4)


def test_gains_of_the_solves(scripts: Any) -> None:
    model = perturbed(InverseFlow(SHAPE, 1, 1, 4))
    x = torch.rand(3, *SHAPE)
    gains = scripts.gradient_norms.solve_gains(model, x)
    squeezed = model.layers[0](x)[0]
    with torch.no_grad():
        gain = float(model.layers[1].layers[0](squeezed)[0].norm() / squeezed.norm())
    assert gains == {"layers.1.layers.0": pytest.approx(gain)}
    assert scripts.gradient_norms.solve_gains(perturbed(Glow(SHAPE, 1, 1, 4)), x) == {}


def test_summary_of_gradient_runs(scripts: Any) -> None:
    settings = SimpleNamespace(
        steps=4, batch_size=4, max_grad_norm=1.0, seed=0, levels=1, depth=1, hidden=4, device="cpu", every=2
    )
    images = torch.randint(0, 256, (16, *SHAPE), dtype=torch.uint8)
    kinds = scripts.gradient_norms.KIND_OF_LAYER
    runs = [scripts.gradient_norms.run(kind, 1e-3, images, settings) for kind in kinds]
    assert all(entry["steps"] == [1, 3] and entry["failure"] is None for entry in runs)
    # One that failed at its first step has nothing to sum up.
    rows = scripts.gradient_norms.summarize([*runs, runs[0] | {"steps": [], "failure": "not finite"}])
    assert [(row["model"], row["layer"]) for row in rows] == [
        ("InverseFlow", "inverse conv"), ("InverseFlow", "1×1 conv"), ("FInCFlow", "conv"), ("FInCFlow", "1×1 conv"),
        ("Glow", "1×1 conv"),
    ]  # fmt: skip
    assert all(0 < row["last"] <= row["largest"] for row in rows)


# --------------------------------------------------------------------------------------------------------- parts


def test_costs_are_those_of_the_parts_that_run(scripts: Any) -> None:
    images = torch.randint(0, 256, (16, 1, 16, 16), dtype=torch.uint8)
    given = ["--steps", "8", "--depth", "1", "--hidden", "4", "--batch-size", "4", "--threads", "1"]
    settings = scripts.parts.parse_arguments(given)
    compared = scripts.parts.candidates(["blocks:2"], ["alternate", "sequential"], 1 / 3, 1)
    costs = {name: scripts.parts.costs_of_a_step(settings, parts, images) for name, parts in compared.items()}
    whole = costs["end to end"][0]
    assert whole["backward_flops"] == pytest.approx(2 * whole["forward_flops"], rel=0.01)
    for schedule in ("alternate", "sequential"):
        of_part = costs[f"blocks:2 {schedule}"]
        assert of_part[0] == whole
        assert of_part[1]["backward_flops"] + of_part[2]["backward_flops"] == whole["backward_flops"]
        assert max(of_part[part]["saved_bytes"] for part in (1, 2)) < whole["saved_bytes"]
    # The first part runs before the second one, unless its outputs are kept.
    first, second = (costs["blocks:2 sequential"][part]["forward_flops"] for part in (1, 2))
    assert first + second == costs["blocks:2 alternate"][2]["forward_flops"] == whole["forward_flops"]


def test_the_page_of_parts_holds_the_figures_of_its_results(scripts: Any, monkeypatch: Any, tmp_path: Path) -> None:
    parts = scripts.parts
    page = tmp_path / "parts.md"
    page.write_text(parts.PAGE.read_text())
    monkeypatch.setattr(parts, "PICTURE", tmp_path / "parts")
    before = parts.PAGE.read_text()
    monkeypatch.setattr(parts, "PAGE", page)
    assert parts.main(["--report"]) == 0
    assert page.read_text() == before
    assert (tmp_path / "parts.svg").stat().st_size > 1000
