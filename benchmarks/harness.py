"""What every benchmark script shares: arguments, checks, alternated timing, ratios and quantiles, tables, pictures, and
results that are written as they become known.

A script makes its arguments with :func:`parser`, opens a :class:`Report`, checks what it is about to time, times all
that it compares with :func:`time_alternately`, and adds each row to the report and to a :class:`Table` at once. What
has been measured when a run is cut stays.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import inverse_flow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Work = Callable[[], object]
Clock = Callable[[], float]

# A sample lasts at least this long, so that reading the clock costs nothing beside it.
SAMPLE_SECONDS = 2e-3
# Fewer rounds than this make no quantiles.
MIN_ROUNDS = 15
# What a figure's columns are called in a row, and in a table.
RATIOS = {name: f"{{{key}:.3f}}" for name, key in
          {"ratio": "ratio", "p20": "ratio_p20", "p80": "ratio_p80", "fastest": "ratio_fastest"}.items()}  # fmt: skip


# ---- Arguments ----


def parser(
    description: str | None, *, threads: int | Sequence[int] | None = None, budget: float | None = None,
    device: bool = True, plot: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    """The arguments that scripts have in common.

    Args:
        description: of the script.
        threads: of the CPU, if none are given: a number, a sequence where the script measures with each, or None for as
            many as PyTorch takes by itself.
        budget: seconds of timing, in a script that times.
        device: whether the script can run on a GPU.
        plot: whether it draws.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+"} if isinstance(threads, Sequence) else {}
    default = torch.get_num_threads() if threads is None else list(threads) if several else threads
    made.add_argument("--threads", type=int, default=default, help="CPU threads to measure with", **several)
    if budget is not None:
        least = f"at least {MIN_ROUNDS} rounds"
        made.add_argument("--budget", type=float, default=budget, help=f"seconds of timing, {least}")
    if device:
        made.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    else:
        made.set_defaults(device=torch.device("cpu"))
    made.add_argument("--json", type=Path, help="write the results to this file, as they become known")
    if plot:
        made.add_argument("--plot", type=Path, help="draw into this file, as .png and .svg")
    return made


# ---- Timing ----


