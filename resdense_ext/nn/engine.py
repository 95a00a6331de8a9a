"""From modules to the functional call: reads a block's inner modules as they are now, or says why the engine cannot."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter
from typing import NamedTuple, Optional, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resdense_ext import functional
from resdense_ext.reference import Activation, BatchNorm, Conv, DenseLayer, Unit

__all__ = [
    "Block",
    "LayerModules",
    "Unsupported",
    "check_forward",
    "read_layers",
    "run_dense_block",
    "stock_path",
    "why_stock",
]

_NORM_BESIDE = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_PARAMETERS = itemgetter("weight", "bias")
_BUFFERS = itemgetter("running_mean", "running_var", "num_batches_tracked")
_LIBRARIES = ("resdense_ext", "torch", "torchvision")


class Unsupported(Exception):
    """Why a block runs its stock path: what ``module``, one of its own, is or does. Never seen by a user as an exception."""

    def __init__(self, reason: str, module: Optional[nn.Module] = None) -> None:
        super().__init__(reason)
        self.reason, self.module = reason, module

    def within(self, block: nn.Module) -> str:
        """The reason as a sentence, with the module's path in the block."""
        subject = next((path for path, module in block.named_modules() if module is self.module), "")
        return f"{subject} {self.reason}".lstrip()


class LayerModules(NamedTuple):
    """The modules of one dense layer: ``(norm, activation, convolution)`` once or twice, and its dropout.

    ``module`` is the layer itself: its ``training`` decides about the dropout and its hooks count.
    """

    module: nn.Module
    units: tuple[tuple[nn.Module, nn.Module, nn.Module], ...]
    drop_rate: float = 0.0
    drop_channels: bool = False


class Block(Protocol):
    """What a module offers to run on the engine."""

    def layer_modules(self) -> list[LayerModules]:
        """Raises Unsupported where a layer is not what the block's stock forward would find."""

    def stock_forward(self, x: Tensor) -> Tensor:
        """The forward that the engine stands in for."""


_stock: ContextVar[bool] = ContextVar("resdense_stock", default=False)
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The reasons that a block has given. Not on the block: it would be copied, pickled and left behind by `revert`."""


@contextmanager
def stock_path() -> Iterator[None]:
    """Inside, every block runs its stock path."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


