"""Counts the machine code of a CUDA kernel: instructions and waits a step or a term, registers, shared memory.

    python tools/sass_counts.py                        every kernel below, as a Markdown table
    python tools/sass_counts.py lanes-3x3x3 fold       some of them
    python tools/sass_counts.py --sass FILE            a disassembly that is there already (nvdisasm -c -gi)

Needs nvcc and nvdisasm (of the CUDA toolkit, or beside a Triton: NVDISASM names it), no GPU. One instantiation is
compiled at a time, which takes seconds. The compiler's line numbers say which source a machine instruction comes from:
what is called from common/fold.cuh is the fold, and a loop is found by a line of it (LOOPS).

A loop is counted along its shortest and its longest way through once, without the loops inside of it going round;
divided by the steps that the compiler has unrolled. Conversions, divisions and waits are those of the longest. The
waits come from a table of latencies, which is assumed (docs/notes/predictions.md has its sources):

  chain   cycles from one step to the next if only results are waited for: dependent instructions, one after the other
  alone   the same for one warp that has a scheduler for itself: it also issues one instruction a cycle, in order

Shared memory is not counted, since no kernel has any of a fixed size: `inverse_flow.explain` tells of a plan.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"

# Cycles until a result can be used, by the beginning of an opcode; the first that fits. Assumed.
LATENCIES = {
    "HMMA": 25,
    "LDS": 29,
    "SHFL": 23,
    "LDG": 263,
    "LDC": 29,
    "LD": 33,  # through a generic pointer, which is to shared memory in these kernels
    "ATOM": 263,
    "WARPSYNC": 14,
    "BAR": 32,
    "MUFU": 18,
    "I2F": 14,
    "F2I": 14,
    "F2F": 14,
    "D": 8,
}
ARITHMETIC = 4

WITHOUT_RESULT = ("ST", "BRA", "BSYNC", "BSSY", "BAR", "WARPSYNC", "EXIT", "NOP", "RED", "CALL", "RET", "MEMBAR")
TWO_PREDICATES = ("ISETP", "FSETP", "DSETP", "PLOP3", "UISETP", "UPLOP3", "R2P")


@dataclass(frozen=True)
class Loop:
    """The innermost loop that a line of csrc/cuda is in; `unit` opcodes are a step of it."""

    name: str
    file: str
    line: str
    unit: str
    units: int = 1  # of them a step
    innermost: bool = True


STEP = Loop("step", "lanes/kernel.cuh", "lane.step();", "STS")
TERM = Loop(
    "term of the fold", "common/fold.cuh", "sums[u] += factor * static_cast<double>(to_state(place[from[u]]));", "DFMA"
)
K_STEP = Loop("k-step", "tensor/kernel.cuh", "multiply_tf32(product, weights.big, x[i].big);", "")
DIAGONAL = Loop(
    "diagonal", "tensor/kernel.cuh", "finish(pixels, diagonal, finishers, shared_sums, store);", "", 1, False
)
TAPS = Loop("step of taps", "gradient/tensor.cuh", "multiply_split(sum[v], a, ", "")


@dataclass(frozen=True)
class Kernel:
    header: str
    symbol: str
    loops: tuple[Loop, ...]


KERNELS = {
    **{
        f"lanes-{channels}x{taps}x{taps}": Kernel(
            "lanes/kernel.cuh", f"lanes_kernel<float, {channels}, {taps}>", (TERM, STEP)
        )
        for channels, taps in ((1, 3), (2, 3), (3, 3), (4, 3), (8, 3), (12, 3), (2, 5))
    },
    "tensor": Kernel("tensor/kernel.cuh", "solve_tensor_kernel<float, false>", (TERM, K_STEP, DIAGONAL)),
    "tensor-tf32": Kernel("tensor/kernel.cuh", "solve_tensor_kernel<float, true>", (TERM, K_STEP, DIAGONAL)),
    "fold": Kernel("tensor/launch.cuh", "fold_taps_kernel<FoldArguments<float, FragmentTaps>>", (TERM,)),
    "gradient-tensor": Kernel("gradient/tensor.cuh", "weight_gradient_tensor_kernel<float, false>", (TAPS,)),
    "gradient-tensor-tf32": Kernel("gradient/tensor.cuh", "weight_gradient_tensor_kernel<float, true>", (TAPS,)),
    "block": Kernel("block/kernel.cuh", "solve_kernel<float, 4, true>", (TERM,)),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # a predicate, or nothing
    opcode: str
    operands: tuple[str, ...]
    target: str  # the label of a branch
    frames: frozenset[tuple[str, int]] = field(default_factory=frozenset)  # file and line, and those that call it

    def starts(self, *beginnings: str) -> bool:
        return self.opcode.startswith(beginnings)

    @property
    def latency(self) -> int:
        return next((cycles for opcode, cycles in LATENCIES.items() if self.starts(opcode)), ARITHMETIC)

    @property
    def is_conversion(self) -> bool:
        return self.starts("I2F", "F2I", "F2F")

    @property
    def is_division(self) -> bool:
        """The reciprocal that each division begins with, or a call of one."""
        return self.starts("MUFU.RCP") or (self.starts("CALL") and "div" in self.target)

    def registers(self) -> tuple[set[str], set[str]]:
        """What it writes and what it reads; of wide operands every register."""
        results = self._results()
        written: set[str] = set()
        read = {self.guard} if self.guard else set()
        for place, operand in enumerate(self.operands):
            width = self._width(place, place < results)
            for kind, number, pair in re.findall(r"\b(UR|UP|R|P)(\d+)(\.64)?", operand):
                names = {f"{kind}{int(number) + i}" for i in range(2 if pair else width if kind in ("R", "UR") else 1)}
                (written if place < results else read).update(names)
        if self.guard:
            read |= written  # where the guard is false, what was there stays
        return written, read

    def _results(self) -> int:
        if self.starts(*WITHOUT_RESULT) or not self.operands:
            return 0
        is_predicate = [re.fullmatch(r"!?U?P[\dT]", operand) is not None for operand in self.operands]
        if self.starts(*TWO_PREDICATES):
            return 2
        if is_predicate[0]:
            return 2 if len(self.operands) > 1 and not is_predicate[1] else 1
        carries = self.starts("IADD3", "UIADD3", "LEA", "ULEA")
        count = 1
        while carries and count < len(self.operands) and is_predicate[count]:
            count += 1
        return count

    def _width(self, place: int, is_result: bool) -> int:
        parts = self.opcode.split(".")
        if self.starts("HMMA"):
            first = "1688" in parts
            return (4, 4 if first else 2, 2 if first else 1, 4)[place] if place < 4 else 1
        if self.starts("LD", "ST", "ULDC", "CS2R"):
            is_data = is_result or (self.starts("ST") and place == 1)
            return (4 if "128" in parts else 2 if "64" in parts or self.starts("CS2R") else 1) if is_data else 1
        if self.starts("IMAD.WIDE", "UIMAD.WIDE"):
            return 2 if is_result or place == 3 else 1
        if self.starts("F2F"):
            return 2 if parts[1 if is_result else 2] == "F64" else 1
        if self.starts("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
            return 2
        return 1


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembly, and where its labels stand."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    frames: set[tuple[str, int]] = set()
    in_comment = False
    for line in text.splitlines():
        if line.lstrip().startswith("//## "):
            if not in_comment:
                frames = set()
            in_comment = True
            frames |= {(file, int(number)) for file, number in re.findall(r'"([^"]+)", line (\d+)', line)}
        elif label := re.fullmatch(r"(\S+):", line.strip()):
            waiting.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?(U?P\d)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            in_comment = False
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            target = re.search(r"`\((\S+)\)", found[4])
            operands = tuple(part.strip() for part in found[4].split(",") if part.strip() and "`" not in part)
            instructions.append(
                Instruction(address, found[2] or "", found[3], operands, target[1] if target else "", frozenset(frames))
            )
    return instructions, labels


class Graph:
    """The ways through the code: blocks without a branch, and which may follow which."""

    def __init__(self, code: list[Instruction], labels: dict[str, int]) -> None:
        places = {instruction.address: place for place, instruction in enumerate(code)}
        branches = [place for place, instruction in enumerate(code) if instruction.starts("BRA", "EXIT", "RET")]
        targets = [places[labels[code[place].target]] for place in branches if code[place].target in labels]
        first = sorted({0, *targets, *(place + 1 for place in branches if place + 1 < len(code))})
        self.blocks = {begin: code[begin:end] for begin, end in zip(first, [*first[1:], len(code)], strict=True)}
        self.following: dict[int, list[int]] = {}
        for begin, instructions in self.blocks.items():
            last = instructions[-1]
            goes_on = not (last.starts("BRA", "EXIT", "RET") and last.guard == "" and not last.operands)
            after = begin + len(instructions)
            self.following[begin] = [after] if goes_on and after < len(code) else []
            if last.starts("BRA") and last.target in labels:
                self.following[begin].append(places[labels[last.target]])
        self.order = self._reverse_postorder()
        self.before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for to in self.following[block]:
                self.before[to].append(block)
        self.dominators = self._dominators()

    def _reverse_postorder(self) -> list[int]:
        """Blocks that can be reached, each but for loops behind all that lead to it."""
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.following[0]))]
        while stack:
            block, following = stack[-1]
            to = next((to for to in following if to not in seen), None)
            if to is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self.following[to])))
        return done[::-1]

    def _dominators(self) -> dict[int, set[int]]:
        """Of every block those that each way to it passes."""
        dominators = {block: set(self.order) for block in self.order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                found = {block, *set.intersection(*(dominators[one] for one in self.before[block]))}
                changed |= found != dominators[block]
                dominators[block] = found
        return dominators

    def loops(self) -> dict[int, set[int]]:
        """Blocks of every loop, by its first: what leads back to it without passing it."""
        loops: dict[int, set[int]] = {}
        for block in self.order:
            for head in self.following[block]:
                if head not in self.dominators[block]:
                    continue
                inside = loops.setdefault(head, {head})
                waiting = [block]
                while waiting:
                    one = waiting.pop()
                    if one not in inside:
                        inside.add(one)
                        waiting += self.before[one]
        return loops

    def way(self, head: int, inside: set[int], longest: bool) -> list[Instruction]:
        """The longest or shortest way once round a loop, without the loops inside of it going round."""
        sign = 1 if longest else -1
        length = {head: sign * len(self.blocks[head])}
        came_from: dict[int, int] = {}
        ends = set()
        for block in (block for block in self.order if block in inside and block in length):
            for to in self.following[block]:
                if to == head:
                    ends.add(block)
                elif to in inside and to not in self.dominators[block]:
                    new = length[block] + sign * len(self.blocks[to])
                    if to not in length or new > length[to]:
                        length[to], came_from[to] = new, block
        block = max(ends, key=lambda end: length[end])
        blocks = [block]
        while block != head:
            block = came_from[block]
            blocks.append(block)
        return [instruction for block in reversed(blocks) for instruction in self.blocks[block]]


def cycles_a_round(way: list[Instruction], in_order: bool) -> float:
    """Cycles from one round of a loop to the next, when it has gone round for a while."""
    ready: dict[str, int] = {}
    stored = visible = 0  # shared memory: what a warp has stored is read by others behind a barrier
    issued = end = 0
    ends = []
    for _ in range(12):
        for instruction in way:
            written, read = instruction.registers()
            time = max((ready.get(name, 0) for name in read), default=0)
            if instruction.starts("LDS"):
                time = max(time, visible)
            if instruction.starts("WARPSYNC", "BAR"):
                time = max(time, stored)
                visible = time + instruction.latency
            if in_order:
                issued = time = max(time, issued + 1)
                if instruction.starts("WARPSYNC", "BAR"):
                    issued = visible
            for name in written:
                ready[name] = time + instruction.latency
            if instruction.starts("STS"):
                stored = time + 1
            end = max(end, time)
        ends.append(end)
    return (ends[-1] - ends[-5]) / 4


@dataclass(frozen=True)
class LoopCounts:
    name: str
    steps: int  # unrolled
    instructions: int
    least: int  # instructions, on the shortest way
    products: int  # HMMA, DFMA or FFMA, whichever the loop is there for
    product: str
    conversions: int
    divisions: int
    chain: float
    alone: float


@dataclass(frozen=True)
class Counts:
    instructions: int
    fold: int
    loops: tuple[LoopCounts, ...]


def lines_with(file: str, line: str) -> set[int]:
    lines = (CSRC / "cuda" / file).read_text().splitlines()
    found = {number for number, text in enumerate(lines, start=1) if line in text}
    if not found:
        sys.exit(f"csrc/cuda/{file} no longer holds the line that a loop is found by: {line}")
    return found


def is_from(instruction: Instruction, file: str, lines: set[int] | None = None) -> bool:
    return any(name.endswith("/" + file) and (lines is None or line in lines) for name, line in instruction.frames)


def count_loop(loop: Loop, way: list[Instruction], shortest: list[Instruction]) -> LoopCounts:
    numbers = {name: sum(i.starts(name) for i in way) for name in ("HMMA", "DFMA", "FFMA")}
    product = next((name for name, number in numbers.items() if number), "FFMA")
    steps = max(sum(i.starts(loop.unit) for i in way) // loop.units, 1) if loop.unit else 1
    return LoopCounts(
        loop.name,
        steps,
        len(way),
        len(shortest),
        numbers[product],
        product,
        sum(i.is_conversion for i in way),
        sum(i.is_division for i in way),
        cycles_a_round(way, in_order=False) / steps,
        cycles_a_round(way, in_order=True) / steps,
    )


def count(text: str, wanted: Iterable[Loop]) -> Counts:
    code, labels = parse(text)
    graph = Graph(code, labels)
    loops = graph.loops()
    counted: list[LoopCounts] = []
    for loop in wanted:
        lines = lines_with(loop.file, loop.line)
        holding = {block for block, body in graph.blocks.items() if any(is_from(i, loop.file, lines) for i in body)}
        around = {head: inside for head, inside in loops.items() if inside & holding}
        # Copies of a loop with the same number of products, all with branches or all without, count once: the longest.
        kinds: dict[tuple[int, bool], LoopCounts] = {}
        for head, inside in around.items():
            others = [other for other in around.values() if other is not inside]
            if any(other < inside if loop.innermost else inside < other for other in others):
                continue
            counts = count_loop(loop, graph.way(head, inside, True), graph.way(head, inside, False))
            kind = counts.products, counts.least < counts.instructions
            if counts.products > 0 and (kind not in kinds or kinds[kind].instructions < counts.instructions):
                kinds[kind] = counts
        counted += [kinds[kind] for kind in sorted(kinds)]
    real = [i for i in code if not i.starts("NOP")]
    return Counts(len(real), sum(is_from(i, "fold.cuh") for i in real), tuple(counted))


def find_nvdisasm() -> str:
    found = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    if found is None:
        sys.exit("no nvdisasm on the PATH: it comes with the CUDA toolkit and with Triton (NVDISASM names it)")
    return found


def compile_kernel(kernel: Kernel, folder: Path) -> tuple[str, str]:
    """The disassembly for sm_90, and what ptxas says of registers."""
    source = folder / "kernel.cu"
    cubin = folder / "kernel.cubin"
    source.write_text(
        f'#include "{kernel.header}"\nnamespace inverse_flow {{\n'
        f"void* kernel() {{ return reinterpret_cast<void*>({kernel.symbol}); }}\n}}\n"
    )
    options = ["-cubin", "-arch=sm_90", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v"]
    includes = ["-I", str(CSRC / "cuda"), "-I", str(CSRC)]
    done = subprocess.run(["nvcc", *options, *includes, str(source), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    sass = subprocess.run([find_nvdisasm(), "-c", "-gi", str(cubin)], capture_output=True, text=True, check=True)
    return sass.stdout, done.stdout + done.stderr


def one(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def rows(name: str, counts: Counts, report: str = "") -> list[str]:
    registers = one(r"Used (\d+) registers", report)
    spills = one(r"(\d+) bytes spill stores", report)
    whole = (
        f"| {name} | {counts.instructions * 16 / 1024:.1f} KiB, {registers} registers, {spills} bytes spilled"
        f" | {counts.instructions} | | | | |"
    )
    share = f"| | fold, {100 * counts.fold / counts.instructions:.0f} % of the code | {counts.fold} | | | | |"
    lines = [whole] + ([share] if counts.fold else [])
    for loop in counts.loops:
        of_steps = f" × {loop.steps}" if loop.steps > 1 else ""
        lines.append(
            f"| | {loop.name}{of_steps}, {loop.products} {loop.product} | "
            f"{loop.least / loop.steps:.1f} – {loop.instructions / loop.steps:.1f} | "
            f"{loop.conversions} | {loop.divisions} | {loop.chain:.0f} | {loop.alone:.0f} |"
        )
    return lines


HEADER = (
    "| kernel | part | instructions (a step) | conversions | divisions | chain | alone |\n|---|---|--:|--:|--:|--:|--:|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Instruction counts of the CUDA kernels, for sm_90.")
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)}; none: all")
    parser.add_argument("--sass", type=Path, help="count this disassembly as that of the kernel named")
    options = parser.parse_args()
    unknown = [name for name in options.kernels if name not in KERNELS]
    if unknown:
        parser.error(f"no kernel {', '.join(unknown)}: there are {', '.join(KERNELS)}")
    print(HEADER)
    for name in options.kernels or KERNELS:
        kernel = KERNELS[name]
        if options.sass is not None:
            sass, report = options.sass.read_text(), ""
        else:
            with tempfile.TemporaryDirectory() as folder:
                sass, report = compile_kernel(kernel, Path(folder))
        print("\n".join(rows(name, count(sass, kernel.loops), report)), flush=True)


if __name__ == "__main__":
    main()
