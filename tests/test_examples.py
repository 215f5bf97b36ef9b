import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_custom_flow_learns() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "custom_flow.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    bits = [float(value) for value in re.findall(r"([\d.]+) bits/dim", result.stdout)]
    assert len(bits) == 4
    assert bits[-1] < bits[0] - 1
    assert "samples: (16, 1, 28, 28)" in result.stdout
