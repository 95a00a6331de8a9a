"""The processes of a training: one, or those that `torchrun` has started."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resdense_ext.cli.device import usable_device


@dataclass(frozen=True)
class Processes:
    """This process's number, how many there are, and its device. The first one alone writes."""

    number: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.number == 0

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all processes, in a new tensor."""
        sums = sums.clone()
        if self.count > 1:
            dist.all_reduce(sums)
        return sums

    def gathered(self, item: Any) -> list[Any]:
        """Every process's item."""
        if self.count == 1:
            return [item]
        items = [None] * self.count
        dist.all_gather_object(items, item)
        return items

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process; it runs in that one alone."""
        made = [make() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(made)
        return made[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over all processes. Batch statistics are each process's own."""
        if self.count == 1:
            return model
        if self.device.type == "cuda":
            return DistributedDataParallel(model, device_ids=[self.device])
        # A group of its own, since the reducer keeps it, and with it gloo's threads, until the process ends (see `joined`).
        return DistributedDataParallel(model, process_group=dist.new_group())

    def same_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's running statistics."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the processes that `torchrun` has started, if it has: over gloo on CPUs, over nccl on GPUs, one GPU each.

    Raises:
        CommandError: `device` cannot be used.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, usable_device(device))
        return
    chosen = usable_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        # Joins gloo's threads. One that lived on could give up the last tensor of a collective, whose Python object it needs the
        # interpreter for, when that is gone already: this would abort the process.
        gc.collect()
        dist.destroy_process_group()
