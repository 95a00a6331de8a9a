"""What the benchmarks of single operations share: the shapes of densenet121, layouts and dtypes, and a checked timing."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

__all__ = ["BATCH", "LAYERS", "cases", "copy_of", "map_of", "time"]

BATCH = int(os.environ.get("RESDENSE_BENCH_BATCH", "8"))
LAYERS = {"block1": (56, 160, 256), "block2": (28, 320, 512), "block3": (14, 640, 1024), "block4": (7, 768, 1024)}
"""Height and width, the channels of a layer in the middle of the block, and those of the block's buffer."""


def cases(function: Callable) -> Callable:
    """A test for every block, dtype and layout, of the floor, of stock PyTorch and of this library.

    The floor is the bare convolution on dense operands, or a copy of as many bytes as the operation has to move.
    """
    for name, values in (
        ("provider", ["floor", "stock", "ours"]),
        ("channels_last", [False, True]),
        ("dtype", [torch.float32, torch.bfloat16]),
        ("block", list(LAYERS)),
    ):
        function = pytest.mark.parametrize(name, values, ids=str)(function)
    return function


def map_of(channels: int, size: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    x = torch.randn(BATCH, channels, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def copy_of(*tensors: Tensor) -> Callable[[], object]:
    """Reads and writes each of these once."""
    targets = [torch.empty_like(t) for t in tensors]
    return lambda: torch._foreach_copy_(targets, list(tensors))


def time(
    benchmark,
    group: str,
    provider: str,
    runs: dict[str, Callable[[], object]],
    truth: Callable[[], Tensor],
    results: dict[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Times the provider's run, once its result (the run's, or that of ``results``) is ``truth``, which is in float64, within
    twice stock's own error and a rounding. The floor's result is nothing."""
    if provider != "floor":
        expected, found = truth(), {name: (results or runs)[name]().detach() for name in {"stock", provider}}
        own, error = (((found[name].double() - expected).norm() / expected.norm()).item() for name in ("stock", provider))
        limit = 2 * own + torch.finfo(found[provider].dtype).eps
        assert error <= limit, f"differs from float64 by {error:.2g}, with {limit:.2g} allowed, twice stock's own error"
    benchmark.group = group
    benchmark.pedantic(runs[provider], rounds=7, warmup_rounds=2)
