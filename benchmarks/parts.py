"""Is training by parts as good as end to end, in less time? Bits per dimension against seconds, FLOPs and memory.

    python benchmarks/parts.py                                  # the embedded slice of Fashion-MNIST
    python benchmarks/parts.py --data fashion-mnist --steps 3000
    python benchmarks/parts.py --report                         # the figures of docs/parts.md, from the JSON

Every run has the same model, seed by seed the same first weights, the same batches, and as many steps; so also as many
epochs. The clock runs from one report of the trainer to the next. Evaluations are the same for all and stop it.
With --clock cpu it counts the processor time of this process, which other processes on the machine hardly change.
The runs of a seed follow one another before the next seed begins, every second seed in reverse order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness import Report, Table, new_figure, parser, save_figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from inverse_flow.data import load
from inverse_flow.models import InverseFlow
from inverse_flow.parts import PartsConfig, parse_parts, part_shares, split_flow
from inverse_flow.training import Stop, TrainConfig, Trainer, evaluate
from inverse_flow.training.log import StepReport

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
# Batches of images in the dry run that counts the costs of a step.
COUNTED_BATCHES = 4


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


def make(settings: argparse.Namespace, parts: PartsConfig | None, images: Tensor, seed: int) -> Trainer:
    """A run before its first step."""
    config = TrainConfig(
        steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        decay_at=(settings.decay_at,), average_decay=settings.average_decay, flip=True, seed=seed, parts=parts,
        validation=0, evaluate_every=settings.steps, max_inverse_error=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = InverseFlow(
        tuple(images.shape[1:]), levels=settings.levels, steps=settings.depth, hidden=settings.hidden, logit_margin=1e-3
    )
    return Trainer(model, images, config)


def part_of(report: StepReport) -> int:
    """What a step trained: a part, counted from 1, or 0 for all."""
    return int(report.columns.get("part", 0))


def fit(trainer: Trainer, observe: Callable[[StepReport], None]) -> None:
    if trainer.fit(observe) is Stop.INTERRUPTED:
        raise KeyboardInterrupt


def train(
    settings: argparse.Namespace, parts: PartsConfig | None, train_images: Tensor, test_images: Tensor, seed: int,
    costs: Mapping[int, Mapping[str, float]],
) -> Curve:  # fmt: skip
    """One run."""
    trainer, clock = make(settings, parts, train_images, seed), CLOCKS[settings.clock]
    curve, seconds, flops = Curve(), 0.0, 0.0

    def observe(report: StepReport) -> None:
        nonlocal seconds, flops, started
        seconds += clock() - started
        flops += costs[part_of(report)]["backward_flops"]
        if report.step % settings.evaluate_every == 0 or report.step == settings.steps:
            curve.steps.append(report.step)
            curve.seconds.append(seconds)
            curve.backward_flops.append(flops)
            curve.bits_per_dim.append(evaluate(trainer.result(), test_images))
        started = clock()

    started = clock()
    fit(trainer, observe)
    return curve


# ---- FLOPs and memory ----


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


class Costs:
    """FLOPs of the forward and backward passes, and bytes that these keep in between, of what runs within :meth:`on`.

    A tensor that is saved tells that a forward pass runs, one that is asked for again that a backward pass does. FLOPs
    are those of convolutions, matrix products and solves; what is done element by element is not counted. A storage
    counts once, and the weights not at all.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._counter = FlopCounterMode(display=False, custom_mapping=OUR_FLOPS)
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._seen, self._phase = 0, "forward_flops"
        self._flops = {"forward_flops": 0.0, "backward_flops": 0.0}
        self._kept: dict[int, Tensor] = {}  # a storage that is freed could lend its address to the next

    def on(self, work: Callable[[], object]) -> None:
        with torch.autograd.graph.saved_tensors_hooks(self._save, self._ask), self._counter:
            work()

    def take(self) -> dict[str, float]:
        """What has been spent since this was last called."""
        self._enter("forward_flops")
        saved = sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())
        found = {**self._flops, "saved_bytes": float(saved)}
        self._flops = dict.fromkeys(self._flops, 0.0)
        self._kept.clear()
        return found

    def _enter(self, phase: str) -> None:
        total = self._counter.get_total_flops()
        self._flops[self._phase] += total - self._seen
        self._seen, self._phase = total, phase

    def _save(self, tensor: Tensor) -> Tensor:
        self._enter("forward_flops")
        address = tensor.untyped_storage().data_ptr()
        if address not in self._weights:
            self._kept[address] = tensor
        return tensor

    def _ask(self, tensor: Tensor) -> Tensor:
        self._enter("backward_flops")
        return tensor


