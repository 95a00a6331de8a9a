"""Compares what runs by a trace with what it stands for, on the inputs that an example gives it."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from resdense_ext.convert.measure import positional, unchanged
from resdense_ext.convert.strangers import Stranger
from resdense_ext.nn.dispatch import stock_path

__all__ = ["mismatches"]

_TOLERANCE = 1e-8
"""Relative, of norms in float64: far above rounding, far below whatever a different computation does."""


def mismatches(model: nn.Module, owners: dict[str, nn.Module], example_input: Any) -> dict[str, str]:
    """Why modules that run by a trace must not, by path: outputs, gradients or buffers that differ from stock's.

    One stock forward of the model gives every owner its inputs. With these a copy in float64 runs its trace, and one its stock
    forward, from the same random state; both are in the modes in which the owner is.

    Raises:
        Errors of the model's own forward pass through. Buffers and random states are then as before, too.
    """
    inputs: dict[str, tuple] = {}

    def remember(path: str):
        def hook(_, args: tuple, kwargs: dict) -> None:
            if not kwargs:
                inputs.setdefault(path, tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args))

        return hook

    handles = [owner.register_forward_pre_hook(remember(path), with_kwargs=True) for path, owner in owners.items()]
    try:
        with unchanged(model), torch.no_grad(), stock_path():
            model(*positional(example_input))
    finally:
        for handle in handles:
            handle.remove()
    found = {path: _mismatch(owner, inputs[path]) for path, owner in owners.items() if path in inputs}
    return {path: reason for path, reason in found.items() if reason is not None}


def _mismatch(owner: nn.Module, args: tuple) -> str | None:
    devices = {t.device for t in (*owner.parameters(), *owner.buffers())}
    if torch.device("meta") in devices:
        return None  # there are no values to compare
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d.index for d in devices if d.type == "cuda"]))
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            stock = _run(owner, args, by_trace=False)
        except Exception as error:
            return f"cannot be compared in float64: {type(error).__name__}: {error}"
        try:
            ours = _run(owner, args, by_trace=True)
        except Exception as error:
            return f"its trace fails where its forward does not: {type(error).__name__}: {error}"
    if ours.keys() != stock.keys():
        return f"has no {', '.join(sorted(ours.keys() ^ stock.keys()))} by its trace, or none by its forward"
    # Some are zero but for rounding, such as the mean of what was convolved of a map of mean zero: the largest says what is small.
    largest = {
        kind: max((t.nan_to_num(0, 0, 0).norm() for name, t in stock.items() if name.startswith(kind) and t.dim()), default=0.0)
        for kind in ("output", "gradient", "buffer")
    }
    for name, expected in stock.items():
        if ours[name].shape != expected.shape:
            return f"its {name} has shape {tuple(ours[name].shape)} by its trace, {tuple(expected.shape)} by its forward"
        scale = expected.norm() + 0.01 * largest[name.partition(" ")[0]]
        error = (ours[name] - expected).norm()
        if not (error <= _TOLERANCE * scale or (error.isnan() and expected.isnan().any())):
            return f"its {name} differs by {float(error / scale):.1e} from that of its forward"
    return None


def _run(owner: nn.Module, args: tuple, by_trace: bool) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a copy in float64."""
    torch.manual_seed(0)
    twin = copy.deepcopy(owner).double()
    for module in twin.modules():
        if isinstance(module, Stranger) and not by_trace:
            module.__class__ = module.stock_class
    args = tree_map(_in_float64, args)
    with torch.enable_grad():
        outputs = [y for y in tree_leaves(twin(*args)) if isinstance(y, Tensor) and y.is_floating_point()]
        results = {f"output {i}": y for i, y in enumerate(outputs)}
        weighted = [(y * torch.randn(y.shape, dtype=y.dtype).to(y.device)).sum() for y in outputs if y.requires_grad]
        if weighted:
            sum(weighted).backward()
    tensors = {f"gradient of input {i}": x.grad for i, x in enumerate(tree_leaves(args)) if isinstance(x, Tensor)}
    tensors |= {f"gradient of {name}": p.grad for name, p in twin.named_parameters()}
    tensors |= {f"buffer {name}": b for name, b in twin.named_buffers()}
    return {name: t.detach().double() for name, t in (results | tensors).items() if t is not None}


def _in_float64(x: Any) -> Any:
    return x.double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
