"""What does sampling cost, and does it matter in which direction the solve runs?

    python benchmarks/sampling.py                                 3×32², L=2, K=16, 100 images, one thread and two
    python benchmarks/sampling.py --tables                        also the paper's tables of sizes and kernel sizes
    python benchmarks/sampling.py --rivals                        only the rivals of the inverse convolution
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
from typing import Any

import torch
from harness import (
    RATIOS,
    Report,
    Table,
    Work,
    compare,
    cuda_graph,
    elapsed_seconds,
    parser,
    relative_error,
    require,
    time_alternately,
)
from rivals import APPROXIMATE, RIVALS, PlainSolve
from runs import SAMPLE_TOLERANCE, TIMED_IMAGES, Candidate, draw_latents, match_parameters, measure_times
from torch import Tensor, nn

from inverse_flow import InverseConv2d
from inverse_flow.flows import Flow, Reverse, prepare_sampling, reconstruction_error

SHAPE = (3, 32, 32)
# What the paper gives for its model at this shape.
PARAMETERS = 1_760_000
SIZES = (16, 32, 64, 128, 256)
KERNELS = (2, 3, 5, 7, 9, 11)
PAPER_FT = {
    "side": dict(zip(SIZES, (211, 224, 264, 342, 427), strict=True)),
    "kernel_size": dict(zip(KERNELS, (364, 402, 934, 1461, 1762, 2428), strict=True)),
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
# Through all the layers and back, rounding is amplified by their condition numbers.
ROUND_TRIP_TOLERANCE = 1e-3
# Images per pass in the tables, where 100 large ones at once would need too much memory; and passes per model.
TABLE_PIXELS, LEAST_IMAGES, TABLE_ROUNDS = 100 * 64**2, 10, 3


def make(kind: str, shape: tuple[int, int, int], device: torch.device, **options: Any) -> Flow:
    """A model with no parameter at its initial value, in evaluation mode."""
    torch.manual_seed(0)
    flow = Candidate(kind, options).build(shape).eval().requires_grad_(False)
    for parameter in flow.parameters():
        parameter.add_(NOISE * torch.randn_like(parameter))
    return flow.to(device)


def replaced(flow: Flow, make_new: Callable[[InverseConv2d], nn.Module]) -> Flow:
    """A copy in which every inverse convolution has become another layer: with ``Reverse``, sampling is the solve."""
    result = copy.deepcopy(flow)
    for path, layer in list(result.named_modules()):
        if isinstance(layer, InverseConv2d):
            result.set_submodule(path, make_new(layer))
    return result


def sampling_work(inverse: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]], flow: Flow, count: int) -> Work:
    """Draws latents and turns them into images."""
    device = draw_latents(flow, 1)[0].device

    def work() -> Tensor:
        with torch.no_grad():
            return inverse([torch.randn(count, *shape, device=device) for shape in flow.latent_shapes])[0]

    return work


def ways(
    flow: Flow, glow: Flow, count: int, device: torch.device, *, compiled: bool
) -> tuple[dict[str, Work], dict[str, float]]:
    """Everything that is timed, and the differences of each way from the unprepared one of the same model.

    Raises:
        ArithmeticError: two ways give other images.
    """
    models = {OURS: flow, GLOW: glow, FINC: replaced(flow, Reverse)}
    inverses = {name: model.inverse for name, model in models.items()}
    prepared = {name: prepare_sampling(model) for name, model in models.items()}
    inverses |= {name + PREPARED: model.inverse for name, model in prepared.items()}
    inverses[FINC + PREPARED + PLAIN] = replaced(prepared[FINC], PlainSolve).inverse
    if compiled:
        inverses |= {name + COMPILED: torch.compile(prepared[name].inverse) for name in (OURS, GLOW)}
    differences = {}
    with torch.no_grad():
        latents = {name: draw_latents(model, count) for name, model in models.items()}
        wanted = {name: model.inverse(latents[name])[0] for name, model in models.items()}
        for name, inverse in inverses.items():
            model = name.split(",")[0]
            differences[name] = relative_error(inverse(latents[model])[0], wanted[model])
        require(differences, SAMPLE_TOLERANCE)
        # And FInC's samples are what its other direction, a plain convolution, takes back to the latents.
        again, given = (
            torch.cat([z.flatten(1) for z in found], dim=1) for found in (models[FINC](wanted[FINC])[0], latents[FINC])
        )
        differences |= require({"FInC order, round trip": relative_error(again, given)}, ROUND_TRIP_TOLERANCE)
    works = {name: sampling_work(inverse, models[name.split(",")[0]], count) for name, inverse in inverses.items()}
    if device.type == "cuda":
        works |= {name + GRAPH: cuda_graph(works[name + PREPARED]) for name in models}
    return works, differences


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
        {"ours": ours, "against": rival, "target": target, **compare(samples[ours], samples[rival])}
        for ours, rival, target in TARGETS
        if ours in samples and rival in samples
    ]
    return times, ratios


def forward_row(
    kinds: Sequence[str], change: dict[str, Any], device: torch.device, options: dict[str, Any]
) -> dict[str, Any]:
    """Milliseconds for the densities of 100 images, with another image side or kernel size.

    Raises:
        ArithmeticError: a density is not finite.
    """
    chosen = options | change
    side = chosen.pop("side", SHAPE[1])
    count = max(LEAST_IMAGES, min(TIMED_IMAGES, TABLE_PIXELS // side**2))
    images = torch.rand(count, SHAPE[0], side, side, generator=torch.Generator().manual_seed(0)).to(device)
    flows = {kind: make(kind, (SHAPE[0], side, side), device, **chosen) for kind in kinds}
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    with torch.no_grad():
        for kind, flow in flows.items():
            flow.log_prob(images)
            if not bool(torch.isfinite(flow.log_prob(images)).all()):
                raise ArithmeticError(f"{kind} at {change} gives densities that are not finite")
        for turn in range(TABLE_ROUNDS):
            for kind in kinds if turn % 2 == 0 else reversed(kinds):
                seconds = elapsed_seconds(lambda flow=flows[kind]: flow.log_prob(images), 1, device)
                samples[kind].append(seconds * TIMED_IMAGES / count)
    return {**change, "images_a_pass": count, "ms": {k: 1e3 * statistics.median(s) for k, s in samples.items()}}


def forward_table(
    report: Report, key: str, kinds: Sequence[str], values: Sequence[int], options: dict[str, Any]
) -> None:
    """A row for each image side, or kernel size; the last column is the paper's."""
    device, name = report.content["settings"]["device"], key.replace("_", " ")
    print(f"\nFT, densities of 100 images by {name}, ms; the paper's on {PAPER_HARDWARE}")
    table = Table({name: f"{{{key}:<4}}", **{kind: f"{{{kind}:8.0f}}" for kind in kinds}, "paper": "{paper}"})
    for value in values:
        with report.checked(f"{name} {value}"):
            row = forward_row(kinds, {key: value}, device, options)
            report.add(f"by_{'size' if key == 'side' else 'kernel'}", row)
            table.add(row | row["ms"] | {"paper": PAPER_FT[key][value]})


