"""Runs a model's forward for what it keeps, and leaves the model as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["positional", "unchanged"]


def positional(example_input: Any) -> tuple:
    """An example input as the model's positional arguments."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside nothing is compiled, and gradients are enabled; buffers and random states are put back, for autograd too: a graph
    that the user still holds may read a buffer."""
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    devices = sorted({b.device.index for b in model.parameters() if b.device.type == "cuda"})
    # Where its compiler was never imported, nothing is compiled.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    tracked = tuple(b for _, _, b in buffers if b is not None and not b.is_inference())
    versions = torch.autograd._unsafe_preserve_version_counter(tracked)
    with versions, eager, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for (module, name, buffer), value in zip(buffers, values):
                module._buffers[name] = buffer
                if buffer is not None and not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.detach().copy_(value)
