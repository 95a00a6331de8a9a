"""What the compiled backends share: primitives whose operator has a kernel for either device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resdense_ext.ops.backend import Pending, ReferenceBackend

__all__ = ["CompiledBackend"]


class CompiledBackend(ReferenceBackend):
    """A raw schema does not bump the version counter of what it writes; these wrappers do."""

    def channel_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.resdense.channel_stats(x)

    def pending_grad_(self, pending: Pending) -> Tensor:
        increment_version(pending.dy)
        torch.ops.resdense.pending_grad(*pending)
        return pending.dy
