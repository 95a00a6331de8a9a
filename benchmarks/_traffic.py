"""The bytes that a training step must move on the engines, calculated: the floor of its time on a GPU."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

__all__ = ["step_bytes"]

SIXTEEN_BITS = 2
ADDITION = 6
"""Maps read or written at a residual block's end: two and its output; backward the output's gradient, the output's sign, its input's
gradient."""


def step_bytes(network: nn.Module, images: Tensor) -> int:
    """Of torchvision's DenseNets and ResNets in 16 bits, in training; weights and vectors are not counted.

    Every map that a pass over a convolution, or the addition at a residual block's end, needs is read or written once a pass. A
    convolution reads its input, x, and writes its output, z. Its data gradient reads z and its gradient, from which that of the
    norm behind it comes, and x, whose sign masks the gradient that it writes; one that adds to another layer's reads that, too.
    Its weight gradient reads x, z and z's gradient. Norms, activations and pools are parts of these.

    Args:
        network: is called on the images; its parameters require gradients.
        images: on the device "meta", where nothing is computed.
    """
    moved: list[int] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            # The layer's or block's input has other readers.
            module.register_forward_hook(partial(_convolution, moved, name.endswith(".conv1")))
        elif hasattr(module, "downsample"):
            module.register_forward_hook(lambda module, inputs, out: moved.append(ADDITION * out.numel()))
    network(images)
    return SIXTEEN_BITS * sum(moved)


def _convolution(moved: list[int], adds: bool, conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
    x, z = inputs[0].numel(), out.numel()
    forward, weight = x + z, x + 2 * z
    data = (2 + adds) * x + 2 * z if inputs[0].requires_grad else 0
    moved.append(forward + data + weight)
