"""What the compiled backends share: primitives whose operator has a kernel for either device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops.activation import number_of
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Pending, Stats, in_dtype
from resdense_ext.ops.pool import run_pool, run_pool_backward
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, BatchNorm, Pool, accumulation_dtype

__all__ = ["CompiledBackend"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CompiledBackend(ReferenceBackend):
    """A raw schema does not bump the version counter of what it writes; these wrappers do."""

    calls_operators = True
    folds_at_once = True

    @property
    def ends(self):
        return torch.ops.resdense

    def refusal(self, x: Tensor, compute_dtype: torch.dtype) -> Optional[str]:
        # One dtype of statistics must suit both.
        supported = x.dtype in _DTYPES and compute_dtype in _DTYPES
        if not supported or accumulation_dtype(x.dtype) != accumulation_dtype(compute_dtype):
            return f"the input is {x.dtype} and the convolutions compute in {compute_dtype}"
        return None

    def _fold(self, norm: BatchNorm, stats: Stats, count: int, activation: Activation) -> Fold:
        dtype, batch_stats = stats.mean.dtype, norm.batch_stats
        mean, m2 = stats if batch_stats else (norm.running_mean, norm.running_var)
        mean, m2, weight, bias = in_dtype(dtype, mean, m2, norm.weight, norm.bias)
        scale, shift, rstd = torch.ops.resdense.bn_fold(mean, m2, count if batch_stats else 1, norm.eps, weight, bias)
        return Fold(Affine(scale, shift, activation), mean, rstd, count if batch_stats else None)

    def folds(
        self, norms: Sequence[BatchNorm], stats: Sequence[Stats], counts: Sequence[int], activation: Activation
    ) -> list[Fold]:
        dtype = stats[0].mean.dtype
        read = [of if norm.batch_stats else (norm.running_mean, norm.running_var) for norm, of in zip(norms, stats)]
        vectors = [(*of, norm.weight, norm.bias) for norm, of in zip(norms, read)]
        alike = all(v is not None and v.dtype is dtype for of in vectors for v in of)
        if not alike or any(norm.groups for norm in norms):
            return super().folds(norms, stats, counts, activation)
        mean, m2, weight, bias = zip(*vectors)
        counts = [count if norm.batch_stats else None for norm, count in zip(norms, counts)]
        values = [1 if count is None else count for count in counts]
        made = torch.ops.resdense.bn_folds(mean, m2, values, [norm.eps for norm in norms], weight, bias)
        # Every norm's begin at a multiple of 4.
        sizes = [v.shape[0] for v in mean]
        parts = made.split([-(-size // 4) * 4 for size in sizes], 1)
        rows = [(part if part.shape[1] == size else part[:, :size]).unbind() for part, size in zip(parts, sizes)]
        return [
            Fold(Affine(scale, shift, activation), v, rstd, count)
            for (scale, shift, rstd), v, count in zip(rows, mean, counts)
        ]

    def _correct(
        self, fold: Fold, sum_dy: Tensor, sum_dy_xc: Tensor, into: Optional[Pending]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if fold.count is None:
            return super()._correct(fold, sum_dy, sum_dy_xc, into)
        scale, mean, rstd = fold.affine.scale, fold.mean, fold.rstd
        if into is None:
            beta, delta = torch.empty_like(mean), torch.empty_like(mean)
        else:
            beta, delta = into.beta, into.delta
            increment_version((beta, delta))
        vectors = (sum_dy, sum_dy_xc, scale, mean, rstd, fold.count, beta, delta)
        return torch.ops.resdense.bn_correction(*vectors, into is not None), beta, delta

    def channel_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.resdense.channel_stats(x)

    def bn_act(self, x: Tensor, affine: Affine, out: Optional[Tensor] = None) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        increment_version(out)
        torch.ops.resdense.bn_act(x, affine.scale, affine.shift, number_of(affine.activation), out)
        return out

    def bn_act_backward(self, grad: Tensor, x: Tensor, affine: Affine, center: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, activation = affine
        increment_version(grad)
        return torch.ops.resdense.bn_act_backward(grad, x, scale, shift, center, number_of(activation))

    def bn_act_backward_accumulate(
        self, out: Tensor, grad: Tensor, x: Tensor, affine: Affine, center: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale, shift, activation = affine
        increment_version(out)
        return torch.ops.resdense.bn_act_backward_accumulate(out, grad, x, scale, shift, center, number_of(activation))

    def pending_grad_(self, pending: Pending) -> Tensor:
        increment_version(pending.dy)
        torch.ops.resdense.pending_grad(*pending)
        return pending.dy

    def bn_act_pool(self, x: Tensor, affine: Affine, pool: Pool) -> tuple[Tensor, Optional[Tensor]]:
        scale, shift, activation = affine
        return run_pool(torch.ops.resdense, x, scale, shift, number_of(activation), pool)

    def bn_act_pool_backward(
        self, grad: Tensor, taps: Optional[Tensor], x: Tensor, fold: Fold, pool: Pool, into: Optional[Pending]
    ) -> ConvGrads:
        scale, shift, activation = fold.affine
        vectors = (scale, shift, fold.mean, number_of(activation))
        dy, sums = run_pool_backward(torch.ops.resdense, grad, taps, x, vectors, pool, into)
        return self._grads(x, fold, None, None, dy, into, *sums)
