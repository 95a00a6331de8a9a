"""One inner module as the functional calls take it: a norm, a convolution, a pool, an activation; or why the engine cannot."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resdense_ext.reference import Activation, BatchNorm, Conv, Pool, Resampling, Resize, TransposedConv

__all__ = [
    "APART",
    "NORM_BESIDE",
    "Unsupported",
    "activation_of",
    "apart_of",
    "check_forward",
    "check_keeps_size",
    "check_untouched",
    "conv_of",
    "graphs_conv_of",
    "is_frozen_norm",
    "is_instance_norm",
    "is_norm",
    "is_wrapper",
    "layer_class",
    "norm_of",
    "own_activation",
    "own_norm_of",
    "pair_of",
    "pool_kind",
    "pool_of",
    "pool_rank",
    "read_children",
    "read_projection",
    "resampling_of",
    "slope_of",
]

NORM_BESIDE = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
"""The norm that belongs to the maps of a convolution."""
_INSTANCE = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}
"""The instance norm of the maps that such a batch norm takes."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = {*NORM_BESIDE, *NORM_BESIDE.values(), *_INSTANCE.values(), nn.GroupNorm}
_HARMLESS = {
    *("__init__", "reset_parameters", "extra_repr", "__module__", "__doc__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__"),  # from Python 3.13 on
}
"""What a subclass of a layer may have of its own, and still computes the same."""
_APART = {nn.Hardswish: "hardswish", nn.Mish: "mish", nn.PReLU: "prelu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
APART = *_APART, nn.GELU
"""Activations that only graphs of convolutions take."""
_POOLS = {
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "maximum": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "global": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
_ORDINARY = {"divisor_override": None, "dilation": 1, "return_indices": False}
"""The pools' options that the engine knows, by the one value that it knows."""
_RESIZES = {"nearest": (1, 2, 3), "nearest-exact": (1, 2, 3), "linear": (1,), "bilinear": (2,), "bicubic": (2,), "trilinear": (3,)}
"""For how many spatial dimensions there are the modes of `torch.nn.Upsample` that graphs of convolutions take."""
_PARAMETERS = "weight", "bias"
_BUFFERS = "running_mean", "running_var", "num_batches_tracked"
_FROZEN = "weight", "bias", "running_mean", "running_var"


class Unsupported(Exception):
    """Why a block runs its stock path: what ``module``, one of its own, is or does. Never seen by a user as an exception.

    Raised as ``Unsupported(reason, module)``, or without a module. (``torch.compile`` traces no constructor of an exception's.)
    """

    @property
    def reason(self) -> str:
        return self.args[0]

    @property
    def module(self) -> Optional[nn.Module]:
        return self.args[1] if len(self.args) > 1 else None

    def within(self, block: nn.Module) -> str:
        """The reason as a sentence, with the module's path in the block."""
        subject = next((path for path, module in block.named_modules() if module is self.module), "")
        return f"{subject} {self.reason}".lstrip()


def check_forward(module: nn.Module, owner: type[nn.Module], *methods: str) -> None:
    """Raises Unsupported unless ``module`` is an ``owner`` that runs the owner's ``forward`` and other ``methods``."""
    if not isinstance(module, owner):
        raise Unsupported(f"is {type(module).__name__}", module)
    for method in ("forward", *methods):
        if getattr(type(module), method) is not getattr(owner, method) or method in module.__dict__:
            raise Unsupported(f"has a {method} of its own", module)


def check_untouched(module: nn.Module) -> None:
    """Raises Unsupported where calling the module does more, or something else, than its class says."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Unsupported("carries hooks", module)
    if module._compiled_call_impl is not None:
        raise Unsupported("is under torch.compile by itself", module)
    if "forward" in module.__dict__:
        raise Unsupported("has a forward of its own", module)


def read_children(module: nn.Sequential, *names: str) -> list[nn.Module]:
    """The modules of a Sequential that has these and no others, in this order; raises Unsupported for any other."""
    if tuple(module._modules) != names:
        raise Unsupported(f"holds {', '.join(module._modules)}, and not {', '.join(names)}", module)
    return list(module)


def read_projection(downsample: Optional[nn.Module]) -> tuple[nn.Module, ...]:
    """The convolution and the norm of a projection shortcut, with a pool in front or without one; nothing for the identity."""
    if downsample is None:
        return ()
    check_forward(downsample, nn.Sequential)
    check_untouched(downsample)
    modules = read_children(downsample, *"012"[: max(len(downsample), 2)])
    if len(modules) < 3 or type(modules[0]) is not nn.Identity:
        return tuple(modules)
    check_untouched(modules[0])
    return tuple(modules[1:])


def is_wrapper(tensor: Optional[Tensor]) -> bool:
    """DTensor and its like; a subclass that only adds attributes or names is none."""
    return type(tensor) not in (nn.Parameter, Tensor) and tensor is not None and is_traceable_wrapper_subclass(tensor)


def _registered(module: nn.Module, tensors: dict[str, Optional[Tensor]], names: tuple[str, ...]) -> tuple[Optional[Tensor], ...]:
    """From ``module._parameters`` or ``_buffers``: as attributes tensors cost five times as much, and there are hundreds."""
    try:
        found = tuple([tensors[name] for name in names])
    except KeyError as name:
        raise Unsupported(f"has no registered {name}", module) from None
    for tensor in found:
        if is_wrapper(tensor):
            raise Unsupported(f"holds {type(tensor).__name__}", module)
    return found


def norm_of(norm: nn.Module, expected: type[nn.Module], activation: Optional[nn.Module] = None) -> BatchNorm:
    """As `torch.nn.modules.batchnorm._BatchNorm.forward` calls `torch.nn.functional.batch_norm`; SyncBatchNorm likewise, and
    instance and group norms. ``activation`` stands behind."""
    if expected is nn.BatchNorm2d and is_frozen_norm(norm):
        check_untouched(norm)
        return BatchNorm(*_registered(norm, norm._buffers, _FROZEN), batch_stats=False, eps=norm.eps)
    if layer_class(norm) is _INSTANCE.get(expected):
        return _instance_norm_of(norm)
    if layer_class(norm) is nn.GroupNorm:
        return _group_norm_of(norm)
    held = own_activation(norm)
    holds_it = held is not None and (held is activation or type(held) is nn.Identity) and isinstance(norm, expected)
    if not holds_it and layer_class(norm) not in (expected, nn.SyncBatchNorm):
        raise Unsupported(f"is {type(norm).__name__}", norm)
    for module in (norm, *norm._modules.values()):
        check_untouched(module)
    weight, bias = _registered(norm, norm._parameters, _PARAMETERS)
    mean, var, count = _registered(norm, norm._buffers, _BUFFERS)
    batch_stats = norm.training or (mean is None and var is None)
    if not norm.training:
        return BatchNorm(weight, bias, mean, var, batch_stats, norm.momentum, norm.eps)
    group = _group_of(norm) if type(norm) is nn.SyncBatchNorm else ""
    if not norm.track_running_stats:
        return BatchNorm(weight, bias, None, None, batch_stats, None, norm.eps, group=group)
    momentum = norm.momentum
    if momentum is None:
        momentum = 0.0 if count is None else 1.0 / (float(count) + 1.0)
    return BatchNorm(weight, bias, mean, var, batch_stats, momentum, norm.eps, count, group)


def _instance_norm_of(norm: nn.Module) -> BatchNorm:
    """As `torch.nn.modules.instancenorm._InstanceNorm.forward` calls `torch.nn.functional.instance_norm`."""
    check_untouched(norm)
    if norm.track_running_stats:
        raise Unsupported("is an instance norm with running statistics", norm)
    return BatchNorm(*_registered(norm, norm._parameters, _PARAMETERS), eps=norm.eps, instance=True)


def _group_norm_of(norm: nn.GroupNorm) -> BatchNorm:
    """As `torch.nn.GroupNorm.forward` calls `torch.nn.functional.group_norm`; of one channel a group it is an instance norm."""
    check_untouched(norm)
    groups = 0 if norm.num_groups == norm.num_channels else norm.num_groups
    return BatchNorm(*_registered(norm, norm._parameters, _PARAMETERS), eps=norm.eps, instance=True, groups=groups)


def own_norm_of(norm: nn.Module, expected: type[nn.Module], activation: Optional[nn.Module] = None) -> BatchNorm:
    """`norm_of` of one that takes its statistics in this process alone."""
    read = norm_of(norm, expected, activation)
    if read.batch_stats and read.group:
        raise Unsupported("takes statistics over several ranks", norm)
    return read


def _group_of(norm: nn.SyncBatchNorm) -> str:
    """The process group over whose ranks a training norm takes statistics; none where it is a batch norm like any other."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def layer_class(module: Optional[nn.Module]) -> type:
    """The class of a convolution or a norm: torch's, too, where a subclass constructs it in another way and overrides nothing, as
    torchvision's Conv3DSimple."""
    if type(module) in _LAYERS or torch.compiler.is_compiling():
        return type(module)  # a compiler does not see into classes
    own: set[str] = set()
    for base in type(module).__mro__:
        if base in _LAYERS:
            overrides = any(hasattr(base, name) or name in (*module._parameters, *module._buffers) for name in own)
            return type(module) if overrides else base
        own |= vars(base).keys() - _HARMLESS
    return type(module)


def is_norm(module: nn.Module) -> bool:
    """Whether it is one of those that `norm_of` may read."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_instance_norm(module) or is_frozen_norm(module)


def is_instance_norm(module: nn.Module) -> bool:
    """Whether it is one that takes the statistics of every sample by itself, of channels or of groups of them."""
    return isinstance(module, (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm))


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether it is torchvision's FrozenBatchNorm2d, a batch norm of buffers alone, which detection models have."""
    library = sys.modules.get("torchvision.ops.misc")
    return library is not None and type(norm) is library.FrozenBatchNorm2d


def own_activation(norm: nn.Module) -> Optional[nn.Module]:
    """The activation that timm's BatchNormAct2d, a batch norm, applies by itself; None for another norm, or one that drops."""
    library = sys.modules.get("timm.layers.norm_act")
    if library is None or type(norm) is not getattr(library, "BatchNormAct2d", None):
        return None
    return norm.act if type(norm.drop) is nn.Identity else None


def conv_of(conv: nn.Module) -> Conv:
    if layer_class(conv) not in NORM_BESIDE:
        raise Unsupported(f"is {type(conv).__name__}", conv)
    check_untouched(conv)
    weight, bias = _registered(conv, conv._parameters, _PARAMETERS)
    rank = weight.dim() - 2
    stride, dilation = _sizes(conv.stride, rank), _sizes(conv.dilation, rank)
    padding = conv.padding
    if padding == "same":
        extent = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:]))
        if any(e % 2 for e in extent):
            raise Unsupported(f"pads one side more than the other: {conv}", conv)
        padding = tuple(e // 2 for e in extent)
    padding = _sizes(0 if padding == "valid" else padding, rank)
    if any(padding) and conv.padding_mode != "zeros":
        raise Unsupported(f"pads with {conv.padding_mode!r}", conv)
    return Conv(weight, bias, padding, dilation, conv.groups, stride)


def graphs_conv_of(conv: nn.Module) -> Conv | TransposedConv:
    """`conv_of`, but also of the transposed ones that only graphs of convolutions take."""
    if type(conv) not in _TRANSPOSED:
        return conv_of(conv)
    check_untouched(conv)
    weight, bias = _registered(conv, conv._parameters, _PARAMETERS)
    padding, dilation, stride, more = (
        _sizes(value, weight.dim() - 2) for value in (conv.padding, conv.dilation, conv.stride, conv.output_padding)
    )
    return TransposedConv(weight, bias, padding, dilation, conv.groups, stride, more)


def resampling_of(module: nn.Module, rank: int) -> Resampling:
    """A pool or a resize of maps with so many spatial dimensions, as graphs of convolutions take them."""
    if not isinstance(module, nn.Upsample):
        pool, of_rank = pool_of(module)
        if of_rank != rank or pool.kind == "global" or pool.ceil_mode or math.prod(pool.kernel_size) > 255:
            raise Unsupported(f"is {module}", module)
        return pool
    check_untouched(module)
    size, scale = (() if value is None else _sizes(value, rank) for value in (module.size, module.scale_factor))
    ranks = _RESIZES.get(module.mode, ())
    if rank not in ranks or module.recompute_scale_factor or [len(size), len(scale)] not in ([rank, 0], [0, rank]):
        raise Unsupported(f"is {module}", module)
    return Resize(module.mode, size, scale, module.align_corners)


def pair_of(first: nn.Module, second: nn.Module, channels: int) -> Conv:
    """Two convolutions of one map as the one that writes what they write, side by side; of the first ``channels`` channels. Its
    weight is a copy, which autograd keeps."""
    convs = conv_of(first), conv_of(second)
    weights, biases, *geometry = zip(*convs)
    like = [(weight.shape[2:], bias is None) for weight, bias in zip(weights, biases)]
    if any(a != b for a, b in (like, *geometry)):
        raise Unsupported(f"is not of the kind of the convolution beside it: {second}", second)
    if weights[0].shape[0] != channels:
        raise Unsupported(f"has {weights[0].shape[0]} outputs, and the residual half {channels} channels", first)
    bias = None if biases[0] is None else torch.cat(biases)
    return convs[0]._replace(weight=torch.cat(weights), bias=bias)


def check_keeps_size(module: nn.Module, conv: Conv) -> None:
    if not conv.keeps_size:
        kernel = tuple(conv.weight.shape[2:])
        geometry = f"kernel {kernel}, stride {conv.steps}, padding {module.padding!r}, dilation {conv.dilation}"
        raise Unsupported(f"does not keep every position in its place: {geometry}", module)


def pool_kind(pool: nn.Module) -> Optional[str]:
    """average, maximum or global; None for a module that is no such pool."""
    return next((kind for kind, classes in _POOLS.items() if type(pool) in classes), None)


def pool_rank(pool: nn.Module) -> int:
    """The number of spatial dimensions of the maps that such a pool takes."""
    return 1 + _POOLS[pool_kind(pool)].index(type(pool))


def pool_of(pool: nn.Module) -> tuple[Pool, int]:
    """The pool and its number of spatial dimensions."""
    kind = pool_kind(pool)
    if kind is None:
        raise Unsupported(f"is {type(pool).__name__}", pool)
    check_untouched(pool)
    rank = pool_rank(pool)
    if kind == "global":
        if any(size != 1 for size in _sizes(pool.output_size, rank)):
            raise Unsupported(f"is {pool}", pool)
        return Pool(kind), rank
    windows = (_sizes(size, rank) for size in (pool.kernel_size, pool.stride, pool.padding))
    read = Pool(kind, *windows, pool.ceil_mode)
    known = all(getattr(pool, name, value) in (value, (value,) * rank) for name, value in _ORDINARY.items())
    if not known or (any(read.padding) and not getattr(pool, "count_include_pad", True)):
        raise Unsupported(f"is {pool}", pool)
    return read, rank


def _sizes(value: float | Sequence[float], rank: int) -> tuple:
    return (value,) * rank if isinstance(value, (int, float)) else tuple(value)


def activation_of(activation: nn.Module) -> Activation:
    check_untouched(activation)
    kind = type(activation)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", activation.negative_slope)
    if kind is nn.ELU and activation.alpha == 1:
        return Activation("elu")
    names = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Identity: "identity"}
    if kind not in names:
        raise Unsupported(f"is {activation}", activation)
    return Activation(names[kind])


def apart_of(activation: nn.Module) -> Activation:
    """`activation_of`, but also of those that only graphs of convolutions take; a PReLU's slope is left open."""
    kind = type(activation)
    name = _GELUS.get(activation.approximate) if kind is nn.GELU else _APART.get(kind)
    if name is None:
        return activation_of(activation)
    check_untouched(activation)
    return Activation(name)


def slope_of(prelu: nn.PReLU) -> Tensor:
    (weight,) = _registered(prelu, prelu._parameters, ("weight",))
    return weight
