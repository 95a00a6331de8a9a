"""`report`: what a model keeps for backward, block by block, beside what its stock form keeps. Measured, not estimated."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from resdense_ext.convert.classes import ConvertedDenseBlock
from resdense_ext.memory import format_bytes, track_saved
from resdense_ext.nn import DenseBlock
from resdense_ext.nn.engine import stock_path, why_stock

__all__ = ["MemoryReport", "report"]

_REST = "(everything else)"


class Row(NamedTuple):
    """One block, or the rest of the model. ``policy`` is None and ``note`` says why where the stock path runs."""

    path: str
    layers: int
    policy: Optional[str]
    saved_bytes: int
    stock_saved_bytes: int
    note: str


class MemoryReport(NamedTuple):
    """``rows`` for programs, ``str()`` for people; byte counts are of one forward with the example input."""

    rows: list[Row]

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
        left = {0, 2, 6}
        lines = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


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
        A row a dense block (module path, layers, policy, bytes kept, bytes that stock keeps, note) and one for the rest.

    Raises:
        TypeError: ``model`` is not a Module. Errors of the model's own forward pass through.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    kinds = (DenseBlock, ConvertedDenseBlock)
    blocks = {path or type(m).__name__: m for path, m in model.named_modules() if isinstance(m, kinds)}
    ours = _measure(model, arguments, blocks, nullcontext())
    stock = _measure(model, arguments, blocks, stock_path())
    rows = []
    for path, block in blocks.items():
        policy, note = _state(block)
        rows.append(Row(path, len(block), policy, ours.get(path, 0), stock.get(path, 0), note))
    rest = "" if blocks else "nothing converted"
    return MemoryReport(rows + [Row(_REST, 0, None, ours.get(_REST, 0), stock.get(_REST, 0), rest)])


def _state(block: nn.Module) -> tuple[Optional[str], str]:
    policy = block.policy if isinstance(block, DenseBlock) else block.resdense_policy
    reason = "its policy is None" if policy is None else why_stock(block)
    return (policy, "") if reason is None else (None, f"stock path: {reason}")


def _measure(model: nn.Module, arguments: tuple, blocks: dict[str, nn.Module], path) -> dict[str, int]:
    with _unchanged(model), torch.inference_mode(False), torch.enable_grad(), path, track_saved() as saved, ExitStack() as hooks:
        saved.label = _REST

        def label(name: str):
            def hook(*_) -> None:
                saved.label = name

            return hook

        for name, block in blocks.items():
            for handle in (
                block.register_forward_pre_hook(label(name)),
                block.register_forward_hook(label(_REST)),
            ):
                hooks.callback(handle.remove)
        output = model(*arguments)
        totals: dict[str, int] = {}
        for storage in saved.storages():
            totals[storage.label] = totals.get(storage.label, 0) + storage.nbytes
        del output
    return totals


@contextmanager
def _unchanged(model: nn.Module):
    """Puts buffers and random states back."""
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    devices = sorted({b.device.index for b in model.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for (module, name, buffer), value in zip(buffers, values):
                module._buffers[name] = buffer
                # Only what changed: a write would make a graph that the user still holds stale.
                if buffer is not None and not torch.equal(buffer, value):
                    buffer.detach().copy_(value)
