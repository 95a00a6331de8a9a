"""``conv(act(bn(x)))``: a graph of one convolution, of which backward keeps x and its statistics, but no activation.

See `resdense_ext.ops.conv_graph`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops.batch_norm import batch_norm
from resdense_ext.ops.conv_graph_function import conv_graph
from resdense_ext.reference import Activation, BatchNorm, Conv, ConvGraph, Piece, Unit

__all__ = ["bn_act_conv"]


def bn_act_conv(x: Tensor, norm: BatchNorm, conv: Conv, activation: Activation) -> Tensor:
    """The checked call: see `resdense_ext.functional.bn_act_conv`."""
    if x.numel() == 0:
        return reference.bn_act_conv(x, Unit(norm, conv), activation)
    if torch.compiler.is_compiling():
        activated = reference.activate(batch_norm(x, norm), activation)
        return reference.convolution(activated.to(conv.weight.dtype), conv)
    read, written = Piece(0, 0, activation), Piece(1)
    (out,) = conv_graph([x], ConvGraph((conv,), ((read,),), (norm,), ((written,),)))
    return out
