import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import inverse_flow
from inverse_flow.command.commands import cli
from inverse_flow.command.info import format_info
from inverse_flow.data import load
from inverse_flow.models import InverseFlow
from inverse_flow.training import TrainConfig, Trainer, checkpoint
from inverse_flow.training.log import read_log

TINY = ["--levels", "1", "--depth", "1", "--hidden", "2", "--batch-size", "20", "--evaluate-every", "2"]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = call("train", "--out", folder, "--steps", 4, *TINY)
    assert result.exit_code == 0, result.output
    for part in ("900 training, 100 validation and 200 test images", "after 4 steps", "bits/dim, test"):
        assert part in result.output
    return folder


def test_a_run_leaves_its_files(trained: Path) -> None:
    names = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
    assert names == {"checkpoint.pt", "log.csv", "summary.json", "samples.png", "curve.png"}
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["data"] == "fashion-mnist-slice"
    assert summary["model"]["image_shape"] == [1, 28, 28]
    assert summary["training"]["batch_size"] == 20
    assert 0 < summary["reconstruction_error"] < 1e-4
    assert 3 < summary["baseline_test_bits_per_dim"] < 6


def test_an_existing_run_is_not_overwritten_by_accident(trained: Path) -> None:
    before = (trained / "checkpoint.pt").read_bytes()
    result = call("train", "--out", trained, "--steps", 1, *TINY)
    assert result.exit_code == 2
    assert "--resume goes on from it, --fresh replaces it" in result.output
    assert (trained / "checkpoint.pt").read_bytes() == before
    both = call("train", "--out", trained, "--resume", "--fresh")
    assert both.exit_code == 2
    assert "give one of them" in both.output


def test_resume_goes_on_and_keeps_the_settings(tmp_path: Path) -> None:
    assert call("train", "--out", tmp_path, "--steps", 2, *TINY).exit_code == 0
    result = call("train", "--data", "embedded", "--out", tmp_path, "--resume", "--steps", 3, *TINY)
    assert result.exit_code == 0, result.output
    assert "resumed at step 2" in result.output
    content = checkpoint.load(tmp_path)
    assert content.progress.step == 3
    assert content.training.batch_size == 20
    assert content.training.minutes == 3.5

    refused = call("train", "--out", tmp_path, "--resume", "--hidden", 8, "--no-logit")
    assert refused.exit_code == 2
    words = " ".join(refused.output.split())
    assert "keeps the settings of its checkpoint: --hidden is 2, --logit is True" in words

    fresh = call("train", "--out", tmp_path, "--fresh", "--steps", 1, *TINY)
    assert fresh.exit_code == 0, fresh.output
    assert checkpoint.load(tmp_path).progress.step == 1


def test_nothing_to_resume_is_told_in_a_line(tmp_path: Path) -> None:
    result = call("train", "--out", tmp_path / "none", "--resume")
    assert result.exit_code == 1
    assert "there is no checkpoint" in result.output
    assert "Traceback" not in result.output


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from inverse_flow.command.main import main; main()",
        "train",
        "--out",
        str(tmp_path),
        *TINY,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint.pt").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted at step" in output
    assert f"inverse-flow train --out {tmp_path} --resume" in output
    assert checkpoint.load(tmp_path).progress.step >= 2


