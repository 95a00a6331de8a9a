"""Plain sequences that hold dense blocks, of whatever library."""

from __future__ import annotations

from typing import Optional

from torch import nn

from resdense_ext.convert.classes import Converted, ConvertedSequential

__all__ = ["recognise"]


def recognise(module: nn.Module) -> Optional[type[Converted]]:
    """The mixin for a `torch.nn.Sequential` with a dense block that is on the engine already; None for anything else."""
    if type(module) is not nn.Sequential or "forward" in module.__dict__:
        return None
    return ConvertedSequential if any(hasattr(child, "layer_modules") for child in module) else None
