"""What networks that label every position share."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_maps", "crop_like"]


def check_maps(x: Tensor, channels: int, spatial_dims: int, smallest: int = 1) -> None:
    """Raises ValueError unless ``x`` is ``[N, channels, *spatial]`` with at least ``smallest`` positions along each."""
    if x.dim() != spatial_dims + 2 or x.shape[1] != channels:
        spatial = ", ".join("DHW"[3 - spatial_dims :])
        raise ValueError(f"x: expected [N, {channels}, {spatial}], got {tuple(x.shape)}")
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"x: expected at least {smallest} positions along every dimension, got {tuple(x.shape[2:])}")


def crop_like(x: Tensor, like: Tensor) -> Tensor:
    """The first positions of ``x``, as many along every spatial dimension as ``like`` has."""
    return x[(..., *(slice(size) for size in like.shape[2:]))]
