"""The benchmarks of the kernels: rivals that solve, fits, tables and verdicts, and a page that holds what the cost
model gives. Nothing is timed to judge it."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from inverse_flow import reference
from inverse_flow.ops import explain as plans

from ..conftest import HAS_CUDA

FOLDER = Path(__file__).parents[2] / "benchmarks"
PAGE = FOLDER.parent / "docs" / "cost-model.md"
NAMES = ("common", "layer", "cost_model", "scaling", "overhead", "gpu_table")
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules; they find each other as they do when they are run."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


# ---- The cost model ----


def test_the_page_holds_the_predicted_table(scripts: SimpleNamespace) -> None:
    text, (begin, end) = PAGE.read_text(), scripts.cost_model.MARKS
    assert text.split(begin)[1].split(end)[0].strip() == scripts.cost_model.table().strip()


def test_predictions_follow_the_constants(scripts: SimpleNamespace) -> None:
    model = scripts.cost_model
    case, constants = model.Case(100, 16, 32), model.Constants()
    time, plan = model.predict(case)
    assert time.total == pytest.approx(time.launches + time.fold + time.prepare + time.sweep + time.store)
    assert time.launches == constants.graph_node_us * plan.launches
    # A barrier a step bounds the sweep from below, and nothing is free.
    assert time.sweep > plan.steps * constants.barrier * 1e-3 / constants.clock_ghz
    assert min(time.fold, time.prepare, time.store) > 0
    half = model.predict(case, constants=replace(constants, clock_ghz=constants.clock_ghz / 2))[0]
    assert half.sweep == pytest.approx(2 * time.sweep)
    assert half.store == time.store
    backward, backward_plan = model.predict(case, backward=True)
    assert backward.gradient > 0
    assert backward.launches == pytest.approx(constants.graph_node_us * backward_plan.launches)
    assert model.predict(model.Case(100, 16, 64))[0].total > time.total


BLOCK, TENSOR = 0, 2  # SolveRegime of csrc/cuda/device_limits.h


@pytest.mark.parametrize(
    ("channels", "kernel"), [(1, 2), (4, 2), (5, 2), (8, 2), (1, 3), (3, 3), (4, 3), (5, 3), (8, 3), (1, 5), (2, 5)]
)
def test_rows_as_lanes_are_chosen_where_they_are_predicted_to_win(
    scripts: SimpleNamespace, channels: int, kernel: int
) -> None:
    model = scripts.cost_model
    small = [(batch, size) for batch in (1, 100, 3000) for size in (5, 6, 8, 10, 14, 32, 33, 34, 64, 65)]
    for batch, size in [*small, (1, 256), (8, 256), (1, 1024)]:
        case = model.Case(batch, channels, size, kernel)
        lanes, plan = model.predict(case)
        assert plan.regime.startswith("rows as lanes")
        sizes = (batch, 1, channels, size, size, kernel, kernel)
        block_plan = plans._explain_cuda(plan.problem, sizes, (0,), 1, "float32", plan.gpu, BLOCK)
        assert not block_plan.bands
        assert lanes.total < model.solve_time(block_plan, model.Constants()).total, case
        assert min(lanes.fold, lanes.prepare, lanes.sweep, lanes.store) > 0


@pytest.mark.parametrize("channels", range(9, 13))
def test_up_to_twelve_channels_rows_as_lanes_are_predicted_to_beat_tensor_cores(
    scripts: SimpleNamespace, channels: int
) -> None:
    model = scripts.cost_model
    for batch, size in itertools.product((1, 100), (12, 14, 16, 28, 32, 33, 64, 256)):
        lanes, plan = model.predict(model.Case(batch, channels, size, 3))
        assert plan.regime.startswith("rows as lanes")
        sizes = (batch, 1, channels, size, size, 3, 3)
        tensor_plan = plans._explain_cuda(plan.problem, sizes, (0,), 1, "float32", plan.gpu, TENSOR)
        assert tensor_plan.tensor is not None or size == 256
        assert lanes.total < model.solve_time(tensor_plan, model.Constants()).total, (batch, size)


def test_resident_blocks(scripts: SimpleNamespace) -> None:
    model = scripts.cost_model
    constants = model.Constants()
    assert model.resident_blocks(32, 0, 32, constants) == 32
    assert model.resident_blocks(1024, 0, 32, constants) == 2
    assert model.resident_blocks(64, 100 * 1024, 32, constants) == 2
    assert model.resident_blocks(640, 0, 96, constants) == 1


# ---- Scaling ----


@pytest.mark.parametrize("size", [(3, 4, 6, 3), (2, 3, 5, 2), (2, 2, 4, 1), (1, 1, 3, 5)])
def test_every_rival_solves(scripts: SimpleNamespace, size: tuple[int, int, int, int]) -> None:
    case = scripts.scaling.Case(*size)
    images, weight = scripts.scaling.make_operands(case, torch.device("cpu"))
    exact = reference.inverse_conv2d_dense(images, weight, corner="unit_triangular")
    solvers = scripts.scaling.solvers(case, weight, set())
    assert set(solvers) == {"ours", "row by row", "solve_triangular"}
    for name, solve in solvers.items():
        assert (solve(images).double() - exact).abs().max() < 1e-5, name
        assert scripts.scaling.check(name, solve, images, weight) < 1e-5
    with pytest.raises(ArithmeticError, match="wrong: residual"):
        scripts.scaling.check("wrong", lambda y: 1.001 * solvers["ours"](y), images, weight)
    assert set(scripts.scaling.solvers(case, weight, {"row by row", "solve_triangular"})) == {"ours"}


def test_fits_find_the_line(scripts: SimpleNamespace) -> None:
    offset, slope, error = scripts.scaling.fit([(x, 3 + 2 * x) for x in (1.0, 4.0, 9.0)])
    assert (offset, slope, error) == pytest.approx((3, 2, 0), abs=1e-9)

    def rows(time: object) -> list[dict[str, object]]:
        return [{"rival": "ours", "value": side, "ms": time(side)} for side in (8, 16, 32, 64)]  # type: ignore[operator]

    steps = scripts.scaling.image_fits(rows(lambda side: 0.01 * side))
    assert steps["log_slopes"] == pytest.approx([0.5] * 3)
    assert steps["root_n"]["relative_error"] < 1e-9 < steps["n"]["relative_error"]
    assert steps["work_takes_over_at_side"] is None
    work = scripts.scaling.image_fits(rows(lambda side: max(0.01 * side, 1e-3 * side**2)))
    assert work["log_slopes"][-1] == pytest.approx(1)
    assert work["work_takes_over_at_side"] == 8


def test_a_sweep_measures_and_draws(scripts: SimpleNamespace, tmp_path: Path) -> None:
    scaling = scripts.scaling
    rows = []
    for value in (8, 16, 32):
        case = replace(scaling.SWEEPS["image"].base, size=value)
        found = scaling.measure(case, torch.device("cpu"), 0.0, {"row by row"})
        rows += [{"sweep": "image", "value": value, **row} for row in found]
    assert {row["rival"] for row in rows} == {"ours", "conv2d", "solve_triangular"}
    assert all(row["ms"] > 0 and row["rounds"] >= scripts.common.MIN_ROUNDS for row in rows)
    fits = {"image": scaling.image_fits(rows)}
    scaling.plot(rows, fits, "a test", tmp_path / "scaling")
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


# ---- The overhead ----


def test_every_call_of_the_overhead_benchmark_runs(scripts: SimpleNamespace) -> None:
    works = scripts.overhead.candidates(torch.device("cpu"))
    for work in works.values():
        work()
        work()
    assert set(scripts.overhead.TARGETS) <= set(works)


# ---- The table of a GPU ----


def test_the_table_runs_without_a_gpu(scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    table = scripts.gpu_table
    case = scripts.cost_model.Case(2, 3, 5)
    operands = scripts.layer.make_operands(table.layer_case(case), torch.float32, torch.device("cpu"))
    arguments = argparse.Namespace(device=torch.device("cpu"), budget=0.0)
    rows = [table.measure(case, mode, operands, arguments) for mode in scripts.layer.MODES]
    table.set_tf32(False)
    for row in rows:
        assert set(row["comparisons"]) == {"eager, tf32 off", "eager, tf32 on"}
        assert len(row["microseconds"]) == 5
        assert row["predicted_us"] > 0
    assert rows[1]["predicted_us"] > rows[0]["predicted_us"]
    table.print_rows(rows)
    assert "2 × 3 × 5², k=3, forward+backward" in capsys.readouterr().out


def test_ratios_are_to_the_faster_layout(scripts: SimpleNamespace) -> None:
    samples = {
        f"{who}, {launch}": [us * 1e-6 * 4] * 3
        for launch, factor in (("graph", 1), ("eager", 2))
        for who, us in {
            "ours": 6.0 * factor,
            "conv2d NCHW, tf32 off": 4.0 * factor,
            "conv2d channels_last, tf32 off": 5.0 * factor,
            "conv2d NCHW, tf32 on": 3.0 * factor,
            "conv2d channels_last, tf32 on": 2.0 * factor,
        }.items()
    }
    row = scripts.gpu_table.summarise(samples, calls=4)
    assert set(row["comparisons"]) == {f"{a}, tf32 {b}" for a in ("graph", "eager") for b in ("off", "on")}
    off, on = (row["comparisons"][f"graph, tf32 {setting}"] for setting in ("off", "on"))
    assert (off["ours_us"], off["conv2d_us"], off["layout"]) == (pytest.approx(6), pytest.approx(4), "NCHW")
    assert (on["layout"], on["ratio"]) == ("channels_last", pytest.approx(3))
    assert row["comparisons"]["eager, tf32 off"]["ours_us"] == pytest.approx(12)


def test_verdicts(scripts: SimpleNamespace) -> None:
    def row(shape: str, mode: str, ratio: float, pattern: float | None) -> dict[str, object]:
        comparisons = {"graph, tf32 off": {"ratio": ratio}}
        return {"shape": shape, "mode": mode, "comparisons": comparisons, "pattern_us": pattern,
                "microseconds": {"ours, graph": 10.0}}  # fmt: skip

    judged_shape = "100 × 12 × 32², k=3"
    rows = [
        row("another", "forward", 0.5, 10.0),
        row(judged_shape, "forward", 1.6, 1500.0),
        row(judged_shape, "forward+backward", 0.95, 900.0),
    ]
    kept = {entry["what"]: entry["kept"] for entry in scripts.gpu_table.verdicts(rows)}
    assert kept == {
        "forward, graph, tf32 off: geometric mean": True,
        "forward, graph, tf32 off: worst": False,
        "forward+backward, graph, tf32 off: geometric mean": False,
        "published pattern, forward: its time over ours": True,
        "published pattern, forward+backward: its time over ours": False,
    }


# ---- The published pattern ----


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The pattern's threads, one after the other on the CPU."""
    if CXX is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("pattern")
    source = folder / "pattern.cpp"
    source.write_text(
        """
        #include "pattern.h"
        extern "C" int solve(const float* y, const float* w, float* x, int batch, int channels, int height, int width,
                             int kernel, int transposed) {
          const Pattern p{y, w, x, batch, channels, height, width, kernel, transposed != 0};
          int launches = 0;
          for_each_launch(p, [&](int diagonal, int channel, int pixels) {
            ++launches;
            // Last first: the threads of a launch must not need each other.
            for (int pixel = pixels; pixel-- > 0;)
              for (int image = batch; image-- > 0;) solve_value(p, diagonal, channel, pixel, image);
            return 0;
          });
          return launches;
        }"""
    )
    library = folder / "pattern.so"
    include = f"-I{FOLDER / 'published_pattern'}"
    done = subprocess.run(
        [CXX, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", include, str(source), "-o",
         str(library)], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 3), (3, 4, 6, 4, 2), (1, 1, 1, 1, 5)])
