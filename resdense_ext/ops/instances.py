"""Instance and group norms: batch norms of every sample by itself.

No sample has to do with another then, whatever stands between the norms. So the engines know nothing of them: they are given a
sample at a time, as a batch of one, and what they find for the samples is put together here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import BatchNorm, accumulation_dtype

__all__ = ["are_instances", "gathered_gradients", "joined", "parts_of", "shape_of_part"]


def are_instances(norms: Iterable[Optional[BatchNorm]]) -> bool:
    """Whether statistics are taken of every sample by itself."""
    return any(norm is not None and norm.instance for norm in norms)


def parts_of(x: Optional[Tensor], samples: int) -> Sequence[Optional[Tensor]]:
    """So many ``samples``, each as a batch of one; of the number 0 the batch as it is."""
    if samples == 0:
        return (x,)
    return [None] * samples if x is None else x.split(1)


def shape_of_part(shape: Sequence[int], apart: bool) -> tuple[int, ...]:
    return (1 if apart else shape[0], *shape[1:])


def joined(parts: list[Sequence[Optional[Tensor]]]) -> list[Optional[Tensor]]:
    """The batch's maps, from those of all parts, whose list is emptied: they are let go one by one."""
    if len(parts) == 1:
        return list(parts[0])
    of_maps, whole = list(zip(*parts)), []
    parts.clear()
    while of_maps:
        of_map = of_maps.pop(0)
        whole.append(None if of_map[0] is None else torch.cat(of_map))
        del of_map
    return whole


def gathered_gradients(parts: Iterable[Sequence[Optional[Tensor]]], maps: int) -> list[Optional[Tensor]]:
    """From the gradients of every part, first those of so many ``maps``, then those of what all parts read: the batch's."""
    of_maps, first, sums = [], None, None
    for grads in parts:
        of_maps.append(grads[:maps])
        first = first or grads[maps:]
        sums = first if sums is None else list(map(_added, sums, grads[maps:]))
        del grads
    return [*joined(of_maps), *(total if total is None else total.to(grad.dtype) for total, grad in zip(sums, first))]


def _added(total: Optional[Tensor], more: Optional[Tensor]) -> Optional[Tensor]:
    return total if total is None else total.to(accumulation_dtype(total.dtype)).add_(more)
