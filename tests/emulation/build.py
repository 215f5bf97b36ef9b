"""Compiles csrc/cuda for the CPU, with the emulator in place of the GPU.

The kernels are compiled once, from a copy that holds the mistakes of planted.py, each behind a switch that is off.
Objects and programs are kept in build/emulation under the hash of what they are made from, for the next run.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .planted import PLANTED

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CACHE = HERE.parents[1] / "build" / "emulation"
KEPT_FOR_SECONDS = 7 * 24 * 3600

# Without the checks of what AddressSanitizer sees too, or never happens here: they take a third of the compile time.
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,vptr,pointer-overflow",
    "-fno-sanitize-recover=all",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


@functools.cache
def compiler() -> list[str] | None:
    """The command of the C++ compiler, if there is one: CXX, or g++."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    return command if shutil.which(command[0]) else None


@functools.cache
def compiler_version() -> str:
    return subprocess.run([*(compiler() or []), "--version"], capture_output=True, text=True, check=True).stdout


def key_of(*contents: str) -> str:
    return hashlib.sha256("\0".join(contents).encode()).hexdigest()[:16]


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone is at the path; without waiting, another may be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def folder_of(sources: dict[Path, str]) -> Path:
    """A folder of the cache that holds these files."""
    folder = CACHE / f"sources-{key_of(*map(str, sources), *sources.values())}"
    with locked(folder):
        for name, text in sources.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
    return folder


def contents(source: Path, folders: tuple[Path, ...]) -> list[str]:
    """The text of a source and of all that it includes from its own folder and ``folders``."""
    texts: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop().resolve()
        if path in texts:
            continue
        texts[path] = path.read_text()
        for name in re.findall(r'^#include "(.+)"', texts[path], re.MULTILINE):
            waiting += [folder / name for folder in (path.parent, *folders) if (folder / name).exists()][:1]
    return list(texts.values())


class Compiler:
    """Calls of the compiler with the same flags, whose results are kept."""

    def __init__(self, flags: list[str], includes: tuple[Path, ...]) -> None:
        self.flags, self.includes = flags, includes

    def objects(self, sources: list[Path]) -> list[Path]:
        """One object a source. Test processes that need the same share the work: each takes what no other is at."""
        paths = [f"-I{folder}" for folder in self.includes]
        missing = {
            self._target(f"{source.parent.name}-{source.stem}", *contents(source, self.includes)): source
            for source in sources
        }
        targets = list(missing)
        while missing:
            for target, source in tuple(missing.items()):
                with locked(target, wait=False) as is_mine:
                    if is_mine:
                        self._make(target, [*paths, "-c", "-x", "c++", str(source)])
                        del missing[target]
            if missing:
                time.sleep(0.1)
        return targets

    def link(self, name: str, objects: list[Path], *options: str) -> Path:
        arguments = [*map(str, objects), *options]
        target = self._target(name, *arguments)
        with locked(target):
            self._make(target, arguments)
        return target

    def _target(self, name: str, *made_from: str) -> Path:
        return CACHE / f"{name}-{key_of(compiler_version(), *self.flags, *made_from)}"

    def _make(self, target: Path, arguments: list[str]) -> None:
        """Runs the compiler, unless that was done; the target is there when it is whole."""
        if target.exists():
            target.touch()  # in use, and not to be removed
            return
        unfinished = target.with_name(f"{target.name}.part")
        command = [*(compiler() or []), *self.flags, *arguments, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.rename(target)


def remove_unused() -> None:
    """What no run has used for long."""
    for path in CACHE.iterdir():
        if time.time() - path.stat().st_mtime > KEPT_FOR_SECONDS:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def copy_with_mistakes() -> Path:
    """A copy of csrc in which every mistake of PLANTED stands behind its switch."""
    paths = (path for path in sorted(CSRC.rglob("*")) if path.suffix in {".h", ".cuh", ".cu"})
    sources = {path.relative_to(CSRC): path.read_text() for path in paths}
    for number, (name, mistake) in enumerate(PLANTED.items(), start=1):
        path = Path("cuda", mistake.file)
        assert sources[path].count(mistake.right) == 1, f"{path} no longer holds the line to spoil for: {name}"
        wrong = mistake.wrong.replace("PLANTED", f"PLANTED({number})")
        sources[path] = sources[path].replace(mistake.right, wrong)
    return folder_of(sources)


def kernel_sources(csrc: Path) -> list[Path]:
    """The files that hold kernels, those that take longest to compile first; not the one that asks the GPU."""
    sources = [path for path in (csrc / "cuda").rglob("*.cu") if "<cuda_runtime.h>" not in path.read_text()]
    return sorted(sources, key=lambda path: ("lanes" not in str(path.relative_to(csrc)), path))


@functools.cache
def driver() -> Path:
    """The program that runs one case."""
    csrc = copy_with_mistakes()
    cxx = Compiler(["-std=c++17", "-O1", "-g1", *SANITIZERS, *WARNINGS], (HERE, csrc / "cuda", csrc))
    objects = cxx.objects([*kernel_sources(csrc), HERE / "device.cpp", HERE / "driver.cpp"])
    program = cxx.link("driver", objects)
    remove_unused()
    return program
