"""A policy for every layer, from a budget of bytes: what the layers offer is measured by one forward, and `plan` chooses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resdense_ext.checks import autocasts
from resdense_ext.convert.measure import positional, unchanged
from resdense_ext.memory import format_bytes, track_saved
from resdense_ext.nn.dispatch import stock_path, watching
from resdense_ext.nn.engine import why_stock
from resdense_ext.nn.protocols import Halves, LayerModules, OnEngine, Policy
from resdense_ext.nn.read import read_conv_graph, read_dual_path_block, read_layers, read_residual_block
from resdense_ext.ops import conv_graph_plan, dual_path_stage
from resdense_ext.ops.residual_maps import cost_of
from resdense_ext.plan import Choice, choose

__all__ = ["Plan", "apply_budget", "forget_plan", "plan_of"]


class Plan(NamedTuple):
    """What was asked for and what it comes to, for the example input of the conversion.

    A residual or dual path block's maps are kept or computed again together, and count as one bottleneck; of a graph of
    convolutions every map does that "fast" keeps and "min" does not. ``recomputed_flops`` are those of the bottlenecks that
    backward computes again, of ``bottleneck_flops`` in all.
    """

    budget: int
    predicted_bytes: int
    kept: int
    bottlenecks: int
    recomputed_flops: int
    bottleneck_flops: int

    def __str__(self) -> str:
        share = self.recomputed_flops / max(self.bottleneck_flops, 1)
        return (
            f"plan: {format_bytes(self.predicted_bytes)} of a budget of {format_bytes(self.budget)}; {self.kept} of "
            f"{self.bottlenecks} bottlenecks kept, {self.recomputed_flops / 1e9:.2f} GFLOP ({share:.0%} of theirs) computed again"
        )


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def plan_of(model: nn.Module) -> Optional[Plan]:
    """The plan that the model was converted by."""
    return _plans.get(model)


def forget_plan(model: nn.Module) -> None:
    _plans.pop(model, None)


class _Offers:
    """The blocks' choices, in the order in which they run; a block that runs twice offers both runs together.

    ``scratch`` is about what the most demanding block's backward takes beside what is kept: of a dense block a gradient of its
    buffer and four maps of the bottleneck's width, of a residual or dual path block its maps, and as much for their gradients, and
    of a dual path block a gradient of both halves; of a graph of convolutions what its plan says.
    """

    def __init__(self) -> None:
        self.of: dict[nn.Module, list[Optional[Choice]]] = {}
        self.scratch = 0

    def hear(self, module: Optional[nn.Module], x: Tensor | Halves | None) -> None:
        if module is None or why_stock(module) is not None:
            return
        if hasattr(module, "layer_modules"):
            layers = module.layer_modules()
            if not _is_differentiated(x, read_layers(layers)):
                return
            new = [_offer(layer, x) for layer in layers]
            outputs = x.shape[1] + sum(layer.units[-1][2].weight.shape[0] for layer in layers)
            widest = max((choice.nbytes for choice in new if choice is not None), default=0)
            scratch = x.nbytes // x.shape[1] * outputs + 4 * widest
        elif hasattr(module, "residual_modules"):
            block, _, last = read_residual_block(module.residual_modules())
            if not _is_differentiated(x, block):
                return
            new = [Choice(*cost_of(x, block, last, _compute_dtype(x, block.units[0].conv.weight)))]
            scratch = 2 * new[0].nbytes
        elif hasattr(module, "dual_path_modules"):
            block, _ = read_dual_path_block(module.dual_path_modules())
            halves = x if isinstance(x, tuple) else (x,)
            if not _is_differentiated(halves, block):
                return
            dtype = _compute_dtype(halves[0], block.units[0].conv.weight)
            new = [Choice(*dual_path_stage.cost_of(halves[0], block, dtype))]
            scratch = sum(half.nbytes for half in halves) + 2 * new[0].nbytes
        elif hasattr(module, "graph_modules"):
            graph = read_conv_graph(module.graph_modules())([source.shape[1] for source in x])
            if not _is_differentiated(x, graph):
                return
            offer = conv_graph_plan.offer_of(x, graph, _compute_dtype(x[0], graph.convs[0].weight))
            new = [None if of_map is None else Choice(*of_map) for of_map in offer.maps]
            scratch = offer.scratch
        else:
            return
        self.scratch = max(self.scratch, scratch)
        before = self.of.get(module, new)
        self.of[module] = new if before is new else [_sum(a, b) for a, b in zip(before, new)]


def _is_differentiated(*read: Any) -> bool:
    """Whether a block that reads these tensors keeps anything; none does in a frozen front of a network, or without gradients."""
    tensors = (t for t in tree_leaves(read) if isinstance(t, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _offer(layer: LayerModules, x: Tensor) -> Optional[Choice]:
    """What its bottleneck takes for the block's input ``x``; None where it has none."""
    if len(layer.units) < 2:
        return None
    weight = layer.units[0][2].weight
    positions = x.numel() // x.shape[1]
    return Choice(positions * weight.shape[0] * _compute_dtype(x, weight).itemsize, 2 * positions * weight.numel())


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    casts = autocasts(x.device.type) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else weight.dtype


