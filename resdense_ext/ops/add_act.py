"""``act(x + identity)``: one read of each operand and one write; backward reads the gradient and the output.

Compiled for CUDA; elsewhere it is the plain PyTorch of `resdense_ext.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops._library import CUDA_LIBRARY
from resdense_ext.reference import Activation

__all__ = ["add_act", "compiled_slope"]


def compiled_slope(x: Tensor, activation: Activation) -> float | None:
    """The negative slope by which the CUDA kernels know an activation; None where they do not serve the input.

    Backward tells the sign of the activation's input from that of its output, so the slope may not be negative.
    """
    slope = {"relu": 0.0, "identity": 1.0, "leaky_relu": activation.slope}.get(activation.name)
    if CUDA_LIBRARY is not None or not x.is_cuda or slope is None or slope < 0:
        return None
    return slope


class AddActFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, identity: Tensor, slope: float):
        out = torch.ops.resdense.add_act(x, identity, slope)
        ctx.save_for_backward(out)
        ctx.slope = slope
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (out,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = grad * reference.activation_slope(out.detach(), Activation("leaky_relu", ctx.slope))
        else:
            dx = torch.ops.resdense.add_act_backward(grad, out, ctx.slope)
        return dx, dx, None


def add_act(x: Tensor, identity: Tensor, activation: Activation) -> Tensor:
    """The checked call: see `resdense_ext.functional.add_act`."""
    slope = compiled_slope(x, activation)
    if slope is None:
        return reference.add_act(x, identity, activation)
    return AddActFunction.apply(x, identity, slope)
