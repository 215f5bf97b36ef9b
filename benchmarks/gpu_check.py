"""Is the CUDA side correct and how fast is it? Everything that needs a GPU, in one command.

    python benchmarks/gpu_check.py                       in under eight minutes
    python benchmarks/gpu_check.py --skip sanitizer      leave parts out

The parts, in this order: small cases that reach each path of the kernels, each in a process of its own, so that one
that hangs is known by its name; the four most telling shapes against conv2d; the tests marked ``cuda``; the other
shapes; compute-sanitizer. A part that fails or takes too long stops no other, and takes along whatever it started.

A GPU may be lent for minutes and be gone at any second: everything is written as it is known, to the folder $OUT where
that is set, else to benchmarks/results. The exit status is 0 only if nothing failed. "not run" is no failure: what is
missing is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import inverse_flow
from inverse_flow.functional import inverse_conv2d

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KINDS = ("smoke", "shapes", "tests", "sanitizer")
TELLING = ("100x3x32", "100x12x32", "100x48x8", "100x96x32")
OTHERS = ("100x3x64", "100x4x14", "100x12x16", "100x12x16x5", "100x16x7", "100x24x16", "100x96x4", "100x48x32")
TOOLS = ("memcheck", "racecheck")
# A process with PyTorch and a GPU is ready after some seconds; a case takes milliseconds.
SMOKE_SECONDS, FIRST_SECONDS, TEST_SECONDS, OTHER_SECONDS, SANITIZER_SECONDS = 30, 75, 150, 100, 60
# All parts together; the build comes before.
TOTAL_SECONDS = 450
# Exit statuses: of errors that the sanitizer found, of a case that is wrong, and of a check without a GPU.
SANITIZER_ERROR, WRONG, NO_GPU = 99, 3, 2


class Small(NamedTuple):
    """A small problem that is solved on the GPU and on the CPU."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    dtype: str = "float32"
    orders: tuple[str, ...] = ("top_left",)  # a group each
    corner: str = "general"
    last: bool = False  # channels_last


# The second one judges the first.
DEVICES = ("cuda", "cpu")
# What each one reaches on a GPU with 227 KiB of shared memory for a block.
SMOKE = {
    "several images in a block, two groups": Small(5, 6, 7, 5, orders=("bottom_right", "top_right")),
    "one image in a block, rows as lanes": Small(2, 3, 32, 32),
    "several tiles, few channels": Small(1, 2, 300, 130, (2, 2)),
    "several tiles of the block kernel": Small(2, 3, 200, 120, dtype="float64"),
    "several tiles, an uneven window": Small(1, 4, 300, 90, (3, 2)),
    "tensor cores": Small(2, 20, 4, 4),
    "tensor cores, whole images": Small(2, 24, 64, 64),
    "tensor cores, gradients in splits": Small(100, 48, 32, 32),
    "weights streamed, a ring of diagonals": Small(2, 96, 32, 32),
    "a corner inverted by a launch of its own": Small(1, 200, 3, 3),
    "half precision, tiles with margins": Small(2, 3, 300, 200, dtype="bfloat16"),
    "channels last, 4": Small(3, 4, 20, 20, last=True),
    "channels last, 8": Small(3, 8, 20, 20, last=True),
    "channels last, 12": Small(3, 12, 20, 20, last=True),
    "an identity corner": Small(4, 48, 8, 8, corner="identity"),
}
# The sanitizers slow a kernel down some hundred times.
SANITIZED = ("several images in a block, two groups", "tensor cores", "a corner inverted by a launch of its own")


def solve_small(case: Small) -> None:
    """Solve and gradients on the GPU, checked against the CPU.

    Raises:
        ArithmeticError: they differ.
    """
    torch.manual_seed(0)
    dtype, groups = getattr(torch, case.dtype), len(case.orders)
    size = case.channels // groups
    weight = 0.25 * torch.randn(case.channels, size, *case.kernel) / (size * case.kernel[0] * case.kernel[1]) ** 0.5
    for of_group, order in zip(weight.split(size), case.orders, strict=True):
        of_group[..., 0 if "bottom" in order else -1, 0 if "right" in order else -1] += torch.eye(size)
    images = torch.randn(case.batch, case.channels, case.height, case.width).to(dtype)
    found = []
    for device in DEVICES:
        y, w = images.to(device), weight.to(dtype).to(device).requires_grad_()
        y = y.contiguous(memory_format=torch.channels_last if case.last else torch.contiguous_format).requires_grad_()
        x = inverse_conv2d(y, w, order=case.orders, groups=groups, corner=case.corner)
        gradients = torch.autograd.grad(x.square().sum(), (y, w))
        found.append([t.detach().cpu().double() for t in (x, *gradients)])
    allowed = 64 * torch.finfo(dtype).eps * (case.height * case.width) ** 0.5
    for name, ours, wanted in zip(("x", "∂y", "∂w"), *found, strict=True):
        error = float((ours - wanted).abs().max() / wanted.abs().max())
        if not error <= allowed:
            raise ArithmeticError(f"{case}: {name} is off by {error:.1e} of its largest value, allowed {allowed:.1e}")


