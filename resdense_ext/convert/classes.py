"""Converted modules: the same object in a subclass of its own class.

The subclass is made for the class it stands on, so `isinstance`, paths, ``state_dict`` and whatever else the class does
need no care. It is not an attribute of any module, so pickling names the class that it stands on instead.
"""

from __future__ import annotations

from functools import cache, wraps
from inspect import getdoc, signature
from typing import Optional

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from resdense_ext.convert.registry import read
from resdense_ext.nn.chain import run_chain
from resdense_ext.nn.dispatch import is_transformed
from resdense_ext.nn.engine import run_dense_block, run_dual_path_block, run_residual_block, run_transition
from resdense_ext.nn.leaves import Unsupported
from resdense_ext.nn.protocols import DualPathModules, Halves, LayerModules, Policy, PooledModules, ResidualModules

__all__ = [
    "Converted",
    "ConvertedChain",
    "ConvertedDenseBlock",
    "ConvertedDualPathBlock",
    "ConvertedResidualBlock",
    "ConvertedSequential",
    "ConvertedTransition",
    "converted_class",
    "mixin_for",
]


class Converted:
    """Mixed in before a library's class. A subclass made by `converted_class` carries ``stock_class``."""

    stock_class: type[nn.Module]
    resdense_policy: Policy = "fast"
    makes_new_memory = False
    """Whether what it returns shares its memory with nothing else."""

    @property
    def engine_policy(self) -> Policy:
        return self.resdense_policy

    def stock_forward(self, x: Tensor) -> Tensor:
        return self.stock_class.forward(self, x)

    def __prepare_scriptable__(self):
        raise RuntimeError("torch.jit.script takes stock classes only: call resdense_ext.revert(model) first")

    def __reduce_ex__(self, protocol):
        _, (_, *arguments), *rest = super().__reduce_ex__(protocol)
        return _new, (*type(self).__bases__, *arguments), *rest


class ConvertedDenseBlock(Converted):
    """A dense block."""

    makes_new_memory = True
    front: Optional[nn.Module] = None

    def layer_modules(self) -> list[LayerModules]:
        """What `resdense_ext.nn.protocols.Block` asks for."""
        return read(self, self.stock_class)

    def forward(self, x: Tensor) -> Tensor:
        return run_dense_block(self, x)


class ConvertedResidualBlock(Converted):
    """A residual block."""

    makes_new_memory = True

    def residual_modules(self) -> ResidualModules:
        """What `resdense_ext.nn.protocols.Residual` asks for."""
        return read(self, self.stock_class)

    def forward(self, x: Tensor) -> Tensor:
        return run_residual_block(self, x)


class ConvertedDualPathBlock(Converted):
    """A dual path block."""

    def dual_path_modules(self) -> DualPathModules:
        """What `resdense_ext.nn.protocols.DualPath` asks for."""
        return read(self, self.stock_class)

    def forward(self, x: Tensor | Halves) -> Tensor | Halves:
        return run_dual_path_block(self, x)


class ConvertedTransition(Converted):
    """A transition."""

    makes_new_memory = True

    def pooled_modules(self) -> PooledModules:
        """What `resdense_ext.nn.protocols.Transition` asks for."""
        return read(self, self.stock_class)

    def forward(self, x: Tensor) -> Tensor:
        return run_transition(self, x)


class ConvertedChain(Converted):
    """A module that calls others one after another, such as a whole network."""

    def chain_modules(self) -> list[nn.Module]:
        """The modules that it calls, in their order."""
        return read(self, self.stock_class, chain=True)

    def forward(self, x: Tensor | Halves) -> Tensor | Halves:
        # Global hooks see every module, also those that are no link of their own.
        if is_transformed(x) or _has_any_global_hook():
            return self.stock_forward(x)
        try:
            links = self.chain_modules()
        except Unsupported:
            return self.stock_forward(x)
        return run_chain(links, x)


class ConvertedSequential(ConvertedChain):
    """A `torch.nn.Sequential` that holds dense or dual path blocks."""

    def chain_modules(self) -> list[nn.Module]:
        return list(self)


class _TwoArguments:
    """Mixed in before one whose stock forward takes the halves of a dual path as two arguments."""

    def stock_forward(self, x: Tensor | Halves) -> Tensor | Halves:
        return self.stock_class.forward(self, *(x if isinstance(x, tuple) else (x,)))

    def forward(self, x: Tensor, dense: Optional[Tensor] = None) -> Tensor | Halves:
        return super().forward(x if dense is None else (x, dense))


class _TwoArgumentBlock(_TwoArguments, ConvertedDualPathBlock):
    pass


class _TwoArgumentChain(_TwoArguments, ConvertedChain):
    pass


_TWO_ARGUMENTS = {ConvertedDualPathBlock: _TwoArgumentBlock, ConvertedChain: _TwoArgumentChain}


def mixin_for(stock: type[nn.Module], mixin: type[Converted]) -> type[Converted]:
    """The mixin for a class of this kind, by what its forward takes."""
    halves = mixin in _TWO_ARGUMENTS and len(signature(stock.forward).parameters) == 3
    return _TWO_ARGUMENTS[mixin] if halves else mixin


@cache
def converted_class(mixin: type[Converted], stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``stock`` whose forward is the engine's, called as that of ``stock`` is; it prints as ``stock`` does."""

    # By what it wraps, its arguments are known to whatever asks for them (torch.export, torch.fx, inspect).
    @wraps(stock.forward)
    def forward(self, *args, **kwargs):
        if kwargs:
            bound = signature(stock.forward).bind(self, *args, **kwargs)
            return mixin.forward(*bound.args, **bound.kwargs)
        return mixin.forward(self, *args)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": getdoc(stock)}
    return type(stock.__name__, (mixin, stock), {"stock_class": stock, "forward": forward, **names})


def _new(mixin: type[Converted], stock: type[nn.Module], *arguments) -> nn.Module:
    cls = converted_class(mixin, stock)
    return cls.__new__(cls, *arguments)
