"""`convert` and `revert`: one walk over the modules each."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import nn

from resdense_ext.checks import POLICIES
from resdense_ext.convert.budget import apply_budget, forget_plan
from resdense_ext.convert.classes import Converted, converted_class
from resdense_ext.convert.measure import positional
from resdense_ext.convert.recognise import recognise
from resdense_ext.convert.strangers import convert_strangers, put_back, remember_left
from resdense_ext.convert.verify import mismatches
from resdense_ext.nn.leaves import Unsupported
from resdense_ext.nn.protocols import OnEngine
from resdense_ext.nn.recall import forget
from resdense_ext.plan import parse_budget

__all__ = ["convert", "revert"]

_logger = logging.getLogger("resdense_ext")


def convert(
    model: nn.Module,
    policy: str = "fast",
    memory_budget: int | float | str | None = None,
    example_input: Any = None,
) -> nn.Module:
    """Makes a DenseNet or a ResNet, or what there is of one in a model, train in the memory of its features, in place.

    Equivalent to: nothing. Outputs, gradients, running statistics, Parameter objects, ``state_dict`` keys, module paths and
    classes (by `isinstance`) stay what they were; optimizers built before or after serve alike.

    A block whose inner modules carry hooks, or are of a kind that the engine does not know, runs its stock path and says so
    once. So does, without a word, every block under ``torch.export``, ``torch.jit.trace``, ``torch.fx`` and the transformations of
    ``torch.func``. ``torch.jit.script`` takes only stock classes: `revert` first.

    Args:
        model: a model with dense, residual or dual path blocks, or such a block, of this library's classes, of torchvision's,
            timm's, MONAI's or pytorchcv's, of one given to `register_adapter`, or of classes of which it knows nothing: their
            forwards are traced (torch.fx), and what provably is a dense block, a residual block, a pool behind batch norm and
            activation, convolutions of other concatenations, or a chain of convolutions and norms runs on the engines.
        policy: "fast" keeps the feature maps and the bottlenecks' pre-activations for backward, and of a residual or dual path
            block and of a chain the raw outputs of its convolutions; "min" keeps the feature maps and the residual halves or the
            outputs of residual blocks only, of a chain few outputs, and computes the rest again; "auto" keeps what there is free
            memory for. A converted model can be converted again to another policy.
        memory_budget: instead of a policy, what the whole model may keep for backward with an input like ``example_input``:
            bytes, a string such as "8GiB" (units are 1024 of the one before), or a share between 0 and 1 of what stock keeps.
            Every layer's bottleneck, and the inner maps of every residual or dual path block and every chain, are kept or computed
            again so that the fewest FLOPs are. Gradients, optimizer states and scratch come on top:
            `resdense_ext.memory.peak_bytes` measures all of it.
        example_input: for a budget and for "auto", an input of the size to train with, or a tuple of the model's positional
            inputs. The stock model is called with it. What is rewritten by a trace is compared with stock on it, outputs and
            gradients in float64, and what differs is left alone. For a budget one more forward runs with it, under the autocast
            in which `convert` is called (and for a share another stock one). Buffers and random states are put back.

    Returns:
        ``model``.

    Raises:
        ValueError: another policy; a budget below the least possible, which the message says, or without an example input.
        TypeError: ``model`` is not a Module. Errors of the model's own forward pass through.
        The model is then as it was.

    Warns:
        UserWarning: nothing in the model is recognised, or a block is left alone; the message says why. What a trace was looked
            at for and left stock is in `report`, with reasons.
    """
    _check_module(model)
    if policy not in (*POLICIES, "auto"):
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, auto, got {policy!r}")
    if policy == "auto" and memory_budget is not None:
        raise ValueError(f'memory_budget: expected None beside policy "auto", which finds one, got {memory_budget!r}')
    budget = None if memory_budget is None else parse_budget(memory_budget)
    planned = policy == "auto" or budget is not None
    if planned and example_input is None:
        raise ValueError("example_input: expected an input, of which the budget's bytes are counted, got None")
    before = _state(model)
    try:
        blocks, skipped, refused = _put_all_on_engine(model, "min" if planned else policy)
        strange, left = _put_strangers_on_engine(model, "min" if planned else policy, refused, example_input)
        blocks += strange
        forget_plan(model)
        if planned:
            apply_budget(model, budget, example_input)
    except BaseException:
        _restore(before)
        raise
    _logger.info("converted %d blocks to policy %r: %s", len(blocks), "a budget" if planned else policy, ", ".join(blocks))
    if left:
        _logger.info("left stock: %s", "; ".join(left))
    if skipped:
        warnings.warn("resdense_ext.convert left alone " + "; ".join(map(_listed, skipped.items())), stacklevel=2)
    elif not blocks:
        message = f"resdense_ext.convert recognised no dense or residual block in {type(model).__name__}"
        warnings.warn("; ".join([message, *left]), stacklevel=2)
    return model


def _put_all_on_engine(model: nn.Module, policy: str) -> tuple[list[str], dict[str, list[str]], set[nn.Module]]:
    """The paths of the blocks that an adapter knows and that are on the engine now, by reason those of what was left alone, and
    these modules."""
    blocks, skipped, refused = [], {}, set()
    # What is inside comes first: a sequence is recognised by the dense blocks in it.
    for path, module in reversed(list(model.named_modules())):
        path = path or type(module).__name__
        try:
            if not _put_on_engine(module, policy):
                continue
        except Unsupported as unsupported:
            reason = unsupported.within(module)
            skipped[reason] = [path, *skipped.pop(reason, [])]
            refused.add(module)
            continue
        kinds = ("layer_modules", "residual_modules", "dual_path_modules", "unit_modules", "end_modules")
        if any(hasattr(module, kind) for kind in kinds):
            blocks.insert(0, path)
    return blocks, dict(reversed(skipped.items())), refused


def _put_strangers_on_engine(
    model: nn.Module, policy: str, refused: set[nn.Module], example_input: Any
) -> tuple[list[str], list[str]]:
    """The paths of the blocks in modules that no adapter knows, and what stays stock and why."""
    record = convert_strangers(model, policy, refused, None if example_input is None else positional(example_input))
    left = record.left
    if example_input is not None:
        for path, reason in mismatches(model, record.owners, example_input).items():
            left.append(f"{path or type(model).__name__}: {reason}")
            put_back(record.owners.pop(path))
    remember_left(model, left)
    return record.blocks(), left


def _listed(reason_and_paths: tuple[str, list[str]]) -> str:
    reason, paths = reason_and_paths
    more = f" and {len(paths) - 3} more" if len(paths) > 4 else ""
    return f"{', '.join(paths[:3] if more else paths)}{more}: {reason}"


def _put_on_engine(module: nn.Module, policy: str) -> bool:
    """Whether the module is one that runs on the engine, which it does with this policy from here on."""
    if isinstance(module, OnEngine):
        module.policy = policy
        return True
    if not isinstance(module, Converted):
        mixin = recognise(module)
        if mixin is None:
            return False
        module.__class__ = converted_class(mixin, type(module))
    module.resdense_policy = policy
    return True


_State = list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]


def _state(model: nn.Module) -> _State:
    """Every module's class and policy: what `convert` changes."""
    names = ("policy", "resdense_policy")
    return [(m, m.__class__, {name: m.__dict__[name] for name in names if name in m.__dict__}) for m in model.modules()]


def _restore(state: _State) -> None:
    for module, cls, policies in state:
        forget(module)
        if isinstance(module, Converted):
            module.__dict__.pop("resdense_policy", None)
        module.__class__ = cls
        module.__dict__.update(policies)


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
        forget(module)
        if isinstance(module, OnEngine):
            module.policy = None
        elif isinstance(module, Converted):
            module.__class__ = module.stock_class
            # A slice of a sequence is one of its own and has none.
            module.__dict__.pop("resdense_policy", None)
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
