"""How much does training remember for its backward pass, and what does it cost not to?

    python benchmarks/memory.py                           bytes at the reference setting, times at a small one
    python benchmarks/memory.py --device cuda --full      also the allocator's peaks; times at the reference setting
    python benchmarks/memory.py --json benchmarks/results/memory.json --plot docs/images/memory

The model is Glow: squeeze → K × (ActNorm, 1×1 convolution, affine coupling with a 3×3, 1×1, 3×3 network) → split, on
three levels. The reference setting is a batch of 8 colour images of 256² and networks of width 256. Five ways to train
it: storing all activations, recomputing each coupling (torch.utils.checkpoint), recomputing each step of the flow
(likewise), rebuilding activations (this library), and the Glow of normflows where that package is installed.

Bytes are those of every storage that autograd keeps between forward and backward pass, each counted once, without
parameters and buffers. They are counted on tensors without data (PyTorch's fake tensors), which run through the same
code, so that the reference setting needs neither its memory nor its time; nothing is extrapolated. Before anything is
timed, the gradients are compared with those of the stored path.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Work, compare, describe, print_table, time_alternately, write_json
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from inverse_flow.flows import AffineCoupling, Compose, Flow
from inverse_flow.models import Glow

try:
    import normflows
except ImportError:
    normflows = None

LEVELS = 3
STEPS = (4, 16, 48, 80)
STORED, OURS, BLOCK = "stored", "rebuilt (ours)", "checkpoint of each step"
COUPLING, NORMFLOWS = "checkpoint of each coupling", "normflows"
TARGETS = {
    "bytes per step of the flow": 0.0,
    "time over the stored path": 1.35,
    "time over the checkpoint of steps": 1.0,
}
# Largest relative difference allowed between a gradient and that of the stored path, in float32. A ReLU whose input is
# zero up to rounding may take either slope: one such pixel moves the gradient of a network by 1e-4.
GRADIENT_TOLERANCE = 1e-3
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """Batch, side of the square colour images, and width of the networks."""

    batch: int
    side: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.batch} x 3 x {self.side}², hidden {self.hidden}"


REFERENCE = Setting(8, 256, 256)
SMALL = Setting(8, 64, 256)


class Checkpointed(nn.Module):
    """A layer whose forward pass is computed again in the backward pass, from its stored input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # These layers draw no random numbers, so the rival need not spend time on generators either.
        return checkpoint(self.layer, x, context, use_reentrant=False, preserve_rng_state=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(z, context)


def make_glow(setting: Setting, steps: int) -> Flow:
    """A Glow with no parameter at its initial value; ActNorm does not initialise itself from data."""
    torch.manual_seed(0)
    flow = Glow((3, setting.side, setting.side), LEVELS, steps, setting.hidden).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return flow


def checkpointed(flow: Flow, *, couplings: bool) -> Flow:
    """The same layers, with each coupling, or each step of the flow, checkpointed."""

    def wrap(layer: nn.Module) -> nn.Module:
        if not isinstance(layer, Compose):
            return layer
        if not couplings:
            return Checkpointed(layer)
        return Compose(*(Checkpointed(part) if isinstance(part, AffineCoupling) else part for part in layer.layers))

    return Flow([wrap(layer) for layer in flow.layers], flow.event_shape, base=flow.base)


def make_normflows(setting: Setting, steps: int) -> nn.Module:
    """The Glow of normflows with the same levels, steps and widths; its layers run from latent to data."""
    bases, merges, flows = [], [], []
    for level in range(LEVELS):
        channels = 3 * 2 ** (LEVELS + 1 - level)
        blocks = [normflows.flows.GlowBlock(channels, setting.hidden) for _ in range(steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        side = setting.side // 2 ** (LEVELS - level)
        if level:
            merges.append(normflows.flows.Merge())
            channels //= 2
        bases.append(normflows.distributions.DiagGaussian((channels, side, side)))
    model = normflows.MultiscaleFlow(bases, flows, merges).eval()
    for module in model.modules():
        # As in our models: no initialisation from the first batch, which would read values.
        if isinstance(module, normflows.flows.ActNorm):
            del module.data_dep_init_done
            module.data_dep_init_done = True
    return model


def losses(
    setting: Setting, steps: int, device: torch.device
) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Each way to train, as its module and the loss of a batch; all but normflows share their parameters."""
    with device:
        flow = make_glow(setting, steps)
    rebuilding = Flow(flow.layers, flow.event_shape, base=flow.base, memory_efficient=True)
    flows = {
        STORED: flow,
        COUPLING: checkpointed(flow, couplings=True),
        BLOCK: checkpointed(flow, couplings=False),
        OURS: rebuilding,
    }
    found = {name: (model, lambda x, model=model: -model.log_prob(x).mean()) for name, model in flows.items()}
    if normflows is not None:
        with device:
            theirs = make_normflows(setting, steps)
        found[NORMFLOWS] = (theirs, theirs.forward_kld)
    return found


def images(setting: Setting, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(setting.batch, 3, setting.side, setting.side, generator=generator).to(device)


def bytes_saved(run: Callable[[], Any], known: Sequence[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of ``run()``, each counted once, without those
    of ``known``.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Holding the storage keeps its address from being given to another one.
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: what one unit of the first coordinate adds to the second."""
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def count_bytes(setting: Setting, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes saved by each way, at each depth."""
    rows = []
    for count in steps:
        ways = losses(setting, count, torch.device("cpu"))
        # The parameters are real; what comes of a fake batch and of them is fake.
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(setting.batch, 3, setting.side, setting.side)
            for name, (model, loss) in ways.items():
                saved = bytes_saved(lambda loss=loss, x=x: loss(x), [*model.parameters(), *model.buffers()])
                rows.append({"method": name, "steps": count, "bytes": saved})
    return rows


def measure_peaks(setting: Setting, steps: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """The allocator's peak during one forward and backward pass on a GPU, parameters and gradients included."""
    rows = []
    for count in steps:
        for name in losses(SMALL, 1, torch.device("cpu")):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            row: dict[str, Any] = {"method": name, "steps": count, "peak_bytes": None}
            try:
                _, loss = losses(setting, count, device)[name]
                loss(images(setting, device)).backward()
                row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            except torch.cuda.OutOfMemoryError:
                pass
            rows.append(row)
    return rows


def check_gradients(setting: Setting, steps: int, device: torch.device) -> dict[str, float]:
    """The largest relative difference of any gradient from that of the stored path.

    Raises:
        ArithmeticError: one of them is too large, or not a number.
    """
    ways, x = losses(setting, steps, device), images(setting, device)
    parameters = list(ways[STORED][0].parameters())

    def gradients(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ways[name][1](x), parameters)

    wanted = gradients(STORED)
    found = {}
    for name in (COUPLING, BLOCK, OURS):
        pairs = zip(gradients(name), wanted, strict=True)
        found[name] = max(float((mine - w).norm() / w.norm().clamp_min(1e-12)) for mine, w in pairs)
    wrong = [f"{name} {error:.1e}" for name, error in found.items() if not error <= GRADIENT_TOLERANCE]
    if wrong:
        raise ArithmeticError(f"gradients differ by more than {GRADIENT_TOLERANCE:.0e}: {', '.join(wrong)}")
    return found


def measure_times(setting: Setting, steps: int, device: torch.device, budget: float) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass of each way, in alternation."""
    x = images(setting, device)

    def work_of(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Work:
        def work() -> None:
            model.zero_grad(set_to_none=True)
            loss(x).backward()

        return work

    works = {name: work_of(*way) for name, way in losses(setting, steps, device).items()}
    return time_alternately(works, device, budget)


def ratios(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every way against the stored path; ours also against the checkpoint of steps."""
    rows = [
        {"method": name, "rival": STORED, **compare(samples[name], samples[STORED])}
        for name in samples
        if name != STORED
    ]
    return [*rows, {"method": OURS, "rival": BLOCK, **compare(samples[OURS], samples[BLOCK])}]


def plot(rows: Sequence[dict[str, Any]], setting: Setting, path: Path) -> None:
    """Bytes saved over depth, as ``path``.png and ``path``.svg."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["method"] for row in rows):
        points = [(row["steps"], row["bytes"] / GIB) for row in rows if row["method"] == name]
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=4, linewidth=2 if name == OURS else 1.2, label=name
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"steps in each of {LEVELS} levels")
    axes.set_ylabel("GiB kept for the backward pass")
    axes.set_title(f"Glow, {setting}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        print(f"written: {path.with_suffix(suffix)}")


def print_bytes(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """A table of GiB, and what a step of the flow adds, which is returned in bytes."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    slopes, cells = {}, []
    for name in methods:
        values = {row["steps"]: row[key] for row in rows if row["method"] == name}
        points = [(LEVELS * count, value) for count, value in values.items() if value is not None]
        slopes[name] = slope(points) if len(points) > 1 else float("nan")
        figures = ["out of memory" if values[count] is None else f"{values[count] / GIB:.3f}" for count in steps]
        cells.append([name, *figures, f"{slopes[name] / 2**20:.4f}"])
    print_table(["GiB", *(f"K={count}" for count in steps), "MiB a step"], cells)
    return slopes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="depths K to count bytes at")
    parser.add_argument("--timed-steps", type=int, default=4, help="the depth K that is timed")
    parser.add_argument("--batch", type=int, help="images in a timed batch")
    parser.add_argument("--side", type=int, help="side of the timed images")
    parser.add_argument("--full", action="store_true", help=f"time the reference setting, {REFERENCE}")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to measure with")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing, at least 15 rounds")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw the bytes into this file, as .png and .svg")
    arguments = parser.parse_args()
    timed = REFERENCE if arguments.full else SMALL
    arguments.timed = Setting(arguments.batch or timed.batch, arguments.side or timed.side, timed.hidden)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", "torch.lu is deprecated")  # in normflows
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    print(describe(arguments.device))
    if normflows is None:
        print("normflows is not installed, so it is left out: pip install --no-deps normflows", file=sys.stderr)

    print(f"\nkept for the backward pass, {REFERENCE}")
    rows = count_bytes(REFERENCE, arguments.steps)
    slopes = print_bytes(rows, "bytes")
    results: dict[str, Any] = {"bytes": rows, "bytes_per_step": slopes}
    if arguments.device.type == "cuda":
        print(f"\npeak of the allocator, {REFERENCE}")
        results["peaks"] = measure_peaks(REFERENCE, arguments.steps, arguments.device)
        results["peak_bytes_per_step"] = print_bytes(results["peaks"], "peak_bytes")

    print(f"\nforward and backward, {arguments.timed}, K={arguments.timed_steps}, {arguments.threads} thread(s)")
    try:
        results["gradient_differences"] = check_gradients(arguments.timed, arguments.timed_steps, arguments.device)
    except ArithmeticError as error:
        print(f"WRONG  {error}", file=sys.stderr)
        return 1
    results["times"] = ratios(measure_times(arguments.timed, arguments.timed_steps, arguments.device, arguments.budget))
    names = ("ratio", "ratio_p20", "ratio_p80", "ratio_fastest")
    print_table(
        ["", "against", "ms", "rival ms", "ratio", "p20", "p80", "fastest", "rounds"],
        [
            [row["method"], row["rival"], f"{row['ours_ms']:.1f}", f"{row['rival_ms']:.1f}"]
            + [*(f"{row[name]:.3f}" for name in names), str(row["rounds"])]
            for row in results["times"]
        ],
    )
    by_rival = {row["rival"]: row["ratio"] for row in results["times"] if row["method"] == OURS}
    reached = dict(zip(TARGETS, (slopes.get(OURS, float("nan")), by_rival[STORED], by_rival[BLOCK]), strict=True))
    print()
    for name, target in TARGETS.items():
        print(f"{name}: {reached[name]:.4g} (target at most {target})")
    if arguments.plot:
        plot(rows, REFERENCE, arguments.plot)
    if arguments.json:
        settings = {
            "levels": LEVELS,
            "bytes_at": str(REFERENCE),
            "timed_at": str(arguments.timed),
            "timed_steps": arguments.timed_steps,
            "threads": arguments.threads,
            "normflows": None if normflows is None else getattr(normflows, "__version__", "unknown"),
            "targets": TARGETS,
        }
        write_json(arguments.json, "memory", arguments.device, settings, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
