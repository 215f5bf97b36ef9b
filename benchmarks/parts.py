"""Is training by parts as good as end to end, in less time? Bits per dimension against seconds, FLOPs and memory.

    python benchmarks/parts.py                                  # the embedded slice of Fashion-MNIST
    python benchmarks/parts.py --data fashion-mnist --steps 3000
    python benchmarks/parts.py --report                         # the figures of docs/parts.md, from the JSON

Every run has the same model, seed by seed the same first weights, the same batches, and as many steps; so also as many
epochs. The clock runs from a batch to the changed and averaged weights. Evaluations are the same for all and stop it.
With --clock cpu it counts the processor time of this process, which other processes on the machine hardly change.
The runs of a seed follow one another before the next seed begins, every second seed in reverse order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from inverse_flow.data import load
from inverse_flow.flows.conditioner import arrange_for
from inverse_flow.models import InverseFlow
from inverse_flow.parts import Carried, Part, PartsConfig, parse_parts, part_shares, split_flow
from inverse_flow.training import Batches, EndToEnd, TrainConfig, Workers, evaluate
from inverse_flow.training.trainer import average_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "parts.json"
PICTURE = ROOT / "docs" / "images" / "parts"
PAGE = ROOT / "docs" / "parts.md"
MARKS = ("<!-- figures: written by benchmarks/parts.py --report -->", "<!-- end of figures -->")

END_TO_END = "end to end"
# What the original claims, and what is aimed at here.
CLAIMED_TIME = 0.70
TARGET_TIME, TARGET_BITS = 0.65, 0.01
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# Warm-up steps that no clock sees: allocators, thread pools, code caches.
UNTIMED_STEPS = 3


def candidates(
    parts: list[str], schedules: list[str], finish: float, cache_epochs: int
) -> dict[str, PartsConfig | None]:
    """What is compared, by name."""
    found: dict[str, PartsConfig | None] = {END_TO_END: None}
    for text in parts:
        cut, count = parse_parts(text)
        for schedule in schedules:
            kept = cache_epochs if schedule == "sequential" else 0
            found[f"{text} {schedule}"] = PartsConfig(cut, count, schedule, finish=finish, cache_epochs=kept)
    return found


@dataclass
class Curve:
    """A run: at every evaluation the steps, the seconds on the clock, the backward FLOPs, and the test bits/dim."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    backward_flops: list[float] = field(default_factory=list)
    bits_per_dim: list[float] = field(default_factory=list)


