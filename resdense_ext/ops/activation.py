"""Activations by the framework's kernels, forward in place: a pass each."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext.reference import Activation

__all__ = ["LINEAR", "activate_", "activation_backward"]

LINEAR = Activation("identity")

_IN_PLACE = {"relu6": F.relu6, "elu": F.elu, "silu": F.silu}


def activate_(y: Tensor, activation: Activation) -> Tensor:
    """``act(y)`` in the place of ``y``, of those activations that the compiled operators do not know."""
    return _IN_PLACE[activation.name](y, inplace=True)


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
