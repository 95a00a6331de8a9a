"""Loads the compiled operators, where they are built, into ``torch.ops.resdense``."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch

__all__ = ["CPU_LIBRARY", "CUDA_LIBRARY", "LIBRARY", "build_info"]


_CAPABILITIES = "avx512", "avx2", "default"
"""To which the CPU library can be limited; it reads the variable itself."""


def _load_cpu():
    limit = os.environ.get("RESDENSE_CPU_CAPABILITY", "")
    if limit and limit not in _CAPABILITIES:
        raise ValueError(f"RESDENSE_CPU_CAPABILITY: expected {', '.join(_CAPABILITIES)} or nothing, got {limit!r}")
    try:
        # `from resdense_ext import _C` would call one that is not there a circular import.
        return importlib.import_module("resdense_ext._C"), None
    except ModuleNotFoundError:
        return None, "not built (pure-Python install)"
    except ImportError as error:
        return None, f"does not load: {error}"


def _load_cuda() -> tuple[bool, str | None]:
    path = Path(__file__).resolve().parent.parent / "_cuda.so"
    if torch.version.cuda is None:
        return False, "this torch is built without CUDA"
    if _module is None or not path.exists():
        return False, "not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return False, f"does not load: {error}"
    return True, None


_module, CPU_LIBRARY = _load_cpu()
_cuda_loaded, CUDA_LIBRARY = _load_cuda()
"""Why the library is missing; None where it is loaded."""

LIBRARY = torch.library.Library("resdense", "FRAGMENT")
"""Holds the operators and fake kernels that are registered from Python."""


def build_info() -> dict | None:
    """What the compiled extension says of itself; None for a pure-Python install."""
    return None if _module is None else dict(_module.build_info())
