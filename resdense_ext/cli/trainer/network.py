"""The network by its name, for the data and with the policy that were asked for."""

from __future__ import annotations

import copy

import torch
from torch import nn

import resdense_ext
from resdense_ext import models
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.trainer.examples import Data

SMALL = 64
# What a network need not be told: it does so anyway, or does without.
_DISPENSABLE = {"small_inputs": (True, False), "spatial_dims": (2,), "in_channels": (3,)}


def default_model(data: Data) -> str:
    if data.masks:
        return "residual_unet_3d" if data.spatial_dims == 3 else "fc_densenet56"
    return "densenet_bc40" if data.size <= SMALL else "densenet121"


def build(name: str, data: Data, policy: str | None, batch_size: int) -> nn.Module:
    """The network `name` of `resdense_ext.models` for the channels, dimensions and classes of `data`, on the CPU.

    Args:
        batch_size: examples a step of one process.

    Raises:
        CommandError: there is no such network, or it does not fit the data or the batches.
    """
    options = {
        "num_classes": len(data.classes),
        "in_channels": data.channels,
        "spatial_dims": data.spatial_dims,
        "small_inputs": data.size <= SMALL,
        "policy": policy,
    }
    model = None
    while model is None:
        try:
            model = models.create(name, **options)
        except ValueError as error:
            raise CommandError(f"--model: {str(error).removeprefix('name: ')}") from None
        except TypeError as error:
            unknown = next((option for option in options if f"keyword argument '{option}'" in str(error)), None)
            if unknown is None:
                raise
            # One that the network has set by itself ("multiple values") shows in the shape of its output.
            if "unexpected" in str(error) and options[unknown] not in _DISPENSABLE.get(unknown, ()):
                raise CommandError(f"--model: expected one that takes {unknown}={options[unknown]!r}, got {name!r}") from None
            del options[unknown]
    _check_output(name, model, data)
    if batch_size == 1:
        _check_single(name, model, data)
    return model


def _check_output(name: str, model: nn.Module, data: Data) -> None:
    sides = (data.size,) * data.spatial_dims
    kind = f"{'x'.join(map(str, sides))} with {data.channels} channels"
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, data.channels, *sides))
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"--model: expected one that takes inputs of {kind}, got {name!r} ({error})") from None
    model.train()
    expected = (1, len(data.classes), *(sides if data.masks else ()))
    if tuple(output.shape) != expected:
        task = "masks" if data.masks else "labels"
        raise CommandError(
            f"--model: expected one for {task}, whose output for an input of {kind} has shape {expected}, got {name!r} with "
            f"{tuple(output.shape)}"
        )


def _check_single(name: str, model: nn.Module, data: Data) -> None:
    """Refuses batches of one example where a batch norm would see one value a channel."""
    try:
        with torch.no_grad():
            # A copy, since it moves running statistics.
            copy.deepcopy(model)(torch.zeros(1, data.channels, *(data.size,) * data.spatial_dims))
    except ValueError as error:
        raise CommandError(f"--batch-size: expected at least 2 examples a process for {name!r}, got 1 ({error})") from None


def plan(model: nn.Module, memory_budget: int | float | None, example: torch.Tensor) -> None:
    """Chooses what every layer keeps under a budget of bytes, or (None) for what is free."""
    try:
        resdense_ext.convert(model, "auto" if memory_budget is None else "fast", memory_budget, example)
    except ValueError as error:
        raise CommandError(str(error).replace("memory_budget", "--memory-budget")) from None
