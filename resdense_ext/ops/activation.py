"""Activations as the compiled operators know them, and their backward by the framework's kernels; and those that stand apart."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import Activation, accumulation_dtype, per_channel

__all__ = [
    "LINEAR",
    "activation_backward",
    "activation_numbered",
    "apart_backward",
    "is_apart",
    "number_of",
]

LINEAR = Activation("identity")

_NUMBERS = {"relu": 0.0, "identity": 1.0, "relu6": 2.0**1000, "elu": 2.0**1001, "silu": 2.0**1002}
"""As in ``csrc/common/activation.h``."""
_NAMES = {number: name for name, number in _NUMBERS.items()}


def number_of(activation: Activation) -> float:
    """By which the operators know an activation: the slope of what is negative, or what no slope is."""
    return activation.slope if activation.name == "leaky_relu" else _NUMBERS[activation.name]


def activation_numbered(number: float) -> Activation:
    """That which the operators know by this number."""
    return Activation(_NAMES[number]) if number in _NAMES else Activation("leaky_relu", number)


def activation_backward(grad: Tensor, mark: Optional[Tensor], activation: Activation) -> Tensor:
    """``grad * act'``, in one pass; the mark is what `reference.marked_slope` asks for. Of the identity it is ``grad`` itself."""
    aten, name = torch.ops.aten, activation.name
    if name == "identity":
        return grad
    if name == "relu":
        return aten.threshold_backward(grad, mark, 0)
    if name == "relu6":
        return aten.hardtanh_backward(grad, mark, 0, 6)
    if name == "leaky_relu":
        return aten.leaky_relu_backward(grad, mark, activation.slope, False)
    if name == "elu":
        return aten.elu_backward(grad, 1, 1, 1, True, mark)
    return aten.silu_backward(grad, mark)


def is_apart(activation: Activation) -> bool:
    """Whether none of our kernels has it: the framework's have, in passes of their own."""
    return activation.name in ("hardswish", "mish", "gelu", "gelu_tanh", "prelu")


def apart_backward(grad: Tensor, y: Tensor, activation: Activation) -> tuple[Tensor, Optional[Tensor]]:
    """From the gradient of ``act(y)`` that of ``y``, in new memory, and of a PReLU's weight."""
    aten, (name, slope) = torch.ops.aten, activation
    if name == "hardswish":
        return aten.hardswish_backward(grad, y), None
    if name == "mish":
        return aten.mish_backward(grad, y), None
    if name != "prelu":
        return aten.gelu_backward(grad, y, approximate="none" if name == "gelu" else "tanh"), None
    of_channels = per_channel(slope.to(y.dtype), y)
    dy, of_values = aten._prelu_kernel_backward(grad, y, of_channels)
    dimensions = [d for d in range(y.dim()) if d != 1 or len(slope) == 1]
    return dy, of_values.sum(dimensions, dtype=accumulation_dtype(y.dtype)).view(len(slope))