def _sum(a: Optional[Choice], b: Optional[Choice]) -> Optional[Choice]:
    return None if a is None or b is None else Choice(a.nbytes + b.nbytes, a.flops + b.flops)


def apply_budget(model: nn.Module, budget: int | float | None, example_input: Any) -> None:
    """Chooses what every dense, residual and dual path block of a model, and every graph of convolutions, keeps that is on the
    engine with policy "min".

    Args:
        budget: bytes, below 1 a share of what stock keeps, or None: what is free on the model's device, or the least possible.

    Raises:
        ValueError: the budget is less than the least possible. Errors of the model's own forward pass through.
    """
    offers, arguments = _Offers(), positional(example_input)
    with unchanged(model):
        if budget is not None and budget < 1:
            with stock_path(), track_saved() as saved:
                graph = model(*arguments)
                budget = int(budget * saved.bytes())
            del graph
        with watching(offers.hear), track_saved() as saved:
            graph = model(*arguments)
            least = saved.bytes()
        del graph
    if budget is None:
        budget = max(_free_budget(model, arguments) - offers.scratch, least)
    if budget < least:
        raise ValueError(
            f"memory_budget: expected at least {least} bytes ({format_bytes(least)}), the least that {type(model).__name__} "
            f"can keep for this input, got {budget} bytes ({format_bytes(budget)})"
        )
    places = [(block, i) for block, choices in offers.of.items() for i, choice in enumerate(choices) if choice is not None]
    choices = [offers.of[block][i] for block, i in places]
    keep = choose(choices, budget - least)
    kept = {place for place, wanted in zip(places, keep) if wanted}
    for block, offered in offers.of.items():
        policy: Policy = tuple((block, i) in kept for i in range(len(offered)))
        if not hasattr(block, "layer_modules"):
            chosen = [keep for keep, choice in zip(policy, offered) if choice is not None]
            policy = "min" if not any(chosen) else "fast" if all(chosen) else policy
        setattr(block, "policy" if isinstance(block, OnEngine) else "resdense_policy", policy)
    flops = sum(choice.flops for choice in choices)
    spared = sum(choice.flops for choice, wanted in zip(choices, keep) if wanted)
    bytes_kept = sum(choice.nbytes for choice, wanted in zip(choices, keep) if wanted)
    _plans[model] = Plan(budget, least + bytes_kept, sum(keep), len(keep), flops - spared, flops)


def _free_budget(model: nn.Module, arguments: tuple) -> int:
    """Nine tenths of the device's free memory, less gradients and an optimizer's two moments of what has no gradient yet."""
    tensors = [t for t in (*model.parameters(), *arguments) if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    missing = sum(p.nbytes for p in model.parameters() if p.requires_grad and p.grad is None)
    return int(0.9 * _free_bytes(device)) - 3 * missing


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    # Where the system does not say what is available: half of what there is.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
