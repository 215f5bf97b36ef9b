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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    RATIOS,
    Report,
    Table,
    Work,
    compare,
    new_figure,
    parser,
    relative_error,
    require,
    save_figure,
    time_alternately,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
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


@contextmanager
def counting_bytes(known: Sequence[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Counts the bytes of the storages that autograd keeps for a backward pass, each once, without those of ``known``;
    yields what tells the count so far."""
    storages: dict[int, torch.UntypedStorage] = {}
    left_out = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        # Holding the storage keeps its address from being given to another one.
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in storages.values())


class NothingDrawn(TorchFunctionMode):
    """Generator states count as equal: they are compared to find layers that draw random numbers, and here none does.
    Fake tensors cannot be compared."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if function is torch.equal else function(*args, **(kwargs or {}))


def count_bytes(setting: Setting, steps: int) -> list[dict[str, Any]]:
    """Bytes saved by each way, at one depth."""
    rows = []
    # The parameters are real; what comes of a fake batch and of them is fake.
    for name, (model, loss) in losses(setting, steps, torch.device("cpu")).items():
        with FakeTensorMode(allow_non_fake_inputs=True), NothingDrawn():
            x = torch.empty(setting.batch, 3, setting.side, setting.side)
            with counting_bytes([*model.parameters(), *model.buffers()]) as count:
                loss(x)
                rows.append({"method": name, "steps": steps, "bytes": count()})
    return rows


def measure_peaks(setting: Setting, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """The allocator's peak during one forward and backward pass on a GPU, parameters and gradients included."""
    rows = []
    for name in losses(SMALL, 1, torch.device("cpu")):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        row: dict[str, Any] = {"method": name, "steps": steps, "peak_bytes": None}
        try:
            _, loss = losses(setting, steps, device)[name]
            loss(images(setting, device)).backward()
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        except torch.cuda.OutOfMemoryError:
            pass
        rows.append(row)
    return rows


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: what one unit of the first coordinate adds to the second."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else float("nan")


def print_bytes(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """A table of GiB, and what a step of the flow adds, which is returned in bytes."""
    steps, lines = list(dict.fromkeys(row["steps"] for row in rows)), []
    for name in dict.fromkeys(row["method"] for row in rows):
        values = {row["steps"]: row[key] for row in rows if row["method"] == name and row[key] is not None}
        each = slope([(LEVELS * count, value) for count, value in values.items()])
        line = {f"K{count}": value / GIB for count, value in values.items()}
        lines.append({"method": name, "each": each, "mib": each / 2**20, **line})
    columns = {f"K={count}": f"{{K{count}:.3f}}" for count in steps}
    Table({"GiB": "{method}", **columns, "MiB per step": "{mib:.4f}"}).add(*lines)
    return {line["method"]: line["each"] for line in lines}


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
    return require(
        {name: max(map(relative_error, gradients(name), wanted)) for name in (COUPLING, BLOCK, OURS)},
        GRADIENT_TOLERANCE,
    )


def measure_times(setting: Setting, steps: int, device: torch.device, budget: float) -> list[dict[str, Any]]:
    """Forward and backward pass, in alternation: every way against the stored path, ours also against the checkpoint
    of steps."""
    x = images(setting, device)

    def work_of(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Work:
        def work() -> None:
            model.zero_grad(set_to_none=True)
            loss(x).backward()

        return work

    works = {name: work_of(*way) for name, way in losses(setting, steps, device).items()}
    samples = time_alternately(works, device, budget)
    pairs = [*((name, STORED) for name in samples if name != STORED), (OURS, BLOCK)]
    return [{"method": a, "rival": b, **compare(samples[a], samples[b])} for a, b in pairs]


def plot(rows: Sequence[dict[str, Any]], setting: Setting, path: Path) -> None:
    """Bytes saved over depth."""
    figure = new_figure(9, 4)
    axes = figure.subplots()
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        at, kept = [row["steps"] for row in own], [row["bytes"] / GIB for row in own]
        axes.plot(at, kept, marker="o", markersize=4, linewidth=2 if name == OURS else 1.2, label=name)
    axes.set(yscale="log", xlabel=f"steps in each of {LEVELS} levels", ylabel="GiB kept for the backward pass")
    axes.set_title(f"Glow, {setting}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    save_figure(figure, path)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, threads=1, budget=60.0, plot=True)
    made.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="depths K to count bytes at")
    made.add_argument("--timed-steps", type=int, default=4, help="the depth K that is timed")
    for name in ("batch", "side", "hidden"):
        made.add_argument(f"--{name}", type=int, help="of the timed setting")
    made.add_argument("--full", action="store_true", help=f"time the reference setting, {REFERENCE}, not {SMALL}")
    arguments = made.parse_args(given)
    timed = REFERENCE if arguments.full else SMALL
    arguments.timed = Setting(*(getattr(arguments, f) or getattr(timed, f) for f in ("batch", "side", "hidden")))
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    warnings.filterwarnings("ignore", "torch.lu is deprecated")  # in normflows
    device, timed = arguments.device, arguments.timed
    report = Report("memory", arguments)
    if normflows is None:
        print("normflows is not installed, so it is left out: pip install --no-deps normflows", file=sys.stderr)
    report.set(bytes_at=str(REFERENCE), normflows=getattr(normflows, "__version__", None), targets=TARGETS)

    print(f"\nkept for the backward pass, {REFERENCE}")
    rows: list[dict[str, Any]] = []
    for count in arguments.steps:
        rows += count_bytes(REFERENCE, count)
        report.set(bytes=rows)
    slopes = print_bytes(rows, "bytes")
    report.set(bytes_per_step=slopes)
    if arguments.plot:
        plot(rows, REFERENCE, arguments.plot)
    if device.type == "cuda":
        print(f"\npeak of the allocator, {REFERENCE}")
        peaks: list[dict[str, Any]] = []
        for count in arguments.steps:
            peaks += measure_peaks(REFERENCE, count, device)
            report.set(peaks=peaks)
        report.set(peak_bytes_per_step=print_bytes(peaks, "peak_bytes"))

    print(f"\nforward and backward, {timed}, K={arguments.timed_steps}, {arguments.threads} thread(s)")
    with report.checked("gradients"):
        report.set(gradient_differences=check_gradients(timed, arguments.timed_steps, device))
        times = measure_times(timed, arguments.timed_steps, device, arguments.budget)
        report.set(times=times)
        columns = {"": "{method}", "against": "{rival}", "ms": "{ours_ms:.1f}", "rival ms": "{rival_ms:.1f}"}
        Table(columns | RATIOS).add(*times)
        by_rival = {row["rival"]: row["ratio"] for row in times if row["method"] == OURS}
        reached = dict(zip(TARGETS, (slopes[OURS], by_rival[STORED], by_rival[BLOCK]), strict=True))
        print()
        for name, target in TARGETS.items():
            print(f"{name}: {reached[name]:.4g} (target at most {target})")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
