"""The Triton backend: every primitive as a kernel of `resdense_ext.kernels`, for GPUs and for Triton's interpreter.

Convolutions that the vendor's library does better (see `is_ours`), those with a bias in backward and float64 products go through
the framework, as in the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops import moments
from resdense_ext.ops._library import LIBRARY
from resdense_ext.ops.activation import activation_numbered
from resdense_ext.ops.backend import register
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Pending, Prefix, Stats
from resdense_ext.ops.pool import run_pool, run_pool_backward
from resdense_ext.ops.reference_backend import ReferenceBackend, empty_deviations
from resdense_ext.reference import Activation, BatchNorm, Conv, Pool

__all__ = ["PRODUCTS", "STRIDED_PRODUCTS", "MomentsBackend", "TritonBackend", "architecture_refusal", "interpreting", "is_ours", "missing"]

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_PRODUCTS = (torch.float32, *_SIXTEEN_BITS)


@functools.cache
def missing() -> Optional[str]:
    """Why there is no Triton; None where there is. Looked up when first asked, never at import."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture_refusal(device: torch.device) -> Optional[str]:
    """Why kernels do not run on this GPU; None where they do."""
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"{device} is sm_{major}{minor}, and the kernels are for sm_80 and later"


PRODUCTS, STRIDED_PRODUCTS = 918, 368
"""The most multiply-adds a value of the input with which a convolution larger than 1x1 is ours, without and with a stride.

By the bytes of an H200, on paper: the vendor's library wants the activation in memory, written and read, 4 bytes a value; what it
computes is copied to its place and read for its statistics, 6 bytes a value of the output, which with a stride are few. B bytes take
B / 4.3e12 s. P multiply-adds a value take the vendor's 2 P / 790e12 s, and ours twice that if our kernels, which activate a value
anew for every tap, reach half its rate: P is where both are as fast. Backward has twice the bytes, as the data gradient is written
and read before its mask, and twice the products.

Measured there they reach less: with the CUDA backend's passes around it the vendor's route takes a half to a tenth of the time of ours
for ResNet-50's 3x3 convolutions, of which the first has P = 576 and those with a stride of 2 from 288 on. So that backend takes it; here,
whose passes are slower, ours remain for their memory. A dense layer's has 9 times its growth, and 27 times in three dimensions.
"""


def is_ours(conv: Conv) -> bool:
    """Whether our kernels compute a convolution, by its shape and dtype; else the vendor's library, on its activated input.

    Grouped convolutions are the vendor's: with ResNeXt's 4 channels a group, 16x16 blocks of the matrix units would be filled
    to a sixteenth, and even 32 are one short product between a prologue and an epilogue. In float32, strided ones are, too: for
    IEEE products P is 56, and tf32 is not worth its nine configurations; with stride 1 they are ours as in 16 bits, so that dense
    layers allocate nothing of their inputs' size: up to a growth of 102, in three dimensions of 34.
    """
    if conv.groups > 1:
        return False
    outputs, _, *kernel = conv.weight.shape
    products = outputs * math.prod(kernel) / math.prod(conv.steps)
    if conv.keeps_size:
        return max(kernel) == 1 or products <= PRODUCTS
    return conv.weight.dtype in _SIXTEEN_BITS and max(conv.dilation) == 1 and products <= STRIDED_PRODUCTS


def _serves(x: Tensor, conv: Conv) -> bool:
    return missing() is None and is_ours(conv) and x.dtype in _PRODUCTS and conv.weight.dtype in _PRODUCTS


def _moments_deviations(x, scale, shift, activation, slope, center):
    from resdense_ext.kernels.moments import deviations

    out = empty_deviations(x)
    deviations(x, scale, shift, Activation(activation, slope), center, out)
    return out


def _moments_terms(R, G, weight, scale, rstd, count, unit, need_weight):
    from resdense_ext.kernels.moments import moments_terms

    return moments_terms(R, G, weight, scale, rstd, count, unit, need_weight)


# Operators, so that a program holds them.
LIBRARY.define("moments_deviations(Tensor x, Tensor? scale, Tensor? shift, str activation, float slope, Tensor center) -> Tensor")
LIBRARY.define(
    "moments_terms(Tensor R, Tensor G, Tensor weight, Tensor scale, Tensor rstd, int count, float unit, bool need_weight) "
    "-> (Tensor dgamma, Tensor dbeta, Tensor? dweight, Tensor scaled, Tensor terms)"
)
LIBRARY.impl("moments_deviations", _moments_deviations, "CompositeExplicitAutograd")
LIBRARY.impl("moments_terms", _moments_terms, "CompositeExplicitAutograd")


