"""What every benchmark script shares: alternated timing, quantiles, a description of the machine, tables, JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import inverse_flow

Work = Callable[[], object]

# A sample lasts at least this long, so that reading the clock costs nothing beside it.
SAMPLE_SECONDS = 2e-3
# Fewer rounds than this make no quantiles.
MIN_ROUNDS = 15


@dataclass(frozen=True)
class Case:
    """Images (batch, channels, size, size) and a kernel × kernel window."""

    batch: int
    channels: int
    size: int
    kernel: int = 3

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.size}², k={self.kernel}"


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated linearly."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def elapsed_seconds(work: Work, repeats: int, device: torch.device) -> float:
    """Seconds one call of ``work`` takes, averaged over ``repeats`` calls in a row; on CUDA between two events."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    start_time = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start_time) / repeats


def time_alternately(
    candidates: dict[str, Work], device: torch.device, budget_seconds: float
) -> dict[str, list[float]]:
    """Times the candidates in turn, round after round, so that whatever disturbs the machine disturbs all of them.

    Every second round runs in reverse order: none profits from always coming after the same neighbour. Rounds go on
    until the budget is used up, and there are at least ``MIN_ROUNDS`` of them.

    Returns:
        The seconds per call of each candidate, one entry a round: entries of the same round belong together.
    """
    repeats = {}
    for name, work in candidates.items():
        work()
        work()
        once = min(elapsed_seconds(work, 1, device) for _ in range(3))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + budget_seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < deadline:
        names = list(candidates) if rounds % 2 == 0 else list(reversed(candidates))
        for name in names:
            samples[name].append(elapsed_seconds(candidates[name], repeats[name], device))
        rounds += 1
    return samples


def compare(ours: Sequence[float], rival: Sequence[float]) -> dict[str, float]:
    """The times of both in milliseconds, the ratio of their medians, and quantiles of the ratio round by round.

    ``ratio_fastest``, of the fastest samples, is the one to look at while other programs use the machine.
    """
    paired = [a / b for a, b in zip(ours, rival, strict=True)]
    ours_median, rival_median = statistics.median(ours), statistics.median(rival)
    return {
        "ours_ms": ours_median * 1e3,
        "rival_ms": rival_median * 1e3,
        "ratio": ours_median / rival_median,
        "ratio_p20": quantile(paired, 0.2),
        "ratio_p80": quantile(paired, 0.8),
        "ratio_fastest": min(ours) / min(rival),
        "rounds": len(paired),
    }


def cuda_graph(work: Work) -> Work:
    """``work`` captured once; the result replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine a figure belongs to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": cores}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_compute_capability"] = f"{properties.major}.{properties.minor}"
    return found


def versions() -> dict[str, Any]:
    """Python, PyTorch, its libraries, and this build."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "build": inverse_flow.build_info(),
    }


def describe(device: torch.device) -> str:
    """One line for the head of a printed report."""
    machine = hardware(device)
    where = machine["gpu"] if device.type == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    isa = "" if device.type == "cuda" else f", {inverse_flow.build_info()['cpu_isa']}"
    return f"{where}{isa}; torch {torch.__version__}; inverse_flow {inverse_flow.__version__}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, padded so that it also reads well in a terminal; the first column is text, the others figures."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    print(line(header))
    print("|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|")
    for row in rows:
        print(line(row))


def write_json(
    path: Path, benchmark: str, device: torch.device, settings: dict[str, Any], results: dict[str, Any]
) -> None:
    """Results beside what is needed to judge them."""
    report = {
        "benchmark": benchmark,
        "hardware": hardware(device),
        "versions": versions(),
        "settings": settings,
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {path}")
