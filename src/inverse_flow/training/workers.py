"""The processes that train one model together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

# What torchrun tells every process that it starts.
LAUNCHED, LOCAL_RANK = "TORCHELASTIC_RUN_ID", "LOCAL_RANK"


@dataclass(frozen=True)
class Workers:
    """Processes with equal models, each of which computes the gradient of its share of every batch.

    With one process, the default, every method returns what it was given. Otherwise all but ``share`` are collective:
    all processes must call them in the same order.

    Attributes:
        rank: of this process, 0 … count − 1. Only the first writes files.
        count: of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch: as many as the others have, so that a mean of means is the mean.

        Raises:
            ValueError: the number of rows is not divisible by the number of processes.
        """
        if len(batch) % self.count:
            raise ValueError(f"a batch of {len(batch)} cannot be shared evenly by {self.count} processes")
        rows = len(batch) // self.count
        return batch[self.rank * rows : (self.rank + 1) * rows]

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are the means over the processes if there are several.

        With one process it is the module itself, else PyTorch's ``DistributedDataParallel`` around it: what is
        differentiated must come out of its ``forward``.
        """
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)

    def average(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return self._reduced(value, distributed.ReduceOp.SUM) / self.count if self.count > 1 else value

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum of a tensor over the processes."""
        return self._reduced(value, distributed.ReduceOp.MAX) if self.count > 1 else value

    def copy_from_first(self, module: nn.Module) -> None:
        """Gives every process the parameters and buffers of the first."""
        if self.count > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                distributed.broadcast(tensor.detach(), src=0)

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    @staticmethod
    def _reduced(value: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        result = value.detach().clone()
        distributed.all_reduce(result, operation)
        return result


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return LAUNCHED in os.environ


@contextmanager
def connect(device: str) -> Iterator[tuple[Workers, str]]:
    """Within it, the processes that ``torchrun`` started are one group; yields it with this process's device.

    On "cuda" every process of a host takes the GPU of its local rank, and they talk through NCCL; on the CPU through
    gloo. A process that was not started by ``torchrun`` is alone.
    """
    if not launched():
        yield Workers(), device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ[LOCAL_RANK]}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Workers(distributed.get_rank(), distributed.get_world_size()), device
        # PyTorch may hang when a group ends while its thread still clears up after a reduction of the gradients.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