def run_dense_block(block: Block, x: Tensor, policy: str) -> Tensor:
    """The block's forward on the engine, or on its stock path where the engine cannot; the latter is said once a block."""
    if _is_transformed(x) or _stock.get():
        return block.stock_forward(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if x.numel() == 0:
        return block.stock_forward(x)
    try:
        if _is_wrapper(x):
            raise Unsupported(f"the input is {type(x).__name__}")
        modules = block.layer_modules()
        layers, activation = read_layers(modules)
    except Unsupported as unsupported:
        _say(block, unsupported)
    else:
        if any(layer.drop_rate > 0 for layer in modules):
            # Checked before masks are drawn: an error leaves the random state as it was.
            functional.check_dense_block(x, layers)
            for of in modules:
                functional.check_probability("drop_rate", max(of.drop_rate, 0.0))
            layers = [_with_mask(layer, of, x) for layer, of in zip(layers, modules)]
        return functional.dense_block(
            x, layers, activation=activation.name, negative_slope=activation.slope, policy=policy
        )
    # Outside of the handler, so that an error of the stock path carries no Unsupported along.
    return block.stock_forward(x)


def why_stock(block: Block) -> Optional[str]:
    """Why the block's modules, as they are now, make it run its stock path; None where they do not."""
    try:
        read_layers(block.layer_modules())
    except Unsupported as unsupported:
        return unsupported.within(block)
    return None


def read_layers(layers: Sequence[LayerModules]) -> tuple[list[DenseLayer], Activation]:
    """The layers as the functional call takes them, without masks.

    Raises:
        Unsupported: an inner module that the engine cannot stand in for, or one with hooks.
    """
    if _has_any_global_hook():
        raise Unsupported("global module hooks are set")
    read, norms, activations = [], set(), set()
    for layer in layers:
        _check_untouched(layer.module)
        units = []
        for norm, activation, conv in layer.units:
            # The convolution first: it says which norm belongs beside it.
            read_conv = _read_conv(conv)
            if norm in norms:
                raise Unsupported("serves twice, so its running statistics change in between", norm)
            norms.add(norm)
            units.append(Unit(_read_norm(norm, _NORM_BESIDE[type(conv)]), read_conv))
            activations.add(_read_activation(activation))
        read.append(DenseLayer(tuple(units)))
    if len(activations) > 1:
        raise Unsupported(f"the layers' activations differ: {sorted(a.name for a in activations)}")
    return read, activations.pop() if activations else Activation()


def check_forward(module: nn.Module, owner: type[nn.Module], *methods: str) -> None:
    """Raises Unsupported unless ``module`` is an ``owner`` that runs the owner's ``forward`` and other ``methods``."""
    if not isinstance(module, owner):
        raise Unsupported(f"is {type(module).__name__}", module)
    for method in ("forward", *methods):
        if getattr(type(module), method) is not getattr(owner, method) or method in module.__dict__:
            raise Unsupported(f"has a {method} of its own", module)


def _is_transformed(x: Tensor) -> bool:
    """Whether x passes through something that rewrites programs and needs a rule for each operation.

    Of these the engine has none yet; the stock path is right under all of them, and is taken without a word. ``torch.compile``
    cannot trace how modules are read (`operator.itemgetter`) and a backend is chosen (`contextvars`).
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or isinstance(x, torch.fx.Proxy)
    )


def _say(block: nn.Module, unsupported: Unsupported) -> None:
    said = _said.setdefault(block, set())
    if unsupported.reason not in said:
        said.add(unsupported.reason)
        message = f"resdense_ext: a {type(block).__name__} runs its stock path: {unsupported.within(block)}"
        warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """The ``stacklevel`` of a warning in the calling function that points at the nearest line of the user's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def _with_mask(layer: DenseLayer, modules: LayerModules, x: Tensor) -> DenseLayer:
    if modules.drop_rate <= 0 or not modules.module.training:
        return layer
    width = layer.units[-1].conv.weight.shape[0]
    mask, scale = functional.dropout_mask(x, width, modules.drop_rate, per_channel=modules.drop_channels)
    return layer._replace(mask=mask, mask_scale=scale)


def _registered(module: nn.Module, tensors: dict[str, Optional[Tensor]], names: itemgetter) -> tuple[Optional[Tensor], ...]:
    """From ``module._parameters`` or ``_buffers``: as attributes tensors cost five times as much, and there are hundreds."""
    try:
        found = names(tensors)
    except KeyError as name:
        raise Unsupported(f"has no registered {name}", module) from None
    for tensor in found:
        if _is_wrapper(tensor):
            raise Unsupported(f"holds {type(tensor).__name__}", module)
    return found


def _is_wrapper(tensor: Optional[Tensor]) -> bool:
    """DTensor and its like; a subclass that only adds attributes or names is none."""
    return type(tensor) not in (nn.Parameter, Tensor) and tensor is not None and is_traceable_wrapper_subclass(tensor)


def _check_untouched(module: nn.Module) -> None:
    """Raises Unsupported where calling the module does more, or something else, than its class says."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Unsupported("carries hooks", module)
    if "forward" in module.__dict__:
        raise Unsupported("has a forward of its own", module)


def _read_norm(norm: nn.Module, expected: type[nn.Module]) -> BatchNorm:
    """As `torch.nn.modules.batchnorm._BatchNorm.forward` calls `torch.nn.functional.batch_norm`."""
    if type(norm) is not expected:
        raise Unsupported(f"is {type(norm).__name__}", norm)
    _check_untouched(norm)
    weight, bias = _registered(norm, norm._parameters, _PARAMETERS)
    mean, var, count = _registered(norm, norm._buffers, _BUFFERS)
    batch_stats = norm.training or (mean is None and var is None)
    if not norm.training:
        return BatchNorm(weight, bias, mean, var, batch_stats, norm.momentum, norm.eps)
    if not norm.track_running_stats:
        return BatchNorm(weight, bias, None, None, batch_stats, None, norm.eps)
    momentum = norm.momentum
    if momentum is None:
        momentum = 0.0 if count is None else 1.0 / (float(count) + 1.0)
    return BatchNorm(weight, bias, mean, var, batch_stats, momentum, norm.eps, count)


def _read_conv(conv: nn.Module) -> Conv:
    if type(conv) not in _NORM_BESIDE:
        raise Unsupported(f"is {type(conv).__name__}", conv)
    _check_untouched(conv)
    weight, bias = _registered(conv, conv._parameters, _PARAMETERS)
    rank = weight.dim() - 2
    stride, dilation = _sizes(conv.stride, rank), _sizes(conv.dilation, rank)
    extent = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:]))
    same = tuple(e // 2 for e in extent)
    padding = _sizes({"same": same, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else conv.padding, rank)
    if any(s != 1 for s in stride) or any(2 * p != e for p, e in zip(padding, extent)):
        geometry = f"kernel {tuple(weight.shape[2:])}, stride {stride}, padding {conv.padding!r}, dilation {dilation}"
        raise Unsupported(f"does not keep every position in its place: {geometry}", conv)
    if any(padding) and conv.padding_mode != "zeros":
        raise Unsupported(f"pads with {conv.padding_mode!r}", conv)
    return Conv(weight, bias, padding, dilation, conv.groups)


def _sizes(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _read_activation(activation: nn.Module) -> Activation:
    _check_untouched(activation)
    kind = type(activation)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", activation.negative_slope)
    if kind is nn.ELU and activation.alpha == 1:
        return Activation("elu")
    names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}
    if kind not in names:
        raise Unsupported(f"is {activation}", activation)
    return Activation(names[kind])
