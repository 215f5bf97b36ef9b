"""What a large flow would take on several GPUs: memory and communication of a training step, counted and not run.

    python benchmarks/scale.py                                  ImageNet at 64² on eight GPUs
    python benchmarks/scale.py --json benchmarks/results/scale.json

Bytes are those that autograd keeps for the backward pass, counted on tensors without data as in memory.py; products are
those of PyTorch's convolutions and matrices in a forward pass (twice the multiply-adds; the solves, less than a
hundredth of them, are left out). Rebuilding keeps the images and latents, and at its peak the graph of one step of the
first level beside them. What a GPU has is given, not measured: all that is derived of it is a bound, not a prediction.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from harness import Report, Table, parser
from memory import NothingDrawn, counting_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from inverse_flow.models import InverseFlow

GIB = 2**30
# Of each parameter: itself, its gradient, Adam's two moments, the average of the weights.
STATE_BYTES = 5 * 4


def build(settings: Any, levels: int, steps: int, *, rebuild: bool) -> InverseFlow:
    """A flow that initialises nothing from data."""
    shape = (3, settings.side, settings.side)
    return InverseFlow(shape, levels, steps, settings.hidden, memory_efficient=rebuild).eval()


def kept(model: InverseFlow, batch: int) -> int:
    """Bytes kept between a forward and a backward pass, without parameters and buffers."""
    with FakeTensorMode(allow_non_fake_inputs=True), NothingDrawn():
        images = torch.empty(batch, *model.event_shape)
        with counting_bytes([*model.parameters(), *model.buffers()]) as count:
            model.log_prob(images)
            return count()


def per_image(model: InverseFlow) -> int:
    """What one image more keeps."""
    return kept(model, 3) - kept(model, 2)


def products(model: InverseFlow) -> int:
    """Floating-point operations of the forward pass of one image."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.log_prob(torch.empty(1, *model.event_shape))
    return counter.get_total_flops()


def main(given: Sequence[str] | None = None) -> int:
    made = parser(__doc__, threads=1, device=False)
    made.add_argument("--side", type=int, default=64)
    made.add_argument("--levels", type=int, default=4)
    made.add_argument("--steps", type=int, nargs="+", default=[16, 32])
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--images", type=int, default=1_281_149, help="of the training set")
    made.add_argument("--gpus", type=int, default=8)
    made.add_argument("--gpu-gib", type=float, default=141e9 / GIB, help="memory of a GPU")
    made.add_argument("--gpu-teraflops", type=float, default=67.0, help="its peak in float32, without tensor cores")
    made.add_argument("--link-gigabytes", type=float, default=450.0, help="a second, in one direction, of a GPU")
    settings = made.parse_args(given)
    report = Report("scale", settings)
    columns = {
        "steps a level": "{steps}", "parameters": "{parameters:,}", "state, GiB": "{state_gib:.2f}",
        "stored, MiB an image": "{stored_mib:.1f}", "images a GPU": "{stored_images}",
        "rebuilt, MiB an image": "{rebuilt_mib:.1f}", "images a GPU, rebuilt": "{rebuilt_images}",
        "gigaflops an image": "{gigaflops:.0f}", "gradients, ms": "{link_ms:.2f}", "hours an epoch": "{hours:.2f}",
    }  # fmt: skip
    table = Table(columns)
    # The first level is the largest: one step more there, with its graph.
    one, two = (per_image(build(settings, 1, steps, rebuild=False)) for steps in (1, 2))
    for steps in settings.steps:
        stored, rebuilt = (build(settings, settings.levels, steps, rebuild=rebuild) for rebuild in (False, True))
        parameters = stored.num_parameters
        state, room = STATE_BYTES * parameters, settings.gpu_gib * GIB - STATE_BYTES * parameters
        stored_bytes, rebuilt_bytes = per_image(stored), per_image(rebuilt) + two - one
        forward = products(stored)
        # An all-reduce in a ring sends and receives almost twice what is reduced.
        sent = 2 * (settings.gpus - 1) / settings.gpus * 4 * parameters
        seconds = 3 * forward * settings.images / (settings.gpus * settings.gpu_teraflops * 1e12)
        row = {
            "steps": steps, "parameters": parameters, "state_gib": state / GIB,
            "stored_mib": stored_bytes / 2**20, "stored_images": int(room / stored_bytes),
            "rebuilt_mib": rebuilt_bytes / 2**20, "rebuilt_images": int(room / rebuilt_bytes),
            "gigaflops": forward / 1e9, "sent_bytes": sent, "link_ms": 1e-6 * sent / settings.link_gigabytes,
            "hours": seconds / 3600,
        }  # fmt: skip
        report.add("rows", row)
        table.add(row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
