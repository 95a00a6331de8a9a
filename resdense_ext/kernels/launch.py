"""What the launchers share on the host: the device's size, its tickets, what is remembered, and a launch on the tensors' own device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from resdense_ext.ops.program import unrecordable

__all__ = ["ceil_div", "launch", "power_of_two", "programs", "remembered", "tf32", "tickets"]

# More than most launches draw.
_TICKETS = 4096
_MOST = 10_000  # more shapes, and launches of different ones, than a network has
remembered = functools.lru_cache(_MOST)
"""Decorates functions of sizes and strides, which a launch would else take as long to work out as it takes itself."""


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
    unrecordable("a Triton kernel is launched")
    constants["enable_fp_fusion"] = True  # a scale and shift is one operation; Triton's own default is about to change
    if not x.is_cuda:
        kernel[grid](*args, **constants)
    elif x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            _launch(kernel, grid, x.device, args, constants)
    else:
        _launch(kernel, grid, x.device, args, constants)


# By what Triton compiles a kernel for: the compiled one, and the values of its constants.
_compiled: dict[tuple, tuple[CompiledKernel, tuple]] = {}
_PLAIN = frozenset((int, float, type(None)))  # an argument of another type is a tensor: to ask whether it is one takes longer


def _launch(kernel, grid: tuple[int, ...], device: torch.device, args: tuple, constants: dict) -> None:
    """``kernel[grid](*args, **constants)``, without Triton's search for the compiled kernel where it has been found before.

    That takes the host longer than many a launch takes the device. Triton tells tensors apart by their dtypes and by whether
    their addresses are multiples of 16, and numbers by no more than their types and values: what has one key has one kernel.
    """
    types = (*map(type, args), *map(type, constants.values()))  # too, since 1 == 1.0 == True
    known = [a if kind in _PLAIN else (a.dtype, a.data_ptr() % 16 == 0) for a, kind in zip(args, types)]
    key = (kernel.fn, device, *known, *constants, *constants.values(), *types)  # a kernel's own hash is that of its source
    found = _compiled.get(key)
    debugging = triton.knobs.runtime.debug or triton.knobs.compilation.instrumentation_mode  # choose other kernels
    if found is not None and not debugging:
        compiled, values = found
        compiled[(*grid, 1, 1)](*args, *values)
        return
    compiled = kernel[grid](*args, **constants)
    ours = isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda" and not kernel.pre_run_hooks
    if ours and not debugging:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
