"""``act(bn(W a) + shortcut)`` for a 1x1 convolution whose output ``z = W a`` need neither be kept nor ever be whole in memory; see
`kept_for_backward` for when it is.

The mean of ``a`` over the M positions and ``R = (a - mean)^T (a - mean)`` know all that batch norm asks of z. In the
deviations ``b = a - mean``, with ``s = gamma * r`` and ``r = (var + eps)^-1/2``::

    forward   mean_z = W mean,  M var = diag(W R W^T)                  before z is: it is normalised where it is made
    backward  dbeta = 1^T dy,  G = dy^T b,  dgamma = r * rowsum(W * G)
              P = s * dbeta / M,  Q = s * r * dgamma / M
              dW = s G - Q (W R)
              da = dy (s W) - b (W^T diag(Q) W) - W^T P

A bias shifts mean_z and has no gradient; a stride samples positions of a; padding adds positions where a is 0; groups have an R
each. Running statistics need no R: then P = Q = 0, and the mean is any point near a (``dW = s (G + dbeta mean^T)``).

R is added up for the deviations from a point near the mean, whose distance from it is taken off in float64, as are the products
with W. So var has an error of some units in the last place of ``|w|^T |R| |w| / M``, whatever the mean; where a row of W is nearly
orthogonal to strongly correlated inputs that is more than var itself, as the same error is of stock's (see the tests).

``a`` is not kept: it is made from the raw ``x``, some samples at a time, wherever it is read. In 16 bits on a GPU backward makes it
once and whole, as deviations, and is a matter of products: `resdense_ext.ops.moments`. A CPU's kernels make it tile by tile; in
bfloat16, too, as rounded deviations, where the processor multiplies such.

Source: the composition is that of He et al., Deep Residual Learning for Image Recognition (2016); the algebra is this library's.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext import reference
from resdense_ext.ops import moments as by_products
from resdense_ext.ops.activation import LINEAR
from resdense_ext.ops.convolve import sampled, sampling
from resdense_ext.ops.layout import dense_map, empty_map, memory_format_of
from resdense_ext.ops.operands import Affine, ConvGrads, Fold, Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, Conv, accumulation_dtype, per_channel

__all__ = [
    "Branch",
    "Carried",
    "Gradients",
    "Moments",
    "Pointwise",
    "backward",
    "forward",
    "kept_for_backward",
    "moments",
    "norm_gradients",
    "output_statistics",
]


def kept_for_backward(count: int, inputs: int, outputs: int, groups: int = 1, policy: str = "fast") -> str:
    """What a 1x1 convolution behind which stands a batch norm of the batch's statistics keeps: "z", "gram" or "nothing".

    z has ``count * outputs`` values and R ``inputs^2 / groups``. Under the policy "fast" R is kept where its arithmetic is worth it,
    and then is no larger. R and its product in backward take as much as ``inputs / outputs`` convolutions each, so there have to
    be twice as many outputs, as in a bottleneck; R's products with W, in float64, as much as ``inputs / count`` each, so there have
    to be as many positions as inputs. Under "min" nothing is kept: R is made again in backward, for ``count * inputs^2``
    multiplications.

    Args:
        count: the positions of z, all samples together.
        inputs, outputs: channels.
        groups: of the convolution.
        policy: "fast" or "min".
    """
    if policy == "min":
        return "nothing"
    return "gram" if outputs >= _WIDENS * inputs and count >= _POSITIONS * inputs // groups else "z"


_WIDENS = 2
"""Outputs an input channel from which R is worth its arithmetic. With 1, a step of a RegNetX-400MF, whose blocks have as many inputs as
outputs, took 1.31 of the best stock's time on two AVX-512 cores, and with 2 1.07 (``resdense bench models timm:regnetx_004 --batch 8``)."""
_POSITIONS = 1
"""Positions an input channel. With 4, a product with W would be a quarter of a convolution at most, but z would stay in the third
stage of a ResNet-50 at a batch of 4: 0.7 MB an image more in each of its blocks."""


