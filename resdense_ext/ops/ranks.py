"""Batch statistics over the ranks of a process group: one reduction a map forward, and one backward.

What comes back is scaled to the m positions of this rank, of M in all: ``m2 * m / M``, and likewise the correction that a
gradient owes to its norm. So whoever divides by m has the mean over all ranks, and no count is waited for on the device.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from resdense_ext.ops.operands import Pending, Stats

__all__ = ["Ranks", "check_one_process"]


class Ranks:
    """The ranks that share the statistics of a map: those of the group of this name; without a name, this one alone.

    ``count`` is m, and ``total`` M, known once statistics were merged or given to begin with: one value, on the device.
    """

    def __init__(self, name: str, count: int, total: Optional[Tensor] = None) -> None:
        self.name, self.count, self.total = name, count, total

    def merge_(self, stats: Stats) -> None:
        """Makes of this rank's statistics those of all ranks (Chan et al., 1983), in place."""
        if not self.name:
            return
        mean, m2 = (v.double() for v in stats)
        own = torch.cat([mean, m2, mean.new_full((1,), self.count)])
        group = _group(self.name)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group)
        means, m2s, counts = torch.stack(gathered).split([mean.numel(), mean.numel(), 1], 1)
        self.total = counts.sum(0)
        mean = (counts * means).sum(0) / self.total
        m2 = (m2s + counts * (means - mean).square()).sum(0)
        stats.mean.copy_(mean)
        stats.m2.copy_(m2 * self.count / self.total)

    def share_(self, pending: Pending) -> Pending:
        """Makes of the correction that this rank's positions ask for that of all ranks, in place; it is linear in their sums."""
        if self.name:
            correction = torch.stack([pending.beta, pending.delta]).mul_(self.count)
            dist.all_reduce(correction, group=_group(self.name))
            for to, value in zip((pending.beta, pending.delta), correction / self.total):
                to.copy_(value)
        return pending


def check_one_process(group: str) -> None:
    """Raises RuntimeError where a backward through the reference, see `by_reference`, would need other ranks."""
    if group:
        raise RuntimeError(
            "create_graph, is_grads_batched or another transformation of a backward: expected norms of this process alone, got batch "
            "statistics shared over several ranks"
        )


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
