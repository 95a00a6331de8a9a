"""The residual block: raw outputs of convolutions, each normalised and activated by whoever reads it, and one pass at the end.

The maps of a block of n convolutions are its input ``map_0 = x``, the raw outputs ``map_1 .. map_n`` of the convolutions, and
that of its projection, ``map_{n+1}``. Norm i reads map i::

    map_{i+1} = conv_{i+1}(act(norm_i(map_i)))       of map_i as it is where there is no such norm
    out       = last(norm_n(map_n) + shortcut)       the shortcut is x, or norm_{n+1}(map_{n+1})

The projection reads x, x as unit 1 activates it, or an average pool of x.

Backward begins with ``g = grad * last'``, which is the identity's gradient, and in which the gradient of x is added up; it goes
through the convolutions from the last to the first. Kept are x, the output where it tells ``last'``, and the maps that backward
reads ("fast") or none of them ("min"): then they are computed again, with the statistics that are known. The maps that only a
norm reads are mostly done without: see `resdense_ext.ops.residual_maps.plan_of`.

Source: He et al., Deep Residual Learning for Image Recognition, and Identity Mappings in Deep Residual Networks (2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.activation import LINEAR
from resdense_ext.ops.conv1x1_bn_add_act import Branch, Pointwise
from resdense_ext.ops.convolve import convolve_backward, finished, sampling
from resdense_ext.ops.instances import moments_backward
from resdense_ext.ops.layout import dense_map, empty_map, memory_format_of, walkable_map
from resdense_ext.ops.operands import ConvGrads, Fold, Pending, Stats
from resdense_ext.ops.operator import EngineOperator
from resdense_ext.ops.residual_maps import (
    SCHEMA,
    Maps,
    ResidualBlockConfig,
    norms_of,
    sizes_of,
    takes_stats,
)
from resdense_ext.ops.units import Gradients, parameters_of, wanted_gradients

__all__: list[str] = []


def _forward(x: Tensor, tensors, config: ResidualBlockConfig) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output; the statistics of all maps; the maps that are kept, and the activation's input where nothing else tells it."""
    x = walkable_map(x)
    maps = Maps(x, config.block(tensors), config)
    keep = [how == "kept" for how in config.plan]
    maps.compute(keep)
    kept = [z for z, wanted in zip(maps.maps[1:], keep) if wanted]
    if reference.determined(maps.last):
        out = maps.sum(maps.last)
    else:
        before = maps.sum(LINEAR)
        out = reference.activate(before, maps.last)
        if "again" not in config.plan:
            kept.append(before)
    return out, maps.statistics, kept


