import os
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    """What the example prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def test_the_custom_flow_learns() -> None:
    printed = run("custom_flow.py")
    bits = numbers(r"([\d.]+) bits/dim", printed)
    assert len(bits) == 4
    assert bits[-1] < bits[0] - 1
    assert "samples: (16, 1, 28, 28)" in printed


def test_the_class_conditional_flow_draws_every_class(tmp_path: Path) -> None:
    printed = run("class_conditional.py", "--steps", 6, "--output", tmp_path / "classes.png")
    bits = numbers(r"([\d.]+) bits/dim", printed)
    assert len(bits) == 2
    assert bits[-1] < bits[0]
    assert 0 <= numbers(r"(\d+) % of 100 test images", printed)[0] <= 100
    assert imread(tmp_path / "classes.png").std() > 0


def test_deblurring_undoes_a_known_blur_and_learns_an_unknown_one(tmp_path: Path) -> None:
    printed = run("deblurring.py", "--steps", 200, "--output", tmp_path / "blur.png")
    (known, unknown) = numbers(r"falls from [\d.]+ to (\S+)", printed)
    assert known < 1e-5
    assert unknown < 1e-2
    assert numbers(r"falls from ([\d.]+) to", printed) == [0.849, 0.849]
    assert numbers(r"stored in 8 bits: the error is ([\d.]+)", printed)[0] < 0.1
    restored = re.findall(r"(\w+) blur with noise: ([\d.]+) dB become ([\d.]+) dB", printed)
    assert [name for name, *_ in restored] == ["Gaussian", "motion", "defocus"]
    assert all(float(after) > float(before) + 2 for _, before, after in restored)
    assert imread(tmp_path / "blur.png").std() > 0


def test_a_density_in_the_plane_is_learned_from_points(tmp_path: Path) -> None:
    printed = run("densities.py", "--names", "banana", "--steps", 40, "--output", tmp_path / "density.png")
    (nats,), (exact,) = numbers(r"banana: ([\d.]+) nats", printed), numbers(r"([\d.]+) by the density itself", printed)
    assert exact < nats < exact + 0.2
    assert imread(tmp_path / "density.png").std() > 0


def test_variational_inference_fits_a_formula(tmp_path: Path) -> None:
    printed = run("variational.py", "--steps", 60, "--output", tmp_path / "rosenbrock.png")
    divergences = numbers(r"divergence ([\d.]+) nats", printed)
    assert divergences[-1] < 1 < divergences[0]
    assert imread(tmp_path / "rosenbrock.png").std() > 0


def test_the_amortised_posterior_nears_the_exact_one(tmp_path: Path) -> None:
    printed = run("posterior.py", "--steps", 80, "--output", tmp_path / "posterior.png")
    assert numbers(r"divergence of the posterior from the exact one: ([\d.]+)", printed)[0] < 0.3
    assert numbers(r"divergence of the evidence p\(y\): (-?[\d.]+)", printed)[0] < 0.1
    assert len(numbers(r"the mean is off by ([\d.]+)", printed)) == 3
    assert imread(tmp_path / "posterior.png").std() > 0


def test_the_posterior_of_tomography_nears_the_exact_one(tmp_path: Path) -> None:
    printed = run("tomography.py", "--steps", 15, "--output", tmp_path / "tomography.png")
    nats = numbers(r"(-?[\d.]+) nats per image", printed)
    assert nats[-1] < nats[0] - 20
    # The flow, still far off, is no closer to the truth than the exact posterior.
    (divergence,) = numbers(r"divergence from the exact posterior: ([\d.]+)", printed)
    assert divergence > 0
    ((learned, exact),) = re.findall(r"mean: ([\d.]+) by the flow, ([\d.]+) exactly", printed)
    assert float(exact) < float(learned) < 1
    half, most = numbers(r"of the samples: (\d+) % of the true values", printed)
    assert 30 < half < most <= 100
    assert imread(tmp_path / "tomography.png").std() > 0


def test_holes_are_filled_by_what_is_around_them(tmp_path: Path) -> None:
    printed = run("inpainting.py", "--steps", 12, "--output", tmp_path / "inpainting.png")
    bits = numbers(r"step +\d+: ([\d.]+) bits/dim", printed)
    assert bits[-1] < bits[0]
    assert len(re.findall(r"root mean square error", printed)) == 2
    assert numbers(r"(\d+) % of the pixels", printed)[0] > 50
    assert imread(tmp_path / "inpainting.png").std() > 0
