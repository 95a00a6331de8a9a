"""The launch configurations that ship: a small fixed table by operation, shape class and architecture.

`resdense bench --tune` measures the candidates on a GPU; nothing is ever tuned at import or in a training step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from resdense_ext.kernels.launch import power_of_two

__all__ = ["CANDIDATES", "Config", "config_of"]


class Config(NamedTuple):
    """Tile sizes, ``BLOCK_K`` along what is summed; ``each`` is how many programs share a multiprocessor."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    each: int

    def constants(self) -> dict[str, int]:
        return {name: value for name, value in self._asdict().items() if name != "each"}


# By operation and whether the kernel is larger than 1x1, for 16-bit operands; BLOCK_N is an upper bound.
_TABLE = {
    ("bn_act_conv", False): Config(128, 128, 64, 8, 3, 2),
    ("bn_act_conv", True): Config(128, 32, 64, 4, 3, 3),
    ("bn_act_conv_backward_data", False): Config(128, 128, 64, 8, 2, 1),
    ("bn_act_conv_backward_data", True): Config(128, 128, 32, 8, 2, 1),
    ("bn_act_conv_backward_weight", False): Config(64, 128, 64, 8, 2, 1),
    ("bn_act_conv_backward_weight", True): Config(128, 32, 64, 4, 2, 2),
}
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
def config_of(op: str, device: torch.device, dtype: torch.dtype, taps: int, rows: int, columns: int) -> Config:
    """The table's entry for operands of ``rows`` by ``columns`` channels, and no wider. A float32 tile takes twice the room and gets half the depth."""
    config = _TABLE[op, taps > 1]
    if dtype == torch.float32:
        config = config._replace(BLOCK_K=max(config.BLOCK_K // 2, 16), num_stages=2)
    across = "BLOCK_M" if op == "bn_act_conv_backward_weight" else "BLOCK_K"
    narrow = {across: power_of_two(rows, 16, getattr(config, across)), "BLOCK_N": power_of_two(columns, 16, config.BLOCK_N)}
    return config._replace(**narrow)
