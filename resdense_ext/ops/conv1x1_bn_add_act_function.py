"""``act(bn(conv1x1(x)) + shortcut)`` by itself, as operators and as autograd sees it: one node."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops import conv1x1_bn_add_act as engine
from resdense_ext.ops.activation import LINEAR
from resdense_ext.ops.by_reference import by_reference, differentiable
from resdense_ext.ops.cast import without_autocast
from resdense_ext.ops.conv1x1_bn_add_act import Branch, Carried, Moments, Pointwise
from resdense_ext.ops.layout import dense_map, empty_map, map_beside, memory_format_of, walkable_map
from resdense_ext.ops.operands import Fold, Stats
from resdense_ext.ops.operator import EngineOperator
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.ops.running import update_running_statistics
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.ops.units import GRADS, UNIT, beside_statistics, conv_of, flat_tensors, geometry_of, parameters_of, wanted_gradients
from resdense_ext.reference import Activation, BatchNorm, Conv, accumulation_dtype

__all__ = ["Conv1x1BNAddActConfig", "conv1x1_bn_add_act"]

SCHEMA = (
    "Tensor?[] tensors, bool[] normed, float[] eps, bool[] batch_stats, int[] geometry, str input_activation, float input_slope, "
    "str activation, float slope, str keep, str backend"
)


class Conv1x1BNAddActConfig(NamedTuple):
    """All that is no tensor, in the operators' types.

    The norms are the one before the convolution, the one behind it and the shortcut's; ``keep`` is what
    `engine.kept_for_backward` says.
    """

    normed: list[bool]
    eps: list[float]
    batch_stats: list[bool]
    geometry: list[int]
    input_activation: str
    input_slope: float
    activation: str
    slope: float
    keep: str
    backend: str

    @staticmethod
    def of(
        conv: Conv,
        norms: Sequence[Optional[BatchNorm]],
        input_activation: Activation,
        activation: Activation,
        keep: str,
        backend: str,
    ) -> Conv1x1BNAddActConfig:
        return Conv1x1BNAddActConfig(
            [norm is not None for norm in norms],
            [0.0 if norm is None else norm.eps for norm in norms],
            [norm is not None and norm.batch_stats for norm in norms],
            geometry_of(conv),
            *input_activation,
            *activation,
            keep,
            backend,
        )

    @property
    def activations(self) -> tuple[Activation, Activation]:
        """That before the convolution, and that behind the addition."""
        return Activation(self.input_activation, self.input_slope), Activation(self.activation, self.slope)

    def conv(self, tensors: Sequence[Optional[Tensor]]) -> Conv:
        return conv_of(*tensors[4:6], self.geometry)

    def norms(self, tensors: Sequence[Optional[Tensor]]) -> list[Optional[BatchNorm]]:
        return [
            BatchNorm(*tensors[UNIT * i : UNIT * i + 4], self.batch_stats[i], None, self.eps[i]) if normed else None
            for i, normed in enumerate(self.normed)
        ]


def _flat_tensors(conv: Conv, norms: Sequence[Optional[BatchNorm]]) -> list[Optional[Tensor]]:
    return flat_tensors(zip(norms, (conv, None, None)))


class _Pieces:
    """What the two directions share: the convolution with its norms folded, once their statistics are known."""

    def __init__(self, x: Tensor, tensors, config: Conv1x1BNAddActConfig, stats: Sequence[Tensor]):
        self.backend = backends.get(config.backend)
        self.norms, self.activations = config.norms(tensors), config.activations
        self.stats = [Stats(*stats[i : i + 2]) for i in range(0, len(stats), 2)]
        count = x.numel() // x.shape[1]
        input_fold = self.fold(0, count, self.activations[0])
        self.source = Pointwise(x, input_fold, config.conv(tensors), self.backend)

    def fold(self, i: int, count: int, activation: Activation = LINEAR) -> Optional[Fold]:
        norm = self.norms[i]
        return None if norm is None else self.backend.fold(norm, self.stats[i], count, activation)

    def folds(self) -> tuple[Fold, Optional[Fold]]:
        """Those of the two norms before the addition."""
        return self.fold(1, self.source.count), self.fold(2, self.source.count)


def _statistics(x: Tensor, norm: Optional[BatchNorm], backend: ReferenceBackend) -> Stats:
    return Stats(*backend.channel_stats(x)) if norm is not None and norm.batch_stats else Stats.room(x, None)


def _conv1x1_bn_add_act(x: Tensor, identity: Tensor, tensors, *numbers):
    config = Conv1x1BNAddActConfig(*numbers)
    x = walkable_map(x)
    identity = map_beside(x, identity)
    backend, norms = backends.get(config.backend), config.norms(tensors)
    of_identity = _statistics(identity, norms[2], backend)
    stats = [*_statistics(x, norms[0], backend), *Stats.room(identity, None), *of_identity]
    source = _Pieces(x, tensors, config, stats).source
    kept: list[Tensor] = []
    if config.keep == "z":
        z = source.convolved(slice(None))
        stats[2:4] = _statistics(z, norms[1], backend)
        kept = [z]
    elif norms[1].batch_stats:
        moments = engine.moments(source)
        stats[2:4] = engine.output_statistics(source, moments)
        kept = [*moments] if config.keep == "gram" else []
    pieces = _Pieces(x, tensors, config, stats)
    fold, identity_fold = pieces.folds()
    main = Carried(kept[0], fold) if config.keep == "z" else Branch(pieces.source, fold)
    out, before = engine.forward(main, Carried(identity, identity_fold), pieces.activations[1], backend)
    return out, out.new_empty(0) if before is None else before, stats, kept


def _conv1x1_bn_add_act_backward(
    grad: Tensor, mark: Optional[Tensor], x: Tensor, identity: Optional[Tensor], tensors, *rest
) -> list[Tensor]:
    *numbers, stats, kept, needs = rest
    config = Conv1x1BNAddActConfig(*numbers)
    x = walkable_map(x)
    pieces = _Pieces(x, tensors, config, stats)
    source, backend = pieces.source, pieces.backend
    fold, identity_fold = pieces.folds()
    results: list[Optional[Tensor]] = [None] * len(needs)

    def record(unit: int, *values: Optional[Tensor]) -> None:
        results[2 + len(GRADS) * unit : 2 + len(GRADS) * unit + len(values)] = values

    # Any layout comes from outside, an expanded sum's, too; the operators take a map's.
    upstream = grad.contiguous(memory_format=memory_format_of(x))
    g = backend.activation_backward(upstream, mark, pieces.activations[1])
    need_input, need_weight = any(needs[i] for i in (0, 2, 3)), any(needs[4:6])
    if need_input or need_weight or any(needs[6:8]):
        if config.keep == "z":
            norm = engine.norm_gradients(g.to(kept[0].dtype), kept[0], fold, backend)
            found = backend.bn_act_conv_backward(x, source.fold, source.conv, norm.input, None, need_weight)
            norm_grads = norm.norm_weight, norm.norm_bias
        else:
            moments = Moments(*kept) if kept else None
            found, *norm_grads = engine.backward(Branch(source, fold), moments, g, None, need_input, need_weight)
        record(0, found.norm_weight, found.norm_bias, found.weight, found.bias)
        record(1, *norm_grads)
        if needs[0]:
            results[0] = backend.pending_grad_(found.input) if source.fold is not None else found.input.dy
    results[1] = g
    if identity_fold is not None and any((needs[1], *needs[10:12])):
        identity = map_beside(x, identity)
        shortcut = engine.norm_gradients(g.to(identity.dtype), identity, identity_fold, backend)
        record(2, shortcut.norm_weight, shortcut.norm_bias)
        if needs[1]:
            pending = shortcut.input
            results[1] = (backend.pending_grad if pending.dy is grad else backend.pending_grad_)(pending)
    elif results[1] is grad:
        # An operator may not return its input.
        results[1] = grad.clone()
    found = [v if need else None for v, need in zip(results, needs)]
    return wanted_gradients(found, [x, g if identity is None else identity], tensors)


def _targets(x: Tensor, identity: Tensor, tensors) -> list[Optional[Tensor]]:
    """What gradients are of."""
    return [x, identity, *parameters_of(tensors)]


def _conv1x1_bn_add_act_fake(x: Tensor, identity: Tensor, tensors, *numbers):
    config = Conv1x1BNAddActConfig(*numbers)
    conv, norms, activation = config.conv(tensors), config.norms(tensors), config.activations[1]
    x = dense_map(x)
    z = empty_map(x, conv.weight.shape[0], conv.weight.dtype, conv.outputs(x.shape[2:]))
    out = torch.empty_like(z, dtype=torch.promote_types(z.dtype, identity.dtype))
    before = out.new_empty(0) if reference.determined(activation) else torch.empty_like(out)
    stats = [t for read, norm in zip((x, z, identity), norms) for t in Stats.room(read, norm)]
    kept = []
    if config.keep == "z":
        kept = [z]
    elif config.keep == "gram" and config.batch_stats[1]:
        groups, inputs = conv.groups, conv.weight.shape[1]
        products = z.new_empty((groups, inputs, inputs), dtype=accumulation_dtype(z.dtype))
        kept = [z.new_empty(groups * inputs, dtype=torch.float64), products]
    return out, before, stats, kept


def _conv1x1_bn_add_act_backward_fake(
    grad: Tensor, mark: Optional[Tensor], x: Tensor, identity: Optional[Tensor], tensors, *rest
) -> list[Tensor]:
    x = dense_map(x)
    g = torch.empty_like(grad, memory_format=memory_format_of(x))
    shortcut = g if identity is None else torch.empty_like(g, dtype=identity.dtype)
    return [
        torch.empty_like(target) if need else x.new_empty(0)
        for target, need in zip(_targets(x, shortcut, tensors), rest[-1])
    ]


run = EngineOperator(
    f"conv1x1_bn_add_act(Tensor x, Tensor identity, {SCHEMA}) -> (Tensor out, Tensor before, Tensor[] stats, Tensor[] kept)",
    _conv1x1_bn_add_act,
    _conv1x1_bn_add_act_fake,
)
run_backward = EngineOperator(
    f"conv1x1_bn_add_act_backward(Tensor grad, Tensor? mark, Tensor x, Tensor? identity, {SCHEMA}, Tensor[] stats, "
    "Tensor[] kept, bool[] needs) -> Tensor[]",
    _conv1x1_bn_add_act_backward,
    _conv1x1_bn_add_act_backward_fake,
)


class Conv1x1BNAddActFunction(torch.autograd.Function):
    """Keeps the input, the statistics, z or R or neither, the shortcut where it has a norm, and the activation's output or, where
    that does not determine its derivative, its input (a second output, so that its gradient can be differentiated)."""

    @staticmethod
    def forward(ctx, config: Conv1x1BNAddActConfig, norms, x: Tensor, identity: Tensor, *tensors):
        with without_autocast(x.device):
            out, before, stats, kept = run(x, identity, tensors, *config)
        counts = [t.numel() // t.shape[1] for t in (x, out, identity)]
        update_running_statistics(norms, list(zip(stats[::2], stats[1::2])), counts)
        activation = config.activations[1]
        mark = out if reference.determined(activation) else before
        ctx.set_materialize_grads(False)
        ctx.config, ctx.counts, ctx.identity_dtype = config, (len(tensors), len(stats)), identity.dtype
        ctx.save_for_backward(
            None if activation.name == "identity" else mark, x, identity if config.normed[2] else None, *tensors, *stats, *kept
        )
        return out if mark is out else (out, before)

    @staticmethod
    def backward(ctx, grad: Optional[Tensor], grad_before: Optional[Tensor] = None):
        why = "its output tells the derivative of its activation"
        mark, x, identity, *saved = saved_tensors(ctx, "conv1x1_bn_add_act", why)
        saved = iter(saved)
        tensors, stats = (list(islice(saved, size)) for size in ctx.counts)
        needs = [*ctx.needs_input_grad[2:4], *parameters_of(ctx.needs_input_grad[4 : 4 + len(tensors)])]
        if grad is None and grad_before is None:
            found = [None] * len(needs)
        elif by_reference(grad) or grad_before is not None:
            found = _differentiable_backward(grad, grad_before, mark, x, identity, tensors, ctx.config, needs)
        else:
            with without_autocast(x.device):
                found = run_backward(
                    grad, mark, x, identity, tensors, *ctx.config, stats, list(saved), needs
                )
        dx, didentity, *values = (value if need else None for value, need in zip(found, needs))
        didentity = None if didentity is None else didentity.to(ctx.identity_dtype)
        return None, None, dx, didentity, *beside_statistics(values)


def _differentiable_backward(grad, grad_before, mark, x, identity, tensors, config, needs) -> list[Optional[Tensor]]:
    """The gradients as functions that can be differentiated again, through the reference, of aliases as in a dense block's.

    The activation's slope is a function of what was returned, so that its own gradient comes back to this node.
    """
    _, activation = config.activations
    g = grad if mark is None or grad is None else grad * reference.marked_slope(mark, activation)
    if grad_before is not None:
        g = grad_before if g is None else g + grad_before
    grads = iter(_through_reference(g, x, identity, tensors, config, needs))
    return [None if not need else g if i == 1 and identity is None else next(grads) for i, need in enumerate(needs)]


@differentiable
def _through_reference(g, x, identity, tensors, config, needs, create_graph) -> Sequence[Optional[Tensor]]:
    """The gradients that are wanted of the sum's operands and parameters, but of the identity where g is that."""
    x, *tensors = [t if t is None else t.view_as(t) for t in (x, *tensors)]
    shortcut = x.new_zeros(()) if identity is None else identity.view_as(identity)
    input_norm, norm, identity_norm = config.norms(tensors)
    y = reference.conv1x1_bn_add_act(
        x, config.conv(tensors), norm, shortcut, identity_norm, LINEAR, input_norm, config.activations[0]
    )
    targets = _targets(x, shortcut, tensors)
    wanted = [t for i, (t, need) in enumerate(zip(targets, needs)) if need and not (i == 1 and identity is None)]
    return torch.autograd.grad(y, wanted, g.to(y.dtype), create_graph=create_graph, allow_unused=True) if wanted else ()


def conv1x1_bn_add_act(
    x: Tensor,
    conv: Conv,
    norm: BatchNorm,
    identity: Tensor,
    identity_norm: Optional[BatchNorm],
    activation: Activation,
    input_norm: Optional[BatchNorm],
    input_activation: Activation,
    policy: str,
    backend: ReferenceBackend,
) -> Tensor:
    """The checked call: see `resdense_ext.functional.conv1x1_bn_add_act`."""
    norms = (input_norm, norm, identity_norm)
    tensors = _flat_tensors(conv, norms)
    outputs, inputs = conv.weight.shape[0], conv.weight.shape[1] * conv.groups
    keep = "nothing"
    if norm.batch_stats and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        count = x.shape[0] * torch.Size(conv.outputs(x.shape[2:])).numel()
        keep = engine.kept_for_backward(count, inputs, outputs, conv.groups, policy)
    config = Conv1x1BNAddActConfig.of(conv, norms, input_activation, activation, keep, backend.name)
    out = Conv1x1BNAddActFunction.apply(config, norms, x, identity, *tensors)
    return out[0] if isinstance(out, tuple) else out
