"""A network whose batch norms with activations are inplace_abn's, which keeps of both the output alone and inverts it in backward.

Source: Rota Bulò, Porzi, Kontschieder, In-Place Activated BatchNorm for Memory-Optimized Training of DNNs (2018); the package
https://github.com/mapillary/inplace_abn.
"""

from __future__ import annotations

import importlib

import torch
from torch import fx, nn

__all__ = ["NotOffered", "leaky", "with_inplace_abn"]

INSTALL = "pip install inplace-abn (it is compiled from its sources)"
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WRITERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CATS = (torch.cat, torch.concat, torch.concatenate)


class NotOffered(Exception):
    """Why a network cannot be had with inplace_abn."""


def leaky(network: nn.Module) -> nn.Module:
    """The network with `torch.nn.LeakyReLU` in the place of every `torch.nn.ReLU`, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.ReLU:
                setattr(module, name, nn.LeakyReLU(inplace=child.inplace))
    return network


def with_inplace_abn(network: nn.Module) -> fx.GraphModule:
    """What computes the same as a network in training, on its own parameters and running statistics.

    Batch norms that alone read a convolution's output or a concatenation, and alone are read by a leaky ReLU or an ELU, become
    ``InPlaceABN``. That scales by ``abs(weight) + eps``, so ``eps`` is taken off the network's weights.

    Raises:
        NotOffered: the package is not installed, the network does not trace, or has no such norms, or scales that are not positive.
    """
    try:
        layer = importlib.import_module("inplace_abn").InPlaceABN
    except ImportError as error:
        raise NotOffered(f"{error}: {INSTALL}") from None
    try:
        graph = fx.symbolic_trace(network)
    except Exception as error:
        raise NotOffered(f"torch.fx does not trace the network: {str(error).partition(chr(10))[0]}") from None
    modules = dict(graph.named_modules())
    pairs = [(node.args[0], node) for node in graph.graph.nodes if _is_pair(node, modules)]
    if not pairs:
        raise NotOffered("no batch norm stands between a convolution and a leaky ReLU or ELU (--leaky-relu makes leaky ones of all ReLUs)")
    if any((modules[norm.target].weight <= modules[norm.target].eps).any() for norm, _ in pairs):
        raise NotOffered("it takes scales for positive ones, and not all of the network's are")
    for norm, activation in pairs:
        graph.add_submodule(norm.target, _joined(layer, modules[norm.target], modules[activation.target]))
        activation.replace_all_uses_with(norm)
        graph.graph.erase_node(activation)
    graph.recompile()
    return graph


def _is_pair(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it is an activation behind a norm that may overwrite what it reads."""
    norm = node.args[0] if node.op == "call_module" and type(modules[node.target]) in (nn.LeakyReLU, nn.ELU) else None
    if not isinstance(norm, fx.Node) or norm.op != "call_module" or len(norm.users) > 1:
        return False
    module, read = modules[norm.target], norm.args[0]
    written = isinstance(modules.get(read.target), WRITERS) if read.op == "call_module" else read.target in CATS
    return type(module) in NORMS and module.affine and written and len(read.users) == 1


def _joined(layer: type[nn.Module], norm: nn.Module, activation: nn.Module) -> nn.Module:
    kind, number = ("elu", activation.alpha) if type(activation) is nn.ELU else ("leaky_relu", activation.negative_slope)
    statistics = {"momentum": norm.momentum, "track_running_stats": norm.track_running_stats}
    joined = layer(norm.num_features, norm.eps, **statistics, activation=kind, activation_param=number)
    with torch.no_grad():
        norm.weight -= norm.eps
    joined.weight, joined.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(joined, name, buffer)
    return joined.train(norm.training)
