"""The networks by name, for programs that are told which one to build."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from resdense_ext.models import densenet, dual_path, fc_densenet, preact_resnet, residual_unet, resnet

__all__ = ["create", "names"]

_NETWORKS = {
    name: getattr(module, name)
    for module in (densenet, resnet, preact_resnet, dual_path, fc_densenet, residual_unet)
    for name in module.__all__
    if name.islower()
}


def names() -> list[str]:
    """The names that `create` knows."""
    return list(_NETWORKS)


def create(name: str, **options) -> nn.Module:
    """The network that the function of this name in `resdense_ext.models` builds of `options`.

    Equivalent to: ``getattr(resdense_ext.models, name)(**options)``, for the names that `names` lists.

    Args:
        name: such as "resnet50".
        options: what that function takes, such as ``num_classes``.

    Raises:
        ValueError: no such network; the message has the names closest to it, or all.
        TypeError: an option that the network does not have.
    """
    if name not in _NETWORKS:
        near = get_close_matches(str(name), _NETWORKS)
        expected = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(_NETWORKS)}"
        raise ValueError(f"name: there is no network {name!r}; {expected}")
    return _NETWORKS[name](**options)
