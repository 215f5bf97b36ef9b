"""Every benchmark script runs, and what they share does what it says. Nothing is timed to judge it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

# At tiny sizes; {source} is a slice of small images, {out} a folder.
RUNS = {
    "layer": "--shapes 2x3x5 --threads 1 --budget 0 --corner general identity",
    "layer, calls": "--calls --budget 0",
    "layer, volumes": "--volumes --shapes 1x2x4 9x2x3x1 --threads 1 --budget 0 --corner general identity",
    "scaling": "--sweep image --largest 32 --threads 1 --budget 0 --plot {out}/plot",
    "numerics": "--growths 10 --draws 1 --plot {out}/plot",
    "memory": "--steps 1 --timed-steps 1 --side 8 --batch 2 --hidden 4 --budget 0 --plot {out}/plot",
    "scale": "--side 8 --levels 1 --steps 1 2 --hidden 4",
    "foreign": "--depths 1 --batch 4 --features 6 --hidden 4 --budget 0 --threads 1",
    "density": "--preset embedded --minutes 0.001 --parameters 9000 --models Glow --test-images 4 --budget 0 "
    "--threads 1 --out {out}/runs",
    "density, ablation": "--ablation --preset fashion-mnist --data {source} --minutes 0.001 --levels 1 --steps 1 "
    "--hidden 2 --models Glow RealNVP --seeds 2 --threads 1 --out {out}/runs",
    "diffusion": "--models FlowMatching --parameters 3900 --minutes 0.0001 --samples 20 --evaluations 1 "
    "--test-images 2 --budget 0 --threads 1 --out {out}/runs --plot {out}/plot",
    "sampling": "--steps 1 --hidden 2 --images 2 --threads 1 --budget 0 --no-compile --tables --sizes 16 --kernels 2",
    "parts": "--data {source} --steps 4 --seeds 2 --depth 1 --hidden 2 --parts blocks:2 --batch-size 4 --threads 1 "
    "--evaluate-every 2",
    "gradient_norms": "--data {source} --learning-rates 1e-3 --steps 4 --every 2 --levels 1 --depth 1 --hidden 2 "
    "--batch-size 4 --threads 1 --plot {out}/plot",
    "busy": "--rounds 1 --seconds 0 --levels 1 --steps 1 --hidden 2 --busy 1 --threads 1 "
    "--policies OMP_WAIT_POLICY=PASSIVE",
    "compiling": "--steps 2 --fewer 1 --hidden 2 --backend eager --budget 0 --jobs density --ways whole",
    "stability": "--data {source} --learning-rates 1e-3 2e-2 --steps 3 --every 2 --levels 1 --depth 1 --hidden 2 "
    "--side 16 --seeds 2 --threads 1 --plot {out}/plot",
    "stability, cost": "--cost 2 --budget 0 --threads 1",
    "signals": "--shapes 2x1x40x3 9x3x20x2 --threads 1 --budget 0",
    "features": "fashion-mnist --data embedded --images 128 --epochs 1 --target 0 --out {out}/weights.npz",
    "krylov": "--side 8 --batch 2 --budget 0 --problems 5",
    "classifier": "--epochs 1 --hidden 2 --threads 1",
}


# These start a process for each measurement.
SEVERAL_PROCESSES = ("busy", "compiling")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in SEVERAL_PROCESSES else name for name in RUNS]
)
def test_every_script_runs(scripts: Any, name: str, source: str, tmp_path: Path) -> None:
    scripts.memory.normflows = None  # optional, and slow to build
    for library in ("nflows", "FrEIA") if name == "foreign" else ():
        pytest.importorskip(library, reason=f"{library} is not installed (extra [peers])")
    script, given = name.split(",")[0], RUNS[name].format(source=source, out=tmp_path).split()
    assert getattr(scripts, script).main([*given, "--json", str(tmp_path / "results.json")]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert {"benchmark", "hardware", "versions", "settings"} < set(content)
    assert "failures" not in content
    if "--plot" in given:
        assert (tmp_path / "plot.png").stat().st_size > 1000
        assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_no_script_is_left_out(scripts: Any) -> None:
    mains = {path.stem for path in scripts.folder.glob("*.py") if "def main(" in path.read_text()}
    assert mains == {name.split(",")[0] for name in RUNS} | {"gpu_check"}


def test_results_name_no_folder_of_the_machine_that_made_them(scripts: Any) -> None:
    for path in scripts.folder.glob("results/*.json"):
        assert not re.search(r'"/\w', path.read_text()), path.name


def test_the_documents_name_scripts_that_are_there(scripts: Any) -> None:
    root = scripts.folder.parent
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/*.py"), root / "Makefile"]:
        for name in re.findall(r"benchmarks/(\w+\.py|results/[\w-]+\.json)", page.read_text()):
            made = name in ("results/layer-gpu.json", "results/sampling-gpu.json")  # by a command, on a GPU
            assert made or (scripts.folder / name).exists(), f"{page.name} names benchmarks/{name}"


def report_of(scripts: Any, path: Path) -> Any:
    return scripts.harness.Report("a test", argparse.Namespace(json=path, device=torch.device("cpu"), threads=1))


def test_results_are_written_as_they_become_known(scripts: Any, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    report = report_of(scripts, path)
    assert not path.exists()
    report.add("rows", {"ms": 1.0, "shape": scripts.problems.Case(1, 2, 3)})
    assert json.loads(path.read_text())["rows"] == [
        {"ms": 1.0, "shape": {"batch": 1, "channels": 2, "size": 3, "kernel": 3, "dimensions": 2}}
    ]
    report.add("rows", {"ms": 2.0})
    report.set(summary={"mean": 1.5})
    content = json.loads(path.read_text())
    assert [row["ms"] for row in content["rows"]] == [1.0, 2.0]
    assert content["summary"] == {"mean": 1.5}
    assert list(path.parent.iterdir()) == [path]
    assert report.finish() == 0


def test_a_failed_check_ends_its_own_rows_alone(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(scripts, tmp_path / "results.json")
    for error in (1e-9, 1e-3, float("nan")):
        with report.checked(f"shape {error}"):
            scripts.harness.require({"x": error}, 1e-6)
            report.add("rows", error)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"] == [1e-9]
    assert [failure["what"] for failure in content["failures"]] == ["shape 0.001", "shape nan"]
    assert report.finish() == 1
    assert "WRONG  shape nan: off by more than 1.0e-06: x nan" in capsys.readouterr().err


def test_a_table_has_a_dash_for_what_a_row_lacks(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = scripts.harness.Table({"": "{name}", "ms": "{ms:.1f}"})
    table.add({"name": "first", "ms": 1.25}, {"name": "a longer one", "ms": None})
    table.add({"name": "third"})
    assert capsys.readouterr().out.splitlines() == [
        "|              |  ms |",
        "|--------------|----:|",
        "| first        | 1.2 |",
        "| a longer one |   – |",
        "| third        |   – |",
    ]


def test_ratios_are_of_medians_and_of_rounds(scripts: Any) -> None:
    found = scripts.harness.compare([1.0, 2.0, 6.0], [2.0, 2.0, 3.0])
    assert (found["ours_ms"], found["rival_ms"], found["ratio"], found["rounds"]) == (2000, 2000, 1, 3)
    assert (found["ratio_p20"], found["ratio_p80"]) == pytest.approx((0.7, 1.6))
    assert found["ratio_fastest"] == 0.5
    assert scripts.harness.geometric_mean([1.0, 4.0]) == pytest.approx(2)


def test_rivals_take_turns(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.harness, "SAMPLE_SECONDS", 0.0)
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = scripts.harness.time_alternately(works, torch.device("cpu"), 0.0)
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys(works, scripts.harness.MIN_ROUNDS)
    assert "".join(calls[-9:]) == "abccbaabc"


def test_a_wrong_corner_is_not_timed(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scripts.problems.check

    def check(operands: Any, corner: str) -> dict[str, float]:
        if corner == "general":
            raise ArithmeticError("wrong")
        return dict(right(operands, corner))

    monkeypatch.setattr(scripts.problems, "check", check)
    given = ["--shapes", "1x2x3", "--threads", "1", "--budget", "0", "--mode", "forward"]
    assert scripts.layer.main([*given, "--json", str(tmp_path / "layer.json")]) == 1
    content = json.loads((tmp_path / "layer.json").read_text())
    assert [row["corner"] for row in content["rows"]] == ["unit_triangular"]
    assert [failure["error"] for failure in content["failures"]] == ["wrong"]
