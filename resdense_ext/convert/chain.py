"""Plain sequences that hold dense or dual path blocks, of whatever library."""

from __future__ import annotations

from typing import Optional

from torch import nn

from resdense_ext.convert.classes import Converted, ConvertedSequential

__all__ = ["recognise"]


def recognise(module: nn.Module) -> Optional[type[Converted]]:
    """The mixin for a `torch.nn.Sequential` with a dense or dual path block that is on the engine already; None for anything else."""
    if type(module) is not nn.Sequential or "forward" in module.__dict__:
        return None
    kinds = ("layer_modules", "dual_path_modules")
    return ConvertedSequential if any(hasattr(child, kind) for child in module for kind in kinds) else None
