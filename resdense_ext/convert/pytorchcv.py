"""pytorchcv's DenseNet and PreResNet, those of small images too, and subclasses that keep their forward.

A stage of its DenseNet is a plain Sequential of a transition, where it is not the first, and dense units, each of which
concatenates its input and its feature map.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from resdense_ext.convert.classes import Converted, ConvertedDenseBlock
from resdense_ext.convert.parts import FLATTEN, check_rest, layer_with_dropout, left_alone
from resdense_ext.convert.registry import check_class
from resdense_ext.nn.engine import is_transformed
from resdense_ext.nn.read import LayerModules, PooledModules, ResidualModules, Unsupported, check_untouched

__all__ = ["BLOCKS", "CHAINS", "PytorchcvStage", "recognise"]

_DENSENET = "pytorchcv.models.densenet"
_PRERESNET = "pytorchcv.models.preresnet"
_UNITS = {f"{_DENSENET}.DenseUnit": ("conv1", "conv2"), "pytorchcv.models.densenet_cifar.DenseSimpleUnit": ("conv",)}


def _conv(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The modules of a convolution behind its norm and its activation."""
    check_class(block, "pytorchcv.models.common.conv.PreConvBlock")
    check_untouched(block)
    check_rest(block, "bn", "activ", "conv")
    return block.bn, block.activ, block.conv


def _unit(unit: nn.Module) -> LayerModules:
    path = _path(unit)
    check_class(unit, path)
    names = _UNITS[path]
    check_rest(unit, *names, "dropout")
    dropout = unit.dropout if unit.use_dropout else None
    return layer_with_dropout(unit, tuple(_conv(getattr(unit, name)) for name in names), dropout)


def _path(module: nn.Module) -> Optional[str]:
    """Which of the dense units it is."""
    paths = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((path for path in paths if path in _UNITS), None)


class PytorchcvStage(ConvertedDenseBlock):
    """A Sequential of dense units, with a transition in front or without one."""

    @property
    def front(self) -> Optional[nn.Module]:
        return _split(self)[0]

    def layer_modules(self) -> list[LayerModules]:
        return [_unit(unit) for unit in _split(self)[1]]

    def forward(self, x: Tensor) -> Tensor:
        if is_transformed(x):
            return self.stock_class.forward(self, x)
        front = self.front
        return super().forward(x if front is None else front(x))

    def stock_forward(self, x: Tensor) -> Tensor:
        """The dense units in turn: what stands behind the front."""
        for unit in _split(self)[1]:
            x = unit(x)
        return x


def _split(stage: nn.Sequential) -> tuple[Optional[nn.Module], list[nn.Module]]:
    """What stands in front, if it is no dense unit, and the rest."""
    modules = list(stage)
    return (None, modules) if not modules or _path(modules[0]) else (modules[0], modules[1:])


def recognise(module: nn.Module) -> Optional[type[Converted]]:
    """The mixin for a Sequential of dense units; None for anything else.

    Raises:
        Unsupported: a unit does something of its own.
    """
    if type(module) is not nn.Sequential or "forward" in module.__dict__:
        return None
    units = _split(module)[1]
    if not units or not all(map(_path, units)):
        return None
    PytorchcvStage.layer_modules(module)
    return PytorchcvStage


def _transition(transition: nn.Module) -> PooledModules:
    check_rest(transition, "conv", "pool")
    return PooledModules(*_conv(transition.conv), transition.pool)


def _residual_unit(unit: nn.Module) -> ResidualModules:
    check_rest(unit, "body", "identity_conv")
    shortcut = (unit.identity_conv,) if unit.resize_identity else ()
    return ResidualModules("pre", _body(unit.body), shortcut)


def _body(body: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    names = tuple(body._modules)
    kind = {2: "PreResBlock", 3: "PreResBottleneck"}.get(len(names))
    if names != ("conv1", "conv2", "conv3")[: len(names)] or kind is None:
        raise Unsupported(f"holds {', '.join(names)}", body)
    check_class(body, f"{_PRERESNET}.{kind}")
    check_untouched(body)
    return tuple(_conv(block) for block in body.children())


def _stem(block: nn.Module) -> list[nn.Module]:
    return [block.conv, block.bn, block.activ, block.pool]


def _activation(block: nn.Module) -> list[nn.Module]:
    return [block.bn, block.activ]


def _net(net: nn.Module) -> list[nn.Module]:
    return [net.features, FLATTEN, net.output]


BLOCKS = {
    f"{_DENSENET}.TransitionBlock": _transition,
    f"{_PRERESNET}.PreResUnit": _residual_unit,
    "pytorchcv.models.dpn.DPNUnit": left_alone("is a dual path unit, for which there is no adapter"),
    "pytorchcv.models.peleenet.DenseBlock": left_alone("activates behind its convolutions, the engine in front of them"),
}
_NETS = "densenet.DenseNet", "densenet_cifar.CIFARDenseNet", "preresnet.PreResNet", "preresnet_cifar.CIFARPreResNet"
CHAINS = {f"{_PRERESNET}.PreResInitBlock": _stem, f"{_PRERESNET}.PreResActivation": _activation}
CHAINS |= {f"pytorchcv.models.{net}": _net for net in _NETS}
