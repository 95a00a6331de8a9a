"""``act(bn(z) + identity)`` and ``act(bn(z) + bn_d(identity))``, the end of a residual block.

Its forward is fused on GPUs where no gradient is wanted; elsewhere it is plain PyTorch.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops.add_act import fused_slope, kernels_of
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.reference import Activation, BatchNorm, accumulation_dtype

__all__ = ["bn_add_act"]


def bn_add_act(
    z: Tensor, norm: BatchNorm, identity: Tensor, identity_norm: Optional[BatchNorm], activation: Activation
) -> Tensor:
    """The checked call: see `resdense_ext.functional.bn_add_act`."""
    slope = fused_slope(z, activation)
    sources = [z, identity, norm.weight, norm.bias] + ([] if identity_norm is None else list(identity_norm[:2]))
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
    if slope is None or differentiable:
        shortcut = identity if identity_norm is None else _batch_norm(identity, identity_norm)
        return reference.add_act(_batch_norm(z, norm), shortcut, activation)
    shortcut_fold = (None, None) if identity_norm is None else _fold(identity, identity_norm)
    return kernels_of(z).bn_add_act(z, *_fold(z, norm), identity, *shortcut_fold, slope)


def _batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if norm.batch_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.batch_stats and norm.momentum is None:
        mean = var = None  # the statistics are to stay as they are
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.batch_stats, norm.momentum or 0.0, norm.eps)


def _fold(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    if norm.batch_stats:
        count = x.numel() // x.shape[1]
        mean, m2 = backends.choose(x, x.dtype, Activation()).channel_stats(x)
        update_running_statistics([norm], [(mean, m2)], count)
        var = m2 / count
    else:
        dtype = accumulation_dtype(x.dtype)
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    return reference.fold_batch_norm(norm, mean, var)[:2]
