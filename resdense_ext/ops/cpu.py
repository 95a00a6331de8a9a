"""The CPU backend: the bandwidth-bound primitives in C++ (``csrc/cpu``), other convolutions through the framework.

A convolution's input is activated tile by tile in the cache where it is 1x1 or goes by Winograd's algorithm, for any other some
samples at a time, which the framework's convolution reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops import _library, volumes
from resdense_ext.ops.activation import number_of
from resdense_ext.ops.backend import register
from resdense_ext.ops.compiled import CompiledBackend
from resdense_ext.ops.convolve import is_matrix_product
from resdense_ext.ops.layout import map_beside, memory_format_of
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Pending, Prefix, Stats
from resdense_ext.reference import Activation, BatchNorm, Conv, TransposedConv, accumulation_dtype

__all__ = ["CpuBackend"]


_CACHED = 2**20
"""Bytes of an activation for a thread: then it is read by the convolution from where it was written."""


_CAPABILITY = (_library.build_info() or {}).get("cpu_capability", "DEFAULT")

_MULTIPLIES_BFLOAT16 = _CAPABILITY == "AVX512_BF16"
"""Elsewhere no product of 16-bit matrices is at hand that adds up in float32."""

_HAS_GEMM = _CAPABILITY != "DEFAULT"
"""Elsewhere the framework's convolution is faster than Winograd's algorithm around the framework's matrix products."""


_FILTERS = 2**19
"""Values of transformed filters, 2 MB: more of them pay for themselves only where the transformed maps have half as many. (On 4
maps of 7x7 the framework's convolution of 256 channels by 256 was faster in both directions, on 2 of 14x14 this is.) And in backward
every thread has as many sums."""


