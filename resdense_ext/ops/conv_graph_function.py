"""A graph of convolutions as autograd sees it: one node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops.by_reference import by_reference, differentiable, gradients
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.conv_graph import backward, forward
from resdense_ext.ops.conv_graph_plan import kept_maps, map_of_norm, positions_of, widths_of
from resdense_ext.ops.instances import are_instances, backend_of, gathered_gradients, joined, parts_of, sizes_of_parts
from resdense_ext.ops.layout import as_convolved, walkable_map
from resdense_ext.ops.operands import Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.replay import Groups, layout_of, may_replay, replayed
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import taken_tensors
from resdense_ext.ops.units import UNIT, beside_statistics, flat_tensors, parameters_of
from resdense_ext.reference import BatchNorm, ConvGraph, Resampling

__all__ = ["conv_graph"]


class ConvGraphFunction(torch.autograd.Function):
    """Keeps the maps that `kept_maps` names, sources among them, as their convolutions wrote them, and the statistics of those with
    norms; where the policy is "none", no map."""

    @staticmethod
    def forward(ctx, graph: ConvGraph, backend: ReferenceBackend, policy: str | Sequence[bool], count: int, *tensors):
        sources, tensors = [walkable_map(x) for x in tensors[:count]], list(tensors[count:])
        apart = are_instances(graph.norms)
        parts = sizes_of_parts(sources[0], _largest(sources, graph)) if apart else [len(sources[0])]
        shape = _around(graph, [None] * len(tensors))
        kept = set() if policy == "none" else kept_maps(sources, graph, _needs(ctx, count), policy)

        def of_part(*sources: Tensor) -> tuple[list[Tensor], list[Optional[Tensor]], list[Tensor]]:
            of_samples = backend_of(backend.name, len(sources[0]), apart)
            outputs, maps, stats = forward(sources, _around(shape, tensors), of_samples, kept)
            maps = [x if i < count or i in kept else None for i, x in enumerate(maps)]
            return outputs, maps, [vector for of_map in stats for vector in of_map]

        outputs_of_parts, kept_of_parts = [], []
        with without_autocast(sources[0].device):
            for part in zip(*(parts_of(x, parts) for x in sources)):
                key = "conv_graph", shape, frozenset(kept), tuple(map(layout_of, part))
                outputs, maps, vectors = _run(backend, key, (part, tensors), partial(of_part, *part))
                outputs_of_parts.append(outputs)
                kept_of_parts += [*maps[count:], *vectors]
                del outputs
        # Here, before anything is packed: a checkpoint's recomputation may stop at the packing, and counts all the same.
        if not apart:
            of, positions = map_of_norm(graph), positions_of(sources, graph)
            reads = [of[norm] for norm in range(len(graph.norms))]
            stats = list(map(Stats, vectors[::2], vectors[1::2]))
            update_running_statistics(graph.norms, [stats[i] for i in reads], [positions[i] for i in reads])
        ctx.set_materialize_grads(False)
        ctx.graph, ctx.backend, ctx.count, ctx.parts, ctx.vectors = shape, backend, count, parts, len(vectors)
        sources = [None if read is None else x for x, read in zip(sources, maps)]
        ctx.save_for_backward(*tensors, *sources, *kept_of_parts)
        return tuple(joined(outputs_of_parts))

    @staticmethod
    def backward(ctx, *upstream: Optional[Tensor]):
        why = "what a convolution of it reads is computed again from its inputs"
        saved = taken_tensors(ctx, "conv_graph", why)
        saved.reverse()
        convs, count = len(ctx.graph.convs), ctx.count
        units = convs + len(ctx.graph.norms) + len(ctx.graph.slopes)

        def next_ones(size: int) -> list[Optional[Tensor]]:
            return [saved.pop() for _ in range(size)]

        tensors, sources = next_ones(UNIT * units), next_ones(count)
        needs, backend = _needs(ctx, count), ctx.backend

        def of_part(*maps: Optional[Tensor]) -> list[Optional[Tensor]]:
            upstream, maps = maps[:-count], [*maps[-count:], *next_ones(convs)]
            vectors = next_ones(ctx.vectors)

            def call() -> list[Optional[Tensor]]:
                stats = list(map(Stats, vectors[::2], vectors[1::2]))
                samples = next(len(t) for t in (*upstream, *maps) if t is not None)
                of_samples = backend_of(backend.name, samples, are_instances(ctx.graph.norms))
                return backward(upstream, maps, _around(ctx.graph, tensors), of_samples, stats, needs)

            layouts = tuple(map(layout_of, (*upstream, *maps[:count])))
            # Of an addition, say, the gradients of both operands are one.
            grads = list({id(grad): grad for grad in upstream}.values())
            given = tuple(next(i for i, grad in enumerate(grads) if grad is of) for of in upstream)
            key = "conv_graph_backward", ctx.graph, tuple(needs), layouts, given, tuple(x is None for x in maps)
            return _run(backend, key, (grads, tensors, vectors), call, maps)

        if all(grad is None for grad in upstream):
            found = [None] * len(needs)
        elif by_reference(*upstream):
            found = _differentiable_backward(upstream, sources, tensors, ctx.graph, needs)
        else:
            (device, *_) = (grad.device for grad in upstream if grad is not None)
            with without_autocast(device):
                parts = map(of_part, *(parts_of(t, ctx.parts) for t in (*upstream, *sources)))
                found = gathered_gradients(parts, count)
        wanted = [
            value.to(target.dtype) if need and value is not None else None
            for need, value, target in zip(needs, found, _targets(sources, tensors))
        ]
        return None, None, None, None, *wanted[:count], *beside_statistics(wanted[count:])


def _run(
    backend: ReferenceBackend,
    key: tuple,
    given: Groups,
    call: Callable[[], Any],
    handed: Optional[list[Optional[Tensor]]] = None,
) -> Any:
    """`replayed` where the backend's calls may be."""
    return replayed((*key, backend.name), given, call, handed=handed) if may_replay([backend.name]) else call()


