"""pytorchcv's DenseNet, PreResNet and DPN, those of small images too, and subclasses that keep their forward.

A stage of its DenseNet is a plain Sequential of a transition, where it is not the first, and dense units, each of which
concatenates its input and its feature map. A DPN's halves are two arguments and two results of its units, and of the sequences
that these stand in.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor, nn

from resdense_ext.convert.classes import Converted, ConvertedDenseBlock
from resdense_ext.convert.parts import FLATTEN, check_rest, layer_with_dropout
from resdense_ext.convert.registry import check_class
from resdense_ext.nn.dispatch import is_transformed
from resdense_ext.nn.leaves import Unsupported, check_untouched
from resdense_ext.nn.protocols import DualPathModules, Halves, LayerModules, PooledModules, ResidualModules

__all__ = ["BLOCKS", "CHAINS", "PytorchcvStage", "recognise"]

_DENSENET = "pytorchcv.models.densenet"
_PRERESNET = "pytorchcv.models.preresnet"
_DPN = "pytorchcv.models.dpn"
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


def _dual_path_unit(unit: nn.Module) -> DualPathModules:
    """The last two convolutions of a "b" unit read one activated map."""
    names = ("conv1", "conv2", "preactiv", "conv3a", "conv3b") if unit.b_case else ("conv1", "conv2", "conv3")
    check_rest(unit, "conv_proj", *names)
    if unit.b_case:
        last = *_pre_activation(unit.preactiv), (unit.conv3a, unit.conv3b)
    else:
        last = _dual_path_conv(unit.conv3)
    units = _dual_path_conv(unit.conv1), _dual_path_conv(unit.conv2), last
    return DualPathModules(units, _dual_path_conv(unit.conv_proj) if unit.has_proj else None, unit.bw)


def _dual_path_conv(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    check_class(block, f"{_DPN}.DPNConv")
    check_untouched(block)
    return block.bn, block.activ, block.conv


def _pre_activation(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    check_class(block, f"{_DPN}.PreActivation")
    check_untouched(block)
    return block.bn, block.activ


class _End(NamedTuple):
    """A DPNFinalBlock: it reads both halves side by side, and gives one tensor."""

    block: nn.Module

    def joined_modules(self) -> tuple[nn.Module, nn.Module]:
        """What the engine runs together with the pool behind it, on either half."""
        return _pre_activation(self.block.activ)

    def __call__(self, halves: Halves) -> Tensor:
        return self.block(*halves)[0]


def _dual_path_sequence(sequence: nn.Module) -> list[nn.Module | _End]:
    """A stage, or the stages behind a stem and in front of what joins the halves.

    None of its modules has hooks, which would see the halves as one argument.
    """
    defaults = type(sequence).__init__.__defaults__
    schemes = sequence.dual_path_scheme, sequence.dual_path_scheme_ordinal
    if sequence.last_ordinals or any(scheme not in defaults for scheme in schemes):
        raise Unsupported("calls its modules in a way of its own", sequence)
    modules = list(sequence)
    for module in modules:
        check_untouched(module)
    stem, rest = modules[: sequence.first_ordinals], modules[sequence.first_ordinals :]
    if not rest:
        raise Unsupported("holds no dual path unit", sequence)
    if not sequence.return_two:
        check_class(rest[-1], f"{_DPN}.DPNFinalBlock")
        rest[-1] = _End(rest[-1])
    for module in rest if sequence.return_two else rest[:-1]:
        if hasattr(module, "chain_modules"):
            module.chain_modules()
        elif not hasattr(module, "dual_path_modules"):
            raise Unsupported(f"is {type(module).__name__}", module)
    return [*stem, *rest]


def _stem(block: nn.Module) -> list[nn.Module]:
    return [block.conv, block.bn, block.activ, block.pool]


def _activation(block: nn.Module) -> list[nn.Module]:
    return [block.bn, block.activ]


def _net(net: nn.Module) -> list[nn.Module]:
    return [net.features, FLATTEN, net.output]


def _dual_path_net(net: nn.Module) -> list[nn.Module]:
    return [net.features, net.output, FLATTEN]


BLOCKS = {
    f"{_DENSENET}.TransitionBlock": _transition,
    f"{_PRERESNET}.PreResUnit": _residual_unit,
    f"{_DPN}.DPNUnit": _dual_path_unit,
}
CHAINS = {
    f"{_PRERESNET}.PreResInitBlock": _stem,
    f"{_PRERESNET}.PreResActivation": _activation,
    f"{_DPN}.DPNInitBlock": _stem,
    f"{_DPN}.DPN": _dual_path_net,
    "pytorchcv.models.common.arch.DualPathSequential": _dual_path_sequence,
}
_NETS = "densenet.DenseNet", "densenet_cifar.CIFARDenseNet", "preresnet.PreResNet", "preresnet_cifar.CIFARPreResNet"
CHAINS |= {f"pytorchcv.models.{net}": _net for net in _NETS}
