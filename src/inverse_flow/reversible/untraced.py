"""What the compiler does not trace: apart, since to say so imports all of it."""

from __future__ import annotations

import torch

from inverse_flow.reversible.rebuild import run_rebuilding

run_untraced = torch.compiler.disable(
    run_rebuilding,
    reason="a chain that rebuilds keeps account of random numbers and buffers, which is not traced",
)
