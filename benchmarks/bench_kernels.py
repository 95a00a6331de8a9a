"""Every primitive of the dense engine on a GPU, at the layers of densenet121 and densenet201, beside plain PyTorch's.

And ResNet-50's 3x3 convolutions. The Triton backend's are our own kernels here, whatever `ops.triton` would choose; the CUDA
backend's are its own for dense layers, and else the vendor's on an activation in memory. "library" is that for dense layers, too.

Time is set against two floors of the same run: the bytes of every operand, read or written once, over the bandwidth of a large
copy; and the products over the rate of a large matrix product. Each is preceded by a comparison with the reference in float32.

    python benchmarks/bench_kernels.py [--seconds 500] [--batch 256 32] [--backend cuda] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple, Optional
from unittest import mock

import torch
import torch.nn.functional as F
from _gpu import Budget, Results, ceilings, device_times, measured, require_gpu
from torch import Tensor
from tqdm import tqdm

import resdense_ext as rd
from resdense_ext import reference
from resdense_ext.cli.bench.rows import conditions, row
from resdense_ext.ops import backend as backends
from resdense_ext.ops import triton
from resdense_ext.ops.cuda import CudaBackend
from resdense_ext.ops.operands import Affine, Fold, Pending, Stats
from resdense_ext.ops.reference_backend import ReferenceBackend
from resdense_ext.reference import Activation, BatchNorm, Conv

NETWORKS = {"densenet121": (6, 12, 24, 16), "densenet201": (6, 12, 48, 32)}
DEVICE = "cuda"
GROWTH, BOTTLENECK = 32, 128
SECONDS = 0.1  # of measuring, a case: there are some 600


class Shape(NamedTuple):
    """One layer: its input's channels, those of the buffer that this is a slice of, and the size of a side."""

    network: str
    block: int
    channels: int
    buffer: int
    side: int


def shapes() -> Iterator[Shape]:
    """The first and the last layer of every block."""
    for network, blocks in NETWORKS.items():
        channels, side = 64, 56
        for block, layers in enumerate(blocks):
            buffer = channels + layers * GROWTH
            yield Shape(network, block + 1, channels, buffer, side)
            yield Shape(network, block + 1, buffer - GROWTH, buffer, side)
            channels, side = buffer // 2, side // 2


def square_shapes() -> Iterator[Shape]:
    """ResNet-50's 3x3 convolutions with stride 1."""
    for block, channels, side in ((1, 64, 56), (2, 128, 28), (3, 256, 14), (4, 512, 7)):
        yield Shape("resnet50", block, channels, channels, side)


def strided_shapes() -> Iterator[Shape]:
    """ResNet-50's 3x3 convolutions with stride 2."""
    for block, channels, side in ((2, 128, 56), (3, 256, 28), (4, 512, 14)):
        yield Shape("resnet50", block, channels, channels, side)


