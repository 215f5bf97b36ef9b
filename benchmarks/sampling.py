"""What does sampling cost, and does it matter in which direction the solve runs?

    python benchmarks/sampling.py                                 3×32², L=2, K=16, 100 images, one thread and two
    python benchmarks/sampling.py --tables                        also the paper's tables of sizes and kernel sizes
    python benchmarks/sampling.py --device cuda --json benchmarks/results/sampling-gpu.json

The models are an InverseFlow, which samples by plain convolutions; a Glow of the same shape, which has no inverse
convolution at all; and the InverseFlow's weights in the order of FInC Flow, which samples by the solve. That one is
timed with the solve of this library, and with one in plain PyTorch: a gather and a product for each diagonal.
"prepared" means weights prepared once (`prepare_sampling`). Samples of two ways to compute the same are compared before
anything is timed. All are then timed in turn in this one process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Work, compare, cuda_graph, describe, elapsed_seconds, print_table, time_alternately, write_json
from plain_solve import PlainSolve
from runs import TIMED_IMAGES, Candidate, match_parameters, relative_difference
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import Flow, Reverse, prepare_sampling

SHAPE = (3, 32, 32)
# What the paper gives for its model at this shape.
PARAMETERS = 1_760_000
SIZES = (16, 32, 64, 128, 256)
KERNELS = (2, 3, 5, 7, 9, 11)
PAPER_FT = {
    "size": dict(zip(SIZES, (211, 224, 264, 342, 427), strict=True)),
    "kernel": dict(zip(KERNELS, (364, 402, 934, 1461, 1762, 2428), strict=True)),
}
PAPER_HARDWARE = "RTX 2080 Ti, batch 100; Nagar & Varma, 2025"
OURS, GLOW, FINC = "InverseFlow", "Glow", "FInC order"
PREPARED, COMPILED, GRAPH, PLAIN = ", prepared", ", compiled", ", graph", ", plain-torch solve"
# (name, against, target): the ratio of the medians is to be at most the target.
TARGETS = (
    (OURS + PREPARED, GLOW, 1.0),
    (OURS + PREPARED, GLOW + PREPARED, None),
    (OURS + PREPARED, FINC + PREPARED, None),
    (OURS + PREPARED, FINC + PREPARED + PLAIN, 1 / 5),
    (OURS + GRAPH, GLOW + GRAPH, 1.0),
    (OURS + COMPILED, GLOW + COMPILED, 1.0),
)
# Added to every parameter, so that none has its initial value, which may be zero.
NOISE = 0.01
# Images a pass in the tables, where 100 large ones at once would need too much memory; and passes a model.
TABLE_PIXELS, LEAST_IMAGES, TABLE_ROUNDS = 100 * 64**2, 10, 3


def make(kind: str, shape: tuple[int, int, int], device: torch.device, **options: Any) -> Flow:
    """A model with no parameter at its initial value, in evaluation mode."""
    torch.manual_seed(0)
    flow = Candidate(kind, options).build(shape).eval().requires_grad_(False)
    for parameter in flow.parameters():
        parameter.add_(NOISE * torch.randn_like(parameter))
    return flow.to(device)


def replaced(module: nn.Module, make_new: Callable[[InverseConv2d], nn.Module]) -> nn.Module:
    """A copy in which every inverse convolution has become another layer."""
    if isinstance(module, InverseConv2d):
        return make_new(module)
    result = copy.copy(module)
    result._modules = {name: None if m is None else replaced(m, make_new) for name, m in module._modules.items()}
    return result


def in_finc_order(flow: Flow) -> Flow:
    """The same weights with the directions of the inverse convolutions exchanged: sampling is the solve."""
    return replaced(flow, Reverse)  # type: ignore[return-value]


def with_plain_solve(flow: Flow) -> Flow:
    """The same flow, its solves in plain PyTorch."""
    return replaced(flow, PlainSolve)  # type: ignore[return-value]


def draw(flow: Flow, count: int) -> tuple[Tensor, ...]:
    """Seeded latents."""
    like, generator = next(iter(flow.buffers())), torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, *shape, generator=generator).to(like.device) for shape in flow.latent_shapes)


def sampling_work(inverse: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]], flow: Flow, count: int) -> Work:
    """Draws latents and turns them into images."""

    def work() -> Tensor:
        with torch.no_grad():
            return inverse(flow._sample_latents(count, None, 1.0, None))[0]

    return work


def ways(
    flow: Flow, glow: Flow, count: int, device: torch.device, *, compiled: bool
) -> tuple[dict[str, Work], dict[str, float]]:
    """Everything that is timed, and the differences of each way from the unprepared one of the same model.

    Raises:
        ArithmeticError: two ways give other images.
    """
    finc = in_finc_order(flow)
    models = {OURS: flow, GLOW: glow, FINC: finc}
    inverses = {name: model.inverse for name, model in models.items()}
    prepared = {name: prepare_sampling(model) for name, model in models.items()}
    inverses |= {name + PREPARED: model.inverse for name, model in prepared.items()}
    inverses[FINC + PREPARED + PLAIN] = with_plain_solve(prepared[FINC]).inverse
    if compiled:
        inverses |= {name + COMPILED: torch.compile(prepared[name].inverse) for name in (OURS, GLOW)}
    differences = {}
    with torch.no_grad():
        latents = {name: draw(model, count) for name, model in models.items()}
        wanted = {name: model.inverse(latents[name])[0] for name, model in models.items()}
        for name, inverse in inverses.items():
            model = name.split(",")[0]
            differences[name] = relative_difference(inverse(latents[model])[0], wanted[model])
        # And FInC's samples are what its other direction, a plain convolution, takes back to the latents.
        again = torch.cat([z.flatten(1) for z in finc(wanted[FINC])[0]], dim=1)
        given = torch.cat([z.flatten(1) for z in latents[FINC]], dim=1)
        differences["FInC order, round trip"] = relative_difference(again, given, ROUND_TRIP_TOLERANCE)
    works = {name: sampling_work(inverse, models[name.split(",")[0]], count) for name, inverse in inverses.items()}
    if device.type == "cuda":
        works |= {name + GRAPH: cuda_graph(works[name + PREPARED]) for name in models}
    return works, differences


# Through all the layers and back, rounding is amplified by their condition numbers.
ROUND_TRIP_TOLERANCE = 1e-3


def measure(
    works: dict[str, Work], device: torch.device, budget: float
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Milliseconds of every way, and the ratios of ``TARGETS``."""
    samples = time_alternately(works, device, budget)
    times = {
        name: {"ms": 1e3 * statistics.median(seconds), "fastest_ms": 1e3 * min(seconds)}
        for name, seconds in samples.items()
    }
    ratios = [
        {"ours": ours, "rival": rival, "target": target, **compare(samples[ours], samples[rival])}
        for ours, rival, target in TARGETS
        if ours in samples and rival in samples
    ]
    return times, ratios


