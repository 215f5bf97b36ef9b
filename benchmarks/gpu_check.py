"""Is the CUDA side correct and how fast is it? Everything that needs a GPU, in one command.

    python benchmarks/gpu_check.py                       tests, compute-sanitizer, gpu_table.py; results in results/
    python benchmarks/gpu_check.py --skip benchmarks     leave a part out

Each part runs in a process of its own, so that a part that fails, or takes too long, does not take the others with it.
The report lists what ran, what failed and what could not be run; the exit status is 0 only if nothing failed.
Speed is measured after the tests, and not at all if they fail: figures of a wrong kernel mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import write_json

import inverse_flow
from inverse_flow.functional import inverse_conv2d

HERE = Path(__file__).parent
ROOT = HERE.parent
# All parts together stay below eight minutes; the sanitizers slow a kernel down some hundred times.
TEST_SECONDS = 210
SANITIZER_SECONDS = 60
BENCHMARK_SECONDS = 140
PARTS = ("tests", "sanitizer", "benchmarks")
TOOLS = ("memcheck", "racecheck")
SANITIZER_ERROR = 99

# (batch, channels, groups, height, width, kernel): each path of the kernels once. Several images in a block; a corner
# folded before the solve; several tiles; weights too large for shared memory, on any GPU.
SANITIZER_CASES = [
    (5, 6, 2, 7, 5, 3),
    (2, 20, 1, 4, 4, 3),
    (1, 2, 1, 300, 130, 2),
    (1, 160, 1, 2, 3, 3),
]


@dataclass
class Outcome:
    """How a part ended: "passed", "failed" or "not run", and why."""

    part: str
    status: str
    detail: str
    seconds: float


def run(part: str, command: Sequence[str | Path], limit_seconds: float) -> Outcome:
    """Runs a part, its output passed on to the terminal line by line."""
    print(f"\n== {part}: {' '.join(map(str, command))}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run([str(word) for word in command], cwd=ROOT, timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(part, "failed", f"not finished after {limit_seconds:.0f} s", time.perf_counter() - start)
    status = "passed" if done.returncode == 0 else "failed"
    return Outcome(part, status, f"exit status {done.returncode}", time.perf_counter() - start)


def small_cases() -> None:
    """What runs under compute-sanitizer: solves and gradients of small problems, checked against the CPU."""
    torch.manual_seed(0)
    for batch, channels, groups, height, width, kernel in SANITIZER_CASES:
        weight = 0.2 / kernel * torch.randn(channels, channels // groups, kernel, kernel) / (channels // groups) ** 0.5
        identity = torch.eye(channels // groups).repeat(groups, 1)
        order = ("bottom_right", "top_right")[:groups] if groups > 1 else "top_left"
        corner = (kernel - 1, kernel - 1) if groups == 1 else None
        for g in range(groups):
            rows = slice(g * channels // groups, (g + 1) * channels // groups)
            at = corner or ((0, 0), (kernel - 1, 0))[g]
            weight[rows, :, at[0], at[1]] += identity[rows]
        images = torch.randn(batch, channels, height, width)
        results = []
        for device in ("cpu", "cuda"):
            y, w = (t.detach().to(device).requires_grad_() for t in (images, weight))
            x = inverse_conv2d(y, w, order=order, groups=groups)
            gradients = torch.autograd.grad(x.square().sum(), (y, w))
            results.append([t.detach().cpu() for t in (x, *gradients)])
        for expected, actual in zip(*results, strict=True):
            error = (expected - actual).abs().max().item()
            allowed = 1e-4 * expected.abs().max().item()
            assert error <= allowed, f"{(batch, channels, groups, height, width, kernel)}: off by {error}"
    print(f"{len(SANITIZER_CASES)} small cases agree with the CPU")


def sanitizer_parts() -> list[Outcome]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        reason = "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)"
        return [Outcome(name, "not run", reason, 0.0) for name in TOOLS]
    here = [sys.executable, Path(__file__), "--small-cases"]
    options = ["--error-exitcode", str(SANITIZER_ERROR), "--print-limit", "20"]
    return [run(name, [tool, "--tool", name, *options, *here], SANITIZER_SECONDS) for name in TOOLS]


def benchmark_parts(results: Path) -> list[Outcome]:
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    output = results / f"gpu-table-{name}.json"
    command = [sys.executable, HERE / "gpu_table.py", "--json", output]
    return [run("table", command, BENCHMARK_SECONDS)]


def main() -> int:
    """Runs the parts and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", choices=PARTS, nargs="+", default=[], help="parts to leave out")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON files")
    parser.add_argument("--small-cases", action="store_true", help="only the cases that run under compute-sanitizer")
    arguments = parser.parse_args()

    if not torch.cuda.is_available():
        print(f"gpu_check: PyTorch {torch.__version__} sees no GPU, so there is nothing to check", file=sys.stderr)
        return 2
    if inverse_flow.build_info()["cuda_absent"]:
        print(f"gpu_check: {inverse_flow.build_info()['cuda_absent']}", file=sys.stderr)
        return 2
    if arguments.small_cases:
        small_cases()
        return 0

    smi = shutil.which("nvidia-smi")
    if smi is not None:
        subprocess.run([smi], check=False)
    print(json.dumps(inverse_flow.build_info(), indent=2), flush=True)

    outcomes: list[Outcome] = []
    if "tests" not in arguments.skip:
        outcomes.append(run("tests", [sys.executable, "-m", "pytest", "tests", "-m", "cuda", "-q"], TEST_SECONDS))
    if "sanitizer" not in arguments.skip:
        outcomes += sanitizer_parts()
    if "benchmarks" not in arguments.skip:
        if any(outcome.status == "failed" for outcome in outcomes):
            outcomes.append(Outcome("table", "not run", "the checks before it failed", 0.0))
        else:
            outcomes += benchmark_parts(arguments.results)

    print()
    for outcome in outcomes:
        print(f"{outcome.part:<12} {outcome.status:<8} {outcome.seconds:6.1f} s  {outcome.detail}")

    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    write_json(
        arguments.results / f"gpu-check-{name}.json",
        "gpu_check",
        torch.device("cuda"),
        {"skip": arguments.skip, "sanitizer_cases": SANITIZER_CASES},
        {"outcomes": [asdict(outcome) for outcome in outcomes]},
    )
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