@dataclass(frozen=True)
class Part:
    """A command, and how long it may take.

    Attributes:
        absent: why it cannot be run here; empty if it can.
        failing: the exit statuses that are failures, where any other but 0 means that the tool does not run on this
            machine; empty where all are.
    """

    name: str
    kind: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""
    failing: tuple[int, ...] = ()

    def status_of(self, returned: int | None, seconds: float) -> tuple[str, str]:
        """ "passed", "failed" or "not run", and why; ``returned`` is None when it was killed for its time."""
        if returned is None:
            status = "not run" if self.failing else "failed"
            return status, f"not finished after {seconds:.3g} s"
        if returned == 0:
            return "passed", ""
        failed = not self.failing or returned in self.failing
        return "failed" if failed else "not run", f"exit status {returned}"


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: str
    status: str
    detail: str
    seconds: float


def plan(results: Path) -> list[Part]:
    """All parts, in their order."""
    me, python = str(Path(__file__).resolve()), sys.executable
    parts = [Part(f"smoke: {name}", "smoke", [python, me, "--case", name], SMOKE_SECONDS) for name in SMOKE]

    def shapes(name: str, chosen: Sequence[str], seconds: float) -> Part:
        options = ["--device", "cuda", "--pattern", "--budget", "0.4", "--json", str(results / f"gpu-{name}.json")]
        command = [python, str(HERE / "layer.py"), *options, "--shapes", *chosen]
        return Part(f"shapes: {name}", "shapes", command, seconds)

    missing = [name for name in ("pytest", "xdist") if importlib.util.find_spec(name) is None]
    tests = [python, "-m", "pytest", "tests", "-m", "cuda", "-q", "-n", "8"]
    parts.append(shapes("telling", TELLING, FIRST_SECONDS))
    parts.append(Part("tests", "tests", tests, TEST_SECONDS, absent=_absent(missing)))
    parts.append(shapes("others", OTHERS, OTHER_SECONDS))
    tool = shutil.which("compute-sanitizer")
    for name in TOOLS:
        options = ["--tool", name, "--kernel-regex", "kns=inverse_flow", "--report-api-errors", "no"]
        options += ["--error-exitcode", str(SANITIZER_ERROR), "--print-limit", "20"]
        command = [tool or "compute-sanitizer", *options, python, me, "--case", *SANITIZED]
        parts.append(
            Part(
                f"sanitizer: {name}", "sanitizer", command, SANITIZER_SECONDS,
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                absent="" if tool else "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)",
                failing=(SANITIZER_ERROR, WRONG),
            )
        )  # fmt: skip
    return parts


def _absent(modules: Sequence[str]) -> str:
    return f"{' and '.join(modules)} not installed" if modules else ""


def run(part: Part, limit: float, log: Path) -> Outcome:
    """Runs a part in a session of its own; its output goes to the terminal and to the log, line by line."""
    head = f"\n== {part.name}: {' '.join(part.command)}"
    print(head, flush=True)
    started, late = time.perf_counter(), threading.Event()
    process = subprocess.Popen(
        list(part.command), cwd=ROOT, env=os.environ | part.environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(limit, stop)
    timer.start()
    with process, log.open("a") as file:
        try:
            print(head, file=file, flush=True)
            for line in process.stdout or ():
                print(line, end="", flush=True)
                print(line, end="", file=file, flush=True)
            process.wait()
        finally:
            timer.cancel()
            _kill(process)
    returned = None if late.is_set() else process.returncode
    return Outcome(part.name, *part.status_of(returned, limit), time.perf_counter() - started)


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and all that it started; they are a group, which outlives its first member."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_all(parts: Sequence[Part], results: Path, total_seconds: float = TOTAL_SECONDS) -> int:
    """Runs the parts one after the other, writes after each what is known, and returns the exit status."""
    results.mkdir(parents=True, exist_ok=True)
    report, log = results / "gpu-check.json", results / "gpu-check.log"
    log.write_text("")
    outcomes: list[Outcome] = []
    end = time.perf_counter() + total_seconds

    def write() -> None:
        done = {outcome.part for outcome in outcomes}
        left = [part.name for part in parts if part.name not in done]
        content = {"outcomes": [asdict(outcome) for outcome in outcomes], "not yet run": left}
        unfinished = report.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(report)

    write()
    for part in parts:
        limit = min(part.seconds, end - time.perf_counter())
        if part.absent or limit <= 0:
            outcomes.append(Outcome(part.name, "not run", part.absent or "no time was left", 0.0))
        else:
            outcomes.append(run(part, limit, log))
        write()
    print()
    for outcome in outcomes:
        print(f"{outcome.status:<8} {outcome.seconds:6.1f} s  {outcome.part}  {outcome.detail}")
    print(f"written: {report}", flush=True)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def why_not() -> str:
    """What is missing to check a GPU; empty if nothing is."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no GPU, so there is nothing to check"
    return inverse_flow.build_info()["cuda_absent"] or ""


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", choices=KINDS, nargs="+", default=[], help="parts to leave out")
    parser.add_argument("--results", type=Path, default=Path(os.environ.get("OUT") or HERE / "results"))
    parser.add_argument("--case", choices=SMOKE, nargs="+", metavar="NAME", help="only small cases, in this process")
    arguments = parser.parse_args(given)
    missing = why_not()
    if missing:
        print(f"gpu_check: {missing}", file=sys.stderr)
        return NO_GPU
    if arguments.case:
        try:
            for name in arguments.case:
                solve_small(SMOKE[name])
                print(f"agrees with the CPU: {name}", flush=True)
        except ArithmeticError as error:
            print(error, file=sys.stderr)
            return WRONG
        return 0
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    # A part that is ended must take its children along: an end from outside becomes an exception here.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return run_all([part for part in plan(arguments.results) if part.kind not in arguments.skip], arguments.results)


if __name__ == "__main__":
    sys.exit(main())
