"""Which backend serves which operation, and why: for ``resdense info``."""

from __future__ import annotations

import torch

from resdense_ext.ops import backend
from resdense_ext.ops.add_act import compiled_slope
from resdense_ext.reference import Activation

__all__ = ["explain"]


def explain() -> list[tuple[str, str, str]]:
    """Rows of (operation and device, backend, why) for an ordinary float32 input on every device of this machine."""
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        probe = torch.zeros((1, 1, 1, 1), device=device)
        chosen = backend.choose(probe, probe.dtype, Activation()).name
        refusals = {b.name: b.refusal(probe, probe.dtype, Activation()) for b in backend.registered()}
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if reason) or "the only one"
        rows += [(f"{op} ({device})", chosen, why) for op in ("dense_block", "channel_stats")]
        compiled = compiled_slope(probe, Activation()) is not None
        ends = ("cuda", "compiled") if compiled else ("reference", "a compiled kernel exists for CUDA only")
        rows += [(f"{op} ({device})", *ends) for op in ("add_act", "bn_add_act")]
    return rows
