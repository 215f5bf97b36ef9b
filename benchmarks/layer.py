"""What does a solve cost against ``F.conv2d`` on the same tensors?

    python benchmarks/layer.py                           every shape, one thread and two
    python benchmarks/layer.py --quick --shapes 12x16    one shape, shorter
    python benchmarks/layer.py --dtype bfloat16 --rival float32      half-precision images against our float32 solve
    python benchmarks/layer.py --device cuda --json benchmarks/results/layer-gpu.json

For every shape the solve and its gradients are checked first; then the two operators are timed in turn in this one
process. The ratio is our time over the convolution's: below 1 the solve is the faster of the two. The convolution
pads to its input's size, so both read and write the same tensors; both have a bias. Large single
images are summed up apart from the shapes of layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    Case,
    Work,
    compare,
    cuda_graph,
    describe,
    geometric_mean,
    print_table,
    time_alternately,
    write_json,
)
from torch import Tensor

from inverse_flow.functional import causal_conv2d, inverse_conv2d
from inverse_flow.reference import inverse_conv2d as plain_recurrence

# The tap's standard deviation times the square root of the fan-in: well conditioned, and far from the identity.
GAIN = 0.25
# The weights of a check are the same as those timed. Relative error allowed, in units of the dtype's rounding: the
# sums of a step have some hundred terms, and half-precision images are rounded once.
CHECK_ROUNDINGS = 64
# The plain recurrence takes this many tap steps in well under a second; larger images are checked by the residual.
RECURRENCE_STEPS = 12_000
# On a GPU, inputs are rotated through this much memory: more than its cache, so that no call finds its input there.
ROTATED_BYTES = 256 * 2**20
MAX_ROTATED = 32

MODES = ("forward", "forward+backward")
# By set of shapes and by mode.
TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "layers": {"forward": {"geometric mean": 0.45, "worst": 0.8}, "forward+backward": {"geometric mean": 0.5}},
    "large images": {"forward": {"worst": 1.0}},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


CASES = [
    *(Case(100, c, s) for c, s in [(1, 28), (3, 32), (4, 14), (12, 16)]),
    Case(100, 12, 16, 5),
    *(Case(100, c, s) for c, s in [(12, 32), (16, 7), (24, 8), (24, 16), (48, 4), (48, 8), (96, 4)]),
    Case(1, 3, 256),
    Case(16, 12, 64),
]
# Too few images for lanes: the rows of one fill them.
LARGE_IMAGES = [Case(1, c, s) for c, s in [(3, 1024), (16, 128), (64, 64)]]


def parse_case(text: str) -> Case:
    """CxH, BxCxH or BxCxHxK; B is 100 and K is 3 where they are left out."""
    try:
        numbers = [int(part) for part in text.split("x")]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a shape is CxH, BxCxH or BxCxHxK, got {text!r}")
    case = Case(100, *numbers) if len(numbers) == 2 else Case(*numbers)
    if case.kernel % 2 == 0:
        raise argparse.ArgumentTypeError(f"the kernel must be odd for a convolution that keeps the size, got {text!r}")
    return case


@dataclass
class Operands:
    """The tensors of a case: ``inputs`` are rotated through, the rest is shared."""

    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor
    grad: Tensor

    def differentiable(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(input, weight, bias) that all require gradients, rotating through the inputs for ever."""
        weight, bias = self.weight.detach().requires_grad_(), self.bias.detach().requires_grad_()
        return cycle([(x.detach().requires_grad_(), weight, bias) for x in self.inputs])


