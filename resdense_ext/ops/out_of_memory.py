"""Memory that runs out inside a compiled operator: the stable ABI, behind which these are, makes one error of all errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["told"]

_shortages: list[str] = []
"""What every shortage of a GPU's memory so far was."""


def _note(device: int, requested: int, total: int, free: int) -> None:
    mib = [f"{n / 2**20:,.0f} MiB" for n in (requested, total, free)]
    _shortages.append(f"CUDA out of memory: tried to allocate {mib[0]} on cuda:{device}, which has {mib[1]}, {mib[2]} of them free")


@functools.cache
def _watch() -> None:
    """Has the CUDA allocator say when it runs short, from now on; an allocator that is not PyTorch's own cannot."""
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        return  # a torch without CUDA
    try:
        attach(_note)
    except RuntimeError:
        pass


def told(operator: Callable, *args: Any) -> Any:
    """``operator(*args)``.

    Raises:
        torch.OutOfMemoryError: memory ran out in it, see `_watch`.
        RuntimeError: anything else.
    """
    if torch.cuda.is_initialized():
        _watch()
    before = len(_shortages)
    try:
        return operator(*args)
    except RuntimeError as error:
        if len(_shortages) == before:
            raise
        raise torch.OutOfMemoryError(f"{_shortages[-1]} ({operator})") from error
