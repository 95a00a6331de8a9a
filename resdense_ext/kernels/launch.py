"""What the launchers share on the host: the device's size, its tickets, and a launch on the tensors' own device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["ceil_div", "launch", "power_of_two", "programs", "tf32", "tickets"]

# More than most launches draw.
_TICKETS = 4096


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that covers ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), least), most)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Without a GPU, in the interpreter: few enough that a program takes several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def programs(x: Tensor, tiles: int, blocks: int, each: int) -> int:
    """How many programs share ``tiles`` where ``blocks`` columns of programs fill the device, ``each`` a multiprocessor."""
    return max(1, min(tiles, _multiprocessors(x.device) * each // blocks))


_tickets: dict[tuple, Tensor] = {}


def tickets(x: Tensor, count: int) -> Tensor:
    """Zeros, int32: launches draw from them and leave them at zero. One set a stream, whose launches follow each other."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        # A graph's memory is its own, and is set to zero in every replay.
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream)
    found = _tickets.get(key)
    if found is None or found.numel() < count:
        found = _tickets[key] = torch.zeros(max(count, _TICKETS), dtype=torch.int32, device=x.device)
    return found


def tf32() -> str:
    """The precision of a float32 product: tf32 where torch's switch for convolutions allows it."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def launch(kernel, grid: tuple[int, ...], x: Tensor, *args, **constants) -> None:
    """Launches on the device of ``x``: Triton itself takes the current one."""
    constants["enable_fp_fusion"] = True  # a scale and shift is one operation; Triton's own default is about to change
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)
