"""The device that a command computes on."""

from __future__ import annotations

import torch

from resdense_ext.cli.errors import CommandError


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        CommandError: there is none, or it cannot compute.
    """
    try:
        device = torch.device(name)
        # Reading a value back fails on an absent device, and on one that computes nothing, such as "meta".
        torch.ones(1, device=device).item()
    # Which of RuntimeError, AssertionError and NotImplementedError it is depends on how torch was built.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CommandError(f"--device: expected one that this torch can use, got {name!r} ({reason})") from None
    return device
