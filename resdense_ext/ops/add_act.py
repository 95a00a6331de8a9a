"""``act(x + identity)``: one read of each operand and one write; backward reads the gradient and the output.

One node; its kernels are CUDA C++ or Triton on GPUs and the framework's on the CPU. Where no backend but the reference serves the
input it is the plain PyTorch of `resdense_ext.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import backend as backends
from resdense_ext.ops.activation import activation_numbered
from resdense_ext.ops.by_reference import by_reference
from resdense_ext.ops.layout import walkable_map
from resdense_ext.ops.saved import saved_tensors
from resdense_ext.reference import Activation

__all__ = ["add_act", "fused_number", "kernels_of"]


def kernels_of(x: Tensor):
    """Where the fused kernels for this input are, by their operators' names; None where there are none."""
    return backends.choose(x, x.dtype).ends


def fused_number(x: Tensor, activation: Activation) -> float | None:
    """By which the fused kernels know an activation; None where they do not serve the input, or need more than the output."""
    return backends.choose(x, x.dtype).end_number(activation) if reference.determined(activation) else None


class AddActFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, identity: Tensor, number: float):
        out = kernels_of(x).add_act(x, identity, number)
        ctx.save_for_backward(out)
        ctx.number = number
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (out,) = saved_tensors(ctx, "add_act", "its output tells the derivative of its activation")
        if by_reference(grad):
            dx = grad * reference.marked_slope(out.detach(), activation_numbered(ctx.number))
        else:
            dx = kernels_of(out).add_act_backward(walkable_map(grad, like=out), out, ctx.number)
        return dx, dx, None


def add_act(x: Tensor, identity: Tensor, activation: Activation) -> Tensor:
    """The checked call: see `resdense_ext.functional.add_act`."""
    number = fused_number(x, activation)
    if number is None:
        return reference.add_act(x, identity, activation)
    return AddActFunction.apply(walkable_map(x), walkable_map(identity, like=x), number)