def _suits_winograd(x: Tensor, conv: Conv) -> bool:
    outputs, inputs = conv.weight.shape[:2]
    return (
        _HAS_GEMM
        and x.dtype != torch.float64
        and memory_format_of(x) == torch.channels_last
        and conv.groups == 1
        and conv.weight.shape[2:] == (3, 3)
        and tuple(conv.padding) == tuple(conv.dilation) == conv.steps == (1, 1)
        and 16 * inputs * outputs <= max(_FILTERS, 8 * (x.numel() // inputs) * (inputs + outputs))
    )


def _operator(x: Tensor, conv: Conv) -> Optional[Callable]:
    """That of ours for the convolution of an activation, if there is one."""
    if is_matrix_product(conv):
        return torch.ops.resdense.bn_act_conv1x1
    return torch.ops.resdense.bn_act_winograd if _suits_winograd(x, conv) else None


class _Ends:
    """The operators of residual blocks' ends, whose maps the CPU's kernels walk together: in one layout."""

    def __getattr__(self, name: str):
        return getattr(torch.ops.resdense, name)

    def bn_add_act(self, z: Tensor, scale: Tensor, shift: Tensor, identity: Tensor, *rest) -> Tensor:
        return torch.ops.resdense.bn_add_act(z, scale, shift, map_beside(z, identity), *rest)

    def bn_add_act_backward(self, grad: Tensor, out: Tensor, z: Tensor, center: Tensor, identity: Optional[Tensor], *rest):
        grad, out, identity = (t if t is None else map_beside(z, t) for t in (grad, out, identity))
        return torch.ops.resdense.bn_add_act_backward(grad, out, z, center, identity, *rest)

    def pending_grad(self, dy: Tensor, z: Tensor, *vectors: Tensor) -> None:
        torch.ops.resdense.pending_grad(dy, map_beside(dy, z), *vectors)


class CpuBackend(CompiledBackend):
    name = "cpu"
    ends = _Ends()

    def refusal(self, x: Tensor, compute_dtype: torch.dtype) -> Optional[str]:
        if _library.CPU_LIBRARY:
            return f"the CPU library is not loaded: {_library.CPU_LIBRARY}"
        if x.device.type != "cpu":
            return f"the input is on {x.device.type}"
        if x.dtype != compute_dtype:
            return f"the input is {x.dtype} and the convolutions compute in {compute_dtype}"
        return super().refusal(x, compute_dtype)

    def chunks(self, x: Tensor, conv: Optional[Conv] = None) -> list[slice]:
        """Of a bottleneck so many samples that every thread's share of an activation stays in its cache, but not fewer values than
        twice a weight's, which every part reads and has a gradient of; of a buffer one sample."""
        if not x.is_contiguous(memory_format=memory_format_of(x)):
            return [slice(n, n + 1) for n in range(x.shape[0])]
        values = _CACHED * torch.get_num_threads() // x.element_size()
        if conv is not None:
            values = max(values, 2 * conv.weight.numel())
        size = max(1, values // max(x[0].numel(), 1))
        return [slice(n, n + size) for n in range(0, x.shape[0], size)]

    def convolution(self, a: Tensor, conv: Conv | TransposedConv) -> Tensor:
        return volumes.convolution(a, conv) if volumes.are_for_onednn(a, conv) else super().convolution(a, conv)

    def convolution_backward(
        self, grad: Tensor, a: Tensor, conv: Conv | TransposedConv, need_input: bool, need_weight: bool
    ) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        found = volumes.convolution_backward if volumes.are_for_onednn(a, conv) else super().convolution_backward
        return found(grad, a, conv, need_input, need_weight)

    def takes_pending(self, x: Tensor, conv: Conv, need_weight: bool) -> bool:
        """A bias's gradient needs the finished gradient's sum, which only the general path has in memory."""
        return conv.bias is None and (is_matrix_product(conv) or _suits_winograd(x, conv))

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
        op = None if mask is not None else _operator(x, conv)
        if op is None:
            return super().bn_act_conv(x, affine, conv, out, mask, mask_scale, stats, reader, prefix)
        weight = conv.weight.flatten(1) if is_matrix_product(conv) else conv.weight
        scale, shift, activation = affine or Fold.linear(x).affine
        bias = None if conv.bias is None else conv.bias.to(accumulation_dtype(x.dtype))
        increment_version((out, *(stats or ())))
        op(x, scale, shift, number_of(activation), weight, bias, out, *(stats or (None, None)))
        return self._folded_reader(out, stats if prefix is None else prefix.whole, reader, activation)

    def convolved(
        self, x: Tensor, affine: Optional[Affine], conv: Conv, reader: Optional[BatchNorm]
    ) -> tuple[Tensor, Stats]:
        if _operator(x, conv) is not None or len(self.chunks(x, conv)) > 1:
            return super().convolved(x, affine, conv, reader)
        # What the framework's convolution makes is new memory.
        z = self.convolution(x if affine is None else self.bn_act(x, affine), conv)
        z = z.contiguous(memory_format=memory_format_of(x))
        return z, self.stats_for(reader, z)

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
        if not isinstance(grad, Pending) or not self.takes_pending(x, conv, need_weight):
            return super().bn_act_conv_backward(x, fold, conv, grad, into, need_weight, finish)
        prologue = fold or Fold.linear(x)
        scale, shift, activation = prologue.affine
        vectors = scale, shift, prologue.mean, number_of(activation)
        dy = torch.empty_like(x) if into is None else into.dy
        if is_matrix_product(conv):
            weight, *sums = torch.ops.resdense.bn_act_conv1x1_backward(
                x, *vectors, conv.weight.flatten(1), *grad, dy, into is not None, need_weight
            )
            weight = weight.view_as(conv.weight) if need_weight else None
        else:
            weight, *sums = torch.ops.resdense.bn_act_winograd_backward(
                x, *vectors, conv.weight, *grad, dy, into is not None, need_weight
            )
            weight = weight.permute(0, 3, 1, 2) if need_weight else None
        increment_version(dy)
        return self._grads(x, fold, weight, None, dy, into, *sums)

    def fuses_moments(self, x: Tensor, conv: Conv, activation: Activation) -> bool:
        if conv.groups != 1 or x.dtype != conv.weight.dtype:
            return False
        if x.dtype == torch.bfloat16:
            outputs, inputs = conv.weight.shape[:2]
            channels_last = memory_format_of(x) != torch.contiguous_format
            return _MULTIPLIES_BFLOAT16 and channels_last and inputs % 16 == 0 and outputs % 2 == 0
        return x.dtype in (torch.float32, torch.float64)

    def moments(self, x: Tensor, affine: Affine, near: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of what a convolution reads, and with the gradient of what it writes: the mean less ``near`` ``[C]``, a point near it,
        in float64, R, ``1^T g`` in float64 and ``G``."""
        return torch.ops.resdense.conv1x1_moments(x, *affine[:2], number_of(affine.activation), near, g)

    def terms_of_moments(
        self, rest: Tensor, R: Tensor, sum_g: Tensor, G: Tensor, weight: Tensor, fold: Fold, need_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From `moments` and the norm that reads the convolution's output: the gradients of that norm's weight and of ``weight
        [K, C]``, then the weight, the products and the offset that `moments_backward` wants."""
        return torch.ops.resdense.conv1x1_moments_terms(
            rest, R, sum_g, G, weight, fold.affine.scale, fold.rstd, fold.count, need_weight
        )

    def moments_backward(
        self,
        x: Tensor,
        fold: Fold,
        g: Tensor,
        weight: Tensor,
        products: Tensor,
        near: Tensor,
        offset: Tensor,
        out: Tensor,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        """``da = g weight + (a - near) products + offset``, then `bn_act_backward` of it, or with ``accumulate``
        `bn_act_backward_accumulate`, into ``out``."""
        scale, shift, activation = fold.affine
        increment_version(out)
        return torch.ops.resdense.conv1x1_moments_backward(
            x, scale, shift, fold.mean, number_of(activation), g, weight, products, near, offset, out, accumulate
        )


register(CpuBackend())
