"""A network under torch.compile that keeps no more for backward than a share of what it would by itself."""

from __future__ import annotations

import torch
from torch import nn
from torch._functorch import config

__all__ = ["compile_within"]


def compile_within(network: nn.Module, share: float) -> nn.Module:
    """``torch.compile(network)`` under an activation memory budget, a share from 0 (all is computed again) to 1 (as without).

    The budget is set while this network is compiled, and for no other one: networks of one class share their compiled code as far
    as they have the same backend.
    """

    def backend(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=share):
            return compile_fx(graph, inputs)

    return torch.compile(network, backend=backend)
