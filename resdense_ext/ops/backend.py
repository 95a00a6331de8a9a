"""Who computes the primitives: an engine asks `choose` once in its forward and carries the answer's name to its backward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.ops.reference_backend import ReferenceBackend

__all__ = ["choose", "get", "register", "registered", "use_backend"]

_backends: dict[str, ReferenceBackend] = {}
_forced: ContextVar[Optional[str]] = ContextVar("resdense_backend", default=None)
_NAMES = ("reference", "cpu", "cuda", "triton")


def register(backend: ReferenceBackend) -> None:
    """Backends registered later are preferred."""
    _backends[backend.name] = backend


def registered() -> list[ReferenceBackend]:
    """In the order of preference."""
    return list(reversed(_backends.values()))


def get(name: str) -> ReferenceBackend:
    return _backends[name]


def choose(x: Tensor, compute_dtype: torch.dtype) -> ReferenceBackend:
    """The backend for an input: the one asked for, else the last registered that does not refuse.

    Raises:
        RuntimeError: the backend asked for is missing or refuses the input; the message says why.
    """
    wanted = (None if torch.compiler.is_compiling() else _forced.get()) or os.environ.get("RESDENSE_BACKEND") or None
    if wanted is not None:
        _check_name(wanted, "RESDENSE_BACKEND")
        refusal = _backends[wanted].refusal(x, compute_dtype) if wanted in _backends else "not available here"
        if refusal:
            raise RuntimeError(f"backend {wanted!r} was asked for, but: {refusal}")
        return _backends[wanted]
    return next(b for b in registered() if b.refusal(x, compute_dtype) is None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes with one backend inside the ``with`` block (in this thread or task).

    What `torch.compile` has compiled, or compiles there, chooses by itself.

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: another name. A backend that is missing, or that refuses an input, raises RuntimeError on use.
    """
    _check_name(name, "name")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_name(name: str, argument: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"{argument}: expected one of {', '.join(_NAMES)}, got {name!r}")


register(ReferenceBackend())
