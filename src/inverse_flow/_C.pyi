from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def plan_cpu(sizes: Sequence[int], corner: int, dtype: str, threads: int, backward: bool) -> dict[str, Any]: ...
def plan_cuda(
    sizes: Sequence[int],
    orders: Sequence[int],
    corner: int,
    dtype: str,
    backward: bool,
    threads_per_block: int,
    shared_bytes: int,
    multiprocessors: int,
    regime: int | None,
) -> dict[str, Any] | None: ...
