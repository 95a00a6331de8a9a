"""The compiled operators' Python side: fake kernels, and the reference where CUDA alone has a compiled kernel."""

from __future__ import annotations

import torch

from resdense_ext import reference
from resdense_ext.ops._library import CPU_LIBRARY, LIBRARY
from resdense_ext.ops.activation import activation_backward, activation_numbered
from resdense_ext.reference import Conv, accumulation_dtype

__all__: list[str] = []


def _vectors(like: torch.Tensor, channels: int, count: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(like.new_empty(channels, dtype=accumulation_dtype(like.dtype)) for _ in range(count))


def _channel_stats(x):
    return _vectors(x, x.shape[1])


def _channel_stats_into(x, mean, m2):
    return None


def _bn_fold(mean, m2, count, eps, weight, bias):
    return tuple(torch.empty_like(mean) for _ in range(3))


def _bn_folds(mean, m2, count, eps, weight, bias):
    return mean[0].new_empty((3, sum(-(-len(v) // 4) * 4 for v in mean)))


def _bn_correction(sum_dy, sum_dy_xc, scale, mean, rstd, count, beta, delta, accumulate):
    return torch.empty_like(mean)


def _bn_act(x, scale, shift, activation, out):
    return None


def _bn_act_sums(grad, x, scale, shift, center, activation):
    return _vectors(x, x.shape[1])


def _bn_act_backward(grad, x, scale, shift, center, activation):
    return _vectors(x, x.shape[1])


def _bn_act_backward_accumulate(out, grad, x, scale, shift, center, activation):
    return _vectors(x, x.shape[1])


def _pending_grad(dy, z, alpha, beta, delta, shift=None, activation=1.0):
    return None


def _finished_grad(dy, z, alpha, beta, delta):
    return torch.empty_like(dy)


def _copy_map(x, out):
    return None


def _bn_act_conv1x1(
    x, scale, shift, activation, weight, bias, out, mean, m2, eps=None, reader_weight=None, reader_bias=None
):
    return (None,) * 3 if eps is None else _vectors(out, out.shape[1], 3)


def _bn_act_conv1x1_backward(
    x, scale, shift, center, activation, weight, dy, z, alpha, beta, delta, out, accumulate, need_weight
):
    outputs, inputs = weight.shape
    dweight = weight.new_empty((outputs if need_weight else 0, inputs), dtype=accumulation_dtype(weight.dtype))
    return dweight, *_vectors(x, inputs)


def _conv1x1_moments(x, scale, shift, activation, near, grad):
    inputs, outputs = x.shape[1], grad.shape[1]
    rest, sum_grad = (x.new_empty(channels, dtype=torch.float64) for channels in (inputs, outputs))
    products, grad_products = (x.new_empty((n, inputs), dtype=accumulation_dtype(x.dtype)) for n in (inputs, outputs))
    return rest, products, sum_grad, grad_products


def _conv1x1_moments_terms(rest, products, sum_grad, grad_products, weight, scale, rstd, count, need_weight):
    outputs, inputs = weight.shape
    dweight = weight.new_empty((outputs if need_weight else 0, inputs))
    terms, offset = weight.new_empty((inputs, inputs)), weight.new_empty(inputs, dtype=accumulation_dtype(weight.dtype))
    return torch.empty_like(rstd), dweight, torch.empty_like(weight), terms, offset


def _conv1x1_moments_backward(
    x, scale, shift, center, activation, grad, weight, products, near, offset, out, accumulate
):
    return _vectors(x, x.shape[1])


def _bn_act_winograd(x, scale, shift, activation, weight, bias, out, mean, m2):
    return None


def _bn_act_winograd_backward(
    x, scale, shift, center, activation, weight, dy, z, alpha, beta, delta, out, accumulate, need_weight
):
    outputs, inputs = weight.shape[:2]
    return weight.new_empty((outputs if need_weight else 0, 3, 3, inputs), dtype=torch.float32), *_vectors(x, inputs)


def _bn_act_conv3x3(
    x, scale, shift, activation, weight, out, mean, m2,
    eps=None, reader_weight=None, reader_bias=None, before_mean=None, before_m2=None, ticket=None,
):  # fmt: skip
    if eps is None:
        return (None,) * 3
    return _vectors(out, out.shape[1] + (0 if before_mean is None else len(before_mean)), 3)


def _bn_act_conv(
    x, scale, shift, activation, weight, bias, stride, padding, dilation, groups, fuse, scratch, out, mean, m2,
    eps=None, reader_weight=None, reader_bias=None, before_mean=None, before_m2=None, ticket=None,
):  # fmt: skip
    return (None,) * 3 if eps is None or before_mean is not None else _vectors(out, out.shape[1], 3)


def _bn_act_conv_backward(
    x, scale, shift, center, rstd, count, activation, weight, stride, padding, dilation, groups, fuse, scratch,
    grad, z, alpha, beta, delta, out, out_beta, out_delta, finish, need_weight, need_bias, overwrite=False,
):  # fmt: skip
    norm = _vectors(x, x.shape[1], 4) if scale is not None else (None,) * 4
    correction = norm[2:] if out is None and not finish else (None, None)
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = weight.new_empty(len(weight)) if need_bias else None
    return torch.empty_like(x) if out is None else None, *correction, dweight, dbias, *norm[:2]


def _bn_act_conv1x1_weight_backward(
    grad, x, scale, shift, activation, z=None, alpha=None, beta=None, delta=None, overwrite=False
):
    return _weight_parts(x, grad, z, (grad.shape[1], x.shape[1]))


def _bn_act_conv3x3_weight_backward(
    grad, x, scale, shift, activation, z=None, alpha=None, beta=None, delta=None, overwrite=False
):
    return _weight_parts(x, grad, z, (grad.shape[1], 3, 3, x.shape[1]))


def _weight_parts(x, grad, z, sizes):
    # As many splits as the device makes of the positions.
    splits = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((splits, *sizes), dtype=torch.float32), None if z is None else torch.empty_like(grad)


def _bn_act_conv1x1_data_backward(
    grad, x, scale, shift, center, rstd, count, activation, weight, out, beta, delta, accumulate, parts=None
):
    return *_vectors(x, x.shape[1]), None if parts is None else x.new_empty(parts.shape[1:])


def _bn_act_conv3x3_data_backward(*operands):
    return _bn_act_conv1x1_data_backward(*operands)


def _add_act(x, y, activation):
    return torch.empty_like(x)


def _add_act_backward(grad, out, activation):
    return torch.empty_like(out)


def _bn_add_act(z, scale, shift, identity, identity_scale, identity_shift, activation):
    return torch.empty_like(z)


def _bn_add_act_backward(grad, out, z, center, identity, identity_center, activation):
    sums = _vectors(z, z.shape[1])
    return torch.empty_like(out), *sums, *_vectors(z, 0 if identity is None else z.shape[1], 1)


def _copy_map_cpu(x, out):
    if x.shape != out.shape:
        raise RuntimeError(f"out: expected shape {tuple(x.shape)} (that of x), got {tuple(out.shape)}")
    out.copy_(x)


def _bn_act_conv3x3_cpu(
    x, scale, shift, activation, weight, out, mean, m2,
    eps=None, reader_weight=None, reader_bias=None, before_mean=None, before_m2=None, ticket=None,
):  # fmt: skip
    activated = reference.apply_pending(x, scale, shift, activation_numbered(activation))
    out.copy_(reference.convolution(activated, Conv(weight, padding=(1, 1))))
    if mean is not None:
        for to, found in zip((mean, m2), reference.channel_stats(out)):
            to.copy_(found)
    if eps is None:
        return None, None, None
    if before_mean is not None:
        mean, m2 = torch.cat([before_mean, mean]), torch.cat([before_m2, m2])
    return torch.ops.resdense.bn_fold(mean, m2, out.numel() / out.shape[1], eps, reader_weight, reader_bias)


def _weight_operands(grad, x, scale, shift, activation, z=None, alpha=None, beta=None, delta=None, overwrite=False):
    """The gradient and the activation in the dtype of sums, and the finished gradient, if it was pending."""
    activated = reference.apply_pending(x, scale, shift, activation_numbered(activation))
    finished = None if z is None else torch.ops.resdense.finished_grad(grad, z, alpha, beta, delta)
    wide = accumulation_dtype(x.dtype)
    return (grad if finished is None else finished).to(wide), activated.to(wide), finished


def _bn_act_conv1x1_weight_backward_cpu(*operands):
    grad, activated, finished = _weight_operands(*operands)
    grad, activated = (t.transpose(0, 1).flatten(1) for t in (grad, activated))
    return (grad @ activated.T)[None].float(), finished


def _bn_act_conv1x1_data_backward_cpu(grad, x, scale, shift, center, rstd, count, activation, weight, *into):
    wide = accumulation_dtype(x.dtype)
    product = torch.einsum("nk...,kc->nc...", grad.to(wide), weight.to(wide))
    return _masked(product, x, scale, shift, center, rstd, count, activation, *into)


def _bn_act_conv3x3_weight_backward_cpu(*operands):
    grad, activated, finished = _weight_operands(*operands)
    sizes = grad.shape[1], activated.shape[1], 3, 3
    dweight = torch.nn.grad.conv2d_weight(activated, sizes, grad, padding=1).movedim(1, -1)
    return dweight[None].float().contiguous(), finished


def _bn_act_conv3x3_data_backward_cpu(grad, x, scale, shift, center, rstd, count, activation, weight, *into):
    wide = accumulation_dtype(x.dtype)
    product = torch.nn.functional.conv_transpose2d(grad.to(wide), weight.to(wide), padding=1)
    return _masked(product, x, scale, shift, center, rstd, count, activation, *into)


def _masked(product, x, scale, shift, center, rstd, count, activation, out, beta, delta, accumulate, parts=None):
    wide = product.dtype
    by, plus, middle = (reference.per_channel(v, x) for v in (scale, shift, center))
    dy = activation_backward(product, by * x.to(wide) + plus, activation_numbered(activation))
    out.copy_(out.to(wide) + by * dy if accumulate else dy)
    positions = [d for d in range(x.dim()) if d != 1]
    sums = dy.sum(positions), (dy * (x.to(wide) - middle)).sum(positions)
    dgamma = torch.ops.resdense.bn_correction(*sums, scale, center, rstd, count, beta, delta, accumulate)
    return dgamma, sums[0], None if parts is None else parts.sum(0).to(x.dtype)


def _add_act_cpu(x, y, activation):
    return reference.add_act(x, y, activation_numbered(activation))


def _add_act_backward_cpu(grad, out, activation):
    if activation < 0:
        raise RuntimeError(f"activation: expected no negative slope, as the sign is told from the output, got {activation}")
    dx = activation_backward(grad, out, activation_numbered(activation))
    return dx.clone() if dx is grad else dx


if CPU_LIBRARY is None:  # else there are no such operators
    for fake in (
        _channel_stats,
        _channel_stats_into,
        _bn_fold,
        _bn_folds,
        _bn_correction,
        _bn_act,
        _bn_act_sums,
        _bn_act_backward,
        _bn_act_backward_accumulate,
        _pending_grad,
        _finished_grad,
        _copy_map,
        _bn_act_conv1x1,
        _bn_act_conv1x1_backward,
        _conv1x1_moments,
        _conv1x1_moments_terms,
        _conv1x1_moments_backward,
        _bn_act_winograd,
        _bn_act_winograd_backward,
        _bn_act_conv3x3,
        _bn_act_conv,
        _bn_act_conv_backward,
        _bn_act_conv1x1_weight_backward,
        _bn_act_conv1x1_data_backward,
        _bn_act_conv3x3_weight_backward,
        _bn_act_conv3x3_data_backward,
        _add_act,
        _add_act_backward,
        _bn_add_act,
        _bn_add_act_backward,
    ):
        torch.library.register_fake(f"resdense::{fake.__name__[1:]}", fake, lib=LIBRARY)
    for kernel in (
        _copy_map_cpu,
        _bn_act_conv3x3_cpu,
        _bn_act_conv1x1_weight_backward_cpu,
        _bn_act_conv1x1_data_backward_cpu,
        _bn_act_conv3x3_weight_backward_cpu,
        _bn_act_conv3x3_data_backward_cpu,
        _add_act_cpu,
        _add_act_backward_cpu,
    ):
        LIBRARY.impl(kernel.__name__[1:-4], kernel, "CPU")