def rival_table(
    report: Report, names: Sequence[str], options: dict[str, Any], count: int, device: torch.device, budget: float
) -> None:
    """A line for each model: milliseconds to sample ``count`` images, and for their densities, all in turn.

    Raises:
        ArithmeticError: images that are not what goes to the latents and comes back, where they should be.
    """
    known = rivals_by_name(options)
    flows = {name: make(known[name].kind, SHAPE, device, **known[name].options) for name in names}
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    errors = {name: float(reconstruction_error(flow, images).max()) for name, flow in flows.items()}
    require({name: error for name, error in errors.items() if name not in APPROXIMATE}, ROUND_TRIP_TOLERANCE)
    print(f"\nThe rivals of the inverse convolution: ST and FT, ms for {count} images")
    table = Table(
        {"": "{name:<11}", "ST": "{ST_ms:8.1f}", "FT": "{FT_ms:8.1f}", "round trip": "{round_trip:8.0e}",
         "parameters": "{parameters:9,}"}
    )  # fmt: skip
    for name, times in measure_times(flows, images, device, budget).items():
        row = {"name": name, **times, "round_trip": errors[name], "parameters": flows[name].num_parameters}
        report.add("rivals", row)
        table.add(row)


def rivals_by_name(options: dict[str, Any]) -> dict[str, Candidate]:
    """Models of this size, ours and two of its relatives first."""
    ours = {kind: Candidate(kind, options) for kind in (OURS, "FInCFlow", GLOW)}
    return ours | {name: rival.but(**options) for name, rival in RIVALS.items()}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, threads=(1, 2), budget=120.0)
    made.add_argument("--levels", type=int, default=2)
    made.add_argument("--steps", type=int, default=16)
    made.add_argument("--hidden", type=int, help=f"width; if not given, that of about {PARAMETERS:,} parameters")
    made.add_argument("--activation", choices=("none", "spline"), default="none", help="of the InverseFlow")
    made.add_argument("--images", type=int, default=TIMED_IMAGES, help="in a batch of samples")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument(
        "--tables", nargs="?", const="also", choices=("also", "only"), help="the tables of image and kernel sizes"
    )
    made.add_argument(
        "--rivals", nargs="*", choices=tuple(rivals_by_name({})), help="only the table of these models; of all of them"
    )
    made.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="of the table")
    made.add_argument("--kernels", type=int, nargs="+", choices=KERNELS, default=list(KERNELS), help="of the table")
    arguments = made.parse_args(given)
    if arguments.device.type == "cuda":
        arguments.threads = [torch.get_num_threads()]
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    report, device = Report("sampling", arguments), arguments.device
    options: dict[str, Any] = {"levels": arguments.levels, "steps": arguments.steps, "hidden": arguments.hidden}
    if arguments.hidden is None:
        del options["hidden"]
        options = match_parameters(Candidate(OURS, options), SHAPE, PARAMETERS).options
    flow = make(OURS, SHAPE, device, **options, activation=arguments.activation)
    glow = make(GLOW, SHAPE, device, **options)
    print(f"{arguments.images} images of {SHAPE}, {options}")
    print(f"{OURS}: {flow.num_parameters:,} parameters; {GLOW}: {glow.num_parameters:,}")
    if arguments.rivals is not None:
        names = arguments.rivals or list(rivals_by_name({}))
        with report.checked("rivals"):
            rival_table(report, names, options, arguments.images, device, arguments.budget)
        return report.finish()
    for threads in arguments.threads if arguments.tables != "only" else ():
        torch.set_num_threads(threads)
        with report.checked(f"{threads} threads"):
            works, differences = ways(flow, glow, arguments.images, device, compiled=not arguments.no_compile)
            times, ratios = measure(works, device, arguments.budget)
            report.add("sampling", {"threads": threads, "times": times, "ratios": ratios, "differences": differences})
            print(f"\nthreads: {threads}")
            lines = [{"name": name, "difference": differences.get(name), **row} for name, row in times.items()]
            columns = {"": "{name}", "ms": "{ms:.1f}", "fastest": "{fastest_ms:.1f}", "difference": "{difference:.1e}"}
            Table(columns).add(*lines)
            print()
            Table({"": "{ours}", "against": "{against}", **RATIOS, "target": "{target:.2f}"}).add(*ratios)
    if arguments.tables:
        report.set(paper_ft={"hardware": PAPER_HARDWARE, **PAPER_FT})
        forward_table(report, "side", (OURS, "FInCFlow", GLOW), arguments.sizes, options)
        forward_table(report, "kernel_size", (OURS, "FInCFlow"), arguments.kernels, options)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
