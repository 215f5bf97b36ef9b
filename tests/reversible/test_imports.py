"""What the room imports."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_flows_does_not_import_the_compiler() -> None:
    """It takes longer to import than all of this package."""
    program = "import sys, inverse_flow.training, inverse_flow.models; print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