class MomentsBackend(ReferenceBackend):
    """What moments take beside products: kernels of either backend for GPUs."""

    def multiplies_moments(self, x: Tensor, conv: Conv) -> bool:
        return not missing() and moments.suits(x, conv)

    def deviations(self, x: Tensor, affine: Optional[Affine], center: Tensor) -> Tensor:
        scale, shift, activation = affine or (None, None, Activation("identity"))
        return torch.ops.resdense.moments_deviations(x, scale, shift, *activation, center)

    def moments_terms(
        self, R: Tensor, G: Tensor, weight: Tensor, fold: Fold, unit: float, need_weight: bool
    ) -> tuple[Tensor, Tensor, Optional[Tensor], Tensor, Tensor]:
        return torch.ops.resdense.moments_terms(R, G, weight, fold.affine.scale, fold.rstd, fold.count, unit, need_weight)


class _Ends:
    """The launchers of residual blocks' ends, by the operators' names and with their arguments."""

    def __getattr__(self, name: str):
        from resdense_ext.kernels import elementwise

        launcher = getattr(elementwise, name)
        if name == "pending_grad":
            return launcher
        return lambda *operands: launcher(*operands[:-1], activation_numbered(operands[-1]))


class TritonBackend(MomentsBackend):
    name = "triton"

    @property
    def ends(self):
        return None if missing() else _Ends()

    def refusal(self, x: Tensor, compute_dtype: torch.dtype) -> Optional[str]:
        if not x.is_cuda and not (interpreting() and x.device.type == "cpu"):
            return f"the input is on {x.device.type}"
        if missing():
            return missing()
        return architecture_refusal(x.device) if x.is_cuda else None

    def channel_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from resdense_ext.kernels.channel_stats import channel_stats

        return channel_stats(x)

    def bn_act(self, x: Tensor, affine: Affine, out: Optional[Tensor] = None) -> Tensor:
        from resdense_ext.kernels.bn_act import bn_act

        out = torch.empty_like(x) if out is None else out
        increment_version(out)
        bn_act(x, *affine, out)
        return out

    def bn_act_backward(self, grad: Tensor, x: Tensor, affine: Affine, center: Tensor) -> tuple[Tensor, Tensor]:
        from resdense_ext.kernels.bn_act import bn_act_backward

        increment_version(grad)
        scale, shift, activation = affine
        return bn_act_backward(grad, x, scale, shift, center, activation)

    def bn_act_backward_accumulate(
        self, out: Tensor, grad: Tensor, x: Tensor, affine: Affine, center: Tensor
    ) -> tuple[Tensor, Tensor]:
        from resdense_ext.kernels.bn_act import bn_act_backward_accumulate

        increment_version(out)
        scale, shift, activation = affine
        return bn_act_backward_accumulate(out, grad, x, scale, shift, center, activation)

    def pending_grad_(self, pending: Pending) -> Tensor:
        from resdense_ext.kernels.elementwise import pending_grad

        increment_version(pending.dy)
        pending_grad(*pending)
        return pending.dy

    def _fold(self, norm: BatchNorm, stats: Stats, count: int, activation: Activation) -> Fold:
        if missing() or stats.mean.dtype == torch.float64:
            return super()._fold(norm, stats, count, activation)
        from resdense_ext.kernels.fold import fold

        if norm.batch_stats:
            mean, folded = stats.mean, fold(*stats, count, norm.eps, norm.weight, norm.bias)
        else:
            mean = norm.running_mean.to(torch.float32)
            folded = fold(mean, norm.running_var, 1, norm.eps, norm.weight, norm.bias)
        return self._folded(folded, mean, count if norm.batch_stats else None, activation)

    def _correct(
        self, fold: Fold, sum_dy: Tensor, sum_dy_xc: Tensor, into: Optional[Pending]
    ) -> tuple[Tensor, Tensor, Tensor]:
        vectors = (sum_dy, sum_dy_xc, fold.affine.scale, fold.mean, fold.rstd)
        ours = all(t.dtype == torch.float32 and t.is_contiguous() for t in (*vectors, *(into or ())[3:]))
        if missing() or fold.count is None or not ours:
            return super()._correct(fold, sum_dy, sum_dy_xc, into)
        from resdense_ext.kernels.fold import correct

        beta, delta = (torch.empty_like(sum_dy), torch.empty_like(sum_dy)) if into is None else (into.beta, into.delta)
        increment_version((beta, delta))
        return correct(*vectors, fold.count, beta, delta, into is not None), beta, delta

    @staticmethod
    def _folded(folded: Tensor, mean: Tensor, count: Optional[int], activation: Activation) -> Fold:
        scale, shift, rstd = folded.unbind()
        return Fold(Affine(scale, shift, activation), mean, rstd, count)

    def bn_act_conv(
        self,
        x: Tensor,
        affine: Optional[Affine],
        conv: Conv,
        out: Tensor,
        mask: Optional[Tensor],
        mask_scale: float,
        stats: Optional[Stats],
        reader: Optional[BatchNorm] = None,
        prefix: Optional[Prefix] = None,
    ) -> Optional[Fold]:
        if not _serves(x, conv) or out.dtype == torch.float64:
            return super().bn_act_conv(x, affine, conv, out, mask, mask_scale, stats, reader, prefix)
        from resdense_ext.kernels.bn_act_conv import bn_act_conv

        increment_version(out)
        affine = affine or Fold.linear(x).affine
        folded = bn_act_conv(x, *affine, conv, out, mask, mask_scale, stats, None if prefix is not None else reader)
        if prefix is not None:
            return self._folded_reader(out, prefix.whole, reader, affine.activation)
        if reader is None:
            return None
        if not reader.batch_stats:
            return self._folded(folded, reader.running_mean.to(torch.float32), None, affine.activation)
        return self._folded(folded, stats.mean, out.numel() // out.shape[1], affine.activation)

    def takes_pending(self, x: Tensor, conv: Conv, need_weight: bool) -> bool:
        return _serves(x, conv) and not (need_weight and conv.bias is not None)

    def bn_act_conv_backward(
        self,
        x: Tensor,
        fold: Optional[Fold],
        conv: Conv,
        grad: Tensor | Pending,
        into: Optional[Pending],
        need_weight: bool,
        finish: bool = False,
        overwrite: bool = False,
    ) -> ConvGrads:
        if not self.takes_pending(x, conv, need_weight):
            return super().bn_act_conv_backward(x, fold, conv, grad, into, need_weight, finish)
        from resdense_ext.kernels.bn_act_conv_backward import bn_act_conv_data_backward, bn_act_conv_weight_backward

        dy, *pending = grad if isinstance(grad, Pending) else (grad,)
        prologue = fold or Fold.linear(x)
        scale, shift, activation = prologue.affine
        weight = None
        if need_weight:
            weight = bn_act_conv_weight_backward(dy, pending or None, conv, x, scale, shift, activation)
        out = torch.empty_like(x) if into is None else into.dy
        increment_version(out)
        vectors = (scale, shift, prologue.mean, prologue.rstd)
        norm_weight, norm_bias, beta, delta = bn_act_conv_data_backward(
            dy, pending or None, conv, x, vectors, prologue.count, activation, out,
            None if into is None else (into.beta, into.delta),
        )  # fmt: skip
        if fold is None:
            norm_weight = norm_bias = None
        if into is None:
            into = Pending(out, x, scale, beta, delta)
        return self._of_groups(fold, ConvGrads(into, weight, None, norm_weight, norm_bias))

    def bn_act_pool(self, x: Tensor, affine: Affine, pool: Pool) -> tuple[Tensor, Optional[Tensor]]:
        from resdense_ext.kernels import bn_act_pool

        return run_pool(bn_act_pool, x, *affine, pool)

    def bn_act_pool_backward(
        self, grad: Tensor, taps: Optional[Tensor], x: Tensor, fold: Fold, pool: Pool, into: Optional[Pending]
    ) -> ConvGrads:
        from resdense_ext.kernels import bn_act_pool

        scale, shift, activation = fold.affine
        dy, sums = run_pool_backward(bn_act_pool, grad, taps, x, (scale, shift, fold.mean, activation), pool, into)
        return self._grads(x, fold, None, None, dy, into, *sums)


register(TritonBackend())
