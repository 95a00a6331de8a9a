"""Activations as the compiled operators know them, and their backward by the framework's kernels."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import Activation

__all__ = ["LINEAR", "activation_backward", "activation_numbered", "number_of"]

LINEAR = Activation("identity")

_NUMBERS = {"relu": 0.0, "identity": 1.0, "relu6": 2.0**1000, "elu": 2.0**1001, "silu": 2.0**1002}
"""As in ``csrc/common/activation.h``."""
_NAMES = {number: name for name, number in _NUMBERS.items()}


def number_of(activation: Activation) -> float:
    """By which the operators know an activation: the slope of what is negative, or what no slope is."""
    return _NUMBERS.get(activation.name, activation.slope)


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
