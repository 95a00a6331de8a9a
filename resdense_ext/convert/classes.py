"""Converted modules: the same object in a subclass of its own class.

The subclass is made for the class it stands on, so `isinstance`, paths, ``state_dict`` and whatever else the class does
need no care. It is not an attribute of any module, so pickling names the class that it stands on instead.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from resdense_ext.nn.engine import LayerModules, run_dense_block

__all__ = ["ConvertedDenseBlock", "converted_class"]


class ConvertedDenseBlock:
    """Mixed in before a library's dense block class: its forward on the engine.

    A subclass made by `converted_class` carries ``stock_class``; an adapter's mixin says what a layer's modules are.
    """

    stock_class: type[nn.Module]
    resdense_policy: str

    def layer_modules(self) -> list[LayerModules]:
        """What `resdense_ext.nn.engine.Block` asks for; an adapter's part."""

    def stock_forward(self, x: Tensor) -> Tensor:
        return self.stock_class.forward(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return run_dense_block(self, x, self.resdense_policy)

    def __prepare_scriptable__(self):
        raise RuntimeError("torch.jit.script takes stock classes only: call resdense_ext.revert(model) first")

    def __reduce_ex__(self, protocol):
        _, (_, *arguments), *rest = super().__reduce_ex__(protocol)
        return _new, (*type(self).__bases__, *arguments), *rest


@cache
def converted_class(mixin: type[ConvertedDenseBlock], stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``stock`` whose forward is the engine's; it prints as ``stock`` does."""
    names = {"stock_class": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (mixin, stock), names)


def _new(mixin: type[ConvertedDenseBlock], stock: type[nn.Module], *arguments) -> nn.Module:
    cls = converted_class(mixin, stock)
    return cls.__new__(cls, *arguments)