def forward_table(
    kinds: Sequence[str], changes: Sequence[dict[str, Any]], device: torch.device, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Milliseconds for the densities of 100 images: a row for each of ``changes`` to size or kernel size.

    Raises:
        ArithmeticError: a density is not finite.
    """
    rows = []
    for change in changes:
        side = change.get("side", SHAPE[1])
        shape = (SHAPE[0], side, side)
        chosen = {**options, **{name: value for name, value in change.items() if name != "side"}}
        count = max(LEAST_IMAGES, min(TIMED_IMAGES, TABLE_PIXELS // side**2))
        images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        works = {kind: _density_work(make(kind, shape, device, **chosen), images) for kind in kinds}
        samples: dict[str, list[float]] = {kind: [] for kind in kinds}
        for kind, work in works.items():
            work()
            if not bool(torch.isfinite(work()).all()):  # type: ignore[attr-defined]
                raise ArithmeticError(f"{kind} at {change} gives densities that are not finite")
        for turn in range(TABLE_ROUNDS):
            for kind in kinds if turn % 2 == 0 else list(reversed(kinds)):
                samples[kind].append(elapsed_seconds(works[kind], 1, device) * TIMED_IMAGES / count)
        rows.append(
            {**change, "images_a_pass": count, "ms": {k: 1e3 * statistics.median(s) for k, s in samples.items()}}
        )
        if sys.stderr.isatty():
            print(f"measured {change}", file=sys.stderr)
    return rows


def _density_work(flow: Flow, images: Tensor) -> Callable[[], Tensor]:
    def work() -> Tensor:
        with torch.no_grad():
            return flow.log_prob(images)

    return work


def print_forward_table(name: str, key: str, rows: list[dict[str, Any]], paper: dict[int, int]) -> None:
    print(f"\nFT, densities of 100 images by {name}, ms; the paper's on {PAPER_HARDWARE}")
    kinds = list(rows[0]["ms"])
    cells = [[str(row[key]), *(f"{row['ms'][kind]:.0f}" for kind in kinds), str(paper[row[key]])] for row in rows]
    print_table([name, *kinds, "paper"], cells)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads to measure with")
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--hidden", type=int, help=f"width; if not given, that of about {PARAMETERS:,} parameters")
    parser.add_argument("--activation", choices=("none", "spline"), default="none", help="of the InverseFlow")
    parser.add_argument("--images", type=int, default=TIMED_IMAGES, help="in a batch of samples")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--tables", nargs="?", const="also", choices=("also", "only"), help="the tables of image and kernel sizes"
    )
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="of the table")
    parser.add_argument("--kernels", type=int, nargs="+", choices=KERNELS, default=list(KERNELS), help="of the table")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of timing, at least 15 rounds")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    if arguments.device.type == "cuda":
        arguments.threads = [torch.get_num_threads()]
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    device = arguments.device
    options: dict[str, Any] = {"levels": arguments.levels, "steps": arguments.steps}
    if arguments.hidden is None:
        options = match_parameters(Candidate(OURS, options), SHAPE, PARAMETERS).options
    else:
        options["hidden"] = arguments.hidden
    flow = make(OURS, SHAPE, device, **options, activation=arguments.activation)
    glow = make(GLOW, SHAPE, device, **options)
    print(f"{describe(device)}; {arguments.images} images of {SHAPE}, {options}")
    print(f"{OURS}: {flow.num_parameters:,} parameters; {GLOW}: {glow.num_parameters:,}")

    results: dict[str, Any] = {"sampling": []}
    torch.set_num_threads(arguments.threads[-1])
    for threads in arguments.threads if arguments.tables != "only" else ():
        torch.set_num_threads(threads)
        try:
            works, differences = ways(flow, glow, arguments.images, device, compiled=not arguments.no_compile)
        except ArithmeticError as error:
            print(f"WRONG  {error}", file=sys.stderr)
            return 1
        times, ratios = measure(works, device, arguments.budget)
        results["sampling"].append(
            {"threads": threads, "times": times, "ratios": ratios, "differences": differences}
        )  # fmt: skip
        print(f"\n{threads} thread{'s' if threads > 1 else ''}")
        print_table(
            ["", "ms", "fastest", "difference"],
            [
                [name, f"{row['ms']:.1f}", f"{row['fastest_ms']:.1f}", f"{differences.get(name, 0.0):.1e}"]
                for name, row in times.items()
            ],
        )
        print()
        print_table(
            ["", "against", "ratio", "p20", "p80", "fastest", "target"],
            [
                [row["ours"], row["rival"]]
                + [f"{row[key]:.3f}" for key in ("ratio", "ratio_p20", "ratio_p80", "ratio_fastest")]
                + ["–" if row["target"] is None else f"{row['target']:.2f}"]
                for row in ratios
            ],
        )
    if arguments.tables:
        kinds = (OURS, "FInCFlow", GLOW)
        results["by_size"] = forward_table(kinds, [{"side": side} for side in arguments.sizes], device, options)
        print_forward_table("image size", "side", results["by_size"], PAPER_FT["size"])
        with_conv = (OURS, "FInCFlow")
        sizes = [{"kernel_size": kernel} for kernel in arguments.kernels]
        results["by_kernel"] = forward_table(with_conv, sizes, device, options)
        print_forward_table("kernel size", "kernel_size", results["by_kernel"], PAPER_FT["kernel"])
        results["paper_ft"] = {"hardware": PAPER_HARDWARE, **PAPER_FT}
    if arguments.json:
        settings = {
            "shape": SHAPE, **options, "activation": arguments.activation, "images": arguments.images,
            "budget_seconds": arguments.budget, "table_threads": torch.get_num_threads(),
        }  # fmt: skip
        write_json(arguments.json, "sampling", device, settings, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
