"""Networks by name, of this library and of others, which are imported when one of theirs is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from types import ModuleType
from typing import NamedTuple

from torch import nn

from resdense_ext import models
from resdense_ext.cli.errors import CommandError

__all__ = ["build"]

OURS = "resdense"
REQUIRED = {"spatial_dims": 3, "in_channels": 1, "n_input_channels": 1, "out_channels": 2, "num_classes": 2}
"""What MONAI's networks are built with where they do not say themselves."""


class Library(NamedTuple):
    """The module to import, and given it the names of its networks and what builds one, without pretrained weights."""

    module: str
    names: Callable[[ModuleType], list[str]]
    build: Callable[[ModuleType, str], nn.Module]


def _torchvision(module: ModuleType, name: str) -> nn.Module:
    # Some take the weights of a part of theirs separately, and download them unless told not to.
    parameters = inspect.signature(module.get_model_builder(name)).parameters
    return module.get_model(name, **dict.fromkeys({"weights", "weights_backbone"} & set(parameters)))


def _monai_networks(module: ModuleType) -> dict[str, Callable]:
    """Its classes, and the functions that build ResNets; others, such as those that download, are no networks."""
    return {
        name: value
        for name, value in vars(module).items()
        if (inspect.isclass(value) and issubclass(value, nn.Module)) or (inspect.isfunction(value) and name.startswith("resnet"))
    }


def _monai(module: ModuleType, name: str) -> nn.Module:
    make = _monai_networks(module)[name]
    required = [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    unknown = [name for name in required if name not in REQUIRED]
    if unknown:
        raise CommandError(f"monai:{name}: expected a network that needs no arguments but {', '.join(REQUIRED)}, "
                           f"and it needs {', '.join(unknown)}")  # fmt: skip
    return make(**{name: REQUIRED[name] for name in required})


LIBRARIES = {
    "torchvision": Library("torchvision.models", lambda module: module.list_models(), _torchvision),
    "timm": Library("timm", lambda module: module.list_models(), lambda module, name: module.create_model(name)),
    "monai": Library("monai.networks.nets", lambda module: list(_monai_networks(module)), _monai),
    "pytorchcv": Library(
        "pytorchcv.model_provider", lambda module: list(module._models), lambda module, name: module.get_model(name)
    ),
}


def build(name: str) -> nn.Module:
    """The network of this name, in plain PyTorch.

    Args:
        name: such as "densenet121", one of `resdense_ext.models` or else torchvision's; or with the library before a colon,
            as in "timm:densenet121", where the libraries are resdense and those of `LIBRARIES`.

    Raises:
        CommandError: no such network, with the names near it; the library is not installed, with what installs it.
    """
    library, colon, network = name.rpartition(":")
    if library == OURS or (not colon and network in models.names()):
        if network not in models.names():
            raise CommandError(_unknown(name, network, {OURS: models.names()}))
        return models.create(network, policy=None)
    if not colon:
        library = "torchvision"
    elif library not in LIBRARIES:
        raise CommandError(f"{name}: expected one of {', '.join((OURS, *LIBRARIES))} before the colon, got {library!r}")
    source = LIBRARIES[library]
    known = {} if colon else {"": models.names()}
    try:
        module = importlib.import_module(source.module)
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, ModuleNotFoundError):
            why = f"{library} could not be looked into ({said}): pip install {library}"
        else:  # its compiled part fits another torch, say
            why = f"{library} does not import ({said})"
        raise CommandError(f"{name}: {why}" if colon else f"{_unknown(name, network, known)}; {why}") from error
    names = source.names(module)
    if network not in names:
        raise CommandError(_unknown(name, network, {**known, library if colon else "": [*known.get("", []), *names]}))
    return source.build(module, network)


def _unknown(name: str, network: str, known: dict[str, list[str]]) -> str:
    """The message, with near names by library."""
    by_lower = {n.lower(): f"{library}:{n}" if library else n for library, names in known.items() for n in names}
    near = [by_lower[n] for n in get_close_matches(network.lower(), by_lower, n=4)]
    return f"{name}: there is no network of this name" + (f"; did you mean {' or '.join(near)}?" if near else "")
