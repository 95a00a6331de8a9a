"""When a backward goes through the reference, every operation of which autograd and its transformations know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["by_reference", "differentiable", "gradients"]

_Gradients = Sequence[Optional[Tensor]]


def by_reference(*grads: Optional[Tensor]) -> bool:
    """Whether a backward that runs now does: gradients are to be differentiated again, or pass through a transformation of
    ``torch.func``, forward mode or ``is_grads_batched`` of `torch.autograd.grad`, for none of which operators have rules."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        return False
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def gradients(
    outputs: Sequence[Tensor], grads: _Gradients, inputs: _Gradients, needs: Sequence[bool], create_graph: bool
) -> list[Optional[Tensor]]:
    """`torch.autograd.grad` of the outputs that have a gradient, with respect to the inputs that need one; None for the others."""
    wanted = [value for value, need in zip(inputs, needs) if need]
    outputs, grads = zip(*((out, grad) for out, grad in zip(outputs, grads) if grad is not None))
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def differentiable(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Of a backward that differentiates the reference: it may do so in any mode, which is its last argument, ``create_graph``."""

    @wraps(backward)
    def run(*args) -> _Gradients:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            return backward(*args, create_graph)

    return run