def make(settings: argparse.Namespace, parts: PartsConfig | None, images: Tensor, seed: int) -> tuple[Any, ...]:
    """Model, configuration, batches, method and averaged weights of a run before its first step."""
    config = TrainConfig(
        steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        decay_at=(settings.decay_at,), average_decay=settings.average_decay, flip=True, seed=seed, parts=parts,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = InverseFlow(
        tuple(images.shape[1:]), levels=settings.levels, steps=settings.depth, hidden=settings.hidden, logit_margin=1e-3
    )
    arrange_for(images.device, model)
    batches = Batches(images, config)
    workers = Workers()
    method = parts.make(model, config, workers, batches) if parts else EndToEnd(model, config, workers)
    return model, config, batches, method, average_of(model, config.average_decay)


def train(
    settings: argparse.Namespace, parts: PartsConfig | None, train_images: Tensor, test_images: Tensor, seed: int,
    costs: Mapping[int, Mapping[str, float]],
) -> Curve:  # fmt: skip
    """One run."""
    model, config, batches, method, averaged = make(settings, parts, train_images, seed)
    clock = CLOCKS[settings.clock]
    curve, seconds, flops = Curve(), 0.0, 0.0
    for step in range(config.steps):
        progress = config.progress(step, 0.0)
        started = clock()
        factor = config.rate_factor(step, progress)
        result = method.step(batches(step), step=step, progress=progress, rate_factor=factor)
        averaged.update_parameters(model)
        seconds += clock() - started
        flops += costs[int(result.columns.get("part", 0))]["backward_flops"]
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == config.steps:
            curve.steps.append(step + 1)
            curve.seconds.append(seconds)
            curve.backward_flops.append(flops)
            curve.bits_per_dim.append(evaluate(averaged.module, test_images))
    return curve


# ------------------------------------------------------------------------------------------ FLOPs and memory


def _solve_flops(input: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Two for each tap at each pixel: the multiplications of a convolution with these weights, and the additions."""
    batch, _, height, width = input
    return 2 * batch * height * width * torch.Size(weight).numel()


def _solve_backward_flops(grad_output: Any, output: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The transposed solve and the gradient of the weight, as much each."""
    return 2 * _solve_flops(grad_output, weight)


OUR_FLOPS = {
    torch.ops.inverse_flow.solve: _solve_flops,
    torch.ops.inverse_flow.solve_backward: _solve_backward_flops,
}


def count_flops(work: Callable[[], object]) -> float:
    """Of the convolutions, matrix products and solves in ``work``. What is done element by element is not counted."""
    with FlopCounterMode(display=False, custom_mapping=OUR_FLOPS) as counter:
        work()
    return float(counter.get_total_flops())


def saved_bytes(work: Callable[[], object], method_parameters: list[Tensor]) -> float:
    """Bytes of the tensors that ``work`` saves for its backward pass, each storage once and the weights not at all."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in method_parameters}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # a storage that is freed could lend its address to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return float(sum(storages.values()))


def costs_of_a_step(
    settings: argparse.Namespace, parts: PartsConfig | None, images: Tensor
) -> dict[int, dict[str, float]]:
    """For every kind of step, by the part that it trains (0: all): backward FLOPs and saved bytes.

    FLOPs of the backward pass are those of the whole step less those of its forward passes, run without a graph.
    """
    model, _, batches, method, _ = make(settings, parts, images, 0)
    x = batches(0)
    moments = {0: 1.0}  # progress at which a step of that kind is made
    if parts is not None:
        share = 1 - parts.finish
        sequential = parts.schedule == "sequential"
        moments |= {k + 1: (k + 0.5) / parts.count * share if sequential else 0.0 for k in range(parts.count)}
        if share == 1:
            del moments[0]
    split = split_flow(model, parts.cut, parts.count) if parts is not None else []
    costs: dict[int, dict[str, float]] = {}
    for part, progress in sorted(moments.items(), reverse=True):
        step = max(0, part - 1)  # the turn of this part in an alternating schedule

        def make_step(step: int = step, progress: float = progress) -> object:
            return method.step(x, step=step, progress=progress, rate_factor=0.0)

        make_step()  # fills ActNorms and kept outputs
        kept = parts is not None and parts.cache_epochs > 0
        first = part - 1 if kept and part else 0
        run = split[first:part] if part else None
        whole = count_flops(make_step)
        with torch.no_grad():
            forward = count_flops(lambda run=run: _forward(model, run, x))
        costs[part] = {
            "backward_flops": whole - forward,
            "forward_flops": forward,
            "saved_bytes": saved_bytes(make_step, list(model.parameters())),
        }
    return costs


def _forward(model: InverseFlow, run: list[Part] | None, x: Tensor) -> None:
    """The forward passes of a step: of the whole flow, or of some of its parts on a tensor of the right shape."""
    if run is None:
        model.log_prob(x)
        return
    *latents, shape = run[0].input_shapes
    carried = Carried(x.new_zeros(len(x), *shape), tuple(x.new_zeros(len(x), *s) for s in latents), x.new_zeros(len(x)))
    for part in run:
        carried = part(carried)


# ----------------------------------------------------------------------------------------------------- results


def summarize(curves: Mapping[str, list[Curve]], costs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For every candidate, over the seeds: final bits/dim, and time, FLOPs and memory as ratios to end to end."""
    reference = curves[END_TO_END]
    found = {}
    for name, runs in curves.items():
        differences = [run.bits_per_dim[-1] - base.bits_per_dim[-1] for run, base in zip(runs, reference, strict=True)]
        times = [run.seconds[-1] / base.seconds[-1] for run, base in zip(runs, reference, strict=True)]
        peak = max(cost["saved_bytes"] for cost in costs[name].values())
        local = [cost["saved_bytes"] for part, cost in costs[name].items() if int(part)]
        found[name] = {
            "bits_per_dim": statistics.fmean(run.bits_per_dim[-1] for run in runs),
            "bits_per_dim_of_seeds": [run.bits_per_dim[-1] for run in runs],
            "difference": statistics.fmean(differences),
            "largest_difference": max(differences, key=abs),
            "seconds": statistics.fmean(run.seconds[-1] for run in runs),
            "time_ratio": statistics.median(times),
            "time_ratio_of_seeds": times,
            "backward_flops_ratio": runs[0].backward_flops[-1] / reference[0].backward_flops[-1],
            "saved_bytes": peak,
            "saved_bytes_before_finish": max(local, default=peak),
            "reaches_target": statistics.fmean(differences) <= TARGET_BITS and statistics.median(times) <= TARGET_TIME,
        }
    return found


def rows(summary: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            name,
            f"{entry['bits_per_dim']:.3f}",
            f"{entry['difference']:+.3f}",
            f"{min(entry['bits_per_dim_of_seeds']):.3f}–{max(entry['bits_per_dim_of_seeds']):.3f}",
            f"{entry['seconds']:.0f}",
            f"{entry['time_ratio']:.2f}",
            f"{entry['backward_flops_ratio']:.2f}",
            f"{entry['saved_bytes_before_finish'] / 2**20:.1f}",
        ]
        for name, entry in summary.items()
    ]


HEADER = ["method", "bits/dim", "difference", "over the seeds", "seconds", "time", "backward FLOPs", "saved MiB"]


def verdict(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the runs say about the claims, in sentences."""
    others = {name: entry for name, entry in summary.items() if name != END_TO_END}
    good = [name for name, entry in others.items() if entry["reaches_target"]]
    equal = [name for name, entry in others.items() if entry["difference"] <= TARGET_BITS]
    faster = [name for name, entry in others.items() if entry["time_ratio"] <= CLAIMED_TIME]
    spread = {
        schedule: [
            max(entry["bits_per_dim_of_seeds"]) - min(entry["bits_per_dim_of_seeds"])
            for name, entry in others.items()
            if name.endswith(schedule)
        ]
        for schedule in ("sequential", "alternate")
    }

    def listed(names: list[str]) -> str:
        return ", ".join(names) if names else "none"

    lines = [
        f"Equal bits/dim (at most {TARGET_BITS} above end to end): {listed(equal)}.",
        f"At least {1 - CLAIMED_TIME:.0%} less time: {listed(faster)}.",
        f"Both, at {TARGET_TIME} of the time: {listed(good)}.",
    ]
    if all(spread.values()):
        widest = {schedule: max(values) for schedule, values in spread.items()}
        lines.append(
            f"Widest spread over the seeds: {widest['sequential']:.3f} bits/dim sequential, "
            f"{widest['alternate']:.3f} alternate."
        )
    return lines


def draw(curves: Mapping[str, list[Curve]]) -> None:
    """Mean over the seeds of bits/dim, against seconds and against backward FLOPs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lowest, tops = float("inf"), []
    for name, runs in curves.items():
        style = {"color": "black", "linewidth": 2} if name == END_TO_END else {}
        if name.endswith("sequential"):
            style["linestyle"] = "--"
        bits = _mean([run.bits_per_dim for run in runs])
        lowest = min(lowest, *bits)
        tops.append(bits[min(1, len(bits) - 1)])
        panels[0].plot(_mean([run.seconds for run in runs]), bits, label=name, **style)
        panels[1].plot([flops / 1e12 for flops in runs[0].backward_flops], bits, **style)
    panels[0].set_ylim(lowest - 0.02, sorted(tops)[len(tops) // 2])
    panels[0].set_xlabel("seconds of training")
    panels[1].set_xlabel("backward TFLOPs")
    panels[0].set_ylabel("test bits per dimension")
    panels[0].legend(fontsize="small")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(PICTURE.with_suffix(suffix), dpi=150)


def _mean(series: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


def report(path: Path) -> None:
    """Writes the figures of a results file into the page, and draws its curves."""
    content = json.loads(path.read_text())
    settings, summary = content["settings"], content["summary"]
    table = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *rows(summary)]
    lines = [
        "",
        f"{content['hardware']['cpu']}, {settings['threads']} thread(s), {settings['clock']} time, "
        f"torch {content['versions']['torch']}; "
        f"{content['data']}, {content['train_images']} training images; L = {settings['levels']}, "
        f"K = {settings['depth']}, width {settings['hidden']}; {settings['steps']} steps of {settings['batch_size']}, "
        f"learning rate {settings['learning_rate']:g}, a tenth of it after {settings['decay_at']:.0%}; finish "
        f"{settings['finish']:.0%}; {settings['seeds']} seeds; outputs kept for {settings['cache_epochs']} epochs in "
        "the sequential schedule. Time and FLOPs are shares of end to end; saved is what the largest step before the "
        "finish keeps for its backward pass.",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *(f"- {line}" for line in content["verdict"]),
        "",
        "![Bits per dimension against time and backward FLOPs](images/parts.png)",
        "",
    ]
    draw({name: [Curve(**run) for run in runs] for name, runs in content["curves"].items()})
    text = PAGE.read_text()
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + "\n".join(lines) + MARKS[1] + after)
    print(f"written: {PAGE}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="a folder with idx files, or the embedded slice")
    parser.add_argument("--steps", type=int, default=900, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["blocks:2", "across:2", "across:3"])
    parser.add_argument("--schedules", nargs="+", default=["alternate", "sequential"])
    parser.add_argument("--finish", type=float, default=1 / 3)
    parser.add_argument("--cache-epochs", type=int, default=5, help="of the sequential schedule; 0 for none")
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--decay-at", type=float, default=0.85, help="share of the run after which it falls to a tenth")
    parser.add_argument("--average-decay", type=float, default=0.99)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--test-images", type=int, default=1000, help="at most so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds passed, or of processor time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write the figures of --out into docs/parts.md")
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    if settings.report:
        report(settings.out)
        return
    if settings.clock == "cpu" and settings.threads > 1:
        raise SystemExit("--clock cpu adds up the time of all threads: use it with --threads 1")
    torch.set_num_threads(settings.threads)
    device = torch.device("cpu")
    data = load(settings.data)
    test_images = data.test.images[: settings.test_images]
    compared = candidates(settings.parts, settings.schedules, settings.finish, settings.cache_epochs)
    print(common.describe(device))
    costs = {name: costs_of_a_step(settings, parts, data.train.images) for name, parts in compared.items()}
    model = make(settings, None, data.train.images, 0)[0]
    shares = {text: part_shares(split_flow(model, *parse_parts(text))) for text in settings.parts}
    warm = argparse.Namespace(**{**vars(settings), "steps": UNTIMED_STEPS})
    curves: dict[str, list[Curve]] = {name: [] for name in compared}
    for name, parts in compared.items():
        train(warm, parts, data.train.images, test_images[:10], 0, costs[name])
    for seed in range(settings.seeds):
        names = list(compared) if seed % 2 == 0 else list(reversed(compared))
        for name in names:
            curve = train(settings, compared[name], data.train.images, test_images, seed, costs[name])
            curves[name].append(curve)
            print(f"seed {seed}, {name}: {curve.bits_per_dim[-1]:.4f} bits/dim, {curve.seconds[-1]:.1f} s", flush=True)
    summary = summarize(curves, costs)
    common.print_table(HEADER, rows(summary))
    said = verdict(summary)
    print("\n".join(said))
    common.write_json(
        settings.out,
        "parts",
        device,
        {name: value for name, value in vars(settings).items() if name not in ("out", "report")},
        {
            "data": data.name,
            "train_images": len(data.train),
            "test_images": len(test_images),
            "parameters": model.num_parameters,
            "work_shares": shares,
            "costs_of_a_step": costs,
            "summary": summary,
            "verdict": said,
            "curves": {name: [vars(run) for run in runs] for name, runs in curves.items()},
        },
    )


if __name__ == "__main__":
    main()
