"""Residual blocks one after another as autograd sees them: one node, whatever their number and what is inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops import residual_block as engine
from resdense_ext.ops.by_reference import by_reference, differentiable, gradients
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.instances import are_instances, gathered_gradients, joined, parts_of, shape_of_statistics, sizes_of_parts
from resdense_ext.ops.layout import as_convolved
from resdense_ext.ops.ranks import check_one_process
from resdense_ext.ops.residual_maps import (
    ResidualBlockConfig,
    counts_of,
    norms_of,
    plan_of,
    reads_out,
    shape_behind,
    units_of,
)
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.ops.units import UNIT, beside_statistics, flat_tensors, parameters_of
from resdense_ext.reference import Activation, ResidualBlock

__all__ = ["Remember", "afresh", "residual_stage"]

_Tensors = Sequence[Optional[Tensor]]


class ResidualStageFunction(torch.autograd.Function):
    """Keeps the input, every output that is another block's input or that backward reads, the statistics, and the maps that the
    policies keep."""

    @staticmethod
    def forward(
        ctx,
        configs: Sequence[ResidualBlockConfig],
        counts: Sequence[Sequence[int]],
        blocks: Sequence[ResidualBlock],
        keeps: bool,
        x: Tensor,
        *flat,
    ):
        tensors = _split(flat, [UNIT * len(config.eps) for config in configs])
        apart = configs[0].instance
        parts = sizes_of_parts(x, _largest(x.shape, blocks)) if apart else [len(x)]
        outs, kept_of_parts = [], []
        with without_autocast(x.device):
            for part in parts_of(x, parts):
                call = partial(_forward, part, tensors, configs, keeps)
                xs, out, *found = engine.run.as_one(configs, [part], tensors, call, keeps)
                stats, kept = found[::2], found[1::2]
                outs.append([out])
                kept_of_parts += [*xs, *chain(*stats, *kept)]
                del out
        (out,) = joined(outs)
        # Here, before anything is packed: a checkpoint's recomputation may stop at the packing, and counts all the same.
        if not apart:
            _update_running_statistics(blocks, configs, counts, stats)
        ctx.configs, ctx.counts, ctx.parts = configs, [list(map(len, each)) for each in (tensors, stats, kept)], parts
        _, last = configs[-1].activations
        ctx.save_for_backward(out if reads_out(last) else None, x, *flat, *kept_of_parts)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        why = "a residual block's output tells the derivative of its activation, and its input is the block's input"
        saved = iter(saved_tensors(ctx, "residual_block", why))
        out, x = islice(saved, 2)
        tensors = _split(saved, ctx.counts[0])
        needs, wanted = [], ctx.needs_input_grad[4]
        for of_block in _split(ctx.needs_input_grad[5:], ctx.counts[0]):
            needs.append([wanted, *parameters_of(of_block)])
            wanted = any(needs[-1])
        asked = [needs[0][0], *(need for of_block in needs for need in of_block[1:])]
        numbers = [(*config, need) for config, need in zip(ctx.configs, needs)]

        def of_part(grad: Tensor, out: Optional[Tensor], x: Tensor) -> list[Tensor]:
            xs = [x, *islice(saved, len(ctx.configs) - 1)]
            stats, kept = (_split(saved, sizes) for sizes in ctx.counts[1:])
            call = partial(_backward, grad, out, xs, tensors, ctx.configs, stats, kept, needs)
            return engine.run_backward.as_one(numbers, [grad, out, *xs], [*tensors, *stats, *kept], call)

        if by_reference(grad):
            found = _differentiable_backward(grad, x, tensors, ctx.configs, asked)
        else:
            with without_autocast(grad.device):
                parts = map(of_part, *(parts_of(t, ctx.parts) for t in (grad, out, x)))
                found = gathered_gradients(parts, 1)
        of_x, *values = [value if need else None for value, need in zip(found, asked)]
        return None, None, None, None, of_x, *beside_statistics(values)


def _largest(shape: Sequence[int], blocks: Sequence[ResidualBlock]) -> int:
    """The bytes of a sample's largest map."""
    values, shape = math.prod(shape[1:]), (1, *shape[1:])
    for block in blocks:
        widths = (conv.weight.shape[0] for _, conv in units_of(block) if conv is not None)
        values = max(values, max(widths) * max(counts_of(shape, block)))
        shape = shape_behind(shape, block)
    return blocks[0].units[0].conv.weight.itemsize * values


def _split(flat: Iterable, sizes: Sequence[int]) -> list[list]:
    rest = iter(flat)
    return [list(islice(rest, size)) for size in sizes]


def _forward(
    x: Tensor, tensors: Sequence[_Tensors], configs: Sequence[ResidualBlockConfig], keeps: bool
) -> tuple[Tensor | list[Tensor], ...]:
    """The outputs of all blocks but the last, to keep them, and that of the last; of every block the statistics and the maps that
    are kept."""
    xs: list[Tensor] = []
    found: list[list[Tensor]] = []
    for i, (config, of_block) in enumerate(zip(configs, tensors)):
        if i and keeps:
            xs.append(x)
        x, *of_block = engine.run.operator(x, of_block, *config)
        found += of_block
    return xs, x, *found


