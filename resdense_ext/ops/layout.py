"""The memory format of maps: the contiguous or the channels-last one, seen through slices of a buffer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor

__all__ = ["as_convolved", "dense_map", "empty_map", "is_dense", "is_map", "map_beside", "memory_format_of", "walkable_map"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last where the channels of ``x`` are adjacent and its positions are not; a slice of channels counts. Of one channel
    the stride says whether it is one of several, as those of its neighbours in a network are."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    if channels_last is None or x.stride(1) != 1 or (x.shape[1] > 1 and x.is_contiguous()):
        return torch.contiguous_format
    return channels_last


def as_convolved(x: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """``x`` in the memory format of what convolutions with these weights write: channels-last where x or a weight is, as
    PyTorch's."""
    if memory_format_of(x) != torch.contiguous_format or not any(map(_is_channels_last_weight, weights)):
        return x
    if x.shape[1] == 1:
        return x.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def _is_channels_last_weight(weight: Tensor) -> bool:
    """Strides tell it of 1x1 kernels and of single channels, too; only a single number says nothing."""
    channels = weight.shape[1]
    return weight.dim() in _CHANNELS_LAST and weight.stride(1) == 1 and weight.stride(-1) == channels and weight[0].numel() > 1


def is_map(x: Tensor) -> bool:
    """Whether the compiled kernels can walk ``x``: positions of one stride, and these or the channels adjacent, as in a dense
    map or a slice of its channels, and samples one behind another."""
    outer = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:]) if size != 1]
    nested = all(stride == size * inner for (_, stride), (size, inner) in zip(outer, outer[1:]))
    adjacent = x.shape[1] == 1 or memory_format_of(x) != torch.contiguous_format or not outer or outer[-1][1] == 1
    samples, channels = x.stride()[:2]
    apart = samples == 0 or samples >= channels or 1 in x.shape[:2]
    return nested and adjacent and apart


def is_dense(x: Tensor) -> bool:
    """Whether nothing lies between its values, in its memory format."""
    return x.is_contiguous(memory_format=memory_format_of(x))


def dense_map(x: Tensor) -> Tensor:
    """``x``, or a copy where it is not dense in its memory format."""
    return x.contiguous(memory_format=memory_format_of(x))


def walkable_map(x: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """``x``, or a dense copy, in the memory format of ``like`` where there is one, where the compiled kernels cannot walk it; see
    `is_map`."""
    return x if is_map(x) else x.contiguous(memory_format=memory_format_of(x if like is None else like))


def map_beside(like: Tensor, x: Tensor) -> Tensor:
    """``x``, or a dense copy in the memory format of ``like`` where the compiled kernels cannot walk the two together."""
    together = is_map(x) and memory_format_of(x) == memory_format_of(like)
    return x if together else x.contiguous(memory_format=memory_format_of(like))


def empty_map(like: Tensor, channels: int, dtype: torch.dtype, sizes: Optional[Sequence[int]] = None) -> Tensor:
    """An uninitialised map of ``channels`` channels on the device and in the memory format of ``like``, and in its spatial
    sizes or others."""
    shape = (like.shape[0], channels, *(like.shape[2:] if sizes is None else sizes))
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format_of(like))
