"""What setup.py decides, the line it ends in when something is missing, and what the distributions contain."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import inverse_flow
from inverse_flow.ops import native

ROOT = Path(__file__).parents[2]

# What setup.py reads; every test sets its own.
VARIABLES = ("FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CC", "CXX")

# Answers each line of input, a case, with the status that setup.py ends in. Importing PyTorch takes seconds, so it is
# imported once, and every case runs in a fork. `setup` is replaced by a function that writes down what it was given.
SERVER = """
import json, os, runpy, sys, sysconfig, warnings
from pathlib import Path
import pybind11, setuptools, torch
from torch.utils import cpp_extension

def setup(*, ext_modules, cmdclass):
    command = cmdclass["build_ext"](setuptools.Distribution())
    print(json.dumps({
        "modules": {
            module.name: {
                "libraries": module.libraries,
                "link_args": module.extra_link_args,
                "macros": dict(module.define_macros),
                "cxx": module.extra_compile_args["cxx"],
                "sources": module.sources,
            }
            for module in ext_modules
        },
        "cuda_home": cpp_extension.CUDA_HOME,
        "environment": dict(os.environ),
        "ninja": command.use_ninja,
    }))

setuptools.setup = setup
for line in sys.stdin:
    case = json.loads(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; none of theirs is used
        child = os.fork()
    if child == 0:
        for stream, name in enumerate(("output", "messages"), start=1):
            os.dup2(os.open(case[name], os.O_WRONLY | os.O_CREAT), stream)
        os.environ.clear()
        os.environ.update(case["environment"])
        exec(case["prelude"])
        runpy.run_path("setup.py")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

HIDE_TOOLKIT = """
exists = Path.exists
Path.exists = lambda path: path.name != "nvcc" and exists(path)
"""
CUDA_TORCH = "torch.version.cuda = '13.0'"
CPU_TORCH = "torch.version.cuda = None"
# The environment's ninja, which setup.py looks for beside Python.
HIDE_SCRIPTS = """
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *args, **kwargs: "" if name == "scripts" else get_path(name, *args, **kwargs)
"""


@dataclass(frozen=True)
class Outcome:
    """How setup.py ended."""

    status: int
    output: str
    messages: str

    def line(self) -> str:
        """The one line in which a failure ends."""
        assert self.status == 1, self
        assert "Traceback" not in self.messages, self.messages
        [line] = [line for line in self.messages.splitlines() if line.startswith("inverse_flow: ")]
        assert self.messages.rstrip().endswith(line), self.messages
        return line

    def result(self) -> dict[str, Any]:
        assert self.status == 0, self.messages
        return json.loads(self.output)


RunSetup = Callable[..., Outcome]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process


@pytest.fixture
def run_setup(server: subprocess.Popen[str], tmp_path: Path) -> RunSetup:
    """``run_setup(prelude, path=PATH, VARIABLE=value, ...)`` executes the prelude and then setup.py."""
    assert server.stdin is not None
    assert server.stdout is not None
    calls = itertools.count()

    def run_setup(prelude: str = "", path: Path | None = None, **variables: str) -> Outcome:
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
        if path is not None:
            environment["PATH"] = str(path)
        call = next(calls)
        output, messages = tmp_path / f"output-{call}", tmp_path / f"messages-{call}"
        case = {
            "prelude": textwrap.dedent(prelude),
            "environment": environment,
            "output": str(output),
            "messages": str(messages),
        }
        server.stdin.write(json.dumps(case) + "\n")
        server.stdin.flush()
        return Outcome(int(server.stdout.readline()), output.read_text(), messages.read_text())

    return run_setup


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with a C++ compiler and nothing else."""
    script(tmp_path / "programs" / "c++", "exit 0")
    return tmp_path / "programs"


def toolkit(folder: Path, version: str = "13.0", archs: str = "75 80 86 87 89 90 100 120") -> Path:
    """A CUDA toolkit of which only the questions that setup.py asks are answered."""
    lines = "\n".join(f"echo compute_{arch}" for arch in archs.split())
    script(
        folder / "bin" / "nvcc",
        f'case "$1" in\n--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;\n'
        f"--list-gpu-arch) {lines} ;;\n"
        f'--dryrun) echo "#\\$ TOP={folder}/bin/.." >&2 ;;\nesac',
    )
    (folder / "lib64").mkdir()
    return folder


# ------------------------------------------------------------------------------------------ what can be missing


@pytest.mark.parametrize(
    ("prelude", "expected"),
    [
        ("sys.modules['torch'] = None", ("PyTorch cannot be imported", "pip install torch", "--no-build-isolation")),
        ("torch.__version__ = '2.5.1+cpu'", ("PyTorch 2.5.1+cpu is too old, 2.11", "--upgrade torch")),
        ("sys.modules['pybind11'] = None", ("pybind11 cannot be imported", "pip install")),
        ("setuptools.__version__ = '68.2.0'", ("setuptools 68.2.0 is too old", "pip install 'setuptools>=77'")),
        ("sys.platform = 'win32'", ("Windows is not supported", "WSL")),
    ],
)
def test_environment_lacks_something(run_setup: RunSetup, prelude: str, expected: tuple[str, ...]) -> None:
    line = run_setup(prelude).line()
    for part in expected:
        assert part in line


@pytest.mark.parametrize("torch_version", ["2.11.0", "2.11.0a0+git1234", "2.13.0+cpu", "3.0.1"])
def test_newer_torch_is_accepted(run_setup: RunSetup, torch_version: str) -> None:
    run_setup(f"torch.__version__ = {torch_version!r}").result()


def test_no_compiler(run_setup: RunSetup, tmp_path: Path) -> None:
    line = run_setup(path=tmp_path).line()
    assert "no C++ compiler" in line
    assert "apt-get install g++" in line


def test_compiler_that_does_not_exist(run_setup: RunSetup, programs: Path) -> None:
    line = run_setup(path=programs, CXX="ccache-of-nobody g++").line()
    assert "CXX=ccache-of-nobody g++, but there is no such program" in line


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_any_compiler_serves(run_setup: RunSetup, tmp_path: Path, name: str) -> None:
    script(tmp_path / name, "exit 0")
    assert run_setup(path=tmp_path).result()["environment"]["CXX"] == name


def test_no_ninja(run_setup: RunSetup, programs: Path) -> None:
    outcome = run_setup(HIDE_SCRIPTS, path=programs)
    assert outcome.result()["ninja"] is False
    assert "one after the other: pip install ninja" in outcome.messages


def test_ninja_of_an_environment_that_is_not_activated(run_setup: RunSetup, programs: Path) -> None:
    if not Path(sys.executable).with_name("ninja").exists():
        pytest.skip("ninja is not installed beside this Python")
    outcome = run_setup(path=programs)
    assert outcome.result()["ninja"] is True
    assert "pip install ninja" not in outcome.messages


# ------------------------------------------------------------------------------------------------------ CUDA


def test_force_cuda_without_a_toolkit(run_setup: RunSetup, programs: Path) -> None:
    line = run_setup(HIDE_TOOLKIT, path=programs, FORCE_CUDA="1").line()
    assert "FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME" in line


def test_force_cuda_has_two_values(run_setup: RunSetup) -> None:
    assert "FORCE_CUDA must be 0 or 1, got 'yes'" in run_setup(FORCE_CUDA="yes").line()


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_without_nvcc(run_setup: RunSetup, tmp_path: Path, variable: str) -> None:
    line = run_setup(CUDA_TORCH, **{variable: str(tmp_path)}).line()
    assert f"{variable}={tmp_path} has no bin/nvcc" in line
    # Of no concern when CUDA is not wanted.
    run_setup(CUDA_TORCH, FORCE_CUDA="0", **{variable: str(tmp_path)}).result()
    run_setup(CPU_TORCH, **{variable: str(tmp_path)}).result()


def test_cuda_of_another_major_version(run_setup: RunSetup, tmp_path: Path) -> None:
    old = str(toolkit(tmp_path / "cuda", version="12.8"))
    line = run_setup(CUDA_TORCH, CUDA_HOME=old).line()
    for part in (f"toolkit in {old} is 12.8", "built for CUDA 13.0", "CUDA_HOME to a 13.x toolkit", "FORCE_CUDA=0"):
        assert part in line
    minor = toolkit(tmp_path / "minor", version="13.2")
    assert len(run_setup(CUDA_TORCH, CUDA_HOME=str(minor)).result()["modules"]) == 2


def test_nvcc_that_does_not_work(run_setup: RunSetup, tmp_path: Path) -> None:
    script(tmp_path / "bin" / "nvcc", "exit 1")
    line = run_setup(CUDA_TORCH, CUDA_HOME=str(tmp_path)).line()
    assert f"is {tmp_path} a working CUDA toolkit?" in line


# The numbers are those of csrc/module.cpp, which tells the user.
@pytest.mark.parametrize(
    ("prelude", "force", "status"),
    [
        (CPU_TORCH, "", "1"),
        (HIDE_TOOLKIT + CUDA_TORCH, "", "2"),
        (CUDA_TORCH, "0", "3"),
    ],
)
def test_reason_for_no_cuda(run_setup: RunSetup, programs: Path, prelude: str, force: str, status: str) -> None:
    modules = run_setup(prelude, path=programs, FORCE_CUDA=force).result()["modules"]
    assert list(modules) == ["inverse_flow._C"]
    assert modules["inverse_flow._C"]["macros"]["INVERSE_FLOW_CUDA_STATUS"] == status


def test_cuda_torch_builds_both_modules(run_setup: RunSetup, tmp_path: Path) -> None:
    modules = run_setup(CUDA_TORCH, CUDA_HOME=str(toolkit(tmp_path / "cuda"))).result()["modules"]
    assert list(modules) == ["inverse_flow._C", "inverse_flow._C_cuda"]
    assert modules["inverse_flow._C"]["macros"]["INVERSE_FLOW_CUDA_STATUS"] == "0"
    assert "torch_cuda" not in modules["inverse_flow._C"]["libraries"]
    cuda = modules["inverse_flow._C_cuda"]
    assert {"torch_cuda", "c10_cuda", "cudart"} <= set(cuda["libraries"])
    assert "-DUSE_CUDA" in cuda["cxx"]
    assert set(cuda["sources"]) == {
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").rglob("*.c*") if path.suffix in (".cpp", ".cu")
    }


def test_force_cuda_beside_a_cpu_torch(run_setup: RunSetup, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", version="12.8")
    cuda = run_setup(CPU_TORCH, CUDA_HOME=str(home), FORCE_CUDA="1").result()["modules"]["inverse_flow._C_cuda"]
    assert {"torch_cuda", "c10_cuda"}.isdisjoint(cuda["libraries"])
    assert {"torch", "cudart"} <= set(cuda["libraries"])
    assert cuda["link_args"] == ["-Wl,--no-as-needed", "-ltorch"]


def test_nvcc_may_be_a_wrapper(run_setup: RunSetup, tmp_path: Path, programs: Path) -> None:
    home = toolkit(tmp_path / "hidden" / "cuda")
    script(programs / "nvcc", f'exec "{home}/bin/nvcc" "$@"')
    assert run_setup(CUDA_TORCH, path=programs).result()["cuda_home"] == str(home.resolve())


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("75 80 86 89 90 100 103 120 121", "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("50 80 86 89 90", "8.0;8.6;8.9;9.0+PTX"),
        ("90 100 120", "9.0;10.0;12.0+PTX"),
    ],
)
def test_default_architectures(run_setup: RunSetup, tmp_path: Path, archs: str, expected: str) -> None:
    result = run_setup(CUDA_TORCH, CUDA_HOME=str(toolkit(tmp_path / "cuda", archs=archs))).result()
    assert result["environment"]["TORCH_CUDA_ARCH_LIST"] == expected


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([(9, 0)], "9.0+PTX"),
        ([(9, 0), (8, 0), (9, 0)], "8.0;9.0+PTX"),
        # One that is too new for the toolkit compiles the PTX of what is older.
        ([(13, 0)], "8.0;8.6;8.9;9.0+PTX"),
    ],
)
def test_architectures_of_the_gpus_that_are_there(
    run_setup: RunSetup, tmp_path: Path, gpus: list[tuple[int, int]], expected: str
) -> None:
    prelude = f"""
{CUDA_TORCH}
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: {len(gpus)}
torch.cuda.get_device_capability = {gpus}.__getitem__
"""
    result = run_setup(prelude, CUDA_HOME=str(toolkit(tmp_path / "cuda", archs="80 86 89 90"))).result()
    assert result["environment"]["TORCH_CUDA_ARCH_LIST"] == expected


def test_architectures_of_the_user(run_setup: RunSetup, tmp_path: Path) -> None:
    home = str(toolkit(tmp_path / "cuda"))
    result = run_setup(CUDA_TORCH, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="9.0").result()
    assert result["environment"]["TORCH_CUDA_ARCH_LIST"] == "9.0"


# ---------------------------------------------------------------------------------------------------- jobs


def test_jobs_of_the_user(run_setup: RunSetup) -> None:
    assert run_setup(MAX_JOBS="5").result()["environment"]["MAX_JOBS"] == "5"


@pytest.mark.parametrize("jobs", ["0", "many", "-1", "1.5"])
def test_jobs_that_are_no_number(run_setup: RunSetup, jobs: str) -> None:
    assert f"MAX_JOBS must be a whole number of at least 1, got {jobs!r}" in run_setup(MAX_JOBS=jobs).line()


@pytest.mark.parametrize(
    ("cores", "gib", "container_gib", "jobs"),
    [(4, 64, None, "4"), (64, 3, None, "3"), (64, 64, 2, "2"), (64, 8, 16, "8"), (8, 0.5, None, "1")],
)
def test_jobs_fit_the_memory(run_setup: RunSetup, cores: int, gib: float, container_gib: int | None, jobs: str) -> None:
    limit = "max" if container_gib is None else str(container_gib * 2**30)
    prelude = f"""
        os.sched_getaffinity = lambda process: range({cores})
        os.sysconf = lambda name: 4096 if name == "SC_PAGE_SIZE" else int({gib} * 2**30 / 4096)
        exists, read_text = Path.exists, Path.read_text
        Path.exists = lambda path: path.name == "memory.max" or exists(path)
        Path.read_text = lambda path, **kwargs: {limit!r} if path.name == "memory.max" else read_text(path, **kwargs)
    """
    assert run_setup(prelude).result()["environment"]["MAX_JOBS"] == jobs


# ------------------------------------------------------------------------------------------- distributions

# What git does not hold either.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "demo", "site", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis"
)
PACKED_FOLDERS = ("csrc", "src", "tests", "benchmarks", "docs", "examples", "tools", ".ci")
PACKED_FILES = (
    "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "mkdocs.yml",
    "pyproject.toml", "setup.py",
)  # fmt: skip


def run(*command: object, folder: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_distribution(folder: Path) -> Path:
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    backend = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", backend, folder, folder=tree)
    [archive] = folder.glob("*.tar.gz")
    return archive


def test_source_distribution_is_the_whole_tree(tmp_path: Path) -> None:
    with tarfile.open(source_distribution(tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = set(PACKED_FILES)
    for folder in PACKED_FOLDERS:
        for parent, folders, files in os.walk(ROOT / folder):
            ignored = LEFT_OUT(parent, [*folders, *files])
            folders[:] = [name for name in folders if name not in ignored]
            expected |= {
                str((Path(parent) / name).relative_to(ROOT))
                for name in files
                if name not in ignored and not name.endswith(".pyc")
            }
    assert expected <= names, sorted(expected - names)
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def check_wheel_content(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("dist-info/METADATA")]
        [entry_points] = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    package = ROOT / "src" / "inverse_flow"
    expected = {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
    expected |= {f"inverse_flow/{name}" for name in ("py.typed", "data/embedded/LICENSE.txt")}
    expected |= {str(path.relative_to(package.parent)) for path in package.rglob("*.npz")}
    assert any(name.endswith(".npz") for name in expected)
    assert expected <= names, sorted(expected - names)
    assert [name for name in names if name.startswith("inverse_flow/_C.") and name.endswith(".so")]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh"))]
    assert not [name for name in names if not name.startswith(("inverse_flow/", "inverse_flow-"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert [name for name in names if name.endswith("licenses/src/inverse_flow/data/embedded/LICENSE.txt")]
    assert "inverse-flow = inverse_flow.command.main:main" in entry_points
    for line in ("License-Expression: MIT", "Requires-Python: >=3.10", "Requires-Dist: torch>=2.11"):
        assert line in metadata.splitlines()


WHEEL_WORKS = textwrap.dedent("""
    import torch, inverse_flow, inverse_flow.data
    from inverse_flow.reference import inverse_conv2d_dense
    torch.manual_seed(0)
    print(inverse_flow.__file__)
    print(inverse_flow.build_info()["cuda_absent"])
    images, layer = torch.randn(9, 3, 5, 6, dtype=torch.float64), inverse_flow.InverseConv2d(3, dtype=torch.float64)
    expected = inverse_conv2d_dense(images, layer.weight, layer.bias, corner="unit_triangular")
    torch.testing.assert_close(layer(images)[0], expected)
    assert len(inverse_flow.data.load("embedded").train.images)
""")


def check_wheel_works(wheel: Path, folder: Path) -> None:
    target = folder / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, folder=folder)
    output = run(sys.executable, "-W", "error", "-c", WHEEL_WORKS, folder=folder, PYTHONPATH=str(target)).splitlines()
    assert Path(output[0]).is_relative_to(target)
    assert "_C_cuda is missing (the build was told FORCE_CUDA=0)" in output[1]


def built_wheel(folder: Path) -> Path:
    """From the source distribution; without optimisation, which would take most of the time."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    with tarfile.open(source_distribution(folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [tree] = (folder / "unpacked").iterdir()
    unoptimised = script(folder / "c++", f'exec {compiler} "$@" -O0')
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, tree,
        folder=folder, CXX=str(unoptimised), FORCE_CUDA="0",
    )  # fmt: skip
    [wheel] = folder.glob("*.whl")
    return wheel


