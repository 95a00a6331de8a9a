"""From modules to the functional call: reads a block's inner modules as they are now, or says why the engine cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from resdense_ext import functional
from resdense_ext.reference import Activation, BatchNorm, Conv, DenseLayer, Unit

__all__ = ["LayerModules", "Unsupported", "read_layers", "run_dense_block", "stock_path"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unsupported(Exception):
    """Why a block runs its stock path; never seen by a user as an exception."""


class LayerModules(NamedTuple):
    """The modules of one dense layer: ``(norm, activation, convolution)`` once or twice, and its dropout.

    ``module`` is the layer itself: its ``training`` decides about the dropout and its hooks count.
    """

    module: nn.Module
    units: tuple[tuple[nn.Module, nn.Module, nn.Module], ...]
    drop_rate: float = 0.0
    drop_channels: bool = False


_stock: ContextVar[bool] = ContextVar("resdense_stock", default=False)


@contextmanager
def stock_path() -> Iterator[None]:
    """Inside, every block runs its stock path."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


def _check_hooks(module: nn.Module) -> None:
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise Unsupported(f"an inner {type(module).__name__} carries hooks")


def _check_global_hooks() -> None:
    if _module._has_any_global_hook():
        raise Unsupported("global module hooks are set")


def _read_norm(norm: nn.Module) -> BatchNorm:
    if type(norm) not in _NORMS:
        raise Unsupported(f"the norm is a {type(norm).__name__}")
    tracking = norm.training and norm.track_running_stats
    momentum = norm.momentum
    if tracking and momentum is None:
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0)
    return BatchNorm(
        norm.weight,
        norm.bias,
        norm.running_mean if tracking or not norm.training else None,
        norm.running_var if tracking or not norm.training else None,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum,
        norm.eps,
        norm.num_batches_tracked if tracking else None,
    )


def _read_conv(conv: nn.Module) -> Conv:
    if type(conv) not in _CONVS:
        raise Unsupported(f"the convolution is a {type(conv).__name__}")
    if conv.padding_mode != "zeros" or any(stride != 1 for stride in conv.stride):
        raise Unsupported(f"the convolution has stride {conv.stride} and padding mode {conv.padding_mode!r}")
    same = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size))
    if any(total % 2 for total in same):
        raise Unsupported(f"the convolution's kernel {conv.kernel_size} is even")
    padding = tuple(total // 2 for total in same)
    if conv.padding != "same" and tuple(conv.padding) != padding and conv.padding != "valid" or (
        conv.padding == "valid" and any(padding)
    ):
        raise Unsupported(f"the convolution's padding {conv.padding} changes the spatial size")
    return Conv(conv.weight, conv.bias, padding, conv.dilation, conv.groups)


def _read_activation(activation: nn.Module) -> Activation:
    kind = type(activation)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", activation.negative_slope)
    if kind is nn.ELU and activation.alpha == 1:
        return Activation("elu")
    names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}
    if kind not in names:
        raise Unsupported(f"the activation is a {kind.__name__}")
    return Activation(names[kind])


def read_layers(layers: Sequence[LayerModules]) -> tuple[list[DenseLayer], Activation]:
    """The layers as the functional call takes them, without masks.

    Raises:
        Unsupported: an inner module that the engine cannot stand in for, or one with hooks.
    """
    _check_global_hooks()
    read, activations = [], set()
    for layer in layers:
        _check_hooks(layer.module)
        units = []
        for modules in layer.units:
            for module in modules:
                _check_hooks(module)
            norm, activation, conv = modules
            activations.add(_read_activation(activation))
            units.append(Unit(_read_norm(norm), _read_conv(conv)))
        read.append(DenseLayer(tuple(units)))
    if len(activations) > 1:
        raise Unsupported(f"the layers' activations differ: {sorted(a.name for a in activations)}")
    return read, activations.pop() if activations else Activation()


def run_dense_block(
    block: nn.Module, x: Tensor, layers: Sequence[LayerModules], policy: str, stock: Callable[[Tensor], Tensor]
) -> Tensor:
    """The block's forward on the engine, or on ``stock`` where the engine cannot; the latter is said once a block."""
    if _stock.get() or x.numel() == 0 or torch.jit.is_tracing():
        return stock(x)
    try:
        read, activation = read_layers(layers)
    except Unsupported as reason:
        if block.__dict__.get("_resdense_said") != str(reason):
            block._resdense_said = str(reason)
            warnings.warn(f"resdense_ext: a {type(block).__name__} runs its stock path: {reason}", stacklevel=3)
        return stock(x)
    # Channels are checked before masks are drawn: an error leaves the random state as it was.
    functional.check_dense_block(x, read)
    drawn = []
    for modules, layer in zip(layers, read):
        if modules.drop_rate > 0 and modules.module.training:
            width = layer.units[-1].conv.weight.shape[0]
            mask, scale = functional.dropout_mask(x, width, modules.drop_rate, per_channel=modules.drop_channels)
            layer = layer._replace(mask=mask, mask_scale=scale)
        drawn.append(layer)
    return functional.dense_block(
        x, drawn, activation=activation.name, negative_slope=activation.slope, policy=policy
    )
