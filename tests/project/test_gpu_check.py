"""`make gpu-check` with a stand-in for the device: the order of its parts, their limits, what is left when it is cut,
and its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def part(scripts: Any, name: str, code: str, seconds: float = 30.0, **fields: Any) -> Any:
    return scripts.gpu_check.Part(name, "smoke", [sys.executable, "-c", code], seconds, **fields)


def outcomes(folder: Path) -> dict[str, tuple[str, str]]:
    content = json.loads((folder / "gpu-check.json").read_text())
    return {row["part"]: (row["status"], row["detail"]) for row in content["outcomes"]}


def test_a_part_that_fails_stops_no_other(scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        part(scripts, "right", "print('all is well')"),
        part(scripts, "wrong", "import sys; sys.exit(3)"),
        part(scripts, "killed", "import os; os.kill(os.getpid(), 11)"),
        part(scripts, "absent", "", absent="no such tool"),
        part(scripts, "refused", "import sys; sys.exit(1)", failing=(99,)),
        part(scripts, "found", "import sys; sys.exit(99)", failing=(99,)),
        part(scripts, "last", "pass"),
    ]
    assert scripts.gpu_check.run_all(parts, tmp_path) == 1
    assert outcomes(tmp_path) == {
        "right": ("passed", ""),
        "wrong": ("failed", "exit status 3"),
        "killed": ("failed", "exit status -11"),
        "absent": ("not run", "no such tool"),
        "refused": ("not run", "exit status 1"),
        "found": ("failed", "exit status 99"),
        "last": ("passed", ""),
    }
    assert json.loads((tmp_path / "gpu-check.json").read_text())["not yet run"] == []
    assert "all is well" in (tmp_path / "gpu-check.log").read_text()
    assert "all is well" in capsys.readouterr().out


def test_what_cannot_run_is_no_failure(scripts: Any, tmp_path: Path) -> None:
    parts = [part(scripts, "right", "pass"), part(scripts, "absent", "", absent="no such tool")]
    assert scripts.gpu_check.run_all(parts, tmp_path) == 0


def test_a_part_that_takes_too_long_takes_its_children_along(scripts: Any, tmp_path: Path) -> None:
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    parts = [
        part(scripts, "slow", code, seconds=0.7),
        part(scripts, "slow tool", code, seconds=0.7, failing=(99,)),
        part(scripts, "next", "pass"),
    ]
    started = time.perf_counter()
    assert scripts.gpu_check.run_all(parts, tmp_path) == 1
    assert outcomes(tmp_path) == {
        "slow": ("failed", "not finished after 0.7 s"),
        "slow tool": ("not run", "not finished after 0.7 s"),
        "next": ("passed", ""),
    }
    time.sleep(max(0.0, 3.5 - (time.perf_counter() - started)))
    assert not (tmp_path / "alive").exists()


def test_all_parts_share_a_limit(scripts: Any, tmp_path: Path) -> None:
    parts = [part(scripts, "long", "import time; time.sleep(9)"), part(scripts, "late", "pass")]
    assert scripts.gpu_check.run_all(parts, tmp_path, total_seconds=0.5) == 1
    assert outcomes(tmp_path)["late"] == ("not run", "no time was left")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_known_is_left_when_it_is_killed(scripts: Any, tmp_path: Path, sign: int) -> None:
    """The check itself, with a stand-in for the device and parts of its own."""
    stand_in = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import gpu_check
run = lambda name, code: gpu_check.Part(name, "smoke", [sys.executable, "-c", code], 60)
gpu_check.why_not = lambda: ""
gpu_check.plan = lambda results: [
    run("first", "pass"),
    run("second", "import os, time; print('running as', os.getpid(), flush=True); time.sleep(60)"),
    run("third", "pass"),
]
sys.exit(gpu_check.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", stand_in], env=os.environ | {"OUT": str(tmp_path)})
    log = tmp_path / "gpu-check.log"
    deadline = time.perf_counter() + 60
    while not (found := re.search(r"^running as (\d+)\n", log.read_text() if log.exists() else "", re.MULTILINE)):
        assert time.perf_counter() < deadline
        time.sleep(0.02)
    process.send_signal(sign)
    assert process.wait(timeout=50) != 0
    running = Path("/proc") / found[1] / "cmdline"
    if sign == signal.SIGKILL:
        os.kill(int(found[1]), signal.SIGKILL)  # nobody else can
    elif running.exists():
        assert b"running as" not in running.read_bytes()
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [(row["part"], row["status"]) for row in content["outcomes"]] == [("first", "passed")]
    assert content["not yet run"] == ["second", "third"]


def test_the_most_telling_comes_first(scripts: Any, tmp_path: Path) -> None:
    parts = scripts.gpu_check.plan(tmp_path)
    kinds = [part.kind for part in parts]
    assert list(dict.fromkeys(kinds)) == ["smoke", "shapes", "tests", "sanitizer"]
    names = [part.name for part in parts if part.kind != "smoke"]
    assert names == ["shapes: telling", "tests", "shapes: others", "sanitizer: memcheck", "sanitizer: racecheck"]
    # Every part's own report lies beside that of the check.
    reports = [Path(part.command[part.command.index("--json") + 1]) for part in parts if part.kind == "shapes"]
    assert {report.parent for report in reports} == {tmp_path}
    assert len(set(reports)) == 2
    for case in ("shapes: telling", "shapes: others"):
        [shapes] = [part for part in parts if part.name == case]
        scripts.layer.parse_arguments(list(shapes.command[2:]))


def test_every_small_case_agrees_with_itself(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides on the CPU: the cases are valid, and well enough conditioned for their tolerance."""
    check = scripts.gpu_check
    monkeypatch.setattr(check, "DEVICES", ("cpu", "cpu"))
    small = [case for case in check.SMOKE.values() if case.batch * case.channels * case.height * case.width < 20_000]
    assert len(small) >= 7
    for case in small:
        check.solve_small(case)
    right, calls = check.inverse_conv2d, iter(range(100))
    monkeypatch.setattr(check, "inverse_conv2d", lambda *a, **k: right(*a, **k) * (1 + 1e-2 * next(calls)))
    with pytest.raises(ArithmeticError, match="x is off by"):
        check.solve_small(small[0])


def test_without_a_gpu_it_says_so(scripts: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert scripts.gpu_check.main([]) == scripts.gpu_check.NO_GPU
    assert "sees no GPU" in capsys.readouterr().err