def portable(wheel: Path, folder: Path) -> Path:
    """What `make wheel` makes of it; the wheel itself where its tools are missing."""
    if None in (importlib.util.find_spec("auditwheel"), shutil.which("patchelf"), shutil.which("make")):
        return wheel
    plan = subprocess.run(["make", "--dry-run", "wheel"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [command] = [line for line in plan.splitlines() if "auditwheel repair" in line]
    options = shlex.split(command.split("auditwheel repair")[1].split("--wheel-dir")[0])
    run(sys.executable, "-m", "auditwheel", "repair", *options, "--wheel-dir", folder / "dist", wheel, folder=folder)
    [made] = (folder / "dist").glob("*.whl")
    assert "manylinux" in made.name
    check_wheel_content(made)
    with zipfile.ZipFile(made) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert all(name.startswith("inverse_flow/_C") for name in libraries), libraries
    return made


@pytest.mark.thorough
def test_wheel_from_the_source_distribution(tmp_path: Path) -> None:
    """One test, since the build takes long."""
    wheel = built_wheel(tmp_path)
    check_wheel_content(wheel)
    check_wheel_works(portable(wheel, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.13.0", "2.14.1"])
def test_wheel_in_a_clean_environment(tmp_path: Path, version: str) -> None:
    """In one that has nothing but what pip brings, and no compiler; it downloads a PyTorch."""
    wheel = portable(built_wheel(tmp_path), tmp_path)
    run(sys.executable, "-m", "venv", tmp_path / "clean", folder=tmp_path)
    folder = tmp_path / "clean" / "bin"
    run(folder / "pip", "install", f"torch=={version}", wheel, folder=tmp_path, PATH=str(folder), PYTHONPATH="")
    run(folder / "python", "-c", WHEEL_WORKS, folder=tmp_path, PATH=str(folder), PYTHONPATH="")


# -------------------------------------------------------------------------------------- what is installed


def test_version_is_told_once() -> None:
    version = inverse_flow.__version__
    assert importlib.metadata.version("inverse-flow") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def cuda_module() -> Path:
    spec = importlib.util.find_spec("inverse_flow._C_cuda")
    if spec is None or spec.origin is None:
        # Whoever forces the CUDA module must get it.
        assert os.environ.get("FORCE_CUDA") != "1", "FORCE_CUDA=1, but inverse_flow._C_cuda is not installed"
        pytest.skip(f"inverse_flow._C_cuda is not built: {inverse_flow.build_info()['cuda_absent']}")
    return Path(spec.origin)


def test_cuda_module_does_not_disturb_a_cpu_torch() -> None:
    cuda_module()
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA")
    info = inverse_flow.build_info()
    assert "inverse_flow._C_cuda is built, but this PyTorch has no CUDA: install one" in info["cuda_absent"]
    assert info["cuda_archs"] == []


@pytest.mark.parametrize(("cuda", "step"), [(None, "install a PyTorch with CUDA, then build"), ("13.0", "build")])
def test_what_is_said_of_a_missing_cuda_module(monkeypatch: pytest.MonkeyPatch, cuda: str | None, step: str) -> None:
    """What the build found is told as such: PyTorch may have been replaced since."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(native, "_cuda_left_out", "the PyTorch of the build had no CUDA")
    text = native.cuda_absent(is_built=False)
    assert (
        f"_C_cuda is missing (the PyTorch of the build had no CUDA): {step} inverse_flow again with CUDA_HOME" in text
    )
    assert ("a CUDA 13 toolkit" in text) == (cuda is not None)
    assert "pip install --no-build-isolation" in text
    monkeypatch.setattr(native, "_cuda_left_out", "")
    assert "_C_cuda is missing (the build made it)" in native.cuda_absent(is_built=False)
    assert (native.cuda_absent(is_built=True) == "") == (cuda is not None)


def test_cuda_module_is_linked_whole() -> None:
    """All that a CPU build of PyTorch leaves unresolved is PyTorch's own CUDA side."""
    module = cuda_module()
    toolkits = [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
    libraries = [str(Path(torch.__file__).parent / "lib"), *(f"{home}/lib64" for home in toolkits)]
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(libraries)}
    done = subprocess.run(["ldd", "-r", module], env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    missing = {line.split()[2] for line in text.splitlines() if line.startswith("undefined symbol:")}
    unknown = {name for name in missing if not name.startswith(("Py", "_Py")) and "cuda" not in name}
    assert not unknown, unknown
    assert not {name for name in missing if "inverse_flow" in name}, missing
    assert "libcudart.so" in text
    assert "libtorch.so" in text


def test_cuda_module_has_the_architectures_asked_for() -> None:
    content = cuda_module().read_bytes()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        pytest.skip("TORCH_CUDA_ARCH_LIST is not set")
    # nvcc's list of them, as device.cu writes it down: "800,900".
    assert ",".join(arch.removesuffix("+PTX").replace(".", "") + "0" for arch in asked.split(";")).encode() in content


# ------------------------------------------------------------------------------------------------- scripts


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_uses_the_python_that_it_is_given() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    tell = ["make", "--dry-run", "--always-make", "gpu-check"]

    def plan(*variables: str) -> str:
        return subprocess.run([*tell, *variables], cwd=ROOT, env=environment, capture_output=True, text=True).stdout

    own = plan("VENV=", "PYTHON=some-python")
    assert "some-python benchmarks/gpu_check.py" in own
    assert "-m venv" not in own
    fresh = plan("VENV=elsewhere", "PYTHON=some-python")
    assert "some-python -m venv elsewhere" in fresh
    assert "elsewhere/bin/python benchmarks/gpu_check.py" in fresh
    assert fresh.index("install --no-build-isolation .") < fresh.index("gpu_check")


def test_ci_runs_what_the_readme_says() -> None:
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    for command in ("make lint", "make test"):
        assert f"\n{command}\n" in ci.read_text()
    assert "\nmake demo\nmake test\n" in (ROOT / "README.md").read_text()
