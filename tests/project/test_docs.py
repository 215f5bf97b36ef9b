"""The documentation tells the truth: its code runs, its numbers come out, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inverse_flow import InverseConv2d, reference
from inverse_flow.data import load
from inverse_flow.functional import causal_conv2d, inverse_conv2d

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MATHEMATICS = (DOCS / "mathematics.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run_code(page: Path, changes: Mapping[str, str] | None = None) -> dict[str, object]:
    """Runs the Python of a page, block after block, and returns the names it leaves behind."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    code = blocks(page, "python")
    assert code
    for number, block in enumerate(code):
        changed = block
        for before, after in (changes or {}).items():
            changed = changed.replace(before, after)
        exec(compile(changed, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", ["index", "layer", "solve", "stability", "flows", "models", "memory", "training", "parts"]
)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader pastes, from the top of the page on; models and runs have fewer steps."""
    monkeypatch.chdir(tmp_path)
    run_code(DOCS / f"{page}.md", {"minutes=2": "steps=2", "steps=900": "steps=2", "steps=4": "steps=1"})


INTEROP = re.findall(
    r"^## (.+?)\n.*?^```python\n(.*?)^```$", (DOCS / "interop.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("block", [block for _, block in INTEROP], ids=[title for title, _ in INTEROP])
def test_code_of_other_libraries_runs(block: str) -> None:
    for library in re.findall(r"^(?:from|import) (nflows|normflows|FrEIA|zuko|pyro)\b", block, re.MULTILINE):
        pytest.importorskip(library, reason=f"{library} is not installed (extra [peers])")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(block, "interop.md", "exec"), names)
    assert torch.as_tensor(names["loss"]).isfinite()


def test_code_of_the_readme_runs() -> None:
    names = run_code(ROOT / "README.md")
    x, x_again, loss, samples = (names[name] for name in ("x", "x_again", "loss", "samples"))
    assert isinstance(x, Tensor)
    assert isinstance(x_again, Tensor)
    assert isinstance(loss, Tensor)
    assert isinstance(samples, Tensor)
    assert (x - x_again).abs().max() < 1e-4
    assert loss.isfinite()
    assert samples.shape == (4, 1, 28, 28)


def test_the_readme_says_truly_what_the_solve_is_equivalent_to() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "`torch.linalg.solve(A, (y - bias).flatten(1).mT)`" in readme
    y, weight, bias = torch.randn(2, 3, 5, 4), 0.1 * torch.randn(3, 3, 3, 2), torch.randn(3)
    weight[:, :, -1, -1] += torch.eye(3)
    dense = reference.dense_matrix(weight, 5, 4)
    x = torch.linalg.solve(dense, (y - bias.view(-1, 1, 1)).flatten(1).mT).mT.view_as(y)
    torch.testing.assert_close(inverse_conv2d(y, weight, bias), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.conv2d(F.pad(x, (1, 0, 2, 0)), weight, bias), y, rtol=1e-4, atol=1e-5)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a data set in MNIST's files, with fewer images and steps."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    data = load("embedded")
    for part, images in (("train", data.train), ("t10k", data.test)):
        for kind, values in (("images-idx3", images.images[:, 0]), ("labels-idx1", images.labels)):
            array = values.numpy().astype(np.uint8)
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    monkeypatch.chdir(tmp_path)
    names = run_code(DOCS / "tutorial.md", {"minutes=10": "steps=3", "validation=5000": "validation=50"})
    samples, again = names["samples"], names["again"]
    assert isinstance(samples, Tensor)
    assert isinstance(again, Tensor)
    assert samples.shape == (16, 1, 28, 28)
    torch.testing.assert_close(again, data.test.images[:2] / 255, rtol=0, atol=1e-3)


def test_the_tutorial_and_the_help_agree() -> None:
    """Every option that a page shows is one of the command's."""
    known = subprocess.run(
        [sys.executable, "-m", "inverse_flow", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if "inverse-flow train" in line or "inverse_flow train" in line:
                    for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line.split("train", 1)[1]):
                        assert option in known or option.replace("--no-", "--") in known, f"{page.name}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


def test_site_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (extra [dev])")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "InverseConv2d" in api
    # Sphinx markup that the site does not know would be shown as it is.
    for markup in (":math:", ".. math::", ":func:", ":class:"):
        assert markup not in api


# ------------------------------------------------------------------------------------- the worked example


def matrix(name: str) -> Tensor:
    """The matrix that mathematics.md draws behind ``name =``."""
    number = r"-?\d+"
    drawn = MATHEMATICS.replace("−", "-")
    rows = re.search(rf"^ +(?:.* = )?{re.escape(name)} = (⎡.*?⎦)", drawn, re.MULTILINE | re.DOTALL)
    assert rows is not None, name
    lines = [re.findall(number, inner) for inner in re.findall(r"[⎡⎢⎣]([^⎤⎥⎦]*)[⎤⎥⎦]", rows[1])]
    return torch.tensor([[float(value) for value in line] for line in lines], dtype=torch.float64)[None, None]


def drawn_gradient(name: str) -> Tensor:
    return matrix(f"∂L/∂{name}")


def test_worked_example_forward() -> None:
    w, y, x = matrix("w"), matrix("y"), matrix("x")
    assert w.shape == (1, 1, 2, 2)
    assert x.shape == y.shape == (1, 1, 3, 3)
    assert torch.equal(inverse_conv2d(y, w), x)
    assert torch.equal(causal_conv2d(x, w), y)
    jacobian = torch.autograd.functional.jacobian(lambda y: inverse_conv2d(y, w).flatten(), y).reshape(9, 9)
    log_det = torch.linalg.slogdet(jacobian).logabsdet
    assert f"log|det ∂x/∂y| = −{-log_det:.3f}" in MATHEMATICS
    assert f"log|det A| = 3 · 3 · log 2 = {-log_det:.3f}" in MATHEMATICS


def test_worked_example_backward() -> None:
    w, y, g = matrix("w").requires_grad_(), matrix("y").requires_grad_(), matrix("g = ∂L/∂x")
    grad_y, grad_w = torch.autograd.grad(inverse_conv2d(y, w), (y, w), g)
    assert torch.equal(grad_y, matrix("u"))
    assert torch.equal(grad_w, drawn_gradient("w"))
    # u solves Aᵀ u = g.
    x = matrix("x").requires_grad_()
    assert torch.equal(torch.autograd.grad(causal_conv2d(x, w), x, matrix("u"))[0], g)


def test_worked_example_steps() -> None:
    """Every line of the two tables of steps, and every product of the gradient's, adds up."""
    text = MATHEMATICS.replace("−", "-")
    steps = re.findall(r"\| ([xu])([₀₁₂])([₀₁₂]) \| = ([^|]+) \| = (-?\d+) \|", text)
    assert len(steps) == 18
    for name, row, column, formula, value in steps:
        assert eval(formula) == int(value), (name, row, column, formula)
        assert matrix(name)[0, 0, "₀₁₂".index(row), "₀₁₂".index(column)] == int(value)
    taps = re.findall(r"\| \((\d),(\d)\)[^|]*\| ([-\d·+() ]+) \| (-?\d+) \| (-?\d+) \|", text)
    assert len(taps) == 4
    for p, q, products, total, gradient in taps:
        assert eval(products.replace("·", "*")) == int(total) == -int(gradient)
        assert drawn_gradient("w")[0, 0, 1 - int(p), 1 - int(q)] == int(gradient)
        u, x = matrix("u")[0, 0], matrix("x")[0, 0]
        pairs = [(int(u[i, j]), int(x[i - int(p), j - int(q)])) for i in range(int(p), 3) for j in range(int(q), 3)]
        assert [tuple(map(int, pair)) for pair in re.findall(r"\(?(-?\d+)\)?·\(?(-?\d+)\)?", products)] == pairs


def test_worked_example_of_the_wrong_gradient() -> None:
    wrong = inverse_conv2d(matrix("g = ∂L/∂x"), matrix("w"))
    first_row = ", ".join(f"{value:g}".replace("-", "−") for value in wrong[0, 0, 0].tolist())
    assert f"begins with {first_row} in its first row" in MATHEMATICS
    assert not torch.equal(wrong, matrix("u"))


def test_theorem_2() -> None:
    """∂x_q/∂W_a = −x_{q−a} − Σ W_δ ∂x_{q−δ}/∂W_a for M = 1, against autograd."""
    weight, y = matrix("w") / 2, matrix("y")
    weight[0, 0, 1, 1] = 1
    x = inverse_conv2d(y, weight)[0, 0]
    jacobian = torch.autograd.functional.jacobian(lambda w: inverse_conv2d(y, w)[0, 0], weight)[:, :, 0, 0]
    offsets = [(p, q) for p in (0, 1) for q in (0, 1)]
    for a in offsets[1:]:
        slope = torch.zeros(3, 3, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                if i >= a[0] and j >= a[1]:
                    slope[i, j] -= x[i - a[0], j - a[1]]
                for p, q in offsets[1:]:
                    if i >= p and j >= q:
                        slope[i, j] -= weight[0, 0, 1 - p, 1 - q] * slope[i - p, j - q]
        torch.testing.assert_close(slope, jacobian[:, :, 1 - a[0], 1 - a[1]])


@pytest.mark.parametrize("corner", ["unit_triangular", "identity", "plu"])
def test_growth_of_a_deep_stack(corner: str) -> None:
    found = re.search(rf"\| `{corner}` \| ([\d.]+) to ([\d.]+) \| at most ([\d.e-]+) \|", MATHEMATICS)
    assert found is not None
    least, most, error = map(float, found.groups())
    orders = ("top_left", "bottom_right", "top_right", "bottom_left")
    torch.manual_seed(0)
    x = z = torch.randn(8, 3, 64, 64)
    layers = [InverseConv2d(3, 3, order=orders[index % 4], corner=corner) for index in range(32)]
    with torch.no_grad():
        for layer in layers:
            z, _ = layer(z)
        back = z
        for layer in reversed(layers):
            back, _ = layer.inverse(back)
    # The table is rounded to two digits, and the rounding error depends on the instruction set.
    assert least - 0.005 <= z.norm() / x.norm() <= most + 0.005
    assert (back - x).abs().max() <= 2 * error


# --------------------------------------------------------------------------------------------- completeness


def test_environment_variables_are_documented() -> None:
    read = set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', (ROOT / "setup.py").read_text()))
    read |= set(re.findall(r'for variable in \("([A-Z_]+)", "([A-Z_]+)"\)', (ROOT / "setup.py").read_text())[0])
    for source in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "src").rglob("*.py")]:
        read |= set(re.findall(r'(?:getenv\(|environ(?:\.get\(|\[))"([A-Z_]+)"', source.read_text()))
    assert {"FORCE_CUDA", "CUDA_HOME", "MAX_JOBS", "CXX", "INVERSE_FLOW_CPU_ISA"} <= read
    documented = set(re.findall(r"`([A-Z_]+)`", (DOCS / "installation.md").read_text()))
    assert read - {"PATH"} <= documented, read - documented


def test_files_named_in_the_docs_exist() -> None:
    text = (DOCS / "call-chain.md").read_text()
    for name in re.findall(r"`(\w+\.py)[`,]", text):
        assert list((ROOT / "src").rglob(name)), name
    for name in re.findall(r"`(?:csrc/)?((?:cpu|cuda)/\w+\.\w+)[`,]", text):
        assert (ROOT / "csrc" / name).exists(), name
    for name in re.findall(r"`(\w+\.(?:cpp|h))[`,]", (DOCS / "kernels-cpu.md").read_text()):
        assert (ROOT / "csrc" / "cpu" / name).exists(), name


@pytest.mark.parametrize(
    ("page", "source"), [("kernels-cpu.md", "csrc/cpu"), ("call-chain.md", "csrc/cpu"), ("call-chain.md", "src")]
)
def test_names_in_the_docs_exist(page: str, source: str) -> None:
    code = "\n".join(path.read_text() for path in (ROOT / source).rglob("*") if path.suffix in (".h", ".cpp", ".py"))
    everything = code + "\n".join(
        path.read_text() for path in [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "src").rglob("*.py")]
    )
    for name in re.findall(r"`([a-z]\w+)`", (DOCS / page).read_text()):
        assert re.search(rf"\b{name}\b", everything), name
