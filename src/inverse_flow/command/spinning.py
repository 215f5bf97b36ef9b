"""How long the threads of a training wait for work before they sleep."""

from __future__ import annotations

import os
import sys

# Rounds in which an idle thread of OpenMP looks for work before it sleeps. By default it looks for milliseconds, on
# cores that other programs could use or hold: two busy programs beside it slow a training to a fiftieth.
SPINS = "10000"
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_moderately() -> None:
    """Starts this program again with a moderate ``GOMP_SPINCOUNT``, unless the user chose how threads wait.

    OpenMP reads it when PyTorch is loaded, which importing this package does: it is too late to set it here.
    """
    if sys.platform != "linux" or any(name in os.environ for name in CHOICES):
        return
    os.environ[CHOICES[0]] = SPINS
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)
