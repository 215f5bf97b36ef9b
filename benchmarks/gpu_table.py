"""The solve against conv2d on a GPU, every way a GPU can be asked: one table, predictions beside it.

    python benchmarks/gpu_table.py --json benchmarks/results/gpu-table.json
    python benchmarks/gpu_table.py --device cpu --budget 0.05    runs the same code where there is no GPU

For each shape, forward and forward+backward: the solve and ``F.conv2d`` in both layouts, the latter with TF32 off and
on, eagerly and replayed from a graph, all in turn in one process; the launch pattern of the published code; and what
benchmarks/cost_model.py predicts for an H200. Correctness is checked first. A ratio is our time over that of the
faster layout of conv2d; for the pattern, its time over ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cost_model
import layer
import torch
import torch.nn.functional as F
from common import (
    Work,
    cuda_graph,
    describe,
    elapsed_seconds,
    geometric_mean,
    print_table,
    time_alternately,
    write_json,
)

from inverse_flow.functional import inverse_conv2d

CORNER = "unit_triangular"
SETTINGS = {"tf32 off": False, "tf32 on": True}
LAUNCHES = ("graph", "eager")
TARGETS = {
    "forward": {"geometric mean": 1.0, "worst": 1.5},
    "forward+backward": {"geometric mean": 0.9},
    # At 12 × 32².
    "published pattern": 100.0,
}
PATTERN_TARGET = layer.Case(100, 12, 32)
PATTERN_CALLS = 3


def layer_case(case: cost_model.Case) -> layer.Case:
    return layer.Case(case.batch, case.channels, case.size, case.kernel)


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


class WithTf32:
    """A call that runs under a setting of its own, so that all settings can be timed in turn."""

    def __init__(self, work: Work, allowed: bool) -> None:
        self.work, self.allowed = work, allowed

    def __call__(self) -> None:
        set_tf32(self.allowed)
        self.work()


def candidates(mode: str, operands: layer.Operands, device: torch.device) -> dict[str, Work]:
    """What competes, by name: "who, launch"."""
    make = layer.forward_work if mode == "forward" else layer.training_work
    padding = operands.weight.shape[-1] // 2
    layouts = {"NCHW": operands, "channels_last": layer.channels_last(operands)}
    works: dict[str, Work] = {"ours": WithTf32(make(inverse_conv2d, operands, corner=CORNER), False)}
    for setting, allowed in SETTINGS.items():
        for layout, tensors in layouts.items():
            works[f"conv2d {layout}, {setting}"] = WithTf32(make(F.conv2d, tensors, padding=padding), allowed)
    count = len(operands.inputs)
    found = {f"{name}, eager": layer.rotation(work, count) for name, work in works.items()}
    if device.type == "cuda":
        found |= {f"{name}, graph": cuda_graph(layer.rotation(work, count)) for name, work in works.items()}
    return found


def summarise(samples: Mapping[str, Sequence[float]], calls: int) -> dict[str, Any]:
    """Microseconds of each candidate, and for each launch and setting the faster layout and the ratio to it."""
    micros = {name: statistics.median(seconds) * 1e6 / calls for name, seconds in samples.items()}
    row: dict[str, Any] = {"microseconds": micros, "comparisons": {}}
    for launch in LAUNCHES:
        if f"ours, {launch}" not in micros:
            continue
        for setting in SETTINGS:
            rivals = {name: us for name, us in micros.items() if name.endswith(f"{setting}, {launch}")}
            best = min(rivals, key=lambda name: rivals[name])
            row["comparisons"][f"{launch}, {setting}"] = {
                "ours_us": micros[f"ours, {launch}"],
                "conv2d_us": rivals[best],
                "layout": best.split()[1].rstrip(","),
                "ratio": micros[f"ours, {launch}"] / rivals[best],
            }
    return row


def pattern_seconds(mode: str, operands: layer.Operands) -> float:
    """Seconds of a call in the launch pattern of the published code, after a check.

    Raises:
        ArithmeticError: its results differ from ours.
    """
    import published_pattern

    y, weight = operands.inputs[0], operands.weight
    ours = inverse_conv2d(y, weight, corner=CORNER)
    theirs = published_pattern.solve(y, weight)
    error = float((ours - theirs).norm() / ours.norm())
    if not error <= layer.CHECK_ROUNDINGS * torch.finfo(y.dtype).eps:
        raise ArithmeticError(f"the published pattern is off by {error:.1e}")

    def work() -> None:
        x = published_pattern.solve(y, weight)
        if mode != "forward":
            published_pattern.backward(operands.grad, x, weight)

    work()
    return min(elapsed_seconds(work, 1, y.device) for _ in range(PATTERN_CALLS))


def predicted_us(case: cost_model.Case, mode: str) -> float:
    forward = cost_model.predict(case)[0].total
    return forward if mode == "forward" else forward + cost_model.predict(case, backward=True)[0].total


def measure(
    case: cost_model.Case, mode: str, operands: layer.Operands, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    samples = time_alternately(candidates(mode, operands, arguments.device), arguments.device, arguments.budget)
    row: dict[str, Any] = {"shape": str(case), "mode": mode, **summarise(samples, len(operands.inputs))}
    row["predicted_us"] = predicted_us(case, mode)
    row["pattern_us"] = None
    if arguments.device.type == "cuda":
        row["pattern_us"] = pattern_seconds(mode, operands) * 1e6
    return row


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target, what was reached, and whether that keeps it."""
    found = []
    for mode in layer.MODES:
        members = [row for row in rows if row["mode"] == mode]
        for key in dict.fromkeys(key for row in members for key in row["comparisons"]):
            ratios = [row["comparisons"][key]["ratio"] for row in members]
            reached = {"geometric mean": geometric_mean(ratios), "worst": max(ratios)}
            for name, target in TARGETS[mode].items():
                entry = {"what": f"{mode}, {key}: {name}", "reached": reached[name], "at most": target}
                found.append({**entry, "kept": reached[name] <= target})
    for row in rows:
        if row["pattern_us"] is not None and row["shape"] == str(cost_model.Case(*vars(PATTERN_TARGET).values())):
            ratio = row["pattern_us"] / row["microseconds"]["ours, graph"]
            target = TARGETS["published pattern"]
            entry = {"what": f"published pattern, {row['mode']}: its time over ours", "reached": ratio}
            found.append({**entry, "at least": target, "kept": ratio >= target})
    return found


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row["comparisons"]))
    header = ["shape, mode", "predicted µs"]
    for key in keys:
        header += [f"ours, {key.split(',')[0]}", f"conv2d, {key}", "ratio"]
    cells = []
    for row in rows:
        line = [f"{row['shape']}, {row['mode']}", f"{row['predicted_us']:.1f}"]
        for key in keys:
            part = row["comparisons"][key]
            line += [f"{part['ours_us']:.1f}", f"{part['conv2d_us']:.1f} {part['layout']}", f"{part['ratio']:.2f}"]
        pattern = row["pattern_us"]
        cells.append([*line, "" if pattern is None else f"{pattern / row['microseconds']['ours, graph']:.0f}"])
    print_table([*header, "pattern / ours"], cells)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default) or cpu")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timing for each row")
    parser.add_argument("--shapes", type=int, default=len(cost_model.CASES), help="only the first so many shapes")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.backends.cudnn.benchmark = True
    print(describe(arguments.device))
    rows, checks, failures = [], [], []
    for case in cost_model.CASES[: arguments.shapes]:
        set_tf32(False)
        operands = layer.make_operands(layer_case(case), torch.float32, arguments.device)
        try:
            checks.append({"shape": str(case), **layer.check(operands, CORNER)})
            rows += [measure(case, mode, operands, arguments) for mode in layer.MODES]
        except ArithmeticError as error:
            print(f"WRONG  {case}: {error}", file=sys.stderr)
            failures.append({"shape": str(case), "error": str(error)})
    set_tf32(False)
    if rows:
        print_rows(rows)
        print()
    judged = verdicts(rows)
    for entry in judged:
        bound = f"at most {entry['at most']}" if "at most" in entry else f"at least {entry['at least']}"
        print(f"{entry['what']} {entry['reached']:.3g} (target {bound}): {'kept' if entry['kept'] else 'MISSED'}")
    if arguments.json:
        settings = {"budget_seconds": arguments.budget, "corner": CORNER, "targets": TARGETS}
        results = {"rows": rows, "targets": judged, "checks": checks, "failures": failures}
        write_json(arguments.json, "gpu_table", arguments.device, settings, results)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