def _largest(sources: Sequence[Tensor], graph: ConvGraph) -> int:
    """The bytes of a sample's largest map."""
    widths = widths_of([x.shape[1] for x in sources], graph.convs, graph.reads)
    values = map(operator.mul, widths, positions_of([x[:1] for x in sources], graph))
    return graph.convs[0].weight.itemsize * max(values)


def _needs(ctx, count: int) -> list[bool]:
    """Which gradients are asked for, of `_targets`."""
    sources, tensors = ctx.needs_input_grad[4 : 4 + count], ctx.needs_input_grad[4 + count :]
    return [*sources, *parameters_of(tensors)]


def _around(graph: ConvGraph, tensors: Sequence[Optional[Tensor]]) -> ConvGraph:
    """The graph around other tensors; what is left behind is how running statistics are updated."""
    units = [tensors[at : at + UNIT] for at in range(0, len(tensors), UNIT)]
    convs = [
        conv if isinstance(conv, Resampling) else conv._replace(weight=unit[4], bias=unit[5])
        for conv, unit in zip(graph.convs, units)
    ]
    vectors = ("weight", "bias", "running_mean", "running_var")
    norms = [
        norm._replace(**dict(zip(vectors, unit)), num_batches_tracked=None, momentum=None)
        for norm, unit in zip(graph.norms, units[len(convs) :])
    ]
    slopes = tuple(slope for slope, *_ in units[len(convs) + len(norms) :])
    return graph._replace(convs=tuple(convs), norms=tuple(norms), slopes=slopes)


def _targets(sources: Sequence[Tensor], tensors: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """What gradients are of: the sources, and `GRADS` of every convolution, norm and slope."""
    return [*sources, *parameters_of(tensors)]


@differentiable
def _differentiable_backward(upstream, sources, tensors, graph, needs, create_graph) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference, of aliases as in a dense block's.

    Raises:
        RuntimeError: a source was not kept.
    """
    if any(x is None for x in sources):
        raise RuntimeError("conv_graph: expected no frozen convolutions in front, of which nothing is kept, for a second derivative")
    sources = [x.view_as(x) for x in sources]
    tensors = [t if t is None else t.view_as(t) for t in tensors]
    outputs = reference.conv_graph(sources, _around(graph, tensors))
    return gradients(outputs, upstream, _targets(sources, tensors), needs, create_graph)


def conv_graph(sources: Sequence[Tensor], graph: ConvGraph, policy: str | Sequence[bool] = "fast") -> tuple[Tensor, ...]:
    """The graph's outputs, `resdense_ext.reference.conv_graph`, in one node; running statistics are updated once.

    Args:
        sources: maps ``[N, C, *spatial]``, not empty; whatever a convolution reads together has the same samples and sizes.
        graph: convolution weights of one dtype, in which all of them compute; statistics of this process alone. A map's norms
            normalise it whole. Beside instance norms none takes the batch's statistics, and sources have the same samples.
        policy: "fast" keeps the maps that backward reads, "min" few of them, and computes the others again; a bool a step says
            which of those of "fast" are kept beside those of "min".

    Returns:
        A map an output, channels-last where the sources are or a weight is. An output that is one convolution's map as it is, and that is
        read otherwise, too, is kept for backward: changing it in place makes that raise.
    """
    dtype = graph.convs[0].weight.dtype
    backend = backends.choose(sources[0].new_empty(sources[0].dim() * (1,), dtype=dtype), dtype)
    norms = *graph.norms, *map(BatchNorm, graph.slopes)  # as a norm's weight a slope is the only tensor of its unit
    convs = [None if isinstance(conv, Resampling) else conv for conv in graph.convs]
    tensors = flat_tensors([*((None, conv) for conv in convs), *((norm, None) for norm in norms)])
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*sources, *tensors))
    sources = [as_convolved(x, [conv.weight for conv in convs if conv is not None]) for x in sources]
    return ConvGraphFunction.apply(graph, backend, policy if keeps else "none", len(sources), *sources, *tensors)
