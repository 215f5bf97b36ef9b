"""What does a solve cost against ``F.conv2d`` or ``F.conv3d`` on the same tensors? And a call that computes nothing?

    python benchmarks/layer.py                           every shape, one thread and two
    python benchmarks/layer.py --quick --shapes 12x16    one shape, shorter
    python benchmarks/layer.py --volumes --corner general --json benchmarks/results/volumes.json
    python benchmarks/layer.py --dtype bfloat16 --rival float32      half-precision images against our float32 solve
    python benchmarks/layer.py --device cuda --pattern --json benchmarks/results/layer-gpu.json
    python benchmarks/layer.py --calls                   microseconds of a call on an empty batch

For every shape and kind of corner the solve and its gradients are checked first; then the operators are timed in turn
in this one process. The ratio is our time over the convolution's: below 1 the solve is the faster of the two. The
convolution pads to its input's size, so both read and write the same tensors; both have a bias. "of the limit" is the
share of the time in which this machine could not have done less: the multiply-adds at the rate of a large matrix
product, or the bytes at that of a copy. Large single images are summed up apart from the shapes of layers.

On a GPU the convolution runs in both layouts, of which the faster counts, with TF32 off and on; all of them eagerly and
replayed from a graph, where launches cost next to nothing. --pattern adds the launch pattern of the published code.

A call on an empty batch is Python, autograd, PyTorch's dispatcher, the checks, and what the kernels do before the first
image. F.conv2d takes part as the measure of what PyTorch's own operators cost, and a Function in Python that saves and
returns what ours does and computes nothing, as the measure of what ``autograd.grad`` costs by itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    RATIOS,
    Report,
    Table,
    Work,
    allow_tf32,
    compare,
    cuda_graph,
    elapsed_seconds,
    judged,
    parser,
    relative_error,
    require,
    spread,
    summarise,
    time_alternately,
)
from problems import CHECK_ROUNDINGS, CORNERS, MODES, Case, Operands, corners_that_solve, inverse_conv
from torch import Tensor

from inverse_flow import InverseConv2d, explain
from inverse_flow.functional import inverse_conv2d

CASES = [
    *(Case(100, c, s) for c, s in [(1, 28), (3, 32), (4, 14), (12, 16)]),
    Case(100, 12, 16, 5),
    *(Case(100, c, s) for c, s in [(12, 32), (16, 7), (24, 8), (24, 16), (48, 4), (48, 8), (96, 4)]),
    Case(1, 3, 256),
    Case(16, 12, 64),
]
# Too few images for lanes: the rows of one fill them.
LARGE_IMAGES = [Case(1, c, s) for c, s in [(3, 1024), (16, 128), (64, 64)]]
VOLUMES = [
    Case(*sizes, dimensions=3) for sizes in [(1, 4, 32), (1, 8, 32), (4, 8, 16), (16, 8, 16), (1, 16, 64), (32, 2, 32)]
]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
TF32 = {"tf32 off": False, "tf32 on": True}
# Of the ratios to the convolution, by device, set of shapes and mode.
TARGETS: dict[tuple[str, str, str], dict[str, float]] = {
    ("cpu", "layers", "forward"): {"mean": 0.5, "worst": 1.0},
    ("cpu", "layers", "forward+backward"): {"mean": 0.45, "worst": 1.0},
    ("cpu", "large images", "forward"): {"worst": 1.0},
    ("cpu", "volumes", "forward"): {"mean": 0.7, "worst": 1.2},
    ("cpu", "volumes", "forward+backward"): {"mean": 0.7, "worst": 1.2},
    ("cuda", "layers", "forward"): {"mean": 1.0, "worst": 1.5},
    ("cuda", "layers", "forward+backward"): {"mean": 0.9},
}
CALL_TARGETS = {"functional, no grad": 15.0, "functional, backward": 25.0}  # µs, on the CPU
BARE_BACKWARD = "bare Function, backward"
PATTERN_CALLS = 3
LIMIT_SIDE, LIMIT_BYTES = 512, 64 * 2**20


# ---- The solve ----


def machine_limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Multiply-adds and bytes per second, with as many threads as PyTorch has now."""
    matrix = torch.randn(LIMIT_SIDE, LIMIT_SIDE, device=device, dtype=dtype)
    source = torch.empty(LIMIT_BYTES // dtype.itemsize, device=device, dtype=dtype).fill_(1)
    copy = torch.empty_like(source)
    works: dict[str, Work] = {"multiply_adds": lambda: matrix @ matrix, "bytes": lambda: copy.copy_(source)}
    amounts = {"multiply_adds": LIMIT_SIDE**3, "bytes": 2 * LIMIT_BYTES}
    return {name: amounts[name] / min(s) for name, s in time_alternately(works, device, 0.0).items()}


def least_seconds(case: Case, mode: str, dtype: torch.dtype, limits: Mapping[str, float]) -> float:
    """What the limits allow: forward reads y and writes x; the backward pass reads x and g and writes u, and has the
    multiply-adds of a solve and of the weight's gradient."""
    values = math.prod(case.shape)
    passes, tensors = (1, 2) if mode == "forward" else (3, 5)
    work = passes * values * case.channels * math.prod(case.window)
    return max(work / limits["multiply_adds"], tensors * values * dtype.itemsize / limits["bytes"])


def with_tf32(work: Work, allowed: bool) -> Work:
    """A call under a setting of its own, so that all settings can be timed in turn."""

    def run() -> None:
        allow_tf32(allowed)
        work()

    return run


def candidates(mode: str, operands: Operands, arguments: argparse.Namespace) -> dict[tuple[str, str], Work]:
    """What competes, by (who, launch): ours with each corner, and the rivals."""
    padding = operands.weight.shape[-1] // 2
    solve, name, convolve = inverse_conv(operands.weight), "conv2d", F.conv2d
    if arguments.volumes:
        name, convolve = "conv3d", F.conv3d
    works = {f"ours, {corner}": operands.work(mode, solve, corner=corner) for corner in arguments.corner}
    if arguments.rival == "float32":
        exact = operands.in_float32()
        works |= {f"float32, {c}": exact.work(mode, solve, corner=c) for c in arguments.corner}
    elif arguments.device.type == "cpu":
        works[name] = operands.work(mode, convolve, padding=padding)
    else:
        layout = torch.channels_last_3d if arguments.volumes else torch.channels_last
        last = operands.map(lambda tensor: tensor.to(memory_format=layout))
        works = {name: with_tf32(work, False) for name, work in works.items()}
        for setting, allowed in TF32.items():
            for order, tensors in {"NCHW": operands, "channels_last": last}.items():
                rival = with_tf32(tensors.work(mode, convolve, padding=padding), allowed)
                works[f"{name} {order}, {setting}"] = rival
    found = {(name, "eager"): work for name, work in works.items()}
    if arguments.device.type == "cuda":
        found |= {(name, "graph"): cuda_graph(work) for name, work in works.items()}
        allow_tf32(False)
    return found


def rows_of(samples: Mapping[tuple[str, str], Sequence[float]], inputs: int) -> list[dict[str, Any]]:
    """A row for each launch, corner and setting of the rival: ours against the fastest one that fits."""
    rows = []
    for ours, launch in [key for key in samples if key[0].startswith("ours, ")]:
        corner = ours.removeprefix("ours, ")
        rivals = [name for name, other in samples if other == launch and not name.startswith("ours, ")]
        rivals = [name for name in rivals if not name.startswith("float32, ") or name.endswith(f", {corner}")]
        settings = [setting for setting in TF32 if any(name.endswith(setting) for name in rivals)]
        for setting in settings or [""]:
            fitting = [name for name in rivals if name.endswith(setting)]
            best = min(fitting, key=lambda name: statistics.median(samples[name, launch]))
            mine, theirs = ([s / inputs for s in samples[name, launch]] for name in (ours, best))
            rows.append({"corner": corner, "launch": launch, "rival": best, "tf32": setting, **compare(mine, theirs)})
    return rows


def pattern_ms(mode: str, operands: Operands) -> float:
    """Milliseconds of a call in the launch pattern of the published code.

    Raises:
        ArithmeticError: its results differ from ours, or it cannot be built.
    """
    import published_pattern

    y, weight = operands.inputs[0], operands.weight
    try:
        theirs = published_pattern.solve(y, weight)
    except (RuntimeError, OSError) as error:
        raise ArithmeticError(f"it cannot be built or run: {error}") from error
    ours = inverse_conv2d(y, weight, corner="unit_triangular")
    require({"the published pattern": relative_error(theirs, ours)}, CHECK_ROUNDINGS * torch.finfo(y.dtype).eps)

    def work() -> None:
        x = published_pattern.solve(y, weight)
        if mode != "forward":
            published_pattern.backward(operands.grad, x, weight)

    work()
    return 1e3 * min(elapsed_seconds(work, 1, y.device) for _ in range(PATTERN_CALLS))


def summary_of(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Means and worst ratio of each mode and setting, of layers and of large images, with the targets."""
    found = summarise(rows, ("threads", "launch", "tf32", "corner", "set", "mode"), also=("of_the_limit",))
    for entry in found if arguments.rival == "convolution" else ():
        entry["targets"] = judged(entry, TARGETS.get((arguments.device.type, entry["set"], entry["mode"]), {}))
    return found


def measure(
    case: Case,
    mode: str,
    operands: Operands,
    limits: Mapping[str, float],
    report: Report,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The rows of one shape and mode."""
    works = candidates(mode, operands, arguments)
    samples = time_alternately(works, arguments.device, arguments.budget)
    pattern = None
    if arguments.pattern:
        with report.checked(f"published pattern, {case}, {mode}"):
            pattern = pattern_ms(mode, operands)
    least_ms = 1e3 * least_seconds(case, mode, DTYPES[arguments.dtype], limits)
    of_set = "volumes" if arguments.volumes else "large images" if case in LARGE_IMAGES else "layers"
    regime = explain(case.shape, case.window, backward=mode != "forward", device=arguments.device).regime
    rows = []
    for row in rows_of(samples, len(operands.inputs)):
        row |= {"shape": str(case), "mode": mode, "set": of_set, "regime": regime}
        row["threads"] = torch.get_num_threads()
        row |= {"of_the_limit": least_ms / row["ours_ms"], "pattern_ms": pattern}
        if pattern and row["corner"] == "unit_triangular":
            row["pattern_ratio"] = pattern / row["ours_ms"]
        rows.append(row)
    return rows


def compare_shapes(report: Report, arguments: argparse.Namespace) -> None:
    """Every shape, with every number of threads: a row as soon as it is measured."""
    columns = {
        "B x C x H, kernel, mode": "{shape:24} {mode:16}",
        "corner": "{corner:15}",
        "setting": "{threads} thread(s)" if arguments.device.type == "cpu" else "{launch}, {rival:30}",
        "ours ms": "{ours_ms:.4f}",
        f"{arguments.rival} ms": "{rival_ms:.4f}",
        **RATIOS,
        "of the limit": "{of_the_limit:.2f}",
    }
    if arguments.pattern:
        columns["pattern / ours"] = "{pattern_ratio:.0f}"
    table, rows, dtype = Table(columns), [], DTYPES[arguments.dtype]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        limits = machine_limits(dtype, arguments.device)
        report.add("limits", {"threads": threads, **limits})
        for case in arguments.shapes:
            operands = Operands.make(case, dtype, arguments.device)
            correct = corners_that_solve(case, operands, report, arguments.corner)
            right = argparse.Namespace(**{**vars(arguments), "corner": correct})
            for mode in arguments.mode if correct else ():
                for row in measure(case, mode, operands, limits, report, right):
                    rows.append(row)
                    report.add("rows", row)
                    table.add(row)
    summary = summary_of(rows, arguments)
    report.set(summary=summary)
    print()
    columns = {"mode, set, corner": "{mode}, {shapes} {set}, {corner}", "setting": "{threads}, {launch} {tf32}"}
    columns |= {name: f"{{{name}:.3f}}" for name in ("mean", "worst", "fastest")}
    Table(columns | {"of the limit": "{of_the_limit:.2f}", "targets": "{targets}"}).add(*summary)


# ---- The call ----


class BareFunction(torch.autograd.Function):
    """Saves, and hands back, what the solve does; computes nothing."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return input.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        _, weight, bias = ctx.saved_tensors
        return grad_output, weight, bias


def calls(device: torch.device) -> dict[str, Work]:
    """Calls on an empty batch; a backward pass is timed by itself, over a graph that is kept.

    Raises:
        ArithmeticError: such a call does not give an empty result, and gradients of zero.
    """
    layer = InverseConv2d(3, device=device)
    input = torch.empty(0, 3, 8, 8, device=device, requires_grad=True)
    leaves = (input, layer.weight.detach().requires_grad_(), torch.zeros(3, device=device, requires_grad=True))
    plain, grad = tuple(tensor.detach() for tensor in leaves), torch.empty_like(input)

    def solve(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return inverse_conv2d(y, w, b, corner="unit_triangular")

    def convolve(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(y, w, b, padding=1)

    gradients = torch.autograd.grad(solve(*leaves), leaves, grad)
    if solve(*plain).shape != input.shape or any(bool(gradient.any()) for gradient in gradients):
        raise ArithmeticError("an empty batch does not give an empty result and gradients of zero")

    def without_grad(work: Work) -> Work:
        def run() -> None:
            with torch.no_grad():
                work()

        return run

    def backward(output: Tensor, inputs: tuple[Tensor, ...]) -> Work:
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    # The operators themselves: order top-left, unit triangular corner, not transposed.
    ours, chosen = torch.ops.inverse_flow, ((0,), 1, False)
    return {
        "operator, no grad": without_grad(lambda: ours.solve(*plain, *chosen)),
        "functional, no grad": without_grad(lambda: solve(*plain)),
        "module, no grad": without_grad(lambda: layer(plain[0])),
        "conv2d, no grad": without_grad(lambda: convolve(*plain)),
        "functional, with grad": lambda: solve(*leaves),
        "module, with grad": lambda: layer(input),
        "conv2d, with grad": lambda: convolve(*leaves),
        "operator, backward": without_grad(lambda: ours.solve_backward(grad, plain[0], plain[1], *chosen)),
        "functional, backward": backward(solve(*leaves), leaves),
        BARE_BACKWARD: backward(BareFunction.apply(*leaves), leaves),
        "module, backward": backward(layer(input)[0], (input, *layer.parameters())),
        "conv2d, backward": backward(convolve(*leaves), leaves),
    }


def time_calls(report: Report, arguments: argparse.Namespace) -> None:
    samples = time_alternately(calls(arguments.device), arguments.device, arguments.budget)
    rows = [{"call": name, **spread(seconds)} for name, seconds in samples.items()]
    for row in rows:
        row |= {f"{name}_us": 1e3 * row[f"{name}_ms"] for name in ("p20", "p80", "fastest")}
        row["median_us"] = 1e3 * row["ms"]
        row["target"] = CALL_TARGETS.get(row["call"]) if arguments.device.type == "cpu" else None
    names = ("median", "p20", "p80", "fastest")
    columns = {"call on an empty batch, µs": "{call}", **{name: f"{{{name}_us:.2f}}" for name in names}}
    Table(columns | {"target": "{target:.0f}"}).add(*rows)
    medians = {row["call"]: row["median_us"] for row in rows}
    above = medians["functional, backward"] - medians[BARE_BACKWARD]
    print(f"functional, backward, above a bare Function: {above:.1f} µs")
    report.set(rows=rows)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, threads=(1, 2), budget=1.5)
    made.add_argument(
        "--shapes", type=Case.parse, nargs="+", metavar="BxCxHxK", help="also CxH (B=100, K=3) and BxCxH (K=3)"
    )
    made.add_argument("--volumes", action="store_true", help="volumes of H³ values, beside F.conv3d")
    made.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    made.add_argument("--corner", choices=CORNERS, nargs="+", default=["general", "unit_triangular"])
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument(
        "--rival", choices=("convolution", "float32"), default="convolution", help="float32: our own solve of it"
    )
    made.add_argument("--quick", action="store_true", help="a fifth of the budget")
    made.add_argument("--pattern", action="store_true", help="also the published launch pattern, on a GPU")
    made.add_argument("--calls", action="store_true", help="what a call on an empty batch costs, and nothing else")
    arguments = made.parse_args(given)
    if arguments.shapes is None:
        arguments.shapes = VOLUMES if arguments.volumes else [*CASES, *LARGE_IMAGES]
    elif arguments.volumes:
        arguments.shapes = [replace(case, dimensions=3) for case in arguments.shapes]
    if arguments.calls:
        arguments.threads, arguments.budget = [1], max(20.0, arguments.budget) if arguments.budget else 0.0
    elif arguments.device.type == "cuda":
        arguments.threads = [torch.get_num_threads()]
    if arguments.quick:
        arguments.budget /= 5
    if arguments.pattern and (arguments.device.type, arguments.dtype, arguments.volumes) != ("cuda", "float32", False):
        made.error("--pattern needs --device cuda, float32 and images")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    report = Report("overhead" if arguments.calls else "volumes" if arguments.volumes else "layer", arguments)
    if arguments.calls:
        with report.checked("an empty batch"):
            time_calls(report, arguments)
    else:
        compare_shapes(report, arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