def _backward(
    grad: Tensor,
    out: Optional[Tensor],
    xs: Sequence[Tensor],
    tensors: Sequence[_Tensors],
    configs: Sequence[ResidualBlockConfig],
    stats: Sequence[_Tensors],
    kept: Sequence[_Tensors],
    needs: Sequence[Sequence[bool]],
) -> list[Tensor]:
    """The gradients of x and of the blocks' parameters; empty tensors for those that are not asked for."""
    found: list[list[Tensor]] = []
    for i in reversed(range(len(xs))):
        if any(needs[i]):
            _, last = configs[i].activations
            mark = out if i + 1 == len(xs) else xs[i + 1] if reads_out(last) else None
            grad, *of_block = engine.run_backward.operator(
                grad, mark, xs[i], tensors[i], *configs[i], stats[i], kept[i], needs[i]
            )
        else:
            grad, *of_block = [xs[i].new_empty(0) for _ in needs[i]]
        found.append(of_block)
    return [grad, *chain(*reversed(found))]


def _update_running_statistics(
    blocks: Sequence[ResidualBlock],
    configs: Sequence[ResidualBlockConfig],
    counts: Sequence[Sequence[int]],
    stats: Sequence[_Tensors],
) -> None:
    if not any(any(config.batch_stats) for config in configs):
        return
    norms, pairs, totals = [], [], []
    for block, config, of_block in zip(blocks, configs, stats):
        of_norms = norms_of(block)
        norms += of_norms
        pairs += zip(of_block[::2], of_block[1::2])
        totals += of_block[-1].split(1) if config.group else [None] * len(of_norms)
    update_running_statistics(norms, pairs, [*chain(*counts)], totals)


@differentiable
def _differentiable_backward(grad, x, tensors, configs, needs, create_graph) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference, of aliases as in a dense block's."""
    for config in configs:
        check_one_process(config.group)
    x = x.view_as(x)
    tensors = [[t if t is None else t.view_as(t) for t in of_block] for of_block in tensors]
    inputs = [x, *chain(*map(parameters_of, tensors))]
    parts = x.split(1) if configs[0].instance else [x]
    for config, of_block in zip(configs, tensors):
        parts = [reference.residual_block(part, config.block(of_block), *config.activations) for part in parts]
    return gradients([torch.cat(parts)], [grad], inputs, needs, create_graph)


class _Node(NamedTuple):
    """Which blocks are in a node, the dtype that their input is to have, where another stands in front, and their numbers."""

    part: slice
    dtype: Optional[torch.dtype]
    keeps: bool
    configs: list[ResidualBlockConfig]
    counts: list[list[int]]


Remember = Callable[[Hashable, Callable[[], Any]], Any]
"""Returns what the call returns, or returned when it was given the key before."""


def afresh(key: Hashable, call: Callable[[], Any]) -> Any:
    """Remembers nothing."""
    return call()


def residual_stage(
    x: Tensor,
    blocks: Sequence[ResidualBlock],
    activation: Activation,
    lasts: Sequence[Activation],
    policies: Sequence[str],
    remember: Remember = afresh,
) -> Tensor:
    """The checked call: see `resdense_ext.functional.residual_stage`. ``lasts`` are the activations behind the blocks' additions.

    What is the same for all blocks of these kinds and shapes of tensors is asked of ``remember``.
    """
    if x.numel() == 0:
        for block, last in zip(blocks, lasts):
            conv, norm = block.units[0].conv, block.units[0].norm
            x = reference.residual_block(x.to(conv.weight.dtype) if norm is None else x, block, activation, last)
        return x
    tensors = [flat_tensors(units_of(block)) for block in blocks]
    wanted = [[t is not None and t.requires_grad for t in of_block] for of_block in tensors]
    dtypes = [block.units[0].conv.weight.dtype for block in blocks]
    names = {dtype: backends.choose(x, dtype).name for dtype in dtypes}
    key = (
        *(x.shape, x.requires_grad, torch.is_grad_enabled(), tuple(map(tuple, wanted)), tuple(dtypes), tuple(names.values())),
        *(activation, tuple(lasts), tuple(policies)),
    )
    for node in remember(key, lambda: _nodes(x, blocks, activation, lasts, policies, wanted, names)):
        x = x if node.dtype is None else x.to(node.dtype)
        of_node = blocks[node.part]
        x = as_convolved(x, [unit.conv.weight for block in of_node for unit in block.units])
        x = ResidualStageFunction.apply(node.configs, node.counts, of_node, node.keeps, x, *chain(*tensors[node.part]))
    return x


def _nodes(
    x: Tensor,
    blocks: Sequence[ResidualBlock],
    activation: Activation,
    lasts: Sequence[Activation],
    policies: Sequence[str],
    wanted: Sequence[Sequence[bool]],
    backend_names: dict[torch.dtype, str],
) -> list[_Node]:
    """In one node are neighbours that compute in one dtype, of what their input is or of what is made of it, those whose norms
    normalise the batch or every sample, and those behind the first of which something wants a gradient: the others keep nothing."""
    keeps = [torch.is_grad_enabled() and (x.requires_grad or any(map(any, wanted[: i + 1]))) for i in range(len(blocks))]
    apart = [are_instances(norms_of(block)) for block in blocks]
    firsts = [block.units[0] for block in blocks]
    kinds = [(unit.conv.weight.dtype, unit.norm is None, *rest) for unit, *rest in zip(firsts, keeps, apart)]
    ends = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    nodes, shape = [], x.shape
    for begin, end in zip([0, *ends], [*ends, len(kinds)]):
        dtype, raw, kept, of_samples = kinds[begin]
        node = _Node(slice(begin, end), dtype if raw else None, kept, [], [])
        shape = shape_of_statistics(shape, of_samples)
        for block, last, policy in zip(blocks[node.part], lasts[node.part], policies[node.part]):
            plan = plan_of(shape, block, last, policy if kept else "min")
            node.configs.append(ResidualBlockConfig.of(block, activation, last, plan, backend_names[dtype]))
            node.counts.append(counts_of(shape, block))
            shape = shape_behind(shape, block)
        shape = (len(x), *shape[1:])
        nodes.append(node)
    return nodes