class Operands:
    """A dense layer's tensors in channels-last, on slices of its block's buffers."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.channels = C = shape.channels
        count = batch * shape.side**2

        def maps(channels: int) -> Tensor:
            return _maps(batch, channels, shape.side, dtype, device)

        self.buffer, self.gradient = maps(shape.buffer), maps(shape.buffer)
        self.slice()
        self.z, self.dy = maps(BOTTLENECK), maps(BOTTLENECK)
        self.fold, self.inner = _fold(C, count, device), _fold(BOTTLENECK, count, device)
        self.norm = BatchNorm(*(torch.rand(BOTTLENECK, device=device) for _ in range(2)))
        self.conv1 = Conv(_weight(BOTTLENECK, C, 1, dtype, device))
        self.conv3 = Conv(_weight(GROWTH, BOTTLENECK, 3, dtype, device), padding=(1, 1))
        self.beta, self.delta = torch.zeros((2, C), device=device).unbind()

    def slice(self) -> None:
        """The maps that are slices of the buffers."""
        C = self.channels
        self.x, self.D = self.buffer[:, :C], self.gradient[:, :C]
        self.new, self.new_gradient = self.buffer[:, C : C + GROWTH], self.gradient[:, C : C + GROWTH]

    def float(self) -> Operands:
        """A copy in float32."""
        other = object.__new__(type(self))

        def wide(value):
            if isinstance(value, Tensor):
                return value.to(torch.float32, copy=True)
            return type(value)(*map(wide, value)) if isinstance(value, tuple) and hasattr(value, "_fields") else value

        for name, value in vars(self).items():
            setattr(other, name, wide(value))
        other.slice()
        return other

    def stats(self, channels: int) -> Stats:
        return Stats(*torch.empty((2, channels), device=self.z.device).unbind())

    def pending(self, dy: Tensor, z: Tensor) -> Pending:
        ones = torch.ones(z.shape[1], device=z.device)
        return Pending(dy, z, ones, 0.01 * ones, 0.02 * ones)


class SquareOperands(Operands):
    """Those of a bottleneck's 3x3 convolution, which are no slices."""

    STEP = 1

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        C, side = shape.channels, shape.side
        self.x = _maps(batch, C, side, dtype, device)
        self.z, self.dy = (_maps(batch, C, -(-side // self.STEP), dtype, device) for _ in range(2))
        self.fold = _fold(C, batch * side**2, device)
        self.norm = BatchNorm(*(torch.rand(C, device=device) for _ in range(2)))
        self.conv = Conv(_weight(C, C, 3, dtype, device), padding=(1, 1), stride=(self.STEP,) * 2)

    def slice(self) -> None:
        pass


class StridedOperands(SquareOperands):
    STEP = 2


def _maps(batch: int, channels: int, side: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn((batch, side, side, channels), dtype=dtype, device=device).movedim(-1, 1)


def _weight(outputs: int, inputs: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    weight = torch.randn(outputs, inputs, size, size) / (inputs**0.5 * size)
    return weight.to(device, dtype, memory_format=torch.channels_last)


def _fold(channels: int, count: int, device: str) -> Fold:
    scale, shift, mean, rstd = torch.rand((4, channels), device=device).add_(0.1).unbind()
    return Fold(Affine(scale, shift - 0.6, Activation()), mean, rstd, count)


class LibraryBackend(CudaBackend):
    """The CUDA backend without its kernels for the convolutions of dense layers."""

    name = "library"

    def fuses(self, x: Tensor) -> bool:
        return False


def using(backend: ReferenceBackend):
    return rd.use_backend("cuda" if isinstance(backend, LibraryBackend) else backend.name)


class Operation(NamedTuple):
    """``run`` returns what is compared; ``channels`` are moved for every position; ``stock`` is stock PyTorch's way."""

    name: str
    run: Callable[[ReferenceBackend, Operands], list[Tensor]]
    channels: Callable[[int], int]
    flops: Callable[[int], int]
    stock: Optional[Callable[[Operands], object]] = None
    operands: type[Operands] = Operands


def _conv(conv: str, x: str, fold: str, out: str, reader: bool):
    def run(backend: ReferenceBackend, t: Operands) -> list[Tensor]:
        target, stats = getattr(t, out), t.stats(getattr(t, out).shape[1])
        args = (getattr(t, x), getattr(t, fold).affine, getattr(t, conv), target, None, 1.0, stats)
        folded = backend.bn_act_conv(*args, t.norm if reader else None)
        return [target, *stats, *(folded.affine[:2] if reader else ())]

    return run


def _backward1(need_weight: bool):
    def run(backend: ReferenceBackend, t: Operands) -> list[Tensor]:
        into = Pending(t.D, t.x, None, t.beta, t.delta)
        grads = backend.bn_act_conv_backward(t.x, t.fold, t.conv1, t.pending(t.dy, t.z), into, need_weight)
        return [t.D, *grads.input[3:], *grads[3:], *([grads.weight] if need_weight else [])]

    return run


def _backward(conv: str, x: str, fold: str, dy: str, z: str, need_weight: bool):
    def run(backend: ReferenceBackend, t: Operands) -> list[Tensor]:
        grad = t.pending(getattr(t, dy), getattr(t, z))
        grads = backend.bn_act_conv_backward(getattr(t, x), getattr(t, fold), getattr(t, conv), grad, None, need_weight)
        return [grads.input.dy, *grads.input[3:], *grads[3:], *([grads.weight] if need_weight else [])]

    return run


def _ours(run):
    """By Triton's kernels, where that is the backend, whatever the shape."""

    def unlimited(backend: ReferenceBackend, t: Operands) -> list[Tensor]:
        with mock.patch.multiple(triton, PRODUCTS=float("inf"), STRIDED_PRODUCTS=float("inf")):
            return run(backend, t)

    return unlimited


def _stock(x: str, conv: str, backward: bool):
    """Batch norm, ReLU and convolution of a map that is there; forward, or forward and backward."""

    def run(t: Operands) -> object:
        weight = getattr(t, conv).weight.detach().requires_grad_(backward)
        source = getattr(t, x).detach().requires_grad_(backward)
        scale = torch.ones(source.shape[1], device=source.device, requires_grad=backward)
        activated = F.relu(F.batch_norm(source, None, None, scale, scale, True))
        out = reference.convolution(activated, getattr(t, conv)._replace(weight=weight))
        return torch.autograd.grad(out, [source, weight, scale], out) if backward else out

    return run


OPERATIONS = (
    Operation("channel_stats", lambda b, t: list(b.channel_stats(t.x)), lambda C: C, lambda C: 0),
    Operation("bn_act", lambda b, t: [b.bn_act(t.z, t.inner.affine)], lambda C: 256, lambda C: 0),
    Operation("bn_act_backward", lambda b, t: [t.dy, *b.bn_act_backward(t.dy, t.z, t.inner.affine, t.inner.mean)][:3],
              lambda C: 384, lambda C: 0),
    Operation("bn_act_backward_accumulate",
              lambda b, t: [t.D, *b.bn_act_backward_accumulate(t.D, t.x, t.x, t.fold.affine, t.fold.mean)],
              lambda C: 3 * C, lambda C: 0),
    Operation("pending_grad", lambda b, t: [b.pending_grad_(t.pending(t.dy, t.z))], lambda C: 384, lambda C: 0),
    Operation("bn_act_conv 1x1", _conv("conv1", "x", "fold", "z", True), lambda C: C + 128, lambda C: 2 * C * 128,
              _stock("x", "conv1", False)),
    Operation("bn_act_conv 3x3", _conv("conv3", "z", "inner", "new", False), lambda C: 160, lambda C: 2 * 9 * 128 * 32,
              _stock("z", "conv3", False)),
    Operation("bn_act_conv_backward 1x1 data", _backward1(False), lambda C: 3 * C + 256, lambda C: 2 * C * 128),
    Operation("bn_act_conv_backward 1x1", _backward1(True), lambda C: 4 * C + 512, lambda C: 4 * C * 128,
              _stock("x", "conv1", True)),
    Operation("bn_act_conv_backward 3x3 data", _backward("conv3", "z", "inner", "new_gradient", "new", False),
              lambda C: 320, lambda C: 2 * 9 * 128 * 32),
    Operation("bn_act_conv_backward 3x3", _backward("conv3", "z", "inner", "new_gradient", "new", True),
              lambda C: 512, lambda C: 4 * 9 * 128 * 32, _stock("z", "conv3", True)),
    Operation("add_act", lambda b, t: [rd.functional.add_act(t.z, t.dy)], lambda C: 384, lambda C: 0,
              lambda t: F.relu(t.z + t.dy)),
)  # fmt: skip


def _residual(suffix: str, step: int, operands: type[Operands]) -> Iterator[Operation]:
    """A bottleneck's 3x3 convolution, forward and backward; positions are the input's."""
    area = step * step  # positions of the input for one of the output
    for name, run, moved, passes, stock in (
        ("bn_act_conv", _conv("conv", "x", "fold", "z", True), lambda C: C + C // area, 1, _stock("x", "conv", False)),
        ("bn_act_conv_backward", _backward("conv", "x", "fold", "dy", "z", True), lambda C: 3 * C + 4 * C // area, 2,
         _stock("x", "conv", True)),
    ):  # fmt: skip
        flops = lambda C, passes=passes: 2 * passes * 9 * C * C // area  # noqa: E731
        yield Operation(f"{name} {suffix}", _ours(run), moved, flops, stock, operands)


SQUARE = tuple(_residual("square", 1, SquareOperands))
STRIDED = tuple(_residual("strided", 2, StridedOperands))


def worst_error(operation: Operation, backend: ReferenceBackend, t: Operands) -> float:
    """The largest relative error, in norm, against the reference in float32 at the same size. Changes ``t``."""
    wide = t.float()
    with using(backend):
        ours = [out.float() for out in operation.run(backend, t)]
    with rd.use_backend("reference"):
        truth = operation.run(backends.get("reference"), wide)
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(ours, truth))


def setting_of(shape: Shape, batch: int) -> dict:
    """What tells a row from those of the same operation and backend."""
    return {"network": shape.network, "shape": [batch, shape.channels, shape.side, shape.side], "dtype": "bfloat16"}


def measure(operation: Operation, backend: ReferenceBackend, shape: Shape, batch: int, peak: tuple[float, float]) -> list[dict]:
    """Rows of ours and the vendor's, after ours has been found right."""
    bandwidth, rate = peak
    t = operation.operands(shape, batch, torch.bfloat16, DEVICE)
    setting = setting_of(shape, batch)
    error = worst_error(operation, backend, t)
    if not error < 0.02:
        raise RuntimeError(f"off by {error:.3g} in norm")
    positions = batch * shape.side**2
    moved = 2 * positions * operation.channels(shape.channels)
    floor = max(moved / bandwidth, positions * operation.flops(shape.channels) / rate)
    with using(backend):
        times = device_times(lambda: operation.run(backend, t), SECONDS, ahead=True)
    rows = [
        row(operation.name, backend.name, "device", "time", "s", times, **setting),
        row(operation.name, backend.name, "device", "bytes over copy bandwidth", "1", [moved / s / bandwidth for s in times], **setting),
        row(operation.name, backend.name, "device", "FLOP over product rate", "1",
            [positions * operation.flops(shape.channels) / s / rate for s in times], **setting),
        row(operation.name, backend.name, "device", "time over floor", "1", [s / floor for s in times], **setting),
        row(operation.name, backend.name, "check", "error", "1", [error], **setting),
    ]  # fmt: skip
    if operation.stock is not None:
        times = device_times(lambda: operation.stock(t), SECONDS, ahead=True)
        rows.append(row(operation.name, "torch", "device", "time", "s", times, **setting))
    return rows


def table(rows: list[dict]) -> str:
    """The operations by their time over the floor, worst first."""
    over: dict[tuple[str, str], list[float]] = {}
    failed = {(r["op"], r["provider"]): r["error"] for r in rows if r["metric"] == "failed"}
    for r in rows:
        if r["metric"] == "time over floor":
            over.setdefault((r["op"], r["provider"]), []).append(r["median"])
    lines = [f"{'operation':34} {'backend':8} {'median time over floor':>22} {'worst':>7}"]
    for (op, provider), values in sorted(over.items(), key=lambda item: -median(item[1])):
        lines.append(f"{op:34} {provider:8} {median(values):22.2f} {max(values):7.2f}")
    lines += [f"{op:34} {provider:8} failed: {error}" for (op, provider), error in sorted(failed.items())]
    return "\n".join(lines)


def vendor_table(rows: list[dict]) -> str:
    """Triton's time over the CUDA backend's, the vendor's, by products a value of the input: `PRODUCTS` and `STRIDED_PRODUCTS` are
    to be where it passes 1."""
    times = {(r["op"], r["provider"], *r["shape"]): r["median"] for r in rows if r["metric"] == "time"}
    lines = [f"{'operation':34} {'batch':>5} {'products':>8} {'over the vendor':>15}"]
    for (op, provider, batch, channels, *sides), ours in times.items():
        theirs = times.get((op, "cuda", batch, channels, *sides))
        if provider == "triton" and op.endswith(("square", "strided")) and theirs is not None:
            products = channels * 9 // (4 if op.endswith("strided") else 1)
            lines.append(f"{op:34} {batch:5} {products:8} {ours / theirs:15.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=500, help="stop starting measurements after so long")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--backend", nargs="+", default=["cuda", "library", "triton"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    require_gpu()
    budget = Budget(options.seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    results = Results(options.out / "gpu_kernels.jsonl", conditions("cuda")["commit"])
    rows, *peak = ceilings()
    results.add(rows)
    probe = torch.zeros(1, 1, 1, device=DEVICE)
    named = [LibraryBackend() if name == LibraryBackend.name else backends.get(name) for name in options.backend]
    chosen = [b for b in named if b.refusal(probe, probe.dtype) is None]
    groups = ((shapes(), OPERATIONS), (square_shapes(), SQUARE), (strided_shapes(), STRIDED))
    layers = [(s, op) for of, operations in groups for s in of for op in operations]
    todo = [(op, b, s, n) for n in options.batch for s, op in layers for b in chosen]
    todo = [case for case in todo if not isinstance(case[1], LibraryBackend) or "1x1" in case[0].name]
    todo.sort(key=lambda case: case[2].network == "densenet201")  # what there may be no time for
    try:
        for operation, backend, shape, batch in tqdm(todo, disable=None, unit="case"):
            if budget.left() < 0:
                print(f"stopped after {options.seconds:.0f} s; run it again for what is missing")
                break
            setting = setting_of(shape, batch)
            if not results.find(op=operation.name, provider=backend.name, **setting):
                failed = functools.partial(row, operation.name, backend.name, "check", "failed", "1", [1], **setting)
                measured(lambda: measure(operation, backend, shape, batch, tuple(peak)), failed, budget, results)
    finally:  # interrupted, too
        print(table(results.find()))
        print(vendor_table(results.find()))


if __name__ == "__main__":
    main()