def costs_of_a_step(
    settings: argparse.Namespace, parts: PartsConfig | None, images: Tensor
) -> dict[int, dict[str, float]]:
    """For every kind of step, by the part that it trains (0: all): FLOPs and saved bytes, from a dry run that makes
    each of them twice or more. The least counts: a step that also fills a cache is none like the others."""
    count = 1
    if parts is not None:
        count, finish = 4 * parts.count, 0.5 if 0 < parts.finish < 1 else parts.finish
        parts = replace(parts, finish=finish)
    dry = argparse.Namespace(**{**vars(settings), "steps": max(count, 2)})
    trainer = make(dry, parts, images[: COUNTED_BATCHES * settings.batch_size], 0)
    spent, found = Costs(list(trainer.model.parameters())), dict[int, list[dict[str, float]]]()
    spent.on(lambda: fit(trainer, lambda report: found.setdefault(part_of(report), []).append(spent.take())))
    return {
        part: {name: min(cost[name] for cost in costs) for name in costs[0]} for part, costs in sorted(found.items())
    }


# ---- Results ----


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


COLUMNS = {
    "method": "{name}",
    "bits/dim": "{bits_per_dim:.3f}",
    "difference": "{difference:+.3f}",
    "over the seeds": "{least:.3f}–{most:.3f}",
    "seconds": "{seconds:.0f}",
    "time": "{time_ratio:.2f}",
    "backward FLOPs": "{backward_flops_ratio:.2f}",
    "saved MiB": "{mib:.1f}",
}


def lines(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the table."""
    return [
        {
            **entry,
            "name": name,
            "least": min(entry["bits_per_dim_of_seeds"]),
            "most": max(entry["bits_per_dim_of_seeds"]),
            "mib": entry["saved_bytes_before_finish"] / 2**20,
        }
        for name, entry in summary.items()
    ]


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
    figure = new_figure(11, 4.2)
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
    panels[0].set(xlabel="seconds of training", ylabel="test bits per dimension")
    panels[1].set_xlabel("backward TFLOPs")
    panels[0].legend(fontsize="small")
    save_figure(figure, PICTURE)


def _mean(series: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


def write_page(path: Path) -> None:
    """Writes the figures of a results file into the page, and draws its curves."""
    content = json.loads(path.read_text())
    settings, summary = content["settings"], content["summary"]
    rows = [[form.format(**line) for form in COLUMNS.values()] for line in lines(summary)]
    table = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    text = [
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
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + "\n".join(text) + MARKS[1] + after)
    print(f"written: {PAGE}")


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, device=False)
    made.set_defaults(json=RESULTS)
    made.add_argument("--data", default="embedded", help="a folder with idx files, or the embedded slice")
    made.add_argument("--steps", type=int, default=900, help="of every run")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--parts", nargs="+", default=["blocks:2", "across:2", "across:3"])
    made.add_argument("--schedules", nargs="+", default=["alternate", "sequential"])
    made.add_argument("--finish", type=float, default=1 / 3)
    made.add_argument("--cache-epochs", type=int, default=5, help="of the sequential schedule; 0 for none")
    made.add_argument("--levels", type=int, default=2)
    made.add_argument("--depth", type=int, default=3)
    made.add_argument("--hidden", type=int, default=16)
    made.add_argument("--batch-size", type=int, default=50)
    made.add_argument("--learning-rate", type=float, default=1e-2)
    made.add_argument("--decay-at", type=float, default=0.85, help="share of the run after which it falls to a tenth")
    made.add_argument("--average-decay", type=float, default=0.99)
    made.add_argument("--evaluate-every", type=int, default=100)
    made.add_argument("--test-images", type=int, default=1000, help="the most that are used")
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds passed, or of processor time")
    made.add_argument("--report", action="store_true", help="write the figures of --json into docs/parts.md")
    settings = made.parse_args(given)
    if settings.clock == "cpu" and settings.threads > 1:
        made.error("--clock cpu adds up the time of all threads: use it with --threads 1")
    return settings


def main(given: Sequence[str] | None = None) -> int:
    settings = parse_arguments(given)
    if settings.report:
        write_page(settings.json)
        return 0
    report, data = Report("parts", settings), load(settings.data)
    test_images = data.test.images[: settings.test_images]
    compared = candidates(settings.parts, settings.schedules, settings.finish, settings.cache_epochs)
    costs = {name: costs_of_a_step(settings, parts, data.train.images) for name, parts in compared.items()}
    model = make(settings, None, data.train.images, 0).model
    report.set(
        data=data.name, train_images=len(data.train), test_images=len(test_images), parameters=model.num_parameters,
        work_shares={text: part_shares(split_flow(model, *parse_parts(text))) for text in settings.parts},
        costs_of_a_step=costs,
    )  # fmt: skip
    curves: dict[str, list[Curve]] = {name: [] for name in compared}
    for seed in range(settings.seeds):
        for name in compared if seed % 2 == 0 else reversed(compared):
            curve = train(settings, compared[name], data.train.images, test_images, seed, costs[name])
            curves[name].append(curve)
            report.set(curves=curves)
            print(f"seed {seed}, {name}: {curve.bits_per_dim[-1]:.4f} bits/dim, {curve.seconds[-1]:.1f} s", flush=True)
    summary = summarize(curves, costs)
    report.set(summary=summary, verdict=verdict(summary))
    Table(COLUMNS).add(*lines(summary))
    print("\n".join(verdict(summary)))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
