"""``train`` runs with a moderate spin count, unless the user chose one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from inverse_flow.command.spinning import CHOICES, SPINS

# What a subcommand sees of the environment that OpenMP was loaded in, which PyTorch's own reading of it would not show.
PROGRAM = """
import os, sys, types
from inverse_flow.command import main as entry
seen = types.ModuleType("inverse_flow.command.commands")
seen.cli = lambda prog_name: print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")))
sys.modules[seen.__name__] = seen
entry.main()
"""


def seen(command: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command], env=inherited | environment,
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch uses on Linux")
def test_a_training_spins_moderately() -> None:
    assert seen("train") == [SPINS, "None"]


def test_what_the_user_chose_stays() -> None:
    assert seen("train", GOMP_SPINCOUNT="77") == ["77", "None"]
    assert seen("train", OMP_WAIT_POLICY="active") == ["None", "active"]


def test_other_commands_start_once() -> None:
    assert seen("sample") == ["None", "None"]
