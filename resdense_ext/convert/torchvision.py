"""torchvision's DenseNet: ``torchvision.models.densenet._DenseBlock`` and subclasses that keep its forward."""

from __future__ import annotations

import sys
from typing import Optional

from torch import nn

from resdense_ext.convert.classes import ConvertedDenseBlock
from resdense_ext.nn.engine import LayerModules

__all__ = ["TorchvisionDenseBlock", "recognise"]


class TorchvisionDenseBlock(ConvertedDenseBlock):
    def layer_modules(self) -> list[LayerModules]:
        return [
            LayerModules(
                layer,
                ((layer.norm1, layer.relu1, layer.conv1), (layer.norm2, layer.relu2, layer.conv2)),
                layer.drop_rate,
            )
            for layer in self.values()
        ]


def recognise(module: nn.Module) -> Optional[tuple[type[ConvertedDenseBlock], Optional[str]]]:
    """The mixin for a torchvision block and the reason not to convert it, if there is one; None for anything else."""
    # Where torchvision's module is not loaded, none of its classes exists.
    library = sys.modules.get("torchvision.models.densenet")
    if library is None or not isinstance(module, library._DenseBlock):
        return None
    if type(module).forward is not library._DenseBlock.forward:
        return TorchvisionDenseBlock, f"{type(module).__name__} has a forward of its own"
    for name, layer in module.items():
        kind = type(layer)
        stock = library._DenseLayer
        if not isinstance(layer, stock) or any(
            getattr(kind, method) is not getattr(stock, method) for method in ("forward", "bn_function")
        ):
            return TorchvisionDenseBlock, f"its {name} is a {kind.__name__} with a forward of its own"
    return TorchvisionDenseBlock, None