def test_the_published_pattern_solves(
    pattern: ctypes.CDLL, shape: tuple[int, int, int, int, int], transposed: bool
) -> None:
    batch, channels, height, width, kernel = shape
    weight = 0.2 * torch.randn(channels, channels, kernel, kernel)
    images, output = (
        torch.randn(batch, channels, height, width),
        torch.full((batch, channels, height, width), torch.nan),
    )
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (images, weight, output)]
    launches = pattern.solve(*pointers, *shape, int(transposed))
    assert launches == channels * (height + width - 1)
    matrix = reference.dense_matrix(weight.double(), height, width, corner="unit_triangular")
    matrix = matrix.mT if transposed else matrix
    exact = torch.linalg.solve(matrix, images.double().flatten(1).mT).mT.reshape(images.shape)
    assert (output.double() - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
def test_the_published_pattern_compiles(tmp_path: Path) -> None:
    source = FOLDER / "published_pattern" / "pattern.cu"
    command = [str(NVCC), "-c", str(source), "-o", str(tmp_path / "pattern.o"), "-Werror", "all-warnings"]
    done = subprocess.run([*command, "-gencode=arch=compute_90,code=sm_90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU and the CUDA module")
def test_the_published_pattern_on_a_gpu(scripts: SimpleNamespace) -> None:
    published: ModuleType = importlib.import_module("published_pattern")
    case = scripts.scaling.Case(3, 4, 6)
    images, weight = scripts.scaling.make_operands(case, torch.device("cuda"))
    assert scripts.scaling.check("published pattern", lambda y: published.solve(y, weight), images, weight) < 1e-5