def make_operands(case: Case, dtype: torch.dtype, device: torch.device) -> Operands:
    """Seeded random tensors of a case."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (case.batch, case.channels, case.size, case.size)
    weight = normal(case.channels, case.channels, case.kernel, case.kernel)
    weight *= GAIN / weight[0].numel() ** 0.5
    weight[:, :, -1, -1] += torch.eye(case.channels)
    images = normal(*shape).to(device, dtype)
    count = 1
    if device.type == "cuda":
        count = max(2, min(MAX_ROTATED, ROTATED_BYTES // (images.numel() * images.element_size())))
    return Operands(
        [images.roll(i, 0) for i in range(count)],
        weight.to(device, dtype),
        normal(case.channels).to(device, dtype),
        normal(*shape).to(device, dtype),
    )


def check(operands: Operands, corner: str) -> dict[str, float]:
    """Relative errors of the solve and of its three gradients, against float64 arithmetic that shares no kernel with
    ours: the residual A x + b − y, the adjoint residual Aᵀ u − g, and the weight gradient of the convolution.

    Raises:
        ArithmeticError: one of them is too large, or not a number.
    """
    y, weight, bias = next(operands.differentiable())
    x = inverse_conv2d(y, weight, bias, corner=corner)
    u, grad_weight, grad_bias = torch.autograd.grad(x, (y, weight, bias), operands.grad)

    # The adjoint of the convolution at (x, u) holds all that the gradients of the solve are made of.
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    again = causal_conv2d(x64, weight64, bias.detach().double(), corner=corner)
    adjoint, conv_grad_weight = torch.autograd.grad(again, (x64, weight64), u.double())

    def relative(found: Tensor, wanted: Tensor) -> float:
        return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))

    errors = {
        "residual": relative(again.detach(), y.detach()),
        "grad_input": relative(adjoint, operands.grad),
        "grad_weight": relative(grad_weight, -conv_grad_weight),
        "grad_bias": relative(grad_bias, -u.double().sum((0, 2, 3))),
    }
    if y.shape[2] * y.shape[3] * weight.shape[2] * weight.shape[3] <= RECURRENCE_STEPS:
        oracle = plain_recurrence(
            y[:2].detach().double(), weight.detach().double(), bias.detach().double(), corner=corner
        )
        errors["recurrence"] = relative(x[:2].detach(), oracle)
    allowed = CHECK_ROUNDINGS * torch.finfo(y.dtype).eps
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise ArithmeticError(f"relative error above {allowed:.1e}: {', '.join(wrong)}")
    return errors


def forward_work(operator: Any, operands: Operands, **arguments: Any) -> Work:
    """One forward call without autograd."""
    rotating = cycle(operands.inputs)

    def work() -> None:
        with torch.no_grad():
            operator(next(rotating), operands.weight, operands.bias, **arguments)

    return work


def training_work(operator: Any, operands: Operands, **arguments: Any) -> Work:
    """One forward and one backward call, with the gradients of input, weight and bias."""
    rotating = operands.differentiable()

    def work() -> None:
        leaves = next(rotating)
        torch.autograd.grad(operator(*leaves, **arguments), leaves, operands.grad)

    return work


def channels_last(operands: Operands) -> Operands:
    """The same values, in the layout that cuDNN prefers."""
    last = torch.channels_last
    return Operands(
        [x.to(memory_format=last) for x in operands.inputs],
        operands.weight.to(memory_format=last),
        operands.bias,
        operands.grad.to(memory_format=last),
    )


def in_float32(operands: Operands) -> Operands:
    """The same values as float32."""
    return Operands(
        [x.float() for x in operands.inputs], operands.weight.float(), operands.bias.float(), operands.grad.float()
    )


def candidates(mode: str, operands: Operands, corner: str, device: torch.device, rival: str) -> dict[str, Work]:
    """What competes: ours, and the rival, which is the convolution or our own solve of float32 images; on a GPU the
    convolution in both layouts, and all of them also replayed from a CUDA graph, where launches cost next to nothing.
    """
    make = forward_work if mode == "forward" else training_work
    padding = operands.weight.shape[-1] // 2
    found = {"ours": make(inverse_conv2d, operands, corner=corner)}
    if rival == "float32":
        found[rival] = make(inverse_conv2d, in_float32(operands), corner=corner)
    else:
        found[rival] = make(F.conv2d, operands, padding=padding)
    if device.type == "cuda":
        if rival == "conv2d":
            found["conv2d channels_last"] = make(F.conv2d, channels_last(operands), padding=padding)
        found |= {f"{name} graph": cuda_graph(rotation(work, len(operands.inputs))) for name, work in found.items()}
        for name in [name for name in found if not name.endswith("graph")]:
            found[name] = rotation(found[name], len(operands.inputs))
    return found


def rotation(work: Work, count: int) -> Work:
    """``work`` once for each of ``count`` inputs: what a graph has to capture to rotate at all."""

    def all_inputs() -> None:
        for _ in range(count):
            work()

    return all_inputs


def measure(case: Case, mode: str, operands: Operands, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row (on a GPU one for eager calls and one for graph replay): ours against the faster rival."""
    works = candidates(mode, operands, arguments.corner, arguments.device, arguments.rival)
    samples = time_alternately(works, arguments.device, arguments.budget)
    rows = []
    for launch, suffix in (("eager", ""), ("graph", " graph")):
        names = [name for name in samples if not name.startswith("ours") and name.endswith("graph") == bool(suffix)]
        if not names:
            continue
        rival = min(names, key=lambda name: statistics.median(samples[name]))
        calls = len(operands.inputs)
        ours_samples, rival_samples = ([s / calls for s in samples[name]] for name in (f"ours{suffix}", rival))
        row = {"shape": str(case), "mode": mode, "launch": launch, "rival": rival.removesuffix(suffix)}
        row["set"] = "large images" if case in LARGE_IMAGES else "layers"
        rows.append(row | compare(ours_samples, rival_samples))
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and worst ratio of each mode and setting, of layers and of large images."""
    found = []
    names = ("threads", "launch", "set", "mode")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        members = [row for row in rows if tuple(row[name] for name in names) == key]
        ratios = [row["ratio"] for row in members]
        figures = {"geometric mean": geometric_mean(ratios), "worst": max(ratios)}
        figures["of the fastest samples"] = geometric_mean([row["ratio_fastest"] for row in members])
        found.append(dict(zip(names, key, strict=True)) | figures | {"shapes": len(ratios)})
    return found


def print_summary(summary: list[dict[str, Any]], device: torch.device, rival: str) -> None:
    """The figures, with the CPU's targets against the convolution beside them."""
    print()
    for entry in summary:
        where = f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"
        figures = []
        for name in ("geometric mean", "worst", "of the fastest samples"):
            targets = TARGETS[entry["set"]].get(entry["mode"], {})
            target = targets.get(name) if device.type == "cpu" and rival == "conv2d" else None
            figures.append(f"{name} {entry[name]:.3f}" + (f" (target at most {target})" if target else ""))
        setting = where if device.type == "cpu" else entry["launch"]
        print(f"{entry['mode']}, {setting}, {entry['shapes']} {entry['set']}: {', '.join(figures)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads to measure with")
    parser.add_argument(
        "--shapes",
        type=parse_case,
        nargs="+",
        default=[*CASES, *LARGE_IMAGES],
        metavar="BxCxHxK",
        help="also CxH (B=100, K=3) and BxCxH (K=3)",
    )
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--rival", choices=("conv2d", "float32"), default="conv2d", help="float32: our own solve of float32 images"
    )
    parser.add_argument("--corner", choices=("identity", "unit_triangular", "general"), default="unit_triangular")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timing for each row")
    parser.add_argument("--quick", action="store_true", help="a fifth of the budget")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.budget /= 5
    if arguments.device.type == "cuda":
        arguments.threads = [torch.get_num_threads()]
    return arguments


