"""`report`: what a model keeps for backward, block by block, beside what its stock form keeps. Measured, not estimated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional

from torch import Tensor, nn

from resdense_ext.convert.budget import Plan, plan_of
from resdense_ext.convert.classes import Converted
from resdense_ext.convert.measure import positional, unchanged
from resdense_ext.convert.strangers import Stranger, left_in, named_parts
from resdense_ext.memory import format_bytes, track_saved
from resdense_ext.nn.dispatch import stock_path, watching
from resdense_ext.nn.engine import why_stock
from resdense_ext.nn.leaves import Unsupported
from resdense_ext.nn.protocols import READ_FROM_MODULES, OnEngine, Policy

__all__ = ["MemoryReport", "report"]

_REST = "(everything else)"


class Row(NamedTuple):
    """One block or transition, or the rest of the model. ``policy`` is None and ``note`` says why where the stock path runs; of a
    block to which the forward does not come, the note says that.

    ``layers`` counts a dense block's layers or the convolutions of a residual or dual path block or of a graph of them. A dense block's bytes are those
    of the transition or head behind it, too, and a dual path block's those of the blocks behind it, where they run in one node.
    """

    path: str
    layers: int
    policy: Optional[str]
    saved_bytes: int
    stock_saved_bytes: int
    note: str


class MemoryReport(NamedTuple):
    """``rows`` for programs, ``str()`` for people; byte counts are of one forward with the example input.

    ``plan`` is what a budget came to, of a model that was converted by one; its bytes are of the conversion's example input.
    ``left`` names what a trace was looked at for and stayed stock, with reasons.
    """

    rows: list[Row]
    plan: Optional[Plan] = None
    left: list[str] = []

    @property
    def saved_bytes(self) -> int:
        return sum(row.saved_bytes for row in self.rows)

    @property
    def stock_saved_bytes(self) -> int:
        return sum(row.stock_saved_bytes for row in self.rows)

    def __str__(self) -> str:
        total = Row("total", sum(r.layers for r in self.rows), None, self.saved_bytes, self.stock_saved_bytes, "")
        header = ("module", "layers", "policy", "keeps", "stock keeps", "ratio", "")
        table = [header] + [_cells(row) for row in (*self.rows, total)]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        to_the_left = {0, 2, 6}
        lines = [
            "  ".join(c.ljust(w) if i in to_the_left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        plan = [] if self.plan is None else [str(self.plan)]
        left = [f"left stock: {entry}" for entry in self.left]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *plan, *left])


def _cells(row: Row) -> tuple[str, ...]:
    ratio = f"{row.saved_bytes / row.stock_saved_bytes:.2f}" if row.stock_saved_bytes else ""
    kept, stock = format_bytes(row.saved_bytes), format_bytes(row.stock_saved_bytes)
    return (row.path, str(row.layers or ""), row.policy or "", kept, stock, ratio, row.note)


def report(model: nn.Module, example_input: Any) -> MemoryReport:
    """Measures what a forward keeps for backward, converted and stock, by block.

    Both forwards run in the model's present mode with gradients enabled; buffers and random states are put back.

    Args:
        model: a model, converted or not.
        example_input: its input, or a tuple of its positional inputs.

    Returns:
        A row a dense block, transition, residual or dual path block (module path, layers, policy, bytes kept, bytes that stock
        keeps, note) and one for the rest.

    Raises:
        TypeError: ``model`` is not a Module. Errors of the model's own forward pass through.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    arguments = positional(example_input)
    blocks = dict(_blocks(model))
    ours = _measure(model, arguments, blocks, nullcontext())
    if blocks != (seen := dict(_blocks(model))):  # a module was given optional inputs for the first time
        blocks, ours = seen, _measure(model, arguments, seen, nullcontext())
    stock = _measure(model, arguments, blocks, stock_path())
    rows = []
    for path, block in blocks.items():
        policy, note = _state(block)
        layers = _layers(block)
        if layers and not note and path not in ours:
            note = "not run"
        rows.append(Row(path, layers, policy, ours.get(path, 0), stock.get(path, 0), note))
    rest = "" if blocks else "nothing converted"
    rows.append(Row(_REST, 0, None, ours.get(_REST, 0), stock.get(_REST, 0), rest))
    return MemoryReport(rows, plan_of(model), left_in(model))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, Stranger):
            yield from named_parts(path, module)
        elif _has_a_row(module):
            yield path or type(module).__name__, module


def _has_a_row(module: nn.Module) -> bool:
    return isinstance(module, (OnEngine, Converted)) and any(hasattr(module, kind) for kind in READ_FROM_MODULES)


def _layers(block: nn.Module) -> int:
    try:
        if hasattr(block, "layer_modules"):
            return len(block.layer_modules())
        if hasattr(block, "graph_modules"):
            return sum(isinstance(module, nn.modules.conv._ConvNd) for module, _ in block.graph_modules().convs)
        if hasattr(block, "residual_modules"):
            return len(block.residual_modules().units)
        return len(block.dual_path_modules().units) if hasattr(block, "dual_path_modules") else 0
    except Unsupported:
        return 0


def _state(block: nn.Module) -> tuple[Optional[str], str]:
    policy = block.engine_policy
    reason = "its policy is None" if policy is None else why_stock(block)
    return (_named(policy, block), "") if reason is None else (None, f"stock path: {reason}")


def _named(policy: Policy, block: nn.Module) -> str:
    """A policy for people: of bools, how many bottlenecks of a dense block are kept, and how many maps of a graph."""
    if isinstance(policy, str):
        return policy
    return f"min and {sum(policy)} more" if hasattr(block, "graph_modules") else f"{sum(policy)} of {len(policy)} kept"


def _measure(model: nn.Module, arguments: tuple, blocks: dict[str, nn.Module], path) -> dict[str, int]:
    """The bytes of every block that the forward has come to, and of the rest."""
    paths, totals = {block: path for path, block in blocks.items()}, {}
    with unchanged(model), path, track_saved() as saved:
        saved.label = _REST

        def label(module: Optional[nn.Module], _: Optional[Tensor]) -> None:
            saved.label = paths.get(module, _REST)
            totals.setdefault(saved.label, 0)

        with watching(label):
            output = model(*arguments)
        for storage in saved.storages():
            totals[storage.label] = totals.get(storage.label, 0) + storage.nbytes
        del output
    return totals
