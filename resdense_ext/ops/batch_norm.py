"""Batch norm, and instance and group norm, in plain PyTorch, as their modules call it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from resdense_ext.reference import BatchNorm

__all__ = ["batch_norm"]


def batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """Running statistics are updated where batch statistics are used."""
    if norm.groups:
        return F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
    if norm.instance:
        return F.instance_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    mean, var = norm.running_mean, norm.running_var
    if norm.batch_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.batch_stats and norm.momentum is None:
        mean = var = None  # the statistics are to stay as they are
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.batch_stats, norm.momentum or 0.0, norm.eps)