def _backward(
    grad: Tensor, out: Optional[Tensor], x: Tensor, tensors, config: ResidualBlockConfig, stats, kept, needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for; empty tensors for the rest."""
    x = walkable_map(x)
    grad = grad.contiguous(memory_format=memory_format_of(x))
    block, plan, kept = config.block(tensors), config.plan, iter(kept)
    walk = Maps(x, block, config, stats)
    backend, maps, units = walk.backend, walk.maps, walk.units
    if "again" in plan:
        walk.compute([True] * len(plan), [how != "again" for how in plan])
    else:
        maps[1:] = [next(kept) if how == "kept" else None for how in plan]
    if out is not None or walk.last.name == "identity":
        mark = grad if out is None else out
    else:
        mark = walk.sum(LINEAR) if "again" in plan else next(kept)
    grads = Gradients(needs)
    g, upstream = _end(grad, mark, walk, plan, grads)

    first, shortcut = block.units[0], block.shortcut
    into = None
    if needs[0] and shortcut is None:
        # A single convolution still reads g while it adds to the gradient of x.
        ours = g is not grad and units > 1
        into = backend.pending(g.to(x.dtype) if ours else g.to(x.dtype, copy=True), x)
    elif needs[0] and (first.norm is not None or sampling(first.conv) is not None):
        into = backend.pending(torch.zeros_like(x), x)
    for k in reversed(range(units)):
        last = k == units - 1
        if not grads.wants_up_to(units if last else k):
            break  # nothing before this point wants a gradient
        source = Pointwise(maps[k], walk.fold(k), block.units[k].conv, backend)
        found = _through(source, walk, k + 1, upstream.pop(units) if last else pending, None if k else into, grads, k)
        pending = found.input
        maps[k + 1] = None  # the gradient went past it
        if k == 0:
            into = pending
    if shortcut is not None:
        source, pool = walk.projected(walk.fold(0)), shortcut.pool
        target = into if pool is None else backend.pending(torch.zeros_like(source.x), source.x)
        found = _through(
            source, walk, units + 1, upstream.pop(units + 1), target if needs[0] else None, grads, units + 1
        )
        grads.record(0, found.norm_weight, found.norm_bias)
        if pool is not None and needs[0]:
            backend.avg_pool_backward_accumulate(into.dy, target.dy, x, pool)
    if needs[0]:
        grads.found[0] = backend.pending_grad_(walk.share_(0, into)) if takes_stats(walk.norms[0]) else into.dy
    return wanted_gradients(grads.found, [x], tensors)


class _Summed(NamedTuple):
    """A gradient and its sum over the positions of every channel."""

    g: Tensor
    sum: Tensor


_Upstream = Pending | Tensor | _Summed


def _end(
    grad: Tensor, mark: Tensor, walk: Maps, plan: Sequence[str], grads: Gradients
) -> tuple[Tensor, dict[int, _Upstream]]:
    """``g = grad * last'``, and the gradients of the two maps that are added up: pending behind their norms, or of a map that is
    done without g itself."""
    added = [k for k in walk.added() if k]
    upstream: dict[int, _Upstream] = {}
    normed = [k for k in added if walk.has_end(k) and plan[k - 1] != "moments"]
    g = grad
    if normed:
        # Of a map that backward does not need, any other serves.
        values = [(mark if walk.maps[k] is None else walk.maps[k], walk.fold(k)) for k in normed]
        operands = [(z, fold.mean) for z, fold in values] + [(None, None)]
        g, sum_g, *sums = walk.backend.bn_add_act_backward(grad, mark, *operands[0], *operands[1], walk.last)
        for k, (z, fold), sum_g_zc in zip(normed, values, sums):
            own_sum = sum_g.clone() if upstream else sum_g
            if plan[k - 1] == "weight":
                upstream[k] = _Summed(g, own_sum)
                continue
            ended = walk.backend.norm_backward(g, z, fold, own_sum, sum_g_zc)
            grads.record(k, ended.norm_weight, ended.norm_bias)
            upstream[k] = ended.input
    else:
        g = walk.backend.activation_backward(grad, mark, walk.last)
    for k in added:
        if k not in upstream:
            upstream[k] = g if walk.has_end(k) else walk.backend.pending(g, g)
    return g, upstream


def _through(
    source: Pointwise, walk: Maps, k: int, grad: _Upstream, into: Optional[Pending], grads: Gradients, unit: int
) -> ConvGrads:
    """Through the convolution of ``unit`` that writes map k, and what stands before it, as `convolve_backward`.

    Of a map that is added up, a gradient that is not pending is that behind the map's norm.
    """
    inside = unit < walk.units
    finish = inside and unit > 0 and not walk.shares(unit)  # what it reads is nobody else's
    if isinstance(grad, _Summed):
        needed = grads.wants_weight(unit) or grads.needs[1 + 4 * k]
        found, *of_norm = _behind_running_statistics(source, walk.fold(k), grad, into, needed, finish)
        grads.record(k, *of_norm)
    elif isinstance(grad, Pending) or not walk.has_end(k):
        grad = walk.share_(k, grad) if isinstance(grad, Pending) else grad
        if k < walk.units:  # else the other side of the addition reads it, too
            grad = finished(source.backend, source.x, source.conv, grad, grads.wants_weight(unit))
        norm = walk.norms[k]
        centered = norm is not None and norm.centers and not walk.shares(k)
        found = convolve_backward(walk.backend, *source[:3], grad, into, grads.wants_weight(unit), finish, centered)
    else:
        wants_input = grads.wants_up_to(unit - 1) or any(grads.needs[1 + 4 * unit : 3 + 4 * unit]) if inside else grads.needs[0]
        found, *of_norm = moments_backward(
            Branch(source, walk.fold(k)), grad, into, wants_input, grads.wants_weight(unit)
        )
        grads.record(k, *of_norm)
    if inside:
        grads.record(unit, found.norm_weight, found.norm_bias)
    grads.record(unit, None, None, found.weight, found.bias)
    return found


def _behind_running_statistics(
    source: Pointwise, fold: Fold, grad: _Summed, into: Optional[Pending], need_weight: bool, finish: bool
) -> tuple[ConvGrads, Optional[Tensor], Tensor]:
    """Through ``scale * (W a + b) + shift`` with ``g``, the gradient of what it gives: `convolve_backward`'s, and those of the norm.

    With ``G = g^T a``, the gradient of W without the norm, the sum of ``g * W a`` of a channel is that of ``W * G``::

        da = (scale W)^T g        dW = scale G        dgamma = rstd (sum(W * G) + (b - mean) sum g)
    """
    weight, bias, scale = source.conv.weight, source.conv.bias, fold.affine.scale
    of_rows = scale.view(-1, *[1] * (weight.dim() - 1))
    conv = source.conv._replace(weight=(weight * of_rows).to(weight.dtype), bias=None)
    pending = source.backend.pending(grad.g, grad.g)
    found = convolve_backward(source.backend, source.x, source.fold, conv, pending, into, need_weight, finish)
    of_norm = None
    if need_weight:
        G = found.weight.to(scale.dtype)
        from_zero = -fold.mean if bias is None else bias - fold.mean
        of_norm = fold.rstd * ((weight * G).flatten(1).sum(1) + from_zero * grad.sum)
        found = found._replace(weight=G.mul_(of_rows), bias=None if bias is None else scale * grad.sum)
    return found, of_norm, grad.sum


def _targets(x: Tensor, tensors) -> list[Optional[Tensor]]:
    """What gradients are of: x, and `GRADS` of every unit."""
    return [x, *parameters_of(tensors)]


def _residual_block(x: Tensor, tensors, *numbers) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return _forward(x, tensors, ResidualBlockConfig(*numbers))


def _residual_block_backward(grad: Tensor, out: Optional[Tensor], x: Tensor, tensors, *rest) -> list[Tensor]:
    *numbers, stats, kept, needs = rest
    return _backward(grad, out, x, tensors, ResidualBlockConfig(*numbers), stats, kept, needs)


def _residual_block_fake(x: Tensor, tensors, *numbers) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    config = ResidualBlockConfig(*numbers)
    block = config.block(tensors)
    maps = [x]
    for unit, sizes in zip(block.units, sizes_of(x.shape, block)[1:]):
        maps.append(empty_map(x, unit.conv.weight.shape[0], unit.conv.weight.dtype, sizes))
    identity = x if block.shortcut is None else torch.empty_like(maps[-1])
    dtype = torch.promote_types(maps[-1].dtype, identity.dtype) if block.norm is None else maps[-1].dtype
    out = torch.empty_like(maps[-1], dtype=dtype)
    read = zip([*maps, identity], norms_of(block))
    stats = [t for z, norm in read for t in Stats.room(z, norm, len(z) if config.instance else 1)]
    if config.group:
        stats.append(x.new_empty(len(maps) + 1, dtype=torch.float64))
    kept = [z for z, how in zip([*maps[1:], identity], config.plan) if how == "kept"]
    if "again" not in config.plan and not reference.determined(config.activations[1]):
        kept.append(torch.empty_like(out))
    return out, stats, kept


def _residual_block_backward_fake(grad: Tensor, out: Optional[Tensor], x: Tensor, tensors, *rest) -> list[Tensor]:
    return [
        torch.empty_like(target) if need else x.new_empty(0)
        for target, need in zip(_targets(dense_map(x), tensors), rest[-1])
    ]


run = EngineOperator(f"residual_block(Tensor x, {SCHEMA}) -> (Tensor out, Tensor[] stats, Tensor[] kept)", _residual_block, _residual_block_fake)
run_backward = EngineOperator(
    f"residual_block_backward(Tensor grad, Tensor? out, Tensor x, {SCHEMA}, Tensor[] stats, Tensor[] kept, bool[] needs) "
    "-> Tensor[]",
    _residual_block_backward,
    _residual_block_backward_fake,
)
