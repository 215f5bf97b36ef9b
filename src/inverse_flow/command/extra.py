"""What the extra ``[train]`` brings, and what to say where it is missing."""

from __future__ import annotations

# Some other missing module is a fault of its own and is not explained away.
TRAIN_EXTRA = ("click", "rich", "matplotlib", "PIL", "tensorboard")


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install when a module of the extra is missing; None for any other module."""
    if (error.name or "").split(".")[0] not in TRAIN_EXTRA:
        return None
    return f"inverse-flow needs {error.name} for this: pip install 'inverse-flow[train]'"
