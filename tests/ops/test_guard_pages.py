"""The CPU kernels load whole vectors; none may reach beyond the tensor.

The images lie flush against a page that must not be touched, before or behind them, in a process of its own: a load
from there ends it.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inverse_flow.ops import library as ops

PAGE = mmap.PAGESIZE
PROT_NONE = 0
# The order of the dimensions in memory, of images and of volumes.
LAYOUTS = {
    "contiguous": {4: (0, 1, 2, 3), 5: (0, 1, 2, 3, 4)},
    "channels_last": {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)},
    "columns_first": {4: (0, 1, 3, 2), 5: (0, 1, 2, 4, 3)},
}
SHAPES = [
    *[(9, 3, 4, 5), (8, 9, 3, 16), (17, 1, 2, 1), (1, 3, 17, 9), (2, 8, 9, 8), (3, 1, 1, 7)],
    *[(9, 3, 2, 4, 5), (1, 3, 3, 17, 9), (2, 1, 1, 2, 7)],
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Guarded:
    """Memory with an untouchable page on either side."""

    def __init__(self, size: int) -> None:
        self.pages = (size + PAGE - 1) // PAGE * PAGE
        self.memory = mmap.mmap(-1, self.pages + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (start, start + PAGE + self.pages):
            if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def place(self, images: Tensor, layout: tuple[int, ...], at_end: bool) -> Tensor:
        """A copy of ``images`` with its dimensions laid out in the order ``layout``, flush with one end."""
        size = images.numel() * images.element_size()
        offset = PAGE + (self.pages - size if at_end else 0)
        flat = torch.frombuffer(self.memory, dtype=images.dtype, count=images.numel(), offset=offset)
        placed = flat.view([images.shape[d] for d in layout]).permute([layout.index(d) for d in range(images.dim())])
        return placed.copy_(images)


def solve_everything() -> None:
    """Every kernel that reads images, on guarded ones."""
    for shape, dtype, layouts, at_end in product(SHAPES, DTYPES, LAYOUTS.values(), (False, True)):
        images = torch.randn(shape).to(dtype)
        memory = Guarded(images.numel() * images.element_size())
        placed = memory.place(images, layouts[len(shape)], at_end)
        channels = shape[1]
        weight = (torch.randn(channels, channels, *(2, 3, 2)[-len(shape) + 2 :]) * 0.1).to(dtype)
        for order, transposed in product(range(2 ** (len(shape) - 2)), (False, True)):
            codes = ([order], 1, transposed)
            x = ops.solve(placed, weight, None, *codes)
            ops.solve_backward(placed, x, weight, *codes)
            ops.solve_backward(x, placed, weight, *codes)


def run(what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__)), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are guarded the Linux way")
def test_no_kernel_reads_beyond_the_images() -> None:
    done = run("solve")
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout == "done\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are guarded the Linux way")
@pytest.mark.parametrize("end", ["before", "behind"])
def test_a_read_beyond_the_images_is_caught(end: str) -> None:
    done = run(end)
    assert done.returncode < 0, done.stdout + done.stderr


def main(what: str) -> None:
    torch.set_num_threads(1)
    if what == "solve":
        solve_everything()
    else:
        placed = Guarded(64).place(torch.zeros(1, 1, 4, 4), LAYOUTS["contiguous"][4], what == "behind")
        ctypes.string_at(placed.data_ptr() + (64 if what == "behind" else -4), 4)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
