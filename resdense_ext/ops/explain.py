"""Which backend serves which operation, and why: for ``resdense info``."""

from __future__ import annotations

import torch

from resdense_ext.ops import backend
from resdense_ext.ops.reference_backend import ReferenceBackend

__all__ = ["explain"]

_PRIMITIVES = (
    "channel_stats",
    "fold",
    "bn_act",
    "bn_act_backward",
    "pending_grad_",
    "bn_act_conv",
    "bn_act_conv_backward",
    "bn_act_pool",
    "bn_act_pool_backward",
)
_ENDS = ("add_act", "bn_add_act")


def _owner(chosen: ReferenceBackend, primitive: str) -> str:
    """The backend whose kernels compute a primitive: the chosen one, or one that it builds upon."""
    owner = next(c for c in type(chosen).__mro__ if primitive in vars(c))
    return vars(owner).get("name", chosen.name)


def explain() -> list[tuple[str, str, str]]:
    """Rows of (operation and device, backend, why) for an ordinary float32 input on every device of this machine."""
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        probe = torch.zeros((1, 1, 1, 1), device=device)
        chosen = backend.choose(probe, probe.dtype)
        refusals = {b.name: b.refusal(probe, probe.dtype) for b in backend.registered()}
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if reason) or "preferred"
        rows += [(f"{op.rstrip('_')} ({device})", _owner(chosen, op), why) for op in _PRIMITIVES]
        rows += [(f"{op} ({device})", chosen.name, why) for op in _ENDS]
    return rows
