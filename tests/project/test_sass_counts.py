"""Counting machine code: a disassembly made by hand, of which everything is known. No nvcc is needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "sass_counts.py"


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass_counts", SCRIPT)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass_counts"] = module
    spec.loader.exec_module(module)
    return module


# A loop of two steps with a branch around three instructions, and behind it code that jumps back but is no loop.
SASS = """
\t.target\tsm_90
kernel:
\t//## File "/a/csrc/cuda/common/fold.cuh", line 7 inlined at "/a/csrc/cuda/lanes/kernel.cuh", line 3
\t//## File "/a/csrc/cuda/lanes/kernel.cuh", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   DFMA R2, R4, R6, R2 ;
\t//## File "/a/csrc/cuda/lanes/kernel.cuh", line STEP_LINE
.L_loop:
        /*0020*/                   LDS.64 R8, [R1] ;
        /*0030*/              @!P0 BRA `(.L_rest) ;
        /*0040*/                   I2F.U32.RP R20, R21 ;
        /*0050*/                   MUFU.RCP R20, R20 ;
        /*0060*/                   F2I.FTZ.U32.TRUNC.NTZ R20, R20 ;
.L_rest:
        /*0070*/                   FFMA R10, R8, R11, R10 ;
        /*0080*/                   FFMA R10, R9.reuse, R12, R10 ;
        /*0090*/                   STS [R1], R10 ;
        /*00a0*/                   STS [R1+0x4], R10 ;
        /*00b0*/                   WARPSYNC.ALL ;
        /*00c0*/               @P1 BRA `(.L_loop) ;
.L_end:
        /*00d0*/                   BRA `(.L_out) ;
.L_back:
        /*00e0*/                   EXIT ;
.L_out:
        /*00f0*/                   BRA `(.L_back) ;
.L_forever:
        /*0100*/                   BRA `(.L_forever) ;
        /*0110*/                   NOP ;
"""


def sass(counting: ModuleType) -> str:
    (line,) = counting.lines_with(counting.STEP.file, counting.STEP.line)
    return SASS.replace("STEP_LINE", str(line))


def test_a_loop_is_counted_along_its_ways(counting: ModuleType) -> None:
    counts = counting.count(sass(counting), [counting.STEP])
    assert counts.instructions == 17
    assert counts.fold == 2
    (loop,) = counts.loops
    assert (loop.steps, loop.products, loop.product) == (2, 2, "FFMA")
    assert (loop.least, loop.instructions) == (8, 11)
    assert (loop.conversions, loop.divisions) == (2, 1)


def test_waits_follow_registers_and_shared_memory(counting: ModuleType) -> None:
    """A load, the two sums that need it, a store, and the barrier behind which the next load may be."""
    (loop,) = counting.count(sass(counting), [counting.STEP]).loops
    latency = counting.LATENCIES
    assert loop.chain * loop.steps == latency["LDS"] + 2 * counting.ARITHMETIC + 1 + latency["WARPSYNC"]
    assert loop.alone > loop.chain  # the division in between is waited for, too


@pytest.mark.parametrize(
    ("line", "written", "read"),
    [
        ("LDS.128 R4, [R2+UR4+0x10]", "R4 R5 R6 R7", "R2 UR4"),
        ("STS.64 [R2], R4", "", "R2 R4 R5"),
        ("LDG.E.128.CONSTANT R4, desc[UR6][R2.64+0x10]", "R4 R5 R6 R7", "UR6 R2 R3"),
        ("DFMA R2, R4, R6, R2", "R2 R3", "R2 R3 R4 R5 R6 R7"),
        ("F2F.F64.F32 R2, R4", "R2 R3", "R4"),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "R4 R5 R6 R7", "R4 R5 R6 R7 R8 R9 R10 R11 R12 R13"),
        ("IMAD.WIDE R2, R4, 0x4, R6", "R2 R3", "R4 R6 R7"),
        ("ISETP.NE.U32.AND P1, PT, R6, RZ, P2", "P1", "R6 P2"),
        ("IADD3 R8, P2, R8, UR6, RZ", "R8 P2", "R8 UR6"),
        ("SHFL.UP PT, R4, R5, 0x1, RZ", "R4", "R5"),
        ("@P3 FADD R4, -R5, |R6|", "R4", "P3 R4 R5 R6"),
        ("BRA `(.L_loop)", "", ""),
    ],
)
def test_registers_of_an_instruction(counting: ModuleType, line: str, written: str, read: str) -> None:
    guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
    ((instruction,), _) = counting.parse(f"/*0000*/ {guard} {rest} ;")
    want = set(written.split()), set(read.split())
    found = instruction.registers()
    assert found == want


def test_every_loop_is_still_in_the_sources(counting: ModuleType) -> None:
    for kernel in counting.KERNELS.values():
        for loop in kernel.loops:
            assert counting.lines_with(loop.file, loop.line)


def test_a_line_that_is_gone_is_told(counting: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"lanes/kernel.cuh no longer holds the line"):
        counting.lines_with("lanes/kernel.cuh", "no such line")
