"""Every primitive, which is what the engines are written in, in plain PyTorch on any device.

The other backends override what they do better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.activation import activation_backward, number_of
from resdense_ext.ops.layout import dense_map, empty_map, is_dense, memory_format_of
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Groups, Pending, Prefix, Stats
from resdense_ext.reference import Activation, BatchNorm, Conv, Pool, TransposedConv, accumulation_dtype

__all__ = ["ReferenceBackend", "empty_deviations", "unpool"]


class ReferenceBackend:
    """Plain PyTorch: any device, any floating dtype, the activation of a chunk of samples at a time as scratch."""

    name = "reference"
    calls_operators = False
    """Whether all that it does on tensors is done by operators, in which what an engine does can be recorded."""
    folds_at_once = False
    """Whether `folds` takes less than a `fold` for every norm."""

    @property
    def ends(self):
        """Where the fused kernels of residual blocks' ends are, by their operators' names; None where there are none."""
        return None

    def refusal(self, x: Tensor, compute_dtype: torch.dtype) -> Optional[str]:
        """Why this backend cannot take such an input; None where it can."""
        return None

    def chunks(self, x: Tensor, conv: Optional[Conv] = None) -> list[slice]:
        """The ranges of samples whose activations may be in memory at once, where there is one for a convolution to read."""
        return [slice(0, x.shape[0])]

    def positions(self, x: Tensor) -> int:
        """Over how many a channel's statistics are taken."""
        return x.numel() // x.shape[1]

    def linear(self, x: Tensor) -> Fold:
        """The fold of no norm and no activation."""
        return Fold.linear(x)

    def pending(self, dy: Tensor, x: Tensor) -> Pending:
        """``dy`` itself, a gradient of ``x``, to which norms may add their corrections."""
        return Pending.of(dy, x)

    def fuses_moments(self, x: Tensor, conv: Conv, activation: Activation) -> bool:
        """Whether there are `moments`, `terms_of_moments` and `moments_backward`, see `resdense_ext.ops.conv1x1_bn_add_act`, for a
        1x1 convolution of stride 1 and no padding, behind this activation."""
        return False

    def multiplies_moments(self, x: Tensor, conv: Conv) -> bool:
        """Whether `resdense_ext.ops.moments` is the way through a 1x1 convolution without padding and the norm behind it."""
        return False

    def deviations(self, x: Tensor, affine: Optional[Affine], center: Tensor) -> Tensor:
        """``act(scale * x + shift) - act(scale * center + shift)``, or ``x - center``, as a matrix ``[positions, C + 2 ..]`` in
        the dtype of x: behind the deviations are two columns of ones and, up to a multiple of 8, of zeros."""
        y, near = (t.to(center.dtype) for t in (x, center.view(1, -1, *[1] * (x.dim() - 2))))
        if affine is not None:
            y, near = (reference.activate(_affine(t, affine), affine.activation) for t in (y, near))
        out = empty_deviations(x).fill_(0)
        out[:, : x.shape[1]] = (y - near).movedim(1, -1).flatten(0, -2)
        out[:, x.shape[1] : x.shape[1] + 2].fill_(1)
        return out

    def moments_terms(
        self, R: Tensor, G: Tensor, weight: Tensor, fold: Fold, unit: float, need_weight: bool
    ) -> tuple[Tensor, Tensor, Optional[Tensor], Tensor, Tensor]:
        """What follows from the products of `deviations` ``b``: ``R = b^T b`` and ``G = g^T b``, in float32.

        The gradients ``dgamma`` and ``dbeta`` of the norm behind the convolution, which ``fold`` is, and that of its weight ``[K,
        C]``, then ``V = scale * weight`` and ``T`` with which that of its input is ``g V + b T / unit``, in the weight's dtype.
        """
        count, C = fold.count, weight.shape[1]
        W, mean, dbeta = weight.to(R.dtype), R[C, :C] / count, G[:, C].contiguous()
        G = G[:, :C] - dbeta[:, None] * mean
        dgamma = fold.rstd * (W * G).sum(1)
        scale, share = fold.affine.scale[:, None], (fold.rstd * dgamma / count)[:, None]
        V = (scale * W).to(weight.dtype)
        dW = None
        if need_weight:
            dW = (scale * (G - share * (W @ (R[:C, :C] - R[:C, C:][:, :1] * mean)))).to(weight.dtype)
        T = weight.new_zeros((R.shape[1], C))
        T[:C] = -unit * ((share * W).T @ V.to(R.dtype))
        offset = -(unit * dbeta @ V.to(R.dtype)) / count - mean @ T[:C].to(R.dtype)
        T[C] = offset
        T[C + 1] = offset - T[C]
        return dgamma, dbeta, dW, V, T

    def channel_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.channel_stats(x)

    def stats_for(self, reader: Optional[BatchNorm], z: Tensor) -> Stats:
        """Those of a map that its reader normalises by; none where it has its own."""
        wanted = reader is not None and reader.batch_stats
        return Stats(*self.channel_stats(z)) if wanted else Stats.room(z, None)

    def bn_act(self, x: Tensor, affine: Affine, out: Optional[Tensor] = None) -> Tensor:
        """``act(scale * x + shift)``, a new dense tensor in the layout of ``x``, or written into ``out``, which has that layout."""
        y = reference.apply_pending(x, *affine)
        return y if out is None else out.copy_(y)

    def bn_act_backward(self, grad: Tensor, x: Tensor, affine: Affine, center: Tensor) -> tuple[Tensor, Tensor]:
        """Multiplies ``grad`` by the activation's slope, in place; returns the sums of dy and of dy * (x - center)."""
        dy = self._masked(grad, x, affine)
        grad.copy_(dy)
        return self._sums(dy, x, center)

    def bn_act_backward_accumulate(
        self, out: Tensor, grad: Tensor, x: Tensor, affine: Affine, center: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``out += scale * dy`` with dy as in `bn_act_backward`; ``grad`` stays as it is."""
        dy = self._masked(grad, x, affine)
        out.add_((reference.per_channel(affine.scale, x) * dy).to(out.dtype))
        return self._sums(dy, x, center)

    def pending_grad_(self, pending: Pending) -> Tensor:
        """Finishes a gradient in place, and returns it."""
        return pending.dy.copy_(reference.pending_grad(*pending))

    def pending_grad(self, pending: Pending) -> Tensor:
        """The finished gradient, a new dense tensor."""
        dy, z, alpha, beta, delta = pending
        alone = Activation("identity")
        return self.bn_add_act(dy, Affine(alpha, delta, alone), z, Affine(beta, torch.zeros_like(beta), alone), alone)

    def fold(self, norm: BatchNorm, stats: Stats, count: int, activation: Activation) -> Fold:
        """A batch norm over ``count`` positions with these statistics, or over its running ones."""
        if not norm.groups:
            return self._fold(norm, stats, count, activation)
        *of_groups, values = reference.group_stats(*stats, count, norm.groups)
        fold = self._fold(norm, Stats(*of_groups), values, activation)
        return fold._replace(count=None, groups=Groups(norm.groups, values))

    def _fold(self, norm: BatchNorm, stats: Stats, count: int, activation: Activation) -> Fold:
        if norm.batch_stats:
            mean, var = stats.mean, stats.m2 / count
        else:
            mean, var = (t.to(stats.mean.dtype) for t in (norm.running_mean, norm.running_var))
        scale, shift, rstd = reference.fold_batch_norm(norm, mean, var)
        return Fold(Affine(scale, shift, activation), mean, rstd, count if norm.batch_stats else None)

    def folds(
        self, norms: Sequence[BatchNorm], stats: Sequence[Stats], counts: Sequence[int], activation: Activation
    ) -> list[Fold]:
        """`fold` of many norms."""
        return [self.fold(*of, activation) for of in zip(norms, stats, counts)]

    def convolution(self, a: Tensor, conv: Conv | TransposedConv) -> Tensor:
        """The framework's."""
        return reference.convolution(a, conv)

    def convolution_backward(
        self, grad: Tensor, a: Tensor, conv: Conv | TransposedConv, need_input: bool, need_weight: bool
    ) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """From the gradient of ``conv(a)`` that of ``a``, for which its values do not matter, and those of the weight and the bias;
        of these what is needed."""
        transposed = isinstance(conv, TransposedConv)
        return torch.ops.aten.convolution_backward(
            grad,
            a,
            conv.weight,
            None if conv.bias is None else [conv.channels],
            conv.steps,
            conv.padding,
            conv.dilation,
            transposed,
            conv.output_padding if transposed else [0] * (a.dim() - 2),
            conv.groups,
            [need_input, need_weight, need_weight and conv.bias is not None],
        )

    def takes_pending(self, x: Tensor, conv: Conv, need_weight: bool) -> bool:
        """Whether `bn_act_conv_backward` finishes a pending gradient as it multiplies, and not in a pass of its own."""
        return False

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
        """``out = conv(act(scale * x + shift)) * mask * mask_scale``, and the statistics of what was written, if asked for.

        Without an affine it is a convolution of x as it is. ``reader`` is the norm that will read ``out`` next, or that ``prefix`` of
        a buffer whose last channels it is, behind the same activation: it is returned folded.
        """
        for part in self.chunks(x, conv):
            activated = x[part] if affine is None else self.bn_act(x[part], affine)
            activated = activated.to(conv.weight.dtype)
            z = self.convolution(activated, conv)
            out[part].copy_(z if mask is None else z * mask[part] * mask_scale)
        if stats is not None:
            torch._foreach_copy_(list(stats), list(self.channel_stats(out)))
        activation = Activation() if affine is None else affine.activation
        return self._folded_reader(out, stats if prefix is None else prefix.whole, reader, activation)

    def ticket(self, x: Tensor) -> Optional[Tensor]:
        """That of a `Prefix` of ``x``, for a backend whose kernels draw from one."""
        return None

    def convolved(
        self, x: Tensor, affine: Optional[Affine], conv: Conv, reader: Optional[BatchNorm]
    ) -> tuple[Tensor, Stats]:
        """`bn_act_conv` into new memory, in the layout of ``x``, with the statistics that a reader normalises by."""
        out = empty_map(x, conv.weight.shape[0], conv.weight.dtype, conv.outputs(x.shape[2:]))
        stats = Stats.room(out, reader)
        self.bn_act_conv(x, affine, conv, out, None, 1.0, stats if len(stats.mean) else None)
        return out, stats

    def _folded_reader(
        self, out: Tensor, stats: Optional[Stats], reader: Optional[BatchNorm], activation: Activation
    ) -> Optional[Fold]:
        """The norm that alone reads what was written, if one does."""
        if reader is None:
            return None
        if stats is None:
            none = out.new_empty(0, dtype=accumulation_dtype(out.dtype))
            stats = Stats(none, none)
        return self.fold(reader, stats, out.numel() // out.shape[1], activation)

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
        """From the gradient of the convolution's output, which is only read unless it may be overwritten: its weight's, its bias's,
        the norm's and x's.

        The gradient of ``x`` is pending: ``scale * dy`` and the norm's correction, a new one or, where ``into`` is given, added
        to that one (whose ``alpha`` is 1). Without a fold the convolution's input is ``x`` as it is. To ``finish``, where nobody adds
        to that gradient or its correction any more, it may also be a tensor: finished, if this backend's next convolution wants
        it so.
        """
        dtype = conv.weight.dtype
        total: list[Optional[Tensor]] = [None, None, None, None]
        parts = self.chunks(x, conv)
        dy = torch.empty_like(x) if into is None and len(parts) > 1 else None
        for part in parts:
            upstream = (self.pending_grad(grad.part(part)) if isinstance(grad, Pending) else grad[part]).to(dtype)
            like, weight, bias = x[part], None, None
            if need_weight:
                # It is not beside the other gradient, unless what that would take in its place had to be copied.
                activated = (like if fold is None else self.bn_act(like, fold.affine)).to(dtype)
                _, weight, bias = self.convolution_backward(upstream, activated, conv, False, True)
                like = like if like.dtype == dtype and is_dense(like) else activated
                del activated
            dx, *_ = self.convolution_backward(upstream, like.to(dtype), conv, True, False)
            del like, upstream
            # The framework picks the layout of its gradient by its own rules.
            dx = dx.to(x.dtype).contiguous(memory_format=memory_format_of(x))
            sums: tuple[Optional[Tensor], ...] = (None, None)
            if into is None:
                if fold is not None:
                    sums = self.bn_act_backward(dx, x[part], fold.affine, fold.mean)
                if dy is None:
                    dy = dx
                else:
                    dy[part] = dx
            elif fold is None:
                into.dy[part].add_(dx)
            else:
                sums = self.bn_act_backward_accumulate(into.dy[part], dx, x[part], fold.affine, fold.mean)
            _add_up(total, (weight, bias, *sums))
            del dx, weight, bias  # not beside the next part's
        weight, bias = (None if grads is None else grads.to(dtype) for grads in total[:2])
        return self._grads(x, fold, weight, bias, dy, into, *total[2:])

    def end_number(self, activation: Activation) -> Optional[float]:
        """By which the kernels of residual blocks' ends know an activation; None where they do not serve it.

        Backward tells the sign of the activation's input from that of its output, so no slope may be negative.
        """
        number = number_of(activation)
        return None if self.ends is None or number < 0 else number

    def bn_add_act(
        self, z: Tensor, affine: Affine, identity: Tensor, identity_affine: Optional[Affine], activation: Activation
    ) -> Tensor:
        """``act(scale * z + shift + identity)``, the identity as it is or with an affine of its own: a new dense tensor.

        The affines' own activations are not applied.
        """
        number = self.end_number(activation)
        if number is not None and identity.dtype == z.dtype:
            projection = (None, None) if identity_affine is None else identity_affine[:2]
            return self.ends.bn_add_act(z, *affine[:2], identity, *projection, number)
        y = _affine(z, affine)
        y += identity if identity_affine is None else _affine(identity, identity_affine)
        return reference.activate(y, activation).to(z.dtype)

    def bn_add_act_backward(
        self,
        grad: Tensor,
        mark: Tensor,
        z: Tensor,
        center: Tensor,
        identity: Optional[Tensor],
        identity_center: Optional[Tensor],
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``g = grad * act'``, in new memory, and the sums of g, of g times ``z - center`` and, where there is one with a norm,
        of g times ``identity - identity_center``. See `reference.marked_slope` for the mark."""
        number = self.end_number(activation)
        if number is not None and grad.dtype == z.dtype:
            return self.ends.bn_add_act_backward(grad, mark, z, center, identity, identity_center, number)
        wide = center.dtype
        g = grad.to(wide) * reference.marked_slope(mark.to(wide), activation)
        sum_g, sum_g_zc = self._sums(g, z, center)
        sum_g_ic = center.new_empty(0) if identity_center is None else self._sums(g, identity, identity_center)[1]
        return torch.empty_like(z).copy_(g), sum_g, sum_g_zc, sum_g_ic

    def activation_backward(self, grad: Tensor, mark: Optional[Tensor], activation: Activation) -> Tensor:
        """``grad * act'`` in new memory, for the identity ``grad`` itself. See `reference.marked_slope` for the mark."""
        number = self.end_number(activation)
        if number is None or activation.name == "identity" or grad.dtype != mark.dtype:
            return activation_backward(grad, mark, activation)
        return self.ends.add_act_backward(grad, mark, number)

    def norm_backward(self, g: Tensor, z: Tensor, fold: Fold, sum_g: Tensor, sum_g_zc: Tensor) -> ConvGrads:
        """The gradients of a norm that nothing activates: of its input, pending on ``g``, which stays as it is, and of its
        parameters."""
        return self._grads(z, fold, None, None, g, None, sum_g, sum_g_zc)

    def bn_act_pool(self, x: Tensor, affine: Affine, pool: Pool) -> tuple[Tensor, Optional[Tensor]]:
        """``pool(act(scale * x + shift))``, a new dense tensor in the layout of ``x``.

        Of maxima also, where a backend keeps them, the numbers of their places in their windows (uint8).
        """
        return dense_map(reference.pool(self.bn_act(x, affine), pool)), None

    def bn_act_pool_backward(
        self, grad: Tensor, taps: Optional[Tensor], x: Tensor, fold: Fold, pool: Pool, into: Optional[Pending]
    ) -> ConvGrads:
        """As `bn_act_conv_backward`, from the gradient of what `bn_act_pool` returned, which is dense."""
        dy = unpool(grad, self.bn_act(x, fold.affine), pool).contiguous(memory_format=memory_format_of(x))
        return self.norm_act_backward(dy, x, fold, into)

    def norm_act_backward(self, dy: Tensor, x: Tensor, fold: Optional[Fold], into: Optional[Pending]) -> ConvGrads:
        """As `bn_act_conv_backward`, from the gradient of the activation's output, which is changed where there is no ``into``; without
        a ``fold`` that is the gradient of ``x``."""
        if fold is None:
            if into is None:
                into = self.pending(dy, x)
            else:
                into.dy.add_(dy)
            return ConvGrads(into, None, None, None, None)
        if into is None:
            sums = self.bn_act_backward(dy, x, fold.affine, fold.mean)
        else:
            sums = self.bn_act_backward_accumulate(into.dy, dy, x, fold.affine, fold.mean)
        return self._grads(x, fold, None, None, dy, into, *sums)

    def avg_pool(self, x: Tensor, pool: Pool) -> Tensor:
        """``pool(x)``, a new dense tensor in the layout of ``x``, of which a slice of channels is never copied as a whole."""
        out = empty_map(x, x.shape[1], x.dtype, pool.outputs(x.shape[2:]))
        for part in self.chunks(x):
            out[part] = reference.pool(x[part], pool)
        return out

    def avg_pool_backward_accumulate(self, out: Tensor, grad: Tensor, x: Tensor, pool: Pool) -> None:
        """Adds to ``out`` the gradient of ``x`` from that of what `avg_pool` returned."""
        for part in self.chunks(x):
            out[part].add_(unpool(grad[part], x[part], pool))

    def _grads(
        self,
        x: Tensor,
        fold: Optional[Fold],
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        dy: Optional[Tensor],
        into: Optional[Pending],
        sum_dy: Optional[Tensor],
        sum_dy_xc: Optional[Tensor],
    ) -> ConvGrads:
        """Makes of the sums the norm's gradients and its correction of the gradient of ``x``."""
        if fold is None:
            return ConvGrads(into or self.pending(dy, x), weight, bias, None, None)
        dgamma, beta, delta = self._correct(fold, sum_dy, sum_dy_xc, into)
        if into is None:
            # Of a layer's own: alpha is that of its norm.
            into = Pending(dy, x, fold.affine.scale, beta, delta)
        return self._of_groups(fold, ConvGrads(into, weight, bias, dgamma, sum_dy))

    @staticmethod
    def _of_groups(fold: Optional[Fold], grads: ConvGrads) -> ConvGrads:
        """With the correction that the norm of groups owes the gradient of its input, where the norm is one."""
        if fold is not None and fold.groups is not None:
            into = grads.input
            for to, more in zip((into.beta, into.delta), fold.correction_of_groups(grads.norm_bias, grads.norm_weight)):
                to.add_(more)
        return grads

    def _correct(
        self, fold: Fold, sum_dy: Tensor, sum_dy_xc: Tensor, into: Optional[Pending]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the norm's weight, and ``(beta, delta)`` of the gradient of the norm's input: those of ``into``, to
        which the norm's are added, or new ones."""
        dgamma = fold.rstd * sum_dy_xc
        if fold.count is None:
            beta, delta = dgamma.new_zeros((2, len(dgamma))) if into is None else (into.beta, into.delta)
        else:
            beta, delta = fold.correction(sum_dy, dgamma)
            if into is not None:
                beta, delta = into.beta.add_(beta), into.delta.add_(delta)
        return dgamma, beta, delta

    @staticmethod
    def _masked(grad: Tensor, x: Tensor, affine: Affine) -> Tensor:
        wide = affine.scale.dtype
        return grad.to(wide) * reference.activation_slope(_affine(x, affine), affine.activation)

    @staticmethod
    def _sums(dy: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        reduced = [d for d in range(x.dim()) if d != 1]
        return dy.sum(reduced), (dy * (x.to(dy.dtype) - reference.per_channel(center, x))).sum(reduced)


def empty_deviations(x: Tensor) -> Tensor:
    """Uninitialised memory for `ReferenceBackend.deviations`; rows of a multiple of 16 bytes suit the matrix units."""
    channels = x.shape[1]
    return x.new_empty((x.numel() // channels, -(-(channels + 2) // 8) * 8))


def _add_up(total: list[Optional[Tensor]], parts: Sequence[Optional[Tensor]]) -> None:
    """``total += parts``, one by one and in a wide dtype; a sum begins as None, and remains it where there is nothing to add."""
    for i, new in enumerate(parts):
        if new is not None:
            total[i] = new if total[i] is None else new + total[i].to(accumulation_dtype(new.dtype))


def _affine(x: Tensor, affine: Affine) -> Tensor:
    """``scale * x + shift`` in the dtype of the affine."""
    return reference.per_channel(affine.scale, x) * x.to(affine.scale.dtype) + reference.per_channel(affine.shift, x)


def unpool(grad: Tensor, y: Tensor, pool: Pool) -> Tensor:
    """The gradient of `reference.pool` of ``y``, by the framework's kernels for more spatial dimensions where it has none for
    so few."""
    if pool.kind == "global":
        return (grad / y[0, 0].numel()).expand(y.shape)
    rank = max(y.dim() - 2, 2 if pool.kind == "average" else 3)
    missing = rank + 2 - y.dim()
    wide = accumulation_dtype(y.dtype)  # in 16 bits these add up in 16 bits
    grad, deep = (t.reshape(*t.shape[:2], *[1] * missing, *t.shape[2:]).to(wide) for t in (grad, y))
    fill = ((1,) * missing, (1,) * missing, (0,) * missing)
    windows = [[*of, *sizes] for of, sizes in zip(fill, pool.windows)]
    if pool.kind == "average":
        if deep.is_cuda:
            # There torch's kernel for channels-last maps is wrong where windows overlap (2.11).
            grad, deep = grad.contiguous(), deep.contiguous()
        backward = torch.ops.aten.avg_pool2d_backward if rank == 2 else torch.ops.aten.avg_pool3d_backward
        result = backward(grad, deep, *windows, pool.ceil_mode, True, None)
    else:
        _, places = torch.ops.aten.max_pool3d_with_indices(deep, *windows)
        result = torch.ops.aten.max_pool3d_with_indices_backward(grad, deep, *windows, [1, 1, 1], False, places)
    return result.reshape(y.shape).to(y.dtype)