def elapsed_seconds(work: Work, repeats: int, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds one call of ``work`` takes, averaged over ``repeats`` calls in a row; on CUDA between two events."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    start_time = clock()
    for _ in range(repeats):
        work()
    return (clock() - start_time) / repeats


def time_alternately(
    candidates: Mapping[str, Work], device: torch.device, budget_seconds: float, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Times the candidates in turn, round after round, so that whatever disturbs the machine disturbs all of them.

    Every second round runs in reverse order: none profits from always coming after the same neighbour. Rounds go on
    until the budget is used up, and there are at least ``MIN_ROUNDS`` of them. ``clock`` tells the time on a CPU.

    Returns:
        The seconds per call of each candidate, one entry per round: entries of the same round belong together.
    """
    repeats = {}
    for name, work in candidates.items():
        work()
        work()
        once = min(elapsed_seconds(work, 1, device, clock) for _ in range(3))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + budget_seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < deadline:
        for name in candidates if rounds % 2 == 0 else reversed(candidates):
            samples[name].append(elapsed_seconds(candidates[name], repeats[name], device, clock))
        rounds += 1
    return samples


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


def allow_tf32(allowed: bool) -> None:
    """PyTorch's switches, for convolutions and matrix products; off, a convolution is as exact as the solve."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


# ---- Figures ----


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated linearly."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quantiles and the least, in milliseconds."""
    found = {"ms": statistics.median(seconds), "p20_ms": quantile(seconds, 0.2), "p80_ms": quantile(seconds, 0.8)}
    found["fastest_ms"] = min(seconds)
    return {name: 1e3 * value for name, value in found.items()} | {"rounds": len(seconds)}


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


def summarise(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], also: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Of the rows that agree in ``names``: their number, the geometric mean and the largest of their ratios, and the
    geometric means of the ratios of the fastest samples and of the columns ``also``."""
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        members = [row for row in rows if tuple(row[name] for name in names) == key]
        means = {"mean": "ratio", "fastest": "ratio_fastest", **{name: name for name in also}}
        entry = dict(zip(names, key, strict=True)) | {"shapes": len(members)}
        entry |= {name: geometric_mean([row[column] for row in members]) for name, column in means.items()}
        found.append(entry | {"worst": max(row["ratio"] for row in members)})
    return found


def judged(entry: Mapping[str, Any], aims: Mapping[str, float]) -> str:
    """Which of the entry's figures are no larger than aimed at, in words."""
    return ", ".join(f"{name} ≤ {aim} {'kept' if entry[name] <= aim else 'MISSED'}" for name, aim in aims.items())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def require(errors: dict[str, float], allowed: float) -> dict[str, float]:
    """The errors, by what they are errors of.

    Raises:
        ArithmeticError: one is above ``allowed``, or not a number: what gave it must not be timed.
    """
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise ArithmeticError(f"off by more than {allowed:.1e}: {', '.join(wrong)}")
    return errors


# ---- What a figure belongs to ----


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine."""
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
    """One line for the head of what is printed."""
    machine = hardware(device)
    where = machine["gpu"] if device.type == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    isa = "" if device.type == "cuda" else f", {inverse_flow.build_info()['cpu_isa']}"
    return f"{where}{isa}; torch {torch.__version__}; inverse_flow {inverse_flow.__version__}"


# ---- Results ----


class Report:
    """The results of a run, beside what is needed to judge them; the file is written anew at each change.

    Args:
        benchmark: what the script is called in its results.
        arguments: of the script, all of which are kept.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace) -> None:
        self.path: Path | None = arguments.json
        device = arguments.device
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "hardware": hardware(device),
            "versions": versions(),
            "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "plot")},
        }
        allow_tf32(False)
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(arguments.threads if isinstance(arguments.threads, int) else arguments.threads[-1])
        print(f"{describe(device)}; threads {arguments.threads}", flush=True)

    def add(self, key: str, row: Any) -> None:
        """One more row of a list."""
        self.content.setdefault(key, []).append(row)
        self._write()

    def set(self, **values: Any) -> None:
        """Results that stand by themselves."""
        self.content |= values
        self._write()

    @contextmanager
    def checked(self, what: object) -> Iterator[None]:
        """A check that fails in here ends this block alone: it is reported, and the others are still measured."""
        try:
            yield
        except ArithmeticError as error:
            print(f"WRONG  {what}: {error}", file=sys.stderr, flush=True)
            self.add("failures", {"what": str(what), "error": str(error)})

    def finish(self) -> int:
        """The exit status."""
        if self.path:
            print(f"written: {self.path}")
        failures = len(self.content.get("failures", []))
        if failures:
            print(f"{failures} checks failed: nothing was measured there", file=sys.stderr)
        return 1 if failures else 0

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".tmp")
        unfinished.write_text(json.dumps(self.content, indent=2, default=_plain) + "\n")
        unfinished.replace(self.path)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


class Table:
    """A table in Markdown, printed row by row.

    Args:
        columns: format strings by their heads, for the entries of a row: ``{"ratio": "{ratio:.3f}"}``. An entry that a
            row lacks, or that is None, becomes a dash.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns
        self.widths: list[int] = []

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Prints some rows; the first ones decide how wide the columns are."""
        lines = [[_cell(form, row) for form in self.columns.values()] for row in rows]
        if lines and not self.widths:
            head = list(self.columns)
            self.widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
            first, *others = self.widths
            rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
            print(f"{self._line(head)}\n|{rule}|")
        for line in lines:
            print(self._line(line), flush=True)

    def _line(self, cells: Sequence[str]) -> str:
        first, *others = zip(cells, self.widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def _cell(form: str, row: Mapping[str, Any]) -> str:
    try:
        return form.format(**row)
    except (KeyError, TypeError):
        return "–"


# ---- Pictures ----


def new_figure(width: float, height: float) -> Figure:
    """An empty one; needs matplotlib."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """As ``path``.png and ``path``.svg, the same bytes for the same figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        print(f"written: {path.with_suffix(suffix)}")
