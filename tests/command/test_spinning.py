"""``train`` runs with a moderate spin count, unless the user chose one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import types

import pytest

from inverse_flow.command.main import main
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


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch uses on Linux")
def test_a_training_spins_moderately() -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train"], env=inherited, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.split() == [SPINS, "None"]


@pytest.mark.parametrize(
    ("command", "chosen"),
    [("train", {}), ("train", {"GOMP_SPINCOUNT": "77"}), ("train", {"OMP_WAIT_POLICY": "active"}), ("sample", {})],
)
def test_only_a_training_without_a_choice_of_the_user_starts_again(
    monkeypatch: pytest.MonkeyPatch, command: str, chosen: dict[str, str]
) -> None:
    """By the environment when it starts itself anew, and when its command is called."""
    seen: list[dict[str, str]] = []

    def look(*_: object, **__: object) -> None:
        seen.append({name: os.environ[name] for name in CHOICES if name in os.environ})

    for name in CHOICES:
        monkeypatch.setenv(name, "")  # what the command sets is undone
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    commands = types.ModuleType("inverse_flow.command.commands")
    commands.cli = look  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, commands.__name__, commands)
    monkeypatch.setattr(os, "execv", look)
    monkeypatch.setattr(sys, "argv", ["inverse-flow", command])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    main()
    again = command == "train" and not chosen and sys.platform == "linux"
    assert seen == ([{"GOMP_SPINCOUNT": SPINS}] * 2 if again else [chosen])
