"""`convert` and `revert`: one walk over the modules each."""

from __future__ import annotations

import logging
import warnings

from torch import nn

from resdense_ext.convert import torchvision
from resdense_ext.convert.classes import ConvertedDenseBlock, converted_class
from resdense_ext.functional import POLICIES
from resdense_ext.nn import DenseBlock
from resdense_ext.nn.engine import Unsupported

__all__ = ["convert", "revert"]

_ADAPTERS = (torchvision.recognise,)
_logger = logging.getLogger("resdense_ext")


def convert(model: nn.Module, policy: str = "fast") -> nn.Module:
    """Makes a model's dense blocks train in the memory of their features, in place.

    Equivalent to: nothing. Outputs, gradients, running statistics, Parameter objects, ``state_dict`` keys, module paths and
    classes (by `isinstance`) stay what they were; optimizers built before or after serve alike.

    A block whose inner modules carry hooks, or are of a kind that the engine does not know, runs its stock path and says so
    once. So does, without a word, every block under ``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``torch.fx`` and
    the transformations of ``torch.func``. ``torch.jit.script`` takes only stock classes: `revert` first.

    Args:
        model: a model with dense blocks of torchvision's classes or of this library's, or such a block.
        policy: "fast" keeps the feature maps and the bottlenecks' pre-activations for backward; "min" keeps the feature maps
            only and computes the bottlenecks again. A converted model can be converted again to another policy.

    Returns:
        ``model``.

    Raises:
        ValueError: another policy.
        TypeError: ``model`` is not a Module.

    Warns:
        UserWarning: nothing in the model is recognised, or a block is left alone; the message says why.
    """
    _check_module(model)
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    converted, skipped = [], []
    for path, module in model.named_modules():
        path = path or type(module).__name__
        if isinstance(module, DenseBlock):
            module.policy = policy
        elif isinstance(module, ConvertedDenseBlock):
            module.resdense_policy = policy
        else:
            try:
                mixin = next(filter(None, (recognise(module) for recognise in _ADAPTERS)), None)
            except Unsupported as unsupported:
                skipped.append(f"{path}: {unsupported.within(module)}")
                continue
            if mixin is None:
                continue
            module.__class__ = converted_class(mixin, type(module))
            module.resdense_policy = policy
        converted.append(path)
    _logger.info("converted %d blocks to policy %r: %s", len(converted), policy, ", ".join(converted))
    if skipped:
        warnings.warn("resdense_ext.convert left alone " + "; ".join(skipped), stacklevel=2)
    elif not converted:
        warnings.warn(f"resdense_ext.convert recognised no dense block in {type(model).__name__}", stacklevel=2)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Gives every converted module its stock class back (this library's own blocks: their stock path), in place.

    Args:
        model: a model, converted or not.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a Module.
    """
    _check_module(model)
    for module in model.modules():
        if isinstance(module, DenseBlock):
            module.policy = None
        elif isinstance(module, ConvertedDenseBlock):
            module.__class__ = module.stock_class
            del module.resdense_policy
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
