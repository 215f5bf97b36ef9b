"""What does a solve of signals cost against ``F.conv1d`` on the same tensors, and against other all-pole filters?

    python benchmarks/signals.py                             every shape, one thread and two
    python benchmarks/signals.py --shapes 1x1x100000x3       one shape: B x C x L x K
    python benchmarks/signals.py --mode forward --json benchmarks/results/signals.json

For every shape and kind of corner the solve and its gradients are checked first; then the operators are timed in turn
in this one process. The ratio is our time over the rival's: below 1 the solve is the faster of the two. The convolution
has the solve's window and bias, and is padded by half its window.

Of one channel the solve is an all-pole filter, and there are others: ``scipy.signal.lfilter``, in float64 and in the
signals' type, and ``torchlpc``, whose filters may change from sample to sample. Each takes part where it is installed
(pip install scipy torchlpc), after it has been checked against the solve.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    RATIOS,
    Report,
    Table,
    Work,
    compare,
    judged,
    parser,
    relative_error,
    require,
    summarise,
    time_alternately,
)
from problems import CHECK_ROUNDINGS, CORNERS, MODES, Operands, Signal, corners_that_solve
from torch import Tensor

from inverse_flow import explain
from inverse_flow.functional import inverse_conv2d

BATCHES, CHANNELS, LENGTHS, KERNELS = (8, 100), (1, 4, 16, 64), (256, 2048, 16384), (2, 3, 9, 33)
SINGLE = [Signal(1, 1, 100_000), Signal(1, 16, 20_000)]
# Of the ratios: the geometric mean over the batches, and single signals.
BATCH_TARGET = 0.7
SINGLE_TARGETS = {
    (str(SINGLE[0]), "conv1d"): 1.0,
    (str(SINGLE[0]), "lfilter, float64"): 0.5,
    (str(SINGLE[1]), "conv1d"): 3.0,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Batches beyond this many multiply-adds are left out: the largest would take seconds per call.
MOST_WORK = 4_000_000_000


def work_of(case: Signal) -> int:
    """Multiply-adds of the convolution."""
    return case.batch * case.channels**2 * case.size * case.kernel


def parse(text: str) -> Signal:
    """BxCxLxK, for argparse."""
    try:
        batch, channels, size, kernel = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is BxCxLxK, got {text!r}") from None
    if min(batch, channels, size, kernel) < 1:
        raise argparse.ArgumentTypeError(f"sizes are at least 1, got {text!r}")
    return Signal(batch, channels, size, kernel)


# ---- Rivals ----


def convolution(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.conv1d`` on images of one row; of an even window the last output is left out."""
    output = F.conv1d(input.squeeze(2), weight.squeeze(2), bias, padding=weight.shape[-1] // 2)
    return output[..., : input.shape[-1]].unsqueeze(2)


def polynomial(weight: Tensor) -> Tensor:
    """Coefficients of one channel's recurrence, the present first: a[0] x[t] + a[1] x[t − 1] + … = y[t]."""
    return weight.flatten().flip(0)


def lfilter(operands: Operands, dtype: torch.dtype) -> Callable[[], Tensor]:
    """``scipy.signal.lfilter``: its numerator is 1, its denominator the taps."""
    from scipy import signal

    right = (operands.inputs[0] - operands.bias).to(dtype).numpy()
    a = polynomial(operands.weight).to(dtype).numpy()
    b = torch.ones(1, dtype=dtype).numpy()
    return lambda: torch.from_numpy(signal.lfilter(b, a, right))


def torchlpc(operands: Operands) -> Callable[[], Tensor]:
    """``torchlpc.sample_wise_lpc``, with the same filter at every sample."""
    from torchlpc import sample_wise_lpc

    a = polynomial(operands.weight)
    right = (operands.inputs[0] - operands.bias).flatten(0, 2) / a[0]
    coefficients = (a[1:] / a[0]).expand(*right.shape, -1).contiguous()
    return lambda: sample_wise_lpc(right, coefficients).view_as(operands.inputs[0])


def filters(case: Signal, operands: Operands) -> dict[str, Callable[[], Tensor]]:
    """The all-pole filters that are installed, for one channel; each solves the problem of the general corner."""
    found: dict[str, Callable[[], Tensor]] = {}
    if case.channels > 1:
        return found
    if importlib.util.find_spec("scipy"):
        found |= {f"lfilter, {name}": lfilter(operands, dtype) for name, dtype in DTYPES.items()}
    if importlib.util.find_spec("torchlpc") and case.kernel > 1:
        found["torchlpc"] = torchlpc(operands)
    return found


# ---- The comparison ----


def candidates(case: Signal, mode: str, operands: Operands, corners: Sequence[str]) -> dict[str, Work]:
    """What competes.

    Raises:
        ArithmeticError: a filter does not solve the same problem.
    """
    works = {f"ours, {corner}": operands.work(mode, inverse_conv2d, corner=corner) for corner in corners}
    works["conv1d"] = operands.work(mode, convolution)
    if mode == "forward" and "general" in corners:
        wanted = inverse_conv2d(operands.inputs[0], operands.weight, operands.bias)
        allowed = CHECK_ROUNDINGS * torch.finfo(wanted.dtype).eps
        for name, solve in filters(case, operands).items():
            require({name: relative_error(solve(), wanted)}, allowed)
            works[name] = solve
    return works


def rows_of(samples: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each of our corners and each rival."""
    ours = [name for name in samples if name.startswith("ours, ")]
    rivals = [name for name in samples if name not in ours]
    return [
        {"corner": name.removeprefix("ours, "), "rival": rival, **compare(samples[name], samples[rival])}
        for name in ours
        for rival in rivals
        # The filters read the corner tap.
        if rival == "conv1d" or name == "ours, general"
    ]


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and worst ratio to each rival, of batches and of each single signal, with the targets."""
    found = summarise(rows, ("threads", "mode", "corner", "rival", "set"))
    for entry in found:
        aim = SINGLE_TARGETS.get((entry["set"], entry["rival"]))
        if entry["set"] == "batches" and entry["rival"] == "conv1d":
            aim = BATCH_TARGET
        if aim is not None:
            entry["targets"] = judged(entry, {"mean": aim})
    return found


def compare_shapes(report: Report, arguments: argparse.Namespace) -> None:
    columns = {
        "B x C x L, kernel, mode": "{shape:24} {mode:16}",
        "corner": "{corner:15}",
        "threads": "{threads}",
        "regime": "{regime:16}",
        "rival": "{rival:16}",
        "ours ms": "{ours_ms:.4f}",
        "rival ms": "{rival_ms:.4f}",
        **RATIOS,
    }
    table, rows, dtype = Table(columns), [], DTYPES[arguments.dtype]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for case in arguments.shapes:
            operands = Operands.make(case, dtype)
            correct = corners_that_solve(case, operands, report, arguments.corner)
            for mode in arguments.mode if correct else ():
                plan = explain(case.shape, case.window, dtype=dtype, backward=mode != "forward")
                place = {"shape": str(case), "mode": mode, "threads": threads, "regime": plan.regime}
                place["set"] = "batches" if case.batch >= min(BATCHES) else str(case)
                with report.checked(f"the rivals of {case}"):
                    samples = time_alternately(
                        candidates(case, mode, operands, correct), arguments.device, arguments.budget
                    )
                    for row in rows_of(samples):
                        rows.append(place | row)
                        report.add("rows", rows[-1])
                        table.add(rows[-1])
    summary = summary_of(rows)
    report.set(summary=summary)
    print()
    columns = {"mode, set, corner": "{mode}, {shapes} {set}, {corner}", "threads": "{threads}", "rival": "{rival}"}
    columns |= {name: f"{{{name}:.3f}}" for name in ("mean", "worst", "fastest")}
    Table(columns | {"targets": "{targets}"}).add(*summary)


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=(1, 2), budget=0.5, device=False)
    made.add_argument("--shapes", type=parse, nargs="+", metavar="BxCxLxK")
    made.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    made.add_argument("--corner", choices=CORNERS, nargs="+", default=["general", "unit_triangular"])
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument("--most-work", type=int, default=MOST_WORK, help="multiply-adds of the largest batches")
    arguments = made.parse_args(given)
    if arguments.shapes is None:
        grid = [Signal(b, c, s, k) for b in BATCHES for c in CHANNELS for s in LENGTHS for k in KERNELS]
        arguments.shapes = [*SINGLE, *(case for case in grid if work_of(case) <= arguments.most_work)]
    report = Report("signals", arguments)
    compare_shapes(report, arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
