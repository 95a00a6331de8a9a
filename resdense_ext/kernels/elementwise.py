"""The elementwise kernels that keep no sums: each reads its maps once and writes one."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from resdense_ext.kernels.bn_add_act_backward import bn_add_act_backward
from resdense_ext.kernels.launch import launch
from resdense_ext.kernels.maps import Map
from resdense_ext.kernels.tiles import activate, load_tile, marked, rounded, row_offsets, store_tile
from resdense_ext.kernels.walk import load_vector, tile_at, tiling_of, wide
from resdense_ext.reference import Activation

__all__ = ["add_act", "add_act_backward", "bn_add_act", "bn_add_act_backward", "copy_map", "pending_grad"]


@triton.jit
def elementwise_fwd_kernel(
    a_ptr, an, as_, ac, b_ptr, bn, bs, bc, out_ptr, on, os, oc,
    u_ptr, v_ptr, w_ptr, t_ptr, M, S, C,
    OP: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    A_LAST: tl.constexpr, B_LAST: tl.constexpr, OUT_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample, place, channels, row_mask, mask = tile_at(tl.program_id(0), tl.program_id(1), M, S, C, BLOCK_M, BLOCK_C)
    a = load_tile(a_ptr, row_offsets(sample, place, an, as_), channels * ac, row_mask, mask, A_LAST).to(WIDE)
    if OP != "copy":
        b = load_tile(b_ptr, row_offsets(sample, place, bn, bs), channels * bc, row_mask, mask, B_LAST).to(WIDE)
    if OP == "pending_grad":
        a = load_vector(u_ptr, channels, mask, WIDE) * a
        a += load_vector(v_ptr, channels, mask, WIDE) * b + load_vector(w_ptr, channels, mask, WIDE)
    elif OP == "add_act":
        a = activate(a + b, SLOPE, ACT)
    elif OP == "add_act_backward":
        a = marked(a, b, SLOPE, ACT)
    elif OP == "bn_add_act" or OP == "bn_add_bn_act":
        a = load_vector(u_ptr, channels, mask, WIDE) * a + load_vector(v_ptr, channels, mask, WIDE)
        if OP == "bn_add_bn_act":
            b = load_vector(w_ptr, channels, mask, WIDE) * b + load_vector(t_ptr, channels, mask, WIDE)
        a = activate(a + b, SLOPE, ACT)
    out_rows = row_offsets(sample, place, on, os)
    store_tile(out_ptr, out_rows, channels * oc, rounded(a, out_ptr.dtype.element_ty), row_mask, mask, OUT_LAST)


_LINEAR = Activation("identity")


def _run(
    op: str, a: Tensor, b: Optional[Tensor], out: Tensor, vectors: tuple = (), activation: Activation = _LINEAR
) -> Tensor:
    if a.numel() == 0:
        return out
    ma, to = Map.of(a, "x"), Map.of(out, "out")
    mb = ma if b is None else Map.of(b, "y")
    u, v, w, t = (*vectors, None, None, None, None)[:4]
    tiling = tiling_of(to)
    launch(
        elementwise_fwd_kernel, (tiling.rows, tiling.columns), a,
        a, ma.sn, ma.ss, ma.sc, b, mb.sn, mb.ss, mb.sc, out, to.sn, to.ss, to.sc, u, v, w, t, to.count, to.S, to.C,
        OP=op, ACT=activation.name, SLOPE=activation.slope,
        A_LAST=ma.last, B_LAST=mb.last, OUT_LAST=to.last, WIDE=wide(out.dtype), **tiling.constants(),
    )  # fmt: skip
    return out


def pending_grad(dy: Tensor, z: Tensor, alpha: Tensor, beta: Tensor, delta: Tensor) -> Tensor:
    """``dy = alpha * dy + beta * z + delta``, in place."""
    return _run("pending_grad", dy, z, dy, (alpha, beta, delta))


def add_act(x: Tensor, y: Tensor, activation: Activation) -> Tensor:
    """``act(x + y)``."""
    return _run("add_act", x, y, torch.empty_like(x), activation=activation)


def add_act_backward(grad: Tensor, mark: Tensor, activation: Activation) -> Tensor:
    """``grad * act'``; see `reference.marked_slope` for the mark. No slope is negative."""
    return _run("add_act_backward", grad, mark, torch.empty_like(mark), activation=activation)


def bn_add_act(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    identity: Tensor,
    identity_scale: Optional[Tensor],
    identity_shift: Optional[Tensor],
    activation: Activation,
) -> Tensor:
    """``act(scale * z + shift + identity)``, the identity itself scaled and shifted where it is a projection."""
    op, more = ("bn_add_act", ()) if identity_scale is None else ("bn_add_bn_act", (identity_scale, identity_shift))
    return _run(op, z, identity, torch.empty_like(z), (scale, shift, *more), activation)


def copy_map(x: Tensor, out: Tensor) -> Tensor:
    """``out = x`` between any two layouts and dtypes."""
    return _run("copy", x, None, out)
