"""Running statistics: changed once a step, outside what is differentiated, in a few launches for a whole block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from resdense_ext.reference import BatchNorm

__all__ = ["update_running_statistics"]


@torch.no_grad()
def update_running_statistics(norms: Sequence[BatchNorm], stats: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
    """``running += momentum * (batch - running)``, with the unbiased variance, for every norm that asks for it.

    Args:
        norms: as given to the block; those without batch statistics, running statistics or momentum are left alone.
        stats: a norm's mean and sum of squared deviations over ``count`` positions, ``[C]`` each.
    """
    counters = [n.num_batches_tracked for n in norms if n.batch_stats and n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    momenta: dict[float, list[tuple[BatchNorm, Tensor, Tensor]]] = defaultdict(list)
    for norm, (mean, m2) in zip(norms, stats):
        if norm.batch_stats and norm.running_mean is not None and norm.momentum is not None:
            momenta[norm.momentum].append((norm, mean, m2))
    for momentum, updates in momenta.items():
        unbiased = torch._foreach_div([m2 for _, _, m2 in updates], max(count - 1, 1))
        running = [t for norm, _, _ in updates for t in (norm.running_mean, norm.running_var)]
        batch = [t for (_, mean, _), var in zip(updates, unbiased) for t in (mean, var)]
        torch._foreach_lerp_(running, [new.to(old.dtype) for new, old in zip(batch, running)], momentum)
