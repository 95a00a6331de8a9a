"""The launch configurations that ship: a small fixed table by operation, shape class, precision and architecture.

The table is ``configs.json`` beside this file. `resdense bench --tune` measures the candidates on a GPU and writes it anew; nothing
is ever tuned at import or in a training step.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from resdense_ext.kernels.launch import power_of_two, remembered, tf32

__all__ = ["CANDIDATES", "OPS", "TABLE", "Config", "Key", "config_of", "key_of", "table"]

TABLE = Path(__file__).with_name("configs.json")
OPS = ("bn_act_conv", "bn_act_conv_backward_data", "bn_act_conv_backward_weight")


class Config(NamedTuple):
    """Tile sizes of the matrix product, ``BLOCK_K`` along what is summed; ``each`` programs share a multiprocessor."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    each: int

    @remembered
    def constants(self) -> dict[str, int]:
        """What a launch takes."""
        return {name: value for name, value in self._asdict().items() if name != "each"}


class Key(NamedTuple):
    """``taps`` is 1, "many" or, where positions do not stay in their places, "strided"; ``precision`` of the product: 16 or, but
    for strided ones, "tf32" or "ieee"; ``arch`` 80, 90 or 100."""

    op: str
    taps: str
    precision: str
    arch: int


CANDIDATES = tuple(
    Config(m, n, k, warps, stages, each)
    for m in (64, 128)
    for n in (32, 64, 128)
    for k in (32, 64)
    for warps in (4, 8)
    for stages in (2, 3, 4)
    for each in (1, 2)
)
"""What `resdense bench --tune` chooses from."""


@functools.cache
def table() -> dict[Key, Config]:
    """The table as it is on disk."""
    return {Key(*row["key"]): Config(*row["config"]) for row in json.loads(TABLE.read_text())}


@functools.cache
def _architecture(device: torch.device) -> int:
    """The nearest architecture of the table: consumer cards have neither Hopper's nor Blackwell's matrix instructions."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def key_of(op: str, device: torch.device, dtype: torch.dtype, taps: str) -> Key:
    """Where the table has the entry for products in ``dtype``."""
    return Key(op, taps, tf32() if dtype == torch.float32 else "16", _architecture(device))


def config_of(op: str, device: torch.device, dtype: torch.dtype, taps: str, rows: int, columns: int) -> Config:
    """The table's entry, and no wider than what is there: ``columns`` results from ``rows`` summed channels.

    The weight gradient has ``rows`` by ``columns`` results, and sums over positions.
    """
    across = "BLOCK_M" if op == "bn_act_conv_backward_weight" else "BLOCK_K"
    return _narrowed(table()[key_of(op, device, dtype, taps)], across, rows, columns)


@remembered
def _narrowed(config: Config, across: str, rows: int, columns: int) -> Config:
    narrow = {across: power_of_two(rows, 16, getattr(config, across)), "BLOCK_N": power_of_two(columns, 16, config.BLOCK_N)}
    return config._replace(**narrow)