def main() -> int:
    arguments = parse_arguments()
    # The convolution must compute in float32 like the solve.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True

    print(f"{describe(arguments.device)}; {arguments.dtype} against {arguments.rival}, corner {arguments.corner}")
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for case in arguments.shapes:
            operands = make_operands(case, DTYPES[arguments.dtype], arguments.device)
            try:
                errors = check(operands, arguments.corner)
            except ArithmeticError as error:
                print(f"WRONG  {case}, {threads} threads: {error}", file=sys.stderr)
                failures.append({"shape": str(case), "threads": threads, "error": str(error)})
                continue
            checks.append({"shape": str(case), "threads": threads, **errors})
            for mode in arguments.mode:
                rows += [row | {"threads": threads} for row in measure(case, mode, operands, arguments)]
            if sys.stderr.isatty():
                print(f"measured {case}, {threads} threads", file=sys.stderr)

    header = [
        "B x C x H², kernel",
        "threads",
        "mode",
        "ours ms",
        f"{arguments.rival} ms",
        "ratio",
        "p20",
        "p80",
        "fastest",
        "rounds",
    ]
    if arguments.device.type == "cuda":
        header[1] = "launch"
    cells = []
    for row in rows:
        setting = str(row["threads"]) if arguments.device.type == "cpu" else f"{row['launch']}, {row['rival']}"
        figures = [f"{row['ours_ms']:.3f}", f"{row['rival_ms']:.3f}"]
        ratios = [f"{row[name]:.3f}" for name in ("ratio", "ratio_p20", "ratio_p80", "ratio_fastest")]
        cells.append([row["shape"], setting, row["mode"], *figures, *ratios, str(row["rounds"])])
    print_table(header, cells)
    summary = summarise(rows)
    print_summary(summary, arguments.device, arguments.rival)
    if arguments.json:
        settings = {"dtype": arguments.dtype, "rival": arguments.rival, "corner": arguments.corner}
        settings["budget_seconds"] = arguments.budget
        results = {"rows": rows, "summary": summary, "checks": checks, "failures": failures}
        write_json(arguments.json, "layer", arguments.device, settings, results)
    if failures:
        print(f"{len(failures)} checks failed: those rows were not timed", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