class Pointwise(NamedTuple):
    """A 1x1 convolution and what it reads: ``a = act(scale * x + shift)`` of a raw x, or x as it is where there is no fold."""

    x: Tensor
    fold: Optional[Fold]
    conv: Conv
    backend: ReferenceBackend

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.conv.outputs(self.x.shape[2:])

    @property
    def count(self) -> int:
        """Positions of the output."""
        return self.x.shape[0] * torch.Size(self.sizes).numel()

    @property
    def places(self) -> tuple[slice, ...]:
        """Of the positions of x that are read, in its spatial dimensions."""
        return tuple(slice(-padding % step, None, step) for padding, step in zip(self.conv.padding, self.conv.steps))

    @property
    def margins(self) -> list[tuple[int, int]]:
        """Of every spatial dimension, how many outputs before and behind these read padding."""
        before = [-(-padding // step) for padding, step in zip(self.conv.padding, self.conv.steps)]
        read = [len(range(size)[place]) for size, place in zip(self.x.shape[2:], self.places)]
        return [(b, size - b - r) for b, r, size in zip(before, read, self.sizes)]

    @property
    def fuses(self) -> bool:
        """Whether the backend has kernels for what moments tell of it."""
        activation = LINEAR if self.fold is None else self.fold.affine.activation
        return not any(self.conv.padding) and self.backend.fuses_moments(self.x, self.conv, activation)

    @property
    def multiplies(self) -> bool:
        """Whether backward is that of `resdense_ext.ops.moments`."""
        return not any(self.conv.padding) and self.backend.multiplies_moments(self.x, self.conv)

    def dense(self) -> Pointwise:
        """The same of stride 1, of the positions alone that are read."""
        x, conv = sampled(self.x, self.conv)
        return self._replace(x=x, conv=conv)

    def read(self, part: slice) -> Tensor:
        """Some samples' raw values at the positions that are read."""
        x = self.x[part]
        return x if all(p == slice(0, None, 1) for p in self.places) else dense_map(x[(..., *self.places)])

    def activated(self, part: slice) -> Tensor:
        """Some samples' a, one value an output position, in the convolution's dtype."""
        a = self.read(part)
        if self.fold is not None:
            a = self.backend.bn_act(a, self.fold.affine)
        a = a.to(self.conv.weight.dtype)
        margins = [n for pair in reversed(self.margins) for n in pair]
        return F.pad(a, margins) if any(margins) else a

    def convolved(self, part: slice) -> Tensor:
        """Some samples' z."""
        x, affine = self.read(part), None if self.fold is None else self.fold.affine
        if any(n for pair in self.margins for n in pair):
            x, affine = self.activated(part), None
        weight, bias, *_ = self.conv
        ones = (1,) * (weight.dim() - 2)
        z = empty_map(x, weight.shape[0], weight.dtype)
        self.backend.bn_act_conv(x, affine, Conv(weight, bias, (0,) * len(ones), ones, self.conv.groups), z, None, 1.0, None)
        return z

    def deviations(self, part: slice, center: Tensor) -> Tensor:
        """Some samples' ``a - center`` as matrices, in the dtype of the center."""
        a = self.activated(part)
        b = _by_channel(a, a.shape[1], center.dtype)
        return _matrices(torch.sub(a, per_channel(center, a), out=b), self.conv.groups)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """The weight as matrices ``[groups, K / groups, C / groups]``."""
        return self.conv.weight.detach().to(dtype).view(self.conv.groups, -1, self.conv.weight.shape[1])


def _by_channel(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised map that is a matrix of channels and positions: `_matrices` copies nothing."""
    if memory_format_of(like) != torch.contiguous_format:
        return empty_map(like, channels, dtype)
    return torch.empty((channels, like.shape[0], *like.shape[2:]), dtype=dtype, device=like.device).transpose(0, 1)


def _matrices(x: Tensor, groups: int) -> Tensor:
    """A map as matrices ``[groups, C / groups, positions]``; rows of positions, or columns of channels, stay what they are."""
    return x.transpose(0, 1).reshape(groups, x.shape[1] // groups, -1)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b^T`` in every group."""
    for result, left, right in zip(total, a, b):
        result.addmm_(left, right.T)


class Moments(NamedTuple):
    """Of what a convolution reads: the mean ``[C]`` in float64 and R, the sums of products of deviations from it, ``[groups, C /
    groups, C / groups]``. Where there is no R the mean is only near."""

    mean: Tensor
    products: Optional[Tensor]


def moments(source: Pointwise, batch_stats: bool = True) -> Moments:
    """``mean = 1^T a / M`` and ``R = (a - mean)^T (a - mean)``; without the batch's statistics, a point near the mean."""
    center = _near_mean(source)
    if not batch_stats:
        return Moments(center.double(), None)
    groups, inputs = source.conv.groups, source.conv.weight.shape[1]
    products = center.new_zeros((groups, inputs, inputs))
    sums = torch.zeros_like(center, dtype=torch.float64)
    for part in source.backend.chunks(source.x):
        b = source.deviations(part, center)
        sums += b.sum(-1).flatten()
        _add_products(products, b, b)
    rest = (sums / source.count).view(groups, inputs, 1)
    products.copy_(products.double() - source.count * rest * rest.mT)
    return Moments(center + rest.flatten(), products)


def _near_mean(source: Pointwise) -> Tensor:
    """What the activation makes of the mean of its input, else the first sample's mean: a point some deviations away at most."""
    fold = source.fold
    if fold is not None and fold.count is not None:
        center = reference.activate(fold.affine.scale * fold.mean + fold.affine.shift, fold.affine.activation)
        return center.to(accumulation_dtype(source.conv.weight.dtype))
    a = source.activated(slice(0, 1))
    return a.to(accumulation_dtype(a.dtype)).mean((0, *range(2, a.dim())))


def output_statistics(source: Pointwise, of_input: Moments) -> Stats:
    """The mean of ``z = W a + bias`` and its sum of squared deviations."""
    weight, bias = source.weights(torch.float64), source.conv.bias
    mean = _image(weight, of_input.mean) + (0 if bias is None else bias.detach())
    m2 = ((weight @ of_input.products.double()) * weight).sum(-1).flatten().clamp(min=0)
    return Stats(*(v.to(of_input.products.dtype) for v in (mean, m2)))


def _image(weight: Tensor, vector: Tensor) -> Tensor:
    """``W v``, group by group."""
    return (weight @ vector.view(weight.shape[0], -1, 1)).flatten()


class Branch(NamedTuple):
    """A 1x1 convolution and the norm that reads it, folded: what is added up, or the shortcut of a projection."""

    source: Pointwise
    fold: Fold

    @property
    def dtype(self) -> torch.dtype:
        return self.source.conv.weight.dtype

    def empty(self, dtype: torch.dtype) -> Tensor:
        return empty_map(self.source.x, self.source.conv.weight.shape[0], dtype, self.source.sizes)

    def part(self, samples: slice) -> tuple[Tensor, Affine]:
        return self.source.convolved(samples), self.fold.affine


class Carried(NamedTuple):
    """A map that is there, raw behind a norm's fold, or as it is."""

    x: Tensor
    fold: Optional[Fold] = None

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def empty(self, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(self.x, dtype=dtype)

    def part(self, samples: slice) -> tuple[Tensor, Optional[Affine]]:
        return self.x[samples], None if self.fold is None else self.fold.affine


def forward(
    main: Branch | Carried, shortcut: Branch | Carried, activation: Activation, backend: ReferenceBackend
) -> tuple[Tensor, Optional[Tensor]]:
    """``act(main + shortcut)``, and the activation's input where the output does not determine its derivative.

    The main one has a norm; the output has its layout, and the dtype of the sum.
    """
    dtype = torch.promote_types(main.dtype, shortcut.dtype)
    out = main.empty(dtype)
    before = None if reference.determined(activation) else torch.empty_like(out)
    for part in backend.chunks(out):
        z, affine = main.part(part)
        identity, identity_affine = shortcut.part(part)
        operands = z.to(dtype), affine, identity.to(dtype), identity_affine
        if before is None:
            out[part] = backend.bn_add_act(*operands, activation)
        else:
            before[part] = backend.bn_add_act(*operands, LINEAR)
            out[part] = reference.activate(before[part], activation)
    return out, before


class Gradients(NamedTuple):
    """Of the convolution and what stands before it, and of the norm behind it."""

    conv: ConvGrads
    norm_weight: Tensor
    norm_bias: Tensor


def backward(
    branch: Branch,
    of_input: Optional[Moments],
    g: Tensor,
    into: Optional[Pending] = None,
    need_input: bool = True,
    need_weight: bool = True,
) -> Gradients:
    """From ``g``, the gradient of the sum that the activation reads, in the layout of x; it stays as it is.

    The gradient of x is pending as in `ReferenceBackend.bn_act_conv_backward`: a new one, or added to ``into`` (of alpha 1).
    Where it is not needed, neither are those of the norm before the convolution. Moments that nobody kept are added up again.
    """
    source, fold = branch
    conv, groups, wide = source.conv, source.conv.groups, fold.mean.dtype
    column = lambda vector: vector.view(groups, -1, 1)  # noqa: E731

    if of_input is None and fold.count is not None and source.multiplies:
        return _by_products(branch, g, into, need_input, need_weight)
    if fold.count is not None and source.fuses and g.dtype == conv.weight.dtype:
        return _by_kernels(branch, of_input, g, into, need_input, need_weight)
    of_input = of_input or moments(source, fold.count is not None)
    dbeta, G = _gradient_products(source, of_input, g, wide)
    weight, mean = source.weights(wide), of_input.mean.view(groups, 1, -1)
    dgamma = fold.rstd * (weight * G).sum(-1, dtype=torch.float64).flatten()
    s, r = column(fold.affine.scale), column(fold.rstd)
    dW = db = None
    if fold.count is None:
        P = Q = None
        bias = 0 if conv.bias is None else conv.bias.detach()
        dgamma = dgamma + fold.rstd * dbeta * (_image(weight.double(), of_input.mean) + bias - fold.mean)
        if need_weight:
            dW = s * (G + column(dbeta) * mean)
            db = fold.affine.scale * dbeta
    else:
        P, Q = (v.to(wide) for v in (s * column(dbeta) / fold.count, s * r * column(dgamma) / fold.count))
        if need_weight:
            dW = s * G - Q * (weight @ of_input.products)
            db = torch.zeros_like(dbeta)
    norm_grads = dgamma.to(wide), dbeta.to(wide)
    dW = None if dW is None else dW.to(conv.weight.dtype).view_as(conv.weight)
    db = None if db is None or conv.bias is None else db.to(conv.bias.dtype)
    if not need_input:
        return Gradients(ConvGrads(None, dW, db, None, None), *norm_grads)
    terms = _Terms((s * weight).mT, None, None, of_input.mean.to(wide))
    if Q is not None:
        products = weight.mT @ (-Q * weight)
        # The deviations are taken from the mean as it is rounded.
        offset = products @ (column(terms.center).mT - mean).mT.to(wide) - weight.mT @ P
        terms = terms._replace(products=products, offset=offset.to(wide))
    found = _through_prologue(source, terms, g, into)
    return Gradients(found._replace(weight=dW, bias=db), *norm_grads)


def _by_products(branch: Branch, g: Tensor, into: Optional[Pending], need_input: bool, need_weight: bool) -> Gradients:
    """As `backward`, by `resdense_ext.ops.moments`; of a sampled x, the gradient is made apart."""
    (x, prologue, conv, backend), fold = branch
    at = sampling(conv)
    if at is None:
        return Gradients(*by_products.backward(x, prologue, conv, fold, g, into, backend, need_input, need_weight))
    read, dense = sampled(x, conv)
    if into is None and need_input:
        into = Pending.of(torch.zeros_like(x), x)
    part = None if into is None else into._replace(dy=dense_map(into.dy[at]), z=read)
    found, *of_norm = by_products.backward(read, prologue, dense, fold, g, part, backend, need_input, need_weight)
    if need_input:
        into.dy[at].copy_(part.dy)
        found = found._replace(input=into)
    return Gradients(found, *of_norm)


def _gradient_products(source: Pointwise, of_input: Moments, g: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """``1^T g`` in float64, and ``G = g^T (a - mean)`` of every group."""
    groups, inputs = source.conv.groups, source.conv.weight.shape[1]
    center = of_input.mean.to(wide)
    products = center.new_zeros((groups, g.shape[1] // groups, inputs))
    sums = torch.zeros(g.shape[1], dtype=torch.float64, device=g.device)
    for part in source.backend.chunks(g):
        dy = _matrices(g[part].to(wide), groups)
        sums += dy.sum(-1).flatten()
        _add_products(products, dy, source.deviations(part, center))
    rest = (of_input.mean - center).view(groups, 1, inputs)
    return sums, products.sub_((sums.view(groups, -1, 1) * rest).to(wide))


class _Terms(NamedTuple):
    """Of the gradient of a: ``weight dy + products (a - center) + offset``, by groups; the last two only with statistics of
    the batch."""

    weight: Tensor
    products: Optional[Tensor]
    offset: Optional[Tensor]
    center: Tensor

    def gradient(self, source: Pointwise, g: Tensor, part: slice) -> Tensor:
        """That of some samples' a."""
        result = _by_channel(g[part], source.x.shape[1], self.center.dtype)
        dy = _matrices(g[part].to(self.center.dtype), source.conv.groups)
        b = dy if self.products is None else source.deviations(part, self.center)
        for i, da in enumerate(_matrices(result, source.conv.groups)):
            if self.products is None:
                torch.mm(self.weight[i], dy[i], out=da)
            else:
                torch.addmm(self.offset[i], self.weight[i], dy[i], out=da).addmm_(self.products[i], b[i])
        return result


def _through_prologue(source: Pointwise, terms: _Terms, g: Tensor, into: Optional[Pending]) -> ConvGrads:
    """The gradient of x from that of a, and with it those of the norm between them."""
    x, fold, _, backend = source
    reads_all = source.sizes == x.shape[2:]
    dy = into.dy if into is not None else empty_map(x, x.shape[1], x.dtype)
    if into is None and not reads_all:
        dy.zero_()
    inside = (..., *(slice(before, size - behind) for (before, behind), size in zip(source.margins, source.sizes)))
    sums: Optional[list[Tensor]] = None
    for part in backend.chunks(g):
        da = terms.gradient(source, g, part)[inside].to(x.dtype).contiguous(memory_format=memory_format_of(x))
        if fold is not None:
            found = backend.bn_act_backward(da, source.read(part), fold.affine, fold.mean)
            sums = list(found) if sums is None else [total.add_(new) for total, new in zip(sums, found)]
        target = dy[part][(..., *source.places)]
        if into is None:
            target.copy_(da)
        else:
            target.add_(da if fold is None else per_channel(fold.affine.scale, da) * da)
    return backend._grads(x, fold, None, None, dy, into, *(sums or (None, None)))


def _by_kernels(
    branch: Branch, of_input: Optional[Moments], g: Tensor, into: Optional[Pending], need_input: bool, need_weight: bool
) -> Gradients:
    """As `backward`, in two walks over what is read of x."""
    (x, prologue, conv, backend), fold = branch
    dense = branch.source.dense()
    read, linear = dense.x, prologue or Fold.linear(x)
    if of_input is None:
        near = _near_mean(dense)
        rest, R, sum_g, G = backend.moments(read, linear.affine, near, g)
    else:
        near = of_input.mean.to(fold.mean.dtype)
        rest, R = of_input.mean - near, of_input.products[0]
        sum_g, (G,) = _gradient_products(dense, of_input, g, near.dtype)
    weight = conv.weight.detach().flatten(1).contiguous()
    dgamma, dW, *terms, offset = backend.terms_of_moments(rest, R, sum_g, G, weight, fold, need_weight)
    norm_grads = dgamma, sum_g.to(dgamma.dtype)
    dW = dW.view_as(conv.weight) if need_weight else None
    db = torch.zeros_like(conv.bias) if need_weight and conv.bias is not None else None
    if not need_input:
        return Gradients(ConvGrads(None, dW, db, None, None), *norm_grads)
    at = sampling(conv)
    target = torch.empty_like(read) if into is None else into.dy if at is None else dense_map(into.dy[at])
    sums = backend.moments_backward(read, linear, g, *terms, near, offset, target, into is not None)
    dy = target
    if at is not None:
        dy = torch.zeros_like(x) if into is None else into.dy
        dy[at].copy_(target)
    return Gradients(backend._grads(x, prologue, dW, db, dy, into, *sums), *norm_grads)


def norm_gradients(g: Tensor, z: Tensor, fold: Fold, backend: ReferenceBackend) -> ConvGrads:
    """Of a norm that reads ``z``, from the gradient of its output, which stays as it is: that of z, pending, and the norm's own."""
    _, *sums, _ = backend.bn_add_act_backward(g, g, z, fold.mean, None, None, LINEAR)
    return backend.norm_backward(g, z, fold, *sums)