def test_sample(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.png"
    result = call("sample", trained, "--count", 5, "--temperature", 0.5, "--out", out)
    assert result.exit_code == 0, result.output
    first = out.read_bytes()
    call("sample", trained / "checkpoint.pt", "--count", 5, "--temperature", 0.5, "--out", out)
    assert out.read_bytes() == first
    call("sample", trained, "--count", 5, "--temperature", 0.5, "--seed", 1, "--out", out)
    assert out.read_bytes() != first


def test_samples_in_an_npz_file_can_be_trained_on(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.npz"
    result = call("sample", trained, "--count", 300, "--out", out)
    assert result.exit_code == 0, result.output
    with np.load(out) as file:
        arrays = dict(file)
    assert arrays["x"].shape == (300, 28, 28, 1)
    assert arrays["log_prob"].shape == (300,)
    assert "y" not in arrays
    assert load(out).train.image_shape == (1, 28, 28)
    unlabelled = call("sample", trained, "--label", 3, "--out", out)
    assert unlabelled.exit_code == 1
    assert "knows no classes: it was not trained with labels; got 3" in unlabelled.output


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Forty small images of two classes, dark and bright."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    pixels = rng.integers(0, 100, (40, 8, 8, 1)) + 150 * labels[:, None, None, None]
    np.savez(tmp_path / "small.npz", x=pixels.astype(np.uint8), y=labels)
    return tmp_path / "small.npz"


def labels_in(path: Path) -> list[int]:
    with np.load(path) as arrays:
        return arrays["y"].tolist()


SMALL = ["--validation", 5, "--batch-size", 10, "--depth", 1, "--hidden", 4, "--evaluate-every", 3, "--no-flip"]


def test_everything_at_once(small: Path, tmp_path: Path) -> None:
    """A conditional model of another kind, trained by parts with learned noise, and all that is written on the way."""
    run = tmp_path / "run"
    flags = ["--model", "FInCFlow", "--levels", 2, "--orders", "alternating", "--conditional", "--memory-efficient"]
    flags += ["--dequantization", "variational", "--bits", 5, "--optimizer", "adamax", "--decay-at", 0.5]
    flags += ["--max-gain", 50, "--decay-at", 8, "--patience", 9, "--parts", "across:2", "--schedule", "simultaneous"]
    result = call(
        "train", "--data", small, "--out", run, "--steps", 4, "--tensorboard", "--sample-every", 2, *SMALL, *flags
    )
    assert result.exit_code == 0, result.output
    assert "FInCFlow: L = 2, K = 1" in result.output
    assert "conditional on 2 classes" in result.output
    again = call("train", "--data", small, "--out", run, "--resume", "--steps", 6, *SMALL, *flags)
    assert again.exit_code == 0, again.output
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["000002.png", "000004.png"]
    assert list((run / "tensorboard").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kind"] == "FInCFlow"
    assert summary["training"]["parts"]["count"] == 2
    assert "at n = 5 bits, variational dequantization" in summary["protocol"]
    assert "log p(x̃ | label)" in summary["protocol"]
    content = checkpoint.load(run)
    assert content.progress.step == 6
    refused = call("train", "--out", run, "--resume", "--parts", "across:3", "--no-conditional", "--decay-at", 0.4)
    words = " ".join(refused.output.split())
    for setting in ("--parts is across:2", "--conditional is True", "--decay-at is (0.5, 8.0)"):
        assert setting in words
    evaluated = call("evaluate", run, "--importance-samples", 3, "--json")
    assert evaluated.exit_code == 0, evaluated.output
    figures = json.loads(evaluated.stdout)
    assert figures["importance_samples"] == 3
    assert figures["importance_weighted_test_bits_per_dim"] < figures["test_bits_per_dim"]
    sampled = call("sample", run, "--count", 4, "--out", tmp_path / "some.npz")
    assert sampled.exit_code == 0, sampled.output
    assert labels_in(tmp_path / "some.npz") == [0, 1, 0, 1]
    call("sample", run, "--count", 3, "--label", 1, "--out", tmp_path / "some.npz")
    assert labels_in(tmp_path / "some.npz") == [1, 1, 1]


def test_two_processes_train_one_model(small: Path, tmp_path: Path) -> None:
    """The same command alone and under torchrun, which speaks once and leaves one set of files."""
    arguments = ["train", "--data", small, "--steps", 3, "--levels", 1, *SMALL, "--learning-rate", "1e-4", "--out"]
    alone = call(*arguments, tmp_path / "one")
    assert alone.exit_code == 0, alone.output
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inverse_flow"]
    together = subprocess.run(
        [sys.executable, *torchrun, *map(str, arguments), str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    one, two = ([report.loss for report in read_log(tmp_path / name / "log.csv")] for name in ("one", "two"))
    # Bits per dimension, which may be near zero: sums in another order change some 1e-5 of them.
    assert two == pytest.approx(one, abs=1e-4)
    outputs = (alone.output, together.stdout)
    assert [output.count("bits/dim, test") for output in outputs] == [1, 1]
    assert ["2 processes" in output for output in outputs] == [False, True]
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def test_parts_are_named_with_their_cut(tmp_path: Path) -> None:
    result = call("train", "--out", tmp_path, "--parts", "two")
    assert result.exit_code == 2
    assert 'parts must be given as "blocks:n" or "across:n"' in " ".join(result.output.split())


def test_a_missing_module_of_the_extra_is_told_in_a_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = call("train", "--data", small, "--out", tmp_path / "run", "--levels", 1, "--tensorboard", *SMALL)
    assert result.exit_code == 1
    assert "needs tensorboard for this: pip install 'inverse-flow[train]'" in result.output


def test_evaluate_agrees_with_the_training_run(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    result = call("evaluate", trained, "--json")
    assert result.exit_code == 0, result.output
    evaluated = json.loads(result.stdout)
    for name in ("train_bits_per_dim", "test_bits_per_dim", "baseline_test_bits_per_dim", "parameters"):
        assert evaluated[name] == pytest.approx(summary[name], rel=1e-6)
    (layer,) = evaluated["stability"]
    assert layer["path"] == "layers.2.layers.0"
    assert layer["image_size"] == [14, 14]
    assert 1 < layer["gain"] < 3
    told = call("evaluate", trained).output
    assert "bits/dim of independent pixels, test" in told
    assert re.search(rf"layers.2.layers.0 +14 × 14 +{layer['gain']:.3g} ", told)


def test_evaluate_judges_samples(trained: Path) -> None:
    told = call("evaluate", trained, "--importance-samples", 0, "--quality")
    assert told.exit_code == 0, told.output
    for part in ("quality of 200 samples", "Fréchet", "Not FID"):
        assert part in told.output
    assert not [line for line in told.output.splitlines() if line.startswith(("│", "┃")) and "…" in line]
    figures = json.loads(call("evaluate", trained, "--importance-samples", 0, "--quality", "--json").stdout)["quality"]
    assert (figures["classifier"], figures["images"]) == ("fashion-mnist", 200)
    samples, floor = (
        figures["figures"]["classifier"][whose]["Fréchet distance"]["value"] for whose in ("samples", "floor")
    )
    assert samples > 2 * floor  # of a model that has hardly begun to learn


def test_errors_are_told_in_a_line(tmp_path: Path) -> None:
    missing = call("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert missing.exit_code == 1
    assert "a data source is" in missing.output
    odd = call("train", "--levels", 3, "--out", tmp_path / "run")
    assert odd.exit_code == 1
    assert "3 levels need height and width divisible by 8, got 28 × 28" in odd.output
    for device in ("tpu9", "cuda:99"):
        absent = call("train", "--device", device, "--out", tmp_path / "run")
        assert absent.exit_code == 2
        assert f"PyTorch cannot compute on '{device}' here" in " ".join(absent.output.split())
    (tmp_path / "checkpoint.pt").write_text("nonsense")
    damaged = call("evaluate", tmp_path)
    assert damaged.exit_code == 1
    assert "damaged or no checkpoint" in damaged.output
    assert isinstance(damaged.exception, SystemExit)


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["evaluate"], ["info"]])
def test_help_teaches(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    if command != ["info"]:
        assert "  inverse-flow " in result.output
        assert "\b" not in result.output


def test_info_prints_the_build() -> None:
    text = call("info").output
    for name, value in inverse_flow.build_info().items():
        assert name.replace("_", " ") in text
        if isinstance(value, str) and value:
            assert value in text
    assert json.loads(call("info", "--json").stdout) == inverse_flow.build_info()


def test_info_shows_empty_values() -> None:
    lines = format_info({"cuda_archs": [], "reason": "", "isas": ["a", "b"]}).splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["none", "–", "a, b"]


def without_click(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.modules['click'] = None; from inverse_flow.command.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_without_the_extra_info_works_and_the_rest_says_what_to_install() -> None:
    info = without_click("info")
    assert info.returncode == 0
    assert inverse_flow.__version__ in info.stdout
    train = without_click("train")
    assert train.returncode == 1
    assert "needs click for this: pip install 'inverse-flow[train]'" in train.stderr


def test_a_checkpoint_from_before_there_was_an_option_goes_on(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name in ("max_row_sum", "scale", "context_channels"):
        del content["model"]["description"]["config"][name]
    torch.save(content, tmp_path / "checkpoint.pt")
    result = call("train", "--out", tmp_path, "--resume", "--steps", 5, *TINY)
    assert result.exit_code == 0, result.output
    assert checkpoint.load(tmp_path).progress.step == 5


def test_a_run_from_python_without_a_source(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", x=load("embedded").train.images[:64].permute(0, 2, 3, 1).numpy())
    model = InverseFlow((1, 28, 28), levels=1, steps=1, hidden=2)
    trainer = Trainer(model, load(tmp_path / "some.npz").train.images, TrainConfig(steps=1), tmp_path)
    trainer.fit()
    drawn = call("sample", tmp_path, "--count", 2, "--out", tmp_path / "samples.npz")
    assert drawn.exit_code == 0, drawn.output
    for command in (["evaluate", tmp_path, "--importance-samples", 0], ["train", "--out", tmp_path, "--resume"]):
        refused = call(*command)
        assert refused.exit_code == 1
        assert "does not say where its images come from: name them with --data" in " ".join(refused.output.split())
        result = call(*command, "--data", tmp_path / "some.npz")
        assert result.exit_code == 0, result.output
    assert checkpoint.load(tmp_path).data == checkpoint.DataSource(str(tmp_path / "some.npz"))
