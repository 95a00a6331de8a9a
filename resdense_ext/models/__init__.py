"""Whole networks, built from `resdense_ext.nn`, with the parameter names of the libraries they stem from."""

import difflib

from torch import nn

from resdense_ext.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc40,
    densenet_bc100,
)

__all__ = [
    "DenseNet",
    "create",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc40",
    "densenet_bc100",
    "names",
]


def names() -> list[str]:
    """What `create` builds: every function here that makes a network."""
    return [name for name in __all__ if name.islower() and name not in ("create", "names")]


def create(name: str, **options) -> nn.Module:
    """Builds the network of that name; `options` go to its function.

    Raises:
        ValueError: no such network; the message names the nearest ones.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5) or names()
        raise ValueError(f"name: expected a network such as {', '.join(near)}, got {name!r}")
    return globals()[name](**options)
