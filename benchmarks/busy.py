"""How fast is a training on a machine that other programs use, by how its threads wait for each other?

    python benchmarks/busy.py                               three minutes; the machine must be idle but for it
    python benchmarks/busy.py --json benchmarks/results/busy.json

A step of an Inverse-Flow is trained again and again in a process of its own, alone and beside programs that keep a core
busy each. OpenMP reads how its threads are to wait when PyTorch is loaded: as it does by itself, with the
``GOMP_SPINCOUNT`` that ``inverse-flow train`` sets, or asleep at once. All of them take turns, and their losses are
compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Report, Table, parser, quantile, require

from inverse_flow.command.spinning import CHOICES, SPINS
from inverse_flow.models import InverseFlow

POLICIES: dict[str, dict[str, str]] = {
    "as OpenMP does": {},
    f"GOMP_SPINCOUNT={SPINS}": {"GOMP_SPINCOUNT": SPINS},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BUSY = "while True: pass"
BATCH = 50
WARM_UP = 3
# The same steps on the same machine; sums of threads may come in another order.
LOSS_TOLERANCE = 1e-4


def train(options: dict[str, Any], seconds: float) -> dict[str, float]:
    """Images per second over this time of training, and the loss of the last step before them."""
    torch.manual_seed(0)
    flow = InverseFlow((1, 28, 28), **options)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    images = torch.rand(BATCH, 1, 28, 28)

    def step() -> float:
        optimizer.zero_grad()
        loss = -flow.log_prob(images).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(WARM_UP):
        loss = step()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return {"images_per_second": BATCH * steps / (time.perf_counter() - start), "loss": loss}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """This number of busy programs beside what runs in here."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(arguments: argparse.Namespace, policy: dict[str, str]) -> dict[str, float]:
    """:func:`train` in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
    given = ["--child", "--threads", str(arguments.threads), "--seconds", str(arguments.seconds)]
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("levels", "steps", "hidden")]
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *given, *sizes], env=inherited | policy, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(given: list[str] | None = None) -> int:
    made = parser(__doc__, device=False)
    made.add_argument("--busy", type=int, default=2, help="busy programs beside the training")
    made.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    made.add_argument("--seconds", type=float, default=6.0, help="of one measurement")
    made.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="POLICY")
    for name, default in (("levels", 2), ("steps", 4), ("hidden", 64)):
        made.add_argument(f"--{name}", type=int, default=default, help="of the model")
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = made.parse_args(given)
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        options = {name: getattr(arguments, name) for name in ("levels", "steps", "hidden")}
        print(json.dumps(train(options, arguments.seconds)))
        return 0

    report = Report("a training beside other programs", arguments)
    kinds = [(count, policy) for count in (0, arguments.busy) for policy in arguments.policies]
    found: dict[tuple[int, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(arguments.rounds):
        for count, policy in kinds if number % 2 == 0 else reversed(kinds):
            with neighbours(count):
                found[count, policy].append(measure(arguments, POLICIES[policy]))
    losses = {kind: [one["loss"] for one in several] for kind, several in found.items()}
    wanted = losses[kinds[0]][0]
    table = Table({"busy programs": "{busy}", "threads wait": "{policy}", "images/s": "{median:.0f}",
                   "p20": "{p20:.0f}", "p80": "{p80:.0f}"})  # fmt: skip
    for count, policy in kinds:
        with report.checked(f"{policy}, {count} busy programs"):
            require({"loss": max(abs(loss / wanted - 1) for loss in losses[count, policy])}, LOSS_TOLERANCE)
            speeds = [one["images_per_second"] for one in found[count, policy]]
            row = {"busy": count, "policy": policy, "median": statistics.median(speeds), "all": speeds}
            row |= {"p20": quantile(speeds, 0.2), "p80": quantile(speeds, 0.8)}
            report.add("rows", row)
    table.add(*report.content.get("rows", []))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
