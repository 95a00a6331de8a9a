"""Running statistics: changed once a step, outside what is differentiated, in a few launches for a whole block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import BatchNorm

__all__ = ["update_running_statistics"]


@torch.no_grad()
def update_running_statistics(
    norms: Sequence[Optional[BatchNorm]],
    stats: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
    totals: Optional[Sequence[Optional[Tensor]]] = None,
) -> None:
    """``running += momentum * (batch - running)``, with the unbiased variance, for every norm that asks for it.

    Args:
        norms: as given to the block, None for none; those without batch statistics, running statistics or momentum are
            left alone.
        stats: a norm's mean and sum of squared deviations, ``[C]`` each.
        counts: the number of positions that these are over.
        totals: the number of those on all ranks, where ranks share them, see `resdense_ext.ops.ranks`; else None.
    """
    if totals is not None:
        # Scaled to this rank's count, of which one is taken below, instead of one of all.
        stats = [
            (mean, m2 if total is None else m2 * (total * max(count - 1, 1) / (count * (total - 1).clamp(min=1))).to(m2.dtype))
            for (mean, m2), count, total in zip(stats, counts, totals)
        ]
    training = [(norm, *rest) for norm, *rest in zip(norms, stats, counts) if norm is not None and norm.batch_stats]
    counters = [norm.num_batches_tracked for norm, *_ in training if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    momenta: dict[float, list[tuple[BatchNorm, Tensor, Tensor, int]]] = defaultdict(list)
    for norm, (mean, m2), count in training:
        if norm.running_mean is not None and norm.momentum is not None:
            momenta[norm.momentum].append((norm, mean, m2, count))
    for momentum, updates in momenta.items():
        unbiased = torch._foreach_div([m2 for _, _, m2, _ in updates], [max(count - 1, 1) for *_, count in updates])
        running = [t for norm, *_ in updates for t in (norm.running_mean, norm.running_var)]
        batch = [t for (_, mean, *_), var in zip(updates, unbiased) for t in (mean, var)]
        batch = [new if new.dtype is old.dtype else new.to(old.dtype) for new, old in zip(batch, running)]
        torch._foreach_lerp_(running, batch, momentum)
