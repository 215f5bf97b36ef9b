"""What does it cost to compile a flow with ``torch.compile``, whole or layer by layer, and what does that gain?

    python benchmarks/compiling.py                          about twenty minutes
    python benchmarks/compiling.py --json benchmarks/results/compiling.json

An Inverse-Flow of 2 levels of ``--steps`` steps each is compiled by Inductor, in a process of its own that finds
nothing in its caches: its density with the gradients, its density without, and sampling. Reported are the seconds of
the processor that the compiler and the programs that it starts take, in all and for each further step, and the time of
a call before and after. A further step is counted from a flow of ``--fewer`` steps per level: most of the seconds are
spent once, on starting the compiler and on the kernels that all steps of a level share. Compiled layer by layer, equal
steps share the whole program.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Report, Table, parser, relative_error, require, spread, time_alternately
from torch import Tensor

from inverse_flow.models import InverseFlow

LEVELS = 2
SHAPE = (1, 28, 28)
BATCH = 16
# Fused operations round otherwise.
TOLERANCE = 1e-4
JOBS = ("gradients", "density", "sampling")
WAYS = ("whole", "by layer")


def processor_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def work(flow: InverseFlow, job: str, backend: str, way: str | None) -> Callable[[], Tensor]:
    """A call of what is compiled; None for the way compiles nothing."""
    x, latents = torch.rand(BATCH, *SHAPE), flow.base.sample(BATCH, flow.latent_shapes)
    call = flow.inverse if job == "sampling" else flow.log_prob
    if way == "whole":
        call = torch.compile(call, backend=backend)
    elif way == "by layer":
        for layer in flow.layers:
            if job == "sampling":
                layer.inverse = torch.compile(layer.inverse, backend=backend)
            else:
                layer.compile(backend=backend)

    def run() -> Tensor:
        with torch.set_grad_enabled(job == "gradients"):
            if job == "sampling":
                return call(latents)[0]
            log_prob = call(x)
            if job == "density":
                return log_prob
            return torch.cat([grad.flatten() for grad in torch.autograd.grad(log_prob.mean(), list(flow.parameters()))])

    return run


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One job compiled in one way, in this process."""
    torch.set_num_threads(arguments.threads)

    def flow() -> InverseFlow:
        torch.manual_seed(0)
        made = InverseFlow(SHAPE, levels=LEVELS, steps=arguments.steps, hidden=arguments.hidden)
        made(torch.rand(BATCH, *SHAPE))  # initialises it
        return made.eval()

    plain = work(flow(), arguments.job, arguments.backend, None)
    compiled = work(flow(), arguments.job, arguments.backend, arguments.way)
    torch.manual_seed(1)
    expected = plain()
    start = processor_seconds()
    found = compiled()
    seconds = processor_seconds() - start
    error = relative_error(found, expected)
    samples = time_alternately({"plain": plain, "compiled": compiled}, torch.device("cpu"), arguments.budget)
    times = {name: spread(taken)["ms"] for name, taken in samples.items()}
    return {"seconds": seconds, "error": error, **times}


def measured_apart(arguments: argparse.Namespace, job: str, way: str, steps: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own, without caches and other compilers beside it."""
    names = ("threads", "hidden", "budget", "backend")
    given = [f"--{name}={getattr(arguments, name)}" for name in names] + [f"--steps={steps}"]
    with tempfile.TemporaryDirectory() as caches:
        environment = {"TORCHINDUCTOR_CACHE_DIR": caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__)), *given, f"--job={job}", f"--way={way}"], env=os.environ | environment,
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(given: list[str] | None = None) -> int:
    parsed = parser(__doc__, device=False, threads=1, budget=2.0)
    parsed.add_argument("--steps", type=int, default=8, help="per level")
    parsed.add_argument("--fewer", type=int, default=2, help="steps per level of the smaller flow")
    parsed.add_argument("--hidden", type=int, default=64, help="of the model")
    parsed.add_argument("--backend", default="inductor", help="of the compiler")
    parsed.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="what is compiled")
    parsed.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="how it is compiled")
    parsed.add_argument("--job", help=argparse.SUPPRESS)
    parsed.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parsed.parse_args(given)
    if arguments.job:
        print(json.dumps(measure(arguments)))
        return 0
    if not 1 <= arguments.fewer < arguments.steps:
        parsed.error(f"--fewer must be at least 1 and below --steps, {arguments.steps}; got {arguments.fewer}")

    report = Report("compiling a flow", arguments)
    columns = {
        "compiled": "{job}, {way}",
        "s of the processor": "{seconds:>6.1f}",
        "per further step": "{per_step:.2f}",
        "ms before": "{plain:.2f}",
        "after": "{compiled:.2f}",
    }
    table = Table(columns)
    for job in arguments.jobs:
        for way in arguments.ways:
            with report.checked(f"{job}, {way}"):
                found = measured_apart(arguments, job, way, arguments.steps)
                require({"result": found["error"]}, TOLERANCE)
                fewer = measured_apart(arguments, job, way, arguments.fewer)["seconds"]
                per_step = (found["seconds"] - fewer) / (LEVELS * (arguments.steps - arguments.fewer))
                row = {"job": job, "way": way, "per_step": per_step, "seconds_fewer": fewer, **found}
                report.add("rows", row)
                table.add(row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
