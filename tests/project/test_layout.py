"""The rooms of the package and the arrows between them: nothing lower imports anything higher."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
PACKAGE = "inverse_flow"

# A room may import the rooms on its own line and above. After the models comes what stands on the core: the adapters to
# other libraries, and the workshop, which trains.
ROOMS = [
    ["_version", "_C", "_C_cuda"],
    ["ops"],
    ["functional", "reference"],
    ["conv"],
    ["stability"],
    ["reversible"],
    ["flows"],
    ["models"],
    ["adapters"],
    ["data"],
    ["training"],
    ["parts"],
    ["command", "__main__"],
]
# What a function imports when it is called, though it stands higher: `models.load` reads what a run has written.
LATE = {("inverse_flow.models", "inverse_flow.training.checkpoint")}
# A library that a function of the core imports when it is asked for what only that has: the filters of wavelets.
LATE_LIBRARIES = {("inverse_flow.flows.wavelet", "pywt")}
CORE = {room for line in ROOMS[:8] for room in line}
HEIGHT = {room: height for height, line in enumerate(ROOMS) for room in line}


@cache
def modules() -> dict[str, ast.Module]:
    """The name of every module and its syntax."""
    found = {}
    for path in sorted((SRC / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(nodes: list[ast.AST]) -> set[str]:
    """The modules of the package that these statements import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: a reader sees which room they come from"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules() else str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Statements that only a type checker reads."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_imports_a_higher_room(module: str) -> None:
    here = room(module)
    if not here:
        return  # the package itself gathers the public names
    assert here in HEIGHT, f"{module} is in no room: give it one in ROOMS"
    for name in imports(list(ast.walk(modules()[module]))):
        there = room(name)
        if not there or (module, name) in LATE:
            continue  # `import inverse_flow`: its version, and what every user imports
        assert HEIGHT[there] <= HEIGHT[here], f"{module} imports {name}, which is in a higher room"


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for module, tree in modules().items():
        unread = type_checking_only(tree)
        at_import = [node for node in _outside_functions(tree) if node not in unread]
        graph[module] = imports(at_import) - {module, PACKAGE}
        # A package's own __init__ runs before its modules.
        graph[module] -= {module.rpartition(".")[0]}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_core_needs_torch_and_numpy_alone() -> None:
    allowed = {PACKAGE, "torch", "numpy", "typing_extensions"}  # torch itself brings the last
    for module, tree in modules().items():
        if room(module) and room(module) not in CORE:
            continue
        at_import = set(_outside_functions(tree))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                top = name.split(".")[0]
                if node not in at_import and (module, top) in LATE_LIBRARIES:
                    continue
                assert top in allowed or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_an_import_brings_no_more_than_it_needs() -> None:
    """The compiler takes longer to import than all of this package."""
    program = """
import sys, inverse_flow
print(*sys.modules)
import inverse_flow.adapters, inverse_flow.models, inverse_flow.training
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    operator, everything = (line.split() for line in done.stdout.splitlines())
    assert {room(name) for name in operator if name.startswith(f"{PACKAGE}.")} <= {
        r for line in ROOMS[:5] for r in line
    }
    assert "torch._dynamo" not in everything
    libraries = {"nflows", "normflows", "FrEIA", "zuko", "pyro", "pywt", "click", "rich", "matplotlib", "PIL"}
    assert not libraries & {name.split(".")[0] for name in everything}


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    """What runs when a module is imported."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += [child, *_outside_functions(child)]
    return found


def test_a_higher_import_is_found() -> None:
    """The check fails where it should."""
    tree = ast.parse("from inverse_flow.training import Trainer")
    assert imports(list(ast.walk(tree))) == {"inverse_flow.training"}
    assert HEIGHT[room("inverse_flow.training")] > HEIGHT["ops"]


# What the tests of a room are called: tests/<room>, and beside them what belongs to no room of the package.
TEST_ROOMS = {
    "ops", "reversible", "flows", "models", "adapters", "data", "training", "parts", "command", "emulation", "project"
}  # fmt: skip


def test_tests_mirror_the_rooms() -> None:
    found = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert found == TEST_ROOMS
